"""The TestCase for absltest: its methods, its replay line, what it stands beside."""

import json
import os
import subprocess
import sys
import unittest
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import gradtest
import gradtest.absltest

X = np.array([0.5, 1.0, 1.5], np.float32)


def loss(x):
    return jnp.sum(jnp.sin(x) * x)


def right(x):
    return jnp.cos(x) * x + jnp.sin(x)


def wrong(x):
    return 2 * right(x)


@jax.custom_vjp
def sine(x):
    return jnp.sin(x)


sine.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))


class MethodsTest(gradtest.absltest.TestCase):
    def _refused(self):
        return pytest.raises(gradtest.GradientMismatch, match=r"\n  Replay: python ")

    @pytest.mark.core
    def test_a_gradient(self):
        report = self.assertGradMatches(loss, right, X)
        assert report.verdict is gradtest.Verdict.PASS
        with self._refused() as caught:
            self.assertGradMatches(loss, wrong, X)
        assert caught.value.report.verdict is gradtest.Verdict.FAIL

    def test_autodiff(self):
        self.assertAutodiffMatches(sine, X)

    def test_custom_rules(self):
        self.assertCustomRulesMatch(sine, X)

    def test_a_vjp(self):
        self.assertVjpMatches(jnp.sin, lambda args, g: g * jnp.cos(args[0]), X)

    def test_a_jvp(self):
        self.assertJvpMatches(jnp.sin, lambda args, t: t[0] * jnp.cos(args[0]), X)

    def test_an_hvp(self):
        def hvp(args, tangents):
            return jax.jvp(jax.grad(loss), args, tangents)[1]

        self.assertHvpMatches(loss, hvp, X)

    def test_a_transpose(self):
        self.assertTransposeMatches(lambda x: 2 * x, lambda w: 2 * w, X)

    def test_two_implementations(self):
        self.assertGradsAgree(sine, jnp.sin, X)

    def test_two_trees(self):
        self.assertGradsClose({"w": right(X)}, {"w": jax.grad(loss)(X)})
        with self._refused():
            self.assertGradsClose({"w": wrong(X)}, {"w": jax.grad(loss)(X)})

    def test_finite_and_present(self):
        self.assertGradsFinite(loss, X)
        self.assertGradsFlow(loss, X)
        with self._refused():
            self.assertGradsFlow(lambda x: jnp.sum(jnp.round(x)), X)

    def test_every_public_assertion_has_a_method(self):
        names = [name for name in dir(gradtest) if name.startswith("assert_")]
        for name in names:
            spelling = "".join(part.capitalize() for part in name.split("_")[1:])
            assert callable(getattr(self, f"assert{spelling}")), name

    def test_the_replay_line_has_the_test_and_the_key(self):
        with self._refused() as caught:
            self.assertGradMatches(loss, wrong, X, key=7)
        last = str(caught.value).splitlines()[-1]
        method = "MethodsTest::test_the_replay_line_has_the_test_and_the_key"
        assert "Replay: python -m pytest " in last
        self.assertEndsWith(last, f"test_absltest.py::{method}  # key=7")

    def test_an_exception_of_the_callers_choice_has_the_replay_line_too(self):
        with pytest.raises(KeyError, match="Replay: python -m pytest") as caught:
            self.assertGradMatches(loss, wrong, X, exception_type=KeyError)
        assert caught.value.report.verdict is gradtest.Verdict.FAIL


class OtherError(Exception):
    pass


class OtherFailureTest(gradtest.absltest.TestCase):
    failureException = OtherError

    def test_a_wrong_gradient_is_this_tests_kind_of_failure(self):
        with pytest.raises(OtherError, match="Replay: ") as caught:
            self.assertGradMatches(loss, wrong, X)
        assert caught.value.report.verdict is gradtest.Verdict.FAIL


