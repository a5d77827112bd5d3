"""What a failed check keeps to be looked at: arrays of its leaves, and its inputs."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import jaxprs
from gradtest._src.case import Case, norm
from gradtest._src.devices import spanning
from gradtest._src.findings import Exhibit, Finding, Gap, Ladder, Verdict
from gradtest._src.gaps import leaf_gap
from gradtest._src.inputs import Inputs, Point, Role
from gradtest._src.ladders import pulled_ladder, pushed_ladder
from gradtest._src.lifting import widen
from gradtest._src.program import Values

# So many leaves are kept, of all of them together so many entries, ...
MOST_LEAVES, _MOST_ENTRIES = 8, 1 << 21
# ... fewer in a job, whose processes tell each other, ...
_MOST_TOLD = 1 << 16
# ... and along so many of them the slope is measured at many steps: it costs as much as
# the check of a large program.
_LADDERS = 1
# What running a program may raise that ran before: memory, a callback of the user's.
_CANNOT_RUN = (jax.errors.JaxRuntimeError, MemoryError, FloatingPointError)
# Python's own numbers are kept as they came: they take the dtype of what they meet.
_PLAIN = (bool, int, float, complex, str, type(None))

# How the note on a finding begins that was judged by the sides of a kink.
_KINK = "at a kink"


@dataclasses.dataclass(frozen=True, eq=False)
class KeyData:
    """A key, or an array of keys, of `jax.random`, as NumPy words.

    Attributes:
      impl: Name of the generator, such as "threefry2x32".
      words: What `jax.random.key_data` makes of it: uint32[..., words].
    """

    impl: str
    words: np.ndarray

    def key(self) -> jax.Array:
        """Returns the key again."""
        return jax.random.wrap_key_data(jax.numpy.asarray(self.words), impl=self.impl)


@dataclasses.dataclass(frozen=True)
class _Arrays:
    """What one finding is about, in float64 or complex128.

    Attributes:
      claimed: What is under test.
      true: What it should be; None where that is not known by entries.
      of: What the two are, where not the derivative by the leaf.
      ladder: Measures the slope along a direction of the leaf at many steps.
    """

    claimed: np.ndarray
    true: np.ndarray | None
    of: str = ""
    ladder: Callable[[], Ladder | None] | None = None


def exhibits_of(case: Case, findings: Sequence[Finding]) -> tuple[Exhibit, ...]:
    """Makes the exhibits of the gravest findings that are no pass.

    What can't be made is left out: nothing is raised. In a job of several processes
    nothing is evaluated, as the other ones would have to evaluate it too.

    Args:
      case: A case of the findings' order.
      findings: On its leaves and outputs. A finding of another trial is shown by what
        this case has of it, if that is off as well.

    Returns:
      One exhibit for each leaf, mode and kind of array, at most eight, the gravest
      first. Of a leaf that is too large the part around the entry farthest off is kept.
    """
    wrong = [f for f in findings if f.verdict in (Verdict.FAIL, Verdict.INCONCLUSIVE)]
    wrong.sort(key=lambda f: (f.verdict.severity, f.strain), reverse=True)
    shown: dict[tuple[str, str, str], tuple[Finding, _Arrays]] = {}
    gallery = _Gallery(case)
    with np.errstate(all="ignore"):
        for finding in wrong:
            if len(shown) == MOST_LEAVES:
                break
            arrays = gallery.arrays(finding)
            if arrays is not None:
                place = (finding.name, finding.mode, arrays.of)
                shown.setdefault(place, (finding, arrays))
        most = _MOST_TOLD if _in_job() else _MOST_ENTRIES
        room = most // max(len(shown), 1)
        return tuple(
            _exhibit(finding, arrays, room, has_ladder=i < _LADDERS)
            for i, (finding, arrays) in enumerate(shown.values())
        )


def _exhibit(
    finding: Finding, arrays: _Arrays, room: int, *, has_ladder: bool
) -> Exhibit:
    ladder = None
    if has_ladder and arrays.ladder is not None and not _in_job():
        with contextlib.suppress(*_CANNOT_RUN):
            ladder = arrays.ladder()
    exhibit = trimmed(finding.name, arrays.claimed, arrays.true, room)
    return dataclasses.replace(
        exhibit,
        mode=finding.mode,
        order=finding.order,
        rule=finding.rule,
        ladder=ladder,
        of=arrays.of,
    )


def trimmed(
    name: str, claimed: Any, true: Any | None, room: int = _MOST_ENTRIES
) -> Exhibit:
    """Returns an exhibit of two arrays: copies, or of large ones a part.

    Args:
      name: The leaf's path.
      claimed: What is under test.
      true: What it should be, of the same shape; None where that is not known.
      room: How many entries may be kept.
    """
    claimed = widen(claimed)
    true = None if true is None else widen(true)
    if claimed.size <= room:
        kept = None if true is None else np.array(true)
        return Exhibit(name, np.array(claimed), kept)
    box = _box(claimed.shape, _farthest_off(claimed, true), room)
    kept = None if true is None else np.array(true[box])
    start = tuple(side.start for side in box)
    return Exhibit(name, np.array(claimed[box]), kept, start=start, whole=claimed.shape)


def _farthest_off(claimed: np.ndarray, true: np.ndarray | None) -> tuple[int, ...]:
    off = np.abs(claimed if true is None else claimed - true)
    ranked = np.where(np.isfinite(off), off, np.inf)
    place = np.unravel_index(int(np.argmax(ranked)), claimed.shape)
    return tuple(int(i) for i in place)


def _box(
    shape: tuple[int, ...], middle: tuple[int, ...], room: int
) -> tuple[slice, ...]:
    """Returns ranges around an entry that hold no more entries than there is room."""
    lengths = list(shape)
    while math.prod(lengths) > room:
        longest = int(np.argmax(lengths))
        others = math.prod(lengths) // lengths[longest]
        lengths[longest] = max(
            min(room // max(others, 1), lengths[longest] - 1), lengths[longest] // 2
        )
    starts = [
        min(max(at - length // 2, 0), size - length)
        for at, length, size in zip(middle, lengths, shape, strict=True)
    ]
    return tuple(
        slice(start, start + length)
        for start, length in zip(starts, lengths, strict=True)
    )


class _Gallery:
    """Finds the arrays that a case's findings are about."""

    def __init__(self, case: Case):
        self.case = case

    def arrays(self, finding: Finding) -> _Arrays | None:
        """Returns the arrays of one finding; None where there is nothing to show."""
        if finding.judged_by == "linearity" or finding.order != self.case.program.order:
            return None
        found = None
        with contextlib.suppress(*_CANNOT_RUN):
            found = self._found(finding)
        if found is None or not found.claimed.size:
            return None
        if finding.trial != self.case.trial and not _is_off(found, self.case.rtol):
            return None
        return found

    def _found(self, finding: Finding) -> _Arrays | None:
        case, readings = self.case, self.case.readings
        if finding.gap is Gap.VALUE:
            i = _place(case.program.outputs, finding)
            if i is None or readings.claimed_values is None:
                return None
            return _Arrays(readings.claimed_values[i], readings.values[i], "value")
        if finding.gap is Gap.ROUNDING:
            return self._rounded(finding)
        if finding.gap is not Gap.FORMULA:
            return None
        if finding.mode == "rev" and case.claim.mode == "rev":
            return self._pulled(finding)
        if finding.mode == "fwd" and not _in_job():
            beside = case.claim.mode == "rev"
            return self._beside(finding) if beside else self._pushed(finding)
        return None

    def _pulled(self, finding: Finding) -> _Arrays | None:
        """A leaf's gradient, in reverse mode."""
        case = self.case
        i = _place(case.leaves, finding)
        if i is None:
            return None
        claimed, exact = case.readings.claimed[i], self._trusted(finding)
        true = None if exact is None else exact[i]
        is_open = finding.verdict is Verdict.INCONCLUSIVE
        return _Arrays(
            claimed,
            true,
            ladder=lambda: pulled_ladder(case, i, claimed, true, is_open=is_open),
        )

    def _pushed(self, finding: Finding) -> _Arrays | None:
        """What a forward-mode claim makes of one leaf's tangent: its worst output."""
        case = self.case
        leaf = _place(case.leaves, finding)
        if leaf is None:
            return None
        seed = [np.zeros_like(value) for value in case.seed]
        seed[leaf] = case.seed[leaf]
        readings = case.bench.read(case.point, seed=seed)
        exact = readings.exact if self._trusted(finding) is not None else None
        i = self._worst_output(readings.claimed, exact)
        claimed, true = readings.claimed[i], None if exact is None else exact[i]
        is_open = finding.verdict is Verdict.INCONCLUSIVE
        return _Arrays(
            claimed,
            true,
            f"tangent of {case.program.outputs[i].name}",
            lambda: pushed_ladder(case, leaf, i, claimed, true, is_open=is_open),
        )

    def _beside(self, finding: Finding) -> _Arrays | None:
        """Tangents of the forward mode beside a reverse-mode claim."""
        case = self.case
        leaf = _place(case.leaves, finding)
        tangents = list(case.tangents)
        if leaf is not None:
            tangents = [np.zeros_like(tangent) for tangent in tangents]
            tangents[leaf] = case.tangents[leaf]
        slopes = case.bench.read(case.point, tangents=tangents).slopes
        if slopes is None:
            return None
        i = _place(case.program.outputs, finding) if leaf is None else None
        if i is None:
            i = self._worst_output(slopes, None)
        of = f"tangent of {case.program.outputs[i].name}"
        return _Arrays(slopes[i], None, of)

    def _rounded(self, finding: Finding) -> _Arrays | None:
        """The claim in its own dtype beside itself in float64."""
        case = self.case
        is_reverse = case.claim.mode == "rev"
        i = _place(case.leaves if is_reverse else case.program.outputs, finding)
        if i is None or _in_job() or case.bench.claim.variant:
            return None
        lifted = case.readings.claimed[i]
        dtype = "working precision" if finding.dtype == "float64" else finding.dtype
        of = f"in {dtype}" if is_reverse else f"tangent in {dtype}"
        return _Arrays(widen(self._worked[i]), lifted, of)

    @functools.cached_property
    def _worked(self) -> Values:
        case = self.case
        return case.bench.read_working(case.point, case.readings.claimed)[1]

    def _trusted(self, finding: Finding) -> Values | None:
        """Returns the exact derivative where it was confirmed to be the true one.

        At a kink there is no true one, only those of its sides.
        """
        if finding.judged_by != "exact" or finding.verdict is not Verdict.FAIL:
            return None
        if any(note.startswith(_KINK) for note in finding.notes):
            return None
        exact = self.case.readings.exact
        if exact is None or not all(np.isfinite(e).all() for e in exact):
            return None
        return exact

    def _worst_output(self, claimed: Values, exact: Values | None) -> int:
        """Returns the output that is farthest off, or that has the largest tangent."""

        def off(i: int) -> float:
            if exact is None:
                size = norm(claimed[i])
            else:
                size = norm(claimed[i] - exact[i]) / (norm(exact[i]) or 1.0)
            return size if math.isfinite(size) else math.inf

        return max(range(len(claimed)), key=off)


