"""Graphs: what is drawn of jaxprs, gradients and HLO."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from examples import homework
from gradtest import domains, graph
from gradtest._src.graphs.hlo_text import read_module
from tests.drawn_graphs import SUBJECTS, VECTOR, edges, labels, right_square

# --- what is drawn ------------------------------------------------------------------


@pytest.mark.core
def test_a_jaxpr_is_drawn_with_the_users_names_and_the_types_on_the_edges():
    picture = graph(homework.task1, VECTOR, VECTOR)
    assert edges(picture) == {
        ("x", "sin"), ("y", "cos"), ("sin", "sub"), ("cos", "sub"),
        ("sub", "integer_pow"), ("integer_pow", "neg"), ("neg", "exp"),
        ("exp", "result"),
    }  # fmt: skip
    assert picture.num_nodes == 9
    assert " f32[3] " in labels(picture)


def test_leaves_have_their_paths_and_results_theirs():
    def fn(params, batch):
        return {"loss": (params["w"] * batch[0]).sum(), "seen": batch[1]}

    picture = graph(fn, {"w": VECTOR}, (domains.normal(3), 2.0))
    assert {("params['w']", "mul"), ("batch[0]", "mul")} <= edges(picture)
    assert ("batch[1]", "result['seen']") in edges(picture)


@pytest.mark.parametrize("of", SUBJECTS)
def test_every_kind_of_leaf_is_taken(of):
    def fn(x, key, ids, nothing, name, count):
        assert nothing is None
        assert name == "tanh"
        assert count == 3
        noise = jax.random.normal(key, (count,))
        return jnp.sum(x["a"] * noise * x["b"] * x["c"][ids])

    x = {"a": domains.normal(3), "b": 2.0, "c": np.ones(3, np.float32)}
    ids = jax.ShapeDtypeStruct((3,), jnp.int32)
    picture = graph(fn, x, jax.random.key(0), ids, None, "tanh", 3, of=of, fold=None)
    assert {"x['a']", "x['b']", "x['c']", "key", "ids"} <= {
        text.split("\n")[0] for text in labels(picture)
    }


@pytest.mark.parametrize("of", SUBJECTS)
def test_nothing_is_run(of):
    ran = []

    def fn(x):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.sin(x).sum()

    graph(fn, jnp.ones(3), of=of)
    jax.effects_barrier()
    assert not ran


def test_constants_show_their_entries_where_they_are_few():
    few, many = jnp.array([1.5, 2.5, 3.5]), np.ones((300, 1), np.float32)
    texts = labels(graph(lambda x: (x * few).sum() + x * many, jnp.ones(3)))
    assert "[1.5, 2.5, 3.5]" in texts
    assert "f32[300,1]" in texts


def test_numbers_and_the_order_of_operands_are_in_the_node():
    picture = graph(lambda x, y: 2.5 * x - y, 1.0, 1.0)
    assert "mul(2.5, ·)" in labels(picture)
    assert re.search(r'ordering="in", label="sub"', picture.dot)


def test_programs_inside_of_programs_are_boxes():
    def fn(x):
        def body(carry, row):
            return jnp.tanh(carry + row), carry.sum()

        carry, sums = lax.scan(body, x[0], x)
        carry = lax.cond(sums[0] > 0, jnp.sin, lambda c: c * 2 + 1, carry)
        carry = lax.fori_loop(0, sums.astype(int)[0], lambda _, c: c * 1.5, carry)
        return jax.checkpoint(lambda z: jnp.exp(jnp.cos(z)))(carry).sum()

    picture = graph(fn, jnp.ones((3, 4)))
    assert {"scan × 3", "while", "cond", "true", "false", "goes on?"} <= set(
        labels(picture)
    )
    assert any(text.startswith("remat") for text in labels(picture))
    assert {("slice 0", "add"), ("carry 0", "add"), ("tanh", "carry 0")} <= edges(
        picture
    )
    dashed = [line for line in picture.dot.splitlines() if "constraint" in line]
    assert len(dashed) == 3  # the scan's carry, the loop's and its counter


@jax.custom_jvp
def steep(x):
    return jnp.exp(x) * 2


steep.defjvp(lambda primals, tangents: (steep(*primals), tangents[0] * 5))


def test_custom_rules_are_boxes_with_their_kind_and_their_source():
    picture = graph(lambda x: (right_square(x) + steep(x)).sum(), jnp.ones(3))
    assert {"custom_vjp right_square", "custom_jvp steep"} <= set(labels(picture))
    assert "test_graphs.py:" in picture.dot
    assert re.search(r"bwd at .*test_graphs\.py:\d+", picture.dot)


def test_a_kernel_is_a_box_around_its_program():
    from jax.experimental import pallas as pl

    def kernel(x_ref, out_ref):
        out_ref[...] = jnp.sin(x_ref[...]) * 2

    def fn(x):
        block = pl.BlockSpec((4, 4), lambda i: (i, 0))
        call = pl.pallas_call(
            kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(2,),
            in_specs=[block], out_specs=block, interpret=True, name="double_sine",
        )  # fmt: skip
        return call(x).sum()

    picture = graph(fn, jnp.ones((8, 4)))
    assert "pallas_call double_sine, grid 2" in labels(picture)
    assert {("block", "sin"), ("sin", "mul(·, 2)")} <= edges(picture)


@pytest.mark.devices
@pytest.mark.parametrize("of", SUBJECTS)
def test_a_device_region_is_drawn(of):
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
    spec = jax.sharding.PartitionSpec("data")

    def fn(x):
        return jax.shard_map(jnp.sin, mesh=mesh, in_specs=spec, out_specs=spec)(x).sum()

    picture = graph(fn, jnp.ones(8), of=of)
    assert {"sin", "sine"} & {text.split("\n")[0] for text in labels(picture)} or (
        of == "optimized_hlo"
    )
    if of == "jaxpr":
        assert "shard_map over data=8" in labels(picture)


# --- gradients ----------------------------------------------------------------------


def test_a_gradient_has_a_forward_and_a_backward_pass():
    picture = graph(lambda x: jnp.sum(jnp.sin(x) ** 2), VECTOR, of="gradient")
    texts = labels(picture)
    assert {"forward pass", "backward pass", "gradient of x\nf32[3]"} <= set(texts)
    assert ("cotangent of value", "broadcast_in_dim") in edges(picture)
    _, backward = picture.dot.split('label="backward pass"')
    assert 'label="mul' in backward
    assert 'label="sin"' not in backward


def test_a_function_of_many_results_has_a_cotangent_for_each():
    picture = graph(lambda x: (jnp.sin(x), {"b": x * 2}), VECTOR, of="gradient")
    firsts = {text.split("\n")[0] for text in labels(picture)}
    assert {"cotangent of value[0]", "cotangent of value[1]['b']"} <= firsts


def test_a_program_that_differentiates_has_its_scopes_twice():
    def loss(x):
        with jax.named_scope("layer"):
            return jnp.sum(jnp.sin(x) * jnp.cos(x))

    texts = labels(graph(jax.value_and_grad(loss), VECTOR))
    assert {"layer", "layer, backward"} <= set(texts)


def test_argnums_and_aux_choose_what_is_differentiated():
    def fn(x, y):
        return jnp.sum(x * y), {"aux": x}

    picture = graph(fn, VECTOR, VECTOR, of="gradient", argnums=1, has_aux=True)
    firsts = {text.split("\n")[0] for text in labels(picture)}
    assert "gradient of y" in firsts
    assert "gradient of x" not in firsts
    assert not any("aux" in text for text in firsts)


# --- HLO ----------------------------------------------------------------------------


def test_hlo_is_drawn_with_the_users_names():
    for of in ("hlo", "optimized_hlo"):
        picture = graph(homework.task1, VECTOR, VECTOR, of=of)
        assert {
            ("x", "sine"),
            ("sine", "subtract"),
            ("exponential", "result"),
        } <= edges(picture)


def test_arguments_keep_their_names_in_hlo_beside_large_constants_and_unused_ones():
    large = jnp.arange(5000.0)
    for of in ("hlo", "optimized_hlo"):
        picture = graph(lambda a, b: jnp.dot(b, large), 1.0, jnp.ones(5000), of=of)
        names = {source for source, _ in edges(picture)}
        assert "b" in names
        assert "a" not in names


def test_hlo_of_loops_and_branches_is_drawn():
    def fn(x):
        x = lax.fori_loop(0, 7, lambda _, c: jnp.sin(c) * 1.5, x)
        return lax.cond(x.sum() > 0, jnp.cos, jnp.tanh, x)

    picture = graph(fn, jnp.ones(3), of="hlo", fold=None)
    assert {"while", "goes on?", "conditional"} <= set(labels(picture))
    assert {("cosine", "conditional"), ("tanh", "conditional")} <= edges(picture)


HLO = """\
HloModule jit_f, entry_computation_layout={(f32[2]{0})->(f32[2]{0}, s32[])}

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

