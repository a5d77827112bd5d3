"""Which custom rules the tests of a suite reach, and with what."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from gradtest._src.jaxprs import rule_objects
from gradtest._src.jaxprs.rule_objects import RuleArguments

# At so many different arguments a rule is looked at.
_CALLS = 8
_DERIVATIVE = ("bwd", "jvp")


@dataclasses.dataclass(eq=False)
class SeenObject:
    """One rule object.

    Attributes:
      reference: The object, which may be gone.
      key: What it is called in all processes.
      kind: "custom_vjp" or "custom_jvp".
      where: Its function and its parts, each as "file:line".
      calling: The tests that call it.
      differentiating: The tests that go through its derivative.
      arguments: What it was called with, by what tells them apart.
    """

    reference: weakref.ref[Any]
    key: str
    kind: str
    where: dict[str, str]
    calling: set[str] = dataclasses.field(default_factory=set)
    differentiating: set[str] = dataclasses.field(default_factory=set)
    arguments: dict[str, RuleArguments] = dataclasses.field(default_factory=dict)


class Observer:
    """Notes the rule objects that are called, test by test.

    Attributes:
      seen: What is known of each object.
      calls: How many calls were noted.
    """

    def __init__(self, module: str):
        self._module = module
        self._test = ""
        self.calls = 0
        self.seen: list[SeenObject] = []
        self._known: dict[int, SeenObject] = {}

    def now(self, test: str) -> None:
        """Notes all that follows for this test."""
        self._test = test

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watches calls of rules, and of their parts, inside."""
        with contextlib.ExitStack() as self._stack:
            self._stack.enter_context(rule_objects.calls_told(self._note))
            yield

    def known(self, rule: Any) -> SeenObject | None:
        """Returns what is known of an object; None where it was not called."""
        known = self._known.get(id(rule))
        # Another object may have had the same place in memory.
        return known if known is not None and known.reference() is rule else None

    def _note(self, rule: Any, args: Any, kwargs: Any) -> None:
        known = self.known(rule)
        if known is None:
            key = wanted_key(rule, self._module)
            if key is None:
                return
            known = self._first_seen(rule, key)
        self.calls += 1
        known.calling.add(self._test)
        if len(known.arguments) < _CALLS:
            with contextlib.suppress(Exception):  # the call itself will tell
                found = rule_objects.arguments_of(rule, args, kwargs)
                known.arguments.setdefault(found.text, found)

    def _first_seen(self, rule: Any, key: str) -> SeenObject:
        known = SeenObject(
            weakref.ref(rule), key, str(rule_objects.kind_of(rule)), places_of(rule)
        )
        self.seen.append(known)
        self._known[id(rule)] = known
        for name in _DERIVATIVE:
            part = rule_objects.parts_of(rule).get(name)
            if part is not None:
                setattr(rule, name, self._telling(known, part))
                self._stack.callback(_put_back, weakref.ref(rule), name, part)
        return known

    def _telling(
        self, known: SeenObject, part: Callable[..., Any]
    ) -> Callable[..., Any]:
        @functools.wraps(part)
        def told(*args: Any) -> Any:
            known.differentiating.add(self._test)
            return part(*args)

        return told


def _put_back(reference: weakref.ref[Any], name: str, part: Any) -> None:
    rule = reference()
    if rule is not None:
        setattr(rule, name, part)


def wanted_key(rule: Any, module: str) -> str | None:
    """Returns what a rule is called; None where nobody asked for it.

    Args:
      rule: The rule object.
      module: A module or package; empty for all of the user's code.
    """
    function = rule_objects.function_of(rule)
    author = rule_objects.author_of(function, rule_objects.is_users_file)
    named = author if author is not None else function
    home = getattr(named, "__module__", None) or getattr(rule, "__module__", "")
    if module and not _lies_in(str(home), module):
        return None
    if not module and author is None:
        return None
    path = _attribute_of(rule, str(home))
    return f"{home}.{path or getattr(named, '__qualname__', repr(named))}"


def _lies_in(home: str, module: str) -> bool:
    return home == module or home.startswith(f"{module}.")


def _attribute_of(rule: Any, home: str) -> str:
    module = sys.modules.get(home)
    if module is not None:
        for name, held in rule_objects.rules_of_module(module):
            if held is rule:
                return name
    return ""


def rules_in_modules(module: str) -> dict[str, tuple[str, str]]:
    """Returns the kind and place of every rule at the top of an imported module."""
    found: dict[str, tuple[str, str]] = {}
    for name, held in list(sys.modules.items()):
        if not isinstance(held, types.ModuleType) or not _is_looked_at(held, module):
            continue
        for _, rule in rule_objects.rules_of_module(held):
            key = wanted_key(rule, module)
            if key is not None and not name.startswith("gradtest."):
                kind = str(rule_objects.kind_of(rule))
                found[key] = (kind, places_of(rule)["fun"])
    return found


def _is_looked_at(held: types.ModuleType, module: str) -> bool:
    if module:
        return _lies_in(held.__name__, module)
    return rule_objects.is_users_file(getattr(held, "__file__", None) or "")


def places_of(rule: Any) -> dict[str, str]:
    """Returns where the function and the parts of a rule stand, as "file:line"."""
    parts = {"fun": rule_objects.function_of(rule), **rule_objects.parts_of(rule)}
    return {name: _place(function) for name, function in parts.items()}


def _place(function: Any) -> str:
    for wanted in (rule_objects.is_users_file, bool):
        author = rule_objects.author_of(function, wanted)
        if author is not None:
            code = author.__code__
            return f"{_from_here(code.co_filename)}:{code.co_firstlineno}"
    return "?"


def _from_here(path: str) -> str:
    return path.removeprefix(os.getcwd() + os.sep)
