"""Every call of a custom rule is found, with its place and the values that reach it."""

import functools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import gradtest
from gradtest._src import inputs, program, rules
from gradtest._src.check import Check  # noqa: F401  registers every handler

X = jnp.linspace(-1.0, 1.5, 4)


@jax.custom_vjp
def scaled_sine(x, w):
    return w * jnp.sin(x)


scaled_sine.defvjp(
    lambda x, w: (scaled_sine(x, w), (x, w)),
    lambda res, g: (g * res[1] * jnp.cos(res[0]), jnp.sum(g * jnp.sin(res[0]))),
)


@jax.custom_jvp
def square(x):
    return x**2


square.defjvps(lambda t, value, x: 2 * x * t)


@jax.custom_vjp
def outer(x):
    return square(x) + x


outer.defvjp(lambda x: (outer(x), x), lambda x, g: (g * (2 * x + 1),))


def uses_of(fn, *args, only=None):
    read = inputs.read_inputs(fn, args)
    point = read.draw(0, 0)
    return rules.find_rules(program.trace_program(fn, read, point), point, only)


def first_operands(use):
    return [np.asarray(sample[0]) for sample in use.samples]


@pytest.mark.core
def test_a_rule_is_named_with_the_lines_of_its_parts_and_of_its_call():
    (use,) = uses_of(lambda x: scaled_sine(x, 2.0), X)
    assert (use.rule.name, use.rule.kind) == ("scaled_sine", "custom_vjp")
    assert [part.split(":")[0] for part in use.rule.where] == [
        "scaled_sine at tests/test_rules.py",
        "fwd at tests/test_rules.py",
        "bwd at tests/test_rules.py",
    ]
    assert use.rule.call.startswith("tests/test_rules.py:")
    assert use.source.operands == ("x", "w")


@pytest.mark.core
def test_parts_that_a_library_wraps_are_found_at_their_authors_lines():
    (use,) = uses_of(square, X)
    assert use.rule.where[1].startswith("jvp at tests/test_rules.py:")


@pytest.mark.core
def test_a_scan_shows_its_first_a_middle_and_its_last_turn():
    def fn(x):
        return jax.lax.scan(lambda c, _: (scaled_sine(c, 2.0), c), x, None, length=7)

    (use,) = uses_of(fn, X)
    turns = fn(X)[1]
    assert use.rule.count == 7
    for found, turn in zip(first_operands(use), (0, 3, 6), strict=True):
        np.testing.assert_allclose(found, turns[turn], rtol=1e-6)


@pytest.mark.core
def test_a_reversed_scan_starts_at_its_last_element():
    def fn(xs):
        return jax.lax.scan(lambda c, x: (c, square(x)), 0.0, xs, reverse=True)

    (use,) = uses_of(fn, jnp.arange(5.0))
    assert [float(found) for found in first_operands(use)] == [4.0, 2.0, 0.0]


@pytest.mark.core
def test_a_while_loop_shows_turns_up_to_its_last():
    def fn(x):
        return jax.lax.while_loop(
            lambda s: s[1] < 6, lambda s: (square(s[0]), s[1] + 1), (x, 0)
        )[0]

    (use,) = uses_of(fn, jnp.float32(1.01))
    wanted = [1.01 ** (2**turn) for turn in (0, 4, 5)]
    np.testing.assert_allclose(first_operands(use), wanted, rtol=1e-4)


@pytest.mark.core
def test_only_the_branch_that_is_taken_shows_values():
    def fn(x):
        return jax.lax.cond(x[0] > 0, square, lambda y: scaled_sine(y, 3.0), x)

    by_name = {use.rule.name: use for use in uses_of(fn, X)}
    assert by_name["square"].samples == ()
    assert by_name["square"].trouble == "it was not reached at these values"
    np.testing.assert_array_equal(first_operands(by_name["scaled_sine"])[0], X)


@pytest.mark.core
def test_many_calls_with_equal_shapes_are_one_use_with_their_count():
    def fn(x):
        for _ in range(48):
            x = scaled_sine(x, 1.01)
        return x

    (use,) = uses_of(fn, X)
    assert use.rule.count == 48
    assert len(use.samples) == 3
    np.testing.assert_array_equal(first_operands(use)[0], X)


@pytest.mark.core
def test_calls_with_other_shapes_are_another_use():
    uses = uses_of(lambda x: square(x).sum() + square(x[:2]).sum(), X)
    assert [use.samples[0][0].shape for use in uses] == [(4,), (2,)]


@pytest.mark.core
def test_rules_inside_of_rules_are_found_and_said_to_be_shadowed():
    by_name = {use.rule.name: use for use in uses_of(outer, X)}
    assert by_name["outer"].is_invoked
    assert not by_name["square"].is_invoked
    assert "`outer`" in by_name["square"].why_not_invoked()
    assert by_name["square"].rule.path == "outer()"


