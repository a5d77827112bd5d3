import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest import Verdict

close = gradtest.assert_grads_close

pytestmark = pytest.mark.core

VECTOR = jnp.array([1.0, -2.0, 3.0, 5.0])
MATRIX = jnp.array([[1.0, -2.0, 3.0], [4.0, 0.5, 7.0], [-3.0, 2.0, 1.0]])
COMPLEX = jnp.array([1.0 + 2.0j, -3.0 + 0.5j])
FLOAT0 = np.zeros(4, jax.dtypes.float0)


def report_of(assertion, *args, **options):
    """Returns the report, whether the assertion passes or not."""
    try:
        return assertion(*args, **options)
    except (gradtest.GradientMismatch, gradtest.GradientInconclusive) as error:
        return error.report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_gradients_that_differ_by_rounding_are_close(dtype):
    reference = np.random.default_rng(0).standard_normal(1000)
    if dtype == "complex64":
        reference = reference * (1 + 2j)
    claimed = {"w": jnp.asarray(reference, dtype)}
    report = close(claimed, {"w": reference})
    assert report.verdict is Verdict.PASS
    assert report.leaf("claimed['w']").size > 0


BROKEN = {
    "sign flipped": (-VECTOR, VECTOR),
    "constant factor": (2 * VECTOR, VECTOR),
    "transposed": (MATRIX.T, MATRIX),
    "conjugate": (jnp.conj(COMPLEX), COMPLEX),
    "zero gradient": (0 * VECTOR, VECTOR),
    "gradient where none is": (VECTOR, 0 * VECTOR),
    "some entries wrong": (VECTOR.at[1].add(1.0), VECTOR),
    "reordered": (VECTOR[::-1], VECTOR),
    "different": (VECTOR[::-1] * jnp.exp(VECTOR), VECTOR),
}


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("cause", BROKEN)
def test_a_difference_is_named_by_its_cause(cause, dtype):
    claimed, reference = BROKEN[cause]
    if dtype and not jnp.iscomplexobj(claimed):
        claimed, reference = claimed.astype(dtype), reference.astype(dtype)
    report = report_of(close, [VECTOR, claimed], [VECTOR, reference])
    assert report.leaf("claimed[0]").verdict is Verdict.PASS
    found = report.leaf("claimed[1]")
    assert (found.verdict, found.cause.name) == (Verdict.FAIL, cause)


def test_swapped_leaves_are_named():
    claimed, reference = [VECTOR, VECTOR**2], [VECTOR**2, VECTOR]
    found = report_of(close, claimed, reference).leaf("claimed[0]")
    assert found.cause.name == "leaves swapped"


def test_a_small_leaf_does_not_hide_behind_a_large_one():
    large = 1e6 * jnp.ones(100)
    claimed, reference = [large, 3 * VECTOR], [large, VECTOR]
    assert report_of(close, claimed, reference).leaf("claimed[1]").size == 2


def test_one_entry_does_not_hide_in_a_large_leaf():
    reference = jnp.ones((1000, 1000))
    with pytest.raises(
        gradtest.GradientMismatch, match=r"claimed\[3, 4\]: claimed 1.5"
    ):
        close(reference.at[3, 4].mul(1.5), reference)


@pytest.mark.parametrize("size", [1, 1000, 1_000_000])
def test_the_tolerance_does_not_grow_with_size(size):
    reference = jnp.ones(size)
    close(reference * (1 + 1e-5), reference)
    with pytest.raises(gradtest.GradientMismatch):
        close(reference * (1 + 2e-5), reference)


def test_a_zero_gradient_may_have_the_noise_of_the_largest_leaf():
    close([VECTOR, 1e-8 * VECTOR], [VECTOR, 0 * VECTOR])
    with pytest.raises(gradtest.GradientMismatch):
        close([VECTOR, 1e-6 * VECTOR], [VECTOR, 0 * VECTOR])


