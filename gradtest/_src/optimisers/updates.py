"""The public assertion that a transformation is what a plain reference says."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import seeding
from gradtest._src.case import norm
from gradtest._src.findings import Cause, Entry, Finding, Gap, Report, Verdict, worst
from gradtest._src.gaps import LeafGap, leaf_gap
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, require_callable, settled
from gradtest._src.optimisers import arguments, trees
from gradtest._src.optimisers.causes import causes_of
from gradtest._src.optimisers.roundings import judge_rounding
from gradtest._src.optimisers.states import Contract
from gradtest._src.optimisers.training import (
    Both,
    ExtraArgs,
    Optimiser,
    Trajectory,
    increments,
)
from gradtest._src.optimisers.trees import Run, read_start
from gradtest._src.optimisers.wrong import Wrong
from gradtest._src.options import DEFAULT_RTOL, Options

PyTree = Any
# What is lost where a step is told from the params before and after it.
_LOST = 64 * float(np.finfo(np.float64).eps)
_FLOAT32 = 4 * float(np.finfo(np.float32).eps)
# Of how many wrong leaves the cause is looked for.
_MOST_EXPLAINED = 8
# A leaf of fewer entries fits any factor; and what is sure beside it.
_TELLING, _SURE = 3, 0.93
# A gap that constants of half precision may explain is no larger.
_MOST_ROUNDED = 1 / 16
_ROUNDED_NOTE = "no farther off than its constants are rounded in their narrow dtype"
SCALES = (1.0, 30.0, 1e-8)


@processes.agreed
def assert_update_matches(
    tx: Any,
    reference: Callable[..., PyTree],
    params: PyTree,
    grads: PyTree,
    *,
    steps: int = 3,
    extra_args: ExtraArgs = None,
    scales: Sequence[float] = SCALES,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that `tx` moves the params as a plain reference of its mathematics does.

    Both take several steps with other gradients at each, drawn around `grads`: at
    their own size, larger (so that clipping shows) and, entry by entry, smaller (so
    that an epsilon shows). Each step's change of each leaf is compared in float64,
    whatever dtypes there are; the first step that differs tells whether the formula or
    the state is wrong. In its own dtypes `tx` must round as the reference does, keep a
    state of one structure, shape and dtype, do the same under `jax.jit` as without, and
    change none of its arguments.

    Args:
      tx: An `optax.GradientTransformation`, with extra arguments or without.
      reference: `reference(params, [grads, ...])` returns the params after those steps,
        in jnp or in NumPy: where JAX can't trace it, it is called with NumPy arrays in
        float64. It is called with the first 1, 2, ..., `steps` gradients.
      params: Tree of arrays, numbers, None, `jax.ShapeDtypeStruct` or
        `gradtest.domains` entries; the last two are drawn. Integers are held.
      grads: Tree like `params`.
      steps: How many steps to take.
      extra_args: Keyword arguments of `tx.update`: a dict, or a function of the params
        that returns one.
      scales: Sizes of the gradients relative to `grads`; `(1.0,)` takes their own only.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative gap of a leaf's change in a step, in float64.
      rounding_rtol: Allowed relative rounding gap, in place of what is measured.
      exclude: Names of leaves (`params['bias']`) or sub-trees that are not compared.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report; marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: An update differs, or the transformation breaks its contract.
      GradientInconclusive: The reference is not finite, and `inconclusive="raise"`.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from gradtest.optax import assert_update_matches
      >>> def descent(params, grads):
      ...     return jax.tree.map(lambda p, *gs: p - 0.1 * sum(gs), params, *grads)
      >>> params = {"w": jnp.arange(3.0)}
      >>> assert_update_matches(optax.sgd(0.1), descent, params, params).verdict.value
      'PASS'
    """
    name, chosen = "assert_update_matches", Keywords.of(locals())
    trees.require_transformation(tx)
    require_callable("reference", reference)
    arguments.require_reference(reference)
    arguments.require_steps(steps)
    arguments.require_scales(scales)
    optimiser = Optimiser(tx, extra_args)

    def make_check(options: Options) -> UpdateCheck:
        return UpdateCheck(
            optimiser, reference, (params, grads), steps, tuple(scales), options
        )

    return settled(name, trees.named(trees.describe(tx)), chosen, make_check)


