"""A failed check run again: by a script, with the inputs beside it."""

from __future__ import annotations

import ast
import importlib
import inspect
import keyword
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gradtest._src.findings import Report
from gradtest._src.report import legible
from gradtest._src.report.archive import packed
from gradtest._src.report.saving import written_whole

# Assertions about modules and optimisers make arguments of their own: those are saved.
_ADAPTERS = ("gradtest.flax", "gradtest.optax")
_VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS")


def save(report: Report, goal: Path) -> None:
    """Writes a report's inputs and a script that runs its check again.

    Args:
      report: What a check found.
      goal: A file that ends in ".npz": the inputs, the arrays of the leaves that did
        not pass and the report; a script `<name>_replay.py` is written beside it. Or
        one that ends in ".py": the script, with `<name>_inputs.npz` beside it where
        the report has inputs.
    """
    asked_for_arrays = goal.suffix.lower() == ".npz"
    # Named so that neither takes the place of a file that stood there before.
    archive = goal if asked_for_arrays else goal.with_name(f"{goal.stem}_inputs.npz")
    source = goal.with_name(f"{goal.stem}_replay.py") if asked_for_arrays else goal
    if asked_for_arrays or report.inputs:
        with written_whole(archive) as part, part.open("wb") as file:
            np.savez_compressed(file, **packed(report))  # type: ignore[arg-type]
    text = script(report, archive.name if report.inputs else None)
    with written_whole(source) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


def script(report: Report, inputs: str | None = None) -> str:
    """Returns a Python script that runs a check again.

    It sets the flags and XLA_FLAGS that the check ran with, and asks for what a report
    can't know: where the functions are defined and, without saved inputs, the
    arguments.

    Args:
      report: What the check found.
      inputs: Name of the .npz file beside the script that has the inputs, if any.
    """
    found, home = dict(report.environment), _home(report)
    inputs = inputs if home == "gradtest" else None
    functions, has_args = _parameters(report)
    variables = [
        f"os.environ[{name!r}] = {found[name]!r}"
        for name in _VARIABLES
        if name in found
    ]
    lines = [
        _headline(report),
        *(
            f"# {legible.printable(name)}: {legible.printable(value)}"
            for name, value in found.items()
        ),
        "",
        "import os",
        "",
        *([*variables, ""] if variables else []),
        "import jax  # after the variables: it reads them once",
        "",
        f"import {home}",
        "",
        *_flags(found),
    ]
    lines += ["# Put your own functions here, for example by importing them."]
    lines += [f"{name} = None" for name in functions]
    wanted = " or ".join(f"{name} is None" for name in functions)
    lines += [f"if {wanted}:"]
    lines += [f'    raise SystemExit("set {", ".join(functions)} in this script")']
    if has_args or inputs is not None:
        lines += _arguments(functions[0] if has_args else "", inputs)
    call = ", ".join([*functions, *(["*args"] if has_args else []), *_options(report)])
    lines += ["", f"report = {home}.{_identifier(report.assertion)}({call})"]
    lines += ["print(report)", ""]
    return "\n".join(lines)


def _home(report: Report) -> str:
    """Returns the module that the assertion is imported from."""
    home = report.replay.partition(f".{report.assertion}(")[0]
    return home if home in _ADAPTERS else "gradtest"


def _headline(report: Report) -> str:
    text = f"Replays {_home(report)}.{report.assertion}({report.subject}, ...)"
    text = f"{legible.printable(text)}: {report.verdict.value}."
    return f"# {text}"


def _identifier(name: str) -> str:
    return name if name.isidentifier() and not keyword.iskeyword(name) else "check"


def _parameters(report: Report) -> tuple[list[str], bool]:
    """Returns the assertion's functions by name, and whether `args` follow them."""
    home = importlib.import_module(_home(report))
    assertion = getattr(home, _identifier(report.assertion), None)
    if not callable(assertion):
        return ["fn"], True
    names, has_args = [], False
    for parameter in inspect.signature(assertion).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            has_args = True
        elif parameter.kind is parameter.POSITIONAL_OR_KEYWORD and (
            parameter.default is parameter.empty
        ):
            names.append(parameter.name)
    return names or ["fn"], has_args


def _flags(found: Mapping[str, str]) -> list[str]:
    """Returns lines that set JAX's flags as they were."""
    flags = {
        name: _flag(value) for name, value in found.items() if name.startswith("jax_")
    }
    if not flags:
        return []
    return [
        "flags = {",
        *(f"    {name!r}: {value!r}," for name, value in flags.items()),
        "}",
        "for name, value in flags.items():",
        "    if hasattr(jax.config, name):  # not every version of JAX has every flag",
        "        jax.config.update(name, value)",
        "",
    ]


def _flag(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def _arguments(function: str, inputs: str | None) -> list[str]:
    """Returns lines that load the inputs, and make the arguments of a function."""
    if inputs is None:
        return [
            "# The inputs were not saved: make the arguments as the check had them.",
            "args = None",
            "if args is None:",
            '    raise SystemExit("set args in this script")',
        ]
    lines = [
        f"path = os.path.join(os.path.dirname(os.path.abspath(__file__)), {inputs!r})",
        "saved = gradtest.load_inputs(path)  # saved.leaves has them by name",
    ]
    if not function:
        return lines
    return [
        *lines,
        "# Where they hold classes of your own, or lists, fill them in instead:",
        f"# args = saved.into({function}, *arguments_of_the_same_structure)",
        "args = saved.arguments()",
    ]


def _options(report: Report) -> list[str]:
    """Returns the options that the report knows and the assertion takes."""
    import gradtest

    home = importlib.import_module(_home(report))
    assertion = getattr(home, _identifier(report.assertion), gradtest.check)
    known = inspect.signature(assertion).parameters
    options = [("key", report.key)]
    if report.trials > 1:
        options.append(("trials", str(report.trials)))
    if report.order > 1:
        options.append(("order", str(report.order)))
    takes_all = any(each.kind is each.VAR_KEYWORD for each in known.values())
    return [f"{name}={text}" for name, text in options if takes_all or name in known]
