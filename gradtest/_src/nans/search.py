"""Looks for the equation that spoils a gradient, and for what mends it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from gradtest._src import seeding
from gradtest._src.gaps import as_number, leaf_gap
from gradtest._src.inputs import Point
from gradtest._src.jaxprs import Jaxpr
from gradtest._src.lifting import is_inexact, widen
from gradtest._src.nans import slopes
from gradtest._src.nans.backward import Backward, Index, Origin, is_finite
from gradtest._src.nans.patterns import Remedy, remedies
from gradtest._src.nans.tape import Event, Guard, Tape, TooLargeError
from gradtest._src.options import DEFAULT_RTOL

# So many equations of one program are guarded at most, ...
_MOST_REMEDIES = 4
# ... and programs of more steps are only looked into.
_MOST_EVENTS = 4000
# The search ends where it has run so many equations, ...
_MOST_RUN = 100_000
# ... and asks programs with more than so many for less.
_MANY_EVENTS = 300
# At so many ordinary points is a guarded form compared, of so many tried.
_POINTS, _TRIED, _TRIED_IF_LONG = 2, 16, 8
_MOST_SLOPES = 3
# What a value in working precision may be off by, to be taken for the same at first.
_ROUGHLY = 1e-2

Guards = Mapping[int, Guard]
# Values of the leaves that move, and of all else.
At = tuple[list[Any], list[Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class Trail:
    """Where a leaf's gradient stops being finite, and what mends it.

    Attributes:
      origin: The equation and the entry.
      wide: Whether it is so in float64 as well.
      remedies: Guarded forms which make the gradient finite, all together; empty where
        none proves right.
      is_infinite: Whether the function's own slope has no bound there.
      given: The gradient that the remedies give there.
      inside: The event inside of a custom rule's derivative, if that is where; and the
        entry of what it takes.
    """

    origin: Origin
    wide: bool
    remedies: tuple[Remedy, ...] = ()
    is_infinite: bool = False
    given: complex | None = None
    inside: tuple[Event, Index] | None = None


class Search:
    """A program at a point where its gradient is not finite."""

    def __init__(
        self, jaxpr: Jaxpr, point: Point, held: Sequence[Any], seed: Sequence[Any]
    ):
        self._jaxpr = jaxpr
        self._here: At = (list(point.moving), list(held))
        self._remedies: dict[bool, tuple[Remedy, ...]] = {}
        self._mended_gradients: dict[bool, list[Any]] = {}
        self._seed = list(seed)
        self._derivatives: dict[Any, Jaxpr] = {}
        self._events_run = 0

    def _tape(self, guards: Guards, at: At | None = None, *, wide: bool) -> Tape:
        moving, held = self._here if at is None else at
        tape = Tape(
            self._jaxpr, moving, held, wide=wide, guards=guards,
            derivatives=self._derivatives,
        )  # fmt: skip
        self._events_run += len(tape.events)
        return tape

    def _end_if_long(self) -> None:
        if self._events_run > _MOST_RUN:
            raise TooLargeError

    def _back(self, guards: Guards, at: At | None = None, *, wide: bool) -> Backward:
        return Backward(self._tape(guards, at, wide=wide), self._seed)

    @functools.cached_property
    def _plain(self) -> Backward:
        return self._back({}, wide=False)

    @functools.cached_property
    def _lifted(self) -> Backward:
        return self._back({}, wide=True)

    @property
    def _is_long(self) -> bool:
        return len(self._plain.tape.events) > _MANY_EVENTS

    def trail(self, leaf: int, index: Index | None) -> Trail | None:
        """Returns where one leaf's gradient stops being finite, and what mends it.

        Args:
          leaf: The place of the leaf among those that move.
          index: An entry that is not finite; None for any.
        """
        origin = self._plain.origin(leaf, index)
        wide = self._lifted.origin(leaf, index)
        trail = origin or wide
        if trail is None:
            return None
        try:
            sides = self._sides(self._here, leaf, trail.entry)
        except TooLargeError:
            sides = None
        if (origin is None) not in self._remedies:
            self._remedies[origin is None] = self._mended(trail, wide=origin is None)
        found = self._remedies[origin is None]
        has_no_bound = sides is not None and sides.is_infinite
        inside = None
        if trail.event.is_rule:
            back = self._lifted if origin is None else self._plain
            inside = back.inside_of_rule(trail)
        given = self._given(found, trail, wide=origin is None)
        return Trail(trail, wide is not None, found, has_no_bound, given, inside)

    def _given(
        self, found: Sequence[Remedy], origin: Origin, *, wide: bool
    ) -> complex | None:
        if not found:
            return None
        if wide not in self._mended_gradients:
            guards = _guards(found, (self._lifted if wide else self._plain).tape)
            self._mended_gradients[wide] = self._back(guards, wide=wide).gradient
        gradient = self._mended_gradients[wide][origin.leaf]
        return as_number(_float64(gradient)[origin.entry])

    # --- what mends it ----------------------------------------------------------------

    def _mended(self, origin: Origin, *, wide: bool) -> tuple[Remedy, ...]:
        """Returns guarded forms that make the whole gradient finite, and prove right.

        Args:
          origin: Where it stops being finite for one of the leaves.
          wide: Whether it does so in float64 alone.
        """
        if len(self._plain.tape.events) > _MOST_EVENTS:
            return ()
        try:
            return next(self._proved(origin, (), wide), ())
        except TooLargeError:
            return ()

    def _proved(
        self, origin: Origin, before: tuple[Remedy, ...], wide: bool
    ) -> Iterator[tuple[Remedy, ...]]:
        """Yields guarded forms that make the gradient finite, and prove right."""
        tape = (self._lifted if wide else self._plain).tape
        known = _guards(before, tape)
        for remedy in remedies(origin, tape):
            if id(remedy.event.eqn) in known:
                continue
            self._end_if_long()
            chosen = (*before, remedy)
            guards = _guards(chosen, tape)
            back = self._attempt(guards, wide)
            if back is None:
                continue
            bad = [i for i, g in enumerate(back.gradient) if not is_finite(g)]
            if not bad:
                if self._is_right(guards):
                    yield chosen
            elif len(chosen) < _MOST_REMEDIES:
                following = back.origin(bad[0])
                if following is not None:
                    yield from self._proved(following, chosen, wide)

    def _attempt(self, guards: Guards, wide: bool) -> Backward | None:
        """Runs the program with guarded forms; None where its value is another."""
        try:
            back = self._back(guards, wide=wide)
        except TooLargeError:
            raise
        except Exception:  # a form that does not fit there
            return None
        plain = self._lifted if wide else self._plain
        same = _alike(_values(back), _values(plain), rtol=_ROUGHLY)
        return back if same else None

    def _is_right(self, guards: Guards) -> bool:
        """Whether guarded forms keep values and finite gradients, here and nearby."""
        here, old = self._back(guards, wide=True), self._lifted
        if not all(map(is_finite, (*_values(here), *here.gradient))):
            return False
        was_finite = [np.isfinite(np.asarray(each)) for each in old.gradient]
        kept, was = (
            [np.where(f, g, 0) for f, g in zip(was_finite, gradient, strict=True)]
            for gradient in (here.gradient, old.gradient)
        )
        is_same = self._same_values(here, old) and self._same(kept, was, _scale(old))
        if not is_same:
            return False
        bad = [~np.isfinite(np.asarray(each)) for each in self._plain.gradient]
        bad = [b | ~f for b, f in zip(bad, was_finite, strict=True)]
        return self._fits_slopes(here, self._here, bad) and (
            self._agrees_nearby(guards, bad)
        )

    def _agrees_nearby(self, guards: Guards, bad: Sequence[np.ndarray]) -> bool:
        """Whether nothing else changes at ordinary points.

        Where few have a finite gradient (the program holds what spoils it), the guarded
        one is compared with differences.
        """
        rest = []
        count = 0
        for k in range(_TRIED_IF_LONG if self._is_long else _TRIED):
            self._end_if_long()
            at = _ordinary(self._here, k)
            old = self._back({}, at, wide=True)
            if not all(map(is_finite, _values(old))):
                continue
            if not all(map(is_finite, old.gradient)):
                rest.append((at, old))
                continue
            new = self._back(guards, at, wide=True)
            if not self._same_values(new, old):
                return False
            if not self._same(new.gradient, old.gradient, _scale(old)):
                return False
            count += 1
            if count == _POINTS:
                return True
        missing = rest[: _POINTS - count]
        return len(missing) == _POINTS - count and all(
            self._fits_nearby(guards, at, old, bad) for at, old in missing
        )

    def _fits_nearby(
        self, guards: Guards, at: At, old: Backward, bad: Sequence[np.ndarray]
    ) -> bool:
        """Whether the guarded gradient is what differences show at another point."""
        new = self._back(guards, at, wide=True)
        return self._same_values(new, old) and (
            self._fits_slopes(new, at, bad, strictly=True)
        )

    def _same_values(self, new: Backward, old: Backward) -> bool:
        return self._same(_values(new), _values(old))

    def _same(self, new: Sequence[Any], old: Sequence[Any], scale: float = 0.0) -> bool:
        """Whether arrays are the same but for what their own dtypes can't tell."""
        moving = [node.value for node in self._plain.tape.inputs if node.moves]
        tiny = max(float(jnp.finfo(value.dtype).tiny) for value in moving)
        eps = float(np.finfo(np.float64).eps)
        return _alike(new, old, floor=eps * scale + tiny)

    # --- what the function's own values say -------------------------------------------

    def _fits_slopes(
        self,
        here: Backward,
        at: At,
        bad: Sequence[np.ndarray],
        *,
        strictly: bool = False,
    ) -> bool:
        """Whether a gradient is no other than what differences show.

        Args:
          here: The gradient, at these values.
          at: The values.
          bad: The entries that are asked about, of each leaf.
          strictly: Whether differences must settle.
        """
        count = 1 if self._is_long else _MOST_SLOPES
        asked = [
            (leaf, tuple(int(i) for i in place))
            for leaf, entries in enumerate(bad)
            for place in np.argwhere(entries)[:count]
        ]
        for leaf, index in asked[: 2 * count]:
            found = self._sides(at, leaf, index)
            if found is None or (strictly and None in found.slopes):
                if strictly:
                    return False
                continue
            if not found.allow(float(np.real(here.gradient[leaf][index]))):
                return False
        return True

    def _sides(self, at: At, leaf: int, index: Index) -> slopes.Sides | None:
        moving = [np.asarray(widen(value)) for value in at[0]]
        if np.iscomplexobj(moving[leaf]):
            return None

        def value(point: Sequence[Any]) -> float:
            self._end_if_long()
            outputs = self._tape({}, (list(point), at[1]), wide=True).outputs
            return sum(
                float(np.real(np.sum(np.asarray(widen(s)) * np.asarray(out.value))))
                for s, out in zip(self._seed, outputs, strict=True)
            )

        try:
            return slopes.sides(value, moving, leaf, index)
        except TooLargeError:
            raise
        except Exception:  # a program that does not run nearby says nothing
            return None


