"""Broken rules of losses, reductions and norms."""

import jax
import jax.numpy as jnp

from tests.zoo_entry import Args, Fn, PyTree, Rule, broken, integers, normal, with_vjp


def _logits_and_labels() -> Args:
    return normal(0, 6, 5), integers(1, 5, 6)


def _softmax(x: jax.Array) -> jax.Array:
    shifted = jnp.exp(x - jax.lax.stop_gradient(x.max(-1, keepdims=True)))
    return shifted / shifted.sum(-1, keepdims=True)


def _cross_entropy_rule(right: bool, mistake: str) -> Rule:
    """The mean cross-entropy of integer labels, wrong in one step of its gradient."""

    def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
        chosen = jnp.take_along_axis(_softmax(logits), labels[:, None], -1)
        return -jnp.mean(jnp.log(chosen))

    def fwd(logits: jax.Array, labels: jax.Array) -> tuple[jax.Array, Args]:
        return cross_entropy(logits, labels), (_softmax(logits), labels)

    def bwd(kept: Args, g: jax.Array) -> Args:
        probabilities, labels = kept
        gap = probabilities - jax.nn.one_hot(labels, probabilities.shape[-1])
        d_logits = g * gap / len(labels)
        if right:
            return d_logits, None
        wrong = {
            "sign": -d_logits,
            "batch": g * gap,
            "ignored": gap / len(labels),
            "scaled": 128 * d_logits,
        }
        return wrong[mistake], None

    return with_vjp(cross_entropy, fwd, bwd)


@broken("sign", _logits_and_labels, "sign flipped")
def cross_entropy_with_flipped_sign(right: bool) -> Rule:
    """Labels minus probabilities in place of the reverse."""
    return _cross_entropy_rule(right, "sign")


@broken("factor: the batch", _logits_and_labels, "constant factor",
        looks_right_at=lambda: (normal(0, 1, 5), jnp.array([3])))  # fmt: skip
def cross_entropy_of_the_sum(right: bool) -> Rule:
    """The value is a mean over the batch, the gradient that of a sum."""
    return _cross_entropy_rule(right, "batch")


@broken("factor: a loss scale", _logits_and_labels, "constant factor")
def cross_entropy_with_a_loss_scale_left_in(right: bool) -> Rule:
    """The gradient is multiplied for half precision and never divided again."""
    return _cross_entropy_rule(right, "scaled")


@broken("not linear in the cotangent", _logits_and_labels,
        "not linear in the cotangent",
        checks=("linear", "zero cotangent", "derivative"))  # fmt: skip
def cross_entropy_that_ignores_its_cotangent(right: bool) -> Rule:
    """Right under `jax.grad`, which asks with 1, and wrong in any larger loss."""
    return _cross_entropy_rule(right, "ignored")


def _scores_and_targets() -> Args:
    return normal(0, 8), integers(1, 2, 8)


@broken("positive examples only", _scores_and_targets, "wrong on one branch")
def weighted_binary_loss_without_its_weight(right: bool) -> Rule:
    """The weight of positive examples is in the value alone."""

    def loss(scores: jax.Array, targets: jax.Array) -> jax.Array:
        weight = jnp.where(targets == 1, 3.0, 1.0)
        signed = jnp.where(targets == 1, scores, -scores)
        return jnp.sum(weight * jnp.log1p(jnp.exp(-signed)))

    def fwd(scores: jax.Array, targets: jax.Array) -> tuple[jax.Array, Args]:
        return loss(scores, targets), (scores, targets)

    def bwd(kept: Args, g: jax.Array) -> Args:
        scores, targets = kept
        weight = jnp.where(targets == 1, 3.0 if right else 1.0, 1.0)
        return g * weight * (jax.lax.logistic(scores) - targets), None

    return with_vjp(loss, fwd, bwd)


@broken("outside of the quadratic part only", lambda: (3 * normal(0, 12),),
        "wrong on one branch", looks_right_at=lambda: (normal(0, 12) / 8,))  # fmt: skip
