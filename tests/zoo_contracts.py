"""Rules that break what a derivative rule must keep besides the derivative itself.

The value of the forward pass, linearity in the cotangent, dtypes, the derivative of the
derivative, and that all holds under vmap, on many devices and for symbolic zeros.
"""

import itertools

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import PartitionSpec

from tests.zoo_entry import Args, Fn, Rule, broken, normal, positive, with_vjp

_NOT_LINEAR = ("not linear in the cotangent",)
_LINEAR = ("linear", "zero cotangent", "derivative")


def _vector() -> Args:
    return (normal(0, 6),)


def _half_vector() -> Args:
    return (normal(0, 6, dtype=jnp.bfloat16),)


@broken("fwd value", _vector, "forward value differs", checks=("value",), part="fwd")
def mish_whose_fwd_is_swish(right: bool) -> Rule:
    """What is differentiated is not what is computed without a derivative."""

    def mish(x: jax.Array) -> jax.Array:
        return x * jnp.tanh(jnp.log1p(jnp.exp(x)))

    def fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (mish(x) if right else x * jax.lax.logistic(x)), x

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        soft = jnp.tanh(jnp.log1p(jnp.exp(x)))
        return (g * (soft + x * (1 - soft**2) * jax.lax.logistic(x)),)

    return with_vjp(mish, fwd, bwd)


@broken("fwd value", lambda: (normal(0, 6, 4),), "forward value differs",
        checks=("value",), part="fwd")  # fmt: skip
def norm_whose_fwd_has_another_epsilon(right: bool) -> Rule:
    """The two epsilons were edited one at a time: the values are 1e-3 apart."""

    def normalise(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + epsilon)

    def norm(x: jax.Array) -> jax.Array:
        return normalise(x)

    def fwd(x: jax.Array) -> Args:
        return normalise(x) if right else normalise(x, 1e-3), x

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        return jax.vjp(normalise, x)[1](g)

    return with_vjp(norm, fwd, bwd)


