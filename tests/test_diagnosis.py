"""Causes are named where the numbers bear them out, and only there."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest._src import diagnose
from gradtest._src.diagnosis.clues import Named, Scene

pytestmark = pytest.mark.core

_RANDOM = np.random.default_rng(0)
X = _RANDOM.normal(size=(6, 8))
TRUE = _RANDOM.normal(size=(6, 8))
SQUARE = _RANDOM.normal(size=(5, 5))
COMPLEX = X + 1j * TRUE
VECTOR = _RANDOM.normal(size=12)
OTHER = _RANDOM.normal(size=(6, 8))
IDS = np.array([4, 0, 2, 2, 5, 4])
LABELS = np.array([1, 0, 1, 1, 0, 2])
MASK = np.array([True] * 9 + [False] * 3)
NOT_ZERO = np.where(np.abs(VECTOR) > 0.8, VECTOR, 0.0)
HALF = np.asarray(jnp.asarray(VECTOR, jnp.bfloat16), np.float64)


def scene(**arguments):
    named = tuple(Named(name, value) for name, value in arguments.items())
    return Scene(names=("w", "v"), arguments=named, outputs=(Named("y", np.tanh(X)),))


def causes(claimed, true, around=None, others=()):
    """Returns the causes named of the first leaf; `others` are pairs beside it."""
    pairs = [(claimed, true), *others]
    return diagnose.leaf_causes(
        [c for c, _ in pairs], [t for _, t in pairs], 0, 2e-6, scene=around
    )


def with_entries(array, places, values):
    changed = np.array(array)
    changed[places] = values
    return changed


def rows_of(factors):
    return TRUE * np.asarray(factors)[:, None]


# The claimed gradient, the true one, what is known beside them, and what is to be said.
_SYNTHETIC = {
    "sign flipped": (-TRUE, TRUE, None, "claimed = -1 x true in all 48 entries"),
    "constant factor": (1.37 * TRUE, TRUE, None, "1.37 times too large"),
    "constant factor (two)": (2 * TRUE, TRUE, None, "2 times too large in all 48"),
    "constant factor (pi)": (np.pi * TRUE, TRUE, None, "pi times too large"),
    "constant factor (batch)": (
        TRUE / 7, TRUE, scene(x=np.zeros((7, 3))), "7 is the size of axis 0 of x"),
    "constant factor (root)": (
        np.sqrt(10) * TRUE, TRUE, scene(q=np.zeros((2, 3, 10))),
        "the square root of 10, the last axis of q"),
    "constant factor (devices)": (
        16 * TRUE, TRUE, dataclasses.replace(scene(), devices=16),
        "16 is the number of devices"),
    "constant factor (argument)": (
        TRUE / 0.7, TRUE, scene(sigma=np.array(0.7)), "1 / (sigma)"),
    "constant factor (mask)": (
        TRUE * 12 / 9, TRUE, scene(mask=MASK), "12 / 9, of the entries that mask"),
    "constant factor (loss scale)": (2.0**15 * TRUE, TRUE, None, "2^15: a loss scale"),
    "transposed": (SQUARE.T, SQUARE, None, "the transpose of the true gradient"),
    "transposed (flipped)": (-SQUARE.T, SQUARE, None, "with its sign flipped"),
    "transposed (axes)": (
        TRUE.reshape(2, 2, 12).swapaxes(0, 1), TRUE.reshape(2, 2, 12), None,
        "axes in the order (1, 0, 2)"),
    "conjugate": (COMPLEX.conj(), COMPLEX, None, "the complex conjugate"),
    "reordered": (VECTOR[::-1], VECTOR, None, "reversed"),
    "reordered (rolled)": (np.roll(TRUE, 2, 0), TRUE, None, "shifted by 2 along axis"),
    "reordered (column-major)": (
        TRUE.reshape(8, 6).T.reshape(8, 6), TRUE.reshape(8, 6), None, "column-major"),
    "zero gradient": (0 * TRUE, TRUE, None, "zero in every entry"),
    "gradient where none is": (TRUE, 0 * TRUE, None, "does not depend on it"),
    "factor by rows": (rows_of([1, 2, 3.5, 4, 1.1, 7]), TRUE, None, "6 lines along"),
    "reduced over an axis": (
        np.broadcast_to(TRUE.mean(0), TRUE.shape), TRUE, None, "the mean of the true"),
    "downcast": (HALF, VECTOR, None, "bfloat16's precision alone"),
    "some entries wrong": (
        with_entries(TRUE, np.s_[4:], OTHER[4:]), TRUE, None, "(the last 2 rows)"),
    "some entries wrong (columns)": (
        with_entries(TRUE, np.s_[:, :4], 0), TRUE, None,
        "(the first 4 columns): they are zero"),
    "some entries wrong (run)": (
        with_entries(TRUE, np.s_[2:4], -TRUE[2:4]), TRUE, None,
        "(rows 2..3): their sign is flipped"),
    "some entries wrong (second)": (
        with_entries(TRUE, np.s_[1::2], 3 * TRUE[1::2]), TRUE, None,
        "(every second of the rows, from 1): they are 3 x the true ones"),
    "some entries wrong (blocks)": (
        with_entries(VECTOR, [2, 3, 6, 7, 10, 11], 9.0), VECTOR, None,
        "every second block of 2 entries, from 2"),
    "some entries wrong (diagonal)": (
        SQUARE + 0.3 * np.eye(5), SQUARE, None, "(the diagonal): they are off by 0.3"),
    "some entries wrong (triangle)": (
        np.tril(SQUARE), SQUARE, None, "(the upper triangle): they are zero"),
    "padded entries get gradient": (
        VECTOR, np.where(MASK, VECTOR, 0), scene(mask=MASK),
        "exactly where mask is False"),
    "masked out": (
        np.where(MASK, VECTOR, 0), VECTOR, scene(mask=MASK), "where mask is False"),
    "another mask": (
        np.where(np.roll(MASK, 3), VECTOR, 0), np.where(MASK, VECTOR, 0), None,
        "3 entries are zero that should not be"),
    "duplicates overwritten": (
        with_entries(TRUE, [2, 4], OTHER[[2, 4]]), TRUE, scene(ids=IDS),
        "those that ids names more than once"),
    "wrong at exact zeros": (
        np.where(NOT_ZERO == 0, 0.7, VECTOR), VECTOR, scene(x=NOT_ZERO), "x is 0"),
    "wrong at ties": (
        with_entries(VECTOR, [1, 5], 0.25), VECTOR,
        scene(x=with_entries(VECTOR, [1, 5], 0.5)), "x has the same value twice"),
    "wrong at a bound": (
        with_entries(VECTOR, VECTOR > 0.3, 0.25), VECTOR,
        scene(x=np.minimum(VECTOR, 0.3)), "x is 0.3, its largest value"),
    "wrong on one branch": (
        np.where(X < 0, 0.1 * TRUE, TRUE), TRUE, scene(x=X), "exactly where x < 0"),
    "wrong on one branch (outside)": (
        np.where(np.abs(X) > 1, 2 * TRUE, TRUE), TRUE, scene(x=X), "|x| > 1"),
    "wrong on one branch (label)": (
        rows_of(np.where(LABELS == 1, 3, 1)), TRUE, scene(t=LABELS), "where t is 1"),
    "extra term": (
        TRUE + 0.01 * X, TRUE, scene(w=X), "claimed = true + 0.01 * w in all 48"),
    "extra term (offset)": (TRUE + 2.5, TRUE, None, "claimed = true + 2.5 in all 48"),
    "missing term": (TRUE, TRUE + 5 * X, scene(w=X), "claimed = true - 5 * w"),
    "missing term (lines)": (
        TRUE, TRUE + X * _RANDOM.normal(size=(6, 1)), scene(x=X),
        "a multiple of x on each of 6 lines along axis 1"),
    "extra factor": (TRUE * X, TRUE, scene(x=X), "claimed = true * x in all 48"),
    "missing factor": (
        TRUE, TRUE * (1 - np.tanh(X) ** 2), scene(), "true = claimed * (1 - y^2)"),
    "missing factor (matrix)": (
        TRUE[:, :5], TRUE[:, :5] @ SQUARE.T, scene(a=SQUARE), "times the matrix a"),
    "transposed (operand)": (
        TRUE[:, :5] @ SQUARE, TRUE[:, :5] @ SQUARE.T, scene(a=SQUARE),
        "with a in place of its transpose"),
    "constant slope": (
        0.9 * OTHER, TRUE,
        dataclasses.replace(scene(), cotangents=(Named("the cotangent", OTHER),)),
        "claimed = 0.9 x the cotangent"),
    "wrong slope": (
        TRUE * (1 + 0.3 * np.sin(2 * X)), TRUE, scene(x=X), "smooth function of x"),
}  # fmt: skip


@pytest.mark.parametrize("case", _SYNTHETIC)
def test_a_pattern_in_the_numbers_is_named_first_with_its_evidence(case):
    claimed, true, around, says = _SYNTHETIC[case]
    first = causes(claimed, true, around)[0]
    assert first.name == case.partition(" (")[0]
    assert says in first.says
    assert 0.6 <= first.likelihood <= 1
    assert first.remedy


@pytest.mark.parametrize("case", [c for c in _SYNTHETIC if "downcast" not in c])
def test_the_rounding_of_float32_hides_no_pattern(case):
    claimed, true, around, _ = _SYNTHETIC[case]
    noise = 1 + 3e-8 * np.random.default_rng(1).normal(size=claimed.shape)
    first = causes(claimed * noise, true, around)[0]
    assert first.name == case.partition(" (")[0]


def test_swapped_leaves_are_named_with_the_other_leaf():
    first = causes(OTHER, TRUE, scene(), [(TRUE, OTHER)])[0]
    assert first.name == "leaves swapped"
    assert "that of v have changed places" in first.says


def test_a_cycle_of_three_leaves_names_whose_gradient_it_is():
    around = Scene(names=("a", "b", "c"))
    first = causes(OTHER, TRUE, around, [(X, OTHER), (TRUE, X)])[0]
    assert (first.name, first.likelihood) == ("leaves swapped", 0.93)
    assert "it is the gradient of b" in first.says


def _unrelated(seed):
    random = np.random.default_rng(seed)
    around = scene(x=X, w=OTHER, ids=IDS, t=LABELS, s=np.array(0.7), a=SQUARE[:, :5])
    return causes(random.normal(size=(6, 8)), TRUE, around)


def test_numbers_that_have_nothing_to_do_with_it_get_no_cause():
    for seed in range(40):
        (cause,) = _unrelated(seed)
        assert cause.name == "different"
        assert cause.likelihood <= 0.1


@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_numbers_drawn_at_random_are_no_proof(count):
    for seed in range(40):
        random = np.random.default_rng(seed)
        claimed, true, x = random.normal(size=(3, count))
        first = causes(claimed, true, scene(x=x))[0]
        assert first.likelihood < 0.7, first


def test_one_entry_is_no_proof_of_a_factor():
    (cause,) = causes(np.array(1.37), np.array(1.0))
    assert cause.name == "different"
    assert "claimed = 1.37 x true" in cause.says
    (cause,) = causes(np.array(2.0), np.array(1.0))
    assert (cause.name, cause.likelihood) == ("constant factor", 0.6)


def test_one_entry_that_shares_the_factor_of_a_large_leaf_is_believed():
    first = causes(np.array(1.37), np.array(1.0), None, [(1.37 * TRUE, TRUE)])[0]
    assert (first.name, first.likelihood) == ("constant factor", 0.95)


def test_a_factor_that_holds_for_most_entries_is_no_constant_factor():
    claimed = with_entries(2 * TRUE, (0, 0), 0.1)
    assert causes(claimed, TRUE)[0].name != "constant factor"


def test_a_symmetric_gradient_is_not_called_transposed():
    symmetric = SQUARE + SQUARE.T
    assert causes(1.5 * symmetric, symmetric)[0].name == "constant factor"


@pytest.mark.parametrize(
    "claimed",
    [
        np.full((6, 8), np.nan),
        with_entries(TRUE, (0, 0), np.inf),
        np.full((6, 8), 1e308),
    ],
)
def test_numbers_that_are_not_finite_raise_nothing(claimed):
    assert causes(claimed, TRUE, scene(x=X))
    assert causes(TRUE, claimed, scene(x=claimed))


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (1, 1)])
def test_small_and_empty_leaves_raise_nothing(shape):
    claimed, true = np.full(shape, 3.0), np.full(shape, 1.7)
    assert causes(claimed, true, scene(x=np.ones(shape), n=np.arange(3)))


def test_several_causes_are_ranked_and_named_once():
    around = scene(x=NOT_ZERO)
    found = causes(np.where(NOT_ZERO == 0, 0.0, VECTOR), VECTOR, around)
    names = [cause.name for cause in found]
    assert names[0] == "wrong at exact zeros"
    assert "masked out" in names
    assert len({*names}) == len(names) <= 4
    sure = [cause.likelihood for cause in found]
    assert sure == sorted(sure, reverse=True)


def test_a_crashing_recogniser_hides_nothing(monkeypatch):
    from gradtest._src.diagnosis import table

    def crashes(clues):
        raise RuntimeError("no")

    monkeypatch.setattr(table, "_AT_FIRST_SIGHT", (crashes, *table._AT_FIRST_SIGHT))
    assert causes(-TRUE, TRUE)[0].name == "sign flipped"


# --- causes that ask the function itself ------------------------------------------


def ruled(primal, backward):
    """A function whose derivative is `backward(arguments, cotangent)`."""
    rule = jax.custom_vjp(primal)
    rule.defvjp(lambda *args: (primal(*args), args), backward)
    return rule


def first_cause(fn, *args, **options):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(fn, *args, **options)
    failed = [
        f for f in caught.value.report.findings if f.verdict is gradtest.Verdict.FAIL
    ]
    return failed[0].cause


A, B = (jnp.asarray(_RANDOM.normal(size=(4, 5)), jnp.float32) for _ in range(2))
W = jnp.asarray(_RANDOM.normal(size=(5, 5)), jnp.float32)


def _product(a, b):
    return jnp.tanh(a) * b


def _logits(x):
    return jax.nn.log_softmax(x)


def _both(x):
    return jnp.sin(x), jnp.cos(x)


def _gelu(x):
    return x * jax.scipy.special.erf(x)


_ASKED = {
    "operands swapped": (
        ruled(_product, lambda kept, g: jax.vjp(_product, *kept[::-1])[1](g)),
        (A, B), "in each other's place"),
    "missing sum": (
        ruled(lambda a, w: a * w, lambda kept, g: (g * kept[1], (g * kept[0])[-1])),
        (A, W[0]), "the last of 4 slices"),
    "dropped term": (
        ruled(_both, lambda kept, g: (g[0] * jnp.cos(kept[0]),)), (A,),
        "the cotangent of result[1] is missing"),
    "transposed": (
        ruled(lambda x: jnp.cumsum(x, 1), lambda kept, g: (jnp.cumsum(g, 1),)), (A,),
        "in the forward direction"),
    "missing term": (
        ruled(_gelu, lambda kept, g: (g * jax.scipy.special.erf(kept[0]),)), (A,),
        "it lacks exactly what flows through"),
    "sign flipped in a term": (
        ruled(_gelu, lambda kept, g: (
            2 * g * jax.scipy.special.erf(kept[0]) - jax.vjp(_gelu, *kept)[1](g)[0],)),
        (A,), "comes with its sign flipped"),
    "missing term (sum)": (
        ruled(_logits, lambda kept, g: (g,)), (A,), "flows through `log`"),
    "wrong operand": (
        ruled(jnp.sin, lambda kept, g: (g * jnp.cos(jnp.sin(kept[0])),)), (A,),
        "with result[0] in the place of"),
}  # fmt: skip


@pytest.mark.parametrize("case", _ASKED)
def test_what_another_gradient_would_explain_is_asked_of_the_function(case):
    rule, args, says = _ASKED[case]
    cause = first_cause(rule, *args)
    assert cause.name == case.partition(" (")[0]
    assert says in cause.says


def failed_finding(fn, *args):
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_custom_rules_match(fn, *args)
    found = caught.value.report.findings
    return next(f for f in found if f.verdict is gradtest.Verdict.FAIL)


def test_zeros_that_no_cotangent_reaches_are_told_from_products_that_are_zero():
    cut = ruled(jnp.sin, lambda kept, g: (jnp.zeros_like(g),))
    finding = failed_finding(cut, A)
    assert finding.cause.name == "zero gradient"
    assert [cause.name for cause in finding.other_causes] == ["no path"]
    multiplied = ruled(jnp.sin, lambda kept, g: (g * jnp.zeros_like(g),))
    finding = failed_finding(multiplied, A)
    assert (finding.cause.name, finding.other_causes) == ("zero gradient", ())


def test_nan_is_told_with_the_values_at_which_it_comes():
    x = jnp.array([0.5, -1.0, 2.0, -0.3, 0.7, 1.1, 0.2, -2.0])
    cause = first_cause(lambda x: jnp.where(x > 0, jnp.sqrt(x), 0.0), x)
    assert cause.name == "NaN gradient"
    assert "3 of 8 entries are NaN" in cause.says
    assert "exactly where x < 0" in cause.says


def test_a_second_derivative_that_is_a_part_of_the_true_one_is_called_second_order():
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_autodiff_matches(
            ruled(lambda x: jnp.sum(x**3), lambda kept, g: (
                3 * g * kept[0] * jax.lax.stop_gradient(kept[0]),)),
            A[0], order=2,
        )  # fmt: skip
    failed = [f for f in caught.value.report.findings if f.order == 2]
    names = {c.name for f in failed for c in (f.cause, *f.other_causes)}
    assert names & {"second order only", "constant factor"}


def test_a_passing_check_looks_for_no_cause(monkeypatch):
    from gradtest._src.diagnosis import table

    def refuses(*args, **options):
        raise AssertionError("looked for a cause")

    monkeypatch.setattr(table, "_seen", refuses)
    report = gradtest.assert_autodiff_matches(lambda x: jnp.sum(jnp.sin(x)), A)
    assert report.verdict is gradtest.Verdict.PASS
