"""Pictures of a report: what they show, and that they leave matplotlib alone."""

import builtins
import dataclasses
import io
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradtest
from gradtest._src.findings import Exhibit, Finding, Gap, Ladder, Report, Rule, Verdict
from gradtest._src.report import drawing, plots

matplotlib = pytest.importorskip("matplotlib", reason="pictures need matplotlib")
figure_module = pytest.importorskip("matplotlib.figure")

STEPS = 10.0 ** -np.arange(1, 10)
LADDER = Ladder(STEPS, 3 + STEPS**2, 1e-16 / STEPS, 4.0, 3.0, STEPS, STEPS**2 + 1e-18)
OPEN = dataclasses.replace(LADDER, true=np.nan, true_remainders=np.nan * STEPS)
HOSTILE = [
    "$x_{2}^$",
    "<script>alert(1)</script>",
    "two\nlines",
    "\x00\x1b[31m",
    "中文 \U0001f600 \ud800",
    "%s {0} \\frac",
    "_hidden",
    "x" * 5000,
    "",
]


def normal(*shape):
    return np.random.default_rng(0).normal(size=shape)


def exhibit(claimed, true=None, name="w", **fields):
    return Exhibit(name, np.asarray(claimed), true, **fields)


def finding(name="w", verdict=Verdict.FAIL, size=0.5, allowed=2e-6, **fields):
    return Finding(name, (3,), "float32", verdict, size=size, allowed=allowed, **fields)


def report(*exhibits, findings=None, verdict=Verdict.FAIL):
    findings = (finding(),) if findings is None else tuple(findings)
    return Report("assert_grad_matches", "loss", verdict, findings, exhibits=exhibits)


