"""Graphs as files and in notebooks: any name stays text, slips are named."""

import os
import re
import shutil
import xml.dom.minidom
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from examples import homework
from gradtest import GraphvizError, graph
from tests.drawn_graphs import SUBJECTS, VECTOR, transformer

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
HOSTILE = '"]; x [label="<script>alert(1)</script>\\N\\" &lt; \x00 \u202e]'
needs_dot = pytest.mark.skipif(
    shutil.which("dot") is None, reason="Graphviz's dot is not installed"
)


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