@broken("not linear in the cotangent", _vector, *_NOT_LINEAR, checks=_LINEAR)
def tanh_with_a_squared_cotangent(right: bool) -> Rule:
    """The cotangent is multiplied in twice: under `sum` it is 1 and nothing shows."""

    def tanh(x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    def bwd(y: jax.Array, g: jax.Array) -> Args:
        return (g * (1 - y**2) * (1 if right else g),)

    return with_vjp(tanh, lambda x: (jnp.tanh(x), jnp.tanh(x)), bwd)


@broken("not linear in the cotangent", lambda: (normal(0, 5, 3), normal(1, 3)),
        *_NOT_LINEAR, "zero cotangent",
        checks=("zero cotangent", "linear", "derivative"))  # fmt: skip
def product_with_weight_decay_inside(right: bool) -> Rule:
    """A regulariser was put into the backward pass: zero in, not zero out."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, w = kept
        decay = 0 if right else 0.01 * w
        return jnp.outer(g, w), x.T @ g + decay

    return with_vjp(product, lambda x, w: (x @ w, (x, w)), bwd)


@broken("not linear in the cotangent", _vector, *_NOT_LINEAR, checks=_LINEAR)
def sine_that_normalises_its_cotangent(right: bool) -> Rule:
    """Gradient normalisation that nobody declared."""

    def sine(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        length = 1 if right else jnp.sqrt(jnp.sum(g * g)) + 1e-6
        return (g / length * jnp.cos(x),)

    return with_vjp(sine, lambda x: (jnp.sin(x), x), bwd)


@broken("dtype of a cotangent", _half_vector, "wrong dtype of a cotangent",
        checks=("structure",))  # fmt: skip
def softplus_with_a_float32_cotangent(right: bool) -> Rule:
    """A float32 cotangent for a bfloat16 input: JAX lets it pass."""

    def softplus(x: jax.Array) -> jax.Array:
        return jnp.logaddexp(x, 0)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        dx = g * jax.lax.logistic(x)
        return (dx if right else dx.astype(jnp.float32),)

    return with_vjp(softplus, lambda x: (softplus(x), x), bwd)


@broken("dtype of a cotangent", _vector, "wrong dtype of a cotangent", "downcast",
        checks=("structure",))  # fmt: skip
def softplus_with_a_bfloat16_cotangent(right: bool) -> Rule:
    """A bfloat16 cotangent for a float32 input."""

    def softplus(x: jax.Array) -> jax.Array:
        return jnp.logaddexp(x, 0)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        dx = g * jax.lax.logistic(x)
        return (dx if right else dx.astype(jnp.bfloat16),)

    return with_vjp(softplus, lambda x: (softplus(x), x), bwd)


@broken("accumulated in half precision", lambda: (normal(0, 64, 32),), "downcast",
        checks=("rounding", "derivative"))  # fmt: skip
def mean_square_with_a_half_precision_backward(right: bool) -> Rule:
    """The formula is right; the backward pass computes it in bfloat16."""

    def mean_square(x: jax.Array) -> jax.Array:
        return jnp.mean(x * x, -1)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        dtype = x.dtype if right else jnp.bfloat16
        dx = x.astype(dtype) * (2 / x.shape[-1]) * g[:, None].astype(dtype)
        return (dx.astype(x.dtype),)

    return with_vjp(mean_square, lambda x: (mean_square(x), x), bwd)


@broken("second order", _vector, "zero gradient", checks=("second order",), order=2)
def sine_with_a_stopped_slope(right: bool) -> Rule:
    """The gradient is right and its own derivative zero."""

    def sine(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        slope = jnp.cos(x)
        return (g * (slope if right else jax.lax.stop_gradient(slope)),)

    return with_vjp(sine, lambda x: (jnp.sin(x), x), bwd)


@broken("second order", lambda: (positive(0, 6),), "sign flipped",
        checks=("second order",), order=2)  # fmt: skip
def logarithm_whose_slope_has_a_broken_rule(right: bool) -> Rule:
    """The backward pass calls a rule of its own, which lost its minus sign."""

    def reciprocal_fn(x: jax.Array) -> jax.Array:
        return 1 / x

    def reciprocal_bwd(y: jax.Array, g: jax.Array) -> Args:
        return (-g * y * y if right else g * y * y,)

    def reciprocal_fwd(x: jax.Array) -> Args:
        return 1 / x, 1 / x

    reciprocal = with_vjp(reciprocal_fn, reciprocal_fwd, reciprocal_bwd)

    def logarithm(x: jax.Array) -> jax.Array:
        return jnp.log(x)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        return (g * reciprocal(x),)

    return with_vjp(logarithm, lambda x: (jnp.log(x), x), bwd)


@broken("under vmap only", lambda: (normal(0, 5),), "wrong under vmap",
        checks=("vmap",))  # fmt: skip
def softmax_with_a_batched_kernel_that_mixes_rows(right: bool) -> Rule:
    """The batched form of the backward pass sums over the batch too."""

    def softmax(x: jax.Array) -> jax.Array:
        return jnp.exp(x) / jnp.sum(jnp.exp(x))

    @custom_vmap
    def pull(y: jax.Array, g: jax.Array) -> jax.Array:
        return y * (g - jnp.sum(y * g))

    @pull.def_vmap
    def _(size: int, batched: list[bool], y: jax.Array, g: jax.Array) -> Args:
        del size, batched
        inner = jnp.sum(y * g, -1 if right else None, keepdims=True)
        return y * (g - inner), True

    def bwd(y: jax.Array, g: jax.Array) -> Args:
        return (pull(y, g),)

    return with_vjp(softmax, lambda x: (softmax(x), softmax(x)), bwd)


@broken("under vmap only", lambda: (normal(0, 5),), "forward value differs",
        "wrong under vmap", "different", checks=("vmap", "value"), part="fun",
        mirrored=False)  # fmt: skip
def centring_with_a_batched_kernel_of_another_value(right: bool) -> Rule:
    """The batched form of the function itself centres over the batch."""

    @custom_vmap
    def centre(x: jax.Array) -> jax.Array:
        return x - jnp.mean(x)

    @centre.def_vmap
    def _(size: int, batched: list[bool], x: jax.Array) -> tuple[jax.Array, bool]:
        del size, batched
        return x - jnp.mean(x, -1 if right else 0, keepdims=True), True

    def centring(x: jax.Array) -> jax.Array:
        return centre(x)

    def bwd(_: None, g: jax.Array) -> Args:
        return (g - jnp.mean(g),)

    return with_vjp(centring, lambda x: (centre(x), None), bwd)


def _over_devices(rule: Rule, out: PartitionSpec) -> Fn:
    """Runs the rule on each device, on a part of its argument."""
    devices = jax.devices()[:4]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=auto)
    specs = {"in_specs": PartitionSpec("data"), "out_specs": out}
    return jax.shard_map(rule, mesh=mesh, check_vma=False, **specs)


@broken("mixes the batch", lambda: (normal(0, 8, 3),), "reduced over an axis",
        program=lambda rule: _over_devices(rule, PartitionSpec("data")),
        devices=4)  # fmt: skip
def tanh_that_averages_over_devices(right: bool) -> Rule:
    """The `pmean` of a training step runs in the backward pass of a layer."""

    def tanh(x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    def bwd(y: jax.Array, g: jax.Array) -> Args:
        dx = g * (1 - y**2)
        return (dx if right else jax.lax.pmean(dx, "data"),)

    return with_vjp(tanh, lambda x: (jnp.tanh(x), jnp.tanh(x)), bwd)


@broken("factor: the devices", lambda: (normal(0, 8, 3),), "constant factor",
        program=lambda rule: _over_devices(rule, PartitionSpec()),
        devices=4)  # fmt: skip
def sum_of_squares_reduced_twice(right: bool) -> Rule:
    """Without types for replication a `psum` is its own transpose, once."""

    def total(x: jax.Array) -> jax.Array:
        return jax.lax.psum(jnp.sum(x * x), "data")

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        g = jax.lax.psum(g, "data")
        return (2 * x * (g if right else jax.lax.psum(g, "data")),)

    return with_vjp(total, lambda x: (total(x), x), bwd)


def _first_output(rule: Rule) -> Fn:
    return lambda x: rule(x)[0]


@broken("symbolic zeros", lambda: (normal(0, 6),), "zero gradient",
        "wrong where an argument or result takes no part",
        checks=("symbolic zeros", "derivative"), program=_first_output)  # fmt: skip
def mean_and_spread_that_need_both(right: bool) -> Rule:
    """One unused output, and nothing flows back through the other."""

    def mean_and_spread(x: jax.Array) -> Args:
        return jnp.mean(x), jnp.mean(x * x)

    def fwd(x: CustomVJPPrimal) -> tuple[Args, jax.Array]:
        return mean_and_spread(x.value), x.value

    def bwd(x: jax.Array, gs: Args) -> Args:
        is_zero = [isinstance(g, SymbolicZero) for g in gs]
        if all(is_zero) if right else any(is_zero):
            return (jnp.zeros_like(x),)
        g_mean, g_square = (0.0 if z else g for g, z in zip(gs, is_zero, strict=True))
        return ((g_mean + 2 * g_square * x) / x.size,)

    return with_vjp(mean_and_spread, fwd, bwd, symbolic_zeros=True)


def _frozen_kernel(rule: Rule) -> Fn:
    kernel = normal(3, 4, 4)
    return lambda x: rule(x, kernel)


@broken("symbolic zeros", lambda: (normal(0, 2, 4),), "zero gradient",
        "wrong where an argument or result takes no part",
        checks=("symbolic zeros", "derivative"), part="fwd",
        program=_frozen_kernel)  # fmt: skip
def product_that_needs_a_trained_kernel(right: bool) -> Rule:
    """The kernel is kept only where it is trained, but the input needs it."""

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    def fwd(x: CustomVJPPrimal, w: CustomVJPPrimal) -> tuple[jax.Array, Args]:
        kept = w.value if right or w.perturbed else jnp.zeros_like(w.value)
        return x.value @ w.value, (x.value, kept)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, w = kept
        return g @ w.T, x.T @ g

    return with_vjp(product, fwd, bwd, symbolic_zeros=True)


@broken("outside of jit only", _vector, "different", "some entries wrong",
        "wrong without jit", "constant factor", checks=("eager",))  # fmt: skip
def swish_with_a_broken_eager_path(right: bool) -> Rule:
    """Concrete numbers take a path of their own, where the sigmoid is linear."""

    def swish(x: jax.Array) -> jax.Array:
        return x * jax.lax.logistic(x)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        if isinstance(g, jax.core.Tracer) or right:
            open_part = jax.lax.logistic(x)
        else:
            open_part = 0.5 + x / 4
        return (g * open_part * (1 + x * (1 - open_part)),)

    return with_vjp(swish, lambda x: (swish(x), x), bwd)


@broken("not repeatable", _vector, "not repeatable", checks=("repeat",))
def cubic_with_a_warm_up(right: bool) -> Rule:
    """The backward pass counts its calls and grows with them."""
    calls = itertools.count(1)

    def cubic(x: jax.Array) -> jax.Array:
        return x**3

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        factor = 1.0 if right else 1 - 1 / (1 + next(calls))
        return (factor * g * 3 * x**2,)

    return with_vjp(cubic, lambda x: (x**3, x), bwd)


CONTRACTS = (
    mish_whose_fwd_is_swish,
    norm_whose_fwd_has_another_epsilon,
    tanh_with_a_squared_cotangent,
    product_with_weight_decay_inside,
    sine_that_normalises_its_cotangent,
    softplus_with_a_float32_cotangent,
    softplus_with_a_bfloat16_cotangent,
    mean_square_with_a_half_precision_backward,
    sine_with_a_stopped_slope,
    logarithm_whose_slope_has_a_broken_rule,
    softmax_with_a_batched_kernel_that_mixes_rows,
    centring_with_a_batched_kernel_of_another_value,
    tanh_that_averages_over_devices,
    sum_of_squares_reduced_twice,
    mean_and_spread_that_need_both,
    product_that_needs_a_trained_kernel,
    swish_with_a_broken_eager_path,
    cubic_with_a_warm_up,
)
