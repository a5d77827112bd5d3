"""Right gradients are accepted at default options, to a formula gap of 1e-6."""

import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest._src.findings import Gap
from tests.right_models import RIGHT_MODELS
from tests.single_ops import SINGLE_OPS

_LARGEST_GAP = 1e-6


def _cases():
    return [
        pytest.param(
            model,
            dtype,
            id=f"{model.name}-{np.dtype(dtype).name}",
            marks=[pytest.mark.devices] if model.devices > 1 else [],
        )
        for model in RIGHT_MODELS
        for dtype in model.dtypes
    ]


def _reached(finding):
    """The gap of one leaf: of the program traced in float64 where that decided."""
    if finding.approximation is not None:
        return finding.approximation.retraced
    # A gradient that is zero but for rounding has no relative gap.
    return 0.0 if finding.allowed >= 1 else finding.size


def _formula_gap(report):
    return max(_reached(f) for f in report.findings if f.gap is Gap.FORMULA)


def _table(found):
    lines = ["", "Largest formula gap of a leaf, by model:"]
    for name in dict.fromkeys(name for name, _, _ in found):
        cells = [f"{dtype} {gap:.0e}" for model, dtype, gap in found if model == name]
        lines.append(f"  {name:24s}{'   '.join(cells)}")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def gaps(request):
    """Collects `(model, dtype, gap)` and prints them as a table after the last test."""
    found = []
    yield found
    plugins = request.config.pluginmanager
    terminal, capture = (
        plugins.get_plugin("terminalreporter"),
        plugins.get_plugin("capturemanager"),
    )
    if found and terminal and capture:
        with capture.global_and_fixture_disabled():
            terminal.write_line(_table(found))


@pytest.mark.parametrize(("model", "dtype"), _cases())
def test_a_right_model_is_accepted_at_default_options(model, dtype, gaps):
    fn, args = model.make(dtype)
    report = gradtest.assert_autodiff_matches(fn, *args, argnums=model.argnums)
    assert report.verdict is gradtest.Verdict.PASS
    assert report.precision[0].startswith("precision: everything in float64")
    gap = _formula_gap(report)
    gaps.append((model.name, np.dtype(dtype).name, gap))
    assert gap <= _LARGEST_GAP


@pytest.mark.core
@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in SINGLE_OPS])
def test_a_single_operation_is_accepted_in_float32(op):
    report = gradtest.assert_autodiff_matches(op.fn, *op.args)
    assert _formula_gap(report) <= _LARGEST_GAP


def _runs_in_bfloat16(op):
    try:
        op.fn(*_in_bfloat16(op))
    except (TypeError, NotImplementedError):  # JAX has no kernel for it
        return False
    return True


def _in_bfloat16(op):
    return [jnp.asarray(arg, jnp.bfloat16) for arg in op.args]


@pytest.mark.parametrize("op", [pytest.param(op, id=op.name) for op in SINGLE_OPS])
def test_a_single_operation_is_accepted_in_bfloat16(op):
    if not _runs_in_bfloat16(op):
        pytest.skip("JAX has no bfloat16 kernel for it")
    report = gradtest.assert_autodiff_matches(op.fn, *_in_bfloat16(op))
    assert report.verdict is gradtest.Verdict.PASS
