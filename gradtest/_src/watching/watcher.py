"""The hook that a training loop calls before each step."""

from __future__ import annotations

import dataclasses
import logging
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from gradtest._src import seeding, session, variants
from gradtest._src.findings import (
    GradientInconclusive,
    GradientMismatch,
    Report,
    Verdict,
)
from gradtest._src.inputs import is_tracing
from gradtest._src.intentions import Intentions
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import (
    Inconclusive,
    Keywords,
    reported,
    require_callable,
    settle,
)
from gradtest._src.options import DEFAULT_RTOL
from gradtest._src.watching.record import Look, Record
from gradtest._src.watching.rounds import WATCH, Args, Outcome, Rounds

PyTree = Any
What = Literal["gradient", "rules", "both"]
OnFailure = Literal["raise", "log"] | Callable[[Report], object]

_log = logging.getLogger("gradtest.watch")
_WHAT = ("gradient", "rules", "both")


class Watcher:
    """Checks a loss's gradient while it is trained: `watcher(step, params, batch)`.

    Made by `gradtest.watch`. It reads what it is given and changes nothing: neither
    parameters nor optimiser nor any random state.

    Attributes:
      compile_seconds: What tracing and compiling took so far, apart from the checks.
      last_report: The report of the last check; None before the first.
    """

    def __init__(self, loss: Callable[..., Any], settings: _Settings):
        self._loss = loss
        self._settings = settings
        self._every, self._start = settings.every, settings.start
        self._record = Record(_qualified(loss))
        self._rounds = Rounds(
            loss,
            settings.keywords.options,
            settings.what,
            settings.sample,
            self._record,
        )
        self._bucket = -1  # that of the last check: so many times `every` steps
        self.last_report: Report | None = None

    def __call__(self, step: int, params: PyTree, *args: PyTree) -> Report | None:
        """Checks the gradient if it is due; to be called before the step is made.

        Args:
          step: The number of the step that is to come: a Python integer. An array is
            read, which waits for the device.
          params: What the loss is differentiated for.
          *args: The loss's other arguments, as a batch.

        Returns:
          The report of the check; None where none was due.

        Raises:
          GradientMismatch: The gradient is wrong, and `on_failure="raise"`.
          GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
          TypeError: It is called inside of `jit` or another transformation.
        """
        if type(step) is not int:
            step = _as_step(step)
        bucket = (step - self._start) // self._every
        if bucket == self._bucket or bucket < 0:
            return None
        return self._check(step, bucket, (params, *args))

    def _check(self, step: int, bucket: int, arguments: Args) -> Report:
        _require_host(arguments)
        options = self._settings.keywords.options
        if variants.asserts_are_disabled():
            key = seeding.describe(options.key)
            name = _qualified(self._loss)
            self._bucket = bucket
            return session.tell(Report(WATCH, name, Verdict.NOT_CHECKED, key=key))
        return check_watched(self, arguments, step=step, key=options.key)

    def prepare(self, params: PyTree, *args: PyTree) -> float:
        """Compiles now what the first check would compile, and checks nothing.

        Args:
          params: Parameters of the shapes and dtypes that are trained.
          *args: The loss's other arguments, of the shapes that are trained with.

        Returns:
          The seconds that it took.

        Raises:
          TypeError, ValueError: An argument is not what it must be.
        """
        arguments = (params, *args)
        _require_host(arguments)
        before = self.compile_seconds
        with jax.transfer_guard("allow"):
            self._rounds.prepare(arguments)
        return self.compile_seconds - before

    @property
    def compile_seconds(self) -> float:
        """What tracing and compiling took so far, in seconds."""
        return self._rounds.compile_seconds

    @property
    def failures(self) -> int:
        """How many checks failed."""
        return self._record.failures

    def state_dict(self) -> dict[str, np.ndarray]:
        """Returns what was checked when, to be saved with the training's own state.

        Returns:
          A dict of NumPy arrays: the last step, counts, the step at which each leaf and
          rule was looked at last (-1 for never). Their shapes are known after the first
          check, or after `prepare`.
        """
        return self._record.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from where a saved watcher was.

        Args:
          state: What its `state_dict` returned, as it was restored.

        Raises:
          TypeError, ValueError: It is no such state, or that of another loss.
        """
        self._record.load(state)
        last = self._record.last
        self._bucket = -1 if last is None else self._bucket_of(last)

    def _bucket_of(self, step: int) -> int:
        return max((step - self._start) // self._every, -1)

    def summary(self) -> str:
        """Returns what was checked when, as text."""
        lines = [
            f"watch({_qualified(self._loss)}, every={self._every}): "
            f"{self._record.lines()[0]}",
            *self._record.lines()[1:],
            f"compiling took {self.compile_seconds:.1f} s, "
            f"{self._rounds.compiled} time{'s' * (self._rounds.compiled != 1)}",
        ]
        return "\n  ".join(lines)

    __str__ = summary

    def __repr__(self) -> str:
        return f"<gradtest.Watcher of {_qualified(self._loss)}, every={self._every}>"

    # --- one check ------------------------------------------------------------------

    def _run(self, step: int, arguments: Args) -> Report:
        """Checks, takes note of it, and raises or logs what was found."""
        keywords = self._settings.keywords
        round_ = _Round(self._rounds, step, arguments)
        start, compiled = time.perf_counter(), self.compile_seconds
        report = reported(WATCH, self._loss, keywords.options, lambda _: round_)
        seconds = time.perf_counter() - start - (self.compile_seconds - compiled)
        if self.compile_seconds > compiled:
            _log.info(
                "watch at step %d: compiled in %.1f s",
                step,
                self.compile_seconds - compiled,
            )
        name = f"{WATCH} at step {step}"
        try:
            report = settle(name, report, keywords.inconclusive, keywords.messages)
        except (GradientMismatch, GradientInconclusive) as error:
            self._note(step, error.report, round_.outcome, seconds)
            if self._raises(error):
                raise
            self._tell(error, error.report)
            return error.report
        self._note(step, report, round_.outcome, seconds)
        return report

    def _raises(self, error: Exception) -> bool:
        on_failure = self._settings.on_failure
        return isinstance(error, GradientInconclusive) or on_failure == "raise"

    def _tell(self, error: Exception, report: Report) -> None:
        on_failure = self._settings.on_failure
        if callable(on_failure):
            on_failure(report)
        else:
            _log.error("%s", error)

    def _note(
        self, step: int, report: Report, outcome: Outcome | None, seconds: float
    ) -> None:
        """Takes note of a check."""
        how = "nothing" if outcome is None else outcome.how
        in_full = outcome is not None and outcome.in_full
        self._record.add(Look(step, report.verdict, how, seconds), in_full=in_full)
        if outcome is not None:
            self._record.looked_at(outcome.leaves, step)
        self._record.audited(report, step)
        self.last_report = report
        self._bucket = self._bucket_of(step)
        if report.verdict is Verdict.PASS:
            _log.debug("watch at step %d: PASS, %s, %.3f s", step, how, seconds)


@processes.agreed
def check_watched(watcher: Watcher, arguments: Args, *, step: int, key: Any) -> Report:
    """Runs one check, in all processes of a job together.

    Args:
      watcher: The watcher whose check is due.
      arguments: The loss's arguments.
      step: The step, which must be the same in all processes.
      key: The key, which must be so too.
    """
    return watcher._run(step, arguments)


class _Round:
    """A check as the keywords of assertions want it."""

    def __init__(self, rounds: Rounds, step: int, arguments: Args):
        self._of = rounds, step, arguments
        self.outcome: Outcome | None = None

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        rounds, step, arguments = self._of
        self.outcome = rounds.run(step, arguments)
        return self.outcome.report


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What the user chose of a watcher."""

    every: int
    start: int
    what: str
    sample: int | None
    on_failure: OnFailure
    keywords: Keywords

    def __post_init__(self) -> None:
        for name, least in (("every", 1), ("start", 0), ("sample", 1)):
            value = getattr(self, name)
            if name == "sample" and value is None:
                continue
            if type(value) is not int or value < least:
                raise ValueError(
                    f"`{name}` must be an integer >= {least}, got {value!r}."
                )
        if self.what not in _WHAT:
            raise ValueError(f"`what` must be one of {_WHAT}, got {self.what!r}.")
        if not callable(self.on_failure) and self.on_failure not in ("raise", "log"):
            raise ValueError(
                "`on_failure` must be 'raise', 'log' or a function that takes the "
                f"report, got {self.on_failure!r}."
            )


