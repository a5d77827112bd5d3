"""Times gradtest beside `jax.test_util.check_grads`: `python -m benchmarks.speed`.

Every first call is made in a fresh process, after the model is built, so that it pays
for tracing and compiling but not for imports. The least of several runs counts.
"""

import argparse
import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
from jax.test_util import check_grads

import gradtest
from benchmarks import models
from tests.single_ops import SINGLE_OPS

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_OP_TOOLS = ("gradtest", "check_grads")
_RULE_TOOLS = {
    "main": "assert_autodiff_matches",
    "rules": "assert_custom_rules_match",
}
_POINTS = ("ordinary point", "hazards")
_MODEL_TOOLS = (*_OP_TOOLS, "check_grads_jit")

Measurements = dict[str, float]
PyTree = Any


def _timed(call: Callable[[], Any]) -> tuple[float, bool]:
    """Returns the seconds that `call` took, and whether it found a gradient wrong."""
    refused = False
    start = time.perf_counter()
    try:
        call()
    except AssertionError:
        refused = True
    return time.perf_counter() - start, refused


class _CompilationCounter:
    """Counts what XLA compiles from when it is made."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, *_: Any, **__: Any) -> None:
        self.count += event == _COMPILE_EVENT


def _model_checker(tool: str, loss: models.Loss, tokens: jax.Array) -> Callable:
    """Returns the function that checks `loss` at given parameters with `tool`."""
    if tool == "gradtest":
        return lambda params: gradtest.assert_autodiff_matches(loss, params, tokens)
    if tool == "check_grads_jit":
        loss = jax.jit(loss)

    def of_params(params: PyTree) -> jax.Array:
        return loss(params, tokens)

    return lambda params: check_grads(of_params, (params,), order=1, modes=["rev"])


def _measure_model(tool: str, size: str) -> Measurements:
    """Times a first check of the transformer, and a repeated one at another point."""
    loss, params, tokens = models.transformer(size)
    points = jax.block_until_ready((params, models.another_point(params)))
    check = _model_checker(tool, loss, tokens)
    counter = _CompilationCounter()
    first, first_refused = _timed(functools.partial(check, points[0]))
    first_count = counter.count
    repeated, repeated_refused = _timed(functools.partial(check, points[1]))
    return {
        "first": first,
        "repeated": repeated,
        "refused": first_refused + repeated_refused,
        "first_compilations": first_count,
        "repeated_compilations": counter.count - first_count,
    }


def _measure_rules(tool: str, size: str) -> Measurements:
    """Times the first call on a loss with a custom_vjp twice in each block."""
    loss, params, tokens = models.transformer(size, rules=True)  # type: ignore[arg-type]
    assertion = {
        "main": gradtest.assert_autodiff_matches,
        "rules": gradtest.assert_custom_rules_match,
    }[tool]
    seconds, refused = _timed(lambda: assertion(loss, params, tokens))
    return {"first": seconds, "refused": refused}


def _measure_hazards(tool: str, size: str) -> Measurements:
    """Times the first call on the transformer, with and without special points."""
    loss, params, tokens = models.transformer(size)  # type: ignore[arg-type]
    jax.block_until_ready(params)
    hazards = tool == "hazards"
    seconds, refused = _timed(
        lambda: gradtest.assert_autodiff_matches(loss, params, tokens, hazards=hazards)
    )
    return {"first": seconds, "refused": refused}


def _op_checker(tool: str) -> Callable[..., Any]:
    if tool == "gradtest":
        return gradtest.assert_autodiff_matches
    return lambda fn, *args: check_grads(fn, args, order=1, modes=["rev"])


def _measure_ops(tool: str) -> Measurements:
    """Times one check of each of a hundred single operations."""
    check = _op_checker(tool)
    seconds, refused = 0.0, 0
    for op in SINGLE_OPS:
        args = jax.block_until_ready(jax.tree.map(jnp.asarray, op.args))
        one, is_refused = _timed(functools.partial(check, op.fn, *args))
        seconds, refused = seconds + one, refused + is_refused
    return {"first": seconds, "refused": refused}


def _trace_of_exponential(a: jax.Array) -> jax.Array:
    return jnp.trace(jax.scipy.linalg.expm(a))


def _minus_log_determinant(x: jax.Array) -> jax.Array:
    return -jnp.linalg.slogdet(x)[1]


def _fourth_power_of_norm(x: jax.Array) -> jax.Array:
    return (x @ x) ** 2


_HOMEWORK: dict[str, tuple[Callable, Callable, tuple[int, ...]]] = {
    "tr exp A": (_trace_of_exponential, lambda a: jax.scipy.linalg.expm(a.T), (20, 20)),
    "-log |det X|": (_minus_log_determinant, lambda x: -jnp.linalg.inv(x).T, (10, 10)),
    "(x'x)^2": (_fourth_power_of_norm, lambda x: 4 * (x @ x) * x, (100,)),
}


def _measure_homework(name: str, trials: str) -> Measurements:
    """Times a hand-written gradient's first check at so many random points."""
    fn, grad_fn, shape = _HOMEWORK[name]
    argument = jax.ShapeDtypeStruct(shape, jnp.float32)
    first, refused = _timed(
        lambda: gradtest.assert_grad_matches(
            fn, grad_fn, argument, trials=int(trials), inconclusive="warn"
        )
    )
    return {"first": first, "refused": refused}


