"""What the stages of a check hand on: frozen records, no numerics, no formatting."""

from __future__ import annotations

import dataclasses
import enum
import math
import os
from pathlib import Path
from typing import Any

from gradtest._src.evidence import Exhibit as Exhibit
from gradtest._src.evidence import Ladder as Ladder


class Verdict(enum.Enum):
    """The outcome of a check; `worst` orders them."""

    PASS = "PASS"
    NOT_CHECKED = "NOT CHECKED"
    INCONCLUSIVE = "INCONCLUSIVE"
    FAIL = "FAIL"

    @property
    def severity(self) -> int:
        """The place of the verdict from harmless to grave."""
        return list(Verdict).index(self)


def worst(verdicts: Any) -> Verdict:
    """Returns the gravest verdict; NOT_CHECKED where there is none."""
    return max(verdicts, key=lambda v: v.severity, default=Verdict.NOT_CHECKED)


# The check of a value that rests on a derivative which the function takes itself.
INNER = "value of a derivative inside"


class Gap(enum.Enum):
    """Which comparison a finding is about."""

    FORMULA = "formula"  # lifted claim against the truth
    VALUE = "value"  # the value that a rule's forward pass returns
    ROUNDING = "rounding"  # working precision against the lifted claim
    SOLVER = "solver"  # a linear solver's own residual
    CLOSE = "difference"  # two gradients, each as it came
    TREE = "tree"  # two gradients that are unlike trees
    FINITE = "finite"  # whether a gradient has NaN or inf
    FLOW = "flow"  # whether a leaf has a gradient at all
    SIZE = "size"  # a layer's gradient beside that of the other layers
    STATE = "state"  # what a call changes that it must hold
    AGREEMENT = "agreement"  # one rule run in two ways that must give the same
    STRUCTURE = "structure"  # what a rule returns is not of the form that it must be
    LINEAR = "linearity"  # the values of a function that must be linear
    REACH = "reach"  # what the check could not get at


@dataclasses.dataclass(frozen=True)
class Cause:
    """What is probably wrong, and what to do about it.

    Attributes:
      name: Stable name of the cause, such as "sign flipped".
      says: One clause with the evidence in numbers.
      remedy: One clause that says what to do next.
      likelihood: How far the numbers bear it out, from 0 to 1.
    """

    name: str
    says: str
    remedy: str
    likelihood: float = 1.0


