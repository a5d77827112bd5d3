"""Hunts find what is wrong with a twin, and nothing wrong with the right one."""

import pytest

import gradtest
from gradtest import Verdict, hunt
from tests import hunted

# Right twins that have most to be accused of: ties, masks, sizes, second order.
RIGHT = [
    "a masked softmax whose backward pass forgets the mask",
    "a norm whose gradient is not finite at rows of zeros",
    "a scale whose gradient leaves out what is behind the last whole block",
    "a network with an activation that is wrong where it saturates",
    "a mean of a fixed number of segments that does not count those that share one",
    "a product that takes a row of two zeros for one of one",
    "a cross entropy that never picks the last of several classes",
    "a smoothed cross entropy that is wrong for less than five classes",
]


@pytest.mark.parametrize("name", hunted.TWINS)
def test_a_hunt_finds(name):
    twins = hunted.TWINS[name]
    plain = gradtest.check(twins.wrong, *twins.args, order=1)
    assert plain.verdict is Verdict.PASS  # right where a test would look
    with pytest.raises(gradtest.GradientMismatch) as caught:
        hunt(twins.wrong, *twins.args, database=None)
    report = caught.value.report
    assert report.verdict is Verdict.FAIL
    assert report.trials <= 200
    assert any(f.verdict is Verdict.FAIL for f in report.findings)
    assert "Smallest failing input" in str(caught.value)


@pytest.mark.parametrize("name", RIGHT)
def test_a_hunt_accuses_no_right_twin_of(name):
    twins = hunted.TWINS[name]
    report = hunt(twins.right, *twins.args, examples=50, database=None)
    assert report.verdict is Verdict.PASS
    assert report.trials >= 40
