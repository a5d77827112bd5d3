"""Asks of each leaf without a gradient why it has none."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, jaxprs
from gradtest._src.findings import Cause
from gradtest._src.flow import Routes, routes_to_inputs
from gradtest._src.inputs import Leaf, Role
from gradtest._src.kit import array_constants
from gradtest._src.lifting import Evaluator, widen
from gradtest._src.silence.cuts import cancellations, cuts, cuts_all
from gradtest._src.silence.observed import Observed
from gradtest._src.silence.readings import Readings
from gradtest._src.silence.reasons import Silence, cancelled, reason
from gradtest._src.silence.signals import Level

if TYPE_CHECKING:
    from gradtest._src.backward import Backward

# Reasons of so many ways to a leaf are told.
_MOST_WAYS = 2
# What is no reason of its own where another way has one: a square that is zero behind a
# dead unit, the branch of a `where` that guards against overflow.
_WEAK = frozenset({"zero slope", "branch not taken", "underflow"})
# Rounding in float64 is so much of the largest gradient at most, and so much of that
# in a coarser dtype.
_NOISE = 1e-12
_FAR_LESS = 1e-3
UNKNOWN = Cause(
    "NaN gradient",
    "its gradient is not finite, so it can't be told from none",
    "see where that comes from with assert_grads_finite",
)
_UNUSED = Cause(
    "unused",
    "the loss does not depend on it",
    "use it in the loss, leave it out of the parameters, or name it in `exclude`",
)


def silences(backward: Backward, leaves: Sequence[int]) -> dict[int, Silence]:
    """Says of each leaf why its gradient is zero.

    Args:
      backward: The function and its gradient.
      leaves: The numbers of the leaves that have none.
    """
    routes = routes_to_inputs(backward.program.jaxpr)
    smooth = [i for i in leaves if routes[i].smooth]
    own = backward.rule_free(lifted=False) if smooth else None
    wide = backward.rule_free(lifted=True) if smooth else None
    found: dict[int, Silence] = {}
    small, zero, lost = [], [], []
    for i in leaves:
        known = _by_structure(routes, i, backward.program.jaxpr)
        if known is not None:
            found[i] = Silence(known)
        elif own is not None and _is_lost(own[i], None if wide is None else wide[i]):
            found[i] = Silence(_lost_in_a_rule(own[i], backward.program.jaxpr))
            lost.append(i)
        elif wide is not None and wide[i].any():
            found[i] = Silence(_underflow(wide[i], backward.leaves[i]))
            small.append(i)
        else:
            found[i] = Silence(_zero_here(backward.options.trials))
            zero.append(i)
    for i, seen in _observed(backward, zero, lifted=True).items():
        found[i] = _first_reasons(seen, i) or found[i]
    for i, seen in _observed(backward, lost, lifted=True).items():
        # At a tie the rule of `relu` has no slope, though `max` has one.
        dead = _first_reasons(seen, i)
        if dead is not None and dead.cause.name == "dead ReLU":
            found[i] = dead
    noise = [i for i in small if _may_be_noise(i, own, wide or (), backward.leaves[i])]
    for i, seen in _observed(backward, noise, lifted=True).items():
        cut = _first_reasons(seen, i)
        if cut is not None:
            found[i] = cut
            small.remove(i)
    for i, seen in _observed(backward, small, lifted=False).items():
        found[i] = _with_place(found[i], _first_reasons(seen, i))
    silent = [backward.leaves[i].name for i in leaves]
    return {i: _of_zero_weights(each, silent) for i, each in found.items()}


def _of_zero_weights(found: Silence, silent: Sequence[str]) -> Silence:
    """Promises no update of weights that are zero and have no gradient themselves."""
    if found.cause.name != "zero weights":
        return found
    for name in silent:
        if f"multiplied by {name}, which is zero" in found.cause.says:
            remedy = (
                f"give {name} other initial values: its own gradient is zero as well, "
                "so that no update will change it"
            )
            cause = dataclasses.replace(found.cause, remedy=remedy)
            return dataclasses.replace(found, cause=cause)
    return found


def _is_lost(own: np.ndarray, wide: np.ndarray | None) -> bool:
    """Whether a gradient is there without rules, and no rounding makes it so."""
    size = float(np.linalg.norm(own))
    if wide is None:
        return size > 0
    return size > 0 and size / 2 <= float(np.linalg.norm(wide)) <= 2 * size


def _may_be_noise(
    i: int, own: Sequence[np.ndarray] | None, wide: Sequence[np.ndarray], leaf: Leaf
) -> bool:
    """Whether a gradient in float64 may be what rounding leaves where terms cancel.

    In a coarser dtype more is left; what underflows is less there.
    """
    size = float(np.linalg.norm(wide[i]))
    if own is not None and size < _FAR_LESS * float(np.linalg.norm(own[i])):
        return True
    largest = max(float(np.linalg.norm(each)) for each in wide)
    smallest = float(jnp.finfo(leaf.dtype).smallest_subnormal)
    return smallest < size / math.sqrt(wide[i].size) and size <= _NOISE * largest


def _by_structure(routes: Routes, i: int, jaxpr: jaxprs.Jaxpr) -> Cause | None:
    if routes[i].is_none:
        return _UNUSED
    if routes[i].smooth:
        return None
    blocks = sorted(routes[i].blocks)
    return _blocked(blocks, _rules_around(jaxpr, frozenset(blocks)))


def _rules(calls: Sequence[jaxprs.Eqn]) -> list[jaxprs.RuleSource]:
    """Returns the user's rules that are called."""
    sources = map(jaxprs.read_rule, calls)
    found = {each.identity: each for each in sources if jaxprs.is_users(each)}
    return list(found.values())