class BesideChexTest(chex.TestCase, gradtest.absltest.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_under_a_variant(self):
        self.assertGradMatches(loss, right, X, variant=self.variant)
        with pytest.raises(gradtest.GradientMismatch):
            self.assertGradMatches(loss, wrong, X, variant=self.variant)

    @chex.variants(with_jit=True)
    def test_on_traced_values(self):
        def inside(x):
            self.assertGradMatches(loss, wrong, x)
            return x

        checked = chex.chexify(self.variant(inside), async_check=False)
        with pytest.raises(AssertionError, match=r"^\[Chex\] chexify assertion"):
            checked(X)


class FirstTest(gradtest.absltest.TestCase, chex.TestCase):
    @chex.variants(with_jit=True)
    def test_under_a_variant(self):
        self.assertGradMatches(loss, right, X, variant=self.variant)


class ParameterizedTest(parameterized.TestCase, gradtest.absltest.TestCase):
    @parameterized.named_parameters(("plain", jnp.sin), ("with a rule", sine))
    def test_a_sine(self, fn):
        self.assertAutodiffMatches(fn, X)


_FAILING = """
import jax.numpy as jnp
from absl.testing import absltest
import gradtest.absltest

class LossTest(gradtest.absltest.TestCase):
    def test_gradient(self):
        self.assertGradMatches(jnp.sum, jnp.zeros_like, jnp.arange(3.0))

if __name__ == "__main__":
    absltest.main()
"""


def _run(folder, source, *flags, devices=1):
    """Runs a test file as its users do; returns the exit code and what it prints."""
    (folder / "loss_test.py").write_text(source)
    settings = {
        "PYTHONPATH": str(Path(gradtest.__file__).parents[1]),
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    ran = subprocess.run(
        [sys.executable, "loss_test.py", *flags],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        check=False,
    )
    return ran.returncode, ran.stderr


def test_a_failing_test_prints_the_command_that_replays_it(tmp_path):
    code, printed = _run(tmp_path, _FAILING, "--test_random_seed=5")
    assert code == 1
    assert "FAILED (failures=1)" in printed
    replay = "  Replay: python loss_test.py LossTest.test_gradient --test_random_seed=5"
    assert f"{replay}  # key=5\n" in printed


_UNDER_VARIANTS = """
import chex
import jax
import jax.numpy as jnp
from absl.testing import absltest, parameterized
import gradtest.absltest

def setUpModule():
    chex.set_n_cpu_devices()

class LossTest(chex.TestCase, gradtest.absltest.TestCase):
    @chex.variants(with_jit=True, with_pmap=True)
    @parameterized.named_parameters(("passed_in", True), ("handed_over", False))
    def test_gradient(self, passed_in):
        if passed_in:
            self.assertAutodiffMatches(self.variant(jnp.sum), jnp.arange(3.0))
        else:
            self.assertAutodiffMatches(
                jnp.sum, jnp.arange(3.0), variant=self.variant
            )

if __name__ == "__main__":
    absltest.main()
"""


def test_chex_skips_pmap_where_there_is_one_device(tmp_path):
    code, printed = _run(tmp_path, _UNDER_VARIANTS)
    assert code == 0, printed
    assert "OK (skipped=2)" in printed
    flag = "--nochex_skip_pmap_variant_if_single_device"
    code, printed = _run(tmp_path, _UNDER_VARIANTS, flag)
    assert code == 0, printed
    assert "skipped" not in printed


def test_chex_asks_for_several_devices_where_its_flag_says_so(tmp_path):
    flag = "--chex_assert_multiple_cpu_devices"
    code, printed = _run(tmp_path, _UNDER_VARIANTS, flag)
    assert code == 1
    assert "chex_assert_multiple_cpu_devices" in printed
    flags = (flag, "--chex_n_cpu_devices=2")
    code, printed = _run(tmp_path, _UNDER_VARIANTS, *flags, devices=2)
    assert code == 0, printed
    assert "skipped" not in printed


_SEEDED = """
import gradtest, gradtest.absltest
import numpy as np
from absl.testing import absltest

class SeedTest(gradtest.absltest.TestCase):
    def test_it(self):
        function = gradtest.assert_grads_finite(lambda x: x, np.float32(1))
        method = self.assertGradsFinite(lambda x: x, np.float32(1), key=None)
        own = self.assertGradsFinite(lambda x: x, np.float32(1), key=2)
        keys = [each.key for each in (function, method, own)]
        self.assertEqual(keys, ["5", "5", "2"])

if __name__ == "__main__":
    absltest.main()
"""


def test_the_seed_is_that_of_functions_and_methods(tmp_path):
    code, printed = _run(tmp_path, _SEEDED, "--test_random_seed=5")
    assert code == 0, printed


ONE = {"w": np.ones(3, np.float32)}


def _outputs_test():
    """Returns a class whose tests are run below, and by no runner of this file."""

    class OutputsTest(gradtest.absltest.TestCase, parameterized.TestCase):
        def test_method(self):
            self.assertGradsClose(wrong(ONE["w"]), ONE["w"])

        def test_function(self):
            gradtest.assert_grads_close(wrong(ONE["w"]), ONE["w"])

        def test_parts(self):
            for factor in (1, 2, 3):
                with self.subTest(factor=factor):
                    gradtest.assert_grads_close({"w": factor * ONE["w"]}, ONE)

        def test_right(self):
            self.assertGradsClose(ONE, ONE)

        def test_caught(self):
            with pytest.raises(gradtest.GradientMismatch):
                self.assertGradsClose(wrong(ONE["w"]), ONE["w"])

        @absltest.expectedFailure
        def test_known(self):
            self.assertGradsClose(wrong(ONE["w"]), ONE["w"])

        @parameterized.named_parameters(("_up", "../../up"), ("_kind", "<script>"))
        def test_kind(self, name):
            with self.subTest(name):
                self.assertGradsClose(
                    wrong(ONE["w"]), ONE["w"], exception_type=KeyError
                )

        def test_other(self):
            self.fail("not of gradtest's")

    return OutputsTest


def _result_of(*names):
    """Runs those tests as unittest does."""
    result = unittest.TestResult()
    unittest.TestSuite(map(_outputs_test(), names)).run(result)
    return result


@pytest.mark.core
def test_each_failure_leaves_a_page_and_a_record(tmp_path, monkeypatch):
    folder = tmp_path / "made" / "for" / "it"
    monkeypatch.setenv("TEST_UNDECLARED_OUTPUTS_DIR", str(folder))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # as by itself
    names = ("method", "function", "parts", "right", "caught", "known", "other")
    result = _result_of(*(f"test_{name}" for name in names))
    assert (result.testsRun, len(result.failures), len(result.errors)) == (7, 5, 0)
    pages = {path.stem for path in folder.glob("*.html")}
    records = {path.stem for path in folder.glob("*.json")} - {"gradtest_summary"}
    assert len(pages) == 4
    assert pages == records
    for name in records:
        record = (folder / f"{name}.json").read_text(encoding="utf-8")
        report = gradtest.Report.from_json(record)
        assert report.verdict is gradtest.Verdict.FAIL
        assert report.key == "0"  # this assertion draws nothing
    summary = json.loads((folder / "gradtest_summary.json").read_text())
    assert summary["failures"] == 5
    assert summary["line"] == (
        "gradtest: 8 gradients checked, 0 rules audited, smallest visible error "
        "1.6e-5, 4 wrong, 2 wrong in tests that did not fail"
    )


def test_hostile_names_stay_in_the_directory(tmp_path, monkeypatch):
    folder = tmp_path / "outputs"
    monkeypatch.setenv("TEST_UNDECLARED_OUTPUTS_DIR", str(folder))
    result = _result_of("test_kind_up", "test_kind_kind")
    assert len(result.errors) == 2  # KeyError is no failure in unittest's words
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
    assert len(list(folder.iterdir())) == 5


def test_nothing_is_written_where_no_directory_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("TEST_UNDECLARED_OUTPUTS_DIR", raising=False)
    monkeypatch.chdir(tmp_path)
    assert len(_result_of("test_method").failures) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", ["default", "error"])
def test_a_directory_that_cannot_be_written_fails_no_test(
    tmp_path, monkeypatch, action
):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / "below"
    monkeypatch.setenv("TEST_UNDECLARED_OUTPUTS_DIR", str(folder))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)
        result = _result_of("test_right", "test_method")
    assert (len(result.failures), len(result.errors)) == (1, 0)
    if action == "default":
        assert any("gradtest can't write to" in str(each.message) for each in caught)


if __name__ == "__main__":
    absltest.main()
