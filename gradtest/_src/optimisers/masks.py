"""The public assertion that frozen params stay as they are, and the others do not."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution, seeding
from gradtest._src.case import norm
from gradtest._src.diagnosis.clues import coefficient
from gradtest._src.findings import Cause, Entry, Finding, Gap, Report, Verdict, worst
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, settled
from gradtest._src.lifting import is_inexact
from gradtest._src.optimisers import trees
from gradtest._src.optimisers.arguments import require_steps
from gradtest._src.optimisers.frozen import Frozen, read_frozen
from gradtest._src.optimisers.training import ExtraArgs, Optimiser
from gradtest._src.optimisers.trees import Start, Values, read_start
from gradtest._src.options import Options

PyTree = Any
# So many steps are waited for a trainable leaf to move: a warm-up, an accumulation.
_MOST_STEPS = 64


@processes.agreed
def assert_masked(
    tx: Any,
    params: PyTree,
    grads: PyTree,
    frozen: Frozen,
    *,
    steps: int = 3,
    extra_args: ExtraArgs = None,
    nonfinite: bool = True,
    check_state: bool = True,
    key: Any = None,
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that `tx` leaves frozen params, and their state, exactly as they are.

    In each of several steps, with gradients drawn around `grads`, the updates of the
    frozen leaves must be zero bit for bit, and the leaves of the state that belong to
    them (found by their path: `state.mu['encoder']['kernel']`) must stay what `init`
    made them, or not be there at all. All other leaves must move within 64 steps.

    Args:
      tx: An `optax.GradientTransformation`, with extra arguments or without.
      params: Tree of arrays, `jax.ShapeDtypeStruct` or `gradtest.domains` entries.
      grads: Tree like `params`.
      frozen: Which leaves are frozen: a tree of bools like `params` or a prefix of it,
        True where frozen (as for `optax.freeze`, and not as for `optax.masked`); a
        function of the params that returns one; or names of leaves and sub-trees, such
        as `["params['encoder']"]` or `["encoder"]`.
      steps: How many steps to take.
      extra_args: Keyword arguments of `tx.update`: a dict, or a function of the params
        that returns one.
      nonfinite: Whether the updates must be zero as well where the gradients of frozen
        leaves are NaN: they are not where an update is multiplied by a mask.
      check_state: Whether the state of frozen leaves must stay as it is.
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
      GradientMismatch: A frozen leaf or its state moves, or a leaf that is not frozen
        never does.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from gradtest.optax import assert_masked
      >>> params = {"body": jnp.ones(3), "head": jnp.ones(2)}
      >>> frozen = {"body": True, "head": False}
      >>> tx = optax.selective_transform(optax.adamw(1e-3), freeze_mask=frozen)
      >>> assert_masked(tx, params, params, frozen).verdict.value
      'PASS'
    """
    name, chosen = "assert_masked", Keywords.of(locals())
    trees.require_transformation(tx)
    require_steps(steps)
    optimiser = Optimiser(tx, extra_args)

    def make_check(options: Options) -> MaskCheck:
        start = read_start(params, grads, options.key)
        return MaskCheck(
            optimiser, start, frozen, steps, nonfinite, check_state, options
        )

    return settled(name, trees.named(trees.describe(tx)), chosen, make_check)


