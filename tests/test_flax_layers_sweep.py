"""Every layer of Flax that has parameters passes assert_module_grads untuned."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import pytest
from flax import nnx

import gradtest.flax
from gradtest import Verdict
from tests import flax_modules

CASES = [
    (library, name, way, make)
    for library in (nn, nnx)
    for name, way, make in flax_modules.cases(library)
]
# A norm, a product and a recurrence; `benchmarks/flax_layers.py` has all of them.
HALF = {"BatchNorm", "Linear", "LSTMCell"}


def _name(case: tuple[Any, ...]) -> str:
    library, name, way, _ = case
    return f"{library.__name__}.{name} {way}".strip()


@pytest.mark.parametrize("case", CASES, ids=map(_name, CASES))
def test_a_layer_passes(case: tuple[Any, ...]):
    _, _, _, make = case
    module, inputs, options = make(jnp.float32)
    report = gradtest.flax.assert_module_grads(module, *inputs, **options)
    assert report.verdict is Verdict.PASS
    assert any(finding.name.startswith("params") for finding in report.findings)


@pytest.mark.parametrize(
    "case", [case for case in CASES if case[1] in HALF], ids=lambda case: _name(case)
)
def test_a_layer_passes_that_computes_in_bfloat16(case: tuple[Any, ...]):
    _, _, _, make = case
    module, inputs, options = make(jnp.bfloat16)
    assert "bfloat16" in repr(module)
    report = gradtest.flax.assert_module_grads(module, *inputs, **options)
    assert report.verdict is Verdict.PASS


@pytest.mark.parametrize("library", [nn, nnx], ids=["linen", "nnx"])
def test_every_public_layer_is_listed(library: Any):
    assert flax_modules.unlisted(library) == []
