"""The layers' rules as a test, under every variant of Chex.

Runs with `python examples/custom_vjp_layers_test.py` and with pytest. On one device
Chex skips the pmap variant; `XLA_FLAGS=--xla_force_host_platform_device_count=8`
simulates eight.
"""

from collections.abc import Callable

import chex
import custom_vjp_layers as layers
import jax
import jax.numpy as jnp
from absl.testing import absltest

import gradtest
from gradtest import Verdict, domains

every_variant = chex.variants(
    with_jit=True, without_jit=True, with_device=True, without_device=True,
    with_pmap=True,
)  # fmt: skip

RULES = {"rms_norm", "swiglu", "quantise", "reverse_gradient"}


def names(report: gradtest.Report) -> set[str]:
    return {found.rule.name for found in report.findings}


class LayersTest(chex.TestCase):
    @every_variant
    def test_the_norm_is_right_for_any_number_of_batch_axes(self):
        for shape in ((5,), (3, 5), (2, 3, 5)):
            gradtest.assert_custom_rules_match(
                self.variant(layers.rms_norm), domains.normal(shape), domains.normal(5)
            )

    @every_variant
    def test_the_gated_layer_is_right(self):
        kernels = (domains.normal((4, 6)), domains.normal((4, 6)))
        gradtest.assert_custom_rules_match(
            self.variant(layers.swiglu),
            domains.normal((2, 3, 4)), *kernels, domains.normal((6, 4)),
        )  # fmt: skip

    @every_variant
    def test_a_declared_quantiser_passes_as_the_identity(self):
        report = gradtest.assert_custom_rules_match(
            self.variant(layers.quantise), domains.normal(7),
            expect_differs={layers.quantise: lambda x: x},
        )  # fmt: skip
        self.assertIs(report.verdict, Verdict.PASS)

    @every_variant
    def test_a_declared_reversal_passes_as_minus_half_the_identity(self):
        def reversed_input(x: jax.Array) -> jax.Array:
            return layers.reverse_gradient(x, 0.5)

        report = gradtest.assert_custom_rules_match(
            self.variant(reversed_input), domains.normal(7),
            expect_differs={"reverse_gradient": lambda x: -0.5 * x},
        )  # fmt: skip
        self.assertIs(report.verdict, Verdict.PASS)

    @every_variant
    def test_both_networks_have_all_four_rules_and_all_are_right(self):
        for make in (layers.linen_case, layers.nnx_case):
            with self.subTest(make.__name__):
                loss, args = make()
                report = gradtest.assert_custom_rules_match(
                    self.variant(loss), *args, expect_differs=layers.INTENTIONS
                )
                self.assertLessEqual(RULES, names(report))

    @every_variant
    def test_the_gradient_of_both_networks_is_the_declared_one(self):
        for make in (layers.linen_case, layers.nnx_case):
            with self.subTest(make.__name__):
                loss, args = make()
                gradtest.assert_autodiff_matches(
                    loss, *args, argnums=0, expect_differs=layers.INTENTIONS,
                    variant=self.variant,
                )  # fmt: skip


class UndeclaredTest(absltest.TestCase):
    def refused(self, fn: Callable[..., jax.Array], **options) -> str:
        with self.assertRaises(gradtest.GradientMismatch) as caught:
            gradtest.assert_custom_rules_match(fn, domains.normal(7), **options)
        return str(caught.exception)

    def test_a_rule_that_differs_is_refused_unless_it_is_declared(self):
        self.assertIn("quantise", self.refused(layers.quantise))
        reverse = self.refused(lambda x: layers.reverse_gradient(x, 0.5))
        self.assertIn("reverse_gradient", reverse)

    def test_a_rule_that_is_not_what_was_declared_is_refused(self):
        message = self.refused(layers.quantise, expect_differs={"quantise": jnp.tanh})
        self.assertIn("quantise", message)
        self.assertIn("custom_vjp_layers.py", message)


if __name__ == "__main__":
    absltest.main()
