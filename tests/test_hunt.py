"""The public face of a hunt: its report, its message, its database, its options."""

import subprocess
import sys

import chex
import hunted
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.database import InMemoryExampleDatabase

import gradtest
from gradtest import Verdict, domains
from gradtest._src.hunting.asserting import hunt


@jax.custom_vjp
def ramp(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, 0) + x**2


# Right but for negative numbers.
ramp.defvjp(lambda x: (ramp(x), x), lambda x, g: (g * jnp.where(x > 0, 1 + 2 * x, x),))


@jax.custom_jvp
def flat_at_zero(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


@flat_at_zero.defjvp
def _flat_at_zero_jvp(primals, tangents):
    slope = jnp.where(primals[0] == 0, 0.0, jnp.cos(primals[0]))
    return flat_at_zero(*primals), slope * tangents[0]


@jax.custom_jvp
def bump(x: jax.Array) -> jax.Array:
    return jnp.exp(-(x**2))


@bump.defjvp
def _bump_jvp(primals, tangents):
    y = bump(*primals)
    return y, -2 * primals[0] * jax.lax.stop_gradient(y) * tangents[0]


def wrong(*args, **options) -> gradtest.GradientMismatch:
    options.setdefault("database", None)
    with pytest.raises(gradtest.GradientMismatch) as caught:
        hunt(*args, **options)
    return caught.value


def test_the_message_has_the_smallest_input_as_code_that_fails_again():
    error = wrong(ramp, domains.normal("n"))
    lines = [line.strip() for line in str(error).split("\n")]
    start = next(i for i, line in enumerate(lines) if line.startswith("Smallest"))
    assert 3 <= start <= 9
    assert lines[start].startswith("Smallest failing input, 1 entry, after ")
    assert lines[start + 1] == "x = jnp.array([-1.0], jnp.float32)"
    code = "\n".join(lines[start + 1 :])
    with pytest.raises(gradtest.GradientMismatch):
        exec(code, {"jnp": jnp, "gradtest": gradtest, "ramp": ramp})
    assert "x = jnp.array([-1.0], jnp.float32)" in str(error.report)
    assert dict(error.report.inputs)["x"].tolist() == [-1.0]
    assert error.report.findings[0].cause is not None


def test_a_hunt_that_finds_nothing_tells_what_it_tried():
    report = hunt(jnp.tanh, domains.normal(("n", 2)), examples=40, database=None)
    assert report.verdict is Verdict.PASS
    assert report.assertion == "hunt"
    assert 30 < report.trials <= 40
    assert any(hazard.name.startswith("x: all zero") for hazard in report.hazards)
    assert any("n = 8" in note for note in report.notes)
    assert any(note.startswith("skipped n = 0") for note in report.notes)


def test_sizes_at_which_the_derivative_alone_raises_are_told():
    @jax.custom_vjp
    def blocks(x: jax.Array) -> jax.Array:
        return (x**2).sum()

    def backward(x, g):
        return ((2 * g * x.reshape(-1, 4)).reshape(x.shape),)

    blocks.defvjp(lambda x: (blocks(x), x), backward)
    report = hunt(blocks, jnp.array([0.3, -0.2, 0.5, 1]), examples=40, database=None)
    assert report.verdict is Verdict.PASS
    assert any("x.shape[0] = 3: the function has" in line for line in report.unchecked)


def test_positive_arguments_are_tried_with_negative_numbers_too():
    error = wrong(ramp, jnp.array([0.6, 1.3, 2.0]))
    assert dict(error.report.inputs)["x"].tolist() == [-1.0]


def test_a_function_of_positive_numbers_is_not_accused_for_others():
    for fn in (jnp.log, jnp.sqrt, lambda x: x**1.5):
        report = hunt(fn, jnp.array([0.6, 1.3, 2.0]), examples=50, database=None)
        assert report.verdict is Verdict.PASS


def test_a_right_formula_that_cancels_at_huge_numbers_is_not_accused():
    @jax.custom_jvp
    def cube(x: jax.Array) -> jax.Array:
        return x**3

    @cube.defjvp
    def _cube_jvp(primals, tangents):
        (x,), (dx,) = primals, tangents
        return cube(x), ((x + 0.5) ** 3 - (x - 0.5) ** 3 - 0.25) * dx

    report = hunt(cube, jnp.array([0.3, -0.7]), examples=60, database=None)
    assert report.verdict is Verdict.PASS


def newtons_root(counted: bool, right: bool):
    """Returns the root x of x**3 + p x = q, with the rule for implicit functions."""

    def step(p: jax.Array, q: jax.Array, x: jax.Array) -> jax.Array:
        return x - (x**3 + p * x - q) / (3 * x**2 + p)

    @jax.custom_vjp
    def root(p: jax.Array, q: jax.Array) -> jax.Array:
        start = jnp.zeros_like(q)
        if counted:
            return jax.lax.fori_loop(0, 60, lambda _, x: step(p, q, x), start)
        return jax.lax.while_loop(
            lambda state: state[0] < 60,
            lambda state: (state[0] + 1, step(p, q, state[1])),
            (0, start),
        )[1]

    def forwards(p, q):
        x = root(p, q)
        return x, (p, x)

    def backwards(saved, g):
        p, x = saved
        u = g / (3 * x**2 + p)
        return (-u * x if right else 0 * u), u

    root.defvjp(forwards, backwards)
    return root


@pytest.mark.parametrize("counted", [True, False])
def test_an_iteration_without_an_end_is_not_accused(counted):
    root = newtons_root(counted, right=True)
    # Where p is negative it may go around in circles, whose derivative is no root's.
    circle = gradtest.check(root, jnp.array([-2.0]), jnp.array([2.0]))
    assert circle.verdict is not Verdict.PASS
    args = jnp.array([1.3, 1.7]), jnp.array([0.4, -2.0])
    for key in range(3):
        assert hunt(root, *args, key=key, database=None).verdict is Verdict.PASS
    wrong(newtons_root(counted, right=False), *args)


def test_a_wrong_second_derivative_is_told_as_such():
    error = wrong(bump, jnp.array([0.3, -0.7]))
    assert "the second derivative of bump is wrong" in str(error)
    assert "first derivative is right there" in str(error)
    assert "order=2)" in str(error)
    report = hunt(bump, jnp.array([0.3, -0.7]), order=1, examples=30, database=None)
    assert report.verdict is Verdict.PASS


def test_what_has_no_second_derivative_is_no_error():
    def loops(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] * x),
                                  (0, x))[1]  # fmt: skip

    report = hunt(loops, jnp.array([0.5, 1.5]), examples=20, database=None)
    assert report.verdict is Verdict.PASS
    assert any(line.startswith("second order") for line in report.unchecked)


