"""Right custom rules in unusual company: an audit has to accept every one of them.

Where the zoo's right twins are the usual rules, these are at the edges of what a rule
may take, return, keep and stand in: empty arrays, infinities, integers, kinks, loops.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name

from tests.zoo_entry import Args, Fn, Rule, integers, normal, positive, with_vjp

Made = tuple[Fn, Args]


@dataclasses.dataclass(frozen=True)
class RightRule:
    """A program whose custom rules are right.

    Attributes:
      name: Short identifier.
      make: Returns `(fn, args)`.
      rules: Names of rules that the report has to list.
    """

    name: str
    make: Callable[[], Made]
    rules: tuple[str, ...]


def right(*rules: str) -> Callable[[Callable[[], Made]], RightRule]:
    """Makes an entry of a function, named as that function is."""
    return lambda make: RightRule(make.__name__, make, rules)


def _cube(x: jax.Array) -> jax.Array:
    return x**3


def _cube_fwd(x: jax.Array) -> Args:
    return x**3, x


def _cube_rule() -> Rule:
    return with_vjp(_cube, _cube_fwd, lambda x, g: (3 * g * x**2,))


@right("_cube")
def called_with_two_shapes_and_many_times() -> Made:
    """Each shape is a program of its own; the loop calls the rule four times more."""
    cube = _cube_rule()

    def fn(x: jax.Array) -> jax.Array:
        y, _ = jax.lax.scan(lambda c, _: (cube(0.5 * c), None), x, None, length=4)
        return jnp.sum(y) + cube(jnp.mean(x)) + cube(x[0]) + jnp.sum(cube(x))

    return fn, (normal(0, 5),)


@right("_cube")
def called_in_vain() -> Made:
    """One call's result is not used, the other's is."""
    cube = _cube_rule()

    def fn(x: jax.Array) -> jax.Array:
        cube(2 * x)
        return cube(x)

    return fn, (normal(0, 5),)


@right("_cube")
def of_an_empty_array() -> Made:
    """Of no numbers nothing can be wrong; a call on more than none is beside it."""
    cube = _cube_rule()
    return lambda x: (cube(x[:0]), cube(x)), (normal(0, 5),)


@right("_cube")
def with_a_large_and_a_small_argument() -> Made:
    """Sizes of 1e8 and 1e-8 stand side by side."""
    cube = _cube_rule()
    return lambda x, y: (cube(x), cube(y)), (1e8 * normal(0, 4), 1e-8 * normal(1, 4))


@right("_cube")
def vmapped_over_one_of_its_callers_arguments() -> Made:
    """The other one is not batched."""
    cube = _cube_rule()

    def row(x: jax.Array, w: jax.Array) -> jax.Array:
        return cube(x) @ cube(w)

    return jax.vmap(row, in_axes=(0, None)), (normal(0, 4, 3), normal(1, 3, 2))


@right("scaled")
def with_none_a_number_and_a_keyword() -> Made:
    """An argument is None, one a Python number, one is passed by name."""

    @jax.custom_vjp
    def scaled(x: jax.Array, bias: jax.Array | None, factor: float) -> jax.Array:
        return x * factor if bias is None else x * factor + bias

    def fwd(x: jax.Array, bias: jax.Array | None, factor: float) -> Args:
        return scaled(x, bias, factor), (x, factor)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, factor = kept
        return g * factor, None, jnp.sum(g * x)

    scaled.defvjp(fwd, bwd)
    return lambda x: scaled(x, None, factor=2.5), (normal(0, 5),)


class _Top(NamedTuple):
    value: jax.Array
    index: jax.Array
    is_positive: jax.Array


@right("top")
def with_integer_and_boolean_results() -> Made:
    """Only one of three results has a cotangent."""

    def top(x: jax.Array) -> _Top:
        return _Top(jnp.max(x, -1), jnp.argmax(x, -1), jnp.max(x, -1) > 0)

    def fwd(x: jax.Array) -> tuple[_Top, Args]:
        return top(x), (jnp.argmax(x, -1), jnp.zeros_like(x))

    def bwd(kept: Args, g: _Top) -> Args:
        index, empty = kept
        return (empty.at[jnp.arange(len(index)), index].set(g.value),)

    return with_vjp(top, fwd, bwd), (normal(0, 4, 6),)


@right("masked_softmax")
def of_logits_with_infinities() -> Made:
    """Masked scores are minus infinity, where nothing moves."""

    def masked_softmax(x: jax.Array) -> jax.Array:
        shifted = jnp.exp(x - x.max(-1, keepdims=True))
        return shifted / shifted.sum(-1, keepdims=True)

    def fwd(x: jax.Array) -> Args:
        return masked_softmax(x), masked_softmax(x)

    def bwd(y: jax.Array, g: jax.Array) -> Args:
        return (y * (g - jnp.sum(y * g, -1, keepdims=True)),)

    rule = with_vjp(masked_softmax, fwd, bwd)

    def fn(x: jax.Array) -> jax.Array:
        seen = jnp.tril(jnp.ones((5, 5), bool))
        return rule(jnp.where(seen, x, -jnp.inf))

    return fn, (normal(0, 5, 5),)


@right("relu")
def at_its_kink() -> Made:
    """At 0 any slope from 0 to 1 would do."""

    def relu(x: jax.Array) -> jax.Array:
        return jnp.maximum(x, 0)

    rule = with_vjp(relu, lambda x: (relu(x), x), lambda x, g: (g * (x > 0),))
    return rule, (jnp.array([0.0, -1.0, 2.0, 0.0, 0.5]),)


@right("clipped")
def exactly_at_its_bounds() -> Made:
    """Saturated inputs are often equal to the bound."""

    def clipped(x: jax.Array) -> jax.Array:
        return jnp.minimum(jnp.maximum(x, -1), 1)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        return (jnp.where(jnp.abs(x) <= 1, g, 0),)

    rule = with_vjp(clipped, lambda x: (clipped(x), x), bwd)
    return rule, (jnp.array([1.0, -1.0, 0.3, 4.0, -2.0]),)


@right("fixed_point")
def of_a_loop_without_reverse_mode() -> Made:
    """The primal is a `while` loop; the rule is the implicit derivative."""

    def solve(a: jax.Array) -> jax.Array:
        def step(state: Args) -> Args:
            count, x = state
            return count + 1, jnp.cos(a * x)

        # Settled to the last bit it may swing between two of them, so it is counted.
        start = 0, jnp.zeros_like(a)
        return jax.lax.while_loop(lambda state: state[0] < 200, step, start)[1]

    def fixed_point(a: jax.Array) -> jax.Array:
        return solve(a)

    def fwd(a: jax.Array) -> Args:
        x = solve(a)
        return x, (a, x)

    def bwd(kept: Args, g: jax.Array) -> Args:
        a, x = kept
        slope = -jnp.sin(a * x)
        return (g * slope * x / (1 - slope * a),)

    return with_vjp(fixed_point, fwd, bwd), (positive(0, 4) / 2,)


@right("root")
def of_a_bisection() -> Made:
    """Autodiff of the primal says zero; only differences know better."""

    def root(a: jax.Array) -> jax.Array:
        def halve(_: int, bounds: Args) -> Args:
            low, high = bounds
            middle = (low + high) / 2
            is_low = middle**3 + middle < a
            return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

        start = jnp.full_like(a, -4), jnp.full_like(a, 4)
        return sum(jax.lax.fori_loop(0, 80, halve, start)) / 2

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        return (g / (3 * x**2 + 1),)

    return with_vjp(root, lambda a: (root(a), root(a)), bwd), (normal(0, 4),)


@right("layer")
def in_bfloat16_with_wide_sums() -> Made:
    """It computes in float32 and hands bfloat16 on, as kernels do."""

    def layer(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.dot(x, w, preferred_element_type=jnp.float32)).astype(
            x.dtype
        )

    def fwd(x: jax.Array, w: jax.Array) -> Args:
        y = jnp.tanh(jnp.dot(x, w, preferred_element_type=jnp.float32))
        return y.astype(x.dtype), (x, w, y)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, w, y = kept
        wide = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
        dz = g.astype(jnp.float32) * (1 - y**2)
        return wide(dz, w.T).astype(x.dtype), wide(x.T, dz).astype(w.dtype)

    rule = with_vjp(layer, fwd, bwd)
    args = normal(0, 8, 6, dtype=jnp.bfloat16), normal(1, 6, 4, dtype=jnp.bfloat16) / 2
    return rule, args


@right("power")
def with_static_arguments_of_a_jvp() -> Made:
    """`nondiff_argnums` of a `custom_jvp` come first in its rule."""

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def power(exponent: int, x: jax.Array) -> jax.Array:
        return x**exponent

    @power.defjvp
    def _(exponent: int, primals: Args, tangents: Args) -> Args:
        (x,), (dx,) = primals, tangents
        return power(exponent, x), exponent * x ** (exponent - 1) * dx

    return lambda x: power(3, x) + power(2, x), (positive(0, 4),)


@right("weighted")
def with_no_rule_for_one_argument() -> Made:
    """`defjvps` takes None for an argument that nothing flows through."""

    @jax.custom_jvp
    def weighted(x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask > 0, jnp.sin(x), 0)

    def moved(dx: jax.Array, _: Any, x: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.where(mask > 0, jnp.cos(x) * dx, 0)

    weighted.defjvps(moved, None)
    return weighted, (normal(0, 5), jnp.array([1.0, 0.5, -1.0, 2.0, -0.5]))


@right("scaled_by_a_table")
def closed_over_a_traced_constant() -> Made:
    """The rule closes over what its caller computes of an argument that is held."""

    def fn(x: jax.Array, ids: jax.Array) -> jax.Array:
        table = jnp.sqrt(ids.astype(x.dtype) + 1)

        def scaled_by_a_table(x: jax.Array) -> jax.Array:
            return x * table

        def fwd(x: jax.Array) -> tuple[jax.Array, None]:
            return scaled_by_a_table(x), None

        return with_vjp(scaled_by_a_table, fwd, lambda _, g: (g * table,))(x)

    return fn, (normal(0, 5), integers(1, 9, 5))


@right("spectrum")
def of_a_complex_transform() -> Made:
    """From real to complex numbers, and nothing is conjugated on the way back."""

    def spectrum(x: jax.Array) -> jax.Array:
        return jnp.fft.fft(x)

    def bwd(_: None, g: jax.Array) -> Args:
        return (jnp.fft.fft(g).real,)

    return with_vjp(spectrum, lambda x: (spectrum(x), None), bwd), (normal(0, 6),)


@right("named")
def with_named_residuals_under_remat() -> Made:
    """The residual is saved by name; the rest of the block is computed again."""

    def named(x: jax.Array) -> jax.Array:
        return jnp.tanh(x)

    def fwd(x: jax.Array) -> Args:
        y = checkpoint_name(jnp.tanh(x), "activation")
        return y, y

    rule = with_vjp(named, fwd, lambda y, g: (g * (1 - y**2),))
    policy = jax.checkpoint_policies.save_only_these_names("activation")
    return jax.checkpoint(lambda x: jnp.sin(rule(x)), policy=policy), (normal(0, 5),)


@right("host_sine")
def of_a_function_on_the_host() -> Made:
    """The primal is a callback: it has no derivative but the rule's."""

    def call(fn: Callable[[Any], Any], x: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(fn, shape, x, vmap_method="sequential")

    def host_sine(x: jax.Array) -> jax.Array:
        return call(lambda v: np.sin(v, dtype=np.asarray(v).dtype), x)

    rule = with_vjp(
        host_sine, lambda x: (host_sine(x), x), lambda x, g: (g * jnp.cos(x),)
    )
    return rule, (normal(0, 5),)


@right("safe_norm")
def of_a_norm_at_zero() -> Made:
    """A row of zeros has, by convention, a gradient of zeros; the other rows move."""

    def safe_norm(x: jax.Array) -> jax.Array:
        square = jnp.sum(x * x, -1)
        safe = jnp.where(square > 0, square, 1)
        return jnp.where(square > 0, jnp.sqrt(safe), 0)

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        length = safe_norm(x)
        inverse = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
        return ((g * inverse)[:, None] * x,)

    rule = with_vjp(safe_norm, lambda x: (safe_norm(x), x), bwd)
    return rule, (normal(0, 4, 3).at[1].set(0.0),)


@right("relu", "relu6", "logaddexp")
def of_jax_itself() -> Made:
    """The rules that come with JAX's own activations."""

    def fn(x: jax.Array) -> jax.Array:
        parts = (jax.nn.relu, jax.nn.silu, jax.nn.softplus, jax.nn.relu6, jax.nn.elu)
        y = sum(part(x) for part in parts)
        return jax.nn.softmax(y) + jax.nn.logsumexp(y) + jax.nn.gelu(y)

    return fn, (normal(0, 6),)


@right()
def of_optax() -> Made:
    """Losses of Optax and the rules inside them."""

    def fn(x: jax.Array, labels: jax.Array) -> jax.Array:
        first = optax.softmax_cross_entropy_with_integer_labels(x, labels)
        second = optax.sigmoid_binary_cross_entropy(x, jnp.ones_like(x))
        return first.sum() + second.mean() + optax.safe_norm(x, 1e-3)

    return fn, (normal(0, 4, 5), integers(1, 5, 4))


@right("unit")
def that_sees_only_what_a_projection_leaves() -> Made:
    """Its derivative is rank-deficient: along the argument there is none."""

    def unit(x: jax.Array) -> jax.Array:
        return x / jnp.sqrt(jnp.sum(x * x))

    def bwd(kept: Args, g: jax.Array) -> Args:
        y, length = kept
        return ((g - y * jnp.sum(g * y)) / length,)

    def fwd(x: jax.Array) -> Args:
        return unit(x), (unit(x), jnp.sqrt(jnp.sum(x * x)))

    return with_vjp(unit, fwd, bwd), (jnp.array([3.0, 0.0, 0.0]),)


@right("constant")
def that_is_constant() -> Made:
    """Its derivative is zero everywhere, and said to be by None."""

    def constant(x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) + x.size

    rule = with_vjp(constant, lambda x: (constant(x), None), lambda _, g: (None,))
    return lambda x: rule(x) + x, (normal(0, 4),)


RIGHT_RULES: tuple[RightRule, ...] = tuple(
    entry for entry in dict(globals()).values() if isinstance(entry, RightRule)
)
