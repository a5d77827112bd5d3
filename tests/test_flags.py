"""Checks work whatever JAX's flags say, and while other threads run JAX."""

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradtest
from tests import right_functions as functions
from tests import right_networks as networks
from tests.right_models import scaled_leaf


def _explicit_mesh(devices=1):
    explicit = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh(
        (devices,), ("x",), devices=jax.devices()[:devices], axis_types=explicit
    )
    return jax.set_mesh(mesh)


_FLAGS = {
    "strict promotion": lambda: jax.numpy_dtype_promotion("strict"),
    "no rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "x64": lambda: jax.enable_x64(True),
    "no x64": lambda: jax.enable_x64(False),
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "check_tracer_leaks": lambda: jax.check_tracer_leaks(True),
    "explicit mesh": _explicit_mesh,
    "no implicit transfers": lambda: jax.transfer_guard("disallow"),
    "no implicit keys": lambda: jax.debug_key_reuse(True),
    "old random bits": lambda: jax.threefry_partitionable(False),
}
_flags = pytest.mark.parametrize("flag", _FLAGS.values(), ids=_FLAGS.keys())


def _loss(params, x):
    """Written so that it works under every flag: no promotion of any kind."""
    hidden = jnp.tanh(x @ params["w"] + params["b"][None, :])
    return jnp.mean(hidden**2)


def _args():
    params = {"w": jnp.ones((3, 4)) * 0.3, "b": jnp.zeros((4,))}
    return params, jnp.linspace(0.5, 1.5, 6).reshape(2, 3)


def _loss_gradient(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"][None, :])
    inner = 2 * hidden * (1 - hidden**2) / hidden.size
    return {"w": x.T @ inner, "b": inner.sum(0)}


def _negative_gradient(params, x):
    return jax.tree.map(jnp.negative, _loss_gradient(params, x))


@pytest.mark.core
@_flags
def test_a_right_gradient_is_accepted_under(flag):
    args = _args()
    with flag():
        gradtest.assert_autodiff_matches(_loss, *args, trials=2)
        gradtest.assert_grad_matches(_loss, _loss_gradient, *args)


@pytest.mark.core
@_flags
def test_a_wrong_gradient_is_refused_under(flag):
    args = _args()
    with flag():
        with pytest.raises(gradtest.GradientMismatch, match="sign is flipped"):
            gradtest.assert_grad_matches(_loss, _negative_gradient, *args)
        with pytest.raises(gradtest.GradientMismatch, match="times too large"):
            gradtest.assert_autodiff_matches(scaled_leaf(_loss, "[0]['w']", 2.0), *args)


@pytest.mark.core
@_flags
def test_bfloat16_is_checked_under(flag):
    args = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), _args())
    with flag():
        gradtest.assert_autodiff_matches(_loss, *args)


@pytest.mark.core
@_flags
def test_second_order_is_checked_under(flag):
    args = _args()
    with flag():
        gradtest.assert_autodiff_matches(_loss, *args, order=2)


_MODELS = {
    "batch_norm_and_dropout": networks.make_normed_mlp,
    "lstm": networks.make_lstm,
    "stopped_rnn": networks.make_stopped_rnn,
    "nnx_mlp": networks.make_nnx_mlp,
    "solve": functions.make_solve,
    "cg": functions.make_cg,
    "custom_root": functions.make_custom_root,
    "switch": functions.make_switch,
    "complex_loss": functions.make_complex_loss,
}


@pytest.mark.parametrize("make", _MODELS.values(), ids=_MODELS.keys())
@pytest.mark.parametrize(
    "flag",
    [
        pytest.param(_FLAGS[name], id=name)
        for name in ("x64", "disable_jit", "check_tracer_leaks", "strict promotion")
    ],
)
def test_a_right_model_is_accepted_under(flag, make):
    fn, args = make(jnp.float32)
    with flag():
        gradtest.assert_autodiff_matches(fn, *args)


