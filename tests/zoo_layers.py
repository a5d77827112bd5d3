"""Broken rules of layers: normalisation, activations, gates, dense."""

import jax
import jax.numpy as jnp

from tests.zoo_entry import Args, PyTree, Rule, broken, normal, with_vjp

_EPSILON = 1e-6


def _batch() -> Args:
    return (normal(0, 6, 8),)


def _batch_and_scale() -> Args:
    return normal(0, 6, 8), 1 + normal(1, 8) / 4


def _inverse_rms(x: jax.Array) -> jax.Array:
    return jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + _EPSILON)


@broken("dropped term", _batch_and_scale, "missing term")
def rms_norm_without_projection(right: bool) -> Rule:
    """What flows back through the norm itself is forgotten."""

    def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * _inverse_rms(x) * scale

    def fwd(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, Args]:
        return rms_norm(x, scale), (x, scale)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, scale = kept
        inverse = _inverse_rms(x)
        normed, pulled = x * inverse, g * scale
        radial = normed * jnp.mean(pulled * normed, -1, keepdims=True)
        dx = inverse * (pulled - radial if right else pulled)
        return dx, jnp.sum(g * normed, 0)

    return with_vjp(rms_norm, fwd, bwd)


@broken("wrong for batches above 1", _batch_and_scale, "missing sum",
        looks_right_at=lambda: (normal(0, 1, 8), 1 + normal(1, 8) / 4))  # fmt: skip
def rms_norm_scale_of_the_first_row(right: bool) -> Rule:
    """The scale's cotangent is that of one row of the batch."""

    def rms_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return x * _inverse_rms(x) * scale

    def fwd(x: jax.Array, scale: jax.Array) -> tuple[jax.Array, Args]:
        return rms_norm(x, scale), (x, scale)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, scale = kept
        inverse = _inverse_rms(x)
        normed, pulled = x * inverse, g * scale
        radial = normed * jnp.mean(pulled * normed, -1, keepdims=True)
        d_scale = g * normed
        return inverse * (pulled - radial), d_scale.sum(0) if right else d_scale[0]

    return with_vjp(rms_norm, fwd, bwd)


@broken("dropped term", _batch, "missing term")
def layer_norm_without_the_mean(right: bool) -> Rule:
    """The cotangent is projected off the direction, and not off the constant."""

    def standardise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        centred = x - jnp.mean(x, -1, keepdims=True)
        inverse = _inverse_rms(centred)
        return centred * inverse, inverse

    def layer_norm(x: jax.Array) -> jax.Array:
        return standardise(x)[0]

    def bwd(kept: Args, g: jax.Array) -> Args:
        normed, inverse = kept
        pulled = g - normed * jnp.mean(g * normed, -1, keepdims=True)
        if right:
            pulled = pulled - jnp.mean(g, -1, keepdims=True)
        return (inverse * pulled,)

    def fwd(x: jax.Array) -> tuple[jax.Array, Args]:
        normed, inverse = standardise(x)
        return normed, (normed, inverse)

    return with_vjp(layer_norm, fwd, bwd)


@broken("statistics taken for constants", _batch, "missing term")
def batch_norm_with_constant_statistics(right: bool) -> Rule:
    """In training mode the mean and the variance depend on the batch as well."""

    def batch_norm(x: jax.Array) -> jax.Array:
        centred = x - x.mean(0)
        return centred * jax.lax.rsqrt(jnp.mean(centred * centred, 0))

    def fwd(x: jax.Array) -> tuple[jax.Array, Args]:
        return batch_norm(x), (batch_norm(x), jax.lax.rsqrt(jnp.var(x, 0)))

    def bwd(kept: Args, g: jax.Array) -> Args:
        normed, inverse = kept
        through = jnp.mean(g, 0) + normed * jnp.mean(g * normed, 0)
        return (inverse * (g - through if right else g),)

    return with_vjp(batch_norm, fwd, bwd)


