"""Finds every custom rule that a program calls, with the values that reach it."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gradtest._src import execution, intentions, jaxprs
from gradtest._src.devices import spanning
from gradtest._src.findings import Rule
from gradtest._src.inputs import Point
from gradtest._src.jaxprs import Eqn, RuleSource
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.program import Program
from gradtest._src.reach import Call, find_calls
from gradtest._src.structure import structure_key
from gradtest._src.tap import Samples, Taps, tap

NO_RULES = (
    "`fn` calls no custom rule (custom_vjp or custom_jvp), so there is nothing to "
    "audit. Of what it differentiates itself, by jax.grad, only rules that are not "
    "JAX's own are seen: for those hand over the function that is differentiated."
)
# At so many values a rule is audited: its first, a middle and its last call.
_SAMPLES = 3


@dataclasses.dataclass(frozen=True, eq=False)
class RuleUse:
    """One custom rule as a program uses it, at operands of one set of shapes.

    Attributes:
      rule: What the report says of it.
      source: Where it was written.
      calls: Every call of it, in program order.
      samples: Operands of up to three calls that took place.
      moving: For each operand, whether the program's moving inputs reach it.
      trouble: Why there are no samples; empty where there are.
    """

    rule: Rule
    source: RuleSource
    calls: tuple[Call, ...]
    samples: tuple[tuple[Any, ...], ...]
    moving: tuple[bool, ...]
    trouble: str = ""

    @property
    def call(self) -> Call:
        """The first call, which stands for all."""
        return self.calls[0]

    @property
    def is_invoked(self) -> bool:
        """Whether the derivative of the program goes through any of the calls."""
        return any(
            call.is_live and any(call.moving) and not _rules_around(call)
            for call in self.calls
        )

    def why_not_invoked(self) -> str:
        """Says why the program's derivative never goes through the rule."""
        call = self.call
        around = _rules_around(call)
        if around:
            outer = jaxprs.read_rule(around[-1]).name
            return f"the rule of `{outer}`, which calls it, takes its place"
        if not any(call.moving):
            return "nothing that it is given depends on what is differentiated"
        return "nothing that it returns reaches the result but under stop_gradient"


def _rules_around(call: Call) -> list[Eqn]:
    return [eqn for eqn in call.outer if eqn.primitive.name in jaxprs.CUSTOM_RULES]


def regions_around(call: Call) -> list[Eqn]:
    """Returns the device regions that a call stands in, outermost first."""
    return [eqn for eqn in call.outer if eqn.primitive.name == "shard_map"]


def find_rules(program: Program, point: Point, only: Any = None) -> list[RuleUse]:
    """Returns every custom rule that a program calls, with values that reach it.

    Args:
      program: The traced function.
      point: Where it is run, in its own precision.
      only: Names, modules or functions of the rules that are wanted; None for all.

    Raises:
      ValueError: There is no such rule.
    """
    wanted = wanted_calls(program, only)
    chosen = {call.place: call.eqn for calls in wanted for call in spread(calls)}
    taps = run(program, point, chosen) if chosen else {}
    return [_use(calls, taps) for calls in wanted]


def wanted_calls(program: Program, only: Any = None) -> list[list[Call]]:
    """Returns the calls of each custom rule of a program, as `find_rules` wants them.

    Raises:
      ValueError: `only` names no rule that is called.
    """
    moving = [True] * len(program.inputs.moving)
    moving += [False] * (len(program.jaxpr.in_avals) - len(moving))
    groups: dict[Any, list[Call]] = {}
    for call in find_calls(program.jaxpr, moving):
        groups.setdefault(_group_key(call), []).append(call)
    return _wanted(list(groups.values()), only)


