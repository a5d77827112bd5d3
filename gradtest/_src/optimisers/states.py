"""Whether a transformation keeps to Optax's contract: pure, and a state of one kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src import execution
from gradtest._src.findings import Cause, Finding, Gap, Verdict
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.optimisers.training import Optimiser
from gradtest._src.optimisers.trees import PyTree, Start, Values, paths

# Two ways to run one program may round apart; hidden state shows far above this.
_LOOSE = 1 / 8
_HIDDEN = "something is kept between calls outside of the state"
_KEEP = "keep counters, keys, moments and buffers in the state that `update` returns"


class Contract:
    """Runs a transformation in its own dtypes, eagerly and compiled.

    Attributes:
      worked: The checked params after each step, by the compiled update.
      stored: The float dtypes of the state.
    """

    def __init__(self, optimiser: Optimiser, start: Start, grads: tuple[Values, ...]):
        self._optimiser, self._start = optimiser, start
        self._params = [jnp.asarray(value) for value in start.params.values]
        self._grads = [[jnp.asarray(value) for value in step] for step in grads]
        self.worked: list[Values] = []
        self.stored: list[Any] = []

    def findings(self) -> list[Finding]:
        """Returns what breaks the contract: nothing, or the first finding."""
        finds = (self._untouched, self._pure, self._kept_state, self._jitted)
        with execution.working_precision():
            # The very first calls, and before anything is traced: what Python keeps
            # between calls shows here, and would keep tracers later.
            self._first, self._second = self._attempt(), self._attempt()
            for find in finds:
                try:
                    found = list(find())
                except jax.errors.UnexpectedTracerError as error:
                    found = [_raises_under_jit(error)]
                if found:
                    return found
        return []

    def _attempt(self) -> list[Values] | None:
        """Runs eagerly; None where it raises, which is told of later."""
        try:
            return self._run(self._optimiser.step)
        except Exception:
            return None

    def _build(self, step: int) -> tuple[PyTree, PyTree]:
        params = self._start.params.build(self._params)
        return params, self._start.grads.build(self._grads[step])

    def _kept_state(self) -> Iterator[Finding]:
        """Finds a state, or updates, whose structure or types change."""
        params, grads = self._build(0)
        state = self._optimiser.init(params)
        before = jax.eval_shape(lambda tree: tree, state)
        kept = jax.tree_util.tree_leaves(before)
        self.stored = [leaf.dtype for leaf in kept if is_inexact(leaf.dtype)]
        try:
            updates, after = jax.eval_shape(
                self._optimiser.update, grads, before, params
            )
        except jax.errors.JAXTypeError as error:
            yield _raises_under_jit(error)
            return
        yield from _unlike(before, after)
        wanted: Any = jax.tree_util.tree_structure(params)
        if jax.tree_util.tree_structure(updates) != wanted:
            yield _broken(
                "updates", "other tree",
                f"`update` returns updates of {jax.tree_util.tree_structure(updates)}, "
                f"the params are {wanted}",
                "return one update for each of the params",
            )  # fmt: skip
            return
        wide = paths(params, "params")
        for (name, update), param in zip(
            paths(updates, "updates").items(), wide.values(), strict=True
        ):
            if not _broadcasts(update.shape, np.shape(param)):
                yield _broken(
                    name, "other shape",
                    f"`update` returns it as {_kind(update)}, the param is "
                    f"{param.dtype}{list(param.shape)}",
                    "return updates of the params' shapes",
                )  # fmt: skip
                return

    def _untouched(self) -> Iterator[Finding]:
        """Finds arguments that `update` changes in place."""
        params, grads = self._build(0)
        state = self._optimiser.init(params)
        given = {"params": params, "grads": grads, "state": state}
        before = {name: _copied(paths(tree, name)) for name, tree in given.items()}
        self._optimiser.update(grads, state, params)
        for name, tree in given.items():
            after = paths(tree, name)
            for leaf in before[name].keys() | after.keys():
                one, other = before[name].get(leaf), after.get(leaf)
                if one is None or other is None or not _same(one, other):
                    yield _broken(
                        leaf, "argument changed",
                        f"`update` changes `{name}` in place",
                        "return new trees; copy dicts and NumPy arrays before writing",
                    )  # fmt: skip
                    return

    def _pure(self) -> Iterator[Finding]:
        """Finds Python state: a second run with equal arguments that differs."""
        if self._first is None or self._second is None:
            return
        for k, (one, other) in enumerate(zip(self._first, self._second, strict=True)):
            for i, (a, b) in enumerate(zip(one, other, strict=True)):
                if not _same(a, b):
                    yield self._departs(
                        i, k, "not pure",
                        f"two runs with equal arguments differ: {_HIDDEN}", _KEEP,
                    )  # fmt: skip
                    return

    def _jitted(self) -> Iterator[Finding]:
        """Finds an update that does something else where it is compiled."""
        try:
            compiled = self._run(jax.jit(self._optimiser.step))
        except jax.errors.JAXTypeError as error:
            yield _raises_under_jit(error)
            return
        self.worked = [execution.to_host(step) for step in compiled]
        eager = self._second or self._run(self._optimiser.step)
        differing = self._differing(compiled, eager)
        if differing is None or self._agree_in_float64():
            return
        k, i = differing
        yield self._departs(
            i, k, "differs under jit",
            "the compiled update is another than the eager one",
            "look for Python state and branches that tracing freezes: a counter, a "
            "cached value, `if` on the step",
        )  # fmt: skip

    def _differing(
        self, one: list[Values], other: list[Values]
    ) -> tuple[int, int] | None:
        """Returns the first step and leaf at which two runs differ."""
        begin = [np.asarray(self._params[i]) for i in self._start.checked]
        for k, (here, there) in enumerate(zip(one, other, strict=True)):
            for i, (a, b) in enumerate(zip(here, there, strict=True)):
                if not _close(execution.to_host([a, b, begin[i]]), begin[i].dtype):
                    return k, i
        return None

    def _agree_in_float64(self) -> bool:
        """Whether rounding, which several steps may blow up, is all that differs."""
        wide = Contract(self._optimiser, self._start, ())
        try:
            with jax.enable_x64(True):
                wide._params = [jnp.asarray(widen(value)) for value in self._params]
                wide._grads = [
                    [jnp.asarray(widen(g)) for g in step] for step in self._grads
                ]
                step = self._optimiser.step
                compiled = wide._run(jax.jit(lambda *given: step(*given)))
                return wide._differing(compiled, wide._run(step)) is None
        except Exception:  # it is made for narrower dtypes
            return False

    def _run(self, step: Any) -> list[Values]:
        params, _ = self._build(0)
        state, found = self._optimiser.init(params), []
        for k in range(len(self._grads)):
            params, state = step(params, state, self._build(k)[1])
            leaves = self._start.params.arrays(params, "tx.update")
            found.append([leaves[i] for i in self._start.checked])
        return found

    def _departs(self, i: int, k: int, name: str, says: str, remedy: str) -> Finding:
        leaf = self._start.params.leaves[self._start.checked[i]]
        return _broken(leaf.name, name, f"at step {k + 1} {says}", remedy)


def _copied(leaves: dict[str, Any]) -> dict[str, Any]:
    return {
        name: np.array(leaf) if isinstance(leaf, np.ndarray) else leaf
        for name, leaf in leaves.items()
    }


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if _is_key(one):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _is_key(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _close(values: Values, dtype: Any) -> bool:
    """Whether two results are one but for rounding and for entries at a threshold."""
    one, other, begin = values
    if not np.array_equal(np.isfinite(one), np.isfinite(other)):
        return False
    gap = np.nan_to_num(np.abs(one - other))
    moved = np.nan_to_num(np.maximum(np.abs(one - begin), np.abs(other - begin)))
    size = np.sqrt(np.mean(moved**2))
    eps = float(jnp.finfo(dtype).eps)
    allowed = _LOOSE * np.maximum(moved, size) + 8 * eps * np.nan_to_num(np.abs(begin))
    return bool(np.sum(gap > allowed) <= max(gap.size // 10, gap.size > 2))


def _unlike(before: PyTree, after: PyTree) -> Iterator[Finding]:
    """Finds the leaves of a state that change their shape or dtype, or come and go."""
    one, other = paths(before, "state"), paths(after, "state")
    for name in [*one, *(name for name in other if name not in one)]:
        was, now = one.get(name), other.get(name)
        if was is None or now is None:
            says = "is there " + ("no longer" if now is None else "only") + " after"
        elif (was.shape, was.dtype) != (now.shape, now.dtype):
            says = f"is {_kind(was)} at first and {_kind(now)} after"
        else:
            continue
        yield _state_changes(name, f"{name} {says} a step")
    structures: list[Any] = [jax.tree_util.tree_structure(t) for t in (before, after)]
    if one.keys() == other.keys() and structures[0] != structures[1]:
        says = f"the state is {structures[0]} at first and {structures[1]} after a step"
        yield _state_changes("state", says)


def _kind(leaf: Any) -> str:
    return f"{leaf.dtype}{list(leaf.shape)}"


def _state_changes(name: str, says: str) -> Finding:
    return _broken(
        name, "state changes kind", f"{says}: lax.scan can't carry it",
        "let `init` and `update` return states of one structure, shape and dtype",
    )  # fmt: skip


def _broadcasts(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    try:
        return np.broadcast_shapes(shape, wanted) == wanted
    except ValueError:
        return False


def _raises_under_jit(error: Exception) -> Finding:
    if isinstance(error, jax.errors.UnexpectedTracerError):
        return _broken(
            "updates", "not pure",
            f"a traced value outlives the call of `update` that made it: {_HIDDEN}",
            _KEEP,
        )  # fmt: skip
    line = (str(error).strip().splitlines() or [""])[0]
    return _broken(
        "updates", "raises under jit",
        f"under jit `update` raises {type(error).__name__}: {line}",
        "write it for traced values: no Python branches on values, no NumPy",
    )  # fmt: skip


def _broken(name: str, cause: str, says: str, remedy: str) -> Finding:
    return Finding(
        name, (), "", Verdict.FAIL, Gap.STRUCTURE, judged_by="reference",
        cause=Cause(cause, says, remedy), check=cause,
    )  # fmt: skip
