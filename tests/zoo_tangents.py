"""Broken rules of `custom_jvp`."""

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero, linear_call

from tests.zoo_entry import Args, Fn, Rule, broken, normal, positive, with_jvp

Pair = tuple[jax.Array, jax.Array]


def _two_vectors() -> Args:
    return normal(0, 6), normal(1, 6)


@broken("dropped term", _two_vectors, "zero gradient", part="jvp")
def gate_without_its_product_term(right: bool) -> Rule:
    """Of the product rule's two terms there is one."""

    def gate(x: jax.Array, y: jax.Array) -> jax.Array:
        return x * jnp.tanh(y)

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x, y), (dx, dy) = primals, tangents
        t = jnp.tanh(y)
        moved = dx * t + x * (1 - t**2) * dy
        return x * t, moved if right else dx * t

    return with_jvp(gate, jvp)


@broken("sign", lambda: (positive(0, 5), positive(1, 5)), "sign flipped", part="jvp")
def ratio_with_a_sign_wrong_in_one_argument(right: bool) -> Rule:
    """The denominator's tangent is added."""

    def ratio(x: jax.Array, y: jax.Array) -> jax.Array:
        return x / y

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x, y), (dx, dy) = primals, tangents
        second = x / y**2 * dy
        return x / y, dx / y - second if right else dx / y + second

    return with_jvp(ratio, jvp)


@broken("factor: 1/2", lambda: (normal(0, 4, 3),), "constant factor", part="jvp")
def safe_norm_with_a_half_tangent(right: bool) -> Rule:
    """The tangent of the square root without that of the square."""

    def safe_norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.sum(x * x, -1))

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x,), (dx,) = primals, tangents
        y = jnp.sqrt(jnp.sum(x * x, -1))
        along = jnp.sum(x * dx, -1) / y
        return y, along if right else along / 2

    return with_jvp(safe_norm, jvp)


@broken("exact zeros only", lambda: (jnp.array([0.0, -1.2, 0.0, 0.7, 2.0]),),
        "wrong at exact zeros", part="jvp",
        looks_right_at=lambda: (normal(0, 5),))  # fmt: skip
def sinc_without_its_limit(right: bool) -> Rule:
    """At 0 the tangent is that of the number which guards the quotient."""

    def sinc(x: jax.Array) -> jax.Array:
        safe = jnp.where(x == 0, 1, x)
        return jnp.where(x == 0, 1, jnp.sin(safe) / safe)

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x,), (dx,) = primals, tangents
        safe = jnp.where(x == 0, 1, x)
        slope = (jnp.cos(safe) - jnp.sin(safe) / safe) / safe
        return sinc(x), dx * (jnp.where(x == 0, 0, slope) if right else slope)

    return with_jvp(sinc, jvp)


@broken("wrong order of matrix products", lambda: (_matrix(),), "factors commuted",
        part="jvp")  # fmt: skip
def inverse_with_commuted_factors(right: bool) -> Rule:
    """Matrices do not commute."""

    def inverse(a: jax.Array) -> jax.Array:
        return jnp.linalg.inv(a)

    def jvp(primals: Args, tangents: Args) -> Pair:
        (a,), (da,) = primals, tangents
        y = jnp.linalg.inv(a)
        return y, -y @ da @ y if right else -y @ y @ da

    return with_jvp(inverse, jvp)


def _matrix() -> jax.Array:
    return normal(0, 3, 3) / 4 + jnp.diag(jnp.array([1.5, 2.0, 3.0]))


@broken("wrong transpose", lambda: (_matrix(),), "transposed", part="jvp")
def log_determinant_with_a_transposed_inverse(right: bool) -> Rule:
    """The trace of inverse times tangent, with the inverse transposed."""

    def log_determinant(a: jax.Array) -> jax.Array:
        return jnp.linalg.slogdet(a)[1]

    def jvp(primals: Args, tangents: Args) -> Pair:
        (a,), (da,) = primals, tangents
        y = jnp.linalg.inv(a)
        return log_determinant(a), jnp.sum((y.T if right else y) * da)

    return with_jvp(log_determinant, jvp)


@broken("value of the rule", lambda: (normal(0, 6),), "forward value differs",
        checks=("value",), part="jvp")  # fmt: skip
def softsign_whose_jvp_has_another_value(right: bool) -> Rule:
    """The first of the pair is not what the function returns."""

    def softsign(x: jax.Array) -> jax.Array:
        return x / (1 + jnp.abs(x))

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x,), (dx,) = primals, tangents
        y = softsign(x) if right else jnp.tanh(x)
        return y, dx / (1 + jnp.abs(x)) ** 2

    return with_jvp(softsign, jvp)


@broken("not linear in the tangent", lambda: (normal(0, 6),),
        "not linear in the tangent", checks=("linear", "derivative", "structure"),
        part="jvp")  # fmt: skip
def sine_with_the_size_of_its_tangent(right: bool) -> Rule:
    """The size of the tangent is no linear function, and has no transpose."""

    def sine(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x,), (dx,) = primals, tangents
        return jnp.sin(x), jnp.cos(x) * (dx if right else jnp.abs(dx))

    return with_jvp(sine, jvp)


