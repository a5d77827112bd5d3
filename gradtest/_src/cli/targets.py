"""TARGETs: `file.py:name` and `package.module:name`, found, imported and put away."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from gradtest._src.cli.errors import UsageError, running_users_code

_FORM = "file.py:name or package.module:name"


@dataclasses.dataclass(frozen=True)
class Target:
    """What a TARGET names.

    Attributes:
      text: As it was written.
      place: The file or the module.
      attribute: The name in it, with dots for attributes of attributes.
      is_file: Whether `place` is a file.
    """

    text: str
    place: str
    attribute: str
    is_file: bool


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What stands at a TARGET, and what it is an attribute of."""

    target: Target
    value: Any
    owner: Any

    def function(self) -> Callable[..., Any]:
        """Returns what stands there.

        Raises:
          UsageError: It is no function.
        """
        if not callable(self.value):
            text = self.target.text
            raise UsageError(f"{text!r} is no function: it is {self.value!r:.80}.")
        return self.value


def parse(text: str, beside: Target | None = None) -> Target:
    """Reads a TARGET; nothing is imported.

    Args:
      text: `file.py:name`, `package.module:name`, or `:name` for one beside another.
      beside: The other TARGET.

    Raises:
      UsageError: It is no TARGET, or there is no such file.
    """
    place, colon, attribute = text.rpartition(":")
    if colon and not place and beside is not None:
        place = beside.place
    if not colon or not place or not attribute:
        raise UsageError(f"TARGET must be {_FORM}, got {text!r}.{_what_lacks(text)}")
    if place.endswith(":") and not place[:-1].endswith(":"):
        fixed = f"{place[:-1]}:{attribute}"
        raise UsageError(f"TARGET has one colon, got {text!r}: write {fixed!r}.")
    if not all(part.isidentifier() for part in attribute.split(".")):
        raise UsageError(
            f"TARGET must end in a name behind the colon, {_FORM}, got {text!r}."
            f"{_what_lacks(text)}"
        )
    is_file = place.endswith(".py") or os.path.basename(place) != place
    if is_file:
        _require_file(place)
    elif not all(part.isidentifier() for part in place.split(".")):
        raise UsageError(
            f"{place!r} is neither a file that ends in .py nor a module's name; TARGET "
            f"must be {_FORM}, got {text!r}."
        )
    return Target(text, place, attribute, is_file)


def _what_lacks(text: str) -> str:
    if text.endswith(".py") or os.path.isfile(text):
        return f" Which function of the file? Write {text + ':name'!r}."
    module, _, name = text.rpartition(".")
    if ":" not in text and module and name.isidentifier():
        return f" Did you mean {f'{module}:{name}'!r}?"
    return ""


def _require_file(path: str) -> None:
    if os.path.isfile(path):
        if path.endswith(".py"):
            return
        raise UsageError(f"{path!r} is no Python file: its name must end in .py.")
    if os.path.isdir(path):
        raise UsageError(f"{path!r} is a folder; TARGET must be {_FORM}.")
    folder = os.path.dirname(path) or os.curdir
    if not os.path.isdir(folder):
        raise UsageError(f"there is no folder {folder!r}, and so no file {path!r}.")
    files = [name for name in os.listdir(folder) if name.endswith(".py")]
    near = difflib.get_close_matches(os.path.basename(path), files)
    near = [os.path.join(os.path.dirname(path), name) for name in near]
    raise UsageError(f"there is no file {path!r}.{_did_you_mean(near)}")


def _did_you_mean(near: list[str]) -> str:
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


# --- importing -----------------------------------------------------------------------


class Importer:
    """Imports TARGETs, each file once; `importing` makes one."""

    def __init__(self, leave: contextlib.ExitStack):
        self._leave = leave
        self._modules: dict[str, types.ModuleType] = {}

    def load(self, target: Target) -> Loaded:
        """Imports a TARGET.

        Raises:
          UsageError: There is no such module, or no such name in it.
          UsersError: The module can't be imported.
        """
        module = self._file(target) if target.is_file else self._module(target)
        owner, value = None, module
        for name in target.attribute.split("."):
            owner = value
            with running_users_code(f"reading {target.text!r}"):
                if not hasattr(owner, name):
                    raise UsageError(_missing(target, owner, name))
                value = getattr(owner, name)
        return Loaded(target, value, owner)

    def _module(self, target: Target) -> types.ModuleType:
        with running_users_code(f"importing {target.place!r}"):
            try:
                return importlib.import_module(target.place)
            except ModuleNotFoundError as error:
                missing = error.name or ""
                if target.place != missing and not target.place.startswith(
                    missing + "."
                ):
                    raise
        raise UsageError(_no_module(target.place, missing))

    def _file(self, target: Target) -> types.ModuleType:
        path = os.path.realpath(target.place)
        if path not in self._modules:
            root, name = _package_of(path)
            self._leave.enter_context(_in_front_of_path(root))
            with running_users_code(f"importing {target.place!r}"):
                if "." in name:
                    module = _of_package(path, name)
                else:
                    module = self._leave.enter_context(_alone(path, name))
            self._modules[path] = module
        return self._modules[path]


