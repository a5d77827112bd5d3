"""The places of a hunt: the program at several sizes, and its rules."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from gradtest._src import jaxprs, seeding
from gradtest._src.hunting.checks import HuntedCheck, HuntedRule
from gradtest._src.hunting.inferring import inferred
from gradtest._src.hunting.places import Place, Values, cast_like
from gradtest._src.hunting.scopes import Scope, Sizes, read_scopes
from gradtest._src.hunting.sizes import Shapes
from gradtest._src.inputs import Inputs, Recorded, Role, read_inputs
from gradtest._src.options import Options
from gradtest._src.rule_call import TracedAnew
from gradtest._src.rules import RuleUse

# Whatever a user's function raises at sizes that it was not written for.
_REFUSED = (Exception,)


class Ground:
    """Makes the places of a hunt, each once.

    Attributes:
      inputs: The arguments as they came.
      shapes: Which sizes they may have.
      skipped: Sizes at which nothing could be looked at, with the reason.
      unchecked: What was not looked at anywhere.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        options: Options,
        *,
        is_lenient: bool,
    ):
        self.fn, self.options, self.is_lenient = fn, options, is_lenient
        self.inputs = read_inputs(
            fn, args, argnums=options.argnums, exclude=options.exclude
        )
        self.shapes = Shapes(fn, self.inputs, read_scopes(self.inputs))
        self.skipped: dict[str, str] = {}
        self.unchecked: list[str] = []
        # Places whose ordinary point was judged.
        self.judged: set[int] = set()
        self._places: dict[Any, Place | None] = {}

    @property
    def scopes(self) -> list[Scope]:
        """The scopes of all leaves that are arrays."""
        return [scope for scope in self.shapes.scopes if scope is not None]

    def home(self) -> Place:
        """Returns the place of the arguments as they came.

        Raises:
          TypeError, ValueError: The arguments are not what they must be.
        """
        key = _key(self.shapes.given)
        if key not in self._places:
            self._places[key] = self._make(self.shapes.given)
        place = self._places[key]
        assert place is not None
        return place

    def at(self, sizes: Sizes, order: int | None = None) -> Place | None:
        """Returns the place of these sizes; None where the program can't go there.

        Args:
          sizes: The sizes by name.
          order: The order that a new place is judged in; None for that of the hunt.
        """
        key = _key(sizes)
        if key not in self._places:
            try:
                self._places[key] = self._make(sizes, order)
            except _REFUSED as error:
                self.skip(sizes, error)
                self._places[key] = None
        return self._places[key]

    def skip(self, sizes: Sizes, error: Exception) -> None:
        """Takes note of sizes that the function takes and its check does not."""
        label = ", ".join(f"{name} = {size}" for name, size in sizes.items())
        if 0 in sizes.values():
            self.skipped[label] = "empty arrays"
            return
        lines = str(error).strip().splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0]}"
        self.unchecked.append(
            f"{label}: the function has a value there, and no derivative: {why}"
        )

    def is_known(self, sizes: Sizes) -> bool:
        """Whether the place of these sizes was made already."""
        return _key(sizes) in self._places

    def is_judged(self, place: Place) -> bool:
        """Whether a place's ordinary point was judged."""
        return id(place) in self.judged

    def _make(self, sizes: Sizes, order: int | None = None) -> Place:
        values = tuple(self._ordinary(scope, sizes) for scope in self.scopes)
        check = self.check_at(values, order)
        is_home = dict(sizes) == self.shapes.given
        return Place(
            check,
            self.scopes,
            sizes,
            values,
            is_lenient=self.is_lenient,
            usual=dict if is_home else lambda: self.home().usual,
        )

    def _ordinary(self, scope: Scope, sizes: Sizes) -> Any:
        if scope.domain is None:
            return scope.given
        if scope.given is not None and dict(sizes) == self.shapes.given:
            return cast_like(scope, np.asarray(scope.given))
        generator = seeding.generator(self.options.key, "point", 0, scope.name)
        return cast_like(scope, scope.at(sizes).draw(generator))

    def arguments(self, values: Values) -> tuple[Any, ...]:
        """Returns the function's arguments around the values of all array leaves."""
        arrays = iter(values)
        leaves = [
            leaf.source if leaf.role is Role.STATIC else next(arrays)
            for leaf in self.inputs.leaves
        ]
        return jax.tree_util.tree_unflatten(self.inputs.treedef, leaves)

    def check_at(self, values: Values, order: int | None = None) -> HuntedCheck:
        """Returns a new check at these values."""
        options = self.options
        if order is not None:
            options = dataclasses.replace(options, order=order)
        args = self.arguments(values)
        return HuntedCheck(self.fn, args, options, may_lack=self.is_lenient)

    # --- rules ------------------------------------------------------------------------

    def rules(self, home: Place) -> Iterator[Place]:
        """Yields a place for each of the user's rules that the program calls."""
        check = home.check
        assert isinstance(check, HuntedCheck)
        for use, anew in check.rules():
            label = f"{use.rule.kind} {use.rule.name}"
            if not jaxprs.is_users(use.source) or not use.is_invoked:
                continue
            if use.trouble:
                self.unchecked.append(f"{label}: {use.trouble}")
            elif not self._is_whole(use, check.inputs, home):
                place = self._rule_place(use, anew, label)
                if place is not None:
                    yield place

    def _is_whole(self, use: RuleUse, inputs: Inputs, home: Place) -> bool:
        """Whether the program is no more than a call of the rule."""
        given = [v for v in home.values if hasattr(v, "dtype")]
        operands = use.samples[0]
        return (
            not use.call.outer
            and len(given) == len(operands)
            and all(map(_same, given, operands))
        )

    def _rule_place(self, use: RuleUse, anew: TracedAnew, label: str) -> Place | None:
        try:
            check = HuntedRule(use, self.options, anew)
        except _REFUSED as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.unchecked.append(f"{label}: {lines[0]}")
            return None
        scopes, values = [], []
        for leaf in check.inputs.leaves:
            assert isinstance(leaf.source, Recorded)
            value = leaf.source.values[0]
            values.append(value)
            scopes.append(_rule_scope(leaf.name, value, leaf.role is Role.MOVES))
        return Place(check, scopes, {}, tuple(values), is_lenient=True, rule=use)


def _rule_scope(name: str, value: Any, moves: bool) -> Scope:
    """Returns what one operand of a rule may be: what the program seems to hand it."""
    axes = tuple(value.shape)
    if not moves or not isinstance(value.dtype, np.dtype):
        return Scope(name, axes, None, given=value, moves=moves)
    domain, _ = inferred(np.asarray(value), axes)
    return Scope(name, axes, domain, given=value, moves=moves)


def _same(one: Any, other: Any) -> bool:
    return (
        np.shape(one) == np.shape(other)
        and hasattr(other, "tobytes")
        and np.asarray(one).tobytes() == np.asarray(other).tobytes()
    )


def _key(sizes: Sizes) -> Any:
    return tuple(sorted(sizes.items()))
