"""The schema of reports in JSON, made from the records themselves."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from typing import Any

from gradtest._src.findings import Report
from gradtest._src.report.records import FORMAT, NAMED_NUMBERS, SCHEMA, told_fields

_SIMPLE: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    int: {"type": "integer"},
    float: {"$ref": "#/$defs/number"},
    complex: {"anyOf": [{"$ref": "#/$defs/number"}, {"$ref": "#/$defs/complex"}]},
}


def schema() -> dict[str, Any]:
    """Returns a JSON Schema, draft 2020-12, of what `Report.to_json` writes."""
    number = {"anyOf": [{"type": "number"}, {"enum": list(NAMED_NUMBERS)}]}
    parts = {"real": _SIMPLE[float], "imag": _SIMPLE[float]}
    defs: dict[str, Any] = {
        "number": {"description": "A number, or the name of one JSON lacks.", **number},
        "complex": _object("A complex number.", parts, list(parts)),
    }
    top = _of_record(Report, defs)
    first = {
        "format": {"const": FORMAT},
        "schema": {"const": SCHEMA},
        "message": {"type": "string", "description": "The report in a few lines."},
    }
    required = [*first, *top["required"]]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": FORMAT,
        **_object(top["description"], {**first, **top["properties"]}, required),
        "$defs": defs,
    }


def _object(
    says: str, properties: dict[str, Any], required: list[str]
) -> dict[str, Any]:
    return {
        "description": says,
        "type": "object",
        "properties": properties,
        "required": required,
    }


def _of_record(kind: type, defs: dict[str, Any]) -> dict[str, Any]:
    """Describes a record; every field is written, so every field is required."""
    told = dict(told_fields(kind))
    says = _attributes(kind)
    properties = {}
    for name, hint in told.items():
        described = _of_hint(hint, defs)
        if name in says:
            described = {"description": says[name], **described}
        properties[name] = described
    first = (inspect.getdoc(kind) or "").splitlines()[0]
    return _object(first, properties, list(properties))


def _of_hint(hint: Any, defs: dict[str, Any]) -> dict[str, Any]:
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        some = next(h for h in arguments if h is not type(None))
        return {"anyOf": [_of_hint(some, defs), {"type": "null"}]}
    if typing.get_origin(hint) is tuple and arguments[-1] is Ellipsis:
        return {"type": "array", "items": _of_hint(arguments[0], defs)}
    if typing.get_origin(hint) is tuple:
        return {
            "type": "array",
            "prefixItems": [_of_hint(item, defs) for item in arguments],
            "items": False,
            "minItems": len(arguments),
        }
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if dataclasses.is_dataclass(hint):
        kind = typing.cast(type, hint)
        if kind.__name__ not in defs:
            defs[kind.__name__] = {}  # records may hold each other
            defs[kind.__name__] = _of_record(kind, defs)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    return dict(_SIMPLE[hint])


def _attributes(kind: type) -> dict[str, str]:
    """Reads what the docstring of a record says of its fields."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = re.findall(r"^  (\w+): (.*(?:\n {3,}.*)*)", section, flags=re.MULTILINE)
    return {name: " ".join(says.split()) for name, says in found}
