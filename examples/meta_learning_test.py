"""Meta-gradients as a test, beside the mistake that only they show.

Runs with `python examples/meta_learning_test.py` and with pytest.
"""

import jax
import jax.numpy as jnp
import meta_learning
from absl.testing import absltest
from meta_learning import Learner

import gradtest
from gradtest import Verdict


class MetaLearningTest(absltest.TestCase):
    def test_the_meta_gradient_of_the_right_rule_is_right_to_a_millionth(self):
        report = meta_learning.assert_meta_gradient(Learner(meta_learning.swish))
        self.assertIs(report.verdict, Verdict.PASS)
        names = {finding.name for finding in report.findings}
        self.assertEqual(names, {"params['hidden']", "params['out']", "hyper"})
        self.assertLess(max(finding.size for finding in report.findings), 1e-6)

    def test_the_frozen_rule_is_right_to_train_with(self):
        gradtest.assert_custom_rules_match(
            meta_learning.frozen_swish, jnp.linspace(-3.0, 3.0, 7), order=1
        )

    def test_the_frozen_rule_is_refused_in_a_meta_gradient_and_its_line_named(self):
        learner = Learner(meta_learning.frozen_swish)
        with self.assertRaises(gradtest.GradientMismatch) as caught:
            meta_learning.assert_meta_gradient(learner)
        finding = caught.exception.report.leaf("params['hidden']")
        self.assertIn("rule of frozen_swish", finding.cause.says)
        self.assertIn("as if that were a constant", finding.cause.says)
        self.assertIn("stop_gradient", finding.line.code)

    def test_training_the_start_makes_tasks_easier(self):
        losses = meta_learning.train(Learner(meta_learning.swish), rounds=12, tasks=4)
        self.assertLess(sum(losses[-4:]), sum(losses[:4]))

    def test_tasks_are_drawn_from_their_key(self):
        one, again, other = (
            meta_learning.draw_task(jax.random.key(seed)) for seed in (0, 0, 1)
        )
        self.assertEqual(float(one["phase"]), float(again["phase"]))
        self.assertNotEqual(float(one["phase"]), float(other["phase"]))


if __name__ == "__main__":
    absltest.main()
