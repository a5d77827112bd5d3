"""What a picture shows: nodes in groups, and the edges between them."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any


class Kind(enum.Enum):
    """What a node stands for."""

    ARGUMENT = "argument"
    RESULT = "result"
    CONSTANT = "constant"
    OPERATION = "operation"
    PORT = "port"  # a loop's carry or slice, a kernel's reference
    CHOICE = "choice"  # where branches meet, or where a loop asks to go on


class GroupKind(enum.Enum):
    """What a group of nodes stands for."""

    SCOPE = "scope"  # a module, a named scope
    CALL = "call"  # a jitted function, a checkpoint, a fusion
    RULE = "rule"  # a custom derivative rule
    PASS = "pass"  # the forward or the backward one of a gradient
    LOOP = "loop"
    BRANCH = "branch"
    REGION = "region"  # over devices, or inside of a kernel
    LEAVES = "leaves"  # a sub-tree of the arguments or the results
    RUN = "run"  # neighbours in a long program


# Groups that say nothing when they hold a single thing.
_TRANSPARENT = frozenset(
    {GroupKind.SCOPE, GroupKind.CALL, GroupKind.LEAVES, GroupKind.RUN}
)


@dataclasses.dataclass(eq=False)
class Node:
    """One node; `details` makes the text that shows when the mouse is over it."""

    label: str
    kind: Kind
    details: Callable[[], str] = str
    is_backward: bool = False
    is_wrong: bool = False
    is_ordered: bool = False
    group: Group | None = None


@dataclasses.dataclass(eq=False)
class Group:
    """Nodes and groups that are drawn in one box, or folded into one node.

    One that `is_detail`, such as a library's function, is folded before others are.
    """

    name: str
    kind: GroupKind
    parent: Group | None = None
    details: Callable[[], str] = str
    is_backward: bool = False
    is_wrong: bool = False
    is_detail: bool = False
    children: list[Node | Group] = dataclasses.field(default_factory=list)

    def add_group(self, name: str, kind: GroupKind, **others: Any) -> Group:
        """Adds and returns an empty group; on the same side of a gradient as this."""
        others.setdefault("is_backward", self.is_backward)
        made = Group(name, kind, self, **others)
        self.children.append(made)
        return made

    def add_node(self, label: str, kind: Kind, **others: Any) -> Node:
        """Adds and returns a node; on the same side of a gradient as this."""
        others.setdefault("is_backward", self.is_backward)
        made = Node(label, kind, group=self, **others)
        self.children.append(made)
        return made

    def nodes(self) -> Iterator[Node]:
        """Yields every node at any depth, in order."""
        for child in self.children:
            if isinstance(child, Group):
                yield from child.nodes()
            else:
                yield child

    def adopt(self, children: Sequence[Node | Group]) -> None:
        """Takes these as its children, in place of what it had."""
        self.children = list(children)
        for child in self.children:
            if isinstance(child, Group):
                child.parent = self
            else:
                child.group = self


@dataclasses.dataclass(frozen=True)
class Edge:
    """A value that goes from one node to another; `is_back` in a loop's next round."""

    source: Node
    target: Node
    label: str
    is_back: bool = False


@dataclasses.dataclass(eq=False)
class Drawing:
    """A whole picture, before anything is folded.

    Attributes:
      title: Stands above it.
      root: Holds everything.
      edges: In the order in which the program makes its values.
      has_backward: Whether a backward pass is told from a forward one.
      wrong: What is drawn as wrong, for the legend; empty where nothing is.
    """

    title: str
    root: Group
    edges: list[Edge] = dataclasses.field(default_factory=list)
    has_backward: bool = False
    wrong: str = ""

    def connect(
        self, source: Node, target: Node, label: str, is_back: bool = False
    ) -> None:
        """Draws an edge."""
        self.edges.append(Edge(source, target, label, is_back))

    def tidied(self) -> Drawing:
        """Returns it without unused ports, empty groups and boxes around one thing."""
        self._drop_unused_ports()
        _tidy(self.root)
        return self

    def _drop_unused_ports(self) -> None:
        used = {id(edge.source) for edge in self.edges}
        unused = {
            id(node)
            for node in self.root.nodes()
            if node.kind is Kind.PORT and id(node) not in used
        }
        self.edges = [edge for edge in self.edges if id(edge.target) not in unused]
        _drop(self.root, unused)


def _drop(group: Group, unused: set[int]) -> None:
    group.children = [child for child in group.children if id(child) not in unused]
    for child in group.children:
        if isinstance(child, Group):
            _drop(child, unused)


def _tidy(group: Group) -> None:
    kept: list[Node | Group] = []
    for child in group.children:
        if isinstance(child, Group):
            _tidy(child)
            kept += _unwrapped(child)
        else:
            kept.append(child)
    group.adopt(kept)


def _unwrapped(group: Group) -> list[Node | Group]:
    """Returns a group, or what it holds where its box would say nothing."""
    if not group.children:
        return []
    if len(group.children) > 1 or group.kind not in _TRANSPARENT or group.is_wrong:
        return [group]
    (only,) = group.children
    scopes = (GroupKind.SCOPE, GroupKind.CALL)
    if isinstance(only, Group) and only.kind in scopes and group.kind is scopes[0]:
        only.name, only.kind = f"{group.name}/{only.name}", GroupKind.SCOPE
        only.is_detail = False
    return [only]
