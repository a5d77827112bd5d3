"""Follows a gradient back from the loss, step by step, and counts what is left of it.

Every step of the rule-free program is pulled back by itself, so that it can be told
which of a value's ways back to a leaf is cut, and at which step. Calls are opened,
loops and branches are entered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gradtest._src import jaxprs
from gradtest._src.lifting import Evaluator, is_inexact
from gradtest._src.localise.steps import Atom, Constant, Slot, Step, Steps
from gradtest._src.silence.influence import Reach, reached
from gradtest._src.silence.readings import (
    Path,
    Readings,
    as_number,
    count,
    is_numeric,
    reading,
)

Values = list[Any]


@dataclasses.dataclass
class Run:
    """Values and reach at one point, before the gradient goes back.

    Attributes:
      values: Each value, by slot.
      reach: Which of its entries the leaf takes part in.
      starts: For each loop, the carry and its reach at the start of every turn.
    """

    values: dict[Slot, Any]
    reach: dict[Slot, Reach]
    starts: dict[int, Any]


class Level:
    """A program as steps, with the programs of its loops and branches inside.

    Attributes:
      steps: The steps.
      inner: The programs that a loop or branch holds, by its number.
      path: Where the program stands in the whole.
    """

    def __init__(self, program: jaxprs.Jaxpr, path: Path = ()):
        self.steps = Steps(program)
        self.path = path
        self.inner: dict[int, list[Level]] = {
            i: [
                Level(each, (*path, i, k))
                for k, each in enumerate(jaxprs.entered(step.eqn))
            ]
            for i, step in enumerate(self.steps.steps)
            if step.eqn is not None and _is_entered(step)
        }

    def level_at(self, path: Path) -> Level:
        """Returns the program that a path leads to."""
        here = self
        for i, k in zip(path[::2], path[1::2], strict=False):
            here = here.inner[i][k]
        return here

    # --- forward -----------------------------------------------------------------

    def forward(self, run: Evaluator, values: Values, reach: Sequence[Reach]) -> Run:
        """Evaluates the steps, and what the leaf's entries take part in."""
        made = Run(
            dict(zip(self.steps.inputs, values, strict=True)),
            dict(zip(self.steps.inputs, reach, strict=True)),
            {},
        )
        for i, step in enumerate(self.steps.steps):
            operands = [_read(run, made, atom) for atom in step.operands]
            seen = [_reach(made, atom) for atom in step.operands]
            if i in self.inner and step.name == "scan":
                results, ends, made.starts[i] = self._loop(run, i, operands, seen)
            elif i in self.inner:
                results, ends = self._branch(run, i, operands, seen)
            else:
                results = _results(run, step, self.steps, operands)
                ends = reached(run, step, operands, seen)
            made.values.update(zip(step.results, results, strict=True))
            made.reach.update(zip(step.results, ends, strict=True))
        return made

    def _returned(self, run: Evaluator, made: Run) -> tuple[Values, list[Reach]]:
        """Returns a program's results and their reach, full for every float."""
        outputs = [_read(run, made, atom) for atom in self.steps.outputs]
        reach = [
            _full_reach(value, _reach(made, atom))
            for value, atom in zip(outputs, self.steps.outputs, strict=True)
        ]
        return outputs, reach

    def _loop(
        self, run: Evaluator, i: int, operands: Values, seen: list[Reach]
    ) -> tuple[Values, list[Reach], Any]:
        (level,) = self.inner[i]
        eqn = self.steps.steps[i].eqn
        assert eqn is not None
        scan = jaxprs.read_scan(eqn)
        first, last = scan.num_consts, scan.num_consts + scan.num_carry
        start = [
            (_array(value), _full_reach(value, reach))
            for value, reach in zip(operands[first:last], seen[first:last], strict=True)
        ]

        def turn(carry: Any, x: Any) -> Any:
            values = [*operands[:first], *(v for v, _ in carry), *x[0]]
            reach = [*seen[:first], *(r for _, r in carry), *x[1]]
            made = level.forward(run, values, reach)
            outputs, ends = level._returned(run, made)
            pairs = list(zip(outputs, ends, strict=True))
            following = [
                (jnp.asarray(value, _dtype(old)), reach)
                if is_inexact(_dtype(old)) else (value, reach)
                for (value, reach), (old, _) in zip(
                    pairs[: scan.num_carry], carry, strict=True)
            ]  # fmt: skip
            return following, (pairs[scan.num_carry :], carry)

        end, (stacked, starts) = lax.scan(
            turn, start, (operands[last:], seen[last:]), length=scan.length,
            reverse=scan.reverse,
        )  # fmt: skip
        pairs = [*end, *stacked]
        return [v for v, _ in pairs], [r for _, r in pairs], starts

    def _branch(
        self, run: Evaluator, i: int, operands: Values, seen: list[Reach]
    ) -> tuple[Values, list[Reach]]:
        def branch(level: Level) -> Any:
            def taken(values: Values, reach: list[Reach]) -> Any:
                return level._returned(run, level.forward(run, values, reach))

            return taken

        branches = [branch(level) for level in self.inner[i]]
        values, reach = lax.switch(operands[0], branches, operands[1:], seen[1:])
        # What another branch would have used takes part as well.
        some = [jnp.any(each) for each in seen[1:] if each is not None]
        if some:
            every = jnp.stack(some).any()
            reach = [r if r is None else r | every for r in reach]
        return values, reach

    # --- backward ----------------------------------------------------------------

    def backward(
        self, run: Evaluator, made: Run, cotangents: Sequence[Any]
    ) -> tuple[list[Any], Readings]:
        """Pulls cotangents of the results back to the inputs, counting on the way."""
        found = Readings()
        total: dict[Slot, Any] = {}
        given: dict[Slot, Any] = {}

        def add(atom: Atom, cotangent: Any) -> None:
            if isinstance(atom, Constant) or cotangent is None:
                return
            if made.reach.get(atom) is None:
                return
            total[atom] = total[atom] + cotangent if atom in total else cotangent
            more = count(cotangent, made.reach[atom])
            given[atom] = given[atom] + more if atom in given else more

        for atom, cotangent in zip(self.steps.outputs, cotangents, strict=True):
            add(atom, cotangent)
        for i in range(len(self.steps.steps) - 1, -1, -1):
            step = self.steps.steps[i]
            arriving = [
                _revived(total[slot], given[slot], made.reach[slot])
                if slot in total
                else None
                for slot in step.results
            ]
            seen = [_reach(made, atom) for atom in step.operands]
            if all(c is None for c in arriving) or all(r is None for r in seen):
                continue
            operands = [_read(run, made, atom) for atom in step.operands]
            back = self._back(run, made, i, operands, seen, arriving, found)
            results = [made.reach.get(slot) for slot in step.results]
            here = (*self.path, i)
            found.steps[here] = reading(operands, seen, back, arriving, results)
            for k, (operand, there) in enumerate(zip(operands, seen, strict=True)):
                if there is not None and np.prod(jnp.shape(operand)):
                    size = jnp.abs(operand) if jnp.iscomplexobj(operand) else operand
                    low = jnp.min(size, initial=np.inf, where=there)
                    found.lows[(*here, k)] = as_number(low)
                    high = jnp.max(size, initial=-np.inf, where=there)
                    found.highs[(*here, k)] = as_number(high)
            for atom, cotangent in zip(step.operands, back, strict=True):
                add(atom, cotangent)
        self._note_values(made, total, given, found)
        return [total.get(slot) for slot in self.steps.inputs], found

    def _back(
        self,
        run: Evaluator,
        made: Run,
        i: int,
        operands: Values,
        seen: list[Reach],
        arriving: list[Any],
        found: Readings,
    ) -> list[Any]:
        step = self.steps.steps[i]
        full = [
            _zeros(made.values[slot]) if cotangent is None else cotangent
            for slot, cotangent in zip(step.results, arriving, strict=True)
        ]
        if i not in self.inner:
            return _pulled(run, step, self.steps, operands, seen, full)
        turned = self._loop_back if step.name == "scan" else self._branch_back
        back, inside = turned(run, made, i, operands, seen, full)
        found.update(inside)
        return back

    def _loop_back(
        self,
        run: Evaluator,
        made: Run,
        i: int,
        operands: Values,
        seen: list[Reach],
        arriving: list[Any],
    ) -> tuple[list[Any], Readings]:
        (level,) = self.inner[i]
        eqn = self.steps.steps[i].eqn
        assert eqn is not None
        scan = jaxprs.read_scan(eqn)
        first, last = scan.num_consts, scan.num_consts + scan.num_carry

        def turn(carry: Any, start: Any, x: Any, ys: list[Any]) -> Any:
            values = [*operands[:first], *(v for v, _ in start), *x[0]]
            reach = [*seen[:first], *(r for _, r in start), *x[1]]
            inner = level.forward(run, values, reach)
            back, found = level.backward(run, inner, [*carry, *ys])
            full = [
                _zeros(v) if b is None else b for v, b in zip(values, back, strict=True)
            ]
            return full[:first], full[first:last], full[last:], found

        xs = (operands[last:], seen[last:])
        slices = jax.tree_util.tree_map(lambda a: a[0], (made.starts[i], xs))
        ends, ys = arriving[: scan.num_carry], arriving[scan.num_carry :]
        one = jax.eval_shape(
            turn, ends, *slices, [y if y is None else y[0] for y in ys]
        )

        def body(state: Any, each: Any) -> Any:
            consts, carry, found = state
            more, carry, parts, new = turn(carry, *each)
            consts = jax.tree_util.tree_map(jnp.add, consts, more)
            return (consts, carry, found.merged(new)), parts

        nothing = jax.tree_util.tree_map(lambda a: jnp.zeros(a.shape, a.dtype), one[0])
        (consts, carry, found), parts = lax.scan(
            body, (nothing, ends, Readings.blank(one[3])), (made.starts[i], xs, ys),
            length=scan.length, reverse=not scan.reverse,
        )  # fmt: skip
        return [*consts, *carry, *parts], found

    def _branch_back(
        self,
        run: Evaluator,
        made: Run,
        i: int,
        operands: Values,
        seen: list[Reach],
        arriving: list[Any],
    ) -> tuple[list[Any], Readings]:
        def one(level: Level, values: Values, reach: list[Reach], cots: Any) -> Any:
            inner = level.forward(run, values, reach)
            back, found = level.backward(run, inner, cots)
            full = [
                _zeros(v) if b is None else b for v, b in zip(values, back, strict=True)
            ]
            return full, found

        levels = self.inner[i]
        shapes = [
            jax.eval_shape(
                lambda *args, level=level: one(level, *args)[1],
                operands[1:], seen[1:], arriving,
            )
            for level in levels
        ]  # fmt: skip

        def branch(k: int) -> Any:
            def taken(*args: Any) -> Any:
                back, found = one(levels[k], *args)
                for other, shape in enumerate(shapes):
                    if other != k:
                        found.update(Readings.blank(shape))
                return back, found

            return taken

        back, found = lax.switch(
            operands[0], [branch(k) for k in range(len(levels))],
            operands[1:], seen[1:], arriving,
        )  # fmt: skip
        return [None, *back], found

    def _note_values(
        self, made: Run, total: dict[Slot, Any], given: dict[Slot, Any], found: Readings
    ) -> None:
        for slot, value in made.values.items():
            if not is_numeric(value) or not np.prod(jnp.shape(value)):
                continue
            path = (*self.path, slot)
            size = jnp.abs(value) if jnp.iscomplexobj(value) else jnp.asarray(value)
            noted = {"nonzero": jnp.count_nonzero(value)}
            if slot in total:
                noted["given"] = given[slot]
                noted["total"] = count(total[slot], made.reach[slot])
            found.slots[path] = noted
            found.lows[path] = as_number(jnp.min(size))
            found.highs[path] = as_number(jnp.max(size))