def huber_loss_with_a_unit_slope(right: bool) -> Rule:
    """The outer slope is delta, and 1 only where delta is."""
    delta = 1.5

    def huber(x: jax.Array) -> jax.Array:
        size = jnp.abs(x)
        return jnp.where(size < delta, x * x / 2, delta * (size - delta / 2))

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        outer = (delta if right else 1) * jnp.sign(x)
        return (g * jnp.where(jnp.abs(x) < delta, x, outer),)

    return with_vjp(huber, lambda x: (huber(x), x), bwd)


@broken("factor: 2", lambda: (normal(0, 3, 4),), "constant factor")
def energy_with_twice_its_gradient(right: bool) -> Rule:
    """The half in front of the square is forgotten."""

    def energy(x: jax.Array) -> jax.Array:
        return jnp.sum(x * x) / 2

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        return ((1 if right else 2) * g * x,)

    return with_vjp(energy, lambda x: (energy(x), x), bwd)


@broken("factor: 1/2", lambda: (normal(0, 4), normal(1, 4)), "constant factor")
def squared_distance_with_half_its_gradient(right: bool) -> Rule:
    """The square's 2 is forgotten in both arguments."""

    def distance(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.sum((x - y) ** 2)

    def bwd(gap: jax.Array, g: jax.Array) -> Args:
        dx = (2 if right else 1) * g * gap
        return dx, -dx

    return with_vjp(distance, lambda x, y: (distance(x, y), x - y), bwd)


def _rows() -> Args:
    return (normal(0, 4, 6),)


@broken("dropped term", _rows, "missing term")
def unit_rows_without_projection(right: bool) -> Rule:
    """The length is taken for a constant."""

    def unit(x: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))

    def fwd(x: jax.Array) -> tuple[jax.Array, Args]:
        return unit(x), (unit(x), jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)))

    def bwd(kept: Args, g: jax.Array) -> Args:
        y, length = kept
        along = y * jnp.sum(g * y, -1, keepdims=True)
        return ((g - along if right else g) / length,)

    return with_vjp(unit, fwd, bwd)


@broken("unnormalised residual", _rows, "factor by rows")
def log_sum_exp_with_unnormalised_weights(right: bool) -> Rule:
    """The weights are exp(x - max), which do not add up to 1."""

    def log_sum_exp(x: jax.Array) -> jax.Array:
        peak = jax.lax.stop_gradient(x.max(-1))
        return peak + jnp.log(jnp.sum(jnp.exp(x - peak[:, None]), -1))

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        weights = jnp.exp(x - x.max(-1, keepdims=True))
        if right:
            weights = weights / weights.sum(-1, keepdims=True)
        return (g[:, None] * weights,)

    return with_vjp(log_sum_exp, lambda x: (log_sum_exp(x), x), bwd)


def _values_and_mask() -> Args:
    return normal(0, 9), jnp.array([1, 1, 1, 0, 1, 1, 0, 0, 1], bool)


def _masked_mean_rule(right: bool, mistake: str) -> Rule:
    def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mask, x, 0) ** 2) / jnp.sum(mask)

    def fwd(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, Args]:
        return masked_mean(x, mask), (x, mask)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, mask = kept
        by_count = right or mistake != "count"
        count = jnp.sum(mask) if by_count else mask.size
        dx = 2 * g * x / count
        return jnp.where(mask, dx, 0) if right or mistake != "mask" else dx, None

    return with_vjp(masked_mean, fwd, bwd)


@broken("factor: the padded length", _values_and_mask, "constant factor")
def masked_mean_over_the_padded_length(right: bool) -> Rule:
    """The gradient divides by the length and not by the number of real entries."""
    return _masked_mean_rule(right, "count")


@broken("padded entries only", _values_and_mask, "padded entries get gradient",
        looks_right_at=lambda: (normal(0, 9), jnp.ones(9, bool)))  # fmt: skip
def masked_mean_that_leaks_into_the_padding(right: bool) -> Rule:
    """Padded entries get a gradient."""
    return _masked_mean_rule(right, "mask")


@broken("an output's cotangent ignored", lambda: (normal(0, 7),),
        "missing term", "dropped term")  # fmt: skip