def watch(
    loss: Callable[..., Any],
    every: int = 500,
    *,
    what: What = "gradient",
    sample: int | None = None,
    start: int = 0,
    on_failure: OnFailure = "raise",
    has_aux: bool = False,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    variant: Callable[..., Any] | None = None,
    expect_differs: Intentions | None = None,
    inconclusive: Inconclusive = "warn",
) -> Watcher:
    """Returns a hook that checks a loss's gradient every so many steps of a training.

    The training loop calls `watcher(step, params, batch)` before each step, outside of
    any program. At the first call, and then at the first call at or past each multiple
    of `every` from `start`, JAX's gradient of `loss`, custom rules included, is
    screened at these very parameters and this batch: against rule-free autodiff in
    float64, with itself in its own precision, and along one random direction against
    differences of the loss. What exceeds its allowance is checked once more, as
    `assert_autodiff_matches` does it, and that verdict counts. All is done before the
    call returns, so that the arrays may be donated to the step.

    Args:
      loss: Takes the parameters and whatever else the watcher is called with; returns
        one real number, or one per device under `pmap`. It is traced when shapes are
        new, so it must not read values from elsewhere that change.
      every: How many steps lie between two checks.
      what: "gradient"; "rules" audits custom rules one by one, as
        `assert_custom_rules_match` does to first order, which is dearer; or "both".
      sample: How many leaves are looked at in one check, or with "rules" and "both" how
        many rules are audited, in turn, so that all come round. None: all leaves, and
        one rule. Each group of leaves is compiled by itself.
      start: The first step at which a check is due.
      on_failure: What happens where the gradient is wrong: "raise", "log" (as an error,
        to the logger `gradtest.watch`), or a function that is called with the report.
      has_aux: Whether `loss` returns a pair of the loss and auxiliary data.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative formula gap of a leaf; never scaled by its size.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves or sub-trees of the parameters that are not checked.
      variant: A chex variant or transformation that the gradient runs under.
      expect_differs: As for `assert_autodiff_matches`.
      inconclusive: Whether an inconclusive check (a parameter or the loss that is not
        finite) raises or warns.

    Returns:
      The watcher. `watcher.summary()` tells what was checked when, `state_dict` and
      `load_state_dict` save and restore it.

    Raises:
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> def loss(params, batch):
      ...     return jnp.mean((jnp.tanh(batch @ params) - 1.0) ** 2)
      >>> watcher = gradtest.watch(loss, every=500)
      >>> params, batch = jnp.ones(3), jnp.eye(3)
      >>> for step in range(600):
      ...     report = watcher(step, params, batch)
      ...     params = params - 0.1 * jax.grad(loss)(params, batch)
      ...     if report:
      ...         print(step, report.verdict.value)
      0 PASS
      500 PASS
    """
    require_callable("loss", loss)
    if isinstance(exclude, str):
        raise TypeError(
            f"`exclude` must be a sequence of leaf names, got the string {exclude!r}; "
            f"write exclude=({exclude!r},)."
        )
    argnums, order = 0, 1
    arguments = locals()
    arguments |= {"argnums": argnums, "order": order}
    keywords = Keywords.of(arguments)
    settings = _Settings(every, start, what, sample, on_failure, keywords)
    return Watcher(loss, settings)


def _as_step(step: Any) -> int:
    """Returns a step's number as an int.

    Raises:
      TypeError: It is none, or a traced value.
    """
    if isinstance(step, jax.core.Tracer):
        raise TypeError(_TRACED.format("`step`"))
    if not isinstance(step, bool | np.bool_):
        try:
            return operator.index(step)
        except TypeError:
            pass
    raise TypeError(f"`step` must be an integer, got {step!r}.")


def _require_host(arguments: Args) -> None:
    """Raises TypeError inside of a trace."""
    leaves = jax.tree_util.tree_leaves(arguments)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves) or is_tracing():
        raise TypeError(_TRACED.format("a watcher"))


_TRACED = (
    "{} was met while JAX traces a function: call the watcher from the training loop "
    "on the host, before the jitted step, not inside of jit, grad, vmap, pmap or scan."
)


def _qualified(loss: Any) -> str:
    return getattr(loss, "__name__", type(loss).__name__)