def test_a_rule_is_hunted_at_its_own_operands():
    def network(x: jax.Array) -> jax.Array:
        return flat_at_zero(1.1 * x + 0.3).sum()  # 0 for no number that is round

    error = wrong(network, jnp.array([0.1, -0.4]), order=1)
    assert "flat_at_zero" in str(error).split("\n")[0]
    assert error.report.rules[0].name == "flat_at_zero"
    assert error.report.subject == "network"
    assert "assert_autodiff_matches(flat_at_zero, x)" in str(error)


def test_trees_scalars_keys_and_none_are_kept():
    def loss(params, key, none, scale):
        noise = jax.random.normal(key, params["w"].shape)
        return scale * ((params["w"] + noise) ** 2).sum()

    args = {"w": jnp.ones((2, 3)), "b": None}, jax.random.key(0), None, 0.5
    report = hunt(loss, *args, examples=30, database=None)
    assert report.verdict is Verdict.PASS


def test_the_failing_input_is_kept_and_replayed_first():
    database = InMemoryExampleDatabase()
    first = wrong(flat_at_zero, domains.normal(("n", 2)), database=database)
    again = wrong(flat_at_zero, domains.normal(("n", 2)), database=database)
    assert first.report.trials > 1
    assert again.report.trials == 1
    assert dict(again.report.inputs)["x"].tolist() == [[0.0, 0.0]]


