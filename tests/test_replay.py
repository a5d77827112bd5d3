"""Failures that replay: inputs in an .npz file without pickles, and a script."""

import ast
import dataclasses
import json
import runpy

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import gradtest
from gradtest._src.exhibits import KeyData
from gradtest._src.findings import Exhibit, Finding, Ladder, Report, Rule, Verdict
from gradtest._src.report import archive, replay, trees

pytestmark = pytest.mark.core
X = np.array([0.3, -1.2, 0.8], np.float32)
FINDING = Finding("x", (3,), "float32", Verdict.FAIL, size=1.0, allowed=2e-6)


def report_of(*inputs, **fields):
    return Report(
        "assert_grad_matches",
        "loss",
        Verdict.FAIL,
        (FINDING,),
        trials=1,
        inputs=tuple(inputs),
        **fields,
    )


def saved(tmp_path, *inputs, **fields):
    path = report_of(*inputs, **fields).save(tmp_path / "case.npz")
    return gradtest.load_inputs(path)


def wrong_gradient(params, scale):
    return {"w": 3 * params["w"] * scale, "b": jnp.ones_like(params["b"])}


def loss(params, scale):
    return jnp.sum(params["w"] ** 2) * scale + jnp.sum(params["b"])


def failed_report():
    params = {"w": X, "b": jnp.ones(2, jnp.bfloat16)}
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_grad_matches(loss, wrong_gradient, params, 2.0, key=7)
    return caught.value.report


ARRAYS = [
    np.arange(6, dtype=np.float16).reshape(2, 3),
    np.array([1.5, np.nan, -np.inf, -0.0], ml_dtypes.bfloat16),
    np.array([[1.5], [2.0]], ml_dtypes.float8_e4m3fn),
    np.array([-3, 2], ml_dtypes.int4),
    np.array(1 + 2j, np.complex64),
    np.array([True, False]),
    np.array([-1, 2**62]),
    np.array(7, np.uint8),
    np.zeros((0, 3), np.float32),
    np.zeros((0,), ml_dtypes.bfloat16),
    np.array(2.5, ml_dtypes.bfloat16),
    np.arange(6.0).reshape(2, 3).T,
    np.arange(3, dtype=">f4"),
]


class TestInputs:
    @pytest.mark.parametrize("array", ARRAYS, ids=lambda a: f"{a.dtype}{a.shape}")
    def test_arrays_survive_to_the_bit(self, tmp_path, array):
        found = saved(tmp_path, ("x", array)).leaves["x"]
        assert isinstance(found, np.ndarray)
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()

    @pytest.mark.parametrize(
        "value",
        [
            None,
            True,
            False,
            0,
            -(10**30),
            2.5,
            -0.0,
            float("inf"),
            1e300,
            1 - 2j,
            "ü\n",
        ],
    )
    def test_pythons_own_values_survive(self, tmp_path, value):
        found = saved(tmp_path, ("x", value)).leaves["x"]
        assert type(found) is type(value)
        assert repr(found) == repr(value)

    def test_nan_survives_as_pythons_own(self, tmp_path):
        found = saved(tmp_path, ("x", float("nan")), ("y", complex(0, np.nan))).leaves
        assert np.isnan(found["x"])
        assert np.isnan(found["y"].imag)

    @pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
    def test_keys_become_keys_again(self, tmp_path, impl):
        keys = jax.random.split(jax.random.key(3, impl=impl), 2)
        words = np.asarray(jax.random.key_data(keys))
        found = saved(tmp_path, ("key", KeyData(impl, words))).leaves["key"]
        assert found.shape == (2,)
        assert str(jax.random.key_impl(found)) == impl
        assert jax.random.key_data(found).tolist() == words.tolist()

    @pytest.mark.parametrize(
        "name", ["../../x", "a/b", "x\x00", "<script>", "\ud800", "gradtest", "x" * 999]
    )
    def test_a_hostile_name_is_only_a_name(self, tmp_path, name):
        assert list(saved(tmp_path, (name, X)).leaves) == [name]
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "case.npz",
            "case_replay.py",
        ]

    def test_no_other_file_of_that_name_is_replaced(self, tmp_path):
        (tmp_path / "case.py").write_text("mine")
        failed_report().save(tmp_path / "case.npz")
        assert (tmp_path / "case.py").read_text() == "mine"

    def test_nothing_in_the_file_is_pickled(self, tmp_path):
        path = failed_report().save(tmp_path / "case.npz")
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype.kind != "O" for name in arrays.files)


