"""Small Pallas kernels, one for each feature, beside what they compute in `jnp`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas import triton

from tests.lifted import Row

_VECTOR = np.linspace(-1.3, 1.7, 10, dtype=np.float32)
_MATRIX = np.cos(np.arange(60, dtype=np.float32)).reshape(10, 6)
_SQUARE = np.sin(np.arange(64, dtype=np.float32)).reshape(8, 8)
_BATCH = np.sin(np.arange(30, dtype=np.float32)).reshape(3, 10)
_ROWS = np.array([4, 0, 2], dtype=np.int32)


def shaped(shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def elementwise(kernel, x, block=4, **options):
    """Calls a kernel on blocks of a vector; 4 does not divide its 10 entries."""
    spec = pl.BlockSpec((block,), lambda i: (i,))
    return pl.pallas_call(
        kernel,
        shaped(x.shape, x.dtype),
        grid=(pl.cdiv(x.shape[0], block),),
        in_specs=[spec],
        out_specs=spec,
        **options,
    )(x)


def whole(kernel, x, **options):
    """Calls a kernel on a whole array."""
    return pl.pallas_call(kernel, shaped(x.shape, x.dtype), **options)(x)


def _sine(x_ref, o_ref):
    o_ref[...] = jnp.sin(x_ref[...])


def _places(x_ref, o_ref):
    ahead = pl.program_id(0) + 10 * pl.num_programs(0)
    o_ref[...] = x_ref[...] * ahead.astype(x_ref.dtype)


def _matmul_kernel(x_ref, y_ref, o_ref, sum_ref):
    @pl.when(pl.program_id(2) == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += jnp.dot(
        x_ref[...], y_ref[...], preferred_element_type=sum_ref.dtype
    )

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        o_ref[...] = sum_ref[...].astype(o_ref.dtype)


def _matmul(x, y):
    return pl.pallas_call(
        _matmul_kernel,
        shaped((8, 8), x.dtype),
        grid=(2, 4, 2),
        in_specs=[
            pl.BlockSpec((4, 4), lambda i, j, k: (i, k)),
            pl.BlockSpec((4, 2), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((4, 2), lambda i, j, k: (i, j)),
        scratch_shapes=[pltpu.VMEM((4, 2), jnp.float32)],
    )(x, y)


def _grows_kernel(x_ref, o_ref):
    """Adds up all blocks in one block of the output, which every place visits."""

    @pl.when(pl.program_id(0) == 0)
    def _():
        o_ref[...] = jnp.zeros_like(o_ref)

    inside = pl.program_id(0) * 4 + lax.broadcasted_iota(jnp.int32, (4,), 0) < 10
    o_ref[...] += jnp.where(inside, x_ref[...], 0)


def _grows(x):
    return pl.pallas_call(
        _grows_kernel,
        shaped((4,)),
        grid=(3,),
        in_specs=[pl.BlockSpec((4,), lambda i: (i,))],
        out_specs=pl.BlockSpec((4,), lambda i: (0,)),
    )(x)


def _place_in_branch(x_ref, o_ref):
    o_ref[...] = x_ref[...]

    @pl.when(pl.program_id(0) > 0)
    def _():
        o_ref[...] = x_ref[...] * pl.program_id(0).astype(jnp.float32)


def _masked(x_ref, o_ref):
    at = pl.program_id(0) * 4 + jnp.arange(4)
    x = triton.load(x_ref.at[pl.ds(0, 4)], mask=at < 7, other=0.5)
    triton.store(o_ref.at[...], jnp.zeros(4))
    triton.store(o_ref.at[pl.ds(0, 4)], jnp.exp(x), mask=at > 1)


def _masked_reference(x):
    at = jnp.arange(10)
    return jnp.where(at > 1, jnp.exp(jnp.where(at < 7, x, 0.5)), 0)


def _atomic(x_ref, o_ref):
    o_ref[...] = jnp.ones(10)
    triton.atomic_add(o_ref, slice(2, 6), x_ref[2:6])


def _slices_in_loop(x_ref, o_ref):
    def rows(i, total):
        row = x_ref[pl.ds(2 * i, 2), :]
        o_ref[pl.ds(8 - 2 * i, 2), :] = row * total
        return total + row.sum()

    lax.fori_loop(0, 5, rows, jnp.zeros((), x_ref.dtype))


def _slices_in_loop_reference(x):
    pairs = x.reshape(5, 2, 6)
    totals = jnp.cumsum(pairs.sum((1, 2))) - pairs.sum((1, 2))
    return (pairs * totals[:, None, None])[::-1].reshape(10, 6)


def _while_over_refs(x_ref, o_ref):
    o_ref[...] = x_ref[...]

    def step(i):
        o_ref[...] = o_ref[...] * 0.5 + x_ref[...]
        return i + 1

    lax.while_loop(lambda i: (i < 7) & (o_ref[0] < 99), step, 0)


def _while_over_refs_reference(x):
    return lax.fori_loop(0, 7, lambda _, y: y * 0.5 + x, x)


def _scan_over_refs(x_ref, o_ref):
    def step(carry, factor):
        o_ref[...] = jnp.sin(x_ref[...]) * factor + carry
        return o_ref[...], factor

    carry = jnp.zeros(10, x_ref.dtype)
    lax.scan(step, carry, jnp.arange(3, dtype=x_ref.dtype))


def _switch_over_refs(x_ref, o_ref):
    def write(value):
        o_ref[...] = value

    lax.switch(
        pl.program_id(0),
        [
            lambda: write(jnp.sin(x_ref[...])),
            lambda: write(jnp.cos(x_ref[...])),
            lambda: write(x_ref[...]),
        ],
    )


def _switch_over_refs_reference(x):
    return jnp.concatenate([jnp.sin(x[:4]), jnp.cos(x[4:8]), x[8:]])


def _scoped(x_ref, o_ref):
    def with_buffers(first, second):
        first[...] = x_ref[...] * pl.program_id(0).astype(jnp.float32)

        def deeper(third):
            third[...] = first[...] + 1
            second[...] = third[...] ** 2

        pl.run_scoped(deeper, pltpu.VMEM((4,), jnp.float32))
        return second[...]

    buffer = pltpu.VMEM((4,), jnp.float32)
    o_ref[...] = pl.run_scoped(with_buffers, buffer, buffer)


def _scoped_reference(x):
    return (x * (jnp.arange(10) // 4) + 1) ** 2


def _gather_kernel(rows_ref, x_ref, o_ref):
    o_ref[...] = x_ref[...] * rows_ref[pl.program_id(0)].astype(jnp.float32)


def gather(rows, x):
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(3,),
        in_specs=[pl.BlockSpec((1, 6), lambda i, rows: (rows[i], 0))],
        out_specs=pl.BlockSpec((1, 6), lambda i, rows: (i, 0)),
    )
    return pl.pallas_call(_gather_kernel, shaped((3, 6)), grid_spec=grid_spec)(rows, x)


def _gather_reference(rows, x):
    return jnp.asarray(x)[rows] * rows[:, None]


def _in_place(x_ref, y_ref, o_ref):
    o_ref[...] = x_ref[...] + jnp.sin(y_ref[...])


def _aliased(x, y):
    spec = pl.BlockSpec((4,), lambda i: (i,))
    return pl.pallas_call(
        _in_place,
        shaped(x.shape, x.dtype),
        grid=(3,),
        in_specs=[spec, spec],
        out_specs=spec,
        input_output_aliases={1: 0},
    )(x, y)


def _partly_written(x_ref, y_ref, o_ref):
    @pl.when(pl.program_id(0) == 1)
    def _():
        o_ref[...] = x_ref[...] * 2


def _aliased_partly(x, y):
    spec = pl.BlockSpec((4,), lambda i: (i,))
    return pl.pallas_call(
        _partly_written,
        shaped(x.shape, x.dtype),
        grid=(3,),
        in_specs=[spec, pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=spec,
        input_output_aliases={1: 0},
    )(x, y)


def _squeezed(x):
    return pl.pallas_call(
        lambda x_ref, o_ref: o_ref.__setitem__(..., x_ref[...] * 2 + 1),
        shaped(x.shape),
        grid=(10,),
        in_specs=[pl.BlockSpec((None, 6), lambda i: (i, 0))],
        out_specs=pl.BlockSpec((pl.Squeezed(), 6), lambda i: (9 - i, 0)),
    )(x)


def _neighbours(x):
    """Second differences: overlapping windows of three entries."""
    return pl.pallas_call(
        lambda x_ref, o_ref: o_ref.__setitem__(
            ..., (x_ref[0] - 2 * x_ref[1] + x_ref[2])[None]
        ),
        shaped((8,)),
        grid=(8,),
        in_specs=[pl.BlockSpec((pl.Element(3),), lambda i: (i,))],
        out_specs=pl.BlockSpec((1,), lambda i: (i,)),
    )(x)


def _padded_kernel(x_ref, o_ref):
    at = pl.program_id(0) + jnp.arange(3) - 1
    inside = (at >= 0) & (at < 10)
    o_ref[...] = jnp.sum(jnp.where(inside, x_ref[...], 0))[None]


def _padded(x):
    """Sums of three neighbours: windows that reach beyond both ends."""
    return pl.pallas_call(
        _padded_kernel,
        shaped((10,)),
        grid=(10,),
        in_specs=[pl.BlockSpec((pl.Element(3, (1, 1)),), lambda i: (i,))],
        out_specs=pl.BlockSpec((1,), lambda i: (i,)),
    )(x)


def _dynamic_grid(n, x):
    spec = pl.BlockSpec((4,), lambda i: (i,))
    return pl.pallas_call(
        _places, shaped(x.shape), grid=(n[0],), in_specs=[spec], out_specs=spec
    )(x)


def _two_results(x_ref, y_ref, n_ref, flag_ref):
    y_ref[...] = x_ref[...] ** 3
    n_ref[...] = jnp.floor(x_ref[...] * 10).astype(jnp.int32)
    flag_ref[...] = x_ref[...] > 0


def _several_types(x):
    shapes = [shaped(x.shape), shaped(x.shape, jnp.int32), shaped(x.shape, jnp.bool_)]
    return pl.pallas_call(_two_results, shapes)(x)


def _layers(x_ref, o_ref):
    x = x_ref[...]
    o_ref[...] = jax.nn.silu(x) + jax.nn.relu(x) * jax.nn.logsumexp(x)


def _hints(x_ref, o_ref):
    start = pl.multiple_of(pl.program_id(0) * 0, 4)
    o_ref[pl.ds(start, 4)] = pltpu.roll(x_ref[...], 1, 0)


def _hints_reference(x):
    return jnp.roll(x.reshape(2, 4), 1, 1).reshape(8)


def _in_scan(x):
    def step(carry, row):
        carry = elementwise(_sine, carry + row)
        return carry, whole(_sine, row)

    return lax.scan(step, jnp.zeros(10, x.dtype), x)


def _in_scan_reference(x):
    def step(carry, row):
        carry = jnp.sin(carry + row)
        return carry, jnp.sin(row)

    return lax.scan(step, jnp.zeros(10, x.dtype), x)


def _pushed(x):
    return jax.jvp(lambda x: elementwise(_sine, x), (x,), (2 * x,))


FEATURES = (
    Row("no grid", functools.partial(whole, _sine), (_MATRIX,), jnp.sin),
    Row("a block that overhangs", functools.partial(elementwise, _sine), (_VECTOR,),
        jnp.sin),
    Row("interpret=True", functools.partial(elementwise, _sine, interpret=True),
        (_VECTOR,), jnp.sin),
    Row("program_id and num_programs", functools.partial(elementwise, _places),
        (_VECTOR,), lambda x: x * (jnp.arange(10) // 4 + 30)),
    Row("program_id in a branch", functools.partial(elementwise, _place_in_branch),
        (_VECTOR,), lambda x: x * jnp.maximum(jnp.arange(10) // 4, 1)
        .at[:4].set(1)),
    Row("a sum in scratch memory", _matmul, (_SQUARE, _SQUARE), jnp.dot),
    Row("a sum in bfloat16 blocks", _matmul,
        (jnp.bfloat16(_SQUARE), jnp.bfloat16(_SQUARE)), jnp.dot),
    Row("a block that every place visits", _grows, (_VECTOR,),
        lambda x: jnp.pad(x, (0, 2)).reshape(3, 4).sum(0)),
    Row("masked load and store", functools.partial(elementwise, _masked), (_VECTOR,),
        _masked_reference),
    Row("atomic add", functools.partial(whole, _atomic), (_VECTOR,),
        lambda x: jnp.ones(10).at[2:6].add(x[2:6])),
    Row("pl.ds in fori_loop", functools.partial(whole, _slices_in_loop), (_MATRIX,),
        _slices_in_loop_reference),
    Row("while over references", functools.partial(whole, _while_over_refs),
        (_VECTOR,), _while_over_refs_reference),
    Row("scan over references", functools.partial(whole, _scan_over_refs), (_VECTOR,),
        lambda x: 3 * jnp.sin(x)),
    Row("switch over references", functools.partial(elementwise, _switch_over_refs),
        (_VECTOR,), _switch_over_refs_reference),
    Row("run_scoped", functools.partial(elementwise, _scoped), (_VECTOR,),
        _scoped_reference),
    Row("scalar prefetch", gather, (_ROWS, _MATRIX), _gather_reference),
    Row("aliases", _aliased, (_VECTOR, 2 * _VECTOR), lambda x, y: x + jnp.sin(y)),
    Row("aliases that are partly written", _aliased_partly, (_VECTOR, 3 * _VECTOR),
        lambda x, y: jnp.where(jnp.arange(10) // 4 == 1, 2 * x, y)),
    Row("squeezed axes", _squeezed, (_MATRIX,), lambda x: (2 * x + 1)[::-1]),
    Row("element windows", _neighbours, (_VECTOR,),
        lambda x: x[:-2] - 2 * x[1:-1] + x[2:]),
    Row("padded element windows", _padded, (_VECTOR,),
        lambda x: jnp.convolve(x, jnp.ones(3), "same")),
    Row("a grid of dynamic size", _dynamic_grid, (np.array([3], np.int32), _VECTOR),
        lambda n, x: x * (jnp.arange(10) // 4 + 30)),
    Row("results of several types", _several_types, (_VECTOR,),
        lambda x: (x**3, jnp.floor(x * 10).astype(jnp.int32), x > 0)),
    Row("layers with custom rules", functools.partial(whole, _layers), (_VECTOR,),
        lambda x: jax.nn.silu(x) + jax.nn.relu(x) * jax.nn.logsumexp(x)),
    Row("roll and a hint", functools.partial(elementwise, _hints), (_VECTOR[:8],),
        _hints_reference),
    Row("vmap", jax.vmap(functools.partial(elementwise, _places)), (_BATCH,),
        lambda x: x * (jnp.arange(10) // 4 + 30)),
    Row("vmap of vmap", jax.vmap(jax.vmap(functools.partial(elementwise, _places))),
        (_BATCH[None],), lambda x: x * (jnp.arange(10) // 4 + 30)),
    Row("vmap with a scratch sum", jax.vmap(_matmul, (0, None)),
        (np.stack([_SQUARE, -_SQUARE]), _SQUARE), jnp.matmul),
    Row("vmap of scalar prefetch", jax.vmap(gather, (0, None)),
        (np.stack([_ROWS, _ROWS[::-1]]), _MATRIX),
        jax.vmap(_gather_reference, (0, None))),
    Row("inside of scan", _in_scan, (_BATCH,), _in_scan_reference),
    Row("jvp", _pushed, (_VECTOR,), lambda x: (jnp.sin(x), jnp.cos(x) * 2 * x)),
)  # fmt: skip
