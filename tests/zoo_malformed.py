"""Rules that do not have the form of a rule, or that break when they are called."""

import jax
import jax.numpy as jnp

from tests.zoo_entry import Args, PyTree, Rule, broken, normal, with_jvp, with_vjp

_STRUCTURE = ("structure",)


def _dense_args() -> Args:
    return normal(0, 5, 3), {"w": normal(1, 3, 3), "b": normal(2, 3)}


def _dense(x: jax.Array, params: PyTree) -> jax.Array:
    return x @ params["w"] + params["b"]


def _cotangents(kept: Args, g: jax.Array) -> Args:
    x, params = kept
    return g @ params["w"].T, {"w": x.T @ g, "b": g.sum(0)}


def _dense_rule(right: bool, mistake: str) -> Rule:
    """A right dense layer whose rule hands its results over in a wrong form."""

    def dense(x: jax.Array, params: PyTree) -> jax.Array:
        return _dense(x, params)

    def fwd(x: jax.Array, params: PyTree) -> PyTree:
        y, kept = _dense(x, params), (x, params)
        if not right and mistake == "fwd is no pair":
            return y
        if not right and mistake == "fwd returns another tree":
            return {"y": y}, kept
        if not right and mistake == "fwd returns another shape":
            return y[0], kept
        return y, kept

    def bwd(kept: Args, g: jax.Array) -> PyTree:
        dx, d_params = _cotangents(kept, g)
        if right:
            return dx, d_params
        if mistake == "raises":
            raise RuntimeError("no kernel for this shape")
        return {
            "too few": (dx,),
            "too many": (dx, d_params, None),
            "no tuple": dx,
            "another tree": (dx, (d_params["w"], d_params["b"])),
            "a leaf missing": (dx, {"w": d_params["w"]}),
            "another shape": (dx, {**d_params, "b": g}),
            "NaN": (dx, {**d_params, "b": d_params["b"] * jnp.nan}),
        }.get(mistake, (dx, d_params))

    return with_vjp(dense, fwd, bwd)


@broken("number of cotangents", _dense_args, "wrong tree of cotangents",
        checks=_STRUCTURE)  # fmt: skip
def dense_that_returns_too_few(right: bool) -> Rule:
    """One cotangent for two arguments."""
    return _dense_rule(right, "too few")


@broken("number of cotangents", _dense_args, "wrong tree of cotangents",
        checks=_STRUCTURE)  # fmt: skip
def dense_that_returns_too_many(right: bool) -> Rule:
    """Three cotangents for two arguments."""
    return _dense_rule(right, "too many")


@broken("number of cotangents", _dense_args, "wrong tree of cotangents",
        checks=_STRUCTURE)  # fmt: skip
def dense_that_returns_a_bare_array(right: bool) -> Rule:
    """An array where a tuple of cotangents is wanted."""
    return _dense_rule(right, "no tuple")


@broken("tree of a cotangent", _dense_args, "wrong tree of cotangents",
        "wrong tree of cotangents", checks=_STRUCTURE)  # fmt: skip
def dense_that_returns_a_tuple_for_a_dict(right: bool) -> Rule:
    """The leaves are right and hang on another tree."""
    return _dense_rule(right, "another tree")


@broken("tree of a cotangent", _dense_args, "wrong tree of cotangents",
        "wrong tree of cotangents", checks=_STRUCTURE)  # fmt: skip
def dense_that_returns_no_bias(right: bool) -> Rule:
    """The dict lacks a key."""
    return _dense_rule(right, "a leaf missing")


@broken("shape of a cotangent", _dense_args, "wrong shape of a cotangent",
        checks=_STRUCTURE)  # fmt: skip
def dense_that_does_not_sum_its_bias(right: bool) -> Rule:
    """The bias was broadcast over the batch; its cotangent still has the batch."""
    return _dense_rule(right, "another shape")


@broken("raises", _dense_args, "raises", checks=_STRUCTURE)
def dense_whose_bwd_raises(right: bool) -> Rule:
    """An error of the rule's own."""
    return _dense_rule(right, "raises")


@broken("NaN", _dense_args, "NaN gradient", checks=("derivative",))
def dense_whose_bias_is_nan(right: bool) -> Rule:
    """A finite value with a gradient that is not."""
    return _dense_rule(right, "NaN")


@broken("form of fwd", _dense_args, "malformed fwd", checks=_STRUCTURE, part="fwd")
def dense_whose_fwd_keeps_nothing(right: bool) -> Rule:
    """The output alone, where a pair of output and residuals is wanted."""
    return _dense_rule(right, "fwd is no pair")


@broken("form of fwd", _dense_args, "malformed fwd", checks=_STRUCTURE,
        part="fwd")  # fmt: skip
def dense_whose_fwd_returns_a_dict(right: bool) -> Rule:
    """The function returns an array."""
    return _dense_rule(right, "fwd returns another tree")


@broken("form of fwd", _dense_args, "malformed fwd", checks=_STRUCTURE,
        part="fwd")  # fmt: skip
def dense_whose_fwd_returns_one_row(right: bool) -> Rule:
    """The function returns them all."""
    return _dense_rule(right, "fwd returns another shape")


@broken("leaked tracer", lambda: (normal(0, 6),), "leaks a traced value",
        checks=("scan", "vmap", "remat", "structure", "repeat"),
        part="bwd")  # fmt: skip
def sine_that_keeps_its_input_in_a_global(right: bool) -> Rule:
    """Right eagerly and under jit; in a loop the kept value is another trace's."""
    memory: list[jax.Array] = []

    def sine(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    def fwd(x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        memory[:] = [] if right else [x]
        return jnp.sin(x), x if right else None

    def bwd(x: jax.Array | None, g: jax.Array) -> Args:
        return (g * jnp.cos(memory[0] if x is None else x),)

    return with_vjp(sine, fwd, bwd)


@broken("shape of a tangent", lambda: (normal(0, 4, 3), normal(1, 3)),
        "malformed jvp", checks=_STRUCTURE, part="jvp")  # fmt: skip
def product_whose_tangent_is_not_reduced(right: bool) -> Rule:
    """The value is a sum over rows, the tangent is one for each."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.sum(x @ w)

    def jvp(primals: Args, tangents: Args) -> Args:
        (x, w), (dx, dw) = primals, tangents
        moved = dx @ w + x @ dw
        return jnp.sum(x @ w), moved.sum() if right else moved

    return with_jvp(product, jvp)


@broken("form of jvp", lambda: (normal(0, 6),), "malformed jvp", checks=_STRUCTURE,
        part="jvp")  # fmt: skip
def sine_whose_jvp_is_no_pair(right: bool) -> Rule:
    """The tangent without the value."""

    def sine(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    def jvp(primals: Args, tangents: Args) -> PyTree:
        (x,), (dx,) = primals, tangents
        moved = jnp.cos(x) * dx
        return (jnp.sin(x), moved) if right else moved

    return with_jvp(sine, jvp)


MALFORMED_RULES = (
    dense_that_returns_too_few,
    dense_that_returns_too_many,
    dense_that_returns_a_bare_array,
    dense_that_returns_a_tuple_for_a_dict,
    dense_that_returns_no_bias,
    dense_that_does_not_sum_its_bias,
    dense_whose_bwd_raises,
    dense_whose_bias_is_nan,
    dense_whose_fwd_keeps_nothing,
    dense_whose_fwd_returns_a_dict,
    dense_whose_fwd_returns_one_row,
    sine_that_keeps_its_input_in_a_global,
    product_whose_tangent_is_not_reduced,
    sine_whose_jvp_is_no_pair,
)