@pytest.mark.core
def test_a_nan_gradient_is_reported_not_raised_under_debug_nans():
    def norm(x):
        return jnp.sqrt(jnp.sum(x**2))

    with jax.debug_nans(True), pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(norm, jnp.zeros(3))
    assert caught.value.report.leaf("x").cause.name == "NaN gradient"


@pytest.mark.core
def test_float64_inputs_are_checked_where_they_are_enabled():
    with jax.enable_x64(True):
        x = jnp.linspace(0.0, 1.0, 5)
        report = gradtest.assert_autodiff_matches(jnp.sin, x)
    assert report.leaf("x").dtype == "float64"


@pytest.mark.core
def test_numpy_float64_arguments_are_float32_where_float64_is_off():
    with jax.enable_x64(False):
        report = gradtest.assert_autodiff_matches(jnp.sin, np.linspace(0, 1, 5))
    assert report.leaf("x").dtype == "float32"


@pytest.mark.devices
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_sharded_arguments_are_checked_in_an_explicit_mesh(factor):
    spec = jax.sharding.PartitionSpec("x")
    with _explicit_mesh(4):
        params, x = _args()
        params = jax.device_put(params, jax.sharding.PartitionSpec())
        x = jax.device_put(jnp.concatenate([x, x]), spec)
        fn = scaled_leaf(_loss, "[0]['w']", factor)
        if factor == 1:
            gradtest.assert_autodiff_matches(fn, params, x)
            return
        with pytest.raises(gradtest.GradientMismatch, match=r"1\.5 times too large"):
            gradtest.assert_autodiff_matches(fn, params, x)


@pytest.mark.devices
def test_a_shard_map_is_checked_in_an_explicit_mesh():
    spec = jax.sharding.PartitionSpec("x")
    with _explicit_mesh(4):
        x = jax.device_put(jnp.linspace(0.1, 1, 8), spec)
        fn = jax.shard_map(
            lambda x: jnp.exp(x) - jax.lax.pmean(jnp.sin(x), "x"),
            in_specs=spec,
            out_specs=spec,
        )
        gradtest.assert_autodiff_matches(fn, x)
        with pytest.raises(gradtest.GradientMismatch, match=r"1\.5 times too large"):
            gradtest.assert_autodiff_matches(scaled_leaf(fn, "[0]", 1.5), x)


@contextlib.contextmanager
def _other_threads(work):
    stop, troubles = threading.Event(), []

    def run():
        while not stop.is_set():
            try:
                work()
            except Exception as error:
                troubles.append(error)
                return

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield troubles
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.mark.core
def test_other_threads_keep_their_float32_while_a_check_runs():
    x = jnp.arange(4.0)

    def work():
        # A leaked setting would show as another dtype, in eager and in new traces.
        assert (x * np.float64(2)).dtype == jnp.float32
        assert jnp.linspace(0, 1, 3).dtype == jnp.float32
        assert jax.jit(lambda v: jnp.sin(v) + 1.5)(x).dtype == jnp.float32
        assert not jax.config.jax_enable_x64

    with _other_threads(work) as troubles:
        for factor in (0.7, 1.3):
            gradtest.assert_autodiff_matches(
                lambda p, v, c=factor: c * _loss(p, v), *_args()
            )
    assert not troubles


@pytest.mark.core
def test_checks_run_in_many_threads_at_once():
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    x, labels = jnp.linspace(0, 1, 12).reshape(4, 3), jnp.array([0, 1, 0, 1])

    def loss(params, x):
        logits = x @ params["w"] + params["b"]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean()

    def work(factor, verdicts):
        wrong = scaled_leaf(loss, "[0]['w']", factor)
        verdicts[factor] = gradtest.check(wrong, params, x).verdict

    verdicts = {}
    threads = [
        threading.Thread(target=work, args=(factor, verdicts))
        for factor in (1.0, 2.0, 0.5, -1.0)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wrong = {gradtest.Verdict.FAIL}
    assert verdicts.pop(1.0) is gradtest.Verdict.PASS
    assert set(verdicts.values()) == wrong
    assert len(verdicts) == 3
