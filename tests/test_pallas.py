"""Pallas kernels are lifted, differentiated, checked, and their mistakes refused."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

import gradtest
from examples import pallas_kernels
from gradtest import Verdict
from gradtest._src import execution
from gradtest._src.lifting import Evaluator
from gradtest._src.structure import structure_key
from tests import broken_kernels
from tests.lifted import Row, assert_lifted, lift
from tests.small_kernels import FEATURES, elementwise, shaped, whole

pytestmark = pytest.mark.core

_VECTOR = np.linspace(-1.3, 1.7, 10, dtype=np.float32)


def _draw(*shape):
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


# Neither 8 rows, nor 8 classes, nor 8 positions divide what there is.
_LOSS_ARGS = _draw(11, 13), np.arange(11, dtype=np.int32)
_NORM_ARGS = _draw(11, 6), _draw(6)
_HEAD = _draw(19, 4), _draw(4, 19).T, _draw(38, 2)[::2].repeat(2, 1)
_KERNELS = (
    (pallas_kernels.cross_entropy, _LOSS_ARGS),
    (pallas_kernels.rms_norm, _NORM_ARGS),
    (pallas_kernels.attention, _HEAD),
)


def _as(dtype, args):
    return [jnp.asarray(x, dtype if x.dtype == np.float32 else None) for x in args]


@pytest.mark.parametrize("row", FEATURES, ids=lambda row: row.name)
def test_a_kernel_is_lifted(row):
    assert_lifted(row)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_kernel_inside_of_shard_map_is_lifted(check_vma):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def local(x):
        types = {"manual_axis_type": jax.typeof(x).manual_axis_type}
        spec = pl.BlockSpec((4,), lambda i: (i,))
        return pl.pallas_call(
            lambda x_ref, o_ref: o_ref.__setitem__(..., jnp.sin(x_ref[...])),
            jax.ShapeDtypeStruct(x.shape, x.dtype, **types if check_vma else {}),
            grid=(3,),
            in_specs=[spec],
            out_specs=spec,
        )(x)

    across = jax.sharding.PartitionSpec("x")
    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=across, out_specs=across, check_vma=check_vma
    )
    assert_lifted(Row("shard_map", jax.jit(mapped), (_VECTOR,), jnp.sin))


def test_a_kernel_has_the_reverse_mode_that_pallas_lacks():
    def overhangs(x_ref, o_ref):
        # Beyond its end the array is NaN, which must not reach the gradient.
        o_ref[...] = jnp.sin(x_ref[...]) * x_ref[...]

    jaxpr = jax.make_jaxpr(functools.partial(elementwise, overhangs))(_VECTOR)
    with execution.float64():
        x = jnp.asarray(_VECTOR, jnp.float64)
        found = jax.grad(lambda x: Evaluator()(jaxpr, [x])[0].sum())(x)
        np.testing.assert_allclose(found, jnp.sin(x) + x * jnp.cos(x), rtol=1e-14)


def test_what_lies_beyond_an_array_is_nan():
    def sums(x_ref, o_ref):
        o_ref[...] = jnp.full_like(x_ref, x_ref[...].sum())

    (found,), _ = lift(functools.partial(elementwise, sums), _VECTOR)
    assert np.isfinite(found[:8]).all()
    assert np.isnan(found[8:]).all()


def test_a_value_that_a_kernel_stops_is_held():
    def stops(x_ref, o_ref):
        x = x_ref[...]
        o_ref[...] = x * jax.lax.stop_gradient(jnp.exp(x))

    def fn(x):
        return x * jax.lax.stop_gradient(jnp.exp(x))

    @jax.custom_vjp
    def kernel(x):
        return elementwise(stops, x)

    kernel.defvjp(lambda x: (kernel(x), x), lambda x, g: jax.vjp(fn, x)[1](g))
    gradtest.assert_autodiff_matches(kernel, _VECTOR)
    kernel.defvjp(lambda x: (kernel(x), x), lambda x, g: (g * (x + 1) * jnp.exp(x),))
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_autodiff_matches(kernel, _VECTOR + 2)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("fn", "args"), _KERNELS, ids=["cross_entropy", "rms_norm", "attention"]
)
def test_a_right_kernel_passes(fn, args, dtype):
    report = gradtest.assert_autodiff_matches(fn, *_as(dtype, args))
    assert max(finding.size for finding in report.findings) < 1e-12
    assert all(finding.judged_by == "exact" for finding in report.findings)
    assert report.precision == (
        "precision: everything in float64 (lifted), claim in its own as well",
    )


def test_heads_of_attention_pass_together():
    heads = [np.stack([x, 2 * x]) for x in _HEAD]
    gradtest.assert_autodiff_matches(jax.vmap(pallas_kernels.attention), *heads)


@pytest.mark.parametrize(
    ("make", "args", "wrong"),
    [
        (broken_kernels.cross_entropy_with_mask_off_by_one, _LOSS_ARGS, {"logits"}),
        (broken_kernels.rms_norm_without_scale, _NORM_ARGS, {"x"}),
        (broken_kernels.attention_without_tail, _HEAD, {"key", "value"}),
    ],
    ids=["mask off by one", "missing scale", "dropped tail block"],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_mistake_is_refused_at_its_leaf(make, args, wrong, dtype):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(make(), *_as(dtype, args))
    findings = caught.value.report.findings
    failed = {f.name for f in findings if f.verdict is Verdict.FAIL}
    assert failed == wrong


def _copies(x_ref, o_ref, buffer, semaphore):
    copy = pltpu.make_async_copy(x_ref, buffer, semaphore)
    copy.start()
    copy.wait()
    o_ref[...] = buffer[...] ** 2


@jax.custom_vjp
def _square_of_a_copy(x):
    scratch = [pltpu.VMEM((10,), jnp.float32), pltpu.SemaphoreType.DMA]
    return whole(_copies, x, scratch_shapes=scratch)


_square_of_a_copy.defvjp(
    lambda x: (_square_of_a_copy(x), x), lambda x, cotangent: (2 * x * cotangent,)
)


def test_a_kernel_with_semaphores_runs_in_its_own_precision_and_is_named():
    report = gradtest.assert_autodiff_matches(_square_of_a_copy, _VECTOR)
    assert report.precision[0] == (
        "precision: float64 (lifted), but in its own precision ran pallas_call"
    )
    assert report.precision[1] == (
        "judged by differences alone: the Pallas kernel '_copies' has no pure form to "
        "differentiate"
    )


def _draws(x_ref, o_ref):
    pltpu.prng_seed(0)
    o_ref[...] = x_ref[...] + (pltpu.prng_random_bits((10,)) > 0)


def test_a_kernel_for_an_accelerator_alone_is_named_with_the_reason():
    @jax.custom_vjp
    def noisy(x):
        return whole(_draws, x, name="noise")

    noisy.defvjp(lambda x: (noisy(x), None), lambda _, cotangent: (cotangent,))
    with pytest.raises(NotImplementedError, match=r"the Pallas kernel 'noise'.*prng"):
        gradtest.assert_autodiff_matches(noisy, _VECTOR)


def test_kernels_that_are_traced_anew_have_one_structure():
    def trace():
        jax.clear_caches()
        return jax.make_jaxpr(lambda *args: pallas_kernels.attention(*args))(*_HEAD)

    assert structure_key(trace()) == structure_key(trace())


def test_kernels_with_other_blocks_have_another_structure():
    keys = [
        structure_key(jax.make_jaxpr(call)(_VECTOR))
        for call in (
            lambda x: elementwise(lambda x, o: o.__setitem__(..., x[...]), x, 4),
            lambda x: elementwise(lambda x, o: o.__setitem__(..., x[...]), x, 5),
        )
    ]
    assert keys[0] != keys[1]


def test_pallas_is_not_imported_by_gradtest():
    code = "import sys, gradtest; print('jax.experimental.pallas' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout == "False\n", ran.stderr


def test_results_of_a_grid_of_no_steps_are_not_numbers():
    def copy(x_ref, o_ref):
        o_ref[...] = x_ref[...]

    def fn(x):
        return pl.pallas_call(copy, shaped(x.shape), grid=(0,))(x)

    (found,), _ = lift(fn, _VECTOR)
    assert np.isnan(found).all()
