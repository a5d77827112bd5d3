"""Functions and statements in files of source: where they begin, end and return."""

from __future__ import annotations

import ast
import functools
import linecache
from collections.abc import Iterator

from gradtest._src.jaxprs import Place, RuleSource

# Longer expressions are named by their line.
_LONGEST = 40
_Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@functools.lru_cache(maxsize=64)
def _tree(path: str, text: str) -> ast.Module | None:
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError):
        return None


def _parsed(path: str) -> ast.Module | None:
    """Parses a file, or a cell of a notebook; None where it can't be read."""
    lines = linecache.getlines(path)
    return _tree(path, "".join(lines)) if lines else None


def _functions(path: str) -> Iterator[_Function]:
    tree = _parsed(path)
    for node in ast.walk(tree) if tree else ():
        if isinstance(node, _Function):
            yield node


def _first_line(node: _Function) -> int:
    """Returns the line that Python gives a function: that of its first decorator."""
    if isinstance(node, ast.Lambda):
        return node.lineno
    return min([node.lineno, *(each.lineno for each in node.decorator_list)])


def function_lines(path: str, number: int) -> range:
    """Returns the lines of the function that begins on a line; none if unknown."""
    found = [
        range(node.lineno, (node.end_lineno or node.lineno) + 1)
        for node in _functions(path)
        if number in (_first_line(node), node.lineno)
    ]
    return max(found, key=len, default=range(0))


def return_line(path: str, number: int) -> int | None:
    """Returns the line of the last `return` of the function that begins on a line."""
    for node in _functions(path):
        if number not in (_first_line(node), node.lineno):
            continue
        if isinstance(node, ast.Lambda):
            return node.body.lineno
        returns = [each.lineno for each in _own(node) if isinstance(each, ast.Return)]
        return max(returns, default=node.lineno)
    return None


def zeros_line(path: str, number: int) -> int | None:
    """Returns the last line of a function that makes zeros, before its `return`."""
    for node in _functions(path):
        if number in (_first_line(node), node.lineno):
            calls = [each for each in _own(node) if isinstance(each, ast.Call)]
            lines = [call.lineno for call in calls if _makes_zeros(call)]
            return max(lines, default=None)
    return None


def _makes_zeros(node: ast.Call) -> bool:
    name = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return "zeros" in name


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """Yields what stands in a function itself, not in those defined inside of it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _Function | ast.ClassDef):
            yield child
            yield from _own(child)


def code_at(path: str, number: int) -> str:
    """Returns a line without its indentation; empty where it can't be read."""
    return linecache.getline(path, number).strip()


def expression(place: Place) -> str:
    """Returns the expression at a place, in backquotes; or names its line."""
    line = linecache.getline(place.file, place.number).encode()
    first, last = place.column
    text = line[first:last].decode(errors="replace").strip()
    if 0 < len(text) <= _LONGEST and _is_expression(text):
        return f"`{text}`"
    return f"what line {place.number} computes"


def _is_expression(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except (SyntaxError, ValueError):
        return False
    return True


def parts(source: RuleSource) -> dict[str, list[tuple[str, int]]]:
    """Returns where a rule's hand-written functions begin, by part ("bwd", "jvp")."""
    found: dict[str, list[tuple[str, int]]] = {}
    for where in source.where[1:]:
        part, _, place = where.partition(" at ")
        path, _, number = place.rpartition(":")
        if path and number.isdigit():
            found.setdefault(part, []).append((path, int(number)))
    return found
