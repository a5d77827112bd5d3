"""The training as a test: its gradients, its step under every variant, its accuracy.

Runs with `python examples/train_flax_optax_test.py` and with pytest. On one device Chex
skips the pmap variant; `XLA_FLAGS=--xla_force_host_platform_device_count=8` simulates
eight.
"""

import contextlib
import io
from unittest import mock

import chex
import custom_vjp_layers as layers
import jax
import numpy as np
import optax
import train_flax_optax as example
from absl.testing import absltest

import gradtest

every_variant = chex.variants(
    with_jit=True, without_jit=True, with_device=True, without_device=True,
    with_pmap=True,
)  # fmt: skip


def first_batch() -> tuple[example.PyTree, example.Batch]:
    """Fresh parameters, and the first few digits."""
    rng = np.random.default_rng(0)
    training, _ = example.load(rng)
    batch = next(training.batches(rng))
    return example.DigitsNet().init(jax.random.key(0), batch[0]), batch


class GradientsTest(chex.TestCase):
    @every_variant
    def test_the_gradients_of_a_fresh_network_are_as_declared(self):
        example.assert_gradients(*first_batch(), variant=self.variant)

    @every_variant
    def test_a_step_lowers_the_loss_and_leaves_the_gradients_right(self):
        params, batch = first_batch()
        optimiser = optax.sgd(0.1)
        step = self.variant(example.make_step(optimiser))
        state, losses = optimiser.init(params), []
        for _ in range(3):
            params, state, loss = step(params, state, *batch)
            losses.append(float(loss))
        self.assertLess(losses[-1], losses[0])
        example.assert_gradients(params, batch)


class TrainingTest(absltest.TestCase):
    def test_more_than_95_percent_of_the_test_digits_are_read(self):
        self.assertGreater(example.train(), 0.95)

    def test_gradients_are_asserted_before_during_and_after_the_training(self):
        with mock.patch.object(example, "assert_gradients") as asserted:
            example.train(epochs=2)
        self.assertEqual(asserted.call_count, 3)

    def test_a_broken_rule_stops_the_training_before_its_first_step(self):
        def forgetful(kept: layers.Residuals, g: jax.Array) -> layers.Residuals:
            dx, _ = layers._rms_norm_bwd(kept, g)
            return dx, 0 * kept[2]

        broken = jax.custom_vjp(layers.rms_norm.fun)
        broken.defvjp(layers._rms_norm_fwd, forgetful)
        with (
            mock.patch.object(layers, "rms_norm", broken),
            self.assertRaises(gradtest.GradientMismatch) as caught,
        ):
            example.train(epochs=1)
        message = str(caught.exception)
        self.assertIn("rms_norm", message)
        self.assertIn("train_flax_optax_test.py", message)

    def test_the_script_says_what_it_reached(self):
        with (
            mock.patch.object(example, "train", return_value=0.5),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            self.assertEqual(example.main([]), 1)
        self.assertIn("50.0% of the test digits", printed.getvalue())


if __name__ == "__main__":
    absltest.main()
