"""All of Optax's optimisers against plain references of their mathematics."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gradtest
from gradtest.optax import assert_update_matches
from tests.optax_references import ALIASES, FACTORED, PAPERS, public_aliases

PARAMS = {"w": jax.random.normal(jax.random.key(0), (4, 3)), "b": jnp.full(3, 0.5)}
GRADS = {
    "w": jax.random.normal(jax.random.key(1), (4, 3)),
    "b": jnp.array([0.3, -1.0, 0.7]),
}


def test_each_of_optax_optimisers_has_a_reference():
    assert public_aliases() == sorted(ALIASES)


def _checked(alias, reference, **keywords):
    return assert_update_matches(
        alias.make(), reference, PARAMS, GRADS, extra_args=alias.extra_args, **keywords
    )


@pytest.mark.parametrize("name", ALIASES)
def test_an_optimiser_is_its_reference(name):
    # Rectified Adam changes its formula at the sixth step.
    steps = 6 if name == "radam" else 3
    report = _checked(ALIASES[name], ALIASES[name].reference, steps=steps)
    assert max(finding.size for finding in report.findings) < 1e-8


def test_adafactor_is_its_reference_where_it_factors():
    assert _checked(FACTORED, FACTORED.reference).verdict.value == "PASS"


@pytest.mark.parametrize("name", PAPERS)
def test_where_optax_departs_from_the_paper_it_is_seen(name):
    with pytest.raises(gradtest.GradientMismatch):
        _checked(ALIASES[name], PAPERS[name])


def test_sm3_does_not_take_scalars():
    # A defect that is known, see docs/optax.md: should this fail, take it out there.
    tx = optax.sm3(0.1)
    state = tx.init(jnp.ones(()))
    with pytest.raises(IndexError):
        tx.update(jnp.ones(()), state)
