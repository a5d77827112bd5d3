"""Reports as JSON and back: every record field by field, nothing derived but a message.

NaN and the infinities, which JSON lacks, are the strings "NaN", "Infinity" and
"-Infinity"; a complex number is {"real": ..., "imag": ...}. Arrays are not told.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import math
import numbers
import types
import typing
from collections.abc import Mapping
from typing import Any

from gradtest._src.findings import Report

FORMAT = "gradtest report"
SCHEMA = 1
# What a number may be that JSON has no number for.
NAMED_NUMBERS = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def to_json(report: Report, message: str, indent: int | None = None) -> str:
    """Returns strict JSON of a report, which `from_json` reads.

    Args:
      report: The report.
      message: Its short text, for readers that only pass it on.
      indent: Spaces for each level; None puts all on one line.
    """
    told = {"format": FORMAT, "schema": SCHEMA, "message": message}
    told |= encoded(report)
    return json.dumps(told, indent=indent, allow_nan=False)


def from_json(text: str | bytes) -> Report:
    """Returns the report that was written; it has no exhibits and no inputs.

    Raises:
      TypeError: `text` is no text.
      ValueError: It is not JSON, no report, or one of a newer schema.
    """
    if not isinstance(text, (str, bytes, bytearray)):
        raise TypeError(
            f"`text` must be a str of JSON, got {type(text).__name__}; to read a file: "
            "Report.from_json(pathlib.Path(name).read_text())."
        )
    try:
        told = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`text` is not JSON: {error}") from None
    if not isinstance(told, dict) or told.get("format") != FORMAT:
        raise ValueError(
            f'`text` is no gradtest report: it lacks "format": "{FORMAT}". '
            "`report.to_json()` writes one."
        )
    schema = told.get("schema")
    if type(schema) is not int or schema < 1:
        raise ValueError(f"`text` must have a whole number as schema, got {schema!r}.")
    if schema > SCHEMA:
        raise ValueError(
            f"`text` is a report of schema {schema}, this gradtest reads up to "
            f"{SCHEMA}: install a newer one."
        )
    return typing.cast(Report, _decoded(Report, told, ""))


def same(one: Report, other: Report) -> bool:
    """Whether two reports say the same; NaN says the same as NaN."""
    return encoded(one) == encoded(other)


def encoded(value: Any) -> Any:
    """Returns a record, or a part of one, as values that JSON has."""
    if dataclasses.is_dataclass(value):
        return {
            name: encoded(getattr(value, name))
            for name, _ in told_fields(typing.cast(type, type(value)))
        }
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (tuple, list)):
        return [encoded(item) for item in value]
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return _number(float(value))
    if isinstance(value, numbers.Complex):
        number = complex(value)
        return {"real": _number(number.real), "imag": _number(number.imag)}
    if hasattr(value, "item"):  # a scalar array, or a NumPy scalar of another library
        return encoded(value.item())
    raise TypeError(f"a report can't tell {value!r} in JSON.")


@functools.cache
def told_fields(kind: type) -> tuple[tuple[str, Any], ...]:
    """Returns name and type of the fields of a record that JSON tells."""
    hints = typing.get_type_hints(kind)
    return tuple(
        (field.name, hints[field.name])
        for field in dataclasses.fields(kind)
        if field.compare
    )


def _number(number: float) -> float | str:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON; write it as a string")


def _decoded(hint: Any, value: Any, place: str) -> Any:
    """Returns what `encoded` was given, of the type that a field has."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        if value is None:
            return None
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    if dataclasses.is_dataclass(hint):
        return _record(typing.cast(type, hint), value, place)
    if typing.get_origin(hint) is tuple:
        return _tuple(typing.get_args(hint), value, place)
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        known = {member.value: member for member in hint}
        if not isinstance(value, str) or value not in known:
            raise _unlike(f"one of {', '.join(known)}", value, place)
        return known[value]
    if hint in (float, complex):
        return _decoded_number(value, place, real=hint is float)
    if type(value) is not hint:
        raise _unlike({str: "a string", int: "a whole number"}[hint], value, place)
    return value


def _record(kind: type, value: Any, place: str) -> Any:
    if not isinstance(value, Mapping):
        raise _unlike("an object", value, place)
    prefix = f"{place}." if place else ""
    known = {
        name: _decoded(hint, value[name], f"{prefix}{name}")
        for name, hint in told_fields(kind)
        if name in value
    }
    for field in dataclasses.fields(kind):
        has_default = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if field.name not in known and not has_default:
            raise ValueError(f"`text` lacks {prefix}{field.name}.")
    return kind(**known)


def _tuple(items: tuple[Any, ...], value: Any, place: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _unlike("a list", value, place)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise _unlike(f"a list of {len(items)}", value, place)
    pairs = enumerate(zip(items, value, strict=True))
    return tuple(_decoded(hint, item, f"{place}[{i}]") for i, (hint, item) in pairs)


def _decoded_number(value: Any, place: str, *, real: bool) -> Any:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and value in NAMED_NUMBERS:
        return NAMED_NUMBERS[value]
    if not real and isinstance(value, Mapping) and {"real", "imag"} <= value.keys():
        parts = [
            _decoded_number(value[part], f"{place}.{part}", real=True)
            for part in ("real", "imag")
        ]
        return complex(*parts)
    raise _unlike("a number, or NaN, Infinity or -Infinity as a string", value, place)


def _unlike(wanted: str, value: Any, place: str) -> ValueError:
    got = repr(value)
    got = got if len(got) <= 80 else f"{got[:79]}…"
    return ValueError(f"`text` must have {wanted} as {place}, got {got}.")
