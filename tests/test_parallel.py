"""Data-parallel steps are judged by the full batch's gradient, device by device."""

import re

import pytest

import gradtest
from tests.parallel_steps import PARAMS, REDUCTIONS, RIGHT, WRONG, Step

pytestmark = pytest.mark.devices

check = gradtest.assert_parallel_grads_match


def _by_name(steps):
    return pytest.mark.parametrize("step", steps, ids=lambda step: step.name)


def _judge(step: Step, devices: int) -> None:
    made = step.make(devices)
    if not step.says:
        report = check(made, step.loss, PARAMS, step.batch)
        assert report.verdict is gradtest.Verdict.PASS
        assert report.smallest_seen < 1e-5
        return
    with pytest.raises(gradtest.GradientMismatch) as caught:
        check(made, step.loss, PARAMS, step.batch)
    for piece in step.says:
        wanted = piece.format(n=devices, nn=devices**2)
        assert re.search(re.escape(wanted), str(caught.value)), str(caught.value)
    assert 2 <= len(str(caught.value).splitlines()) <= 8


@pytest.mark.parametrize("devices", [2, 4, 8])
@_by_name(REDUCTIONS)
def test_three_reductions_under_three_mappings(step, devices):
    _judge(step, devices)


@_by_name(RIGHT)
def test_a_right_step_passes(step):
    _judge(step, 4)


@_by_name(WRONG)
def test_a_wrong_step_is_refused_for_the_right_reason(step):
    _judge(step, 8 if "one device wrong" in step.name else 4)
