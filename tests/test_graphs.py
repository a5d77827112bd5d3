"""Graphs: what is drawn, that any name stays text, and that large ones are folded."""

import functools
import os
import re
import shutil
import xml.dom.minidom
from pathlib import Path
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import gradtest
from examples import homework
from gradtest import domains
from gradtest._src.graphs import GraphvizError, graph
from gradtest._src.graphs.hlo_text import read_module

SUBJECTS = ("jaxpr", "gradient", "hlo", "optimized_hlo")
PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
VECTOR = jax.ShapeDtypeStruct((3,), jnp.float32)
HOSTILE = '"]; x [label="<script>alert(1)</script>\\N\\" &lt; \x00 \u202e]'
needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="Graphviz's dot is not installed"
)


def labels(picture):
    """Returns the labels of nodes and boxes, as a reader sees them."""
    found = re.findall(r'\blabel="((?:[^"\\]|\\.)*)"', picture.dot)
    return [text.replace("\\n", "\n") for text in found]


def edges(picture):
    """Returns the first lines of the labels that each edge joins."""
    names = {}
    for name, text in re.findall(
        r'^ *(n\d+) \[.*?\blabel="([^"]*)"', picture.dot, re.M
    ):
        names[name] = text.split("\\n")[0]
    joined = re.findall(r"^ *(n\d+) -> (n\d+)", picture.dot, re.M)
    return {(names[source], names[target]) for source, target in joined}


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


@jax.custom_vjp
def right_square(x):
    return x * jnp.sin(x)


right_square.defvjp(
    lambda x: (right_square(x), x),
    lambda x, g: (g * (jnp.sin(x) + x * jnp.cos(x)),),
)


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


# --- folding ------------------------------------------------------------------------


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
        return x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 8)(tokens)
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(11)(nn.LayerNorm()(x))


@functools.cache
def transformer():
    tokens = jnp.ones((2, 4), int)
    params = jax.eval_shape(Transformer().init, jax.random.key(0), tokens)
    return (
        lambda params, tokens: Transformer().apply(params, tokens).mean(),
        params,
        tokens,
    )


@pytest.mark.parametrize("of", SUBJECTS)
def test_a_transformer_is_folded_by_its_modules(of):
    picture = graph(*transformer(), of=of)
    assert picture.num_nodes <= 50
    folded = [text for text in labels(picture) if re.search(r"\n\d+ operations", text)]
    assert folded
    blocks = [text for text in labels(picture) if text.startswith("Block_")]
    names = {text.split("\n")[0] for text in blocks}
    assert {"Block_0", "Block_1"} <= names
    assert len({"\n" in text for text in blocks}) == 1  # both open, or none


def test_fold_says_how_much_is_seen():
    sizes = [graph(*transformer(), fold=fold).num_nodes for fold in (20, 100, None)]
    assert sizes[0] <= 20 < sizes[1] <= 100 < sizes[2]


def test_a_long_program_without_scopes_is_cut_into_runs():
    def fn(x):
        for _ in range(300):
            x = jnp.sin(x) * 1.5
        return x

    picture = graph(fn, 1.0)
    assert picture.num_nodes <= 50
    counts = [
        int(found.group(1))
        for text in labels(picture)
        if (found := re.search(r"\n(\d+) operations", text))
    ]
    assert sum(counts) == 600


@pytest.mark.parametrize("of", SUBJECTS)
def test_many_arguments_and_many_scopes_side_by_side_are_folded(of):
    def fn(*rows):
        results = []
        for number, row in enumerate(rows):
            with jax.named_scope(f"layer{number}"):
                results.append(jnp.sin(row) * jnp.cos(row) + row)
        return results

    rows = [jax.ShapeDtypeStruct((3,), jnp.float32)] * 80
    assert graph(fn, *rows, of=of).num_nodes <= 50
    assert graph(fn, *rows, of=of, fold=10).num_nodes <= 10


def test_trees_of_arguments_unfold_where_they_go_to_different_nodes():
    def fn(params, x):
        for name in params:
            with jax.named_scope(name):
                for row in params[name].values():
                    x = jnp.tanh(x + jnp.sin(row) * row)
        return x

    params = {f"layer{i}": {str(k): jnp.ones(3) for k in range(9)} for i in range(6)}
    texts = labels(graph(fn, params, jnp.ones(3), fold=30))
    assert all(f"params['layer{i}']\n9 arrays" in texts for i in range(6))


