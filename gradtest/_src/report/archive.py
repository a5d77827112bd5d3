"""The inputs of a failed check, its arrays and its report, in one .npz file.

Nothing is pickled, so a file that somebody sends can be read without running anything
of theirs. Dtypes that NumPy has no name for are kept as bits.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest._src.exhibits import KeyData
from gradtest._src.findings import Exhibit, Ladder, Report, Rule
from gradtest._src.inputs import Role, read_inputs
from gradtest._src.report.trees import arguments_of

FORMAT, SCHEMA = "gradtest inputs", 1
# Python's own numbers, and how their texts are read.
_PLAIN = (bool, int, float, complex)
_NUMBERS: dict[str, Callable[[str], Any]] = {
    "bool": lambda text: text == "True",
    "int": lambda text: int(text, 0),
    "float": float,
    "complex": complex,
}
_EXHIBIT_ARRAYS = ("claimed", "true")
_LADDER_ARRAYS = ("steps", "slopes", "noise", "remainders", "true_remainders")
# What reading a file raises that is no archive, or not one of gradtest's.
_UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Saved:
    """What `load_inputs` reads from a file that `Report.save` wrote.

    Attributes:
      leaves: The leaves of the arguments by name, as they came: NumPy arrays in their
        own dtype, keys of `jax.random`, Python numbers, strings and None.
      report: The report, with its exhibits and inputs.
    """

    leaves: Mapping[str, Any]
    report: Report

    def arguments(self) -> tuple[Any, ...]:
        """Returns the arguments, rebuilt from the names of their leaves.

        Containers are dicts, where indices run from 0 tuples, whatever they were; an
        argument without any leaf is not there. `into` keeps containers of any kind.

        Raises:
          ValueError: A name has an attribute, so that its class must be known.
        """
        return arguments_of(self.leaves)

    def into(self, fn: Callable[..., Any], *args: Any) -> tuple[Any, ...]:
        """Returns `args` with the saved leaves in place of those of the same name.

        Args:
          fn: The function under test, whose parameters name the arguments.
          *args: Arguments of the structure that was checked; their values don't matter.

        Raises:
          ValueError: Another leaf is there than was saved, or one of another shape.
        """
        inputs = read_inputs(fn, args)
        known = [leaf for leaf in inputs.leaves if leaf.name in self.leaves]
        lacking = self.leaves.keys() - {leaf.name for leaf in known}
        if lacking:
            there = ", ".join(leaf.name for leaf in inputs.leaves[:8])
            raise ValueError(
                f"`args` has no leaf {min(lacking)!r}, which was saved; it has {there}."
            )
        values = []
        for leaf in inputs.leaves:
            value = self.leaves.get(leaf.name, leaf.source)
            if leaf.role is not Role.STATIC and np.shape(value) != tuple(leaf.shape):
                raise ValueError(
                    f"`args` has {leaf}, but what was saved has shape "
                    f"{list(np.shape(value))}."
                )
            values.append(value)
        filled = jax.tree_util.tree_unflatten(inputs.treedef, values)
        return tuple(filled)


def load_inputs(path: str | os.PathLike[str]) -> Saved:
    """Reads the inputs of a failed check, and its report, from an .npz file.

    Args:
      path: What `Report.save("name.npz")` wrote. Nothing in it is run.

    Returns:
      The leaves of the arguments by name, and the report.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is none of gradtest's, or one of a newer schema.

    Example:
      >>> import pathlib, tempfile
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> report = gradtest.check(jnp.sum, jnp.arange(3.0))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = report.save(pathlib.Path(folder, "sum.npz"))
      ...     gradtest.load_inputs(path).report.verdict.value
      'PASS'
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is one array")
            arrays = {name: archive[name] for name in archive.files}
        return _unpacked(arrays)
    except FileNotFoundError:
        raise
    except _UNREADABLE as error:
        raise ValueError(
            f"`path` {os.fspath(path)!r} is no file that gradtest can read: {error}."
        ) from error


def packed(report: Report) -> dict[str, np.ndarray]:
    """Returns everything as arrays with harmless names; one holds the rest as JSON."""
    arrays: dict[str, np.ndarray] = {}

    def kept(name: str, array: Any) -> dict[str, Any]:
        array = np.asarray(array)
        told: dict[str, Any] = {"array": name}
        if array.dtype.isbuiltin == 2:  # a dtype of ml_dtypes, such as bfloat16
            told |= {"dtype": array.dtype.name, "shape": list(array.shape)}
            array = np.frombuffer(array.tobytes(), np.uint8)
        arrays[name] = array
        return told

    leaves = [
        {"name": name} | _leaf(value, functools.partial(kept, f"input{i}"))
        for i, (name, value) in enumerate(report.inputs)
    ]
    exhibits = [
        _exhibit(exhibit, f"exhibit{i}", kept)
        for i, exhibit in enumerate(report.exhibits)
    ]
    index = {
        "format": FORMAT,
        "schema": SCHEMA,
        "leaves": leaves,
        "exhibits": exhibits,
        "report": report.to_json(),
    }
    # As bytes: a string array of NumPy's takes four bytes a character.
    arrays["gradtest"] = np.frombuffer(json.dumps(index).encode(), np.uint8)
    return arrays


