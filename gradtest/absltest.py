"""A TestCase for absltest users, with gradtest's assertions as methods.

Example:
  >>> import jax.numpy as jnp
  >>> import gradtest.absltest
  >>> class LossTest(gradtest.absltest.TestCase):
  ...     def test_gradient(self):
  ...         self.assertGradMatches(jnp.sum, jnp.ones_like, jnp.arange(3.0))
"""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable
from typing import Any

from absl import flags
from absl.testing import absltest

import gradtest
from gradtest._src import session
from gradtest._src.undeclared import outputs_of

_OUTPUTS = "TEST_UNDECLARED_OUTPUTS_DIR"
_SEED = "test_random_seed"


def _method(name: str) -> Callable[..., Any]:
    """Returns a method that calls an assertion, looked up when it is called."""

    def method(self: TestCase, *args: Any, **options: Any) -> Any:
        __tracebackhide__ = True
        return self._asserted(name, args, options)

    method.__doc__ = f"Asserts what `gradtest.{name}` does, and returns its report."
    return method


class TestCase(absltest.TestCase):
    """Offers every assertion of gradtest's as a method, in unittest's spelling.

    It stands alone or beside other classes, `chex.TestCase` and
    `parameterized.TestCase` among them. The methods take and return what the functions
    do; `variant=self.variant` runs a derivative under a Chex variant. `key` is by
    default pytest's `--gradtest-seed`, or else absltest's `--test_random_seed`, also
    where a test calls gradtest's functions. What fails is the test's
    `failureException` with the report as `.report`, and its last line replays the test.

    Where the variable `TEST_UNDECLARED_OUTPUTS_DIR` names a directory, as under Bazel,
    it gets an HTML and a JSON file of each report that fails a test, whether a method
    or a function of gradtest's has raised it, and `gradtest_summary.json`: what the
    tests of this process have checked so far.
    """

    assertGradMatches = _method("assert_grad_matches")
    assertAutodiffMatches = _method("assert_autodiff_matches")
    assertCustomRulesMatch = _method("assert_custom_rules_match")
    assertVjpMatches = _method("assert_vjp_matches")
    assertJvpMatches = _method("assert_jvp_matches")
    assertHvpMatches = _method("assert_hvp_matches")
    assertTransposeMatches = _method("assert_transpose_matches")
    assertGradsAgree = _method("assert_grads_agree")
    assertVariantsAgree = _method("assert_variants_agree")
    assertParallelGradsMatch = _method("assert_parallel_grads_match")
    assertGradsClose = _method("assert_grads_close")
    assertGradsFinite = _method("assert_grads_finite")
    assertGradsFlow = _method("assert_grads_flow")

    def run(self, result: Any = None) -> Any:
        """Runs the test with its seed; keeps what fails where a directory is named."""
        folder = os.environ.get(_OUTPUTS)
        with session.using(key=self.gradtest_seed()):
            if not folder:
                return super().run(result)
            result = self.defaultTestResult() if result is None else result
            with outputs_of(folder).watching(result) as watched:
                super().run(watched)
            return result

    def gradtest_seed(self) -> Any:
        """Returns the key of the assertions in this test that are given none."""
        chosen = session.chosen().key
        return flags.FLAGS[_SEED].value if chosen is None else chosen

    def _asserted(
        self, name: str, args: tuple[Any, ...], options: dict[str, Any]
    ) -> Any:
        __tracebackhide__ = True
        assertion = getattr(gradtest, name)
        has_key = "key" in inspect.signature(assertion).parameters
        seed = self.gradtest_seed()
        is_seeded = has_key and options.get("key") is None
        if is_seeded:
            options = {**options, "key": seed}
        try:
            return assertion(*args, **options)
        except Exception as error:
            report = getattr(error, "report", None)
            if report is None:  # no verdict: a mistake in the call
                raise
            chosen = f" --{_SEED}={seed}" if is_seeded else ""
            key = f"  # key={report.key}" if has_key else ""
            failure = self._failure(error, f"{self._command(chosen)}{key}")
        raise failure

    def _failure(self, error: Any, replay: str) -> Exception:
        """Returns an error as the test's own kind of failure, with its replay line."""
        text = f"{error}\n  Replay: {replay}"
        kind: Any = self.failureException
        if isinstance(error, gradtest.GradientMismatch | gradtest.GradientInconclusive):
            if isinstance(error, kind):
                return type(error)(text, error.report)
        else:  # the caller asked for this exception
            kind = type(error)
        failure = kind(text)
        failure.report = error.report
        return failure

    def _command(self, chosen: str) -> str:
        """Returns the command that runs this test alone, as it is run now."""
        kind = type(self)
        try:
            path = os.path.relpath(inspect.getfile(kind))
        except (OSError, TypeError, ValueError):  # made in a notebook or a shell
            path = kind.__module__
        test = self._testMethodName
        if kind.__module__ != "__main__" and "PYTEST_CURRENT_TEST" in os.environ:
            place = shlex.quote(f"{path}::{kind.__qualname__}::{test}")
            return f"python -m pytest {place}"
        place = shlex.quote(f"{kind.__qualname__}.{test}")
        return f"python {shlex.quote(path)} {place}{chosen}"