def test_a_kept_input_that_passes_now_is_forgotten():
    database = InMemoryExampleDatabase()
    wrong(ramp, domains.normal(2), database=database)
    assert any(database.data.values())
    hunt(
        ramp, domains.normal(2), database=database, examples=5,
        expect_differs={ramp: lambda x: jnp.where(x > 0, x + x**2, x**2 / 2)},
    )  # fmt: skip
    assert not any(database.data.values())


def test_the_same_key_finds_the_same():
    inputs = [
        dict(wrong(ramp, domains.normal(("n", 2)), key=3).report.inputs)["x"].tolist()
        for _ in range(2)
    ]
    assert inputs[0] == inputs[1]
    reports = [
        hunt(jnp.tanh, jnp.ones(3), examples=30, key=5, database=None) for _ in range(2)
    ]
    assert reports[0].hazards == reports[1].hazards


def test_it_runs_inside_of_a_property_test():
    found = []

    @hypothesis.settings(max_examples=2, deadline=None, database=None)
    @hypothesis.given(st.integers(1, 2))
    def scaled(n):
        report = hunt(jnp.tanh, domains.normal(n), examples=30, database=None)
        found.append(report.verdict)

    scaled()
    assert set(found) == {Verdict.PASS}


def test_numpys_random_state_stays_as_it_was():
    np.random.seed(7)
    before = np.random.get_state()[1].tolist()
    hunt(jnp.tanh, domains.normal(2), examples=30, database=None)
    assert np.random.get_state()[1].tolist() == before


def test_the_keywords_of_chex_are_taken():
    with pytest.raises(KeyError, match="my words"):
        hunt(ramp, domains.normal(2), database=None, examples=40,
             exception_type=KeyError, custom_message="my words")  # fmt: skip
    chex.disable_asserts()
    try:
        report = hunt(ramp, domains.normal(2), database=None)
    finally:
        chex.enable_asserts()
    assert report.verdict is Verdict.NOT_CHECKED


def test_where_nothing_is_conclusive_that_is_said():
    def nowhere(x: jax.Array) -> jax.Array:
        return jnp.log(-jnp.abs(x))

    with pytest.raises(gradtest.GradientInconclusive):
        hunt(nowhere, jnp.array([0.5]), examples=20, database=None)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"examples": 0}, ValueError, "`examples` must be an integer"),
        ({"examples": 2.5}, ValueError, "`examples` must be an integer"),
        ({"order": 3}, ValueError, "`order` must be"),
        ({"database": 3}, TypeError, "`database` must be"),
        ({"argnums": 4}, ValueError, "`argnums`"),
        ({"exclude": ("y",)}, ValueError, "`exclude`"),
        ({"key": 0.5}, TypeError, "`key`"),
    ],
)
def test_a_slip_is_named(options, error, says):
    with pytest.raises(error, match=says):
        hunt(jnp.tanh, domains.normal(2), **options)
    with pytest.raises(TypeError, match="`fn` must be callable"):
        hunt(3, domains.normal(2))


def test_excluded_leaves_vary_and_are_not_checked():
    twins = hunted.TWINS["a scale whose gradient is that of the first row of a batch"]

    def scaled(x, w):
        return twins.wrong(x, w)

    report = hunt(scaled, *twins.args, exclude=("w",), examples=30, database=None)
    assert report.verdict is Verdict.PASS
    assert "w (excluded)" in report.unchecked


def test_without_hypothesis_the_extra_is_named():
    code = (
        "import sys; sys.modules['hypothesis'] = None;"
        "from gradtest._src.hunting.asserting import hunt; hunt(abs, 1.0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'gradtest[hunt]'" in done.stderr


def test_importing_gradtest_imports_no_hypothesis():
    code = (
        "import sys, gradtest, gradtest._src.hunting.asserting;"
        "gradtest.check; sys.exit('hypothesis' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
