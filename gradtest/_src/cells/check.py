"""Compares the derivative of a function in every cell with the derivative by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gradtest._src import execution, jaxprs, seeding, variants
from gradtest._src.cells import causes, ways
from gradtest._src.cells import devices as device_cells
from gradtest._src.cells.chosen import Choice, stacking
from gradtest._src.cells.gaps import Difference, Judge, Part, worst_of
from gradtest._src.cells.points import Points, is_finite
from gradtest._src.cells.reference import Reference
from gradtest._src.cells.runs import Runs, ShapeError
from gradtest._src.cells.ways import Cell, Derivative, Examples
from gradtest._src.claiming import is_missing_mode
from gradtest._src.execution import SlipError
from gradtest._src.findings import Cause, Finding, Gap, Report, Verdict, worst
from gradtest._src.inputs import Point, Role, read_inputs
from gradtest._src.lifting import is_inexact
from gradtest._src.options import Options
from gradtest._src.program import Program, Values, trace_program

_NOT_REPEATED = (
    "all other variants: traced a second time the function is another one, so what "
    "they give is no evidence"
)


class CellCheck:
    """A function, the cells it runs in, and the options: makes the report."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        choice: Choice,
        options: Options,
    ):
        self.fn = fn
        self.options = options
        self.choice = choice
        self.inputs = read_inputs(
            fn, args, argnums=options.argnums, exclude=options.exclude
        )
        self._unchecked: list[str] = []
        self._notes: list[str] = []
        self._islands: set[str] = set()
        self._program: Program | None = None
        self._lacking: list[Cell] = []

    def report(self, assertion: str) -> Report:
        """Runs the check."""
        with np.errstate(all="ignore"):  # NaN and inf are judged, not warned about
            try:
                findings = self._findings()
            except (SlipError, ShapeError) as error:
                raise TypeError(str(error)) from None
        name = getattr(self.fn, "__name__", type(self.fn).__name__)
        key = seeding.describe(self.options.key)
        verdict = worst(finding.verdict for finding in findings)
        trials = f", trials={self.options.trials}" if self.options.trials > 1 else ""
        replay = f"gradtest.{assertion}({name}, ..., key={key}{trials})"
        return Report(
            assertion,
            name,
            verdict,
            tuple(findings),
            self.options.trials,
            key,
            ("rev",),
            precision=(self._precision(),),
            unchecked=tuple(dict.fromkeys([*self._left_out(), *self._unchecked])),
            notes=tuple(dict.fromkeys(self._notes)),
            replay="" if verdict is Verdict.PASS else replay,
        )

    def _precision(self) -> str:
        if self._islands:
            islands = ", ".join(sorted(self._islands))
            return (
                f"precision: float64 (lifted), but in its own precision ran {islands}"
            )
        return "precision: each cell in float64 (lifted), and as it runs"

    def _left_out(self) -> list[str]:
        lines = [f"{leaf} (excluded)" for leaf in self.inputs.unchecked]
        lines += [
            f"{leaf} (held)"
            for leaf in self.inputs.of_role(Role.HELD)
            if leaf.argument in self.inputs.argnums and not is_inexact(leaf.dtype)
        ]
        if self._program is None:
            return lines
        results, _ = jax.tree_util.tree_flatten_with_path(self._program.result)
        return lines + [
            f"result{jax.tree_util.keystr(path)}: {leaf.dtype} has no gradient, and "
            "is not compared"
            for path, leaf in results
            if not is_inexact(leaf.dtype)
        ]

    # --- what is compared, and where ------------------------------------------------

    def _findings(self) -> list[Finding]:
        point = self.inputs.draw(self.options.key, 0)
        try:
            self._program = program = self._trace(point)
            derivative = Derivative(program)
            points = Points(self.inputs, program, self.options)
            examples = points.examples(0)
            reference = Reference(derivative, examples, self.options.key)
        except SlipError:
            raise
        except Exception as error:
            if is_missing_mode(error):
                raise ValueError(
                    f"`fn` must have a gradient, but JAX finds none: {error}"
                ) from error
            return [self._eager_alone(point, error)]
        cells = self._choose(derivative, examples, reference)
        runs = None
        found: dict[str, Finding] = {}
        for trial in range(self.options.trials):
            if trial:
                examples = points.examples(trial)
            self._notes += points.settle(examples, reference)
            if not is_finite(reference.lifted(examples.row(0))):
                trouble = self._finding(causes.NOT_FINITE, trial)
                found.setdefault("reference", trouble)
                continue
            if runs is None:
                runs = Runs(cells, reference)
            for finding in self._compare(runs, reference, trial):
                kept = found.get(finding.check)
                if kept is None or _rank(finding) > _rank(kept):
                    found[finding.check] = finding
        self._islands = reference.islands
        if runs is not None:
            self._tell_of_lacks(runs)
        if not found:
            return [self._nothing(runs)]
        order = {cell.name: i for i, cell in enumerate(cells)}
        return sorted(found.values(), key=lambda f: order.get(f.check, -1))

    def _trace(self, point: Point) -> Program:
        return trace_program(self.fn, self.inputs, point, has_aux=self.options.has_aux)

    def _choose(
        self, derivative: Derivative, examples: Examples, reference: Reference
    ) -> list[Cell]:
        """Returns the cells to run; tells why others don't."""
        devices = jax.local_devices()
        numbers = device_cells.counts(self.choice.numbers, len(devices))
        every = ways.single_cells(derivative, examples)
        every += device_cells.device_cells(
            derivative,
            examples,
            numbers,
            devices,
            _obstacle(reference),
            reference.size,
        )
        picked = self.choice.pick(every)
        for lacks in dict.fromkeys(cell.lacks for cell in picked if cell.lacks):
            names = ", ".join(cell.name for cell in picked if cell.lacks == lacks)
            self._unchecked.append(f"{names}: {lacks}")
        if self.choice.names is None:
            self._tell_of_extras(every)
        able = [cell for cell in picked if not cell.lacks]
        own = [
            _own_cell(name, variant, derivative, examples)
            for name, variant in self.choice.own.items()
        ]
        if not any(cell.is_repeat for cell in able) and (able or own):
            able.insert(0, every[0])  # tells an impure function from a wrong rule
        self._lacking = picked
        return able + own

    def _tell_of_extras(self, every: Sequence[Cell]) -> None:
        families = dict.fromkeys(cell.family for cell in every if cell.is_extra)
        for family in families:
            own = [c.name for c in every if c.is_extra and c.family == family]
            more = ", …" * (len(own) > 1)
            self._unchecked.append(
                f"{own[0]}{more}: {len(own)} of the rarer variants, left out to save "
                f"time; variants=[{family!r}] has them all"
            )

    def _tell_of_lacks(self, runs: Runs) -> None:
        reasons: dict[str, list[str]] = {}
        for each in runs.prepared:
            if each.lacks:
                reasons.setdefault(each.lacks, []).append(each.cell.name)
            if each.not_lifted:
                reason = f"not compared in float64: {each.not_lifted}"
                reasons.setdefault(reason, []).append(each.cell.name)
        for reason, names in reasons.items():
            self._unchecked.append(f"{', '.join(names)}: {reason}")

    # --- verdicts -----------------------------------------------------------------

    def _compare(self, runs: Runs, reference: Reference, trial: int) -> list[Finding]:
        assert self._program is not None
        judge = Judge(
            reference,
            len(self._program.outputs),
            self.options.rtol,
            self.options.rounding_rtol,
        )
        lifted, working = runs.in_float64(), runs.as_they_run()
        found = []
        for each in runs.prepared:
            cell = each.cell
            if each.lacks:
                continue
            if each.error is not None:
                if cell.is_own:
                    self._require_transformation(cell, reference, each.error)
                cause = causes.raises(cell, each.error)
                found.append(self._finding(cause, trial, cell.name, Verdict.FAIL))
                continue
            wide = [judge.in_float64(part) for part in lifted.get(cell.name, ())]
            narrow = [judge.as_it_runs(p, cell) for p in working.get(cell.name, ())]
            if not wide and not narrow:
                continue
            finding = self._judged(cell, wide, narrow, trial)
            if not cell.is_repeat:
                found.append(finding)
            elif finding.verdict is not Verdict.PASS:
                self._unchecked.append(_NOT_REPEATED)
                return [finding]
            elif self.choice.names is None or _names_repeat(self.choice):
                found.append(finding)
        return found

    def _require_transformation(
        self, cell: Cell, reference: Reference, error: Exception
    ) -> None:
        """Raises TypeError where it is no fault of the function's that a cell fails."""
        variant = self.choice.own[cell.name]
        if variants.only_places_arguments(variant):
            return
        examples = reference.examples
        arguments = examples.shared(cell.rows, is_stacked=cell.is_stacked)
        variants.require_transformation(variant, arguments, error, "variants")

    def _judged(
        self,
        cell: Cell,
        wide: list[Difference],
        narrow: list[Difference],
        trial: int,
    ) -> Finding:
        """Returns the finding on a cell, by its worst part: in float64 it counts first.

        A difference that rounding may explain decides nothing beside one that it can't.
        """
        assert self._program is not None
        wrong = [(own, d) for own in (wide, narrow) for d in own if d.is_exceeded]
        certain = [(own, d) for own, d in wrong if not d.is_undecided]
        outputs = len(self._program.outputs)
        parts = wide or narrow
        chief = worst_of(parts)
        verdict, cause = Verdict.PASS, None
        if certain:
            parts = certain[0][0]
            chief = worst_of([d for own, d in certain if own is parts])
            verdict = Verdict.FAIL
            cause = causes.departs(cell, chief, parts, outputs)
        elif wrong:
            parts, chief = wrong[0]
            verdict, cause = Verdict.INCONCLUSIVE, causes.UNSETTLED
        running = worst_of(narrow).gap if narrow else None
        worst_at = chief if wrong else worst_of([*wide, *narrow])
        item = self._item(worst_at.part)
        return Finding(
            item.name,
            item.shape,
            np.dtype(item.dtype).name,
            verdict,
            Gap.AGREEMENT,
            trial=trial,
            size=chief.gap.size,
            allowed=chief.gap.allowed,
            rounding=None if running is None else (running.size, running.allowed),
            judged_by="float64" if parts is wide else "working precision",
            entry=chief.gap.entry if wrong else None,
            cause=cause,
            notes=("its value",) if chief.part.item < outputs else (),
            check=cell.name,
        )

    def _item(self, part: Part) -> Any:
        assert self._program is not None
        items: list[Any] = [*self._program.outputs, *self.inputs.moving]
        return items[part.item]

    def _finding(
        self,
        cause: Cause,
        trial: int,
        check: str = "reference",
        verdict: Verdict = Verdict.INCONCLUSIVE,
    ) -> Finding:
        return Finding(
            "all arguments", (), "", verdict, Gap.AGREEMENT, trial=trial, cause=cause,
            check=check,
        )  # fmt: skip

    def _nothing(self, runs: Runs | None) -> Finding:
        """Says that no cell could run, and why the first could not."""
        reasons = [(cell.name, cell.lacks) for cell in self._lacking]
        if runs is not None:
            reasons += [(each.cell.name, each.lacks) for each in runs.prepared]
        name, lacks = next(pair for pair in reasons if pair[1])
        return self._finding(causes.nothing_ran(name, lacks), 0)

    def _eager_alone(self, point: Point, error: Exception) -> Finding:
        """Tells of a derivative that only runs on concrete values.

        Raises:
          Exception: It does not run on these either: then that is what is to be told.
        """
        parts = Examples([point], [[]]).at(Examples([point], [[]]).row(0))
        try:
            with execution.working_precision():
                self._run_eagerly(*parts[:2])
        except Exception:
            raise error from None
        self._unchecked.append("all variants but eager: JAX can't trace the derivative")
        cell = Cell("jit", (), "under jax.jit")
        return self._finding(causes.raises(cell, error), 0, "jit", Verdict.FAIL)

    def _run_eagerly(self, moving: Any, held: Any) -> None:
        def call(*xs: Any) -> Values:
            returned = self.fn(*self.inputs.arguments(xs, held))
            result = returned[0] if self.options.has_aux else returned
            leaves = map(jax.numpy.asarray, jax.tree_util.tree_leaves(result))
            return [leaf for leaf in leaves if is_inexact(leaf.dtype)]

        values, pull = jax.vjp(call, *moving)
        pull([jax.numpy.ones_like(value) for value in values])


