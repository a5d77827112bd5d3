"""Arguments rebuilt from the names of their leaves, such as `params['w'][0]`."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from typing import Any


def arguments_of(leaves: Mapping[str, Any]) -> tuple[Any, ...]:
    """Returns one value for each argument, in the order in which its leaves come.

    Containers become dicts, or tuples where their indices run from 0.

    Args:
      leaves: Values by the names of leaves, as JAX prints key paths.

    Raises:
      ValueError: A name is no path of keys and indices.
    """
    trees: dict[str, Any] = {}
    for name, value in leaves.items():
        root, path = _read(name)
        node = trees
        path = [root, *path]
        for step in path[:-1]:
            node = _at(node, name).setdefault(step, {})
        _at(node, name)[path[-1]] = value
    return tuple(_with_tuples(tree) for tree in trees.values())


def _at(node: Any, name: str) -> dict[Any, Any]:
    if not isinstance(node, dict):
        raise _unreadable(name)
    return node


def _read(name: str) -> tuple[str, list[Any]]:
    """Splits a leaf's name into the argument's and the keys that lead to it."""
    indexed = re.match(r"args\[\d+\]", name)
    found = indexed or re.match(r"[^\W\d]\w*", name)
    if found is None:
        raise _unreadable(name)
    try:
        node: Any = ast.parse(f"x{name[found.end() :]}", mode="eval").body
        keys: list[Any] = []
        while isinstance(node, ast.Subscript):
            keys.append(ast.literal_eval(node.slice))
            hash(keys[-1])
            node = node.value
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise _unreadable(name) from None
    if not isinstance(node, ast.Name) or node.id != "x":
        raise _unreadable(name)
    return found.group(), keys[::-1]


def _unreadable(name: str) -> ValueError:
    return ValueError(
        f"the container of {name!r} can't be rebuilt from its name: call "
        "`saved.into(fn, *args)` with arguments of the same structure."
    )


def _with_tuples(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    values = {key: _with_tuples(value) for key, value in tree.items()}
    if list(values) == list(range(len(values))):
        return tuple(values.values())
    return values
