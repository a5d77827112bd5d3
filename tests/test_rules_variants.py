"""Rules are found and audited under every variant of Chex."""

import chex
import jax
import jax.numpy as jnp
import pytest

import gradtest


@jax.custom_vjp
def wave(x, w):
    return w * jnp.sin(x)


wave.defvjp(
    lambda x, w: (wave(x, w), (x, w)),
    lambda res, g: (g * res[1] * jnp.cos(res[0]), jnp.sum(g * jnp.sin(res[0]))),
)


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


doubled.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * g * jnp.cos(x),))


class RulesUnderVariantsTest(chex.TestCase):
    @chex.all_variants
    def test_a_right_rule_passes(self):
        report = gradtest.assert_custom_rules_match(
            lambda x, mode: wave(x, jnp.float32(2)) if mode == "on" else x,
            jnp.arange(4.0), "on", variant=self.variant,
        )  # fmt: skip
        assert [rule.name for rule in report.rules] == ["wave"]

    @chex.all_variants
    def test_a_broken_rule_is_caught(self):
        with pytest.raises(gradtest.GradientMismatch, match="2 times too large"):
            gradtest.assert_custom_rules_match(
                doubled, jnp.arange(4.0), variant=self.variant
            )

    @chex.variants(with_jit=True, with_pmap=True)
    def test_a_function_that_runs_under_a_variant_already_is_audited(self):
        fn = self.variant(doubled)
        x = jnp.arange(4.0)
        with pytest.raises(gradtest.GradientMismatch, match="2 times too large"):
            gradtest.assert_custom_rules_match(fn, x)
