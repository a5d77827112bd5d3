"""Reads the text of an HLO module."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_OPENING, _CLOSING = "([{", ")]}"
_HEADER = re.compile(r"^(ENTRY\s+)?%?([^\s(]+)\s*(\(.*\)\s*->.*)?\{$")
_NAME = re.compile(r"%?([\w.\-]+)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
# Attributes that hold the computations of an instruction.
_CALLING = (
    "calls",
    "to_apply",
    "condition",
    "body",
    "true_computation",
    "false_computation",
    "branch_computations",
    "called_computations",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of an HLO computation.

    Attributes:
      name: Unique in its computation.
      shape: Its type, without layouts.
      opcode: What it does.
      operands: Names of instructions; the text in the brackets where they are none.
      attributes: What follows them, by name.
      is_root: Whether it is what the computation returns.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: dict[str, str]
    is_root: bool

    @property
    def scope(self) -> str:
        """The path of scopes and functions, with JAX's primitive as its last part."""
        found = _OP_NAME.search(self.attributes.get("metadata", ""))
        return re.sub(r"\\(.)", r"\1", found.group(1)) if found else ""

    def called(self, attribute: str) -> list[str]:
        """Returns the names of the computations in an attribute."""
        text = self.attributes.get(attribute, "").strip("{}")
        return [name.strip().lstrip("%") for name in text.split(",") if name.strip()]

    @property
    def all_called(self) -> list[str]:
        """The names of all computations that it calls."""
        return [name for attribute in _CALLING for name in self.called(attribute)]


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a module, and the name of the one that runs first."""

    computations: dict[str, tuple[Instruction, ...]]
    entry: str


def read_module(text: str) -> Module:
    """Reads the text of an HLO module.

    Raises:
      ValueError: It has no entry computation.
    """
    computations: dict[str, tuple[Instruction, ...]] = {}
    entry = name = ""
    found: list[Instruction] = []
    for line in _whole_lines(text):
        header = _HEADER.match(line)
        if header and " = " not in line.partition("(")[0]:
            name, found = header.group(2), []
            entry = name if header.group(1) else entry
        elif name and line.startswith("}"):
            computations[name] = tuple(found)
            name = ""
        elif name and " = " in line:
            found.append(_read_instruction(line))
    if entry not in computations:
        raise ValueError("the text of the HLO module has no entry computation.")
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Yields stripped lines; an instruction that goes over several is one."""
    held = ""
    for line in text.splitlines():
        held = f"{held} {line.strip()}".strip()
        if " = " in held and _depth(held) > 0:
            continue
        yield held
        held = ""
    if held:
        yield held


def _depth(text: str) -> int:
    return sum(
        (letter in _OPENING) - (letter in _CLOSING) for _, letter in _outside(text)
    )


def _outside(text: str) -> Iterator[tuple[int, str]]:
    """Yields the letters outside of quotes, with their places."""
    is_quoted = is_escaped = False
    for place, letter in enumerate(text):
        if is_quoted:
            is_quoted = is_escaped or letter != '"'
            is_escaped = letter == "\\" and not is_escaped
        elif letter == '"':
            is_quoted = True
        else:
            yield place, letter


def _closing(text: str, start: int) -> int:
    """Returns the place of the bracket that closes the one at `start`."""
    depth = 0
    for place, letter in _outside(text[start:]):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if depth == 0:
            return start + place
    return len(text) - 1


def _split(text: str) -> list[str]:
    """Splits at the commas that are in no bracket and no quotes."""
    parts, depth, last = [], 0, 0
    for place, letter in _outside(text):
        depth += (letter in _OPENING) - (letter in _CLOSING)
        if letter == "," and depth == 0:
            parts.append(text[last:place])
            last = place + 1
    parts.append(text[last:])
    return [part.strip() for part in parts if part.strip()]


def _read_instruction(line: str) -> Instruction:
    line = _COMMENT.sub("", line)
    is_root = line.startswith("ROOT ")
    name, _, rest = line.removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else 0
    end = rest.find(" ", end)
    shape, rest = rest[:end], rest[end + 1 :]
    opcode, _, _ = rest.partition("(")
    close = _closing(rest, len(opcode)) if "(" in rest else len(rest)
    inside = rest[len(opcode) + 1 : close]
    attributes = {}
    for part in _split(rest[close + 1 :]):
        key, _, value = part.partition("=")
        attributes[key.strip()] = value.strip()
    return Instruction(
        name.strip().lstrip("%"),
        _without_layout(shape),
        opcode.strip(),
        tuple(_operand(part) for part in _split(inside)),
        attributes,
        is_root,
    )


def _operand(text: str) -> str:
    """Returns the name of an operand that may come with its type; or the text."""
    found = _NAME.search(text)
    if found and (text[: found.start()].strip() or found.group(0) == text):
        return found.group(1)
    return text


def _without_layout(shape: str) -> str:
    kept, depth = [], 0
    for letter in shape:
        depth += letter == "{"
        if depth == 0:
            kept.append(letter)
        depth -= letter == "}"
    return "".join(kept)
