"""Folds a large picture until it can be read: groups are drawn as single nodes."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator

from gradtest._src.graphs.drawing import Drawing, Group, GroupKind, Kind, Node

# Equations without a scope are folded from so many neighbours on,
_SHORTEST_RUN = 3
# and into so many runs where each one is long enough.
_RUNS = 12
_SHORTEST_PART = 5


def opened(drawing: Drawing, limit: int | None) -> set[int]:
    """Chooses the groups to draw open, so that at most `limit` nodes are seen.

    From the outside in, groups that are alike open together or not at all; those
    around something wrong come first. Neighbours without any scope are folded too.
    Arguments and results unfold where they go to different nodes.

    Args:
      drawing: The picture; runs of neighbours are put into it.
      limit: The most nodes, where that can be had; None opens everything.

    Returns:
      The `id` of each group that is open, the root's among them.
    """
    root = drawing.root
    groups = [group for group, _ in _groups(root)]
    if limit is None or sum(1 for _ in root.nodes()) <= limit:
        return {id(root), *map(id, groups)}
    for group in (root, *groups):
        _cut_into_runs(group, limit)
    folding = _Folding(drawing, limit)
    folding.open_program()
    folding.open_leaves()
    return folding.open


def _groups(root: Group, depth: int = 0) -> Iterator[tuple[Group, int]]:
    """Yields every group under one, with its depth."""
    for child in root.children:
        if isinstance(child, Group):
            yield child, depth
            yield from _groups(child, depth + 1)


class _Folding:
    """Opens groups, batch by batch, for as long as what is seen stays few."""

    def __init__(self, drawing: Drawing, limit: int):
        self.drawing = drawing
        self.limit = limit
        self.open = {id(drawing.root)}
        self.seen = len(drawing.root.children)

    def open_program(self) -> None:
        """Opens functions, scopes and loops, then what has no scope."""
        batches = _batches(self.drawing.root)
        for batch in batches:
            self._open([g for g in batch if _holds_wrong(g)], at_most=math.inf)
        for batch in sorted(batches, key=_comes_late):
            is_pass = batch[0].kind is GroupKind.PASS
            self._open(batch, at_most=math.inf if is_pass else self.limit)

    def open_leaves(self) -> None:
        """Opens trees of arguments and results that go to different nodes."""
        neighbours: dict[int, set[int]] = {}
        for edge in self.drawing.edges:
            source, target = edge.source, edge.target
            neighbours.setdefault(id(source), set()).add(id(seen(target, self.open)))
            neighbours.setdefault(id(target), set()).add(id(seen(source, self.open)))

        def goes_to(child: Node | Group) -> frozenset[int]:
            nodes = child.nodes() if isinstance(child, Group) else (child,)
            return frozenset().union(*(neighbours.get(id(n), ()) for n in nodes))

        for group, _ in sorted(_groups(self.drawing.root), key=lambda pair: pair[1]):
            if group.kind is GroupKind.LEAVES and len(
                {goes_to(child) for child in group.children}
            ) > 1:  # fmt: skip
                self._open([group], at_most=self.limit)

    def _open(self, batch: list[Group], at_most: float) -> None:
        shut = [
            group
            for group in batch
            if id(group) not in self.open and id(group.parent) in self.open
        ]
        more = sum(len(group.children) - 1 for group in shut)
        if self.seen + more <= at_most:
            self.seen += more
            self.open.update(map(id, shut))


def _comes_late(batch: list[Group]) -> int:
    if batch[0].kind is GroupKind.RUN:
        return 2
    return 1 if batch[0].is_detail else 0


def seen(node: Node, is_open: set[int]) -> Node | Group:
    """Returns a node, or the outermost folded group that it is in."""
    shown: Node | Group = node
    group = node.group
    while group is not None:
        if id(group) not in is_open:
            shown = group
        group = group.parent
    return shown


def _batches(root: Group) -> list[list[Group]]:
    """Returns a program's groups, outermost first, those that are alike together."""
    found: dict[tuple, list[Group]] = {}
    for group, depth in sorted(_groups(root), key=lambda pair: pair[1]):
        if group.kind is GroupKind.LEAVES:
            continue
        alike = re.sub(r"\d+", "#", group.name)
        if group.kind is GroupKind.RUN:
            alike = ""
        key = (depth, group.kind, alike, group.is_detail)
        found.setdefault(key, []).append(group)
    return list(found.values())