def _is_entered(step: Step) -> bool:
    if step.name == "scan":
        assert step.eqn is not None
        return jaxprs.read_scan(step.eqn).length > 0
    return step.name == "cond"


def _read(run: Evaluator, made: Run, atom: Atom) -> Any:
    if not isinstance(atom, Constant):
        return made.values[atom]
    value = run.hoisted.get(id(atom.value), atom.value)
    return run.widen(value, value)


def _reach(made: Run, atom: Atom) -> Reach:
    return None if isinstance(atom, Constant) else made.reach.get(atom)


def _array(value: Any) -> Any:
    return value if isinstance(value, jax.Array) else jnp.asarray(value)


def _dtype(value: Any) -> Any:
    return getattr(value, "dtype", None)


def _full_reach(value: Any, reach: Reach) -> Reach:
    if reach is None and is_inexact(_dtype(value)):
        return jnp.zeros(jnp.shape(value), bool)
    return reach


def _zeros(value: Any) -> Any:
    return jnp.zeros_like(value) if is_inexact(_dtype(value)) else None


def _revived(total: Any, given: Any, reach: Reach) -> Any:
    """Returns ones in place of gradients that cancel, so that they can be followed on.

    At a kink the parts of a function may cancel where a rule of its own has a slope:
    those of `softplus` do at 0.
    """
    lost = (given > 0) & (count(total, reach) == 0)
    return jnp.where(lost & reach, jnp.ones_like(total), total)


def _results(run: Evaluator, step: Step, steps: Steps, operands: Values) -> Values:
    if step.eqn is None:
        assert step.compute is not None
        return [step.compute(*operands)]
    return [
        run.widen(result, steps.types[slot])
        for slot, result in zip(
            step.results, run.apply(step.eqn, list(operands)), strict=True
        )
    ]


def _pulled(
    run: Evaluator,
    step: Step,
    steps: Steps,
    operands: Values,
    seen: list[Reach],
    cotangents: list[Any],
) -> list[Any]:
    """Returns what one step hands on to the operands that are seen."""
    which = [k for k, reach in enumerate(seen) if reach is not None]

    def results(*moving: Any) -> Values:
        merged = list(operands)
        for k, value in zip(which, moving, strict=True):
            merged[k] = value
        made = _results(run, step, steps, merged)
        return [each for each in made if is_inexact(_dtype(each))]

    _, pull = jax.vjp(results, *(_array(operands[k]) for k in which))
    found = pull([c for c in cotangents if c is not None])
    back: list[Any] = [None] * len(operands)
    for k, cotangent in zip(which, found, strict=True):
        back[k] = cotangent
    return back