def test_the_coarser_dtype_sets_the_tolerance():
    report = close(VECTOR.astype(jnp.bfloat16), 1.02 * VECTOR)
    assert report.smallest_seen == pytest.approx(1 / 16, rel=1e-5)
    assert report.leaf("claimed").notes == ("the reference is float32",)


def test_rtol_replaces_the_tolerance_of_the_dtype():
    close(1.01 * VECTOR, VECTOR, rtol=0.02)
    with pytest.raises(gradtest.GradientMismatch):
        close(1.01 * VECTOR, VECTOR, rtol=0.005)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_close_to_nothing(bad):
    spoilt = VECTOR.at[2].set(bad)
    for reference in (VECTOR, spoilt):
        with pytest.raises(gradtest.GradientMismatch, match=r"claimed\[2\]: claimed"):
            close(spoilt, reference)
    with pytest.raises(gradtest.GradientInconclusive, match="1 of 4 entries") as caught:
        close(VECTOR, spoilt)
    assert caught.value.report.smallest_seen == float("inf")


def test_leaves_without_a_gradient_are_listed_and_not_compared():
    claimed = {"a": VECTOR, "n": jnp.arange(4), "none": None, "e": jnp.zeros((0, 2))}
    reference = {"a": VECTOR, "n": FLOAT0, "none": None, "e": jnp.ones((0, 2))}
    assert close(claimed, reference).unchecked == (
        "claimed['e'] (float32[0, 2]: has no entries)",
        "claimed['n'] (int32[4]: holds no gradient)",
        "claimed['none'] (None: holds no gradient)",
    )


UNLIKE = {
    "missing leaf": (
        {"a": VECTOR},
        {"a": VECTOR, "b": VECTOR},
        "reference['b']",
        "`reference` has float32[4] here, `claimed` has nothing",
    ),
    "leaf too many": (
        {"a": VECTOR, "b": VECTOR},
        {"a": VECTOR},
        "claimed['b']",
        "`claimed` has float32[4] here, `reference` has nothing",
    ),
    "other container": (
        {"a": (VECTOR,)},
        {"a": [VECTOR]},
        "claimed",
        "`claimed` is PyTreeDef({'a': (*,)}), `reference` is PyTreeDef({'a': [*]})",
    ),
    "other shape": (
        [VECTOR, VECTOR[:3]],
        [VECTOR, VECTOR],
        "claimed[1]",
        "`claimed` has float32[3] here, `reference` has float32[4]",
    ),
    "no gradient": (
        [VECTOR, None],
        [VECTOR, VECTOR],
        "claimed[1]",
        "`claimed` has None here, `reference` has float32[4]",
    ),
    "no tangent space": (
        [VECTOR, FLOAT0],
        [VECTOR, VECTOR],
        "claimed[1]",
        "`claimed` has float0[4] here, `reference` has float32[4]",
    ),
    "complex for real": (
        [VECTOR, VECTOR + 0j],
        [VECTOR, VECTOR],
        "claimed[1]",
        "`claimed` has complex64[4] here, `reference` has float32[4]",
    ),
}


@pytest.mark.parametrize("slip", UNLIKE)
def test_unlike_trees_are_a_mismatch_with_its_path(slip):
    claimed, reference, place, says = UNLIKE[slip]
    report = report_of(close, claimed, reference)
    (found,) = (f for f in report.findings if f.verdict is Verdict.FAIL)
    assert (found.name, found.cause.says) == (place, says)


def test_the_message_of_two_gradients_that_differ():
    with pytest.raises(gradtest.GradientMismatch) as caught:
        close({"w": -VECTOR, "b": VECTOR}, {"w": VECTOR, "b": VECTOR})
    assert str(caught.value) == (
        "assert_grads_close failed: the gradients differ at claimed['w'] "
        "(float32[4]).\n"
        "  claimed['w'][3]: claimed -5, reference 5; relative difference 2, allowed "
        "2e-05.\n"
        "  Likely cause: the sign is flipped: claimed = -1 x true in all 4 entries.\n"
        "  Try: negate the result."
    )