@dataclasses.dataclass(frozen=True)
class Line:
    """The line of source at which a claimed derivative parts from the true one.

    Attributes:
      file: The path of the file.
      number: The line's number in it, from 1.
      function: The function that the line stands in.
      code: The line itself, without its indentation; empty where it can't be read.
      says: One clause with the evidence.
      likelihood: How far the numbers bear it out, from 0 to 1.
    """

    file: str
    number: int
    function: str = ""
    code: str = ""
    says: str = ""
    likelihood: float = 1.0


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry where claim and truth differ most; `true` may be unknown.

    It is an entry of the leaf that the finding names, or of the array named `of`.
    """

    index: tuple[int, ...]
    claimed: complex
    true: complex | None
    of: str = ""


@dataclasses.dataclass(frozen=True)
class Approximation:
    """The three gaps that show an approximate algorithm, not a mistake.

    Attributes:
      lifted: Relative gap of the program as traced in its working dtype.
      retraced: The same of the program traced anew with float64 inputs.
      literals: What rounding the program's half-precision constants can do.
      seen: The smallest relative error of the rule that would have been seen.
    """

    lifted: float
    seen: float
    retraced: float | None = None
    literals: float | None = None


@dataclasses.dataclass(frozen=True)
class Hazard:
    """What came of a claim at one special point of its arguments.

    Attributes:
      name: What is special there, as "x: all zero".
      verdict: NOT_CHECKED where the function has no value there.
      says: What else there is to say: a kink, why nothing is concluded.
    """

    name: str
    verdict: Verdict
    says: str = ""


@dataclasses.dataclass(frozen=True)
class Rule:
    """A custom rule that a program calls.

    Attributes:
      name: Name of the function that has the rule.
      kind: "custom_vjp", "custom_jvp", "linear_call" or "hi_primitive".
      where: The function, and its hand-written parts, each as "bwd at file:line".
      call: The line that calls it, as "file:line"; of several calls the first.
      path: Modules, transformations and loops around that call.
      count: How many calls of it, with operands of these shapes, the program makes.
      looked_at: At the values of how many of them it was audited.
    """

    name: str
    kind: str
    where: tuple[str, ...] = ()
    call: str = ""
    path: str = ""
    count: int = 1
    looked_at: int = 1


@dataclasses.dataclass(frozen=True)
class Finding:
    """The verdict on one leaf of a gradient (or one output, in forward mode).

    Attributes:
      name: The leaf's path in the user's names.
      shape: Its shape.
      dtype: Its dtype's name.
      verdict: PASS, FAIL or INCONCLUSIVE.
      gap: Which comparison decided.
      mode: "rev" or "fwd".
      order: Order of the derivative.
      trial: The trial that it comes from.
      size: The gap found, relative to the truth's norm (or residual, relative).
      allowed: What was allowed, relative to the same.
      rounding: Relative rounding gap in working precision, and what was allowed.
      judged_by: "exact" or "measured": what the claim was compared with.
      entry: Where claim and truth differ most.
      approximation: The evidence that a gap is an approximation.
      cause: What is probably wrong: the likeliest cause.
      other_causes: What else fits the numbers, the likelier first.
      line: Where in the source the claim parts from the truth, as far as known.
      notes: What else is to be known: a kink, a widened allowance.
      check: What was looked at: "derivative", "value", "linear", "vmap", ...
      rule: The custom rule that was looked at by itself, if any.
      hazard: What is special about the point that it comes from, if anything.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    verdict: Verdict
    gap: Gap = Gap.FORMULA
    mode: str = "rev"
    order: int = 1
    trial: int = 0
    size: float = 0.0
    allowed: float = 0.0
    rounding: tuple[float, float] | None = None
    judged_by: str = "exact"
    entry: Entry | None = None
    approximation: Approximation | None = None
    cause: Cause | None = None
    notes: tuple[str, ...] = ()
    check: str = "derivative"
    rule: Rule | None = None
    other_causes: tuple[Cause, ...] = ()
    line: Line | None = None
    hazard: str = ""

    @property
    def strain(self) -> float:
        """The gap as a part of what was allowed; infinite where that is no number."""
        if self.size == 0:
            return 0.0
        strain = self.size / self.allowed if self.allowed else math.inf
        return math.inf if math.isnan(strain) else strain

    @property
    def smallest_seen(self) -> float:
        """The smallest relative error of the leaf that would have been seen."""
        if self.verdict is Verdict.INCONCLUSIVE:
            return math.inf
        return self.approximation.seen if self.approximation else self.allowed


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that a check found.

    Attributes:
      assertion: Name of the assertion.
      subject: Name of the function under test.
      verdict: The gravest verdict of all findings.
      findings: One finding for each leaf, mode and order: the worst of all trials.
      trials: How many trials ran.
      key: An expression for the key, for replaying.
      modes: The modes that were checked.
      order: The highest order checked.
      precision: What each part of the check ran in, one line each.
      unchecked: Leaves and modes that were not checked, with the reason.
      notes: What else is to be known about the whole check.
      replay: A line that runs the check again.
      rules: The custom rules that were audited.
      hint: What to write where a rule differs on purpose; empty where none does.
      found_in: Which processes of a job found it, where not all of them did.
      environment: Versions and settings that the check ran with, as (name, value).
      exhibits: Arrays of the leaves that did not pass; a report that is read back
        from JSON has none.
      inputs: The arguments at the point of the failed trial, by leaf, for replaying.
      hazards: What came of each special point of the arguments, where they were tried.
    """

    assertion: str
    subject: str
    verdict: Verdict
    findings: tuple[Finding, ...] = ()
    trials: int = 0
    key: str = "0"
    modes: tuple[str, ...] = ()
    order: int = 1
    precision: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    replay: str = ""
    rules: tuple[Rule, ...] = ()
    hint: str = ""
    found_in: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    exhibits: tuple[Exhibit, ...] = dataclasses.field(
        default=(), compare=False, repr=False
    )
    inputs: tuple[tuple[str, Any], ...] = dataclasses.field(
        default=(), compare=False, repr=False
    )
    hazards: tuple[Hazard, ...] = ()

    def __str__(self) -> str:
        from gradtest._src.report import text

        return text.full(self)

    def __eq__(self, other: object) -> bool:
        from gradtest._src.report import records

        if not isinstance(other, Report):
            return NotImplemented
        return records.same(self, other)

    def __hash__(self) -> int:
        return hash((self.assertion, self.subject, self.verdict, self.key))

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from gradtest._src.report import terminal

        return terminal.rendered(self, console)

    def _repr_html_(self) -> str:
        from gradtest._src.report import html

        return html.fragment(self)

    def to_html(self) -> str:
        """Returns the report as one self-contained HTML page.

        It holds everything but the arrays: of these the entries that are farthest off,
        and plots where matplotlib is installed. It needs no network and no JavaScript,
        and shows names and texts as they are, whatever they hold.

        Returns:
          The page. It is UTF-8: encode it so, or let `save` do it.

        Example:
          >>> import gradtest
          >>> report = gradtest.check(lambda x: x**2, 3.0)
          >>> report.to_html().startswith("<!doctype html>")
          True
        """
        from gradtest._src.report import html

        return html.page(self)

    def to_json(self, indent: int | None = None) -> str:
        """Returns the report as strict JSON, which `from_json` reads back.

        `docs/report.schema.json` describes it. Exhibits and inputs are left out.

        Args:
          indent: Spaces for each level; None puts all on one line.

        Returns:
          The JSON. NaN and the infinities are strings in it, a complex number an object
          with "real" and "imag".

        Example:
          >>> import gradtest
          >>> report = gradtest.check(lambda x: x**2, 3.0)
          >>> gradtest.Report.from_json(report.to_json()) == report
          True
        """
        from gradtest._src.report import records, text

        return records.to_json(self, text.message(self), indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Returns the report that `to_json` told.

        Args:
          text: The JSON, not the name of a file.

        Returns:
          A report that is equal to the one told, without its exhibits and inputs.

        Raises:
          TypeError: `text` is no text.
          ValueError: It is not JSON, no report, or one of a newer schema.

        Example:
          >>> import gradtest
          >>> told = gradtest.check(lambda x: x**2, 3.0).to_json()
          >>> gradtest.Report.from_json(told).verdict.value
          'PASS'
        """
        from gradtest._src.report import records

        return records.from_json(text)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report to a file, in the form that its suffix names.

        The file is there whole or not at all; one of this name is replaced.

        Args:
          path: A name that ends in `.html`, `.json`, `.txt` (the text of `str`), `.npz`
            (the arguments of the failed trial, and the wrong arrays) or `.py` (a script
            that runs the check again). Its directory must be there: none is made.

        Returns:
          The path.

        Raises:
          ValueError: The suffix is another.
          FileNotFoundError: There is no such directory.

        Example:
          >>> import gradtest, pathlib, tempfile
          >>> report = gradtest.check(lambda x: x**2, 3.0)
          >>> with tempfile.TemporaryDirectory() as folder:
          ...     report.save(pathlib.Path(folder, "report.html")).name
          'report.html'
        """
        from gradtest._src.report import saving

        return saving.save(self, path)

    def plot(
        self, kind: str | None = None, leaf: str | None = None, ax: Any = None
    ) -> Any:
        """Draws what the check found; needs matplotlib (the extra `plots`).

        Args:
          kind: "taylor" (remainders at falling steps), "steps" (differences at each
            step), "error" (where in the leaf), "scatter" (claimed against true) or
            "gaps" (each leaf's gap beside what was allowed); None draws all that apply.
            All but "gaps" need the arrays that a check that did not pass keeps.
          leaf: Name of the leaf; None takes the gravest.
          ax: matplotlib axes to draw in, for one `kind`.

        Returns:
          The matplotlib figure.

        Raises:
          ImportError: matplotlib is not installed.
          TypeError: `ax` is no axes.
          ValueError: The report has nothing of this kind, or no such leaf.
        """
        from gradtest._src.report import plots

        return plots.plot(self, kind, leaf, ax)

    def show(self) -> None:
        """Shows the report: as HTML in a notebook, else as text, coloured if it can be.

        In a notebook its arrays are shown too, by treescope where that is installed.
        """
        from gradtest._src.report import notebook

        notebook.show(self)

    @property
    def smallest_seen(self) -> float:
        """The smallest relative error that would have been seen in every leaf.

        Infinite where a leaf is inconclusive, NaN where no gap was measured.
        """
        return max(
            (
                f.smallest_seen
                for f in self.findings
                if f.gap in (Gap.FORMULA, Gap.CLOSE)
            ),
            default=math.nan,
        )

    def leaf(self, name: str) -> Finding:
        """Returns the gravest finding on the leaf of this name.

        Raises:
          KeyError: There is no such leaf.
        """
        found = [finding for finding in self.findings if finding.name == name]
        if not found:
            names = ", ".join(dict.fromkeys(f.name for f in self.findings))
            raise KeyError(f"no leaf {name!r} in the report; there are {names}")
        return max(found, key=lambda f: (f.verdict.severity, f.strain))


class GradientMismatch(AssertionError):
    """A gradient is wrong; `.report` has the evidence."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


class GradientInconclusive(AssertionError):
    """Nothing could be concluded about a gradient; `.report` says why."""

    def __init__(self, message: str, report: Report):
        super().__init__(message)
        self.report = report


for _public in (GradientMismatch, GradientInconclusive):
    # A traceback names them as their users import them.
    _public.__module__ = "gradtest"
