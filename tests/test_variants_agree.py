"""A function has one gradient however JAX runs it, or the first way out is named."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.custom_batching import custom_vmap

import gradtest
from gradtest.domains import normal, spd

_X = np.sin(np.arange(1, 9, dtype=np.float32))
_ONE_DEVICE = ["repeat", "eager", "jit", "remat", "vmap", "scan", "donated"]


def agree(fn, *args, variants=_ONE_DEVICE, **options):
    return gradtest.assert_variants_agree(fn, *args, variants=variants, **options)


def refused(fn, *args, **options):
    """Returns the message and the names of the cells that depart."""
    with pytest.raises(gradtest.GradientMismatch) as caught:
        agree(fn, *args, **options)
    found = caught.value.report.findings
    departs = [f.check for f in found if f.verdict is gradtest.Verdict.FAIL]
    return str(caught.value), departs


def sine(backward, forward=None):
    """Returns a sine with a rule of its own; forward keeps the argument."""

    @jax.custom_vjp
    def wave(x):
        return jnp.sin(x)

    wave.defvjp(forward or (lambda x: (jnp.sin(x), x)), backward)
    return wave


def right(x, g):
    return (g * jnp.cos(x),)


# --- right ones -------------------------------------------------------------------


@pytest.mark.core
def test_a_right_rule_agrees_on_one_device():
    report = agree(sine(right), _X)
    assert report.verdict is gradtest.Verdict.PASS
    assert [finding.check for finding in report.findings] == [
        "repeat",
        "eager",
        "jit",
        "remat",
        "vmap[1]",
        "vmap[3]",
        "vmap[3, differentiated]",
        "vmap[3, cotangents alone]",
        "scan[3]",
        "scan[3, differentiated]",
        "donated",
    ]
    for finding in report.findings:
        assert finding.size <= finding.allowed
        if finding.check != "repeat":
            gap, allowed = finding.rounding
            assert gap <= allowed < 1e-3


def test_a_tree_of_everything_agrees():
    def fn(params, integers, key, scale, nothing, tag, flag):
        assert nothing is None
        assert tag == "tag"
        noise = jax.random.normal(key, (3,), jnp.bfloat16)
        y = params["half"] * scale + noise
        chosen = jnp.where(flag, y, -y)[integers[:3] % 3]
        result = {
            "sum": jnp.sum(chosen * params["half"]),
            "complex": params["complex"] * 2j,
            "empty": params["empty"],
            "constant": jnp.ones(2),
            "count": integers + 1,
        }
        return result, chosen

    params = {
        "half": jnp.arange(3.0, dtype=jnp.bfloat16),
        "complex": jnp.array([1 + 2j, 3j], jnp.complex64),
        "empty": jnp.zeros((0, 2)),
        "nothing": None,
    }
    report = agree(
        fn, params, jnp.arange(4), jax.random.key(0), 2.0, None, "tag",
        jnp.array(True), has_aux=True,
    )  # fmt: skip
    assert report.verdict is gradtest.Verdict.PASS
    checks = [finding.check for finding in report.findings]
    assert "vmap[3, params alone]" in checks
    assert "vmap[3, scale alone]" in checks
    assert any("result['count']" in line for line in report.unchecked)


def test_keys_whose_batches_draw_otherwise_are_shared():
    key = jax.random.key(0, impl="rbg")
    report = agree(lambda x, k: x * jax.random.normal(k, (8,)), _X, key)
    assert report.verdict is gradtest.Verdict.PASS


def test_a_rule_with_static_arguments_agrees_at_drawn_points():
    power = jax.custom_vjp(lambda n, x: x**n, nondiff_argnums=(0,))
    power.defvjp(lambda n, x: (x**n, x), lambda n, x, g: (n * g * x ** (n - 1),))
    report = agree(
        lambda x, a: jnp.sum(power(3, x) @ jnp.linalg.cholesky(a)),
        normal(4),
        spd((4, 4)),
        trials=2,
        variants=["jit", "vmap[3]", "scan[3]"],
    )
    assert report.verdict is gradtest.Verdict.PASS


def test_a_callback_with_a_right_rule_agrees():
    def host_sine(x):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(np.sin, shape, x, vmap_method="sequential")

    wave = jax.custom_vjp(host_sine)
    wave.defvjp(lambda x: (host_sine(x), x), right)
    report = agree(wave, _X)
    assert report.verdict is gradtest.Verdict.PASS
    assert "pure_callback" in report.precision[0]


def test_given_arrays_are_left_alone():
    x, held = jnp.asarray(_X), jnp.arange(8)
    agree(lambda x, n: x * n, x, held, variants=["eager", "jit", "donated"])
    assert not x.is_deleted()
    assert not held.is_deleted()
    np.testing.assert_array_equal(x, _X)


def test_points_without_a_gradient_are_left_out_and_told():
    report = agree(lambda x: jnp.log(x - 0.95), jnp.ones(3), variants=["vmap"])
    assert report.verdict is gradtest.Verdict.PASS
    assert "no finite gradient" in report.notes[0]


# --- broken ones ------------------------------------------------------------------


@pytest.mark.core
def test_a_batching_rule_that_counts_the_batch_is_named_with_its_factor():
    def backward(x, g):
        @custom_vmap
        def product(x, g):
            return g * jnp.cos(x)

        @product.def_vmap
        def _(size, batched, x, g):
            return size * g * jnp.cos(x), True

        return (product(x, g),)

    wave = sine(backward)
    message, departs = refused(lambda x: wave(x).sum(), np.zeros(8, np.float32))
    assert departs == [
        "vmap[3]",
        "vmap[3, differentiated]",
        "vmap[3, cotangents alone]",
    ]
    assert message.splitlines() == [
        "assert_variants_agree failed: the gradient of <lambda> departs in the "
        "variant 'vmap[3]' at x (float32[8]).",
        "  x[0]: 3 there, 1 by itself.",
        "  relative difference 2, allowed 2e-06; in float64.",
        "  Likely cause: under jax.vmap over 3 points it is 3 times too large (the "
        "number of points).",
        "  Try: look for reductions over all axes, sizes or axis names that count the "
        "batch, and for a custom_vmap or kernel whose batching is wrong.",
        "  Departs as well: vmap[3, differentiated], vmap[3, cotangents alone]; 8 "
        "agree.",
        "  Replay: gradtest.assert_variants_agree(<lambda>, ..., key=0)",
    ]


def test_a_batching_rule_that_drops_examples_is_named():
    @custom_vmap
    def slope(x, g):
        return g * jnp.cos(x)

    @slope.def_vmap
    def _(size, batched, x, g):
        one = slope(x[0], g[0])
        return jnp.broadcast_to(one, (size, *one.shape)), True

    message, departs = refused(sine(lambda x, g: (slope(x, g),)), _X)
    assert departs[0] == "vmap[3]"
    assert "on points 1, 2 alone: the other is right" in message


def test_a_rule_that_branches_on_values_fails_under_jit():
    def backward(x, g):
        return (2 * g if (x > 10).any() else g * jnp.cos(x),)

    message, departs = refused(sine(backward), _X)
    assert departs == ["jit"]
    assert "under jax.jit it raises TracerBoolConversionError" in message


def test_a_function_that_branches_on_values_fails_under_jit():
    message, departs = refused(lambda x: x if x[0] > 10 else jnp.sin(x), _X)
    assert departs == ["jit"]
    assert "TracerBoolConversionError" in message


def test_a_rule_that_goes_another_way_without_jit_is_named():
    def backward(x, g):
        return ((1 if isinstance(x, jax.core.Tracer) else 3) * g * jnp.cos(x),)

    message, departs = refused(sine(backward), _X)
    assert departs == ["eager"]
    assert "run without jit it is 3 times too large in all 8 entries" in message


def test_a_rule_that_keeps_state_from_forward_to_backward_fails():
    kept = {}

    def forward(x):
        kept["x"] = x
        return jnp.sin(x), None

    message, departs = refused(sine(lambda _, g: right(kept["x"], g), forward), _X)
    assert departs[0] == "remat"
    assert "scan[3, differentiated]" in departs
    assert "nothing kept between calls" in message


def test_a_counter_is_not_repeatable_and_nothing_else_is_blamed():
    count = [0]

    def backward(x, g):
        count[0] += 1
        return (count[0] * g * jnp.cos(x),)

    message, departs = refused(sine(backward), _X, variants=["vmap"])
    assert departs == ["repeat"]
    assert "traced a second time it is" in message


def test_numbers_drawn_inside_are_not_repeatable():
    def fn(x):
        return jnp.sum(x * np.random.default_rng().normal(size=8).astype(np.float32))

    message, departs = refused(fn, _X)
    assert departs == ["repeat"]
    assert "pass keys and state as arguments" in message


def test_an_argument_that_is_read_after_it_was_donated_fails():
    eats = jax.jit(jnp.sin, donate_argnums=0)
    x = jnp.asarray(_X)
    message, departs = refused(lambda x: jnp.sum(eats(x) * x), x)
    assert departs == ["eager"]
    assert "Array has been deleted" in message
    assert "read no argument once it was donated" in message
    assert not x.is_deleted()


def test_a_value_that_departs_is_told_as_a_value():
    @custom_vmap
    def shifted(x):
        return x

    @shifted.def_vmap
    def _(size, batched, x):
        return x + 1, True

    def fn(x):
        return jnp.sin(x) + shifted(lax.stop_gradient(x))

    message, departs = refused(fn, _X)
    assert departs[0] == "vmap[1]"
    assert "the value of fn departs in the variant 'vmap[1]' at result" in message


# --- nothing to say ---------------------------------------------------------------


def test_a_gradient_that_is_not_finite_is_inconclusive():
    with pytest.raises(gradtest.GradientInconclusive, match="not finite"):
        agree(lambda x: jnp.sqrt(x - x), _X)


def _through_half(derivative):
    def run(moving, held, seed):
        halves = [x.astype(jnp.float16).astype(x.dtype) for x in moving]
        return derivative(halves, held, seed)

    return run


def test_what_rounding_decides_is_inconclusive():
    # Half precision rounds it to 0.5, which `round` takes to 0 in place of 1.
    x = jnp.nextafter(jnp.float32(0.5), jnp.float32(1))
    with pytest.raises(gradtest.GradientInconclusive, match="rounding every operation"):
        agree(lambda x: x * jnp.round(x), x, variants={"half": _through_half})


def test_lost_precision_without_decisions_departs():
    message, departs = refused(jnp.sin, _X, variants={"half": _through_half})
    assert departs == ["half"]
    assert "in working precision" in message
    agree(jnp.sin, _X, variants={"half": _through_half}, rounding_rtol=1e-2)


def test_what_asks_for_more_devices_than_there_are_is_inconclusive():
    with pytest.raises(gradtest.GradientInconclusive) as caught:
        agree(jnp.sin, _X, variants="pmap[512]")
    assert "xla_force_host_platform_device_count=512" in str(caught.value)


def test_more_devices_are_listed_beside_what_runs():
    report = agree(jnp.sin, _X, variants=["jit", "shard_map[512, check_vma=True]"])
    assert [finding.check for finding in report.findings] == ["jit"]
    (line,) = report.unchecked
    assert line.startswith("shard_map[512, check_vma=True]: there ")
    assert "jax_num_cpu_devices=512" in line


def test_a_cell_that_jax_does_not_offer_is_listed():
    def fn(x):
        jax.experimental.io_callback(lambda: None, None)
        return jnp.sin(x)

    report = agree(fn, _X, variants=["jit", "remat"])
    assert [finding.check for finding in report.findings] == ["jit"]
    assert report.unchecked[0].startswith("remat: JAX: ")


# --- choosing ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variants", "error", "words"),
    [
        (["jitt"], ValueError, "'jitt', which is none: there are 'repeat', 'eager'"),
        (["vmap[7]"], ValueError, "there are 'vmap\\[1\\]', 'vmap\\[3\\]'"),
        (["vmap[3"], ValueError, "'vmap\\[3', which is none"),
        ([], ValueError, "`variants` is empty"),
        ({}, ValueError, "`variants` is empty"),
        (3, TypeError, "`variants` must be None, names"),
        (["jit", 3], TypeError, "`variants` must hold names and transformations"),
        ({"a": "jit"}, TypeError, "`variants\\['a'\\]` must be callable"),
        ({1: jax.jit}, TypeError, "`variants` must have names as keys"),
        ({"bad": lambda f: lambda *a: f(*a)[0]}, TypeError, "`variants` has 'bad'"),
    ],
)
def test_a_wrong_choice_is_told_at_once(variants, error, words):
    with pytest.raises(error, match=words):
        agree(jnp.sin, _X, variants=variants)


@pytest.mark.core
def test_own_transformations_stand_beside_names():
    variants = ["vmap[3]", jax.jit, jax.checkpoint, jax.vmap]
    report = agree(sine(right), _X, variants=variants)
    checks = [finding.check for finding in report.findings]
    assert checks == ["vmap[3]", "jit (2)", "checkpoint", "vmap (2)"]


def test_a_transformation_that_changes_the_gradient_is_caught():
    def twice(derivative):
        return lambda *parts: [2 * result for result in derivative(*parts)]

    message, departs = refused(jnp.sin, _X, variants={"mine": twice})
    assert departs == ["mine"]
    assert "under mine it is 2 times too large" in message


class UnderVariantsTest(chex.TestCase):
    @chex.all_variants
    def test_a_right_rule_agrees(self):
        report = agree(sine(right), _X, variants=self.variant)
        (finding,) = report.findings
        assert finding.check.startswith("chex variant with")

    @chex.variants(with_jit=True, with_pmap=True)
    def test_a_rule_that_sees_no_values_is_caught(self):
        def backward(x, g):
            return ((1 if isinstance(x, jax.core.Tracer) else 3) * g * jnp.cos(x),)

        _, departs = refused(sine(backward), _X, variants=["eager", self.variant])
        assert departs == ["eager"]


@pytest.mark.core
def test_wrong_arguments_are_told():
    with pytest.raises(TypeError, match="`fn` must be callable"):
        agree(3, _X)
    with pytest.raises(ValueError, match="no leaf to differentiate"):
        agree(lambda n: n, np.arange(3))
    with pytest.raises(ValueError, match="`fn` must have a gradient"):
        agree(lambda x: lax.while_loop(lambda y: y[0] < 2, lambda y: y + 1, x), _X)
    with pytest.raises(TypeError, match="called on traced values"):
        jax.jit(lambda x: agree(jnp.sin, x))(_X)
    with pytest.raises(ZeroDivisionError):
        agree(lambda x: 1 / 0, _X)


def test_a_key_that_is_excluded_is_listed():
    report = agree(lambda x, y: x * y, _X, _X, exclude=("y",), variants="jit")
    assert "y (excluded)" in report.unchecked


def test_the_report_is_a_table():
    report = agree(jnp.sin, _X, variants=["jit", "vmap[3]"])
    lines = str(report).splitlines()
    assert lines[0] == "PASS: assert_variants_agree(sin)"
    heads = ["variant", "verdict", "in float64", "as it runs", "allowed", "worst at"]
    assert [head for head in heads if head not in lines[1]] == []
    assert [line.split()[:2] for line in lines[2:4]] == [
        ["jit", "PASS"],
        ["vmap[3]", "PASS"],
    ]
