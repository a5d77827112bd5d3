"""The public function: `gradtest.hunt`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradtest._src import jaxprs
from gradtest._src.findings import Report
from gradtest._src.intentions import Intentions
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import (
    Inconclusive,
    Keywords,
    reported,
    require_callable,
    settle,
    settled,
)
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.variants import asserts_are_disabled

PyTree = Any


@processes.agreed
def hunt(
    fn: Callable[..., PyTree],
    *domains: PyTree,
    examples: int = 200,
    argnums: int | Sequence[int] | None = None,
    order: int | None = None,
    modes: Sequence[str] | None = None,
    has_aux: bool = False,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    expect_differs: Intentions | None = None,
    database: Any = "default",
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Searches for inputs at which what JAX differentiates of `fn` is wrong.

    Many wrong gradients are right at a random point: they show at exact zeros, ties,
    saturation, duplicate indices, empty masks, at other sizes. All of these are tried,
    then mixtures of them that Hypothesis draws, each judged as
    `assert_autodiff_matches` would. What fails is made as small and round as it can
    be, printed as code, kept in Hypothesis's database, and tried first the next time.

    Args:
      fn: As for `assert_autodiff_matches`. Rules of the user's that it calls are
        hunted at their own operands as well.
      *domains: Trees of `gradtest.domains` entries, whose named sizes vary, of
        `jax.ShapeDtypeStruct`, or of arrays and numbers. Around those a domain is
        inferred, narrow where they are (probabilities, triangular or positive definite
        matrices, indices), and sizes that are equal vary together where `fn` takes it.
        What else is there stays as it is.
      examples: How many inputs to try.
      argnums: Arguments to differentiate; None takes each with a float or complex leaf.
      order: 1, or 2 for second derivatives as well. None: those too, where the program
        has them and they are plainly wrong.
      modes: As for `assert_autodiff_matches`.
      has_aux: Whether `fn` returns a pair of result and auxiliary data.
      key: An integer or a JAX key: fixes every draw, where the database is empty. None:
        0, or what pytest's `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees that are not checked; they still vary.
      expect_differs: As for `assert_autodiff_matches`.
      database: A `hypothesis.database.ExampleDatabase`, or None to keep nothing.
        "default" is the one that Hypothesis itself would use, in `.hypothesis`.
      inconclusive: Whether it raises or warns where no example at all is conclusive.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report of a hunt that found nothing: `hazards` tells what came of each
      example, `notes` which sizes were tried and skipped, and what stayed
      inconclusive. Marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: A derivative is wrong at an input; the message has it as code.
      GradientInconclusive: No example was conclusive, and `inconclusive="raise"`.
      ImportError: Hypothesis is not installed (the extra `hunt`).
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> from gradtest import domains
      >>> batch = domains.normal(("batch", 2))
      >>> report = gradtest.hunt(jnp.tanh, batch, examples=20, database=None)
      >>> report.verdict.value
      'PASS'
    """
    chosen = Keywords.of({**locals(), "order": 2 if order is None else order})
    options = dataclasses.replace(chosen.options, trials=1)
    require_callable("fn", fn)
    _check_examples(examples)
    if asserts_are_disabled():
        return settled("hunt", fn, chosen, _unused)
    kept = _database(database)
    runs: list[_Run] = []

    def make_check(options: Options) -> _Run:
        runs.append(_Run(fn, domains, options, examples, kept, order is None))
        return runs[-1]

    report = reported("hunt", fn, options, make_check)
    code = runs[0].code if runs else ()
    return settle("hunt", report, chosen.inconclusive, chosen.messages, code)


def _unused(options: Options) -> Any:
    raise AssertionError("nothing is checked")


def _check_examples(examples: Any) -> None:
    is_number = isinstance(examples, int | np.integer)
    if isinstance(examples, bool) or not is_number or examples < 1:
        raise ValueError(f"`examples` must be an integer >= 1, got {examples!r}.")


def _database(database: Any) -> Any:
    """Returns the database of examples; None keeps nothing.

    Raises:
      ImportError: Hypothesis is not installed.
      TypeError: It is no database.
    """
    from gradtest._src.hunting import choosing

    if isinstance(database, str) and database == "default":
        # Of the processes of a job, each has a directory of its own.
        return choosing.default_database() if jaxprs.current_job() is None else None
    if database is not None and not choosing.is_database(database):
        raise TypeError(
            "`database` must be 'default', None or a hypothesis.database."
            f"ExampleDatabase, got {database!r}."
        )
    return database


class _Run:
    """A hunt that can be reported on, as a check can."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        options: Options,
        examples: int,
        database: Any,
        is_lenient: bool,
    ):
        from gradtest._src.hunting.engine import Hunt
        from gradtest._src.hunting.ground import Ground
        from gradtest._src.hunting.memory import Memory

        ground = Ground(fn, args, options, is_lenient=is_lenient)
        self._hunt = Hunt(ground, examples)
        self._memory = Memory(database, fn, ground)
        self.code: tuple[str, ...] = ()

    def report(self, assertion: str) -> Report:
        """Runs the hunt."""
        from gradtest._src.hunting import telling
        from gradtest._src.hunting.shrinking import Shrinking

        hunt = self._hunt
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of means of nothing
            example = self._replayed() or hunt.run()
            if example is None:
                return telling.passed(hunt, assertion)
            tried = hunt.tried[: hunt.after]
            example = Shrinking(hunt.ground, hunt.judge, example).run()
            hunt.tried[:] = tried
            self._memory.keep(example)
            report = telling.failed(hunt, example, assertion)
            self.code = tuple(telling.lines(hunt, example))
        return report

    def _replayed(self) -> Any:
        """Returns what failed before, where it still does."""
        hunt = self._hunt
        for kept, example in self._memory.examples():
            if hunt.prepare(example.place) and hunt.judge(example).is_wrong:
                return example
            self._memory.forget(kept)
        return None