@broken("not linear in the tangent", lambda: (normal(0, 6),),
        "not linear in the tangent", "wrong in forward mode",
        checks=("linear", "zero cotangent", "derivative"), part="jvp")  # fmt: skip
def sine_with_noise_in_its_tangent(right: bool) -> Rule:
    """A constant is added to the tangent: zero in, not zero out."""

    def sine(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x,), (dx,) = primals, tangents
        return jnp.sin(x), jnp.cos(x) * dx + (0 if right else 0.1)

    return with_jvp(sine, jvp)


def _linear_rule(right: bool, wrong_forwards: bool) -> Rule:
    """A cumulative sum whose tangent and its transpose are written by hand."""
    reverse = not right and wrong_forwards
    reverse_transpose = right or wrong_forwards

    def forwards(_: Args, x: jax.Array) -> jax.Array:
        return jax.lax.cumsum(x, reverse=reverse)

    def backwards(_: Args, g: jax.Array) -> jax.Array:
        return jax.lax.cumsum(g, reverse=reverse_transpose)

    def cumulative(x: jax.Array) -> jax.Array:
        return jax.lax.cumsum(x)

    def jvp(primals: Args, tangents: Args) -> Pair:
        moved = linear_call(forwards, backwards, (), tangents[0])
        return cumulative(*primals), moved

    return with_jvp(cumulative, jvp)


@broken("forward mode only", lambda: (normal(0, 5),), "wrong in forward mode",
        checks=("derivative", "transpose"), part="jvp")  # fmt: skip
def cumulative_sum_wrong_in_forward_mode(right: bool) -> Rule:
    """The transpose of a `linear_call` is right, and its function is not."""
    return _linear_rule(right, wrong_forwards=True)


@broken("reverse mode only", lambda: (normal(0, 5),), "wrong in reverse mode",
        checks=("derivative", "transpose"), part="jvp")  # fmt: skip
def cumulative_sum_wrong_in_reverse_mode(right: bool) -> Rule:
    """The function of a `linear_call` is right, and its transpose is not."""
    return _linear_rule(right, wrong_forwards=False)


@broken("second order", lambda: (normal(0, 6),), "zero gradient",
        checks=("second order",), part="jvp", order=2)  # fmt: skip
def softplus_with_a_stopped_slope(right: bool) -> Rule:
    """The slope is a sigmoid that nothing flows through."""

    def softplus(x: jax.Array) -> jax.Array:
        return jnp.log1p(jnp.exp(x))

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x,), (dx,) = primals, tangents
        slope = jax.lax.logistic(x)
        return softplus(x), dx * (slope if right else jax.lax.stop_gradient(slope))

    return with_jvp(softplus, jvp)


@broken("one of the rules of `defjvps`", _two_vectors, "sign flipped", part="jvps")
def phase_with_a_wrong_second_rule(right: bool) -> Rule:
    """Each argument has a rule of its own; the second has lost its sign."""

    def phase(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.arctan2(x, y)

    def first(dx: jax.Array, _: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return dx * y / (x * x + y * y)

    def second(dy: jax.Array, _: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return (-1 if right else 1) * dy * x / (x * x + y * y)

    rule = jax.custom_jvp(phase)
    rule.defjvps(first, second)
    return rule


def _with_constant_base(rule: Rule) -> Fn:
    return lambda x: rule(x, jnp.float32(2.5))


@broken("symbolic zeros", lambda: (positive(0, 5),), "zero gradient",
        "wrong where an argument or result takes no part",
        checks=("symbolic zeros", "derivative"), part="jvp",
        program=_with_constant_base)  # fmt: skip
def logarithm_that_stands_still_with_its_base(right: bool) -> Rule:
    """A base that does not move is taken for arguments that do not move."""

    def logarithm(x: jax.Array, base: jax.Array) -> jax.Array:
        return jnp.log(x) / jnp.log(base)

    def jvp(primals: Args, tangents: Args) -> Pair:
        (x, base), (dx, d_base) = primals, tangents
        y = logarithm(x, base)
        moved = jnp.zeros_like(y)
        is_still = [isinstance(d, SymbolicZero) for d in (dx, d_base)]
        if not is_still[0] and (right or not is_still[1]):
            moved = moved + dx / (x * jnp.log(base))
        if not is_still[1]:
            moved = moved - y / (base * jnp.log(base)) * d_base
        return y, moved

    return with_jvp(logarithm, jvp, symbolic_zeros=True)


TANGENTS = (
    gate_without_its_product_term,
    ratio_with_a_sign_wrong_in_one_argument,
    safe_norm_with_a_half_tangent,
    sinc_without_its_limit,
    inverse_with_commuted_factors,
    log_determinant_with_a_transposed_inverse,
    softsign_whose_jvp_has_another_value,
    sine_with_the_size_of_its_tangent,
    sine_with_noise_in_its_tangent,
    cumulative_sum_wrong_in_forward_mode,
    cumulative_sum_wrong_in_reverse_mode,
    softplus_with_a_stopped_slope,
    phase_with_a_wrong_second_rule,
    logarithm_that_stands_still_with_its_base,
)