class TestReport:
    def test_the_report_comes_back_with_exhibits_and_inputs(self, tmp_path):
        report = failed_report()
        found = gradtest.load_inputs(report.save(tmp_path / "case.npz")).report
        assert found == report
        assert [e.name for e in found.exhibits] == [e.name for e in report.exhibits]
        np.testing.assert_array_equal(
            found.exhibits[0].claimed, report.exhibits[0].claimed
        )
        assert [name for name, _ in found.inputs] == [n for n, _ in report.inputs]

    def test_every_field_of_an_exhibit_comes_back(self, tmp_path):
        rule = Rule("mul", "custom_vjp", ("fwd at a.py:1", "bwd"), "a.py:9", "x", 2, 2)
        numbers = np.arange(3.0)
        ladder = Ladder(
            numbers, numbers, numbers, 1.5, float("nan"), numbers, numbers, True
        )
        exhibit = Exhibit(
            "x", numbers + 1j, None, "fwd", 2, rule, ladder, "tangent", (5,), (99,)
        )
        whole = Exhibit("y", numbers, -numbers)
        found = saved(tmp_path, exhibits=(exhibit, whole)).report.exhibits
        assert len(found) == 2
        for one, other in zip((exhibit, whole), found, strict=True):
            for field in dataclasses.fields(Exhibit):
                left, right = getattr(one, field.name), getattr(other, field.name)
                if field.name == "ladder" and left is not None:
                    left, right = dataclasses.astuple(left), dataclasses.astuple(right)
                np.testing.assert_equal(right, left)

    def test_a_report_without_inputs_is_saved_too(self, tmp_path):
        report = gradtest.assert_autodiff_matches(jnp.sum, X)
        path = report.save(tmp_path / "pass.npz")
        assert gradtest.load_inputs(path).leaves == {}
        assert "were not saved" in (tmp_path / "pass_replay.py").read_text()


