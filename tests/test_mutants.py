"""How custom rules are broken: each mutation does what it says, and nothing else."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from gradtest._src.power.mutations import Mutation, mutations_of, scaled
from gradtest._src.power.seen import seen_jvp, seen_vjp

X = jnp.arange(1.0, 13.0).reshape(4, 3) / 6
W = jnp.array([[0.5, -1.0, 2.0], [1.0, 0.25, -0.5], [-2.0, 1.5, 1.0]])
B = jnp.array([0.1, -0.2, 0.3])


def affine(x: jax.Array, params: dict[str, jax.Array]) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"])


def fwd(x: jax.Array, params: dict[str, jax.Array]) -> Any:
    y = affine(x, params)
    return y, (x, params["w"], y)


def bwd(kept: Any, g: jax.Array) -> Any:
    x, w, y = kept
    d = g * (1 - y**2)
    return d @ w.T, {"w": x.T @ d, "b": jnp.sum(d, axis=0)}


ARGS = (X, {"w": W, "b": B})
NAMES = ("x", "db", "dw")
SEEN = seen_vjp(fwd, bwd, ARGS, names=("x", "b", "w"))
MADE = mutations_of(SEEN)


def broken(mutation: Mutation, g: Any = None) -> Any:
    """Runs the rule with one part of it broken."""
    parts = {"fwd": fwd, "bwd": bwd}
    parts[mutation.part] = mutation.applied(parts[mutation.part])
    y, kept = parts["fwd"](*ARGS)
    return parts["bwd"](kept, jnp.ones_like(y) if g is None else g)


def one(name: str, which: str = "", among: Any = None) -> Mutation:
    made = MADE if among is None else among
    (found, *_) = [m for m in made if m.name == name and which in (m.which, "")]
    return found


RIGHT = bwd(fwd(*ARGS)[1], jnp.ones((4, 3)))


def differing(returned: Any) -> list[str]:
    pairs = zip(jax.tree.leaves(returned), jax.tree.leaves(RIGHT), strict=True)
    return [
        name
        for name, (new, old) in zip(("dx", "db", "dw"), pairs, strict=True)
        if not np.allclose(new, old, rtol=1e-6)
    ]


def test_a_scale_is_of_one_leaf_alone():
    dx, params = broken(one("scale 1.01", "dw"))
    np.testing.assert_allclose(params["w"], 1.01 * RIGHT[1]["w"], rtol=1e-6)
    assert differing((dx, params)) == ["dw"]


def test_all_of_a_derivative_can_be_scaled_at_once():
    returned = broken(scaled(SEEN, 1.5))
    jax.tree.map(
        lambda new, old: np.testing.assert_allclose(new, 1.5 * old, rtol=1e-6),
        returned,
        RIGHT,
    )


def test_a_block_of_rows_is_what_it_says():
    mutation = one("zero a block of rows", "dx")
    dx = np.asarray(broken(mutation)[0])
    first, last = mutation.says.partition("rows ")[2].split("..")
    zero = np.zeros(4, bool)
    zero[int(first) : int(last) + 1] = True
    assert not dx[zero].any()
    np.testing.assert_array_equal(dx[~zero], np.asarray(RIGHT[0])[~zero])


def test_one_entry_is_zero_where_it_was_largest():
    mutation = one("zero one entry", "dw")
    dw = np.asarray(broken(mutation)[1]["w"])
    (place,) = np.argwhere(dw != np.asarray(RIGHT[1]["w"]))
    assert mutation.says == f"dw zero at [{place[0]}, {place[1]}]"
    assert dw[tuple(place)] == 0


def test_a_square_leaf_is_transposed_and_a_like_pair_exchanged():
    np.testing.assert_array_equal(
        broken(one("transpose", "dw"))[1]["w"], RIGHT[1]["w"].T
    )
    seen = seen_vjp(lambda a, b: (a - 2 * b, None), lambda _, g: (g, -2 * g), (X, X))
    swap = one("swap two leaves", among=mutations_of(seen))
    first, second = swap.applied(lambda _, g: (g, -2 * g))(None, X)
    np.testing.assert_array_equal(first, -2 * X)
    np.testing.assert_array_equal(second, X)


def test_a_term_of_the_rule_is_dropped_and_named_by_its_line():
    terms = [m for m in MADE if m.name == "drop a term"]
    line = inspect.getsourcelines(bwd)[1] + 2
    (mutation,) = [m for m in terms if m.says.endswith("without its 2nd term")]
    assert mutation.which.startswith("`1 - y**2` at ")
    assert mutation.which.endswith(f"test_mutants.py:{line}")
    dx, _ = broken(mutation)
    np.testing.assert_allclose(dx, jnp.ones((4, 3)) @ W.T, rtol=1e-6)


def test_a_sum_becomes_one_of_its_terms():
    mutation = one("skip a reduction")
    y = affine(*ARGS)
    np.testing.assert_allclose(broken(mutation)[1]["b"], (1 - y**2)[0], rtol=1e-6)
    assert differing(broken(mutation)) == ["db"]


def test_a_stopped_residual_changes_the_second_derivative_alone():
    mutation = one("stop_gradient", "residual 2")
    assert mutation.second_order
    assert not differing(broken(mutation))

    def slope(function: Any) -> Any:
        return jax.grad(lambda y: function((X, W, y), jnp.ones_like(y))[0].sum())

    assert np.any(slope(bwd)(affine(*ARGS)))
    assert not np.any(slope(mutation.applied(bwd))(affine(*ARGS)))


def test_a_wrong_residual_is_the_rules_output_or_zero():
    seen = seen_vjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),), (X,))
    made = mutations_of(seen)
    (output,) = [m for m in made if m.part == "fwd"]
    y, kept = output.applied(lambda x: (jnp.sin(x), x))(X)
    np.testing.assert_array_equal(kept, y)
    (zero,) = [m for m in made if m.says == "zero in place of residual"]
    (dx,) = zero.applied(lambda x, g: (g * jnp.cos(x),))(X, X)
    np.testing.assert_array_equal(dx, X)


@pytest.mark.parametrize("mutation", MADE, ids=lambda m: m.says[-40:])
def test_every_mutation_can_be_traced_batched_and_differs(mutation: Mutation):
    function = mutation.applied({"fwd": fwd, "bwd": bwd}[mutation.part])
    if mutation.part == "fwd":
        return
    kept, g = fwd(*ARGS)[1], jnp.cos(X)
    plain = function(kept, g)
    staged = jax.jit(function)(kept, g)
    batched = jax.vmap(function, in_axes=(None, 0))(kept, g[None])
    for new, old in zip(jax.tree.leaves(staged), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-6)
    for new, old in zip(jax.tree.leaves(batched), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(new[0], old, rtol=1e-5, atol=1e-6)
    right = jax.tree.leaves(bwd(kept, g))
    is_same = all(
        np.allclose(a, b, rtol=1e-6)
        for a, b in zip(jax.tree.leaves(plain), right, strict=True)
    )
    assert is_same == mutation.second_order


def test_no_two_mutations_are_one_program():
    # Of two entries, half of the rows is one entry.
    seen = seen_vjp(lambda x: (x, None), lambda _, g: (g,), (jnp.ones(2),))
    every, unequal = mutations_of(seen, unequal=False), mutations_of(seen)
    names = {mutation.name for mutation in every}
    assert names - {m.name for m in unequal} == {"zero a block of rows"}
    assert len({m.says for m in MADE}) == len(MADE)


def test_no_mutation_is_the_rule_itself():
    like = seen_vjp(lambda a, b: (a + b, None), lambda _, g: (g, g), (X, X))
    assert "swap two leaves" not in {m.name for m in mutations_of(like)}


def test_leaves_without_a_cotangent_and_integers_are_left_alone():
    def bwd_of_one(kept: Any, g: jax.Array) -> Any:
        return g * 2, None, None, {"table": None}

    args = (X, X, jnp.arange(3), {"table": X})
    seen = seen_vjp(lambda *a: (2 * a[0], None), bwd_of_one, args)
    assert set(seen.returned) == {0}
    for mutation in mutations_of(seen):
        returned = mutation.applied(bwd_of_one)(None, X)
        assert not jax.tree.leaves(returned[1:])


def test_the_first_arguments_may_be_static():
    def bwd_with_static(factor: float, kept: Any, g: jax.Array) -> Any:
        return (g * factor * jnp.cos(kept),)

    seen = seen_vjp(
        lambda x: (jnp.sin(x), x), lambda *a: bwd_with_static(3.0, *a), (X,)
    )
    for mutation in mutations_of(seen):
        if mutation.part == "bwd":
            (dx,) = mutation.applied(bwd_with_static)(3.0, X, jnp.ones_like(X))
            assert dx.shape == X.shape


def test_a_mutation_that_does_not_fit_a_call_leaves_it_as_it_is():
    mutation = one("zero a block of rows", "dx")
    kept, g = fwd(X[:2], ARGS[1])[1], jnp.ones((2, 3))
    np.testing.assert_array_equal(mutation.applied(bwd)(kept, g)[0], bwd(kept, g)[0])


def test_a_jvp_keeps_its_value_and_its_tangent_is_broken():
    def jvp(primals: Any, tangents: Any) -> Any:
        (x, a), (dx, da) = primals, tangents
        return jnp.sin(x) * a, jnp.cos(x) * a * dx + jnp.sin(x) * da

    made = mutations_of(seen_jvp(jvp, (X, 2 * X), names=("x", "a")))
    right = jvp((X, 2 * X), (X, X))
    kinds = {mutation.name for mutation in made}
    assert {"drop a term", "drop a leaf", "stop_gradient", "wrong residual"} <= kinds
    for mutation in made:
        value, tangent = mutation.applied(jvp)((X, 2 * X), (X, X))
        np.testing.assert_array_equal(value, right[0])
        assert np.allclose(tangent, right[1], rtol=1e-6) == mutation.second_order


def test_a_term_inside_of_a_loop_or_a_kernel_is_dropped():
    def kernel(x_ref: Any, g_ref: Any, out_ref: Any) -> None:
        out_ref[...] = g_ref[...] * 2 + x_ref[...] * g_ref[...]

    def by_kernel(x: jax.Array, g: jax.Array) -> Any:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return (pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, g),)

    def by_loop(x: jax.Array, g: jax.Array) -> Any:
        def step(carry: Any, row: Any) -> Any:
            return carry, row[1] * 2 + row[0] * row[1]

        return (jax.lax.scan(step, 0.0, (x, g))[1],)

    for function in (by_kernel, by_loop):
        seen = seen_vjp(lambda x: (2 * x + x**2 / 2, x), function, (X,))
        dropped = [
            mutation.applied(function)(X, jnp.ones_like(X))[0]
            for mutation in mutations_of(seen)
            if mutation.says.endswith("term")
        ]
        assert any(np.allclose(found, X) for found in dropped)
        assert any(np.allclose(found, 2.0) for found in dropped)
