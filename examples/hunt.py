"""Gradients that are right at a random point, and wrong elsewhere.

Three layers as one might write them by hand, each with a backward pass that a test at
random numbers accepts. `gradtest.hunt` looks where such mistakes are: at zeros, ties,
duplicate indices, empty masks, saturation, other sizes. It prints the smallest input
that it finds as code. Run it:

    python examples/hunt.py
"""

import jax
import jax.numpy as jnp

import gradtest
from gradtest import domains


def make_embedding(adds: bool):
    """Returns a look-up in a table; `adds` says whether duplicate indices add up."""

    @jax.custom_vjp
    def embedding(table: jax.Array, ids: jax.Array) -> jax.Array:
        return table[ids]

    def bwd(residuals, cotangent):
        table, ids = residuals
        rows = jnp.zeros_like(table).at[ids]
        gradient = rows.add(cotangent) if adds else rows.set(cotangent)
        return gradient, None

    embedding.defvjp(lambda table, ids: (table[ids], (table, ids)), bwd)
    return embedding


def make_norm(is_safe: bool):
    """Returns the norm of each row; `is_safe`: rows of zeros are guarded."""

    @jax.custom_vjp
    def row_norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt((x**2).sum(-1))

    def bwd(residuals, cotangent):
        x, norm = residuals
        divisor = jnp.where(norm > 0, norm, 1.0) if is_safe else norm
        return ((cotangent / divisor)[..., None] * x,)

    row_norm.defvjp(lambda x: (row_norm(x), (x, row_norm(x))), bwd)
    return row_norm


def make_bias(block: int):
    """Returns `x + bias`; its backward pass sums whole blocks of `block` rows."""

    @jax.custom_vjp
    def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
        return x + bias

    def bwd(_, cotangent):
        rows = len(cotangent) // block * block
        return cotangent, cotangent[:rows].sum(0)

    add_bias.defvjp(lambda x, bias: (x + bias, None), bwd)
    return add_bias


TABLE = domains.normal(("rows", 2)), jnp.array([1, 2, 0])
ROWS = (domains.normal(("batch", 3)),)
BATCH = domains.normal(("batch", 3)), domains.normal(3)

CASES = {
    "duplicate indices overwrite each other": (make_embedding(adds=False), TABLE),
    "a row of zeros is divided by zero": (make_norm(is_safe=False), ROWS),
    "rows behind the last whole block are left out": (make_bias(block=3), BATCH),
}
RIGHT = {
    "an embedding that adds": (make_embedding(adds=True), TABLE),
    "a norm that is guarded": (make_norm(is_safe=True), ROWS),
    "a bias that sums every row": (make_bias(block=1), BATCH),
}


def main() -> None:
    for title, (fn, args) in CASES.items():
        usual = gradtest.check(fn, *args)
        print(f"{title}\n  at a random point: {usual.verdict.value}")
        try:
            gradtest.hunt(fn, *args, database=None)
        except gradtest.GradientMismatch as error:
            print(f"  {error}\n")
    for title, (fn, args) in RIGHT.items():
        report = gradtest.hunt(fn, *args, examples=60, database=None)
        print(f"{title}: {report.verdict.value} at {report.trials} inputs")


if __name__ == "__main__":
    main()
