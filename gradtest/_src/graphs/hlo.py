"""Draws an HLO module: an instruction is a node, a called computation is a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from gradtest._src.graphs.drawing import Drawing, Group, GroupKind, Kind, Node
from gradtest._src.graphs.hlo_text import Instruction, Module, read_module

# What a value is drawn from: a node, the text of a number, or the parts of a tuple.
Source = Node | str | list
_SCALAR = "[]"
_HOLE = "·"
# Names in a path that JAX puts there for what a group of its own stands for.
_SILENT = frozenset({"while", "body", "cond", "closed_call", "branch_0_fun"})
_SHOWN = ("dimensions", "direction", "custom_call_target", "fft_type")


def draw_text(
    drawing: Drawing, text: str, sources: Sequence[Source]
) -> list[Node | str]:
    """Draws the text of a module into a picture that has its arguments already.

    Returns:
      What each result is drawn from.
    """
    artist = _Artist(drawing, read_module(text))
    entry = artist.module.computations[artist.module.entry]
    hoisted = sum(each.opcode == "parameter" for each in entry) - len(sources)
    # Arrays that a function closes over come before its arguments.
    consts: list[Source] = [
        drawing.root.add_node("", Kind.CONSTANT) for _ in range(hoisted)
    ]
    for each in entry:
        if each.opcode == "parameter" and _number(each) < hoisted:
            const = consts[_number(each)]
            assert isinstance(const, Node)
            const.label = each.shape
    root = artist.computation(
        artist.module.entry, [*consts, *sources], drawing.root, ("",)
    )
    return _flat(root)


def _number(parameter: Instruction) -> int:
    return int(parameter.operands[0])


def _flat(source: Source) -> list[Node | str]:
    if isinstance(source, list):
        return [leaf for part in source for leaf in _flat(part)]
    return [source]


class _Artist:
    """Draws computations inside of computations."""

    def __init__(self, drawing: Drawing, module: Module):
        self.drawing = drawing
        self.module = module
        self.scopes: dict[tuple[int, str], Group] = {}
        self.shapes: dict[int, str] = {}

    def computation(
        self,
        name: str,
        sources: Sequence[Source],
        group: Group,
        path: tuple[str, ...],
    ) -> Source:
        """Draws a computation into a group; returns what its root is drawn from."""
        known: dict[str, Source] = {}
        root: Source = ""
        for each in self.module.computations[name]:
            if each.opcode == "parameter":
                known[each.name] = sources[_number(each)]
            else:
                known[each.name] = self._instruction(each, known, group, path)
            if each.is_root:
                root = known[each.name]
        return root

    def _instruction(
        self,
        each: Instruction,
        known: dict[str, Source],
        group: Group,
        path: tuple[str, ...],
    ) -> Source:
        operands = [known.get(name, name) for name in each.operands]
        if each.opcode == "tuple":
            return operands
        if each.opcode == "get-tuple-element":
            (whole,) = operands
            index = int(each.attributes["index"])
            return whole[index] if isinstance(whole, list) else whole
        if each.opcode == "broadcast" and isinstance(operands[0], str):
            return operands[0]
        if each.opcode == "constant":
            return self._constant(each, group)
        home = self._home(each, group, path)
        inner = (*path, *_scopes(each))
        if each.opcode == "while":
            return self._while(each, operands, home, inner)
        if each.opcode == "conditional":
            return self._conditional(each, operands, home, inner)
        if each.opcode in ("fusion", "call", "async-start"):
            for called in each.all_called[:1]:
                title = f"{each.opcode} {called}"
                inside = home.add_group(title, GroupKind.CALL, details=_teller(each))
                return self.computation(called, operands, inside, inner)
        return self._operation(each, operands, home)

    def _home(self, each: Instruction, group: Group, path: tuple[str, ...]) -> Group:
        """Returns the group of the scopes that an instruction was traced under."""
        names = _scopes(each)
        # Inside of a loop the path goes on from that of the loop.
        around = [name for name in path if name]
        if tuple(names[: len(around)]) == tuple(around):
            names = names[len(around) :]
        elif around:
            names = []
        home = group
        for name in names:
            key = (id(home), name)
            if key not in self.scopes:
                self.scopes[key] = home.add_group(name, GroupKind.SCOPE)
            home = self.scopes[key]
        return home

    def _constant(self, each: Instruction, group: Group) -> Source:
        text = ", ".join(each.operands)
        if each.shape.endswith(_SCALAR):
            return text
        shown = text if len(text) <= 24 and "..." not in text else ""
        label = f"{shown}\n{each.shape}".strip()
        return group.add_node(label, Kind.CONSTANT, details=_teller(each))

    def _while(
        self,
        each: Instruction,
        operands: Sequence[Source],
        group: Group,
        path: tuple[str, ...],
    ) -> Source:
        inside = group.add_group("while", GroupKind.LOOP, details=_teller(each))
        (start,) = operands
        starts = start if isinstance(start, list) else [start]
        carries = []
        for number, source in enumerate(starts):
            text = f"\nfrom {source}" if isinstance(source, str) else ""
            port = inside.add_node(f"carry {number}{text}", Kind.PORT)
            self._connect(source, port, "")
            carries.append(port)
        whole: Source = list(carries) if isinstance(start, list) else carries[0]
        (condition,), (body,) = each.called("condition"), each.called("body")
        goes_on = self.computation(condition, [whole], inside, path)
        self._connect(goes_on, inside.add_node("goes on?", Kind.CHOICE), "pred[]")
        result = self.computation(body, [whole], inside, path)
        results = result if isinstance(result, list) else [result]
        if len(results) != len(carries):
            results = _flat(result) * len(carries)
        for carry, made in zip(carries, results, strict=False):
            if made is not carry:
                self._connect(made, carry, "", is_back=True)
        kept = [
            carry if isinstance(made, str) else made
            for carry, made in zip(carries, results, strict=False)
        ]
        return kept if isinstance(start, list) else kept[0]

    def _conditional(
        self,
        each: Instruction,
        operands: Sequence[Source],
        group: Group,
        path: tuple[str, ...],
    ) -> Source:
        inside = group.add_group("conditional", GroupKind.BRANCH, details=_teller(each))
        branches = each.called("branch_computations")
        titles = [f"branch {number}" for number in range(len(branches))]
        if not branches:
            branches = each.called("true_computation")
            branches += each.called("false_computation")
            titles = ["true", "false"]
        meets = inside.add_node("conditional", Kind.CHOICE, details=_teller(each))
        self._connect(operands[0], meets, "")
        for title, name, operand in zip(titles, branches, operands[1:], strict=True):
            part = inside.add_group(title, GroupKind.BRANCH)
            for leaf in _flat(self.computation(name, [operand], part, path)):
                self._connect(leaf, meets, "")
        return meets

    def _operation(
        self, each: Instruction, operands: Sequence[Source], group: Group
    ) -> Node:
        label = " ".join([each.opcode, *self._applied(each)])
        shown = [
            source if isinstance(source, str) else _HOLE
            for operand in operands
            for source in _flat(operand)
        ]
        if any(text != _HOLE for text in shown) and len(shown) <= 4:
            label += f"({', '.join(shown)})"
        for name in _SHOWN:
            if name in each.attributes:
                label += f"\n{name}={each.attributes[name]}"
        node = group.add_node(label, Kind.OPERATION, details=_teller(each))
        for operand in operands:
            for source in _flat(operand):
                self._connect(source, node, "")
        self.shapes[id(node)] = each.shape
        return node

    def _applied(self, each: Instruction) -> list[str]:
        """Names what a reduction does with two numbers, where that is one thing."""
        opcodes = [
            inner.opcode
            for name in each.called("to_apply")
            for inner in self.module.computations.get(name, ())
            if inner.opcode not in ("parameter", "tuple", "get-tuple-element")
        ]
        return opcodes if len(opcodes) == 1 else []

    def _connect(
        self, source: Source, target: Node, label: str, is_back: bool = False
    ) -> None:
        for leaf in _flat(source):
            if isinstance(leaf, Node):
                text = label or self.shapes.get(id(leaf), "")
                self.drawing.connect(leaf, target, text, is_back)


def _scopes(each: Instruction) -> list[str]:
    """Returns the scopes and functions around an instruction, outermost first."""
    parts = each.scope.split("/")[:-1]
    if parts and parts[0].startswith("jit("):
        parts = parts[1:]
    return [part for part in parts if part and part not in _SILENT]


def _teller(each: Instruction) -> Callable[[], str]:
    """Returns what makes the details of an instruction."""
    return lambda: "\n".join(
        line
        for line in (f"{each.name}: {each.opcode} → {each.shape}", each.scope)
        if line
    )