def _own_cell(
    name: str, variant: Any, derivative: Derivative, examples: Examples
) -> Cell:
    """Returns the cell of a transformation of the user's."""
    count, devices = stacking(variant)
    rows = tuple(examples.row(k) for k in range(count or 1))
    try:
        run = variants.apply_variant(variant, derivative.fresh())
    except Exception as error:
        variants.require_transformation(variant, (), error, "variants")
        raise
    return Cell(
        name,
        (),
        f"under {name}",
        rows,
        run,
        is_stacked=bool(count),
        devices=devices,
        has_lifted=not variants.only_places_arguments(variant),
        consumes=True,
        is_own=True,
    )


def _obstacle(reference: Reference) -> str:
    """Says why no cell can run over devices; empty where nothing is in the way."""
    if not jax.sharding.get_abstract_mesh().empty:
        return "a mesh is set around the assertion (jax.set_mesh)"
    spread = {"shard_map", "xla_pmap", "sharding_constraint", "reshard"}
    found = spread & jaxprs.primitives(reference.jaxpr)
    if found:
        return (
            f"the function runs over devices itself ({', '.join(sorted(found))}): "
            "assert_parallel_grads_match checks such a one"
        )
    return ""


def _names_repeat(choice: Choice) -> bool:
    return any(wanted.family == "repeat" for wanted in choice.names or ())


def _rank(finding: Finding) -> tuple[int, float]:
    return finding.verdict.severity, finding.strain
