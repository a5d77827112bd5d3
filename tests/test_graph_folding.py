"""Graphs: large ones are folded, and what a report found wrong is seen."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

import gradtest
from gradtest import graph
from tests.drawn_graphs import SUBJECTS, labels, right_square, transformer


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