class MaskCheck:
    """Runs a transformation and looks which leaves move."""

    def __init__(
        self,
        optimiser: Optimiser,
        start: Start,
        frozen: Frozen,
        steps: int,
        nonfinite: bool,
        check_state: bool,
        options: Options,
    ):
        self._optimiser, self._start, self._steps = optimiser, start, steps
        self._nonfinite, self._check_state = nonfinite, check_state
        self._options = options
        self._params = [jnp.asarray(value) for value in start.params.values]
        self._frozen = read_frozen(frozen, start, self._params)
        self._step = jax.jit(optimiser.update)

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        with execution.working_precision(), np.errstate(all="ignore"):
            findings = self._findings()
        key = seeding.describe(self._options.key)
        verdict = worst(finding.verdict for finding in findings)
        notes = [f"frozen: {len(self._frozen)} of {len(self._start.checked)} leaves"]
        if self._nonfinite:
            notes.append(
                "the updates of frozen leaves were looked at with NaN there too"
            )
        return Report(
            assertion,
            trees.describe(self._optimiser.tx),
            verdict,
            tuple(findings),
            key=key,
            precision=("precision: that of the params, every bit counts",),
            unchecked=() if self._check_state else ("the state of frozen leaves",),
            notes=tuple(notes),
            replay=""
            if verdict is Verdict.PASS
            else f"gradtest.optax.{assertion}(tx, params, ..., key={key})",
        )

    def _findings(self) -> list[Finding]:
        seen = self._run()
        moving = {i for i in self._start.checked if self._moved(seen, i) is not None}
        wrong = [i for i in self._frozen if i in moving]
        still = [
            i for i in self._start.checked if i not in self._frozen and i not in moving
        ]
        found = [self._frozen_moves(seen, i, wrong, still) for i in wrong]
        found += [self._never_moves(i, wrong) for i in still]
        if self._check_state and not found:
            found += self._states(seen)
        if self._nonfinite and not found:
            found += self._with_nan()
        bad = {finding.name for finding in found}
        return found + [
            self._finding(i, Verdict.PASS)
            for i in self._start.checked
            if self._start.params.leaves[i].name not in bad
        ]

    def _run(self) -> _Seen:
        """Steps until every leaf that is not frozen has moved."""
        params = self._start.params.build(self._params)
        state = self._optimiser.init(params)
        drawn = trees.draw_runs(
            self._start.grads, _MOST_STEPS, (1.0,), self._options.key
        )
        waiting = {i for i in self._start.checked if i not in self._frozen}
        seen = _Seen(state, state, [], [])
        for k, grads in enumerate(drawn[0].grads):
            if k >= self._steps and not waiting:
                break
            built = self._start.grads.build([jnp.asarray(g) for g in grads])
            updates, state = self._step(built, state, params)
            leaves = self._start.params.arrays(updates, "tx.update")
            seen.updates.append([np.asarray(leaf) for leaf in leaves])
            seen.grads.append(grads)
            waiting -= {i for i in waiting if seen.updates[-1][i].any()}
        return dataclasses.replace(seen, last=state)

    def _moved(self, seen: _Seen, i: int) -> int | None:
        """Returns the first step at which a leaf moves."""
        for k, updates in enumerate(seen.updates):
            if updates[i].any():  # NaN is not zero either
                return k
        return None

    def _frozen_moves(
        self, seen: _Seen, i: int, wrong: list[int], still: list[int]
    ) -> Finding:
        k = self._moved(seen, i)
        assert k is not None
        update = np.asarray(seen.updates[k][i]).astype(np.complex128)
        place = np.unravel_index(int(np.argmax(np.abs(update))), update.shape)
        index = tuple(int(n) for n in place)
        return self._finding(
            i, Verdict.FAIL, size=np.inf, check=f"step {k + 1}",
            entry=Entry(index, seen.updates[k][i][index].item(), 0.0,
                        f"step {k + 1} of {self._name(i)}"),
            cause=self._why_it_moves(seen, i, k, wrong, still),
        )  # fmt: skip

    def _why_it_moves(
        self, seen: _Seen, i: int, k: int, wrong: list[int], still: list[int]
    ) -> Cause:
        frozen, others = len(self._frozen), len(self._start.checked) - len(self._frozen)
        if still and len(wrong) == frozen and len(still) == others:
            return Cause(
                "mask inverted",
                "every frozen leaf moves, and no other one does",
                "invert the mask: optax.masked transforms where it is True",
            )
        if still:
            return Cause(
                "labels mixed up",
                f"it moves, and {self._name(still[0])}, which is not frozen, does not",
                "look at the labels or the mask of these leaves, and at its prefix",
                0.95,
            )
        update, grad = seen.updates[k][i], np.asarray(seen.grads[k][i])
        if np.array_equal(update, grad.astype(update.dtype)):
            return Cause(
                "gradient passed through",
                "its update is the gradient itself: optax.masked leaves what it does "
                "not transform as it came",
                "add optax.masked(optax.set_to_zero(), frozen), or take "
                "optax.partition with set_to_zero",
            )
        return self._by_gradient(seen, i, k, wrong)

    def _by_gradient(self, seen: _Seen, i: int, k: int, wrong: list[int]) -> Cause:
        """Tells what moves by its gradient from what moves without one."""
        params = self._start.params.build(self._params)
        state = self._optimiser.init(params)
        alone = np.zeros(())
        for drawn in seen.grads[: k + 1]:
            values = [
                jnp.zeros_like(value) if place in self._frozen else jnp.asarray(value)
                for place, value in enumerate(drawn)
            ]
            grads = self._start.grads.build(values)
            updates, state = self._step(grads, state, params)
            alone = np.asarray(self._start.params.arrays(updates, "tx.update")[i])
        # What it does with its gradient too is no decay alone.
        moves = np.array_equal(alone, seen.updates[k][i])
        ratio = _ratio(alone, np.asarray(self._params[i])) if moves else None
        if ratio is not None:
            return Cause(
                "weight decay",
                f"with gradients of zero its update is {ratio:.4g} times the leaf "
                "itself: it decays without a gradient",
                "mask the weight decay too, or set updates to zero after it",
            )
        if moves:
            return Cause(
                "moves without a gradient",
                "it moves with gradients of zero as well: by a decay, noise or a norm "
                "that comes after they were set to zero",
                "set the updates to zero last, or give these leaves set_to_zero alone "
                "(optax.partition)",
                0.95,
            )
        share = "every frozen leaf" if len(wrong) == len(self._frozen) else "it"
        return Cause(
            "not frozen",
            f"{share} is updated from its gradient as if it were trainable",
            "look whether the mask reaches this leaf: its prefix, its labels, and "
            "whether the masked part is in the chain at all",
            0.9,
        )

    def _never_moves(self, i: int, wrong: list[int]) -> Finding:
        cause = Cause(
            "frozen too",
            f"its update is zero in all of {_MOST_STEPS} steps, and it is not declared "
            "frozen",
            "look whether the mask is inverted or too wide: optax.masked transforms "
            "where it is True, optax.freeze freezes there",
            0.9 if not wrong else 0.6,
        )
        return self._finding(
            i, Verdict.FAIL, size=np.inf, cause=cause, check="trainable"
        )

    def _states(self, seen: _Seen) -> list[Finding]:
        """Finds leaves of the state that belong to frozen params and move."""
        before, after = (trees.paths(s, "state") for s in (seen.first, seen.last))
        found = []
        for name, leaf in before.items():
            owner = self._owner(name, leaf)
            if owner is None or owner not in self._frozen or name not in after:
                continue
            if np.array_equal(np.asarray(leaf), np.asarray(after[name])):
                continue
            says = f"it belongs to {self._name(owner)}, which is frozen, and changes"
            found.append(
                Finding(
                    name, np.shape(leaf), jnp.dtype(leaf.dtype).name, Verdict.FAIL,
                    Gap.STRUCTURE, judged_by="reference", check="state",
                    cause=Cause(
                        "state moves", says,
                        "set the gradients to zero before they reach the moments, or "
                        "leave these leaves out with optax.partition; where it does "
                        "not matter, hand over `check_state=False`",
                    ),
                )
            )  # fmt: skip
        return found

    def _owner(self, name: str, leaf: Any) -> int | None:
        """Returns the param whose path a leaf of the state ends with, the longest."""
        best: tuple[int, int] | None = None
        if not is_inexact(getattr(leaf, "dtype", None)):
            return None
        for i, param in enumerate(self._start.params.leaves):
            path = param.name.removeprefix("params")
            if path and name.endswith(path) and np.shape(leaf) == param.shape:
                best = max(best or (0, 0), (len(path), i))
        return best[1] if best else None

    def _with_nan(self) -> list[Finding]:
        """Finds frozen leaves whose update is not zero where their gradient is NaN."""
        params = self._start.params.build(self._params)
        state = self._optimiser.init(params)
        values = [
            jnp.full_like(value, jnp.nan) if i in self._frozen else jnp.asarray(value)
            for i, value in enumerate(self._start.grads.values)
        ]
        with jax.debug_nans(False):
            updates, _ = self._step(self._start.grads.build(values), state, params)
        leaves = self._start.params.arrays(updates, "tx.update")
        cause = Cause(
            "multiplied by the mask",
            "its update is not zero where its gradient is NaN: 0 * NaN is NaN",
            "choose with jnp.where or optax.set_to_zero, don't multiply; where its "
            "gradient is always finite, hand over `nonfinite=False`",
        )
        return [
            self._finding(i, Verdict.FAIL, size=np.inf, cause=cause, check="NaN")
            for i in self._frozen
            if np.asarray(leaves[i]).any()
        ]

    def _name(self, i: int) -> str:
        return self._start.params.leaves[i].name

    def _finding(self, i: int, verdict: Verdict, **fields: Any) -> Finding:
        leaf = self._start.params.leaves[i]
        fields = {"check": "update"} | fields
        return Finding(
            leaf.name, leaf.shape, jnp.dtype(leaf.dtype).name, verdict, Gap.FORMULA,
            judged_by="reference", **fields,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What several steps made: first and last state, updates, and their gradients."""

    first: PyTree
    last: PyTree
    updates: list[Values]
    grads: list[Values]


def _ratio(update: np.ndarray, param: np.ndarray) -> float | None:
    """Returns the factor between an update and its param, where there is one."""
    wide = update.astype(np.complex128), param.astype(np.complex128)
    ratio = coefficient(*wide)
    eps = float(jnp.finfo(update.dtype).eps)
    if not ratio or norm(wide[0] - ratio * wide[1]) > 4 * eps * norm(wide[0]):
        return None
    return ratio