class TestFiles:
    @pytest.mark.parametrize("suffix", [".npz", ".py", ".NPZ"])
    def test_both_files_lie_side_by_side(self, tmp_path, suffix):
        goal = tmp_path / f"a case{suffix}"
        assert report_of(("x", X)).save(goal) == goal
        assert len(list(tmp_path.iterdir())) == 2
        assert goal.exists()

    def test_a_script_alone_where_there_are_no_inputs(self, tmp_path):
        report_of().save(tmp_path / "case.py")
        assert [path.name for path in tmp_path.iterdir()] == ["case.py"]

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"none\.npz"):
            gradtest.load_inputs(tmp_path / "none.npz")

    def test_files_that_are_not_gradtests_are_refused(self, tmp_path):
        text, other, single = (tmp_path / n for n in ("a.npz", "b.npz", "c.npz"))
        text.write_text("not an archive")
        np.savez(other, x=X)
        with single.open("wb") as file:
            np.save(file, X)
        for path in (text, other, single):
            with pytest.raises(ValueError, match=path.name):
                gradtest.load_inputs(path)

    def test_a_damaged_file_is_refused(self, tmp_path):
        path = report_of(("x", X)).save(tmp_path / "case.npz")
        data = path.read_bytes()
        for damaged in (data[:-40], data[: len(data) // 2], b""):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"case\.npz"):
                gradtest.load_inputs(path)

    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"schema": 99}, "newer"),
            ({"format": "else"}, "not written by gradtest"),
            ({"leaves": [{"name": "x", "kind": "module", "value": "os"}]}, "unknown"),
            ({"leaves": [{"name": "x", "kind": "array", "array": "none"}]}, "none"),
            ({"leaves": 3}, "not"),
        ],
    )
    def test_a_forged_index_is_refused(self, tmp_path, change, says):
        arrays = archive.packed(report_of(("x", X)))
        index = json.loads(arrays["gradtest"].tobytes()) | change
        arrays["gradtest"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
        np.savez(tmp_path / "case.npz", **arrays)
        with pytest.raises(ValueError, match=says):
            gradtest.load_inputs(tmp_path / "case.npz")

    def test_an_object_array_is_never_unpickled(self, tmp_path):
        arrays = archive.packed(report_of(("x", X)))
        arrays["input0"] = np.array([print], dtype=object)
        np.savez(tmp_path / "case.npz", **arrays)
        with pytest.raises(ValueError, match="allow_pickle"):
            gradtest.load_inputs(tmp_path / "case.npz")


class TestArguments:
    def test_containers_are_rebuilt_from_names(self):
        leaves = {
            "params['a']['b'][0]": 1,
            "params['a']['b'][1]": 2,
            "params['it\\'s']": 3,
            "x": 4,
            "args[2][3]": 5,
        }
        assert trees.arguments_of(leaves) == (
            {"a": {"b": (1, 2)}, "it's": 3},
            4,
            {3: 5},
        )

    @pytest.mark.parametrize(
        "name", ["p.w", "p[<flat index 0>]", "p[f()]", "p['a'", "1", "p[[1]]", ""]
    )
    def test_a_name_that_is_no_path_asks_for_the_structure(self, name):
        with pytest.raises(ValueError, match=r"saved\.into"):
            trees.arguments_of({name: 1})

    def test_names_that_contradict_each_other_are_refused(self):
        with pytest.raises(ValueError, match=r"saved\.into"):
            trees.arguments_of({"p": 1, "p['a']": 2})

    def test_leaves_are_put_into_arguments_of_any_class(self, tmp_path):
        @jax.tree_util.register_dataclass
        @dataclasses.dataclass
        class Params:
            w: jax.Array
            names: list

        def fn(params, scale):
            return jnp.sum(params.w) * scale

        found = saved(
            tmp_path, ("params.w", X), ("params.names[0]", 2.5), ("scale", 3.0)
        )
        fresh = Params(jnp.zeros(3), [jnp.zeros(())])
        params, scale = found.into(fn, fresh, 1.0)
        assert isinstance(params, Params)
        np.testing.assert_array_equal(params.w, X)
        assert (params.names, scale) == ([2.5], 3.0)

    def test_arguments_of_another_structure_are_refused(self, tmp_path):
        found = saved(tmp_path, ("x", X), ("y", X))
        with pytest.raises(ValueError, match="no leaf 'y', which was saved"):
            found.into(lambda x: jnp.sum(x), X)
        with pytest.raises(ValueError, match=r"saved has shape \[3\]"):
            found.into(lambda x, y: jnp.sum(x), X, np.zeros(4, np.float32))


class TestScript:
    def test_it_replays_the_failure_once_the_functions_are_there(self, tmp_path):
        report = failed_report()
        report.save(tmp_path / "case.npz")
        text = (tmp_path / "case_replay.py").read_text()
        text = text.replace(
            "\nfn = None\n", "\nfrom tests.test_replay import loss as fn\n"
        )
        text = text.replace(
            "\ngrad_fn = None\n",
            "\nfrom tests.test_replay import wrong_gradient as grad_fn\n",
        )
        (tmp_path / "case_replay.py").write_text(text)
        with pytest.raises(gradtest.GradientMismatch) as caught:
            runpy.run_path(str(tmp_path / "case_replay.py"))
        again = caught.value.report
        assert again.findings == report.findings
        assert again.key == "7"

    def test_what_is_lacking_is_asked_for(self, tmp_path):
        (tmp_path / "case.py").write_text(replay.script(report_of()))
        with pytest.raises(SystemExit, match="set fn, grad_fn in this script"):
            runpy.run_path(str(tmp_path / "case.py"))

    def test_variables_and_flags_come_before_jax(self):
        environment = (
            ("jax", "0.10.2"),
            ("jax_enable_x64", "False"),
            ("jax_default_matmul_precision", "highest"),
            ("XLA_FLAGS", "--xla_force_host_platform_device_count=8"),
        )
        text = replay.script(report_of(environment=environment))
        variable = text.index("os.environ['XLA_FLAGS'] = '--xla_force_host")
        assert variable < text.index("import jax")
        assert "'jax_enable_x64': False," in text
        assert "'jax_default_matmul_precision': 'highest'," in text
        assert "# jax: 0.10.2\n" in text

    @pytest.mark.parametrize(
        ("assertion", "call"),
        [
            ("assert_autodiff_matches", "(fn, *args, key=0, trials=3, order=2)"),
            ("assert_vjp_matches", "(fn, hand_written, *args, key=0, trials=3)"),
            ("check", "(fn, *args, key=0, trials=3, order=2)"),
            ("assert_grads_close", "(claimed, reference)"),
            (
                "assert_parallel_grads_match",
                "(step, loss, params, batch, key=0, trials=3)",
            ),
        ],
    )
    def test_the_call_has_what_the_assertion_takes(self, assertion, call):
        report = dataclasses.replace(
            report_of(), assertion=assertion, trials=3, order=2, key="0"
        )
        assert f"gradtest.{assertion}{call}" in replay.script(report)

    @pytest.mark.parametrize(
        "hostile", ["<lambda>", "x\nimport os", "''' + f() #", "\u2028raise", "a; b"]
    )
    def test_hostile_names_stay_comments(self, hostile):
        report = dataclasses.replace(
            report_of(environment=((hostile, hostile), ("XLA_FLAGS", hostile))),
            subject=hostile,
            assertion=hostile,
        )
        text = replay.script(report, hostile)
        names = {node.id for node in ast.walk(ast.parse(text)) if hasattr(node, "id")}
        allowed = {"jax", "os", "gradtest", "fn", "args", "saved", "path", "report"}
        allowed |= {"flags", "name", "value", "SystemExit", "hasattr", "print"}
        assert names - allowed == {"__file__"}