def _place(items: Sequence[Any], finding: Finding) -> int | None:
    """Returns which leaf, or output, a finding names."""
    return next(
        (
            i
            for i, item in enumerate(items)
            if item.name == finding.name and tuple(item.shape) == finding.shape
        ),
        None,
    )


def _is_off(arrays: _Arrays, rtol: float) -> bool:
    """Whether arrays show a mistake by themselves."""
    if not np.isfinite(arrays.claimed).all():
        return True
    if arrays.true is None:
        return False
    return leaf_gap(arrays.claimed, arrays.true, rtol=rtol, floor=0).is_exceeded


def _in_job() -> bool:
    return jaxprs.current_job() is not None


def inputs_at(inputs: Inputs, point: Point) -> tuple[tuple[str, Any], ...]:
    """Returns all leaves of the arguments at a point, as they came.

    Args:
      inputs: The arguments.
      point: Values of those that are arrays.

    Returns:
      Pairs of a leaf's name and its value: a NumPy copy in its own dtype, `KeyData`
      for keys, or a Python number, string or None as it was given. What is none of
      them, or spans processes, is left out.
    """
    values = {Role.MOVES: iter(point.moving), Role.HELD: iter(point.held)}
    found = []
    for leaf in inputs.leaves:
        is_static = leaf.role is Role.STATIC
        value = leaf.source if is_static else next(values[leaf.role])
        found += [(leaf.name, kept) for kept in _kept(value)]
    return tuple(found)


def _kept(value: Any) -> Iterator[Any]:
    """Yields a copy of a value that can be kept, nothing where it can't."""
    if type(value) in _PLAIN:
        yield value
    elif not hasattr(value, "dtype") or spanning.spans(value):
        return
    elif jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        words = np.array(jax.random.key_data(value))
        yield KeyData(str(jax.random.key_impl(value)), words)
    elif getattr(value, "weak_type", False) and not value.shape:
        yield value.item()
    else:
        yield np.array(value)
