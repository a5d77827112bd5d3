"""Broken rules of functions that move or mix positions: gathers, attention, scans."""

import jax
import jax.numpy as jnp

from tests.zoo_entry import Args, Fn, Rule, broken, integers, normal, with_vjp


def _heads() -> Args:
    return normal(0, 2, 5, 4), normal(1, 2, 5, 4), normal(2, 2, 5, 4)


def _attention_rule(right: bool, mistake: str) -> Rule:
    """Causal attention, wrong in one of the steps of its backward pass."""

    def weigh(q: jax.Array, k: jax.Array) -> jax.Array:
        scores = jnp.einsum("hqd,hkd->hqk", q, k) * q.shape[-1] ** -0.5
        seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
        shifted = jnp.exp(jnp.where(seen, scores, -jnp.inf))
        return shifted / shifted.sum(-1, keepdims=True)

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.einsum("hqk,hkd->hqd", weigh(q, k), v)

    def fwd(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Args]:
        return attention(q, k, v), (q, k, v)

    def bwd(kept: Args, g: jax.Array) -> Args:
        q, k, v = kept
        scale = q.shape[-1] ** -0.5
        weights = weigh(q, k)
        d_weights = jnp.einsum("hqd,hkd->hqk", g, v)
        mean = jnp.sum(weights * d_weights, -1, keepdims=True)
        if not right and mistake == "mean":
            mean = jnp.zeros_like(mean)
        d_scores = weights * (d_weights - mean) * scale
        dq = jnp.einsum("hqk,hkd->hqd", d_scores, k)
        dk = jnp.einsum("hqk,hqd->hkd", d_scores, q)
        if not right and mistake == "scale":
            dk = dk / scale
        return dq, dk, jnp.einsum("hqk,hqd->hkd", weights, g)

    return with_vjp(attention, fwd, bwd)


@broken("factor: 1/sqrt(d)", _heads, "constant factor")
def attention_without_the_scale_of_its_keys(right: bool) -> Rule:
    """The scores' scale reaches the queries and not the keys."""
    return _attention_rule(right, "scale")


@broken("dropped term", _heads, "missing term")
def attention_without_the_mean_of_the_scores(right: bool) -> Rule:
    """The softmax is taken for an elementwise function."""
    return _attention_rule(right, "mean")