@contextlib.contextmanager
def importing() -> Iterator[Importer]:
    """Gives an importer for a `with` block, inside of which what it loads can run.

    The working directory and the folders of files are on `sys.path` in the block, and
    `sys.argv` has no arguments, as the command line is not the user's. Files are no
    longer among `sys.modules` after it.
    """
    with contextlib.ExitStack() as leave:
        leave.enter_context(_in_front_of_path(os.getcwd()))
        leave.enter_context(_without_arguments())
        yield Importer(leave)


@contextlib.contextmanager
def _in_front_of_path(folder: str) -> Iterator[None]:
    before = list(sys.path)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _without_arguments() -> Iterator[None]:
    before = sys.argv
    sys.argv = before[:1] or ["gradtest"]
    try:
        yield
    finally:
        sys.argv = before


def _package_of(path: str) -> tuple[str, str]:
    """Returns the folder that a file is imported from, and its name there."""
    folder, name = os.path.split(path.removesuffix(".py"))
    while os.path.isfile(os.path.join(folder, "__init__.py")):
        folder, package = os.path.split(folder)
        name = f"{package}.{name}"
    return folder, name


def _of_package(path: str, name: str) -> types.ModuleType:
    module = importlib.import_module(name.removesuffix(".__init__"))
    found = getattr(module, "__file__", None)
    if found is None or not os.path.samefile(found, path):
        raise UsageError(
            f"{path!r} is the module {name!r}, but that is imported from {found!r}: "
            "give another name to one of the two packages."
        )
    return module


class _SourceLoader(importlib.machinery.SourceFileLoader):
    """Loads a file, and writes nothing beside it."""

    def set_data(self, *args: Any, **options: Any) -> None:
        """Keeps the compiled form of the file to itself."""


@contextlib.contextmanager
def _alone(path: str, name: str) -> Iterator[types.ModuleType]:
    """Imports a file that is in no package, for as long as the block lasts."""
    if name in sys.modules or name in sys.stdlib_module_names:
        name = f"{name} at {path}"  # others may still want the module of that name
    loader = _SourceLoader(name, path)
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        loader.exec_module(module)
        yield module
    finally:
        sys.modules.pop(name, None)


# --- what is missing -----------------------------------------------------------------


def _missing(target: Target, owner: Any, name: str) -> str:
    where = target.place if isinstance(owner, types.ModuleType) else owner
    names = [each for each in dir(owner) if not each.startswith("_")]
    near = difflib.get_close_matches(name, names)
    if near:
        return f"{target.text!r}: there is no {name!r} there.{_did_you_mean(near)}"
    functions = [each for each in vars(owner) if each in names] if names else []
    some = [each for each in functions if _is_function(owner, each)]
    listed = f" It has {', '.join(some[:12])}." if some else ""
    return f"{target.text!r}: {where!r} has no {name!r}.{listed}"


def _is_function(owner: Any, name: str) -> bool:
    value = vars(owner)[name]
    here = getattr(value, "__module__", None) in (None, getattr(owner, "__name__", ""))
    return callable(value) and here


def _no_module(place: str, missing: str) -> str:
    if os.path.isfile(f"{place}.py"):
        return f"there is no module {place!r}. Did you mean the file {place + '.py'!r}?"
    parent, _, last = missing.rpartition(".")
    folder = os.path.join(*parent.split(".")) if parent else os.curdir
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = [name.removesuffix(".py") for name in os.listdir(folder)]
    near = difflib.get_close_matches(last, names)
    near = [f"{parent}.{name}" if parent else name for name in near]
    return f"there is no module {missing!r}.{_did_you_mean(near)}"