@pytest.mark.core
@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x: x + jax.lax.stop_gradient(square(x)), "stop_gradient"),
        (lambda x: x * square(jnp.ones(4)), "depends on what is differentiated"),
        (lambda x: (square(x).astype(int), x)[1], "stop_gradient"),
    ],
)
def test_a_rule_that_the_derivative_never_goes_through_is_told(fn, why):
    report = gradtest.assert_custom_rules_match(fn, X)
    assert any("never goes through" in note and why in note for note in report.notes)


@pytest.mark.core
def test_a_live_rule_in_a_loop_is_not_said_to_be_unused():
    def fn(x):
        def turn(carry, _):
            return (carry[1], square(carry[0])), None

        return jax.lax.scan(turn, (x, x), None, 4)[0][0]

    (use,) = uses_of(fn, X)
    assert use.is_invoked


@pytest.mark.core
def test_batched_and_rematerialised_calls_are_found():
    def fn(x):
        rows = jnp.stack([x, 2 * x, 3 * x])
        return jax.checkpoint(jax.vmap(lambda r: scaled_sine(r, r[0])))(rows)

    (use,) = uses_of(fn, X)
    assert use.samples[0][0].shape == (3, 4)
    assert "remat" in use.rule.path


@pytest.mark.core
def test_a_flax_rule_is_placed_by_its_modules():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scaled_sine(nn.Dense(4)(x), 2.0)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Block)(name="deep")(x)

    params = Model().init(jax.random.key(0), X)
    (use,) = uses_of(lambda p: Model().apply(p, X).sum(), params)
    assert "Model" in use.rule.path
    assert "deep" in use.rule.path


@pytest.mark.core
@pytest.mark.parametrize(
    "only",
    ["square", "squ*", square, __name__, sys.modules[__name__], ("square",), [square]],
)
def test_only_narrows_by_name_pattern_module_or_function(only):
    names = [use.rule.name for use in uses_of(lambda x: square(x), X, only=only)]
    assert names == ["square"]


@pytest.mark.core
def test_only_leaves_the_other_rules_out():
    def fn(x):
        return square(x) + scaled_sine(x, 2.0) + jax.nn.relu(x)

    report = gradtest.assert_custom_rules_match(fn, X, only="scaled_sine")
    assert [rule.name for rule in report.rules] == ["scaled_sine"]
    report = gradtest.assert_custom_rules_match(fn, X, only=__name__)
    assert [rule.name for rule in report.rules] == ["square", "scaled_sine"]


@pytest.mark.core
def test_an_only_that_names_no_rule_is_an_error_with_the_names_there_are():
    with pytest.raises(ValueError, match=r"`only` names 'squid'.*it calls square\."):
        gradtest.assert_custom_rules_match(square, X, only="squid")
    for only in ([3], 3):
        with pytest.raises(TypeError, match=r"`only` must name rules.*got 3"):
            gradtest.assert_custom_rules_match(square, X, only=only)
    with pytest.raises(ValueError, match="`only` is empty"):
        gradtest.assert_custom_rules_match(square, X, only=[])


@pytest.mark.core
def test_a_function_without_custom_rules_is_an_error():
    with pytest.raises(ValueError, match="calls no custom rule"):
        gradtest.assert_custom_rules_match(jnp.sin, X)


@pytest.mark.core
def test_nan_that_reaches_a_rule_is_inconclusive():
    with pytest.raises(gradtest.GradientInconclusive, match="NaN reaches it"):
        gradtest.assert_custom_rules_match(lambda x: square(jnp.log(x)), X)


@pytest.mark.core
def test_a_rule_that_no_branch_reaches_is_no_pass():
    def fn(x):
        return jax.lax.cond(x[0] > 0, square, lambda y: y, x)

    with pytest.raises(gradtest.GradientInconclusive, match="not reached"):
        gradtest.assert_custom_rules_match(fn, X)


@pytest.mark.core
def test_infinite_entries_are_held_and_the_finite_ones_checked():
    @jax.custom_vjp
    def soft(x):
        return jax.nn.softmax(x)

    def bwd(p, g):
        return (FACTOR * p * (g - jnp.sum(p * g)),)

    soft.defvjp(lambda x: (soft(x), soft(x)), bwd)

    def fn(x):
        return soft(jnp.where(jnp.arange(4) < 3, x, -jnp.inf))

    FACTOR = 1.0
    gradtest.assert_custom_rules_match(fn, X)
    FACTOR = 2.0
    with pytest.raises(gradtest.GradientMismatch, match="2 times too large"):
        gradtest.assert_custom_rules_match(fn, X)