def _calls(jaxpr: jaxprs.Jaxpr) -> list[jaxprs.Eqn]:
    eqns = jaxprs.walk(jaxpr)
    return [eqn for eqn in eqns if eqn.primitive.name in jaxprs.CUSTOM_RULES]


def _rules_around(
    jaxpr: jaxprs.Jaxpr, names: frozenset[str]
) -> list[jaxprs.RuleSource]:
    """Returns the user's rules around some primitives, if all of these are in rules."""
    around, inside = [], set()
    for call in _calls(jaxpr):
        held = [eqn for eqn in jaxprs.walk(jaxprs.rule_free_program(call))
                if eqn.primitive.name in names]  # fmt: skip
        inside |= set(map(id, held))
        around += [call] * bool(held)
    own = [eqn for eqn in jaxprs.walk(jaxpr) if eqn.primitive.name in names]
    return _rules(around) if all(id(eqn) in inside for eqn in own) else []


def _written(rules: Sequence[jaxprs.RuleSource]) -> str:
    told = []
    for rule in rules[:_MOST_WAYS]:
        place = rule.where[-1]
        told.append(f"{rule.name} ({place})")
    more = len(rules) - _MOST_WAYS
    return " or ".join(told) + (f" or {more} more" if more > 0 else "")


def _first_reasons(observed: Observed, leaf: int) -> Silence | None:
    """Returns why the ways to a leaf are cut; one reason where that cuts them all."""
    pairs = [(cut, reason(observed, cut)) for cut in cuts(observed)]
    reasons = [each for _, each in pairs]
    strong = [pair for pair in pairs if pair[1].cause.name not in _WEAK]
    alone = [each for cut, each in strong if cuts_all(observed, cut, leaf)]
    telling = alone[:1] or [each for _, each in strong]
    if not telling:
        telling = [cancelled(observed, each) for each in cancellations(observed)[:1]]
    distinct = list({each.cause.says: each for each in telling or reasons}.values())
    if not distinct:
        return None
    first, *others = distinct[:_MOST_WAYS]
    says = first.cause.says
    for other in others:
        says += f"; on another way, {other.cause.says}"
    if len(distinct) > _MOST_WAYS:
        says += f"; so it is on {len(distinct) - _MOST_WAYS} more"
    return dataclasses.replace(first, cause=dataclasses.replace(first.cause, says=says))


def _with_place(underflow: Silence, cut: Silence | None) -> Silence:
    """Adds to an underflow where in its own precision the gradient is lost."""
    if cut is None:
        return underflow
    if cut.cause.name == "saturated":
        cause = dataclasses.replace(
            cut.cause, says=f"{cut.cause.says}; {underflow.cause.says}"
        )
        return Silence(cause, cut.line)
    return Silence(underflow.cause, cut.line)


