"""Reads the values that reach chosen equations of a running program.

The program is evaluated as it is, in its own precision. A loop shows its first, a
middle and its last iteration; a branch that is not taken shows nothing; a device
region shows every device's values along one leading axis.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from gradtest._src import jaxprs
from gradtest._src.jaxprs import Eqn, Jaxpr
from gradtest._src.lifting import Evaluator
from gradtest._src.reach import Place


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Samples:
    """The operands of some runs of one equation, along a leading axis.

    Attributes:
      reached: Whether each of the runs took place: bool[n].
      iteration: Which turn of the innermost loop it was, -1 outside: int[n].
      operands: The values, each [n, ...]; in a device region [n, devices, ...] with
        one device where a value is the same on all.
    """

    reached: Any
    iteration: Any
    operands: list[Any]


Taps = dict[Place, Samples]


def tap(
    jaxpr: Jaxpr,
    args: Sequence[Any],
    chosen: Mapping[Place, Eqn],
    hoisted: dict[int, Any],
) -> Taps:
    """Evaluates a program and returns the samples at the chosen equations.

    Args:
      jaxpr: The program.
      args: Its arguments.
      chosen: The equations, by where they stand.
      hoisted: Values of array constants, by their `id`, so as not to compile them in.
    """
    plain = Evaluator(wide=False, hoisted=hoisted)
    return _Tapper(chosen, plain).run(jaxpr, list(args), ())[1]


class _Tapper:
    def __init__(self, chosen: Mapping[Place, Eqn], plain: Evaluator):
        self.chosen = chosen
        self.plain = plain

    def _inside(self, here: Place) -> list[Place]:
        """Returns the chosen equations that an equation holds, itself left out."""
        size = len(here)
        return [p for p in self.chosen if len(p) > size and p[:size] == here]

    def run(
        self, jaxpr: Jaxpr, args: list[Any], place: Place
    ) -> tuple[list[Any], Taps]:
        body = jaxprs.open_body(jaxpr)
        env: dict[Any, Any] = {
            var: self.plain.hoisted.get(id(const), const)
            for var, const in zip(body.constvars, body.consts, strict=True)
        }
        env.update(zip(body.invars, args, strict=True))
        found: Taps = {}

        def read(atom: Any) -> Any:
            if jaxprs.is_literal(atom):
                return np.asarray(atom.val, atom.aval.dtype)
            return env[atom]

        for i, eqn in enumerate(body.eqns):
            operands, here = [read(atom) for atom in eqn.invars], (*place, i)
            if here in self.chosen:
                found[here] = _one_sample(operands)
            if self._inside(here):
                results, inner = self._enter(eqn, operands, here)
                found |= inner
            else:
                results = list(self.plain.apply(eqn, operands))
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in body.outvars], found

    def _enter(
        self, eqn: Eqn, operands: list[Any], here: Place
    ) -> tuple[list[Any], Taps]:
        special = {
            "scan": self._scan,
            "while": self._while,
            "cond": self._cond,
            "shard_map": self._shard_map,
        }.get(eqn.primitive.name)
        if special is not None:
            return special(eqn, operands, here)
        (program,) = jaxprs.entered(eqn)
        return self.run(program, operands, (*here, 0))

    def _scan(
        self, eqn: Eqn, operands: list[Any], here: Place
    ) -> tuple[list[Any], Taps]:
        scan = jaxprs.read_scan(eqn)
        first, last = scan.num_consts, scan.num_consts + scan.num_carry
        consts, start, xs = operands[:first], operands[first:last], operands[last:]
        if not scan.length:
            return list(self.plain.apply(eqn, operands)), {}

        def step(carry: list[Any], x: list[Any]) -> tuple[list[Any], Taps]:
            return self.run(scan.body, [*consts, *carry, *x], (*here, 0))

        def body(state: Any, x: Any) -> Any:
            carry, i, slots = state
            results, seen = step(carry, x)
            middle, end = (i == scan.length // 2), (i == scan.length - 1)
            slots = [
                _pick(p, _at(i, seen), s)
                for p, s in zip((middle, end), slots, strict=True)
            ]
            return (results[: scan.num_carry], i + 1, slots), results[scan.num_carry :]

        # The first iteration, run once more, also gives the slots their types.
        edge = scan.length - 1 if scan.reverse else 0
        _, seen = step(start, [x[edge] for x in xs])
        opening = _at(jnp.array(0), seen)
        (carry, _, slots), ys = lax.scan(
            body,
            (start, jnp.array(0), [opening, opening]),
            xs,
            length=scan.length,
            reverse=scan.reverse,
        )
        return [*carry, *ys], _join([opening, *slots])

    def _while(
        self, eqn: Eqn, operands: list[Any], here: Place
    ) -> tuple[list[Any], Taps]:
        loop = jaxprs.read_while(eqn)
        first, last = loop.cond_nconsts, loop.cond_nconsts + loop.body_nconsts

        def going(carry: list[Any]) -> Any:
            return self.plain(loop.cond, [*operands[:first], *carry])[0]

        def step(carry: list[Any]) -> tuple[list[Any], Taps]:
            _, in_cond = self.run(loop.cond, [*operands[:first], *carry], (*here, 0))
            results, in_body = self.run(
                loop.body, [*operands[first:last], *carry], (*here, 1)
            )
            return results, in_cond | in_body

        def body(state: Any) -> Any:
            carry, i, slots = state
            results, seen = step(carry)
            # A power of two lies in the middle of whatever number there will be.
            middle = (i & (i - 1)) == 0
            slots = [
                _pick(p, _at(i, seen), s)
                for p, s in zip((middle, True), slots, strict=True)
            ]
            return results, i + 1, slots

        start = operands[last:]
        _, seen = step(start)
        opening = _at(jnp.array(0), seen, reached=going(start))
        end, _, slots = lax.while_loop(
            lambda state: going(state[0]),
            body,
            (start, jnp.array(0), [opening, opening]),
        )
        return end, _join([opening, *slots])

    def _cond(
        self, eqn: Eqn, operands: list[Any], here: Place
    ) -> tuple[list[Any], Taps]:
        branches = jaxprs.entered(eqn)
        runs = [
            lambda *args, k=k, program=program: self.run(
                program, list(args), (*here, k)
            )
            for k, program in enumerate(branches)
        ]
        shapes = [jax.eval_shape(run, *operands[1:])[1] for run in runs]

        def branch(k: int) -> Any:
            def taken(*args: Any) -> tuple[list[Any], Taps]:
                results, seen = runs[k](*args)
                for other, shape in enumerate(shapes):
                    if other != k:
                        seen |= _nothing(shape)
                return results, seen

            return taken

        return lax.switch(
            operands[0], [branch(k) for k in range(len(runs))], *operands[1:]
        )

    def _shard_map(
        self, eqn: Eqn, operands: list[Any], here: Place
    ) -> tuple[list[Any], Taps]:
        region = jaxprs.read_shard_map(eqn)
        every = tuple(a for a in region.mesh.axis_names if a in region.axis_names)

        axes = {
            place: [
                every if not region.check_vma else _ordered(jaxprs.vma(atom), every)
                for atom in self.chosen[place].invars
            ]
            for place in self._inside(here)
        }

        def body(*args: Any) -> tuple[list[Any], Taps]:
            results, seen = self.run(region.body, list(args), (*here, 0))
            return results, {
                place: Samples(
                    _spread(samples.reached, every),
                    _spread(samples.iteration, every),
                    list(map(_spread, samples.operands, axes[place])),
                )
                for place, samples in seen.items()
            }

        def spec(names: tuple[Any, ...]) -> Any:
            return PartitionSpec(None, names or None)

        return jax.shard_map(
            body,
            mesh=region.mesh,
            in_specs=tuple(region.in_specs),
            out_specs=(
                list(region.out_specs),
                {
                    place: Samples(spec(every), spec(every), list(map(spec, names)))
                    for place, names in axes.items()
                },
            ),
            axis_names=region.axis_names,
            check_vma=region.check_vma,
        )(*operands)


def _one_sample(operands: list[Any]) -> Samples:
    typed = [
        (value if isinstance(value, jax.Array) else jnp.asarray(value))[None]
        for value in operands
    ]
    return Samples(jnp.array([True]), jnp.array([-1]), typed)


def _ordered(names: frozenset[Any], every: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(name for name in every if name in names)


def _spread(value: Any, axes: tuple[Any, ...]) -> Any:
    """Gives a value inside of a region an axis for the devices that it varies over."""
    missing = _ordered(frozenset(axes) - jaxprs.vma(value), axes)
    if missing:
        value = lax.pcast(value, missing, to="varying")
    return value[:, None]


def _at(i: Any, taps: Taps, reached: Any = True) -> Taps:
    """Marks samples with the turn of the loop that they come from."""
    return {
        place: Samples(
            jnp.logical_and(samples.reached, reached),
            jnp.full_like(samples.iteration, i),
            samples.operands,
        )
        for place, samples in taps.items()
    }


def _pick(condition: Any, new: Taps, old: Taps) -> Taps:
    return jax.tree_util.tree_map(lambda n, o: jnp.where(condition, n, o), new, old)


def _join(slots: Sequence[Taps]) -> Taps:
    return jax.tree_util.tree_map(lambda *each: jnp.concatenate(each), *slots)


def _nothing(shapes: Any) -> Taps:
    """Returns samples that were not reached, for a branch that was not taken."""
    return jax.tree_util.tree_map(_blank, shapes)


def _blank(aval: Any) -> Any:
    if not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.prng_key):
        return jnp.zeros(aval.shape, aval.dtype)
    key = jax.random.key(0, impl=jax.random.key_impl(aval))
    return jnp.broadcast_to(key, aval.shape)