@pytest.mark.devices
def test_a_cotangent_that_is_not_summed_over_the_devices_is_told_to_be():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spec, same = PartitionSpec("data"), PartitionSpec()

    def fn(x, w):
        return jax.shard_map(
            scaled_sine, mesh=mesh, in_specs=(spec, same), out_specs=spec
        )(x, w)

    with pytest.raises(gradtest.GradientMismatch, match=r"Try: sum it.*jax\.lax\.psum"):
        gradtest.assert_custom_rules_match(fn, jnp.arange(1.0, 9.0), 2.0)


@pytest.mark.devices
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_rule_in_a_device_region_is_audited_on_all_devices(check_vma):
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    spec = PartitionSpec("data")

    def local(x, w):
        # A rule that does not sum over the devices takes what differs on each.
        w = jax.lax.pcast(w, "data", to="varying") if check_vma else w
        return jax.lax.psum(scaled_sine(x, w), "data")

    def fn(x, w):
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(spec, PartitionSpec()),
            out_specs=PartitionSpec(),
            check_vma=check_vma,
        )(x, w)

    (use,) = uses_of(fn, jnp.arange(1.0, 9.0), jnp.float32(2.0))
    assert use.samples[0][0].shape == (4, 2)
    report = gradtest.assert_custom_rules_match(fn, jnp.arange(1.0, 9.0), 2.0)
    assert report.rules[0].path == "shard_map"


def made_of(table, factor=1.0):
    """A rule that closes over a value of its caller's."""

    @jax.custom_vjp
    def looked_up(x):
        return x * table

    looked_up.defvjp(lambda x: (x * table, None), lambda _, g: (factor * g * table,))
    return looked_up


@pytest.mark.core
@pytest.mark.parametrize(
    "around",
    [
        lambda rule: lambda x, ids: rule(ids * 2.0)(x),
        lambda rule: lambda x, ids: jax.jit(lambda y: rule(jnp.sqrt(ids))(y))(x),
        lambda rule: (
            lambda x, ids: jax.lax.scan(
                lambda c, _: (rule(ids * 0.5)(c), None), x, None, 3
            )[0]
        ),
        lambda rule: lambda x, ids: jax.vmap(rule(ids * 2.0))(x[None]),
    ],
    ids=["plain", "jit", "scan", "vmap"],
)
def test_a_rule_that_closes_over_a_held_value_is_audited_with_it(around):
    ids = jnp.array([1, 2, 3, 4])
    gradtest.assert_custom_rules_match(around(made_of), X, ids)
    with pytest.raises(gradtest.GradientMismatch, match="2 times too large"):
        gradtest.assert_custom_rules_match(
            around(lambda table: made_of(table, 2.0)), X, ids
        )


@pytest.mark.core
def test_a_rule_that_closes_over_what_is_differentiated_is_refused():
    def fn(x, w):
        return made_of(2 * w)(x)

    with pytest.raises(
        gradtest.GradientMismatch, match="closes over a value that depends on"
    ):
        gradtest.assert_custom_rules_match(fn, X, X)
    with pytest.raises(TypeError, match="closes over a traced value"):
        gradtest.assert_autodiff_matches(fn, X, X)


@pytest.mark.core
def test_the_report_says_how_many_calls_were_looked_at():
    def fn(x):
        return jax.lax.fori_loop(0, 200, lambda _, c: scaled_sine(c, 1.01), x)

    report = gradtest.assert_custom_rules_match(fn, X)
    assert (report.rules[0].count, report.rules[0].looked_at) == (200, 3)
    assert "200 calls (3 looked at)" in str(report)


@pytest.mark.core
def test_integer_results_of_fwd_are_compared_too():
    @jax.custom_vjp
    def top(x):
        return jnp.sin(x), jnp.argmax(x)

    top.defvjp(
        lambda x: ((jnp.sin(x), jnp.argmin(x)), x),
        lambda x, g: (g[0] * jnp.cos(x),),
    )
    with pytest.raises(gradtest.GradientMismatch, match=r"another value.*result\[1\]"):
        gradtest.assert_custom_rules_match(top, X)


@pytest.mark.core
def test_auxiliary_results_of_the_function_are_left_aside():
    def fn(x):
        return square(x).sum(), {"x": x}

    report = gradtest.assert_custom_rules_match(fn, X, has_aux=True)
    assert [rule.name for rule in report.rules] == ["square"]