def _observed(
    backward: Backward, leaves: Sequence[int], *, lifted: bool
) -> dict[int, Observed]:
    """Follows the first trial's gradient back, once for each of some leaves."""
    if not leaves:
        return {}
    try:
        return _followed(backward, leaves, lifted)
    except Exception:  # a step without a reverse mode, or one that can't be run alone
        return {}


def _followed(
    backward: Backward, leaves: Sequence[int], lifted: bool
) -> dict[int, Observed]:
    root = Level(backward.program.jaxpr)
    point = backward.first
    values: list[Any] = [*point.moving, *point.held]
    consts = array_constants([backward.program.jaxpr])
    at: list[Any] = [values, consts]
    if lifted:
        at = [[widen(value) for value in part] for part in at]
    shapes = [leaf.shape for leaf in backward.leaves]
    silent = set(leaves)

    def reach_of(i: int) -> list[Any]:
        return [
            np.full(shape, k == i) if k in silent else None
            for k, shape in enumerate(shapes)
        ] + [None] * len(point.held)

    def follow(reach: list[Any], values: list[Any], constants: list[Any]) -> Readings:
        hoisted = dict(zip(map(id, consts), constants, strict=True))
        run = Evaluator(wide=lifted, hoisted=hoisted)
        made = root.forward(run, values, reach)
        (loss,) = root.steps.outputs
        assert isinstance(loss, int)
        return root.backward(run, made, [jnp.ones_like(made.values[loss])])[1]

    compiled = _compiled(follow, [reach_of(leaves[0]), *at], lifted)
    inputs = backward.inputs
    named: list[Leaf] = [*inputs.moving, *inputs.of_role(Role.HELD)]
    return {
        i: Observed(root, execution.to_host(compiled(reach_of(i), *at)), named)
        for i in leaves
    }


def _compiled(
    follow: Callable[..., Any], arguments: list[Any], lifted: bool
) -> Callable[..., Any]:
    """Compiles as lifted programs are, or as the gradient itself was."""
    if lifted:
        return execution.lifted(follow, arguments)
    compiled = jax.jit(follow)

    def run(*at: Any) -> Any:
        with execution.working_precision():
            return compiled(*at)

    return run


def _blocked(blocks: Sequence[str], rules: Sequence[jaxprs.RuleSource]) -> Cause:
    if rules:
        return Cause(
            "lost in a custom rule",
            f"the loss depends on it only through {', '.join(blocks)}, where "
            "derivatives end, and the custom rule around it hands on none either: "
            f"{_written(rules)}",
            "return this leaf's cotangent from the rule, or name it in `exclude` if it "
            "is frozen on purpose",
        )
    stopped = jaxprs.STOP_GRADIENT in blocks
    return Cause(
        "behind stop_gradient" if stopped else "behind a step without derivative",
        f"the loss depends on it only through {', '.join(blocks)}, where derivatives "
        "end",
        "let it reach the loss another way, or name it in `exclude` if it is frozen "
        "on purpose",
    )


def _lost_in_a_rule(gradient: np.ndarray, jaxpr: jaxprs.Jaxpr) -> Cause:
    rules = _rules(_calls(jaxpr))
    which = f"the rule of {_written(rules)}" if rules else "a rule"
    return Cause(
        "lost in a custom rule",
        "the gradient without custom rules is not zero here (norm "
        f"{np.linalg.norm(gradient):.3g}): {which} loses it",
        "return this leaf's cotangent from the rule; find the rule with "
        "assert_autodiff_matches",
    )


def _underflow(gradient: np.ndarray, leaf: Leaf) -> Cause:
    return Cause(
        "underflow",
        f"in float64 its gradient has norm {np.linalg.norm(gradient):.3g}, on the way "
        f"to {np.dtype(leaf.dtype).name} it becomes zero",
        "scale the loss, or compute in a dtype with a wider range",
    )


def _zero_here(trials: int) -> Cause:
    tried = "at the point" if trials == 1 else f"in each of {trials} trials"
    return Cause(
        "zero at this point",
        f"the loss depends on it, but the gradient is zero {tried}",
        "look for dead ReLU units, saturation, masks and zero factors; draw other "
        "points (`trials`, gradtest.domains)",
    )