def _leaf(value: Any, kept: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    if value is None:
        return {"kind": "None"}
    kind = type(value).__name__
    if kind in _NUMBERS and type(value) in _PLAIN:
        # As text, which holds every number: the infinite and the longest, too.
        text = hex(value) if kind == "int" else repr(value)
        return {"kind": kind, "value": text}
    if type(value) is str:
        return {"kind": kind, "value": value}
    if isinstance(value, KeyData):
        return {"kind": "key", "impl": value.impl} | kept(value.words)
    return {"kind": "array"} | kept(value)


def _exhibit(
    exhibit: Exhibit, label: str, kept: Callable[[str, Any], dict[str, Any]]
) -> dict[str, Any]:
    """Returns what JSON tells of an exhibit; its arrays are kept apart."""
    told = {
        name: getattr(exhibit, name)
        for name in ("name", "mode", "order", "of", "start", "whole")
    }
    told["rule"] = exhibit.rule and dataclasses.asdict(exhibit.rule)
    for part in _EXHIBIT_ARRAYS:
        array = getattr(exhibit, part)
        told[part] = None if array is None else kept(f"{label}_{part}", array)
    ladder = exhibit.ladder
    if ladder is not None:
        told["ladder"] = {
            part: kept(f"{label}_{part}", getattr(ladder, part))
            for part in _LADDER_ARRAYS
        } | {
            "claimed": repr(float(ladder.claimed)),
            "true": repr(float(ladder.true)),
            "measured": bool(ladder.measured),
        }
    return told


def _unpacked(arrays: Mapping[str, np.ndarray]) -> Saved:
    if "gradtest" not in arrays:
        raise ValueError("it was not written by gradtest")
    index = json.loads(arrays["gradtest"].tobytes())
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise ValueError("it was not written by gradtest")
    if index["schema"] > SCHEMA:
        raise ValueError(
            f"its schema is {index['schema']}, this gradtest reads up to {SCHEMA}: "
            "install a newer one"
        )
    pairs = tuple((told["name"], _value(told, arrays)) for told in index["leaves"])
    report = dataclasses.replace(
        Report.from_json(index["report"]),
        exhibits=tuple(_told_exhibit(told, arrays) for told in index["exhibits"]),
        inputs=pairs,
    )
    leaves = {
        name: value.key() if isinstance(value, KeyData) else value
        for name, value in pairs
    }
    return Saved(leaves, report)


def _array(told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    array = arrays[told["array"]]
    if "dtype" in told:
        dtype = jnp.dtype(told["dtype"])
        array = np.frombuffer(array.tobytes(), dtype).reshape(told["shape"]).copy()
    return array


def _value(told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Any:
    kind = told["kind"]
    if kind == "None":
        return None
    if kind == "str":
        return told["value"]
    if kind in _NUMBERS:
        return _NUMBERS[kind](told["value"])
    if kind == "key":
        return KeyData(told["impl"], _array(told, arrays))
    if kind == "array":
        return _array(told, arrays)
    raise ValueError(f"it has a leaf of an unknown kind, {kind!r}")


def _told_exhibit(told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Exhibit:
    parts = {
        part: None if told[part] is None else _array(told[part], arrays)
        for part in _EXHIBIT_ARRAYS
    }
    assert parts["claimed"] is not None
    ladder = None
    if told.get("ladder"):
        scalars = told["ladder"]
        ladder = Ladder(
            claimed=float(scalars["claimed"]),
            true=float(scalars["true"]),
            measured=scalars["measured"],
            **{part: _array(scalars[part], arrays) for part in _LADDER_ARRAYS},
        )
    return Exhibit(
        told["name"],
        parts["claimed"],
        parts["true"],
        told["mode"],
        told["order"],
        told["rule"] and _rule(told["rule"]),
        ladder,
        told["of"],
        tuple(told["start"]),
        tuple(told["whole"]),
    )


def _rule(told: Mapping[str, Any]) -> Rule:
    return Rule(**{**told, "where": tuple(told["where"])})
