"""The kernels' backward passes as a test, under every variant of Chex.

Runs with `python examples/pallas_kernels_test.py` and with pytest. In bfloat16 the
check is as sharp as in float32: what is compared is the formula, in float64.
"""

import chex
import jax
import jax.numpy as jnp
import pallas_kernels
from absl.testing import absltest

import gradtest
from gradtest import domains

every_variant = chex.variants(
    with_jit=True, without_jit=True, with_device=True, without_device=True,
    with_pmap=True,
)  # fmt: skip

LENGTH = pallas_kernels.LENGTH
LABELS = jnp.arange(LENGTH) % 5


class PallasKernelsTest(chex.TestCase):
    @every_variant
    def test_cross_entropy_is_right(self):
        gradtest.assert_autodiff_matches(
            pallas_kernels.cross_entropy, domains.normal((LENGTH, 13)), LABELS,
            variant=self.variant,
        )  # fmt: skip

    @every_variant
    def test_rms_norm_is_right(self):
        gradtest.assert_autodiff_matches(
            pallas_kernels.rms_norm, domains.normal((LENGTH, 6)), domains.normal(6),
            variant=self.variant,
        )  # fmt: skip

    @every_variant
    def test_attention_is_right(self):
        one = domains.normal((LENGTH, 4))
        gradtest.assert_autodiff_matches(
            pallas_kernels.attention, one, one, one, variant=self.variant
        )

    @every_variant
    def test_heads_of_attention_in_bfloat16_are_right(self):
        report = gradtest.assert_autodiff_matches(
            jax.vmap(pallas_kernels.attention),
            *[jax.ShapeDtypeStruct((2, LENGTH, 4), jnp.bfloat16)] * 3,
            variant=self.variant,
        )
        self.assertLess(max(found.size for found in report.findings), 1e-12)

    @chex.variants(with_jit=True, without_jit=True)
    def test_the_rules_of_all_three_are_right(self):
        report = gradtest.assert_custom_rules_match(
            pallas_kernels.losses, *pallas_kernels.arguments(), order=1,
            variant=self.variant,
        )  # fmt: skip
        names = {rule.name for rule in report.rules}
        self.assertContainsSubset({"cross_entropy", "rms_norm", "attention"}, names)

    def test_a_backward_pass_that_forgets_the_tail_is_refused(self):
        @jax.custom_vjp
        def attention(query, key, value):
            return pallas_kernels.attention(query, key, value)

        def backward(saved, cotangent):
            return pallas_kernels.attention_backward(saved, cotangent, query_blocks=2)

        attention.defvjp(pallas_kernels.attention_forward, backward)
        one = domains.normal((LENGTH, 4))
        with self.assertRaisesRegex(gradtest.GradientMismatch, "key"):
            gradtest.assert_autodiff_matches(attention, one, one, one)


if __name__ == "__main__":
    absltest.main()