def drawn(figure):
    """Draws a figure with every warning an error; returns all of its texts."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO(), format="png", dpi=40)
    found = figure.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_visible()]


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


class TestTaylor:
    def test_both_remainders_and_both_guides_are_drawn(self):
        figure = plots.plot(
            report(exhibit(normal(3), normal(3), ladder=LADDER)), "taylor"
        )
        (axes,) = figure.axes
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        found = lines(axes)
        np.testing.assert_array_equal(found["claimed slope"].get_ydata(), STEPS)
        np.testing.assert_array_equal(
            found["true slope"].get_ydata(), LADDER.true_remainders
        )
        for label, power in (
            ("∝ h, as of a wrong slope", 1),
            ("∝ h², as of the right one", 2),
        ):
            guide = found[label].get_ydata()
            np.testing.assert_allclose(guide[0] / guide[3], 10.0 ** (3 * power))
        assert "|f(x + hv) − f(x) − h · slope|" in drawn(figure)

    def test_an_unknown_truth_is_not_drawn(self):
        figure = plots.plot(report(exhibit(normal(3), ladder=OPEN)), "taylor")
        assert "true slope" not in lines(figure.axes[0])
        assert drawn(figure)

    def test_a_measured_truth_is_said_to_be_measured(self):
        measured = dataclasses.replace(LADDER, measured=True)
        shown = report(exhibit(normal(3), ladder=measured))
        assert "true slope, as measured" in lines(plots.plot(shown, "taylor").axes[0])
        texts = drawn(plots.plot(shown, "steps"))
        assert any("claimed 4, measured 3" in text for text in texts)

    def test_remainders_of_zero_have_no_place_on_the_axis(self):
        zeros = 0 * STEPS
        ladder = Ladder(STEPS, 3 + zeros, zeros, 3.0, 3.0, zeros, zeros)
        for kind in ("taylor", "steps"):
            texts = drawn(plots.plot(report(exhibit(normal(3), ladder=ladder)), kind))
            assert "nothing but zeros" in texts


class TestSteps:
    def test_the_v_the_noise_and_the_claim_are_drawn(self):
        figure = plots.plot(report(exhibit(normal(3), ladder=LADDER)), "steps")
        found = lines(figure.axes[0])
        off = found["differences − true slope"]
        np.testing.assert_allclose(
            off.get_ydata(), np.abs(LADDER.slopes - 3.0)[: len(off.get_ydata())]
        )
        assert list(found["claimed − true slope"].get_ydata()) == [1.0, 1.0]
        assert [c.get_label() for c in figure.axes[0].collections] == ["rounding noise"]

    def test_without_a_truth_the_differences_stand_beside_the_claim(self):
        figure = plots.plot(report(exhibit(normal(3), ladder=OPEN)), "steps")
        assert set(lines(figure.axes[0])) == {"differences − claimed slope"}


class TestError:
    def test_a_matrix_is_a_map_of_its_errors(self):
        true = normal(6, 8)
        claimed = true.copy()
        claimed[2:4] *= 1.5
        figure = plots.plot(report(exhibit(claimed, true)), "error")
        (image,) = figure.axes[0].get_images()
        shown = np.asarray(image.get_array())
        assert shown.shape == (6, 8)
        np.testing.assert_allclose(shown[2:4], np.abs(claimed - true)[2:4])
        assert image.norm.vmin == shown.min()
        assert {"index of axis 0", "index of axis 1", "|claimed − true|"} <= set(
            drawn(figure)
        )

    def test_higher_ranks_are_folded_and_the_axes_named(self):
        true = normal(3, 3, 16, 32)
        figure = plots.plot(report(exhibit(true * 1.1, true)), "error")
        assert {
            "axes 0, 1, 2 folded (3 × 3 × 16, the last fastest)",
            "index of axis 3",
        } <= set(drawn(figure))

    def test_one_wrong_entry_of_a_million_is_seen(self):
        true = np.ones((1000, 1000))
        claimed = true.copy()
        claimed[777, 3] = 2.0
        figure = plots.plot(report(exhibit(claimed, true)), "error")
        axes = figure.axes[0]
        shown = np.asarray(axes.get_images()[0].get_array())
        assert max(shown.shape) <= 128
        row, column = np.unravel_index(np.argmax(shown), shown.shape)
        assert (row, column) == (777 // 8, 0)
        ring = axes.get_lines()[0]
        assert abs(ring.get_ydata()[0] - 777) <= 8
        assert any("the largest of each 8 × 8 entries" in t for t in drawn(figure))

    def test_a_part_is_drawn_at_its_place_and_said_to_be_one(self):
        part = exhibit(normal(4, 5), normal(4, 5) + 1, start=(90, 20), whole=(100, 200))
        figure = plots.plot(report(part), "error")
        assert figure.axes[0].get_images()[0].get_extent() == [19.5, 24.5, 93.5, 89.5]
        assert any("the part [90:94, 20:25] of [100, 200]" in t for t in drawn(figure))

    def test_nan_and_infinity_are_marked_and_counted(self):
        claimed = normal(6, 8)
        claimed[1, 2], claimed[5, 7] = np.nan, np.inf
        figure = plots.plot(report(exhibit(claimed, normal(6, 8))), "error")
        (crosses,) = figure.axes[0].get_lines()
        np.testing.assert_array_equal(crosses.get_xydata(), [(2, 1), (7, 5)])
        assert any("× marks NaN or inf (2 of 48 entries)" in t for t in drawn(figure))

    def test_in_a_row_they_are_marked_too(self):
        for size in (10, 5000):
            claimed = normal(size)
            claimed[7] = np.nan
            figure = plots.plot(report(exhibit(claimed, normal(size))), "error")
            crosses = figure.axes[0].get_lines()[-1]
            assert list(crosses.get_xdata()) == [7]
            assert any(f"(1 of {size} entries)" in t for t in drawn(figure))

    def test_a_vector_has_a_bar_for_each_entry_with_its_sign(self):
        true = normal(5)
        figure = plots.plot(report(exhibit(true - [0, 1, -2, 0, 0], true)), "error")
        heights = [bar.get_height() for bar in figure.axes[0].patches]
        np.testing.assert_allclose(heights, [0, -1, 2, 0, 0], atol=1e-12)

    def test_complex_vectors_show_both_parts(self):
        true = normal(4) + 1j * normal(4)
        figure = plots.plot(report(exhibit(np.conj(true), true)), "error")
        heights = [bar.get_height() for bar in figure.axes[0].patches]
        np.testing.assert_allclose(heights, [*[0] * 4, *(-2 * true.imag)], atol=1e-12)
        assert {"real part", "imaginary part"} <= set(drawn(figure))

    def test_a_scalar_is_shown_beside_the_truth(self):
        texts = drawn(plots.plot(report(exhibit(5.0, np.array(2.5))), "error"))
        assert {"claimed\n5", "true\n2.5"} <= set(texts)

    def test_without_a_truth_the_claim_is_drawn_and_that_is_said(self):
        figure = plots.plot(report(exhibit([1.0, np.nan])), "error")
        assert any(
            t.startswith("Claimed; the true one is not known") for t in drawn(figure)
        )

    @pytest.mark.parametrize(
        "claimed",
        [
            np.full((4, 4), np.nan),
            np.zeros((4, 4)),
            np.full((4, 4), 1e308),
            np.full(300, np.inf),
            np.zeros(300),
            np.array(np.nan),
            np.array([[1e-320, 1.0]] * 2),
            np.array([[complex(np.nan, np.inf)] * 2] * 2),
            np.ones((1, 1, 1)),
            np.ones((1, 5, 1)),
            np.ones((2, 70_000)),
        ],
        ids=lambda a: f"{a.flat[0]}{a.shape}",
    )
    def test_odd_arrays_draw_without_a_warning(self, claimed):
        for true in (np.zeros(claimed.shape), claimed, -claimed, None):
            shown = report(exhibit(claimed, true))
            assert drawn(plots.plot(shown, "error"))
            if true is not None:
                assert drawn(plots.plot(shown, "scatter"))


class TestScatter:
    def test_entries_lie_against_each_other_and_the_diagonal_is_there(self):
        true = normal(4, 5)
        figure = plots.plot(report(exhibit(2 * true, true)), "scatter")
        found = lines(figure.axes[0])
        np.testing.assert_array_equal(found["entries"].get_xdata(), true.ravel())
        np.testing.assert_array_equal(found["entries"].get_ydata(), 2 * true.ravel())
        assert "claimed = true" in found
        assert figure.axes[0].get_xlim() == figure.axes[0].get_ylim()

    def test_complex_parts_have_marks_of_their_own(self):
        true = normal(5) + 1j * normal(5)
        found = lines(plots.plot(report(exhibit(true, true)), "scatter").axes[0])
        assert found["real parts"].get_marker() != found["imaginary parts"].get_marker()

    def test_of_many_entries_the_worst_is_drawn(self):
        true = normal(300, 300)
        claimed = true.copy()
        claimed[123, 45] += 7
        figure = plots.plot(report(exhibit(claimed, true)), "scatter")
        points = lines(figure.axes[0])["entries"].get_xydata()
        assert len(points) <= 20_000
        assert [true[123, 45], claimed[123, 45]] in points.tolist()
        assert any(f"{len(points)} of 90000 entries" in t for t in drawn(figure))


class TestGaps:
    def test_each_leaf_has_a_bar_and_its_allowance(self):
        found = [finding("a", size=0.5), finding("b", Verdict.PASS, size=1e-9)]
        figure = plots.plot(report(findings=found), "gaps")
        axes = figure.axes[0]
        ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
        np.testing.assert_allclose(ends, [0.5, 1e-9], rtol=1e-6)
        assert [line.get_xdata()[0] for line in axes.get_lines()] == [2e-6, 2e-6]
        assert axes.get_xscale() == "log"
        assert {"a", "b", "FAIL", "PASS", "allowed", "5.0e-01"} <= set(drawn(figure))

    def test_of_many_leaves_the_worst_are_drawn_and_the_rest_summed_up(self):
        found = [
            finding(f"leaf{i}", Verdict.PASS, size=1e-9 * (i + 1))
            for i in range(10_000)
        ]
        found[5000] = finding("wrong")
        texts = drawn(plots.plot(report(findings=found), "gaps"))
        assert {"wrong", "leaf9999", "the worst of 9970 more"} <= set(texts)
        assert "leaf0" not in texts

    def test_infinite_and_missing_numbers_are_told(self):
        found = [
            finding("inf", size=np.inf),
            finding("nan", size=np.nan),
            finding("open", Verdict.INCONCLUSIVE, size=0.0, allowed=0.0),
            finding("exact", Verdict.PASS, size=0.0),
        ]
        texts = drawn(plots.plot(report(findings=found), "gaps"))
        assert {"infinite", "NaN", "INCONCLUSIVE", "0"} <= set(texts)

    def test_mode_order_gap_and_rule_are_named(self):
        rule = Rule("mul", "custom_vjp")
        found = [
            finding("a", mode="fwd", order=2),
            finding("b", gap=Gap.ROUNDING, rule=rule),
        ]
        texts = drawn(plots.plot(report(findings=found), "gaps"))
        assert {"a, fwd, order 2", "b, rounding, mul"} <= set(texts)

    def test_they_work_for_a_report_read_back_from_json(self):
        again = Report.from_json(report(exhibit(normal(3), normal(3))).to_json())
        assert "w" in drawn(plots.plot(again, "gaps"))
        assert "w" in drawn(plots.plot(again))

    @pytest.mark.parametrize("size", [1e-300, 1e300, 5e-324])
    def test_extreme_numbers_draw_without_a_warning(self, size):
        found = [finding(size=size), finding("b", size=1e-3)]
        assert drawn(plots.plot(report(findings=found), "gaps"))


class TestNames:
    @pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
    def test_a_hostile_name_stays_text_everywhere(self, name):
        rule = Rule(name, "custom_vjp")
        shown = exhibit(
            normal(3, 4), normal(3, 4), name, ladder=LADDER, of=name, rule=rule
        )
        found = dataclasses.replace(
            report(shown, findings=[finding(name, rule=rule)]), subject=name
        )
        figure = plots.plot(found)
        texts = figure.findobj(matplotlib.text.Text)
        assert not any(
            text.get_parse_math() for text in texts if name and name in text.get_text()
        )
        assert drawn(figure)

    def test_names_are_in_the_titles_of_single_pictures_too(self):
        found = report(exhibit(normal(3, 4), normal(3, 4), "$a_$", ladder=LADDER))
        for kind in ("taylor", "steps", "error", "scatter"):
            texts = drawn(plots.plot(found, kind))
            assert any(text.endswith("\n$a_$") for text in texts)

    def test_dollars_are_printed(self):
        found = report(findings=[finding("$x^2$")])
        assert "$x^2$" in drawn(plots.plot(found, "gaps"))

    def test_what_cannot_be_printed_is_escaped(self):
        assert drawing.printable("a\nb\x00") == "a\\nb\\x00"
        assert drawing.printable("\ud800") == "\\ud800"
        assert drawing.printable("αβ") == "αβ"

    def test_a_long_name_keeps_both_ends(self):
        shown = drawing.printable("begin" + "x" * 500 + "end", 21)
        assert len(shown) == 21
        assert shown.startswith("begin")
        assert shown.endswith("end")

    def test_tex_is_never_asked_for_names(self):
        with matplotlib.rc_context({"text.usetex": True}):
            figure = plots.plot(report(findings=[finding("a_b")]), "gaps")
        labels = figure.axes[0].get_yticklabels()
        assert [label.get_usetex() for label in labels] == [False]


class TestPlot:
    def test_all_that_applies_is_in_one_figure(self):
        full = exhibit(normal(3, 4), normal(3, 4), ladder=LADDER)
        figure = plots.plot(report(full))
        titles = [axes.get_title(loc="left") for axes in figure.axes]
        starts = ["Error", "Claimed against true", "Taylor remainder", "Differences"]
        for start in [*starts, "Gap of each leaf"]:
            assert any(title.startswith(start) for title in titles)
        assert any(
            t.startswith("assert_grad_matches(loss): FAIL") for t in drawn(figure)
        )

    def test_it_draws_into_axes_that_are_given(self):
        figure = figure_module.Figure()
        axes = figure.subplots(1, 2)
        shown = report(exhibit(normal(3), normal(3)))
        assert plots.plot(shown, "scatter", ax=axes[1]) is figure
        assert axes[1].get_xlabel() == "true derivative"
        assert not axes[0].has_data()

    def test_the_leaf_that_is_named_is_drawn(self):
        shown = report(
            exhibit(normal(3), normal(3), "a"), exhibit(normal(4), normal(4), "b")
        )
        texts = drawn(plots.plot(shown, "scatter", leaf="b"))
        assert any(text.endswith("\nb") for text in texts)

    def test_without_a_name_the_gravest_that_has_what_is_needed_is_drawn(self):
        shown = report(exhibit([np.nan], None, "a"), exhibit(normal(4), normal(4), "b"))
        texts = drawn(plots.plot(shown, "scatter"))
        assert any(text.endswith("\nb") for text in texts)

    def test_pyplot_is_left_alone(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
        before = matplotlib.rcParams.copy()
        shown = report(exhibit(normal(3, 4), normal(3, 4), ladder=LADDER))
        assert drawn(plots.plot(shown))
        assert len(plots.figures(shown)) == 2
        assert matplotlib.rcParams.copy() == before

    def test_a_report_draws_itself(self):
        rule = jax.custom_vjp(jnp.sin)
        rule.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (2 * jnp.cos(x) * g,))
        with pytest.raises(gradtest.GradientMismatch) as caught:
            gradtest.assert_autodiff_matches(rule, np.float32([0.3, -1.2]))
        figure = caught.value.report.plot("taylor")
        assert "claimed slope" in lines(figure.axes[0])

    def test_figures_are_told_by_caption(self):
        exhibits = [exhibit(normal(3), normal(3), f"leaf{i}") for i in range(8)]
        found = plots.figures(report(*exhibits))
        assert list(found) == ["gaps of all leaves", *(f"leaf{i}" for i in range(4))]
        assert plots.figures(report(findings=())) == {}


class TestWrongUses:
    def test_an_unknown_kind_is_told_which_there_are(self):
        with pytest.raises(ValueError, match=r"one of 'taylor', 'steps', .*'pie'"):
            plots.plot(report(), "pie")

    def test_an_unknown_leaf_is_told_which_there_are(self):
        shown = report(exhibit(normal(3), normal(3)))
        for kind in (None, "error", "gaps"):
            with pytest.raises(ValueError, match=r"'v' is none .* there are 'w'"):
                plots.plot(shown, kind, leaf="v")

    def test_a_report_from_json_says_that_it_has_no_arrays(self):
        again = Report.from_json(report(exhibit(normal(3), normal(3))).to_json())
        for kind in ("taylor", "steps", "error", "scatter"):
            with pytest.raises(ValueError, match=r"read back from JSON.*gaps"):
                plots.plot(again, kind)

    def test_a_pass_says_that_only_failures_keep_arrays(self):
        passed = report(verdict=Verdict.PASS)
        with pytest.raises(ValueError, match="its verdict is PASS"):
            plots.plot(passed, "error")

    def test_what_a_leaf_lacks_is_said(self):
        shown = report(
            exhibit(normal(3), None, "a"), exhibit(normal(3), normal(3), "b")
        )
        with pytest.raises(ValueError, match="'a' does not have that; there are 'b'"):
            plots.plot(shown, "scatter", leaf="a")
        with pytest.raises(ValueError, match="no leaf has that"):
            plots.plot(shown, "taylor")

    def test_a_report_without_findings_has_nothing_to_draw(self):
        with pytest.raises(ValueError, match="no findings"):
            plots.plot(report(findings=()))

    def test_axes_hold_one_kind(self):
        axes = figure_module.Figure().add_subplot()
        with pytest.raises(ValueError, match="name its `kind`"):
            plots.plot(report(), ax=axes)
        with pytest.raises(TypeError, match="must be matplotlib Axes, got str"):
            plots.plot(report(), "gaps", ax="here")

    def test_something_else_than_a_report_is_refused(self):
        with pytest.raises(TypeError, match=r"must be a gradtest\.Report, got dict"):
            plots.plot({})

    def test_without_matplotlib_the_command_that_installs_it_is_told(self, monkeypatch):
        real = builtins.__import__

        def without(name, *args, **options):
            if name.partition(".")[0] == "matplotlib":
                raise ModuleNotFoundError(f"No module named {name!r}")
            return real(name, *args, **options)

        monkeypatch.setattr(builtins, "__import__", without)
        for call in (plots.plot, plots.figures):
            with pytest.raises(ImportError, match=r'pip install "gradtest\[plots\]"'):
                call(report())


def test_verdicts_keep_apart_in_greyscale():
    def lightness(colour):
        red, green, blue = matplotlib.colors.to_rgb(colour)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def apart(one, other):
        return abs(lightness(one) - lightness(other))

    assert apart(drawing.CLAIMED, drawing.TRUE) > 0.15
    verdicts = (Verdict.FAIL, Verdict.INCONCLUSIVE, Verdict.PASS)
    found = [finding(verdict.value, verdict) for verdict in verdicts]
    bars = plots.plot(report(findings=found), "gaps").axes[0].patches
    wrong, unclear, right = (bar.get_facecolor() for bar in bars)
    assert apart(wrong, right) > 0.15
    assert apart(wrong, unclear) > 0.15
