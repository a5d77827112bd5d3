"""The steps of `accumulation.py` as a test: the right ones pass, the mistakes do not.

Runs with `python examples/accumulation_test.py` and with pytest.
"""

import contextlib
import io
from unittest import mock

import accumulation
from absl.testing import absltest, parameterized

import gradtest

SAYS = {
    "the mean of the micro-batches' means": (r"batch\['mask'\] keeps \d+, \d+ and \d+"),
    "the last micro-batch dropped": "the first 16 of 22 rows",
    "an accumulator in bfloat16": "accumulated in half precision",
}


class AccumulationTest(parameterized.TestCase):
    @parameterized.parameters(*accumulation.RIGHT)
    def test_a_right_accumulation_has_the_full_batchs_gradient(self, name):
        report = accumulation.assert_accumulates(accumulation.RIGHT[name])
        self.assertIn(
            "compared with the gradient of loss of the full batch", report.notes
        )

    @parameterized.parameters(*accumulation.MISTAKES)
    def test_a_mistake_is_refused_and_named(self, name):
        with self.assertRaisesRegex(gradtest.GradientMismatch, SAYS[name]):
            accumulation.assert_accumulates(accumulation.MISTAKES[name])

    def test_multi_steps_are_right_where_micro_batches_are_alike(self):
        batch = accumulation.make_batch(24, padded=False)
        accumulation.assert_accumulates(accumulation.multi_steps(), batch)

    def test_multi_steps_are_refused_where_sentences_are_padded(self):
        with self.assertRaisesRegex(gradtest.GradientMismatch, "count alike"):
            accumulation.assert_accumulates(accumulation.multi_steps())

    def test_the_script_ends_badly_where_a_mistake_passes(self):
        with (
            mock.patch.object(accumulation, "assert_accumulates"),
            contextlib.redirect_stdout(io.StringIO()) as printed,
        ):
            self.assertEqual(accumulation.main(), 1)
        self.assertIn("PASS", printed.getvalue())


if __name__ == "__main__":
    absltest.main()
