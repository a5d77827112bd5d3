"""The public assertion that a step with an overflow is as if it had not been."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, seeding
from gradtest._src.findings import Cause, Entry, Finding, Gap, Report, Verdict, worst
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, settled
from gradtest._src.optimisers import bits, trees
from gradtest._src.optimisers.training import ExtraArgs, Optimiser
from gradtest._src.optimisers.trees import Start, Values, read_start
from gradtest._src.options import Options

PyTree = Any
# What Optax's own states keep of skipped steps, by name.
_OPTAX_COUNTS = ("notfinite_count", "last_finite", "total_notfinite", "skip_state")
_BAD = (("NaN", np.nan), ("inf", np.inf), ("-inf", -np.inf))
_MOST_LEAVES = 8
_MOST_STEPS = 64


@processes.agreed
def assert_overflow_skipped(
    tx_or_step: Any,
    params: PyTree,
    grads: PyTree,
    *,
    init: Callable[[PyTree], PyTree] | PyTree = None,
    changes: Sequence[str] = (),
    extra_args: ExtraArgs = None,
    key: Any = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that a step with an overflow leaves params and state as they were.

    One entry of a leaf, or all entries of all leaves, of the gradients are NaN or
    infinite, at the first step and after two good ones. Params and state must then be
    the same bit for bit, but for what `changes` names, and the next good step must be
    what it would have been without the overflow. Steps without an overflow must move
    the params.

    Args:
      tx_or_step: An `optax.GradientTransformation` (`optax.apply_if_finite(...)`), or a
        hand-written `step(params, state, grads)` that returns `(params, state)`.
      params: Tree of arrays, `jax.ShapeDtypeStruct` or `gradtest.domains` entries.
      grads: Tree like `params`, as the step takes them: scaled, if it unscales them.
      init: For a step: its first state, or a function of the params that returns it.
      changes: Names of what an overflow may change in the state, such as "scale" or
        "skipped": of fields, keys, or whole leaves ("state['scale']"). What Optax's own
        states count is known. Where a changed scalar is a loss scale, the gradients of
        the next step are scaled alike.
      extra_args: Keyword arguments of the transformation's `update`.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: An overflow leaves a trace in the params, the state or the next
        step; or good steps are skipped as well.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from gradtest.optax import assert_overflow_skipped
      >>> params = {"w": jnp.ones(3)}
      >>> tx = optax.apply_if_finite(optax.adam(1e-3), max_consecutive_errors=5)
      >>> assert_overflow_skipped(tx, params, params).verdict.value
      'PASS'
    """
    name, chosen = "assert_overflow_skipped", Keywords.of(locals())
    if isinstance(changes, str):
        raise TypeError(
            f"`changes` must be names, as in changes=({changes!r},), got {changes!r}."
        )
    step, first = _read_step(tx_or_step, init, extra_args)
    subject = trees.describe(tx_or_step)
    if subject == "tx" and not hasattr(tx_or_step, "update"):
        subject = getattr(tx_or_step, "__name__", "step")

    def make_check(options: Options) -> OverflowCheck:
        start = read_start(params, grads, options.key)
        return OverflowCheck(subject, step, first, start, tuple(changes), options)

    return settled(name, trees.named(subject), chosen, make_check)


Step = Callable[[PyTree, PyTree, PyTree], tuple[PyTree, PyTree]]


def _read_step(
    tx_or_step: Any, init: Any, extra_args: ExtraArgs
) -> tuple[Step, Callable[[PyTree], PyTree]]:
    """Returns the step, and what makes its first state."""
    if hasattr(tx_or_step, "init") and hasattr(tx_or_step, "update"):
        trees.require_transformation(tx_or_step, "tx_or_step")
        if init is not None:
            raise ValueError("`init` is for a step: a transformation has its own.")
        optimiser = Optimiser(tx_or_step, extra_args)
        return optimiser.step, optimiser.init
    if not callable(tx_or_step):
        raise TypeError(
            "`tx_or_step` must be an optax.GradientTransformation or a function "
            f"step(params, state, grads), got {tx_or_step!r}."
        )
    if init is None:
        raise ValueError(
            "`init` must be given for a step: its first state, or a function of the "
            "params that returns it; init=() where it has none."
        )
    if extra_args is not None:
        raise ValueError("`extra_args` are for a transformation, not for a step.")
    return tx_or_step, init if callable(init) else lambda params: init


@dataclasses.dataclass(frozen=True)
class _At:
    """Params and state after some steps."""

    params: PyTree
    state: PyTree


