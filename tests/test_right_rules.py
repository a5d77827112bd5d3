"""Rules that are right are not accused, however unusual what is around them."""

import pytest

import gradtest
from gradtest import Verdict
from tests.right_rules import RIGHT_RULES


@pytest.mark.core
@pytest.mark.parametrize("entry", RIGHT_RULES, ids=lambda entry: entry.name)
def test_a_right_rule_is_accepted_in_unusual_company(entry):
    fn, args = entry.make()
    report = gradtest.assert_custom_rules_match(fn, *args)
    assert report.verdict is Verdict.PASS
    assert {*entry.rules} <= {rule.name for rule in report.rules}