_MEASURES: dict[str, Callable[..., Measurements]] = {
    "model": _measure_model,
    "rules": _measure_rules,
    "hazards": _measure_hazards,
    "ops": _measure_ops,
    "homework": _measure_homework,
}


def _fresh(repeats: int, *arguments: str) -> Measurements:
    """Measures in fresh processes and returns the least of each number."""
    command = [sys.executable, "-m", "benchmarks.speed", "--measure", *arguments]
    runs = []
    for _ in range(repeats):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: min(run[name] for run in runs) for name in runs[0]}


def _row(label: str, *cells: float | str) -> None:
    shown = [f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in cells]
    print(f"{label:<32}" + "".join(f"{cell:>14}" for cell in shown), flush=True)


def _report_model(repeats: int, size: str) -> None:
    results = {tool: _fresh(repeats, "model", tool, size) for tool in _MODEL_TOOLS}
    _row(f"transformer, {size}", "first (s)", "repeated (s)", "compiled", "refused")
    for tool, found in results.items():
        compiled = f"{found['first_compilations']}+{found['repeated_compilations']}"
        _row(tool, found["first"], found["repeated"], compiled, found["refused"])
    ours = results.pop("gradtest")
    for tool, theirs in results.items():
        ratios = [ours[name] / theirs[name] for name in ("first", "repeated")]
        _row(f"gradtest / {tool}", *ratios)
    print()


def _report_rules(repeats: int, size: str) -> None:
    results = {tool: _fresh(repeats, "rules", tool, size) for tool in _RULE_TOOLS}
    _row(f"transformer with rules, {size}", "first (s)", "refused")
    for tool, found in results.items():
        _row(_RULE_TOOLS[tool], found["first"], found["refused"])
    _row("ratio", results["rules"]["first"] / results["main"]["first"])
    print()


def _report_hazards(repeats: int, size: str) -> None:
    results = {tool: _fresh(repeats, "hazards", tool, size) for tool in _POINTS}
    _row(f"transformer, {size}", "first (s)", "refused")
    for tool, found in results.items():
        _row(tool, found["first"], found["refused"])
    plain, hazards = (results[tool]["first"] for tool in _POINTS)
    _row("ratio", hazards / plain)
    print()


def _report_ops(repeats: int) -> None:
    _row("100 single operations", "all (s)", "refused")
    results = {tool: _fresh(repeats, "ops", tool) for tool in _OP_TOOLS}
    for tool, found in results.items():
        _row(tool, found["first"], found["refused"])
    ours, theirs = (results[tool]["first"] for tool in _OP_TOOLS)
    _row("gradtest / check_grads", ours / theirs)
    print()


def _report_homework(repeats: int) -> None:
    _row("homework, gradtest", "1 trial (s)", "20 trials (s)", "ratio", "refused")
    for name in _HOMEWORK:
        one, many = (_fresh(repeats, "homework", name, n) for n in ("1", "20"))
        ratio = many["first"] / one["first"]
        refused = one["refused"] + many["refused"]
        _row(name, one["first"], many["first"], ratio, refused)


def main() -> None:
    """Prints the tables, or measures one entry of them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each entry")
    parser.add_argument(
        "--only",
        choices=["model", "rules", "hazards", "ops", "homework"],
        help="print one table",
    )
    parser.add_argument("--size", choices=["650k", "11m"], default="650k")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        kind, *arguments = options.measure
        print(json.dumps(_MEASURES[kind](*arguments)))
        return
    if options.only in (None, "model"):
        _report_model(options.repeats, options.size)
    if options.only in (None, "rules"):
        _report_rules(options.repeats, options.size)
    if options.only in (None, "hazards"):
        _report_hazards(options.repeats, options.size)
    if options.only in (None, "ops"):
        _report_ops(options.repeats)
    if options.only in (None, "homework"):
        _report_homework(options.repeats)


if __name__ == "__main__":
    main()