class UpdateCheck:
    """A transformation, its reference and where they start; makes the report."""

    def __init__(
        self,
        optimiser: Optimiser,
        reference: Callable[..., PyTree],
        start: tuple[PyTree, PyTree],
        steps: int,
        scales: tuple[float, ...],
        options: Options,
    ):
        self.options, self.steps = options, steps
        self.start = read_start(*start, options.key, options.exclude)
        self.runs = trees.draw_runs(self.start.grads, steps, scales, options.key)
        self.contract = Contract(optimiser, self.start, self.runs[0].grads)
        self._broken = self.contract.findings()
        self._notes: list[str] = []
        self._unchecked: list[str] = []
        self._subject = trees.describe(optimiser.tx)
        self._make = lambda: Both(optimiser, reference, self.start, steps)

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        with np.errstate(all="ignore"):
            findings = self._broken or self._compared()
        key = seeding.describe(self.options.key)
        bad = any(finding.verdict is not Verdict.PASS for finding in findings)
        scales = ", ".join(f"{run.scale:g}" for run in self.runs)
        return Report(
            assertion,
            self._subject,
            worst(finding.verdict for finding in findings),
            tuple(findings),
            key=key,
            precision=(
                "precision: both in float64 (lifted), the transformation in its own "
                "dtypes as well",
                f"steps: {self.steps}, with gradients of {scales} times `grads`",
            ),
            unchecked=(*self._left_out(), *self._unchecked),
            notes=tuple(self._notes),
            replay=f"gradtest.optax.{assertion}(tx, reference, ..., key={key})"
            if bad
            else "",
        )

    def _left_out(self) -> list[str]:
        held = [
            f"{leaf.name} ({leaf.dtype}: held)"
            for i, leaf in enumerate(self.start.params.leaves)
            if i not in self.start.params.floats
        ]
        return [f"{name} (excluded)" for name in self.start.unchecked] + held

    def _compared(self) -> list[Finding]:
        both = self._make()
        if both.plain:
            self._notes.append(
                "`reference` can't be traced by JAX: it ran on NumPy arrays in float64"
            )
        judged = [_Judged(both, run, self.options.rtol) for run in self.runs]
        found: dict[int, Finding] = {}
        for which, each in enumerate(judged):
            for i, finding in each.findings().items():
                if finding.verdict is Verdict.INCONCLUSIVE and which:
                    name = self.start.params.leaves[i].name
                    self._unchecked.append(
                        f"{name} {each.run.says} (the reference is not finite there)"
                    )
                    continue
                kept = found.get(i)
                if kept is None or _rank(finding) > _rank(kept):
                    found[i] = finding
        self._explain(found, judged)
        if both.draws:
            self._unchecked.append(
                "rounding: random numbers are other ones in each dtype"
            )
        elif worst(finding.verdict for finding in found.values()) is Verdict.PASS:
            found = judge_rounding(
                found, both, self.contract.worked, self.runs[0].grads,
                self.options.rounding_rtol, self.contract.stored,
            )  # fmt: skip
        return list(found.values())

    def _explain(self, found: dict[int, Finding], judged: list[_Judged]) -> None:
        """Gives wrong leaves their causes, those first that are farthest off."""
        wrong = [i for i, f in found.items() if f.cause is _UNNAMED]
        wrong.sort(key=lambda i: (judged[0].wrong_step(i) is None, -found[i].strain))
        known: dict[Any, Any] = {}
        told: list[_Explained] = []
        for i in wrong[:_MOST_EXPLAINED]:
            first = next(each for each in judged if each.wrong_step(i) is not None)
            step = first.wrong_step(i)
            assert step is not None
            place = self.start.checked.index(i)
            causes = causes_of(
                Wrong(
                    first.both, judged[0].run, first.run, first.claimed, first.true,
                    place, step, known,
                )
            )  # fmt: skip
            finding = first.findings()[i]
            found[i] = dataclasses.replace(
                finding, cause=causes[0], other_causes=tuple(causes[1:])
            )
            told.append(_Explained(i, first.run.scale, causes))
        self._explain_small(found, told)

    def _explain_small(self, found: dict[int, Finding], told: list[_Explained]) -> None:
        """Gives leaves of few entries, which tell little, a larger leaf's cause."""
        sizes = [int(np.prod(leaf.shape)) for leaf in self.start.params.leaves]
        sure = [
            each
            for each in told
            if sizes[each.leaf] >= _TELLING and each.causes[0].likelihood >= _SURE
        ]
        for each in told:
            if sizes[each.leaf] >= _TELLING or each.causes[0].likelihood >= _SURE:
                continue
            like = next((other for other in sure if other.scale == each.scale), None)
            if like is not None:
                found[each.leaf] = dataclasses.replace(
                    found[each.leaf], cause=like.causes[0], other_causes=()
                )


@dataclasses.dataclass(frozen=True)
class _Explained:
    """A wrong leaf, the size of the gradients that show it, and its causes."""

    leaf: int
    scale: float
    causes: tuple[Cause, ...]


def _rank(finding: Finding) -> tuple[int, float]:
    # The first run that fails is told of: its gradients are the usual ones.
    if finding.verdict is Verdict.PASS:
        return finding.verdict.severity, finding.strain
    return finding.verdict.severity, 0.0


_UNNAMED = Cause("different", "it is not the reference's", "compare the two formulas")


