"""What checkers are worth beside each other: `python -m benchmarks.power`.

Each custom rule of right programs is broken in many ways, one at a time, and every
checker is run on every mutant, the same for all. A checker that refuses the right
program has raised a false alarm, and its mutants of that program are not counted.

`--ci` breaks the rules of the examples and of the tests' right programs, and asks
gradtest alone: it fails where one of its own assertions lets a wrong rule pass.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jax.test_util

import gradtest
from benchmarks.power_corpus import EXAMPLES, RIGHT, ZOO, Program, in_dtype, values

Checker = Callable[..., Any]
# Kernels are interpreted in float64, which takes its time: two mutants of each rule,
# but where they are asked for by name.
_SLOW, _FEW = ("pallas_kernels",), 2


def by_gradtest(fn: Callable[..., Any], *args: Any, modes: Sequence[str]) -> None:
    """Asserts every rule, to first order as the others do."""
    del modes
    gradtest.assert_custom_rules_match(fn, *args, order=1)


def by_check_grads(fn: Callable[..., Any], *args: Any, modes: Sequence[str]) -> None:
    """Asks `jax.test_util.check_grads`, at its own tolerances."""
    of_floats, floats = _of_floats(fn, args)
    jax.test_util.check_grads(of_floats, floats, order=1, modes=modes)


def by_chex(fn: Callable[..., Any], *args: Any, modes: Sequence[str]) -> None:
    """Asks `chex.assert_numerical_grads`, at its own tolerances."""
    of_floats, floats = _of_floats(fn, args)
    chex.assert_numerical_grads(of_floats, floats, order=1, modes=modes)


CHECKERS: dict[str, Checker] = {
    "check_grads": by_check_grads,
    "chex": by_chex,
    "gradtest": by_gradtest,
}


def _of_floats(
    fn: Callable[..., Any], args: Sequence[Any]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Returns a function's float results as one of its float leaves alone."""
    leaves, tree = jax.tree.flatten(args)
    places = [k for k, leaf in enumerate(leaves) if _is_float(leaf)]

    def of_floats(*floats: Any) -> list[Any]:
        whole = list(leaves)
        for place, leaf in zip(places, floats, strict=True):
            whole[place] = leaf
        results = jax.tree.leaves(fn(*jax.tree.unflatten(tree, whole)))
        return [result for result in results if _is_float(result)]

    return of_floats, tuple(leaves[k] for k in places)


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)


def _modes(fn: Callable[..., Any], args: Sequence[Any]) -> tuple[str, ...]:
    """Returns the modes that a program has; a `custom_vjp` has no forward one."""
    return (
        ("rev",)
        if "custom_vjp" in str(jax.make_jaxpr(fn)(*args))
        else (
            "fwd",
            "rev",
        )
    )


@dataclasses.dataclass
class Score:
    """What came of one checker on some programs."""

    right: int = 0
    alarms: int = 0
    caught: int = 0
    missed: int = 0
    seconds: float = 0.0

    def line(self) -> str:
        """Returns the columns of the table."""
        wrong = self.caught + self.missed
        rate = f"{self.caught / wrong:.1%}" if wrong else "-"
        kills = f"{self.caught} of {wrong}"
        alarms = f"{self.alarms:>6} of {self.right:<4}"
        return f"{alarms}{kills:>14}{rate:>8}{self.seconds:>8.0f} s"


def score(checker: Checker, programs: Sequence[Program], most: int) -> Score:
    """Runs a checker on right programs, and on mutants of each of their rules."""
    found, start = Score(), time.perf_counter()
    for program in programs:
        fn, args, _ = program.make()
        args = values(args)
        found.right += 1
        asserted = functools.partial(checker, modes=_modes(fn, args))
        try:
            power = gradtest.power(
                fn,
                *args,
                assertion=_raising(asserted),
                mutations=most,
                scales=False,
            )
        except ValueError as error:
            if "before any rule is broken" not in str(error):
                raise
            found.alarms += 1
            continue
        found.caught += len(power.caught)
        found.missed += len(power.survived)
    found.seconds = time.perf_counter() - start
    return found


def _raising(checker: Checker) -> Checker:
    """Takes whatever a checker raises for a refusal: some crash."""

    def asserted(*args: Any) -> None:
        try:
            checker(*args)
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}") from error

    return asserted


def compare(programs: Sequence[Program], most: int) -> None:
    """Prints the table."""
    print(f"{'checker':14}{'dtype':10}{'false alarms':>14}{'caught':>11}")
    for dtype in (jnp.float32, jnp.bfloat16):
        cast = _traceable(in_dtype(programs, dtype))
        for name, checker in CHECKERS.items():
            line = score(checker, cast, most).line()
            print(f"{name:14}{jnp.dtype(dtype).name:10}{line}", flush=True)


def _traceable(programs: Iterator[Program]) -> list[Program]:
    """Leaves out what can't be run in a dtype, and what is given to no rule."""
    kept = []
    for program in programs:
        try:
            fn, args, _ = program.make()
            jaxpr = jax.make_jaxpr(fn)(*values(args))
        except Exception:  # as where there is no such kernel in half precision
            continue
        kept += [program] if "custom_" in str(jaxpr) else []
    return kept


def guard(programs: Sequence[Program], most: int, *, few: int) -> int:
    """Breaks the rules of programs; returns how many wrong ones gradtest let pass.

    Args:
      programs: The programs.
      most: How many mutants of each rule.
      few: How many of each rule of the slow programs.
    """
    survived = made = equal = 0
    for program in programs:
        fn, args, options = program.make()
        count = min(most, few) if program.name in _SLOW else most
        power = gradtest.power(fn, *args, mutations=count, scales=False, **options)
        missed = [*power.survived, *power.malformed]
        missed += [] if options.get("order") == 1 else power.second_order
        survived += len(missed)
        made += len(power.mutants)
        equal += len(power.equivalent)
        is_plain = not missed and not power.equivalent
        told = f"{len(power.caught)} caught" if is_plain else power
        print(f"{program.name}: {told}", flush=True)
    print(
        f"{made} mutants, {equal} of them equivalent ({equal / max(made, 1):.1%}): "
        f"{survived} survived."
    )
    return survived


def main() -> int:
    """Prints the table, or guards our own assertions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("programs", nargs="*", help="parts of names; all by default")
    parser.add_argument("--ci", action="store_true", help="ask gradtest alone")
    parser.add_argument("--zoo", action="store_true", help="the zoo's right rules too")
    parser.add_argument("--mutants", type=int, default=4, help="of each rule")
    chosen = parser.parse_args()
    programs = (*EXAMPLES, *RIGHT) if chosen.ci else RIGHT
    programs = (*programs, *ZOO) if chosen.zoo else programs
    wanted = [
        program
        for program in programs
        if not chosen.programs or any(n in program.name for n in chosen.programs)
    ]
    if chosen.ci:
        few = chosen.mutants if chosen.programs else _FEW
        return 1 if guard(wanted, chosen.mutants, few=few) else 0
    compare(wanted, chosen.mutants)
    return 0


if __name__ == "__main__":
    sys.exit(main())
