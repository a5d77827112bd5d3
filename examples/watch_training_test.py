"""The watched training as a test: where the wrong rule is caught, and what is said.

Runs with `python examples/watch_training_test.py` and with pytest.
"""

import contextlib
import io

import jax.numpy as jnp
import watch_training as example
from absl.testing import absltest

import gradtest


def first_wrong_step() -> int:
    """The first checked step at which a unit saturates, so that the rule is wrong."""
    loss = example.make_loss(example.hard_tanh)
    for step, params, (x, _) in example.training(loss):
        saturates = bool(jnp.any(jnp.abs(example.hidden(params, x)) > 1))
        if step % example.EVERY == 0 and saturates:
            return step
    raise AssertionError("nothing saturates")


class WatchTrainingTest(absltest.TestCase):
    def test_the_wrong_rule_is_caught_at_the_first_check_where_it_is_wrong(self):
        with self.assertRaises(gradtest.GradientMismatch) as caught:
            example.train(example.hard_tanh)
        message = str(caught.exception)
        wrong = first_wrong_step()
        self.assertGreater(wrong, 0)
        self.assertIn(f"watch at step {wrong} failed", message)
        self.assertIn(f"at step {wrong}", caught.exception.report.notes)

    def test_the_message_names_leaf_rule_and_cause(self):
        with self.assertRaises(gradtest.GradientMismatch) as caught:
            example.train(example.hard_tanh)
        message = str(caught.exception)
        self.assertIn("params['b1']", message)
        self.assertIn("the custom_vjp rule of hard_tanh", message)
        self.assertIn("watch_training.py", message)
        self.assertIn("where the true one is zero; the others are right", message)

    def test_the_right_rule_trains_through(self):
        watcher = example.train(example.right_hard_tanh)
        state = watcher.state_dict()
        self.assertEqual(state["checks"], example.STEPS // example.EVERY)
        self.assertEqual(state["failures"] + state["inconclusive"], 0)

    def test_the_script_succeeds_and_says_both(self):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            self.assertEqual(example.main([]), 0)
        self.assertIn("failed: the gradient of loss is wrong", printed.getvalue())
        self.assertIn("0 failed", printed.getvalue())


if __name__ == "__main__":
    absltest.main()
