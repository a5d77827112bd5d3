"""Whether a program's result depends on an input, and whether a derivative can follow.

Read from the traced program, without running it. Loops and branches are entered;
where a primitive holds programs in a layout that is not known here, each operand is
taken to reach each result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Body, Eqn, Jaxpr
from gradtest._src.lifting import is_inexact

# Their results are real numbers, but their derivative is zero wherever there is one.
_FLAT = frozenset({jaxprs.STOP_GRADIENT, "ceil", "floor", "round", "sign"})
_DEBUGGING = frozenset({"debug_callback", "debug_print"})


@dataclasses.dataclass(frozen=True)
class Route:
    """How results depend on a value.

    Attributes:
      smooth: Whether a derivative can take some way from the results to the value.
      blocks: What ends the derivative on the other ways, as users call it.
    """

    smooth: bool = False
    blocks: frozenset[str] = frozenset()

    @property
    def is_none(self) -> bool:
        """Whether the results don't depend on the value at all."""
        return not self.smooth and not self.blocks

    def __or__(self, other: Route) -> Route:
        return Route(self.smooth or other.smooth, self.blocks | other.blocks)


Routes = list[Route]
_NONE, _SMOOTH = Route(), Route(smooth=True)


def routes_to_inputs(jaxpr: Jaxpr, results: Sequence[bool] | None = None) -> Routes:
    """Returns, for each input of a program, how its results depend on it.

    Args:
      jaxpr: The program.
      results: Which of its results are asked about; None for all.
    """
    body = jaxprs.open_body(jaxpr)
    wanted = [True] * len(body.outvars) if results is None else results
    return _inputs(body, [_SMOOTH if each else _NONE for each in wanted])


def routes_to_operands(eqn: Eqn, results: Sequence[bool]) -> Routes:
    """Returns, for each operand of an equation, how some of its results depend on it.

    Args:
      eqn: The equation.
      results: Which of its results are asked about.
    """
    return _operands(eqn, [_SMOOTH if wanted else _NONE for wanted in results])


def _inputs(body: Body, results: Sequence[Route]) -> Routes:
    """Carries routes from the results of a program back to its inputs."""
    routes: dict[Any, Route] = {}

    def add(atoms: Sequence[Any], found: Sequence[Route]) -> None:
        for atom, route in zip(atoms, found, strict=True):
            if not jaxprs.is_literal(atom):
                routes[atom] = routes.get(atom, _NONE) | route

    add(body.outvars, results)
    for eqn in reversed(body.eqns):
        found = [routes.get(var, _NONE) for var in eqn.outvars]
        add(eqn.invars, _operands(eqn, found))
    return [routes.get(var, _NONE) for var in body.invars]


def _operands(eqn: Eqn, results: Routes) -> Routes:
    """Carries routes from the results of one equation to its operands."""
    name = eqn.primitive.name
    if name in _DEBUGGING:
        return [_NONE] * len(eqn.invars)
    if jaxprs.has_side_effects(eqn):  # what it writes may be read anywhere
        return [_SMOOTH] * len(eqn.invars)
    if all(route.is_none for route in results):
        return [_NONE] * len(eqn.invars)
    if name in _ENTERED:
        return _ENTERED[name](eqn, results)
    programs = [jaxprs.open_body(program) for program in jaxprs.subprograms(eqn)]
    if len(programs) == 1 and _is_call(eqn, programs[0]):
        return _inputs(programs[0], results)
    return [_through(eqn, operand, results) for operand in eqn.invars]


def _is_call(eqn: Eqn, body: Body) -> bool:
    """Whether an equation hands all its operands to one program, and its results on."""
    return len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars)


def _through(eqn: Eqn, operand: Any, results: Routes) -> Route:
    """Carries routes through a primitive that computes each result of all operands."""
    total = _NONE
    for var, route in zip(eqn.outvars, results, strict=True):
        blocked = _dtype_is_inexact(operand) and (
            eqn.primitive.name in _FLAT or not _dtype_is_inexact(var)
        )
        if blocked and not route.is_none:
            route = Route(blocks=frozenset({_block_name(eqn, var)}))
        total |= route
    return total


def _dtype_is_inexact(atom: Any) -> bool:
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and is_inexact(dtype)


def _block_name(eqn: Eqn, result: Any) -> str:
    if eqn.primitive.name == "convert_element_type":
        return f"a conversion to {result.aval.dtype}"
    return eqn.primitive.name


def _scan(eqn: Eqn, results: Routes) -> Routes:
    scan = jaxprs.read_scan(eqn)
    start, stop = scan.num_consts, scan.num_consts + scan.num_carry
    body = jaxprs.open_body(scan.body)
    carry, stacked = results[: scan.num_carry], results[scan.num_carry :]
    while True:
        found = _inputs(body, [*carry, *stacked])
        grown = [c | f for c, f in zip(carry, found[start:stop], strict=True)]
        if grown == carry:
            return [*found[:start], *carry, *found[stop:]]
        carry = grown


def _while(eqn: Eqn, results: Routes) -> Routes:
    loop = jaxprs.read_while(eqn)
    test, body = jaxprs.open_body(loop.cond), jaxprs.open_body(loop.body)
    # How often the loop runs decides all its results.
    total = _NONE
    for route in results:
        total |= route
    tested = _inputs(test, [total])
    carry = [c | t for c, t in zip(results, tested[loop.cond_nconsts :], strict=True)]
    while True:
        found = _inputs(body, carry)
        grown = [c | f for c, f in zip(carry, found[loop.body_nconsts :], strict=True)]
        if grown == carry:
            break
        carry = grown
    return [*tested[: loop.cond_nconsts], *found[: loop.body_nconsts], *carry]


def _cond(eqn: Eqn, results: Routes) -> Routes:
    index, *operands = eqn.invars
    found = [_NONE] * len(operands)
    for branch in jaxprs.subprograms(eqn):
        reached = _inputs(jaxprs.open_body(branch), results)
        found = [f | r for f, r in zip(found, reached, strict=True)]
    return [_through(eqn, index, results), *found]


_ENTERED: dict[str, Callable[[Eqn, Routes], Routes]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