@broken("dropped term", lambda: (normal(0, 5, 4), normal(1, 5, 4)), "missing term")
def swiglu_without_the_slope_of_its_sigmoid(right: bool) -> Rule:
    """The gate's own factor is counted, its sigmoid's slope is not."""

    def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
        return gate * jax.lax.logistic(gate) * up

    def fwd(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Args]:
        return swiglu(gate, up), (gate, up)

    def bwd(kept: Args, g: jax.Array) -> Args:
        gate, up = kept
        open_part = jax.lax.logistic(gate)
        slope = open_part
        if right:
            slope = open_part * (1 + gate * (1 - open_part))
        return g * up * slope, g * gate * open_part

    return with_vjp(swiglu, fwd, bwd)


@broken("swapped residuals", lambda: (normal(0, 5, 4), normal(1, 5, 4)),
        "operands swapped")  # fmt: skip
def swiglu_with_swapped_residuals(right: bool) -> Rule:
    """The backward pass unpacks what the forward kept in the other order."""

    def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
        return gate * jax.lax.logistic(gate) * up

    def fwd(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, Args]:
        return swiglu(gate, up), (gate, up) if right else (up, gate)

    def bwd(kept: Args, g: jax.Array) -> Args:
        gate, up = kept
        open_part = jax.lax.logistic(gate)
        slope = open_part * (1 + gate * (1 - open_part))
        return g * up * slope, g * gate * open_part

    return with_vjp(swiglu, fwd, bwd)


@broken("cotangents swapped", lambda: (normal(0, 5, 4), normal(1, 5, 4)),
        "leaves swapped")  # fmt: skip
def bilinear_gate_with_swapped_cotangents(right: bool) -> Rule:
    """Each factor gets the other one's cotangent."""

    def gated(x: jax.Array, gate: jax.Array) -> jax.Array:
        return x * jnp.tanh(gate)

    def fwd(x: jax.Array, gate: jax.Array) -> tuple[jax.Array, Args]:
        return gated(x, gate), (x, jnp.tanh(gate))

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, opening = kept
        dx, d_gate = g * opening, g * x * (1 - opening**2)
        return (dx, d_gate) if right else (d_gate, dx)

    return with_vjp(gated, fwd, bwd)


@broken("another function's derivative", _batch, "wrong slope")
def tanh_gelu_with_the_exact_slope(right: bool) -> Rule:
    """The forward pass is the approximation, the backward pass is exact: 1e-3 off."""
    root = (2 / jnp.pi) ** 0.5

    def gelu(x: jax.Array) -> jax.Array:
        return 0.5 * x * (1 + jnp.tanh(root * (x + 0.044715 * x**3)))

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        if right:
            t = jnp.tanh(root * (x + 0.044715 * x**3))
            inner = root * (1 + 3 * 0.044715 * x**2)
            return (g * 0.5 * (1 + t + x * (1 - t**2) * inner),)
        density = jnp.exp(-0.5 * x**2) / (2 * jnp.pi) ** 0.5
        return (g * (0.5 * (1 + jax.lax.erf(x / 2**0.5)) + x * density),)

    return with_vjp(gelu, lambda x: (gelu(x), x), bwd)


@broken("wrong on one side only", _batch, "wrong on one branch")
def leaky_relu_with_a_squared_slope(right: bool) -> Rule:
    """The negative side is scaled in the forward pass and twice in the backward."""

    def leaky_relu(x: jax.Array) -> jax.Array:
        return jnp.where(x > 0, x, 0.1 * x)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        return (jnp.where(x > 0, g, (0.1 if right else 0.01) * g),)

    return with_vjp(leaky_relu, lambda x: (leaky_relu(x), x), bwd)


@broken("clipped entries only", _batch, "wrong on one branch",
        looks_right_at=lambda: (normal(0, 6, 8) / 8,))  # fmt: skip
def clip_that_leaks_outside(right: bool) -> Rule:
    """Entries outside of the bounds get the cotangent too."""

    def clip(x: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.maximum(x, -1), 1)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        return (jnp.where(jnp.abs(x) < 1, g, 0) if right else g,)

    return with_vjp(clip, lambda x: (clip(x), x), bwd)


def _dense_args() -> Args:
    return normal(0, 6, 4), {"w": normal(1, 4, 4) / 2, "b": normal(2, 4)}