# --- what is wrong ------------------------------------------------------------------


@jax.custom_vjp
def doubled(x):
    return jnp.sin(x)


def _doubled_bwd(x, g):
    return (2 * g * jnp.cos(x),)


doubled.defvjp(lambda x: (jnp.sin(x), x), _doubled_bwd)


def _loss(x):
    return jnp.sum(right_square(doubled(x)))


@functools.cache
def audited():
    with pytest.raises(gradtest.GradientMismatch) as caught:
        gradtest.assert_custom_rules_match(_loss, jnp.linspace(0.1, 1.0, 4))
    return caught.value.report


def test_the_rule_found_wrong_is_coloured_and_the_right_one_is_not():
    texts = labels(graph(_loss, jnp.ones(4), report=audited()))
    assert "custom_vjp doubled\n✗ found wrong" in texts
    assert "custom_vjp right_square" in texts
    (legend,) = [text for text in texts if text.startswith("found wrong: ")]
    assert "custom_vjp doubled" in legend
    assert "right_square" not in legend
    assert "not in this graph" not in legend


def test_in_a_gradient_the_hand_written_backward_pass_is_coloured():
    picture = graph(_loss, jnp.ones(4), of="gradient", report=audited())
    wrong = [text for text in labels(picture) if text.endswith("✗ found wrong")]
    operations = {text.split("\n")[0].split("(")[0] for text in wrong}
    assert {"mul", "cos"} <= operations
    assert "add" not in operations  # that is the other rule's


def test_a_wrong_rule_is_unfolded():
    def deep(x):
        for level in range(40):
            with jax.named_scope(f"level{level}"):
                x = jnp.tanh(jnp.sin(x) + jnp.cos(x))
                x = doubled(x) if level == 20 else x
        return x.sum()

    texts = labels(graph(deep, jnp.ones(4), fold=10, report=audited()))
    assert "custom_vjp doubled\n✗ found wrong" in texts


def test_a_report_on_another_program_says_so():
    texts = labels(graph(jnp.sin, 1.0, report=audited()))
    assert any("(not in this graph)" in text for text in texts)
    assert not any("✗" in text for text in texts)


def test_a_report_without_a_failure_colours_nothing():
    report = gradtest.check(lambda x: right_square(x).sum(), jnp.ones(3))
    assert "found wrong" not in graph(_loss, jnp.ones(4), report=report).dot


# --- text, files, errors ------------------------------------------------------------


def hostile(params, key):
    with jax.named_scope(HOSTILE):
        return {HOSTILE: (params[HOSTILE] * 2).sum() + jax.random.normal(key)}


@needs_dot
@pytest.mark.parametrize("of", SUBJECTS)
def test_any_name_stays_text(of):
    args = {HOSTILE: jnp.ones(3)}, jax.random.key(0)
    picture = graph(hostile, *args, of=of, title=HOSTILE)
    drawn = picture._repr_svg_()
    document = xml.dom.minidom.parseString(drawn)
    assert not document.getElementsByTagName("script")
    shown = [node.firstChild.data for node in document.getElementsByTagName("text")]
    assert any('"]; x [label="<script>alert(1)</script>\\N\\" &lt;' in s for s in shown)
    assert "<script" not in picture._repr_html_()


def test_without_graphviz_a_notebook_shows_the_reason_and_the_text():
    picture = graph(hostile, {HOSTILE: jnp.ones(3)}, jax.random.key(0))
    with mock.patch.dict(os.environ, PATH=""):
        assert picture._repr_svg_() is None
        shown = picture._repr_html_()
    assert "apt-get install graphviz" in shown
    assert "digraph" in shown
    assert "<script" not in shown


@pytest.mark.core
def test_a_graph_is_written_without_any_other_program(tmp_path):
    picture = graph(jnp.sin, 1.0)
    with mock.patch.dict(os.environ, PATH=""):
        assert picture.save(tmp_path / "a.dot") == tmp_path / "a.dot"
        with pytest.raises(GraphvizError, match=r"brew install graphviz.*b\.dot"):
            picture.save(str(tmp_path / "b.svg"))
    assert (tmp_path / "a.dot").read_text(encoding="utf-8") == picture.dot
    assert (tmp_path / "b.dot").read_text(encoding="utf-8") == picture.dot
    assert not (tmp_path / "b.svg").exists()


