"""Every real bug is refused and named, and its repaired twin is accepted."""

import pytest

import gradtest
from tests.planted_lines import BUGS_NAMED_BESIDE, is_planted
from tests.real_bugs import REAL_BUGS, RealBug

# What the report calls each bug: the first cause of the first wrong leaf.
_CAUSES = {
    "smoothing_without_inverse_sigma": "constant factor",
    "triangular_solve_unmasked_tangent": "some entries wrong",
    "one_parameter_of_1025_zero": "zero gradient",
    "causal_attention_block_sizes": "some entries wrong",
    "attention_scores_in_bfloat16": "unstable arithmetic",
    "segment_sum_padded_ids": "padded entries get gradient",
    "softplus_at_zero": "wrong at exact zeros",
    "nan_through_untaken_square_root": "NaN gradient",
    "log_beta_hessian_at_tie": "wrong at ties",
    "squared_modulus_conjugate": "conjugate",
    "implicit_root_coefficient": "zero gradient",
    "data_parallel_sum_for_mean": "constant factor",
}


def _cases(bugs):
    return [
        pytest.param(
            bug,
            id=bug.name,
            marks=[pytest.mark.devices] if bug.devices > 1 else [pytest.mark.core],
        )
        for bug in bugs
    ]


def _check(bug: RealBug, fn, args):
    return gradtest.assert_autodiff_matches(
        fn, *args, argnums=bug.argnums, order=bug.order
    )


@pytest.mark.parametrize("bug", _cases(REAL_BUGS))
def test_the_right_twin_is_accepted(bug):
    fn, args = bug.make_right()
    report = _check(bug, fn, args)
    assert report.verdict is gradtest.Verdict.PASS
    assert set(report.modes) == set(bug.modes)


@pytest.mark.parametrize("bug", _cases(REAL_BUGS))
def test_the_wrong_twin_is_refused_and_the_cause_named(bug):
    fn, args = bug.make_wrong()
    with pytest.raises(gradtest.GradientMismatch) as caught:
        _check(bug, fn, args)
    found = caught.value.report.findings
    first = next(f for f in found if f.verdict is gradtest.Verdict.FAIL)
    assert first.cause.name == _CAUSES[bug.name]
    build = bug.make_wrong.args[0]
    named = is_planted(first.line, build)
    assert named == (bug.name not in BUGS_NAMED_BESIDE), first.line


@pytest.mark.parametrize("bug", _cases(b for b in REAL_BUGS if b.generic_args))
def test_the_wrong_twin_looks_right_at_a_generic_point(bug):
    # Why these bugs live so long: the check speaks of the point that it is given.
    fn, _ = bug.make_wrong()
    report = _check(bug, fn, bug.generic_args())
    assert report.verdict is gradtest.Verdict.PASS


def _wrong_report(name):
    (bug,) = [bug for bug in REAL_BUGS if bug.name == name]
    fn, args = bug.make_wrong()
    return gradtest.check(fn, *args, argnums=bug.argnums, order=bug.order)


@pytest.mark.core
def test_one_zero_gradient_among_1025_parameters_is_named_alone():
    report = _wrong_report("one_parameter_of_1025_zero")
    assert report.leaf("params['shift']").cause.name == "zero gradient"
    assert report.leaf("params['w']").verdict is gradtest.Verdict.PASS
    assert report.leaf("x").verdict is gradtest.Verdict.PASS


@pytest.mark.core
def test_wrong_padded_entries_are_named_by_their_places():
    finding = _wrong_report("segment_sum_padded_ids").leaf("x")
    assert finding.entry.index[0] in (61, 62, 63)
    assert finding.entry.true == 0
    assert "3 of 64 entries are wrong, within [61..63]" in finding.cause.says


@pytest.mark.core
def test_a_backward_pass_in_bfloat16_is_a_rounding_gap_not_a_wrong_formula():
    report = _wrong_report("attention_scores_in_bfloat16")
    finding = report.leaf("q")
    assert finding.gap.value == "rounding"
    gap, allowed = finding.rounding
    assert gap > 5 * allowed
    assert finding.cause.name == "unstable arithmetic"


@pytest.mark.core
def test_a_wrong_hessian_beside_a_right_gradient_is_told_apart():
    report = _wrong_report("log_beta_hessian_at_tie")
    wrong = {f.order for f in report.findings if f.verdict is gradtest.Verdict.FAIL}
    assert wrong == {2}
