"""The README's code runs, and prints the failure that the README shows."""

import re
import unittest
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).parents[1] / "README.md"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _code_and_failures() -> list[tuple[str, str | None]]:
    """Pairs each python block with the text block right after it, if there is one."""
    blocks = _FENCE.findall(README.read_text(encoding="utf-8"))
    followers = [*blocks[1:], ("", "")]
    return [
        (code, output if kind == "text" else None)
        for (language, code), (kind, output) in zip(blocks, followers, strict=True)
        if language == "python"
    ]


def _marked(code: str, failure: str | None) -> Any:
    """Sends what makes a mesh to the run with eight devices."""
    marks = [pytest.mark.devices] if "jax.make_mesh" in code else []
    return pytest.param(code, failure, marks=marks)


@pytest.mark.parametrize(
    ("code", "failure"), [_marked(*pair) for pair in _code_and_failures()]
)
def test_a_block_of_code_does_what_the_readme_says(code, failure):
    program = compile(code, "model.py", "exec")
    names = {"__name__": "readme"}
    if failure is None:
        exec(program, names)
        _run_tests(names)
        return
    with pytest.raises(AssertionError) as caught:
        exec(program, names)
    assert str(caught.value).strip() == failure.strip()


def _run_tests(names: dict[str, Any]) -> None:
    """Runs the tests that a block of code defines, if it does."""
    loader = unittest.defaultTestLoader
    for value in names.values():
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            result = unittest.TestResult()
            loader.loadTestsFromTestCase(value).run(result)
            assert result.testsRun
            assert result.wasSuccessful(), result.errors + result.failures


def test_both_commands_are_marked_for_ci():
    text = README.read_text(encoding="utf-8")
    for marker in ("main-command", "test-command"):
        # .ci/run takes the command from the block under its marker.
        assert text.count(f"<!-- {marker} -->\n```sh\n") == 1