@needs_dot
def test_graphviz_draws_each_kind_of_file(tmp_path):
    picture = graph(homework.task1, VECTOR, VECTOR)
    begins = {"a.svg": b"<?xml", "a.png": b"\x89PNG", "a.PDF": b"%PDF"}
    for name, begin in begins.items():
        file = picture.save(tmp_path / name)
        assert file.read_bytes().startswith(begin)


@needs_dot
def test_what_graphviz_says_is_passed_on():
    from gradtest._src.graphs import rendering

    with pytest.raises(GraphvizError, match="syntax error"):
        rendering.svg("digraph {")


@pytest.mark.parametrize("of", SUBJECTS)
def test_two_graphs_of_one_program_are_the_same_text(of):
    one, other = (graph(*transformer(), of=of) for _ in range(2))
    assert one.dot == other.dot


def test_it_is_short_in_words():
    assert str(graph(jnp.sin, 1.0)) == "graph of sin (jaxpr): 3 nodes"
    assert len(repr(graph(jnp.sin, 1.0, title="t" * 10_000))) < 120


SLIPS = {
    "not callable": (lambda: graph(3.0), TypeError, "`fn` must be callable, got float"),
    "of": (
        lambda: graph(jnp.sin, 1.0, of="xla"),
        ValueError,
        "`of` must be one of 'jaxpr', 'hlo', 'optimized_hlo', 'gradient', got 'xla'",
    ),
    "fold": (
        lambda: graph(jnp.sin, 1.0, fold=0),
        ValueError,
        "`fold` must be at least",
    ),
    "fold's type": (lambda: graph(jnp.sin, 1.0, fold="a"), TypeError, "`fold` must be"),
    "title": (lambda: graph(jnp.sin, 1.0, title=3), TypeError, "`title` must be"),
    "report": (
        lambda: graph(jnp.sin, 1.0, report="FAIL"),
        TypeError,
        "`report` must be a gradtest.Report or None, got str",
    ),
    "argnums": (
        lambda: graph(jnp.sin, 1.0, of="gradient", argnums=1),
        ValueError,
        "`argnums` names argument 1",
    ),
    "nothing moves": (
        lambda: graph(jnp.sin, 1, of="gradient"),
        TypeError,
        "`args` has no leaf to differentiate",
    ),
    "nothing comes out": (
        lambda: graph(jnp.argmax, VECTOR, of="gradient"),
        TypeError,
        "`fn` returns nothing to differentiate: .* got i32",
    ),
    "no pair": (
        lambda: graph(jnp.sin, 1.0, of="gradient", has_aux=True),
        TypeError,
        "`fn` must return a pair .* got one array",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named(slip):
    call, error, message = SLIPS[slip]
    with pytest.raises(error, match=message):
        call()


def test_a_suffix_that_is_unknown_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in one of \.dot.*a\.jpeg"):
        graph(jnp.sin, 1.0).save(tmp_path / "a.jpeg")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("of", SUBJECTS)
def test_the_smallest_programs_are_drawn(of):
    assert graph(lambda x: x, 1.0, of=of).num_nodes >= 2
    if of != "gradient":
        assert graph(lambda: jnp.float32(2.0), of=of).num_nodes >= 1


# --- the pictures of the documents --------------------------------------------------


def _lines(dot):
    """Returns every line of text that a picture shows."""
    texts = re.findall(r'(?<=\blabel=")[^"]*', dot)
    return {line.strip() for text in texts for line in text.split("\\n")}


def _without_places(text):
    return re.sub(r' tooltip="(?:[^"\\]|\\.)*"', "", text)


def test_the_kept_pictures_are_what_is_drawn_today(tmp_path):
    homework.draw_task1(tmp_path / "homework_task1.dot")
    gradient = graph(
        homework.task1_summed, homework.VECTOR, homework.VECTOR,
        of="gradient", title="Σ exp(-(sin x - cos y)²) and its gradient",
    )  # fmt: skip
    gradient.save(tmp_path / "homework_task1_gradient.dot")
    for name in ("homework_task1", "homework_task1_gradient"):
        kept = (PICTURES / f"{name}.dot").read_text(encoding="utf-8")
        drawn = (tmp_path / f"{name}.dot").read_text(encoding="utf-8")
        assert _without_places(kept) == _without_places(drawn)
        svg = xml.dom.minidom.parse(str(PICTURES / f"{name}.svg"))
        shown = svg.getElementsByTagName("text")
        assert {node.firstChild.data.strip() for node in shown} == _lines(kept)
