"""What an entry of the zoo of broken custom rules is, and what it is built with."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

Args = tuple[Any, ...]
Fn = Callable[..., Any]
PyTree = Any
# A `jax.custom_vjp` or a `jax.custom_jvp`, whose classes share no base.
Rule = Any


@dataclasses.dataclass(frozen=True)
class BrokenRule:
    """A custom rule with one mistake, and its twin without it.

    Attributes:
      name: What is wrong with what.
      kind: What sort of mistake it is.
      make: `make(right)` returns the rule. The twins have one primal function.
      args: Returns the arguments of `program(rule)`; devices are touched only here.
      causes: Names of causes, each of which would be a right diagnosis.
      checks: The lines of an audit that may find the mistake. The first is where it
        lies: by it the zoo proves that the entry is broken.
      part: The function of the rule that is wrong: "fwd", "bwd" or "jvp"; "jvps" for
        the last one given to `defjvps`; "fun" for the primal function.
      program: Takes the rule and returns the function to check, which calls it.
      order: The order of derivative at which the mistake shows.
      devices: How many devices `program` needs.
      mirrored: Whether autodiff has a derivative of the primal to compare with.
      looks_right_at: Returns arguments at which the wrong twin is right.
    """

    name: str
    kind: str
    make: Callable[[bool], Rule]
    args: Callable[[], Args]
    causes: tuple[str, ...]
    checks: tuple[str, ...] = ("derivative",)
    part: str = "bwd"
    program: Callable[[Rule], Fn] = lambda rule: rule
    order: int = 1
    devices: int = 1
    mirrored: bool = True
    looks_right_at: Callable[[], Args] | None = None

    def place(self, rule: Rule) -> str:
        """Returns "file.py:line" of the rule's function that is wrong."""
        if self.part == "jvps":  # which JAX keeps in a closure
            function = inspect.getclosurevars(rule.jvp).nonlocals["jvps"][-1]
        else:
            function = getattr(rule, self.part)
        code = function.__code__
        return f"{Path(code.co_filename).name}:{code.co_firstlineno}"


def broken(
    kind: str, args: Callable[[], Args], *causes: str, **options: Any
) -> Callable[[Callable[[bool], Rule]], BrokenRule]:
    """Makes an entry of `make(right)`, named as that function is."""

    def entry(make: Callable[[bool], Rule]) -> BrokenRule:
        return BrokenRule(make.__name__, kind, make, args, causes, **options)

    return entry


def cases(entries: Iterable[BrokenRule], *marks: Any) -> list[Any]:
    """Returns the entries as parameters of a test, marked by what they need.

    Args:
      entries: Some of the zoo.
      *marks: Further marks of the entries that need one device only.
    """
    return [
        pytest.param(
            entry,
            id=entry.name,
            marks=[pytest.mark.devices] if entry.devices > 1 else marks,
        )
        for entry in entries
    ]


def is_forward(rule: Rule) -> bool:
    """Whether the rule has a forward mode."""
    return isinstance(rule, jax.custom_jvp)


def with_vjp(
    primal: Fn,
    fwd: Fn,
    bwd: Fn,
    nondiff_argnums: tuple[int, ...] = (),
    symbolic_zeros: bool = False,
) -> Rule:
    """Gives `primal` its derivative in reverse mode; the rule keeps its name."""
    rule = jax.custom_vjp(primal, nondiff_argnums=nondiff_argnums)
    rule.defvjp(fwd, bwd, symbolic_zeros=symbolic_zeros)
    return rule


def with_jvp(primal: Fn, jvp: Fn, symbolic_zeros: bool = False) -> Rule:
    """Gives `primal` its derivative in forward mode; the rule keeps its name."""
    rule = jax.custom_jvp(primal)
    rule.defjvp(jvp, symbolic_zeros=symbolic_zeros)
    return rule


def normal(seed: int, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    """Returns a draw of the normal distribution, complex for a complex dtype."""
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def positive(seed: int, *shape: int) -> jax.Array:
    """Returns a uniform draw between 1/2 and 2."""
    return jax.random.uniform(jax.random.key(seed), shape, minval=0.5, maxval=2.0)


def integers(seed: int, below: int, *shape: int) -> jax.Array:
    """Returns a draw of the integers from 0 to `below` - 1."""
    return jax.random.randint(jax.random.key(seed), shape, 0, below)
