"""Checks the hand-written gradients of a homework on automatic differentiation.

The tasks are those of a notebook that compared each gradient with `jax.grad` by a
fixed tolerance. There every trial had the same point, and what differed was either
wrong (task 4) or right but approximate (task 2), which the comparison could not tell.
Here each gradient is tried at five different points, and each row says what it is.

Run with `python examples/homework.py`. It exits with 0 where every verdict is the
expected one. The graph of task 1, which the notebook drew, is written to the file that
is named after the command, such as `task1.svg`, or to the folder of temporary files.
"""

import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import numpy as np
from rich.console import Console
from rich.table import Table

import gradtest
from gradtest import Verdict, domains

TRIALS = 5
# Below this the table's last column would be a word wide.
NARROWEST = 120


# Task 1: exp(-(sin x - cos y)^2) of two vectors. The notebook drew its graph and wrote
# no gradient; this one follows from the chain rule.


def task1(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.exp(-((jnp.sin(x) - jnp.cos(y)) ** 2))


def task1_summed(x: jax.Array, y: jax.Array) -> jax.Array:
    # A gradient is of one number; summed, entry i of the gradient is that of entry i.
    return jnp.sum(task1(x, y))


def task1_gradient(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    outer = -2 * (jnp.sin(x) - jnp.cos(y)) * task1(x, y)
    return outer * jnp.cos(x), outer * jnp.sin(y)


# Task 2: tr exp(A).


def task2(A: jax.Array) -> jax.Array:
    return jnp.trace(jsp.linalg.expm(A))


def task2_gradient(A: jax.Array) -> jax.Array:
    return jsp.linalg.expm(A.T)


# Task 3 is empty in the notebook.

# Task 4: -log det X. The notebook lost the minus sign.


def task4(X: jax.Array) -> jax.Array:
    return -jnp.log(jnp.linalg.det(X))


def task4_gradient_of_the_notebook(X: jax.Array) -> jax.Array:
    return jnp.linalg.inv(X).T


def task4_gradient(X: jax.Array) -> jax.Array:
    return -jnp.linalg.inv(X).T


# Task 5: (x.x)^2.


def task5(x: jax.Array) -> jax.Array:
    return (x.T @ x) * (x.T @ x)


def task5_gradient(x: jax.Array) -> jax.Array:
    return 4 * (x.T @ x) * x


@dataclasses.dataclass(frozen=True)
class Exercise:
    """One gradient, where it is tried, and what is expected to come out."""

    task: str
    formula: str
    gradient: str
    fn: Callable[..., jax.Array]
    grad_fn: Callable[..., jax.Array | tuple[jax.Array, ...]]
    points: tuple[domains.Domain, ...]
    expected: Verdict
    argnums: int | tuple[int, ...] = 0


VECTOR = domains.uniform(1337, -np.pi, np.pi)
MATRIX = domains.uniform((20, 20))
POSITIVE_DET = domains.invertible((10, 10), det="positive")
NEGATIVE_DET = domains.invertible((10, 10), det="negative")
SMALL_VECTOR = domains.uniform(100)

EXERCISES = (
    Exercise("1", "Σ exp(-(sin x\n - cos y)²)", "chain rule",
             task1_summed, task1_gradient, (VECTOR, VECTOR), Verdict.PASS, (0, 1)),
    Exercise("2", "tr exp(A)", "exp(Aᵀ)",
             task2, task2_gradient, (MATRIX,), Verdict.PASS),
    Exercise("4", "-log det X,\ndet X > 0", "X⁻ᵀ (notebook)",
             task4, task4_gradient_of_the_notebook, (POSITIVE_DET,), Verdict.FAIL),
    Exercise("4", "-log det X,\ndet X > 0", "-X⁻ᵀ",
             task4, task4_gradient, (POSITIVE_DET,), Verdict.PASS),
    Exercise("4", "-log det X,\ndet X < 0", "-X⁻ᵀ",
             task4, task4_gradient, (NEGATIVE_DET,), Verdict.INCONCLUSIVE),
    Exercise("5", "(x·x)²", "4 (x·x) x",
             task5, task5_gradient, (SMALL_VECTOR,), Verdict.PASS),
)  # fmt: skip


def judge(exercise: Exercise) -> gradtest.Report:
    """Checks one gradient; the report of a failed assertion comes with its error."""
    try:
        return gradtest.assert_grad_matches(
            exercise.fn,
            exercise.grad_fn,
            *exercise.points,
            argnums=exercise.argnums,
            trials=TRIALS,
        )
    except (gradtest.GradientMismatch, gradtest.GradientInconclusive) as error:
        return error.report


def gravest(report: gradtest.Report) -> gradtest.Finding:
    """The finding to show: that of the leaf with the gravest verdict."""
    return max(report.findings, key=lambda found: (found.verdict.severity, found.size))


def explanation(report: gradtest.Report, finding: gradtest.Finding) -> str:
    """What gradtest says beyond the numbers."""
    if finding.cause is not None:
        return f"{finding.cause.says}. Try: {finding.cause.remedy}."
    if finding.approximation is not None:
        found = finding.approximation
        return (
            f"Right, but {finding.dtype} takes a short series: off by "
            f"{found.lifted:.1e}; traced in float64, by {found.retraced:.1e}."
        )
    return f"An error above {report.smallest_seen:.0e} would have been seen."


def row(exercise: Exercise, report: gradtest.Report) -> tuple[str, ...]:
    """The cells of one line of the table."""
    finding = gravest(report)
    judged = report.verdict is not Verdict.INCONCLUSIVE
    style = {Verdict.PASS: "green", Verdict.FAIL: "red"}.get(report.verdict, "yellow")
    return (
        exercise.task,
        exercise.formula,
        exercise.gradient,
        f"[{style}]{report.verdict.value}[/]",
        exercise.expected.value,
        f"{finding.size:.1e}" if judged else "none",
        f"{finding.rounding[0]:.1e}" if judged and finding.rounding else "none",
        explanation(report, finding),
    )


def draw_task1(file: Path) -> str:
    """Draws the graph of task 1; returns what to say of it."""
    picture = gradtest.graph(task1, VECTOR, VECTOR, title="exp(-(sin x - cos y)²)")
    try:
        return f"The graph of task 1 is in {picture.save(file)}."
    except gradtest.GraphvizError as error:  # the graph is written, not drawn
        return str(error)


def main(exercises: Sequence[Exercise] = EXERCISES, file: Path | None = None) -> int:
    """Prints the table and draws task 1 into a file; returns the exit status."""
    table = Table(title=f"Homework gradients, each at {TRIALS} points", show_lines=True)
    for heading in ("task", "function", "gradient"):
        table.add_column(heading)
    for heading in ("verdict", "expected"):
        table.add_column(heading, no_wrap=True)
    for heading in ("formula gap", "rounding gap"):
        table.add_column(heading, justify="right", max_width=8)
    table.add_column("what gradtest says")
    reports = [judge(exercise) for exercise in exercises]
    for exercise, report in zip(exercises, reports, strict=True):
        table.add_row(*row(exercise, report))

    console = Console(highlight=False)
    console.width = max(console.width, NARROWEST)
    console.print(table)
    console.print("Task 3 is empty in the notebook, and left out.")
    file = file or Path(tempfile.gettempdir(), "homework_task1.svg")
    console.print(draw_task1(file), markup=False, soft_wrap=True)
    surprises = [
        f"task {exercise.task}: {report.verdict.value}, not {exercise.expected.value}"
        for exercise, report in zip(exercises, reports, strict=True)
        if report.verdict is not exercise.expected
    ]
    console.print("\n".join(surprises) or "Every verdict is the expected one.")
    return 1 if surprises else 0


if __name__ == "__main__":
    sys.exit(main(file=Path(sys.argv[1]) if sys.argv[1:] else None))