@pytest.mark.core
def test_a_batching_that_is_wrong_for_cotangents_alone_is_seen():
    @jax.custom_batching.custom_vmap
    def product(g, y):
        return g * y

    @product.def_vmap
    def _(size, is_batched, g, y):
        return g * (y if is_batched[1] else 1.01 * y), True

    @jax.custom_vjp
    def wave(x):
        return jnp.sin(x)

    wave.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (product(g, jnp.cos(x)),))
    with pytest.raises(gradtest.GradientMismatch, match="over cotangents alone"):
        gradtest.assert_custom_rules_match(wave, X)


@pytest.mark.core
def test_what_changes_from_trace_to_trace_is_told_and_not_the_numbers_it_gives():
    calls = []

    @jax.custom_vjp
    def grown(x):
        return jnp.sin(x)

    def backward(x, g):
        calls.append(1)
        return (g * jnp.cos(x) * len(calls),)

    grown.defvjp(lambda x: (jnp.sin(x), x), backward)
    with pytest.raises(gradtest.GradientMismatch, match="traced a second time"):
        gradtest.assert_custom_rules_match(grown, X)


@pytest.mark.core
def test_a_tangent_that_cannot_be_pulled_back_is_named():
    @jax.custom_jvp
    def squared(x):
        return x**2

    squared.defjvps(lambda t, value, x: jnp.where(t > 0, 2 * x * t, 2 * x * t))
    with pytest.raises(gradtest.GradientMismatch, match="can't pull its tangent back"):
        gradtest.assert_custom_rules_match(squared, X)


@pytest.mark.core
def test_a_guard_against_transfers_is_no_fault_of_the_rule():
    with jax.transfer_guard("disallow"):
        gradtest.assert_custom_rules_match(square, X)
        assert gradtest.check(square, X).verdict is gradtest.Verdict.PASS


@pytest.mark.core
def test_rules_in_the_programs_of_a_solver_are_listed_as_not_checked():
    @jax.custom_jvp
    def tripled(v):
        return 3 * v

    tripled.defjvps(lambda t, value, v: 3 * t)

    def fn(x):
        solved = jax.lax.custom_linear_solve(
            tripled, x, solve=lambda _, b: b / 3, symmetric=True
        )
        return square(solved)

    report = gradtest.assert_custom_rules_match(fn, X)
    assert [rule.name for rule in report.rules] == ["square"]
    assert any(line.startswith("tripled: called inside") for line in report.unchecked)


@jax.custom_jvp
def _mean_over_rows(x):
    return jax.lax.pmean(jnp.sin(x), "rows")


_mean_over_rows.defjvp(
    lambda p, t: (_mean_over_rows(*p), jax.lax.pmean(jnp.cos(p[0]) * t[0], "rows"))
)


@jax.custom_vjp
def _tripled(x):
    return 3 * x


_tripled.defvjp(lambda x: (3 * x, None), lambda _, g: (3 * g,))


@pytest.mark.parametrize(
    ("fn", "why"),
    [
        (lambda x: jax.vmap(_mean_over_rows, axis_name="rows")(x), "a named axis"),
        (lambda x: (_tripled(x[:0]), jnp.sin(x)), "its results have no entry"),
    ],
)
def test_a_rule_that_cannot_be_run_by_itself_is_said_not_to_be_checked(fn, why):
    x = jnp.array([0.5, 1.0, 2.0])
    gradtest.assert_autodiff_matches(fn, x)  # the program as a whole is right
    with pytest.raises(gradtest.GradientInconclusive, match=why):
        gradtest.assert_custom_rules_match(fn, x)


def scaled_by(factor):
    @jax.custom_vjp
    def layer(x):
        return jnp.tanh(x)

    def bwd(y, g):
        return (factor * g * (1 - y * y),)

    layer.defvjp(lambda x: (jnp.tanh(x),) * 2, bwd)
    return layer


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def scaled_apart(x, factor):
    return jnp.tanh(x)


scaled_apart.defvjp(
    lambda x, factor: (jnp.tanh(x),) * 2,
    lambda factor, y, g: (factor * g * (1 - y * y),),
)


@pytest.mark.parametrize(
    "make", [scaled_by, lambda factor: lambda x: scaled_apart(x, factor)]
)
@pytest.mark.parametrize("factors", [(1.0, 1.1), (1.1, 1.0)])
def test_rules_of_one_factory_are_audited_each_by_itself(make, factors):
    first, second = map(make, factors)
    x = jnp.linspace(-1.0, 1.5, 5)
    with pytest.raises(gradtest.GradientMismatch, match=r"1\.1 times too large"):
        gradtest.assert_custom_rules_match(lambda x: second(2 * first(x)), x)
    right, same = make(1.0), make(1.0)
    report = gradtest.assert_custom_rules_match(lambda x: right(2 * same(x)), x)
    assert [rule.count for rule in report.rules] == [2]
