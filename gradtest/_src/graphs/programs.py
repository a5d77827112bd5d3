"""Draws a jaxpr: an equation is a node, a program inside of one is a group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradtest._src import jaxprs
from gradtest._src.graphs import labels
from gradtest._src.graphs.drawing import Drawing, Group, GroupKind, Kind, Node
from gradtest._src.graphs.marks import Marks
from gradtest._src.jaxprs import Eqn, Jaxpr
from gradtest._src.jaxprs.lines import calls_library, users_place
from gradtest._src.jaxprs.scopes import is_transposed, scope_names
from gradtest._src.rules import shorten

# What a value is drawn from: the node that makes it, or the text of a literal.
Source = Node | str
# The order of operands matters to them, so it is kept in the picture.
_ORDERED = frozenset(
    {"sub", "div", "pow", "rem", "atan2", "dot_general", "lt", "le", "gt", "ge"}
)
_HOLE = "·"


def draw_program(
    drawing: Drawing,
    jaxpr: Jaxpr,
    sources: Sequence[Source],
    marks: Marks,
) -> list[Source]:
    """Draws the equations of a program into a picture.

    Args:
      drawing: Has the program's arguments already. Where it has a backward pass, that
        is what depends on backward arguments.
      jaxpr: The program.
      sources: What each of its inputs is drawn from.
      marks: Tells what is wrong in it.

    Returns:
      What each result of the program is drawn from.
    """
    return _Artist(drawing, marks).program(jaxpr, sources, drawing.root)


class _Artist:
    """Draws programs inside of programs."""

    def __init__(self, drawing: Drawing, marks: Marks):
        self.drawing = drawing
        self.marks = marks
        self.constants: dict[int, Source] = {}
        self.scopes: dict[tuple[int, str], Group] = {}

    def program(
        self, jaxpr: Jaxpr, sources: Sequence[Source], group: Group
    ) -> list[Source]:
        """Draws a program into a group; returns what its results are drawn from."""
        body = jaxprs.open_body(jaxpr)
        known: dict[Any, Source] = dict(zip(body.invars, sources, strict=True))
        for var, const in zip(body.constvars, body.consts, strict=True):
            known[var] = self._constant(const)
        for eqn in body.eqns:
            operands = [self._source(atom, known) for atom in eqn.invars]
            results = self._equation(eqn, operands, self._home(eqn, operands, group))
            known.update(zip(eqn.outvars, results, strict=True))
        return [self._source(atom, known) for atom in body.outvars]

    def _source(self, atom: Any, known: dict[Any, Source]) -> Source:
        if jaxprs.is_literal(atom):
            return labels.number_text(atom.val)
        return known[atom]

    def _constant(self, const: Any) -> Source:
        """Draws each array that the program closes over once."""
        if id(const) not in self.constants:
            text = labels.constant_text(const)
            if getattr(const, "shape", None) == ():
                self.constants[id(const)] = text
            else:
                details = labels.type_text(const)
                self.constants[id(const)] = self.drawing.root.add_node(
                    text, Kind.CONSTANT, details=lambda: f"constant {details}"
                )
        return self.constants[id(const)]

    def _home(self, eqn: Eqn, operands: Sequence[Source], group: Group) -> Group:
        """Returns the group of the scopes that an equation was traced under."""
        home = group
        if self.drawing.has_backward and group is self.drawing.root:
            home = self._pass(
                is_transposed(eqn)
                or any(isinstance(each, Node) and each.is_backward for each in operands)
            )
        for name in scope_names(eqn):
            # A program that differentiates has scopes twice: its own backward pass.
            turns = is_transposed(eqn) and not home.is_backward
            shown = f"{name}, backward" if turns else name
            if (id(home), shown) not in self.scopes:
                self.scopes[id(home), shown] = home.add_group(
                    shown, GroupKind.SCOPE, is_backward=turns or home.is_backward
                )
            home = self.scopes[id(home), shown]
        return home

    def _pass(self, is_backward: bool) -> Group:
        name = f"{'backward' if is_backward else 'forward'} pass"
        key = (id(self.drawing.root), name)
        if key not in self.scopes:
            self.scopes[key] = self.drawing.root.add_group(
                name, GroupKind.PASS, is_backward=is_backward
            )
        return self.scopes[key]

    def _equation(
        self, eqn: Eqn, operands: Sequence[Source], group: Group
    ) -> Sequence[Source]:
        name = eqn.primitive.name
        if name in jaxprs.CUSTOM_RULES:
            return self._rule(eqn, operands, group)
        if name in jaxprs.CALLS:
            called = eqn.params.get("name")
            inside = self._group(eqn, group, _call_title(name, called), GroupKind.CALL)
            (program,) = jaxprs.entered(eqn)
            return self.program(program, operands, inside)
        draw = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            "shard_map": self._shard_map,
            jaxprs.kernels.PALLAS_CALL: self._kernel,
        }.get(name, self._operation)
        return draw(eqn, operands, group)

    def _group(self, eqn: Eqn, group: Group, name: str, kind: GroupKind) -> Group:
        return group.add_group(
            name,
            kind,
            details=lambda: _details(eqn),
            is_wrong=self.marks.marks_rule(eqn),
            is_detail=calls_library(eqn),
        )

    def _rule(
        self, eqn: Eqn, operands: Sequence[Source], group: Group
    ) -> Sequence[Source]:
        source = jaxprs.read_rule(eqn)
        inside = self._group(eqn, group, f"{source.kind} {source.name}", GroupKind.RULE)
        return self.program(jaxprs.rule_free_program(eqn), operands, inside)

    def _scan(
        self, eqn: Eqn, operands: Sequence[Source], group: Group
    ) -> Sequence[Source]:
        scan = jaxprs.read_scan(eqn)
        arrow = ", backwards" if scan.reverse else ""
        inside = self._group(eqn, group, f"scan × {scan.length}{arrow}", GroupKind.LOOP)
        fixed, first = scan.num_consts, scan.num_consts + scan.num_carry
        carries = self._ports(eqn, operands, range(fixed, first), "carry", inside)
        slices = self._ports(
            eqn, operands, range(first, len(operands)), "slice", inside
        )
        sources = [*operands[:fixed], *carries, *slices]
        results = self.program(scan.body, sources, inside)
        self._go_round(eqn.outvars, results, carries)
        return results

    def _while(
        self, eqn: Eqn, operands: Sequence[Source], group: Group
    ) -> Sequence[Source]:
        loop = jaxprs.read_while(eqn)
        inside = self._group(eqn, group, "while", GroupKind.LOOP)
        of_cond, of_body = loop.cond_nconsts, loop.cond_nconsts + loop.body_nconsts
        places = range(of_body, len(operands))
        carries = self._ports(eqn, operands, places, "carry", inside)
        (goes_on,) = self.program(loop.cond, [*operands[:of_cond], *carries], inside)
        asks = inside.add_node("goes on?", Kind.CHOICE)
        self._connect(goes_on, asks, "bool[]")
        results = self.program(
            loop.body, [*operands[of_cond:of_body], *carries], inside
        )
        self._go_round(eqn.outvars, results, carries)
        return [
            carry if isinstance(result, str) else result
            for carry, result in zip(carries, results, strict=True)
        ]

    def _cond(
        self, eqn: Eqn, operands: Sequence[Source], group: Group
    ) -> Sequence[Source]:
        inside = self._group(eqn, group, "cond", GroupKind.BRANCH)
        branches = jaxprs.entered(eqn)
        is_bool = len(branches) == 2
        results = []
        for number, branch in enumerate(branches):
            title = ("false", "true")[number] if is_bool else f"branch {number}"
            part = inside.add_group(title, GroupKind.BRANCH)
            results.append(self.program(branch, operands[1:], part))
        label = "cond" + "".join(
            f"\n{source}" for source in operands[:1] if isinstance(source, str)
        )
        meets = inside.add_node(label, Kind.CHOICE, details=lambda: _details(eqn))
        self._connect(operands[0], meets, labels.type_text(eqn.invars[0].aval))
        for branch_results in results:
            for result, var in zip(branch_results, eqn.outvars, strict=True):
                self._connect(result, meets, labels.type_text(var.aval))
        return [meets] * len(eqn.outvars)

    def _shard_map(
        self, eqn: Eqn, operands: Sequence[Source], group: Group
    ) -> Sequence[Source]:
        region = jaxprs.read_shard_map(eqn)
        axes = ", ".join(
            f"{axis}={size}"
            for axis, size in region.mesh.shape.items()
            if axis in region.axis_names
        )
        inside = self._group(eqn, group, f"shard_map over {axes}", GroupKind.REGION)
        return self.program(region.body, operands, inside)

    def _kernel(
        self, eqn: Eqn, operands: Sequence[Source], group: Group
    ) -> Sequence[Source]:
        """Draws a Pallas kernel as what its references hold before and afterwards."""
        kernel = jaxprs.kernels.read_pallas_call(eqn)
        if kernel is None:
            return self._operation(eqn, operands, group)
        title = f"pallas_call {eqn.params.get('name') or ''}".strip()
        grid = " × ".join(map(str, kernel.grid or ()))
        inside = self._group(
            eqn, group, f"{title}, grid {grid}" if grid else title, GroupKind.REGION
        )
        body = jaxprs.open_body(kernel.program)
        first = len(operands) - kernel.scalars - len(kernel.inputs)
        given = kernel.scalars + len(kernel.inputs)
        ports = []
        for place, var in enumerate(body.invars):
            written = place - given
            name = "block" if written < 0 else "written block"
            if written >= len(kernel.outputs):
                name = "scratch"
            port = inside.add_node(f"{name}\n{labels.type_text(var.aval)}", Kind.PORT)
            if place < given:
                operand = first + place
                self._connect(
                    operands[operand], port, labels.type_text(eqn.invars[operand].aval)
                )
            ports.append(port)
        results = self.program(kernel.program, ports, inside)
        return results[given : given + len(eqn.outvars)]

    def _operation(
        self, eqn: Eqn, operands: Sequence[Source], group: Group
    ) -> Sequence[Source]:
        """Draws an equation as one node, with the programs that it holds beside it."""
        node = group.add_node(
            _label(eqn, operands),
            Kind.OPERATION,
            details=lambda: _details(eqn),
            is_wrong=self.marks.marks_operation(eqn, group.is_backward),
            is_ordered=eqn.primitive.name in _ORDERED,
        )
        for operand, atom in zip(operands, eqn.invars, strict=True):
            self._connect(operand, node, labels.type_text(atom.aval))
        if eqn.primitive.name not in jaxprs.WITH_SCALAR_PROGRAM:
            self._held_programs(eqn, node, group)
        return [node] * len(eqn.outvars)

    def _held_programs(self, eqn: Eqn, node: Node, group: Group) -> None:
        programs = [
            program
            for program in jaxprs.subprograms(eqn)
            if len(jaxprs.open_body(program).eqns) > 1
        ]
        for number, program in enumerate(programs):
            title = f"{eqn.primitive.name}, program {number + 1} of {len(programs)}"
            inside = group.add_group(title, GroupKind.REGION)
            ports: list[Source] = [
                inside.add_node(f"input {i}", Kind.PORT)
                for i in range(len(jaxprs.open_body(program).invars))
            ]
            for result in self.program(program, ports, inside):
                self._connect(result, node, "", is_back=True)

    def _ports(
        self,
        eqn: Eqn,
        operands: Sequence[Source],
        places: range,
        name: str,
        group: Group,
    ) -> list[Node]:
        """Draws what a loop hands to its body: one node for each of these operands."""
        ports = []
        for number, place in enumerate(places):
            operand = operands[place]
            start = f"\nfrom {operand}" if isinstance(operand, str) else ""
            port = group.add_node(f"{name} {number}{start}", Kind.PORT)
            self._connect(operand, port, labels.type_text(eqn.invars[place].aval))
            ports.append(port)
        return ports

    def _go_round(
        self, outvars: Sequence[Any], results: Sequence[Source], carries: Sequence[Node]
    ) -> None:
        """Draws what a loop carries into its next round."""
        for carry, result, var in zip(carries, results, outvars, strict=False):
            if result is not carry:
                self._connect(result, carry, labels.type_text(var.aval), is_back=True)

    def _connect(
        self, source: Source, target: Node, label: str, is_back: bool = False
    ) -> None:
        if isinstance(source, Node):
            self.drawing.connect(source, target, label, is_back)


def _call_title(primitive: str, name: object) -> str:
    kind = {"remat2": "remat", "checkpoint": "remat", "pjit": "jit"}
    return f"{kind.get(primitive, primitive)} {name or ''}".strip()


def _label(eqn: Eqn, operands: Sequence[Source]) -> str:
    """Returns the name of an operation, its literals and its telling parameter."""
    name = eqn.primitive.name
    if any(isinstance(operand, str) for operand in operands) and len(operands) <= 4:
        shown = [each if isinstance(each, str) else _HOLE for each in operands]
        name += f"({', '.join(shown)})"
    parameter = labels.parameters_text(eqn.params)
    return f"{name}\n{parameter}" if parameter else name


def _details(eqn: Eqn) -> str:
    """Returns what is known of an equation: types, parameters, scope and source."""
    takes = ", ".join(labels.type_text(atom.aval) for atom in eqn.invars)
    makes = ", ".join(labels.type_text(var.aval) for var in eqn.outvars)
    lines = [f"{eqn.primitive.name}: {takes} → {makes}"]
    lines.append(labels.all_parameters(eqn.params))
    lines.append(jaxprs.scope(eqn))
    if eqn.primitive.name in jaxprs.CUSTOM_RULES:
        lines += map(shorten, jaxprs.read_rule(eqn).where)
    place = users_place(eqn)
    if place is not None:
        lines.append(f"{shorten(place.file)}:{place.number} in {place.function}")
    return "\n".join(line for line in lines if line)
