"""Writes a picture in Graphviz's language."""

from __future__ import annotations

from collections.abc import Iterator

from gradtest._src.graphs.drawing import Drawing, Group, GroupKind, Kind, Node
from gradtest._src.graphs.folding import folded_label, opened, seen
from gradtest._src.report import legible

_LONGEST_LINE = 50
_LONGEST_DETAILS = 600
# Okabe and Ito's colours, which colour-blind people can tell apart, and tints of them.
_BLUE, _GREEN, _ORANGE, _PURPLE = "#0072B2", "#009E73", "#B36B00", "#A6427F"
_RED, _GREY, _INK = "#C43E00", "#6E6E6E", "#222222"
_WRONG = {"color": _RED, "fillcolor": "#FFD9C2", "penwidth": "3"}
_LOOKS = {
    Kind.ARGUMENT: {"shape": "ellipse", "color": _BLUE, "fillcolor": "#DCEBF7"},
    Kind.RESULT: {"shape": "ellipse", "color": _GREEN, "fillcolor": "#D6F0E5"},
    Kind.CONSTANT: {"shape": "note", "color": _GREY, "fillcolor": "#F2F2F2"},
    Kind.OPERATION: {"shape": "box", "color": _GREY, "fillcolor": "#FFFFFF"},
    Kind.PORT: {"shape": "cds", "color": _GREY, "fillcolor": "#F2F2F2"},
    Kind.CHOICE: {"shape": "diamond", "color": _GREY, "fillcolor": "#FFFFFF"},
}
_BACKWARD = {"color": _PURPLE, "fillcolor": "#F6E4EF"}
_FOLDED = {"shape": "box3d", "color": _GREY, "fillcolor": "#E9EDF1"}
_FOLDED_LEAVES = {
    Kind.ARGUMENT: {"shape": "ellipse", "peripheries": "2"},
    Kind.RESULT: {"shape": "ellipse", "peripheries": "2"},
}
_BOXES = {
    GroupKind.RULE: {"color": _ORANGE, "bgcolor": "#FFF4DC", "penwidth": "2"},
    GroupKind.LOOP: {"color": _GREY, "bgcolor": "#F4F6F8", "style": "rounded,dashed"},
    GroupKind.BRANCH: {"color": _GREY, "bgcolor": "#FAFAFA", "style": "rounded,dashed"},
    GroupKind.REGION: {"color": _BLUE, "bgcolor": "#F3F8FC", "style": "rounded,dashed"},
}
_PLAIN_BOX = {"color": "#B8B8B8", "bgcolor": "#FCFCFC"}
_HEAD = """\
digraph gradtest {
  graph [bgcolor="white", fontname="Helvetica", fontsize=11, fontcolor="#222222", \
labelloc=t, rankdir=TB, nodesep=0.25, ranksep=0.35, newrank=true, style=rounded]
  node [fontname="Helvetica", fontsize=11, fontcolor="#222222", height=0.3, \
style="filled,rounded", margin="0.12,0.05"]
  edge [fontname="Helvetica", fontsize=9, fontcolor="#555555", color="#555555", \
arrowsize=0.6]"""


def write(drawing: Drawing, fold: int | None) -> tuple[str, int]:
    """Returns a picture in Graphviz's language, and how many nodes it shows.

    Args:
      drawing: The picture.
      fold: The most nodes to show; None folds nothing.
    """
    writer = _Writer(drawing, opened(drawing, fold))
    return writer.text(), len(writer.names)


def quoted(text: str) -> str:
    """Returns any text as a quoted string that Graphviz shows as it is."""
    shown = visible(text)
    for plain, escaped in (("\\", "\\\\"), ('"', '\\"'), ("&", "&amp;")):
        shown = shown.replace(plain, escaped)
    return '"' + shown.replace("\n", "\\n") + '"'


def visible(text: str) -> str:
    """Replaces what can't be shown, or would be obeyed, by its escape sequence."""
    return "\n".join(map(legible.printable, text.split("\n")))


def shortened(text: str, longest: int = _LONGEST_LINE) -> str:
    """Cuts the middle out of each line that is too long."""
    return "\n".join(legible.shortened(line, longest) for line in text.split("\n"))