def _holds_wrong(group: Group) -> bool:
    return group.is_wrong or any(
        _holds_wrong(child) if isinstance(child, Group) else child.is_wrong
        for child in group.children
    )


def _cut_into_runs(group: Group, limit: int) -> None:
    """Puts neighbours that are in no scope into groups of their own.

    So it does with all children of a group that are more than can be seen at once.
    """
    children: list[Node | Group] = []
    for is_loose, some in itertools.groupby(group.children, _is_loose):
        members = list(some)
        if is_loose and len(members) >= _SHORTEST_RUN:
            children.append(_run(members, group))
        else:
            children += members
    if len(children) == 1 and isinstance(children[0], Group):
        is_run = children[0].kind is GroupKind.RUN
        children = children[0].children if is_run else children
    group.adopt(_thinned(children, group, limit))


def _run(members: list[Node | Group], parent: Group) -> Group:
    """Returns neighbours as one run, or as a run of runs."""
    run = Group("", GroupKind.RUN, parent, is_backward=members[0].is_backward)
    size = math.ceil(len(members) / _RUNS)
    if size < _SHORTEST_PART:
        run.adopt(members)
    else:
        run.adopt([_run(part, run) for part in _parts(members, size)])
    run.name = _contents(run)
    return run


def _thinned(
    children: list[Node | Group], group: Group, limit: int
) -> list[Node | Group]:
    """Returns children, neighbours of one kind together where they are too many."""
    thinned: list[Node | Group] = []
    for are_leaves, some in itertools.groupby(children, _is_leaf):
        members = list(some)
        if len(members) <= max(2, limit * (0.3 if are_leaves else 0.6)):
            thinned += members
        elif are_leaves:
            run = Group(_ends(members), GroupKind.LEAVES, group)
            run.is_backward = members[0].is_backward
            run.adopt(members)
            thinned.append(run)
        else:
            count = max(2, min(_RUNS, limit // 4))
            for part in _parts(members, math.ceil(len(members) / count)):
                run = Group(_ends(part), GroupKind.RUN, group)
                run.is_backward = part[0].is_backward
                run.adopt(_thinned(part, run, limit))
                thinned.append(run)
    return thinned


def _parts(members: list[Node | Group], size: int) -> Iterator[list[Node | Group]]:
    for start in range(0, len(members), size):
        yield members[start : start + size]


def _ends(members: list[Node | Group]) -> str:
    """Names the first and the last of several."""
    first, last = (
        child.name if isinstance(child, Group) else child.label.split("\n")[0]
        for child in (members[0], members[-1])
    )
    return f"{first} … {last}"


def _is_leaf(child: Node | Group) -> bool:
    if isinstance(child, Group):
        return False
    return child.kind in (Kind.ARGUMENT, Kind.RESULT)


def _is_loose(child: Node | Group) -> bool:
    return isinstance(child, Node) and child.kind in (Kind.OPERATION, Kind.CONSTANT)


def _contents(run: Group) -> str:
    """Names the commonest things in a run."""
    labels = Counter(
        re.split(r"[\n(]", node.label)[0]
        for node in run.nodes()
        if node.kind is Kind.OPERATION
    )
    return ", ".join(label for label, _ in labels.most_common(3)) or "constants"


def folded_label(group: Group) -> str:
    """Returns what stands on the node that a folded group is drawn as."""
    kinds = Counter(node.kind for node in group.nodes())
    arrays = kinds[Kind.ARGUMENT] + kinds[Kind.RESULT]
    if group.kind is GroupKind.LEAVES:
        return f"{group.name}\n{arrays:,} arrays"
    count = kinds[Kind.OPERATION] + kinds[Kind.CHOICE]
    if not count:
        return f"{group.name}\n{sum(kinds.values()):,} constants"
    return f"{group.name}\n{count:,} operation{'s' * (count != 1)}"