def _dense(x: jax.Array, params: PyTree) -> jax.Array:
    return jnp.tanh(x @ params["w"] + params["b"])


def _dense_rule(right: bool, mistake: str) -> Rule:
    """A dense layer with its parameters in a dict, wrong in one of them."""

    def dense(x: jax.Array, params: PyTree) -> jax.Array:
        return _dense(x, params)

    def fwd(x: jax.Array, params: PyTree) -> tuple[jax.Array, Args]:
        y = _dense(x, params)
        return y, (x, params, y)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, params, y = kept
        dz = g * (1 - y * y)
        dx, dw, db = dz @ params["w"].T, x.T @ dz, dz.sum(0)
        if not right:
            dw = {"transposed": dz.T @ x, "first": x[:1].T @ dz[:1]}.get(mistake, dw)
            db = {"zero": jnp.zeros_like(db), "mean": dz.mean(0)}.get(mistake, db)
            dx = {"untransposed": dz @ params["w"]}.get(mistake, dx)
        return dx, {"w": dw, "b": db}

    return with_vjp(dense, fwd, bwd)


@broken("wrong transpose", _dense_args, "transposed")
def dense_with_a_transposed_weight(right: bool) -> Rule:
    """The kernel is square, so that no shape gives the mistake away."""
    return _dense_rule(right, "transposed")


@broken("wrong transpose", _dense_args, "transposed")
def dense_that_does_not_transpose_its_kernel(right: bool) -> Rule:
    """The input's cotangent goes through the kernel in the forward direction."""
    return _dense_rule(right, "untransposed")


@broken("zero leaf", _dense_args, "zero gradient")
def dense_without_a_gradient_of_the_bias(right: bool) -> Rule:
    """The bias is the only leaf without a gradient."""
    return _dense_rule(right, "zero")


@broken("factor: the batch", _dense_args, "constant factor")
def dense_with_the_mean_of_the_bias(right: bool) -> Rule:
    """The bias sums over the batch; its mean is as many times too small."""
    return _dense_rule(right, "mean")


@broken("wrong for batches above 1", _dense_args, "missing sum",
        looks_right_at=lambda: (normal(0, 1, 4), _dense_args()[1]))  # fmt: skip
def dense_with_the_first_row_of_the_kernel(right: bool) -> Rule:
    """The kernel's cotangent sees one example of the batch."""
    return _dense_rule(right, "first")


def _column() -> jax.Array:
    """A column of numbers above 1, whose logarithms are not small."""
    return 1.5 + normal(3, 5, 1) ** 2


@broken("missing sum over a broadcast axis", lambda: (normal(0, 5, 8), _column()),
        "missing sum")  # fmt: skip
def scaled_rows_without_the_sum(right: bool) -> Rule:
    """A column was broadcast over the features; only the first of them counts."""

    def scaled(x: jax.Array, column: jax.Array) -> jax.Array:
        return x * jnp.log(column)

    def fwd(x: jax.Array, column: jax.Array) -> tuple[jax.Array, Args]:
        return scaled(x, column), (x, column)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, column = kept
        spread = g * x / column
        summed = spread.sum(1, keepdims=True) if right else spread[:, :1]
        return g * jnp.log(column), summed

    return with_vjp(scaled, fwd, bwd)


LAYERS = (
    rms_norm_without_projection,
    rms_norm_scale_of_the_first_row,
    layer_norm_without_the_mean,
    batch_norm_with_constant_statistics,
    swiglu_without_the_slope_of_its_sigmoid,
    swiglu_with_swapped_residuals,
    bilinear_gate_with_swapped_cotangents,
    tanh_gelu_with_the_exact_slope,
    leaky_relu_with_a_squared_slope,
    clip_that_leaks_outside,
    dense_with_a_transposed_weight,
    dense_that_does_not_transpose_its_kernel,
    dense_without_a_gradient_of_the_bias,
    dense_with_the_mean_of_the_bias,
    dense_with_the_first_row_of_the_kernel,
    scaled_rows_without_the_sum,
)