class _Judged:
    """One run of both, compared step by step and leaf by leaf."""

    def __init__(self, both: Both, run: Run, rtol: float):
        self.both, self.run, self._rtol = both, run, rtol
        begin = both.start.params.values
        checked = [begin[i] for i in both.start.checked]
        self._claimed_at = both.claimed(begin, run.grads)
        self._true_at = both.true(begin, run.grads)
        self.claimed: Trajectory = increments(checked, self._claimed_at)
        self.true: Trajectory = increments(checked, self._true_at)
        self._found: dict[int, Finding] | None = None
        self._steps: dict[int, int] = {}
        self._reach: list[Trajectory] | None = None
        self.rounded: set[str] = set()

    def wrong_step(self, i: int) -> int | None:
        """Returns the first step, from 0, at which a leaf is wrong."""
        self.findings()
        return self._steps.get(i)

    def findings(self) -> dict[int, Finding]:
        """Returns the verdict on each checked leaf, of its first wrong step."""
        if self._found is None:
            self._found = {
                i: self._leaf(i, place)
                for place, i in enumerate(self.both.start.checked)
            }
        return self._found

    def _leaf(self, i: int, place: int) -> Finding:
        largest: LeafGap | None = None
        for k in range(len(self.true)):
            claimed, true = self.claimed[k][place], self.true[k][place]
            if not np.isfinite(true).all():
                return self._not_finite(i, place, k, Verdict.INCONCLUSIVE)
            if not np.isfinite(claimed).all():
                self._steps[i] = k
                return self._not_finite(i, place, k, Verdict.FAIL)
            gap = self._gap(k, place)
            if gap.is_exceeded and self._rounds_constants(k, place, gap.size):
                self.rounded.add(self._name(i))
                continue
            if gap.is_exceeded:
                self._steps[i] = k
                return self._finding(
                    i, Verdict.FAIL, size=np.inf if gap.is_silent else gap.size,
                    allowed=self._rtol if gap.is_silent else gap.allowed, trial=k,
                    entry=_of_step(gap.entry, k, self._name(i)), cause=_UNNAMED,
                    check=f"step {k + 1}",
                )  # fmt: skip
            if largest is None or gap.size > largest.size:
                largest = gap
        size, allowed = (
            (largest.size, largest.allowed) if largest else (0.0, self._rtol)
        )
        notes = (_ROUNDED_NOTE,) if self._name(i) in self.rounded else ()
        return self._finding(
            i, Verdict.PASS, size=size, allowed=allowed, check="update", notes=notes
        )

    def _rounds_constants(self, k: int, place: int, size: float) -> bool:
        """Whether constants that are rounded to a narrow dtype explain a gap."""
        if not size < _MOST_ROUNDED:
            return False
        if self._reach is None:
            begin = self.both.start.params.values
            self._reach = self.both.reach(begin, self.run.grads)
        change = [
            norm(moved[k][place] - (moved[k - 1][place] if k else 0))
            for moved in self._reach
        ]
        return size * norm(self.true[k][place]) <= 3 * norm(np.array(change))

    def _gap(self, k: int, place: int) -> LeafGap:
        claimed, true = self.claimed[k][place], self.true[k][place]
        at = self._true_at[k][place]
        narrow = self.both.is_narrow(place)
        lost = (_FLOAT32 if narrow else _LOST) * (norm(at) + norm(at - true))
        return leaf_gap(claimed, true, rtol=self._rtol, floor=lost)

    def _not_finite(self, i: int, place: int, k: int, verdict: Verdict) -> Finding:
        claimed, true = self.claimed[k][place], self.true[k][place]
        bad = ~np.isfinite(true if verdict is Verdict.INCONCLUSIVE else claimed)
        index = tuple(int(n) for n in np.argwhere(bad)[0])
        whose = "reference" if verdict is Verdict.INCONCLUSIVE else "update"
        at = f" {self.run.says}" if self.run.says else ""
        cause = Cause(
            f"{whose} not finite",
            f"the {whose} has {int(bad.sum())} of {bad.size} entries that are NaN or "
            f"infinite at step {k + 1}{at}",
            "look for 0/0, the root of a negative number, or an overflow",
        )
        entry = Entry(index, claimed[index].item(), true[index].item())
        return self._finding(
            i, verdict, size=np.inf, allowed=self._rtol, cause=cause, trial=k,
            entry=_of_step(entry, k, self._name(i)), check=f"step {k + 1}",
        )  # fmt: skip

    def _name(self, i: int) -> str:
        return self.both.start.params.leaves[i].name

    def _finding(self, i: int, verdict: Verdict, **fields: Any) -> Finding:
        leaf = self.both.start.params.leaves[i]
        dtype = jnp.dtype(leaf.dtype).name
        return Finding(
            leaf.name, leaf.shape, dtype, verdict, Gap.FORMULA,
            judged_by="reference", **fields,
        )  # fmt: skip


def _of_step(entry: Entry | None, k: int, name: str) -> Entry | None:
    if entry is None:
        return None
    return dataclasses.replace(entry, of=f"step {k + 1} of {name}")
