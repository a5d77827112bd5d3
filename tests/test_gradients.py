import chex
import jax
import jax.numpy as jnp
import pytest

import gradtest
from gradtest import Verdict

close = gradtest.assert_grads_close
finite = gradtest.assert_grads_finite
flow = gradtest.assert_grads_flow

pytestmark = pytest.mark.core

VECTOR = jnp.array([1.0, -2.0, 3.0, 5.0])


FAILING = {
    "close": lambda **options: close(-VECTOR, VECTOR, **options),
    "finite": lambda **options: finite(jnp.linalg.norm, 0 * VECTOR, **options),
    "flow": lambda **options: flow(lambda w: 0.0 * jnp.sum(w), VECTOR, **options),
}


@pytest.mark.parametrize("name", FAILING)
def test_the_keywords_of_chex_work(name):
    with pytest.raises(KeyError) as caught:
        FAILING[name](
            custom_message="layer {}",
            custom_message_format_vars=(3,),
            include_default_message=False,
            exception_type=KeyError,
        )
    (message,) = caught.value.args
    assert message.endswith("[layer 3]")
    assert f"assert_grads_{name} failed" not in message
    assert caught.value.report.verdict is Verdict.FAIL


@pytest.mark.parametrize("name", FAILING)
def test_nothing_is_checked_where_chex_is_told_not_to(name):
    chex.disable_asserts()
    try:
        assert FAILING[name]().verdict is Verdict.NOT_CHECKED
    finally:
        chex.enable_asserts()


FLAGS = {
    "jax_enable_x64": True,
    "jax_debug_nans": True,
    "jax_disable_jit": True,
    "jax_check_tracer_leaks": True,
    "jax_numpy_dtype_promotion": "strict",
    "jax_numpy_rank_promotion": "raise",
}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("name", FAILING)
def test_verdicts_do_not_depend_on_flags(name, flag):
    before = jax.config.values[flag]
    jax.config.update(flag, FLAGS[flag])
    try:
        with pytest.raises(gradtest.GradientMismatch):
            FAILING[name]()
        assert jax.config.values[flag] == FLAGS[flag]
    finally:
        jax.config.update(flag, before)


class VariantsTest(chex.TestCase):
    @chex.variants(
        with_jit=True,
        without_jit=True,
        with_device=True,
        without_device=True,
        with_pmap=True,
    )
    def test_gradients_run_under_variants(self):
        finite(jnp.linalg.norm, VECTOR, variant=self.variant)
        flow(lambda w: jnp.sum(w), VECTOR, variant=self.variant)
        with pytest.raises(gradtest.GradientMismatch, match=r"x\[0\]: nan"):
            finite(jnp.linalg.norm, 0 * VECTOR, variant=self.variant)
        with pytest.raises(gradtest.GradientMismatch, match="does not depend on it"):
            flow(lambda w, x: jnp.sum(x), VECTOR, VECTOR, variant=self.variant)


SLIPS = {
    "no gradient in either tree": (
        lambda: close({"n": jnp.arange(3)}, {"n": jnp.arange(3)}),
        ValueError,
        "`claimed` and `reference` hold no gradient: wanted a float or complex array, "
        "got claimed['n'] (int32[3]: holds no gradient).",
    ),
    "empty trees": (
        lambda: close({}, {}),
        ValueError,
        "`claimed` and `reference` hold no gradient: wanted a float or complex array, "
        "got empty trees.",
    ),
    "rtol out of range": (
        lambda: close(VECTOR, VECTOR, rtol=1.5),
        ValueError,
        "`rtol` must lie between 0 and 1, got 1.5.",
    ),
    "finite: integers only": (
        lambda: finite(lambda n: n, jnp.arange(3)),
        ValueError,
        "`args` has no leaf to differentiate in argument 0: wanted a float or complex "
        "array, got n: int32[3].",
    ),
    "finite: no entries": (
        lambda: finite(jnp.sum, jnp.zeros((0, 2))),
        ValueError,
        "`args` has no entry to differentiate: a: float32[0, 2].",
    ),
    "finite: an argument named twice": (
        lambda: finite(jnp.add, VECTOR, VECTOR, argnums=(1, -1)),
        ValueError,
        "`argnums` names an argument twice, got (1, -1).",
    ),
    "finite: trials": (
        lambda: finite(jnp.sum, VECTOR, trials=0),
        ValueError,
        "`trials` must be an integer >= 1, got 0.",
    ),
    "finite: inconclusive": (
        lambda: finite(jnp.sum, VECTOR, inconclusive="ignore"),
        ValueError,
        "`inconclusive` must be 'raise' or 'warn', got 'ignore'.",
    ),
    "flow: no scalar": (
        lambda: flow(lambda w: w, VECTOR),
        TypeError,
        "`fn` must return one real number, a loss, got result: float32[4].",
    ),
    "flow: unknown leaf excluded": (
        lambda: flow(lambda w: jnp.sum(w["a"]), {"a": VECTOR}, exclude=["w['b']"]),
        ValueError,
        "`exclude` names \"w['b']\", which is no leaf of the arguments: there are "
        "w['a'].",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_bad_input_is_named(slip):
    call, kind, message = SLIPS[slip]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
