"""What a hunt finds, as a test.

Runs with `python examples/hunt_test.py` and with pytest.
"""

import hunt as layers
import hypothesis
import jax.numpy as jnp
from absl.testing import absltest

import gradtest
from gradtest import Verdict, domains, strategies


class HuntTest(absltest.TestCase):
    def found(self, title: str) -> gradtest.GradientMismatch:
        fn, args = layers.CASES[title]
        self.assertIs(gradtest.check(fn, *args).verdict, Verdict.PASS)
        with self.assertRaises(gradtest.GradientMismatch) as caught:
            gradtest.hunt(fn, *args, database=None)
        return caught.exception

    def test_duplicate_indices_are_found(self):
        error = self.found("duplicate indices overwrite each other")
        ids = dict(error.report.inputs)["ids"].tolist()
        self.assertLess(len(set(ids)), len(ids))

    def test_a_row_of_zeros_is_found(self):
        error = self.found("a row of zeros is divided by zero")
        self.assertIn("x = jnp.array([[0.0, 0.0, 0.0]], jnp.float32)", str(error))

    def test_a_batch_off_the_block_size_is_found(self):
        error = self.found("rows behind the last whole block are left out")
        self.assertNotEqual(len(dict(error.report.inputs)["x"]) % 3, 0)

    def test_nothing_is_found_in_right_layers(self):
        for title, (fn, args) in layers.RIGHT.items():
            with self.subTest(title):
                report = gradtest.hunt(fn, *args, examples=40, database=None)
                self.assertIs(report.verdict, Verdict.PASS)


class PropertyTest(absltest.TestCase):
    @hypothesis.settings(max_examples=25, deadline=None, database=None)
    @hypothesis.given(strategies.arguments(domains.normal(("batch", 3))))
    def test_a_norm_is_never_negative(self, args):
        norms = layers.make_norm(is_safe=True)(*args)
        self.assertTrue(jnp.all(norms >= 0))


if __name__ == "__main__":
    absltest.main()