@broken("wrong transpose", lambda: (normal(0, 3, 8),), "transposed")
def rotary_embedding_turned_the_same_way(right: bool) -> Rule:
    """A rotation's transpose turns back; this one turns on."""

    def turn(x: jax.Array, way: int) -> jax.Array:
        angle = jnp.arange(1.0, 1 + x.shape[-1] // 2)
        even, odd = jnp.split(x, 2, -1)
        cosine, sine = jnp.cos(angle), way * jnp.sin(angle)
        parts = (even * cosine - odd * sine, even * sine + odd * cosine)
        return jnp.concatenate(parts, -1)

    def rotary(x: jax.Array) -> jax.Array:
        return turn(x, 1)

    def bwd(_: None, g: jax.Array) -> Args:
        return (turn(g, -1 if right else 1),)

    return with_vjp(rotary, lambda x: (rotary(x), None), bwd)


@broken("wrong transpose", lambda: (normal(0, 12), normal(1, 3)), "wrong operand")
def convolution_with_an_unflipped_kernel(right: bool) -> Rule:
    """A convolution's transpose correlates: the kernel is to be turned round."""

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.convolve(x, kernel, mode="valid")

    def fwd(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Args]:
        return convolve(x, kernel), (x, kernel)

    def bwd(kept: Args, g: jax.Array) -> Args:
        x, kernel = kept
        dx = jnp.convolve(g, kernel[::-1] if right else kernel)
        return dx, jnp.convolve(x, g[::-1], mode="valid")[::-1]

    return with_vjp(convolve, fwd, bwd)


def _table_and_ids() -> Args:
    # More ids than rows, so that some row is read twice.
    return normal(0, 5, 3), integers(1, 5, 9)


@broken("duplicate ids only", _table_and_ids, "duplicates overwritten",
        looks_right_at=lambda: (normal(0, 5, 3), jnp.array([3, 0, 4])))  # fmt: skip
def embedding_that_overwrites_duplicate_ids(right: bool) -> Rule:
    """A row that several tokens share keeps the cotangent of one of them."""

    def embed(table: jax.Array, ids: jax.Array) -> jax.Array:
        return table[ids]

    def fwd(table: jax.Array, ids: jax.Array) -> tuple[jax.Array, Args]:
        return table[ids], (jnp.zeros_like(table), ids)

    def bwd(kept: Args, g: jax.Array) -> Args:
        empty, ids = kept
        return empty.at[ids].add(g) if right else empty.at[ids].set(g), None

    return with_vjp(embed, fwd, bwd)


@broken("integer argument", lambda: (normal(0, 7), jnp.array(2)), "reordered")
def roll_back_in_the_same_direction(right: bool) -> Rule:
    """The shift is an integer array, without a cotangent of its own."""

    def rolled(x: jax.Array, shift: jax.Array) -> jax.Array:
        return jnp.roll(x, shift)

    def fwd(x: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        return rolled(x, shift), shift

    def bwd(shift: jax.Array, g: jax.Array) -> Args:
        return jnp.roll(g, -shift if right else shift), None

    return with_vjp(rolled, fwd, bwd)


def _values_and_segments() -> Args:
    return normal(0, 10), jnp.array([0, 0, 0, 1, 1, 2, 2, 2, 2, 4])


@broken("wrong count", _values_and_segments, "extra factor")
def segment_mean_that_spreads_a_sum(right: bool) -> Rule:
    """Segments of one entry are right, larger ones are as many times too large."""

    def means(x: jax.Array, segments: jax.Array) -> jax.Array:
        counts = jnp.zeros(5, x.dtype).at[segments].add(1)
        return jnp.zeros(5, x.dtype).at[segments].add(x) / jnp.maximum(counts, 1)

    def fwd(x: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        return means(x, segments), segments

    def bwd(segments: jax.Array, g: jax.Array) -> Args:
        counts = jnp.zeros(5, g.dtype).at[segments].add(1)
        return (g / jnp.maximum(counts, 1) if right else g)[segments], None

    return with_vjp(means, fwd, bwd)


@broken("wrong transpose", lambda: (normal(0, 3, 6),), "transposed")
def cumulative_sum_run_forwards_again(right: bool) -> Rule:
    """The transpose of a cumulative sum runs from the other end."""

    def cumulative(x: jax.Array) -> jax.Array:
        return jax.lax.cumsum(x, 1)

    def bwd(_: None, g: jax.Array) -> Args:
        return (jax.lax.cumsum(g, 1, reverse=right),)

    return with_vjp(cumulative, lambda x: (cumulative(x), None), bwd)


@broken("factor: the window", lambda: (normal(0, 2, 12),), "constant factor")
def average_pool_that_spreads_a_sum(right: bool) -> Rule:
    """Each entry of a window gets the whole cotangent."""

    def pool(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], -1, 3).mean(-1)

    def bwd(_: None, g: jax.Array) -> Args:
        return (jnp.repeat(g / 3 if right else g, 3, axis=1),)

    return with_vjp(pool, lambda x: (pool(x), None), bwd)


def _recurrence(rule: Rule) -> Fn:
    """Runs the rule as a cell in the body of a scan."""

    def run(state: jax.Array, inputs: jax.Array) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            return rule(state, x), state

        return jax.lax.scan(step, state, inputs)[0]

    return run


@broken("in the body of a scan", lambda: (normal(0, 4), normal(1, 5, 4)),
        "constant slope", "missing term", program=_recurrence)  # fmt: skip
def gated_cell_without_its_gate(right: bool) -> Rule:
    """The state's cotangent takes the leak and not the gate that reads the state."""

    def cell(state: jax.Array, x: jax.Array) -> jax.Array:
        return 0.9 * state + jnp.tanh(state) * x

    def fwd(state: jax.Array, x: jax.Array) -> tuple[jax.Array, Args]:
        return cell(state, x), (jnp.tanh(state), x)

    def bwd(kept: Args, g: jax.Array) -> Args:
        gate, x = kept
        through = g * x * (1 - gate**2) if right else 0 * g
        return 0.9 * g + through, g * gate

    return with_vjp(cell, fwd, bwd)


@broken("another random mask", lambda: (normal(0, 40), jax.random.key(7)),
        "another mask")  # fmt: skip
def dropout_with_another_mask(right: bool) -> Rule:
    """The backward pass draws its mask anew, from a key that was split."""

    def mask(key: jax.Array, x: jax.Array) -> jax.Array:
        return jax.random.bernoulli(key, 0.7, x.shape).astype(x.dtype) / 0.7

    def dropout(x: jax.Array, key: jax.Array) -> jax.Array:
        return x * mask(key, x)

    def fwd(x: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return dropout(x, key), key if right else jax.random.split(key)[0]

    def bwd(key: jax.Array, g: jax.Array) -> Args:
        return g * mask(key, g), None

    return with_vjp(dropout, fwd, bwd)


POSITIONS = (
    attention_without_the_scale_of_its_keys,
    attention_without_the_mean_of_the_scores,
    rotary_embedding_turned_the_same_way,
    convolution_with_an_unflipped_kernel,
    embedding_that_overwrites_duplicate_ids,
    roll_back_in_the_same_direction,
    segment_mean_that_spreads_a_sum,
    cumulative_sum_run_forwards_again,
    average_pool_that_spreads_a_sum,
    gated_cell_without_its_gate,
    dropout_with_another_mask,
)