def hidden_rules(program: Program) -> list[str]:
    """Names the rules that stand where no call can be found: in solvers and kernels."""
    moving = [True] * len(program.jaxpr.in_avals)
    found = {id(call.eqn) for call in find_calls(program.jaxpr, moving)}
    hidden = [
        jaxprs.read_rule(eqn).name
        for eqn in jaxprs.walk(program.jaxpr)
        if eqn.primitive.name in jaxprs.CUSTOM_RULES and id(eqn) not in found
    ]
    return list(dict.fromkeys(hidden))


def _group_key(call: Call) -> Any:
    source = jaxprs.read_rule(call.eqn)
    avals = tuple(str(atom.aval) for atom in call.eqn.invars)
    program = structure_key(jaxprs.rule_free_program(call.eqn))
    regions = tuple(map(id, regions_around(call)))
    identity = (source.identity, source.kind, source.where, jaxprs.captured(call.eqn))
    return identity, avals, program, regions, first_places(call.eqn)


def first_places(eqn: Eqn) -> tuple[int, ...]:
    """Returns, for each operand, where the same variable is an operand first."""
    places: dict[int, int] = {}
    return tuple(places.setdefault(id(atom), i) for i, atom in enumerate(eqn.invars))


def spread(items: Sequence[Any]) -> list[Any]:
    """Returns the first, a middle and the last of several."""
    places = sorted({0, len(items) // 2, len(items) - 1})
    return [items[place] for place in places]


def _wanted(groups: list[list[Call]], only: Any) -> list[list[Call]]:
    if only is None:
        return groups
    alone = isinstance(only, str) or callable(only) or not isinstance(only, Iterable)
    patterns = [
        each.__name__ if isinstance(each, types.ModuleType) else each
        for each in ((only,) if alone else tuple(only))
    ]
    if not patterns:
        raise ValueError("`only` is empty: name at least one rule, or leave it out.")
    for pattern in patterns:
        if not isinstance(pattern, str) and not callable(pattern):
            raise TypeError(
                "`only` must name rules by their names, modules or functions, got "
                f"{pattern!r}."
            )
    kept = []
    for pattern in patterns:
        matched = [calls for calls in groups if _matches(pattern, calls)]
        if not matched:
            called = dict.fromkeys(jaxprs.read_rule(c[0].eqn).name for c in groups)
            raise ValueError(
                f"`only` names {intentions.describe_rule(pattern)!r}, which is no "
                f"custom rule that `fn` calls: it calls {', '.join(called) or 'none'}."
            )
        kept += matched
    return [calls for calls in groups if any(calls is other for other in kept)]


def _matches(pattern: Any, calls: list[Call]) -> bool:
    source = jaxprs.read_rule(calls[0].eqn)
    if intentions.names(pattern, source):
        return True
    if not isinstance(pattern, str):
        return False
    modules = _modules_of(source)
    in_module = any(
        module == pattern or module.startswith(pattern + ".") for module in modules
    )
    return in_module or any(_in_path(pattern, _path(call)) for call in calls)


def _in_path(pattern: str, path: str) -> bool:
    """Whether a module path holds the parts of a pattern, one after the other."""
    parts, wanted = path.split("/"), pattern.split("/")
    return any(
        all(map(fnmatch.fnmatchcase, parts[i : i + len(wanted)], wanted))
        for i in range(len(parts) - len(wanted) + 1)
    )


def _modules_of(source: RuleSource) -> list[str]:
    """Returns the names of the Python modules that a rule was written in."""
    texts = (source.identity, *source.where)
    files = {text.rpartition(" at ")[2].rpartition(":")[0] for text in texts}
    return [
        name
        for name, module in list(sys.modules.items())
        if getattr(module, "__file__", None) in files
    ]


def run(program: Program, point: Point, chosen: dict[Any, Eqn]) -> Taps:
    """Runs the program once, as it is, and reads the chosen operands."""
    jaxpr = program.jaxpr
    consts = [const for const in jaxprs.nested_consts(jaxpr) if hasattr(const, "dtype")]

    def read(args: list[Any], values: list[Any]) -> Taps:
        hoisted = {id(c): v for c, v in zip(consts, values, strict=True)}
        return tap(jaxpr, args, chosen, hoisted)

    held = [
        value if hasattr(value, "dtype") else jnp.asarray(value)
        for value in program.held(point)
    ]
    arguments = [[*point.moving, *held], consts]
    return spanning.brought_home(execution.working(read, arguments)(*arguments))


def _use(calls: list[Call], taps: Taps) -> RuleUse:
    source = jaxprs.read_rule(calls[0].eqn)
    found = [sample for call in spread(calls) for sample in reached(taps[call.place])]
    samples = spread(_distinct(found)) if found else []
    sound = [s for s in samples if not any(_has_nan(value) for value in s)]
    trouble = ""
    if not sound:
        trouble = "NaN reaches it" if samples else "it was not reached at these values"
    moving = tuple(any(flags) for flags in zip(*[c.moving for c in calls], strict=True))
    rule = Rule(
        source.name,
        source.kind,
        tuple(map(shorten, source.where)),
        shorten(jaxprs.call_site(calls[0].eqn)),
        _path(calls[0]),
        sum(call.times for call in calls),
        len(sound),
    )
    return RuleUse(rule, source, tuple(calls), tuple(sound), moving, trouble)


def _path(call: Call) -> str:
    return "/".join(call.scopes)


def shorten(text: str) -> str:
    """Shortens a file name in a text: relative to here, or to where packages are."""
    head, at, path = text.rpartition(" at ")
    installed = [folder for folder in sys.path if folder.endswith("-packages")]
    for folder in (os.getcwd(), *installed):
        path = path.removeprefix(folder + os.sep)
    return head + at + path


def reached(samples: Samples) -> list[tuple[Any, ...]]:
    """Returns the operands of the runs that took place."""
    took_place = np.asarray(samples.reached)
    return [
        tuple(_host(operand[i]) for operand in samples.operands)
        for i in range(len(took_place))
        if took_place[i].any()
    ]


def _host(value: Any) -> Any:
    if jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
        return value
    return np.asarray(value)


def _distinct(samples: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    kept: dict[Any, tuple[Any, ...]] = {}
    for sample in samples:
        key = tuple(v.tobytes() if isinstance(v, np.ndarray) else id(v) for v in sample)
        kept.setdefault(key, sample)
    return list(kept.values())


def _has_nan(value: Any) -> bool:
    return is_inexact(value.dtype) and bool(np.isnan(widen(value)).any())


# --- a rule's call as a function ---------------------------------------------------


def as_function(call: Call) -> Callable[..., list[Any]]:
    """Returns a function that calls the rule as the program does.

    A call from inside of a device region takes operands with an axis of devices, as
    `tap.Samples` has them, and returns such results.

    Raises:
      NotImplementedError: The call stands in regions inside of regions.
    """
    eqn, regions = call.eqn, regions_around(call)
    if not regions:
        return lambda *operands: jaxprs.bind(eqn, operands, eqn.params)
    if len(regions) > 1:
        raise NotImplementedError("a device region inside of another one")
    region = jaxprs.read_shard_map(regions[0])
    every = tuple(a for a in region.mesh.axis_names if a in region.axis_names)

    def spec(atom: Any) -> Any:
        varying = jaxprs.vma(atom)
        names = tuple(a for a in every if a in varying) if region.check_vma else every
        return PartitionSpec(names or None)

    def on_device(*operands: Any) -> list[Any]:
        results = jaxprs.bind(eqn, [value[0] for value in operands], eqn.params)
        return [result[None] for result in results]

    return jax.shard_map(
        on_device,
        mesh=region.mesh,
        in_specs=tuple(map(spec, eqn.invars)),
        out_specs=list(map(spec, eqn.outvars)),
        axis_names=region.axis_names,
        check_vma=region.check_vma,
    )