def _guards(chosen: Sequence[Remedy], tape: Tape) -> dict[int, Guard]:
    return {eqn: guard for each in chosen for eqn, guard in each.guards(tape).items()}


def _values(back: Backward) -> list[Any]:
    return [np.asarray(node.value) for node in back.tape.outputs]


def _alike(
    found: Sequence[Any],
    wanted: Sequence[Any],
    *,
    rtol: float = DEFAULT_RTOL,
    floor: float = 0.0,
) -> bool:
    """Whether arrays are the same but for rounding, and all are finite."""
    wide = [[_float64(each) for each in arrays] for arrays in (found, wanted)]
    sizes = [float(np.abs(each).max(initial=0)) for each in wide[1]]
    floor += float(np.finfo(np.float64).eps) * max(sizes, default=0.0)
    return all(
        is_finite(f) and not leaf_gap(f, w, rtol=rtol, floor=floor).is_exceeded
        for f, w in zip(*wide, strict=True)
    )


def _scale(back: Backward) -> float:
    """Returns the size that a gradient is rounded beside."""
    values = max(float(np.abs(value).max(initial=0)) for value in _values(back))
    moving = [np.asarray(node.value) for node in back.tape.inputs if node.moves]
    sizes = [float(np.sqrt(np.mean(np.abs(x) ** 2))) for x in moving if x.size]
    return values / min((size for size in sizes if size), default=1.0)


def _float64(value: Any) -> np.ndarray:
    array = np.asarray(value)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _ordinary(here: At, k: int) -> At:
    """Draws a point: of positive numbers, above the given one, below it, or anywhere.

    In every other try what is held moves as well.
    """
    generator = seeding.generator(0, "ordinary", k)

    def moved(value: Any) -> Any:
        if not is_inexact(jnp.result_type(value)):
            return value
        wide = np.asarray(widen(value))
        size = float(np.sqrt(np.mean(np.abs(wide) ** 2))) if wide.size else 1.0
        drawn = generator.standard_normal(wide.shape)
        step = 0.3 * (size or 1.0) * np.abs(drawn)
        return (np.abs(drawn), wide + step, wide - step, drawn)[k // 2 % 4]

    moving, held = here
    return list(map(moved, moving)), list(map(moved, held)) if k % 2 else held
