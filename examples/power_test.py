"""What the tests of the layer are worth, as a test.

Runs with `python examples/power_test.py` and with pytest.
"""

import power
from absl.testing import absltest

import gradtest

KINDS = ["sign flip", "drop a leaf", "stop_gradient"]


class PowerTest(absltest.TestCase):
    def test_asserting_the_rule_catches_all_that_is_broken(self):
        fn, args, _ = power.program()
        found = gradtest.power(fn, *args, mutations=8, scales=False)
        self.assertLen(found.caught, 8)
        self.assertEmpty(found.survived)

    def test_differences_at_a_few_entries_let_wrong_rules_pass(self):
        fn, args, _ = power.program()
        found = gradtest.power(
            fn, *args, assertion=power.assert_near_differences, mutations=KINDS,
            scales=False,
        )  # fmt: skip
        survivors = [mutant.says for mutant in found.survived]
        self.assertIn("dscale with the other sign", survivors)
        self.assertNotIn("dx with the other sign", survivors)
        self.assertNotEmpty(found.second_order)
        self.assertIn("SURVIVED  bwd at", str(found))

    def test_a_test_that_fails_anyway_is_told_first(self):
        fn, args, _ = power.program()

        def fails(*_: object) -> None:
            raise AssertionError("as ever")

        with self.assertRaisesRegex(ValueError, "before any rule is broken.*as ever"):
            gradtest.power(fn, *args, assertion=fails)


if __name__ == "__main__":
    absltest.main()