class _Writer:
    """Writes the groups that are open, and the edges between what is seen."""

    def __init__(self, drawing: Drawing, is_open: set[int]):
        self.drawing = drawing
        self.is_open = is_open
        self.names: dict[int, str] = {}
        self.clusters = 0

    def text(self) -> str:
        """Returns the whole graph."""
        drawing = self.drawing
        lines = [_HEAD, f"  label={quoted(shortened(drawing.title, 80))}"]
        lines += self._contents(drawing.root, "  ")
        lines += self._edges()
        lines += self._legend()
        return "\n".join([*lines, "}", ""])

    def _contents(self, group: Group, indent: str) -> Iterator[str]:
        for child in group.children:
            if isinstance(child, Group) and id(child) in self.is_open:
                yield from self._cluster(child, indent)
            else:
                yield indent + self._node(child)

    def _cluster(self, group: Group, indent: str) -> Iterator[str]:
        if group.kind in (GroupKind.LEAVES, GroupKind.RUN):
            yield from self._contents(group, indent)
            return
        self.clusters += 1
        look = dict(_BOXES.get(group.kind, _PLAIN_BOX))
        if group.kind is GroupKind.PASS:
            look = {"color": _PURPLE if group.is_backward else _BLUE,
                    "bgcolor": "#FFFFFF", "penwidth": "1.5"}  # fmt: skip
        if group.is_wrong:
            look |= {"color": _RED, "bgcolor": "#FFEADF", "penwidth": "3"}
        name = group.name + "\n✗ found wrong" * group.is_wrong
        look |= {"label": shortened(name), "tooltip": _details(group)}
        yield f"{indent}subgraph cluster_{self.clusters} {{"
        yield f"{indent}  graph [{_attributes(look)}]"
        yield from self._contents(group, indent + "  ")
        yield indent + "}"

    def _node(self, child: Node | Group) -> str:
        name = f"n{len(self.names)}"
        self.names[id(child)] = name
        look = _folded_look(child) if isinstance(child, Group) else _look(child)
        return f"{name} [{_attributes(look)}]"

    def _edges(self) -> Iterator[str]:
        """Writes an edge for each pair of nodes that are seen, whatever it carries."""
        carried: dict[tuple[str, str, bool], dict[tuple[int, str], str]] = {}
        ordered: dict[tuple[str, str, bool], None] = {}
        for edge in self.drawing.edges:
            source, target = (
                self.names[id(seen(node, self.is_open))]
                for node in (edge.source, edge.target)
            )
            if source != target or edge.is_back:
                pair = (source, target, edge.is_back)
                carried.setdefault(pair, {})[id(edge.source), edge.label] = edge.label
                ordered.setdefault(pair)
        for source, target, is_back in ordered:
            labels = [*carried[source, target, is_back].values()]
            text = labels[0] if len(labels) == 1 else f"{len(labels)} arrays"
            look = {"label": f" {shortened(text)} "} if text else {}
            if is_back:
                look |= {"style": "dashed", "constraint": "false"}
            yield f"  {source} -> {target} [{_attributes(look)}]"

    def _legend(self) -> Iterator[str]:
        if self.drawing.wrong:
            look = {"shape": "box", "label": "found wrong: " + self.drawing.wrong}
            yield f"  legend [{_attributes(look | _WRONG)}]"


def _look(node: Node) -> dict[str, str]:
    look = dict(_LOOKS[node.kind])
    if node.is_backward:
        look |= _BACKWARD
    if node.is_ordered:
        look["ordering"] = "in"
    if node.is_wrong:
        look |= _WRONG
    label = node.label + "\n✗ found wrong" * node.is_wrong
    return look | {"label": shortened(label), "tooltip": _details(node)}


def _folded_look(group: Group) -> dict[str, str]:
    look = dict(_FOLDED)
    if group.kind is GroupKind.LEAVES:
        kind = next(group.nodes()).kind
        look = _LOOKS[kind] | _FOLDED_LEAVES[kind]
    elif group.kind is GroupKind.RULE:
        look |= {"color": _ORANGE, "fillcolor": "#FFF0CC"}
    if group.is_backward:
        look |= _BACKWARD
    if group.is_wrong or any(node.is_wrong for node in group.nodes()):
        look |= _WRONG
    return look | {"label": shortened(folded_label(group)), "tooltip": _details(group)}


def _details(shown: Node | Group) -> str:
    text = shown.details() or (shown.name if isinstance(shown, Group) else shown.label)
    return text if len(text) <= _LONGEST_DETAILS else text[:_LONGEST_DETAILS] + "…"


def _attributes(look: dict[str, str]) -> str:
    return ", ".join(f"{name}={quoted(value)}" for name, value in look.items())