@dataclasses.dataclass(frozen=True)
class _Overflow:
    """Gradients that are not finite: what they are called, and the leaves' values."""

    says: str
    grads: Values


class OverflowCheck:
    """Takes steps with and without an overflow and compares what they leave."""

    def __init__(
        self,
        subject: str,
        step: Step,
        init: Callable[[PyTree], PyTree],
        start: Start,
        changes: tuple[str, ...],
        options: Options,
    ):
        self._subject, self._user_step = subject, step
        self._init, self._start = init, start
        self._changes, self._options = changes, options
        self._step = jax.jit(self._checked_step)
        self._changed: dict[str, None] = {}

    def _checked_step(self, params: PyTree, state: PyTree, grads: PyTree) -> Any:
        returned = self._user_step(params, state, grads)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise TypeError(
                "`tx_or_step` must return the pair (params, state), got "
                f"{type(returned).__name__}."
            )
        self._start.params.arrays(returned[0], "tx_or_step")
        return returned

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        with execution.working_precision(), np.errstate(all="ignore"):
            findings = list(self._findings())
        key = seeding.describe(self._options.key)
        verdict = worst(finding.verdict for finding in findings)
        changed = ", ".join(self._changed)
        return Report(
            assertion,
            self._subject,
            verdict,
            tuple(findings),
            key=key,
            precision=("precision: that of the params, every bit counts",),
            unchecked=tuple(f"{name} (may change)" for name in self._changed),
            notes=("several overflows in a row were not tried",)
            + ((f"an overflow changed {changed}, as it may",) if changed else ()),
            replay=""
            if verdict is Verdict.PASS
            else f"gradtest.optax.{assertion}({self._subject}, params, ..., key={key})",
        )

    def _findings(self) -> Iterator[Finding]:
        params = self._start.params.build(
            [jnp.asarray(value) for value in self._start.params.values]
        )
        drawn = trees.draw_runs(self._start.grads, 4, (1.0,), self._options.key)[
            0
        ].grads
        begin = _At(params, self._init(params))
        self._require_known(begin.state)
        later = self._take(self._take(begin, drawn[0]), drawn[1])
        idle = bits.unmoved(begin.params, later.params)
        moved = later
        for _ in range(_MOST_STEPS if idle else 0):  # an accumulation takes its time
            moved = self._take(moved, drawn[1])
            idle = bits.unmoved(begin.params, moved.params)
            if not idle:
                break
        if idle:
            yield self._fails(
                idle, None, "never steps",
                f"{_MOST_STEPS} steps with finite gradients leave all params as they "
                "were",
                "let steps without an overflow through: look at the condition",
            )  # fmt: skip
            return
        for when, at in (("the first step", begin), ("a step after two", later)):
            for overflow in self._overflows(drawn[2]):
                found = self._one(at, overflow, drawn[3], when)
                if found is not None:
                    yield found
                    return
        for leaf in self._start.params.leaves:
            yield Finding(
                leaf.name, leaf.shape, jnp.dtype(leaf.dtype).name, Verdict.PASS,
                Gap.AGREEMENT, judged_by="reference", check="skipped",
            )  # fmt: skip

    def _require_known(self, state: PyTree) -> None:
        """Raises ValueError where `changes` names nothing in the state."""
        leaves = list(trees.paths(state, "state"))
        for change in self._changes:
            if not any(
                change == leaf or change in bits.keys_of(leaf) for leaf in leaves
            ):
                told = ", ".join(leaves) or "none"
                raise ValueError(
                    f"`changes` names {change!r}, which is no leaf, field or key of "
                    f"the state: there are {told}."
                )

    def _take(self, at: _At, grads: Values) -> _At:
        built = self._start.grads.build([jnp.asarray(g) for g in grads])
        return _At(*self._step(at.params, at.state, built))

    def _overflows(self, grads: Values) -> Iterator[_Overflow]:
        """Yields gradients with an overflow in one entry, and in all of them."""
        floats = [i for i in self._start.grads.floats if np.size(grads[i])]
        for what, value in _BAD:
            every = list(grads)
            for i in floats:
                every[i] = np.full_like(np.asarray(grads[i]), value)
            yield _Overflow(f"all gradients {what}", every)
        # The first and the last leaf are those that a check of one leaf forgets.
        for i in dict.fromkeys([floats[-1], *floats[:_MOST_LEAVES]]):
            for what, value in _BAD[:2]:
                one = list(grads)
                one[i] = np.array(grads[i])
                one[i].flat[-1] = value
                name = self._start.grads.leaves[i].name
                yield _Overflow(f"one {what} in {name}", one)

    def _one(
        self, at: _At, overflow: _Overflow, good: Values, when: str
    ) -> Finding | None:
        """Returns what one overflow leaves behind, if anything."""
        after = self._take(at, overflow.grads)
        what = f"with {overflow.says}, at {when}"
        for name, old, new in bits.pairs_of(at.params, after.params, "params"):
            if not bits.is_same(old, new):
                return self._traced_in(name, old, new, what, is_state=False)
        pairs = [
            pair
            for pair in bits.pairs_of(at.state, after.state, "state")
            if not bits.is_same(pair[1], pair[2])
        ]
        # What took in a NaN comes first: it says more than a counter.
        for name, old, new in sorted(pairs, key=lambda pair: bits.is_sound(pair[2])):
            if not self._may_change(name):
                return self._traced_in(name, old, new, what, is_state=True)
            self._changed.setdefault(name)
        return self._next_step(at, after, good, what)

    def _may_change(self, name: str) -> bool:
        named = {*self._changes, *_OPTAX_COUNTS}
        return name in named or bool(named.intersection(bits.keys_of(name)))

    def _traced_in(
        self, name: str, old: Any, new: Any, what: str, *, is_state: bool
    ) -> Finding:
        was, now = bits.words_of(old), bits.words_of(new)
        bad = not bits.is_sound(new)
        if is_state and bad:
            return self._fails(
                name, bits.first_difference(was, now), "state poisoned",
                f"{what}, the state takes the NaN or inf in, though the step is "
                "skipped",
                "choose the old state too, leaf by leaf with jnp.where (NaN * 0 is "
                "NaN)",
            )  # fmt: skip
        if is_state:
            return self._fails(
                name, bits.first_difference(was, now), "state changed",
                f"{what}, the state changes, though the step is skipped",
                "choose the old state too; where it counts or scales on purpose, name "
                "it in `changes`",
            )  # fmt: skip
        whole = "NaN or inf gets into the params" if bad else "the params move"
        return self._fails(
            name, bits.first_difference(was, now), "not skipped", f"{what}, {whole}",
            "look whether all leaves are checked for NaN and inf, before anything else "
            "is done with them, and whether jnp.where chooses, not a product",
        )  # fmt: skip

    def _next_step(
        self, at: _At, after: _At, good: Values, what: str
    ) -> Finding | None:
        """Compares the step after an overflow with the one without it."""
        wanted = self._take(at, good)
        differing: tuple[str, Any, Any] | None = None
        for times in self._rescalings(at.state, after.state):
            scaled = [
                np.asarray(g) * np.asarray(times, np.asarray(g).dtype)
                if i in self._start.grads.floats
                else g
                for i, g in enumerate(good)
            ]
            found = self._take(after, scaled)
            pairs = bits.pairs_of(wanted.params, found.params, "params")
            pairs += [
                pair
                for pair in bits.pairs_of(wanted.state, found.state, "state")
                if not self._may_change(pair[0])
            ]
            wrong = [pair for pair in pairs if not bits.is_same(pair[1], pair[2])]
            if not wrong:
                return None
            differing = differing or wrong[0]
        assert differing is not None
        name, old, new = differing
        return self._fails(
            name, bits.first_difference(np.asarray(old), np.asarray(new)),
            "next step differs",
            f"{what}, the good step that follows is another than without it",
            "look what a skipped step leaves behind: a counter, a schedule, an "
            "accumulator; where it is a loss scale, name it in `changes`",
        )  # fmt: skip

    def _rescalings(self, before: PyTree, after: PyTree) -> list[float]:
        """Returns by what the next gradients may be scaled: changes of a loss scale."""
        ratios = [1.0]
        for name, old, new in bits.pairs_of(before, after, "state"):
            if (
                self._may_change(name)
                and np.shape(old) == ()
                and not bits.is_same(old, new)
            ):
                was, now = float(np.asarray(old)), float(np.asarray(new))
                if was and now and np.isfinite(now):
                    ratios.append(now / was)
        return list(dict.fromkeys(ratios))

    def _fails(
        self, name: str, entry: Entry | None, cause: str, says: str, remedy: str
    ) -> Finding:
        return Finding(
            name, (), "", Verdict.FAIL, Gap.FORMULA, judged_by="reference",
            size=np.inf, entry=entry, cause=Cause(cause, says, remedy), check="skipped",
        )  # fmt: skip
