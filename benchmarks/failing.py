"""What a failing assertion costs beside a passing one: python -m benchmarks.failing.

The subject is the transformer of 650k parameters, in three forms: a wrong scale in the
custom_vjp of its norms; the same audited as a rule; a hand-written gradient with one
leaf wrong. Each call runs in a process of its own, first calls and repeated ones apart.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import gradtest
from benchmarks import models

_FORMS = ("whole", "rules", "hand-written")


def _break_the_norm() -> None:
    def bwd(kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array]:
        dx, d_scale = models._rms_norm_bwd(kept, g)
        return dx, 2 * d_scale

    models.rms_norm.defvjp(models._rms_norm_fwd, bwd)


def _call(form: str, wrong: bool) -> Callable[[Any], Any]:
    if wrong and form != "hand-written":
        _break_the_norm()
    loss, _, tokens = models.transformer(rules=True)
    if form == "whole":
        return lambda params: gradtest.assert_autodiff_matches(loss, params, tokens)
    if form == "rules":
        return lambda params: gradtest.assert_custom_rules_match(loss, params, tokens)

    def gradient(params: Any, tokens: jax.Array) -> Any:
        found = jax.grad(loss)(params, tokens)
        if wrong:
            inner = found["params"]["Dense_0"]
            inner["kernel"] = jnp.sqrt(2.0) * inner["kernel"]
        return found

    return lambda params: gradtest.assert_grad_matches(loss, gradient, params, tokens)


def _measure(form: str, wrong: bool) -> dict[str, Any]:
    call = _call(form, wrong)
    _, params, _ = models.transformer(rules=True)
    seconds = []
    refused = 0
    for point in (params, models.another_point(params)):
        started = time.perf_counter()
        try:
            call(point)
        except gradtest.GradientMismatch:
            refused += 1
        seconds.append(time.perf_counter() - started)
    return {"first": seconds[0], "repeated": seconds[1], "refused": refused}


def _fresh(form: str, wrong: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.failing", "--form", form]
    command += ["--wrong"] * wrong
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def main() -> None:
    """Prints a table, or with `--form` one measurement as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", choices=_FORMS)
    parser.add_argument("--wrong", action="store_true")
    options = parser.parse_args()
    if options.form:
        print(json.dumps(_measure(options.form, options.wrong)))
        return
    print(f"{'':16s}{'passing':>20s}{'failing':>20s}{'ratio':>16s}")
    for form in _FORMS:
        right, wrong = _fresh(form, False), _fresh(form, True)
        assert (right["refused"], wrong["refused"]) == (0, 2)
        for call in ("first", "repeated"):
            ratio = wrong[call] / right[call]
            print(
                f"{form + ', ' + call:24s}{right[call]:10.2f} s"
                f"{wrong[call]:18.2f} s{ratio:16.1f}"
            )


if __name__ == "__main__":
    main()