ENTRY %main (x: f32[2]) -> (f32[2], s32[]) {
  %x = f32[2]{0:T(256)} parameter(0), metadata={op_name="x[\\"a, b)\\"]"}
  %c = f32[2,2]{1,0} constant({ { 1, 2 },
    { 3, 4 } })
  %r = f32[] reduce(%x, f32[] constant(0)), dimensions={0}, to_apply=%add.1
  %call = (f32[2]{0}, /*index=1*/s32[]) custom-call(%x, %c), \
custom_call_target="with \\"quotes\\", and {brackets(", backend_config={"a":"}"}
  ROOT %t = (f32[2]{0}, s32[]) tuple(%x, %r)
}
"""


def test_the_text_of_hlo_is_read_with_quotes_tuples_layouts_and_long_constants():
    module = read_module(HLO)
    entry = {each.name: each for each in module.computations[module.entry]}
    assert list(entry) == ["x", "c", "r", "call", "t"]
    assert entry["x"].shape == "f32[2]"
    assert entry["x"].scope == 'x["a, b)"]'
    assert entry["r"].called("to_apply") == ["add.1"]
    assert entry["call"].operands == ("x", "c")
    assert entry["call"].shape.replace(" ", "") == "(f32[2],s32[])"
    assert entry["t"].is_root
    summed = module.computations["add.1"][-1]
    assert summed.operands == ("a", "b")


def test_text_that_is_no_hlo_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        read_module("module @jit_f {\n}\n")