def moments_that_ignore_the_second(right: bool) -> Rule:
    """One of two outputs sends nothing back."""

    def moments(x: jax.Array) -> Args:
        return jnp.mean(x), jnp.mean(x * x)

    def bwd(x: jax.Array, gs: Args) -> Args:
        g_mean, g_square = gs
        second = 2 * g_square * x if right else 0 * x
        return ((g_mean + second) / x.size,)

    return with_vjp(moments, lambda x: (moments(x), x), bwd)


@broken("an output's cotangent ignored", _rows, "dropped term")
def routing_that_ignores_its_weights(right: bool) -> Rule:
    """The outputs are a dict; the loss through the auxiliary one is lost."""

    def route(x: jax.Array) -> PyTree:
        weights = _softmax(x)
        return {"mixed": weights * x, "load": weights.mean(0)}

    def bwd(x: jax.Array, g: PyTree) -> Args:
        weights = _softmax(x)
        d_weights = g["mixed"] * x
        if right:
            d_weights = d_weights + g["load"] / x.shape[0]
        mean = jnp.sum(weights * d_weights, -1, keepdims=True)
        return (g["mixed"] * weights + weights * (d_weights - mean),)

    return with_vjp(route, lambda x: (route(x), x), bwd)


def _cubed(rule: Rule) -> Fn:
    return lambda x: rule(x, 3)


@broken("static argument", lambda: (normal(0, 5),), "extra factor", program=_cubed)
def power_with_the_old_exponent(right: bool) -> Rule:
    """The exponent is a `nondiff_argnums` argument, and not lowered by 1."""

    def power(x: jax.Array, exponent: int) -> jax.Array:
        return x**exponent

    def fwd(x: jax.Array, exponent: int) -> tuple[jax.Array, jax.Array]:
        return x**exponent, x

    def bwd(exponent: int, x: jax.Array, g: jax.Array) -> Args:
        return (g * exponent * x ** (exponent - 1 if right else exponent),)

    return with_vjp(power, fwd, bwd, nondiff_argnums=(1,))


@broken("conjugate", lambda: (normal(0, 5, dtype=jnp.complex64),), "conjugate")
def squared_modulus_without_conjugate(right: bool) -> Rule:
    """JAX's gradient of a real function is df/dx - i df/dy."""

    def squared_modulus(z: jax.Array) -> jax.Array:
        return z.real**2 + z.imag**2

    def bwd(z: jax.Array, g: jax.Array) -> Args:
        return (2 * g * (jnp.conj(z) if right else z),)

    return with_vjp(squared_modulus, lambda z: (squared_modulus(z), z), bwd)


def _complex_dense() -> Args:
    return tuple(normal(s, 3, 3, dtype=jnp.complex64) for s in (0, 1))


@broken("conjugate", _complex_dense, "conjugate")
def complex_dense_with_the_adjoint(right: bool) -> Rule:
    """The transpose is wanted, not the conjugate transpose."""

    def dense(x: jax.Array, w: jax.Array) -> jax.Array:
        return x @ w

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, w = kept
        return g @ (w.T if right else jnp.conj(w.T)), x.T @ g

    return with_vjp(dense, lambda x, w: (x @ w, (x, w)), bwd)


LOSSES = (
    cross_entropy_with_flipped_sign,
    cross_entropy_of_the_sum,
    cross_entropy_with_a_loss_scale_left_in,
    cross_entropy_that_ignores_its_cotangent,
    weighted_binary_loss_without_its_weight,
    huber_loss_with_a_unit_slope,
    energy_with_twice_its_gradient,
    squared_distance_with_half_its_gradient,
    unit_rows_without_projection,
    log_sum_exp_with_unnormalised_weights,
    masked_mean_over_the_padded_length,
    masked_mean_that_leaks_into_the_padding,
    moments_that_ignore_the_second,
    routing_that_ignores_its_weights,
    power_with_the_old_exponent,
    squared_modulus_without_conjugate,
    complex_dense_with_the_adjoint,
)
