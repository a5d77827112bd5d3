"""The mutants of a user's rule objects, and how they take the rules' places."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from gradtest._src.jaxprs import rule_objects
from gradtest._src.jaxprs.rule_objects import RuleArguments
from gradtest._src.power.mutations import Mutation, mutations_of, scaled
from gradtest._src.power.seen import SeenRule, is_array, seen_jvp, seen_vjp

Signature = tuple[str, ...]
# Numbers that a rule may hand on as they are.
_PLAIN = (bool, int, float, complex)


@dataclasses.dataclass(eq=False)
class Mutant:
    """One slip in a rule, at all shapes that it is called with.

    Attributes:
      key: What tells it from the rule's other mutants, in all processes.
      part: What is broken: "bwd", "fwd" or "jvp".
      says: What is different, at the largest arguments.
      size: The number of elements of those.
      second_order: Whether it only shows in derivatives of the derivative.
      mutations: What is done, for each signature of the part's arguments.
      misfits: The errors of mutations that could not be carried out.
    """

    key: str
    part: str
    says: str
    size: int
    second_order: bool
    mutations: dict[Signature, Mutation]
    misfits: list[Exception] = dataclasses.field(default_factory=list)

    def replacing(self, name: str, part: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what stands in for a part of the rule."""
        if name != self.part:
            return part
        broken = {key: each.applied(part) for key, each in self.mutations.items()}
        first = next(iter(broken.values()))

        @functools.wraps(part)
        def mutant(*args: Any) -> Any:
            chosen = broken.get(_signature(args), first)
            try:
                return chosen(*args)
            except Exception as error:
                part(*args)  # what the rule itself raises is the test's affair
                self.misfits.append(error)
                raise

        return mutant

    @contextlib.contextmanager
    def in_place(self, rules: Sequence[Any]) -> Iterator[None]:
        """Puts the mutant in the place of some rule objects."""
        with rule_objects.parts_replaced(list(rules), self.replacing):
            yield


def looked_at(rule: Any, arguments: Iterable[RuleArguments]) -> list[SeenRule]:
    """Looks at a rule object at each of the arguments that it was called with.

    Raises:
      Exception: What the rule raises, where it can be looked at nowhere.
    """
    found: list[SeenRule] = []
    trouble: Exception | None = None
    for one in arguments:
        try:
            found.append(_look(rule, one))
        except Exception as error:  # at other shapes it may do
            trouble = error
    if not found and trouble is not None:
        raise trouble
    return found


def _look(rule: Any, arguments: RuleArguments) -> SeenRule:
    parts = rule_objects.parts_of(rule)
    static = [arguments.whole[i] for i in arguments.static]
    moving, names = arguments.moving, arguments.names
    if "jvp" in parts:
        jvp = functools.partial(parts["jvp"], *static)
        return seen_jvp(jvp, moving, names=names)

    def fwd(*args: Any) -> Any:
        result, residuals = parts["fwd"](*arguments.placed(_freed(args)))
        return result, _fixed(residuals)

    def bwd(residuals: Any, cotangents: Any) -> Any:
        return parts["bwd"](*static, _freed(residuals), cotangents)

    if rule_objects.wants_symbolic_zeros(rule):
        wrap = rule_objects.with_perturbed
        return seen_vjp(fwd, bwd, moving, names=names, wrap=wrap)
    return seen_vjp(fwd, bwd, _fixed(moving), names=names)


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """A number of Python's, such as an axis or a length, which JAX does not trace."""

    value: Any


def _fixed(tree: Any) -> Any:
    return jax.tree_util.tree_map(
        lambda leaf: _Fixed(leaf) if type(leaf) in _PLAIN else leaf, tree
    )


def _freed(tree: Any) -> Any:
    return jax.tree_util.tree_map(
        lambda leaf: leaf.value if isinstance(leaf, _Fixed) else leaf, tree
    )


def mutants_of(looks: Sequence[SeenRule], size: int | None) -> list[Mutant]:
    """Returns the mutants of a rule.

    Args:
      looks: The rule at each of the arguments that it is called with.
      size: How many are wanted; None for all.
    """
    found: dict[str, Mutant] = {}
    for seen in looks:
        counts: dict[str, int] = {}
        for mutation in mutations_of(seen):
            name = f"{mutation.part}: {mutation.name} of {mutation.which}"
            counts[name] = counts.get(name, 0) + 1
            _include(found, f"{name} {counts[name]}", mutation, seen)
    return sampled(list(found.values()), size)


def _include(
    found: dict[str, Mutant], key: str, mutation: Mutation, seen: SeenRule
) -> None:
    size = sum(_elements(slot.shape) for slot in seen.given)
    signature = tuple(
        _told(slot.shape, slot.dtype) if slot.dtype is not None else ""
        for slot in seen.given
    )
    mutant = found.get(key)
    if mutant is None:
        fields = mutation.part, mutation.says, size, mutation.second_order
        found[key] = Mutant(key, *fields, {signature: mutation})
        return
    mutant.mutations[signature] = mutation
    if (size, mutation.says) > (mutant.size, mutant.says):
        mutant.size, mutant.says = size, mutation.says


def scaling(looks: Sequence[SeenRule], factor: float) -> Mutant:
    """Returns the mutant that scales all derivatives of a rule by one factor."""
    found: dict[str, Mutant] = {}
    for seen in looks:
        _include(found, "scale", scaled(seen, factor), seen)
    return found["scale"]


def sampled(mutants: list[Any], size: int | None) -> list[Any]:
    """Returns so many of some mutants, the same ones in each process.

    Which they are depends on the run's seed and on each one's own key alone, so that a
    part of the mutants has its part of the sample.
    """
    if size is None or len(mutants) <= size:
        return mutants
    from gradtest._src import session

    drawn = sorted(
        mutants, key=lambda m: random.Random(f"{session.key()} {m.key}").random()
    )
    return [mutant for mutant in mutants if mutant in drawn[:size]]


def _signature(args: tuple[Any, ...]) -> Signature:
    # Of `(*nondiff, residuals, cotangents)` or `(*nondiff, primals, tangents)`.
    leaves = jax.tree_util.tree_leaves(args[-2:])
    return tuple(
        _told(jax.numpy.shape(leaf), jax.numpy.result_type(leaf))
        if is_array(leaf) and type(leaf) not in _PLAIN
        else ""
        for leaf in leaves
    )


def _told(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}{list(shape)}"


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for length in shape:
        count *= length
    return count
