"""Every public assertion, under every Chex variant, in each of three ways of use.

The ways: the variant handed over (`variant=self.variant`), a function that is under it
already (`self.variant(fn)`), and the assertion called inside of it, on traced values
under `chex.chexify`. In each cell the right thing is accepted and the wrong one
refused; the cells that make no sense are listed with the reason.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

import gradtest

X = np.array([0.5, 1.0, 1.5], np.float32)
WAYS = ("handed over", "passed in", "inside")


def _same(fn):
    return fn


@jax.custom_vjp
def _sine(x, factor):
    return jnp.sin(x)


_sine.defvjp(
    lambda x, factor: (jnp.sin(x), (x, factor)),
    lambda kept, g: (kept[1] * g * jnp.cos(kept[0]), jnp.zeros(())),
)


def _rule(factor):
    """Returns a sine whose rule is right for a factor of 1."""
    return lambda x: _sine(x, jnp.float32(factor))


def _loss(x):
    return jnp.sum(jnp.sin(x) * x)


def _gradient(x, factor):
    return factor * (jnp.cos(x) * x + jnp.sin(x))


def _grad(x, factor, wrap=_same, **keywords):
    grad_fn = wrap(functools.partial(_gradient, factor=factor))
    return gradtest.assert_grad_matches(_loss, grad_fn, x, **keywords)


def _autodiff(x, factor, wrap=_same, **keywords):
    fn = wrap(lambda x: jnp.sum(_rule(factor)(x)))
    return gradtest.assert_autodiff_matches(fn, x, **keywords)


def _rules(x, factor, wrap=_same, **keywords):
    fn = wrap(lambda x: jnp.sum(_rule(factor)(x)))
    return gradtest.assert_custom_rules_match(fn, x, order=1, **keywords)


def _vjp(x, factor, wrap=_same, **keywords):
    product = wrap(lambda args, g: factor * g * jnp.cos(args[0]))
    return gradtest.assert_vjp_matches(jnp.sin, product, x, **keywords)


def _jvp(x, factor, wrap=_same, **keywords):
    product = wrap(lambda args, t: factor * t[0] * jnp.cos(args[0]))
    return gradtest.assert_jvp_matches(jnp.sin, product, x, **keywords)


def _hvp(x, factor, wrap=_same, **keywords):
    product = wrap(lambda args, t: factor * -jnp.sin(args[0]) * t[0])
    return gradtest.assert_hvp_matches(
        lambda x: jnp.sum(jnp.sin(x)), product, x, **keywords
    )


def _transpose(x, factor, wrap=_same, **keywords):
    return gradtest.assert_transpose_matches(
        lambda x: 2 * x, wrap(lambda w: factor * 2 * w), x, **keywords
    )


def _agree(x, factor, wrap=_same, **keywords):
    fn = wrap(lambda x: jnp.sum(_rule(factor)(x)))
    return gradtest.assert_grads_agree(fn, lambda x: jnp.sum(jnp.sin(x)), x, **keywords)


def _close(x, factor, **keywords):
    claimed = {"w": _gradient(x, factor)}
    return gradtest.assert_grads_close(claimed, {"w": _gradient(x, 1.0)}, **keywords)


def _finite(x, factor, wrap=_same, **keywords):
    fn = wrap(lambda x: jnp.sum(jnp.sqrt(x * (2 - factor))))
    return gradtest.assert_grads_finite(fn, x, **keywords)


def _flow(x, factor, wrap=_same, **keywords):
    fn = wrap(lambda x: jnp.sum(x * (2 - factor)))
    return gradtest.assert_grads_flow(fn, x, **keywords)


def _variants_agree(x, factor):
    def eager_only(x):
        is_traced = isinstance(x, jax.core.Tracer)
        return jnp.sum(_rule(factor if is_traced else 1.0)(x))

    return gradtest.assert_variants_agree(eager_only, x)


@dataclasses.dataclass(frozen=True)
class Row:
    """An assertion of the table.

    Attributes:
      name: Its public name.
      call: `call(x, factor)` asserts what is right for a factor of 1, wrong for 2.
      senseless: The ways that make no sense, with the reason.
    """

    name: str
    call: Callable[..., Any]
    senseless: dict[str, str] = dataclasses.field(default_factory=dict)


_NO_FUNCTION = "it takes two trees, and no function that a variant could run"
_OWN_CELLS = "it chooses the variants by itself, and compares them with each other"
_OWN_MESH = "the step brings its own devices: pmap or shard_map inside of another"
_NO_TRACE = "it runs programs by itself: TypeError, see the test below"

TABLE = (
    Row("assert_grad_matches", _grad),
    Row("assert_autodiff_matches", _autodiff),
    Row("assert_custom_rules_match", _rules),
    Row("assert_vjp_matches", _vjp),
    Row("assert_jvp_matches", _jvp),
    Row("assert_hvp_matches", _hvp),
    Row("assert_transpose_matches", _transpose),
    Row("assert_grads_agree", _agree),
    Row(
        "assert_grads_close",
        _close,
        {"handed over": _NO_FUNCTION, "passed in": _NO_FUNCTION},
    ),
    Row("assert_grads_finite", _finite),
    Row("assert_grads_flow", _flow),
    Row(
        "assert_variants_agree",
        _variants_agree,
        {"handed over": _OWN_CELLS, "passed in": _OWN_CELLS, "inside": _NO_TRACE},
    ),
    Row(
        "assert_parallel_grads_match",
        _same,
        {"handed over": _OWN_MESH, "passed in": _OWN_MESH, "inside": _NO_TRACE},
    ),
)

CELLS = [
    (f"_{row.name}_{way.replace(' ', '_')}", row, way)
    for row in TABLE
    for way in WAYS
    if way not in row.senseless
]


@pytest.mark.core
def test_every_public_assertion_has_a_row():
    names = {name for name in dir(gradtest) if name.startswith("assert_")}
    assert {row.name for row in TABLE} >= names


@pytest.mark.core
def test_every_cell_is_used_or_has_a_reason():
    for row in TABLE:
        assert {*row.senseless} <= {*WAYS}
        assert all(row.senseless.values())
    assert len(CELLS) == len(TABLE) * len(WAYS) - 8


class TableTest(chex.TestCase):
    @chex.all_variants
    @parameterized.named_parameters(*CELLS)
    def test_right_is_accepted_and_wrong_refused(self, row, way):
        if way == "inside":
            self._inside(row)
            return
        keywords = {
            "handed over": {"variant": self.variant},
            "passed in": {"wrap": self.variant},
        }[way]
        report = row.call(X, 1.0, **keywords)
        assert report.verdict is gradtest.Verdict.PASS
        is_pmap = "with_pmap" in str(getattr(self.variant, "type", ""))
        if is_pmap and jax.device_count() > 1:
            told = " ".join(report.notes)
            first_alone = f"of {jax.device_count()} devices the first alone was seen"
            assert (first_alone in told) == (way == "passed in")
        with pytest.raises(gradtest.GradientMismatch):
            row.call(X, 2.0, **keywords)

    def _inside(self, row):
        def inside(x, factor):
            assert row.call(x, factor) is None
            return x

        # One program for both: the factor is a traced value as well.
        checked = chex.chexify(self.variant(inside), async_check=False)
        checked(X, np.float32(1.0))
        with pytest.raises(AssertionError, match=rf"^\[Chex\] .*'{row.name}' failed"):
            checked(X, np.float32(2.0))


class PartialTest(chex.TestCase):
    @chex.variants(with_pmap=True)
    def test_a_partial_of_a_variant_shows_every_device(self):
        def grad_fn(x, wrong_on):
            mean = jax.lax.pmean(_gradient(x, 1.0), "data")
            return mean * jnp.where(jax.lax.axis_index("data") == wrong_on, 2.0, 1.0)

        def check(wrong_on):
            gradtest.assert_grad_matches(
                _loss,
                functools.partial(grad_fn, wrong_on=wrong_on),
                X,
                variant=functools.partial(self.variant, axis_name="data"),
            )

        check(wrong_on=-1)
        with pytest.raises(gradtest.GradientMismatch):
            check(wrong_on=5)


@pytest.mark.parametrize("name", ["assert_variants_agree"])
def test_what_runs_programs_by_itself_is_refused_on_traced_values(name):
    assertion = getattr(gradtest, name)
    with pytest.raises(TypeError, match="traced values"):
        jax.jit(lambda x: assertion(_loss, x))(X)


def test_a_parallel_step_is_refused_on_traced_values():
    def step(params, batch):
        return jax.grad(_loss)(params)

    with pytest.raises(TypeError, match="traced values"):
        jax.jit(
            lambda x: gradtest.assert_parallel_grads_match(
                step, lambda params, batch: _loss(params), x, x
            )
        )(X)
