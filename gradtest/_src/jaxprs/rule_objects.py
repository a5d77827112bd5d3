"""Users' rule objects, as `jax.custom_vjp` and `jax.custom_jvp` make them.

A rule object looks up its hand-written parts at each call: to replace one is to set an
attribute. What has been traced before keeps the old one, so JAX's caches are cleared.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import os
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax

# Neither module is public: nothing else keeps a wrapper's frames from users' eyes.
from jax._src import source_info_util, traceback_util

from gradtest._src.jaxprs.lines import folders_of

PyTree = Any
_PARTS = {"custom_vjp": ("fwd", "bwd"), "custom_jvp": ("jvp",)}
# Attributes that say how `custom_vjp` of newer versions is differentiated otherwise.
_OTHER_FORMS = ("with_accums", "with_logs", "remat_rules")
_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "chex", "numpy", "gradtest")
_DEPTH = 5

source_info_util.register_exclusion(__file__)
traceback_util.register_exclusion(__file__)


def _classes() -> dict[type, str]:
    """Returns the classes of rule objects, with their kind."""
    found: dict[type, str] = {
        jax.custom_vjp: "custom_vjp",
        jax.custom_jvp: "custom_jvp",
    }
    # What `jax.custom_vjp` makes where the flag `jax_custom_vjp3` is on.
    hijax = sys.modules.get("jax._src.hijax")
    newer = getattr(hijax, "custom_vjp3", None)
    return found | ({newer: "custom_vjp"} if isinstance(newer, type) else {})


def kind_of(candidate: Any) -> str | None:
    """Returns "custom_vjp" or "custom_jvp" for a rule object, None for all else."""
    return _classes().get(type(candidate))


def function_of(rule: Any) -> Callable[..., Any]:
    """Returns the function that has the rule."""
    held: Callable[..., Any] = vars(rule).get("fun") or vars(rule)["f"]
    return held


def parts_of(rule: Any) -> dict[str, Callable[..., Any]]:
    """Returns the hand-written parts that a rule object has, by name."""
    names = _PARTS[_classes()[type(rule)]]
    return {name: vars(rule)[name] for name in names if vars(rule).get(name)}


def trouble_with(rule: Any) -> str:
    """Says why the parts of a rule can't be replaced; empty where they can."""
    if not parts_of(rule):
        return "it has no derivative yet"
    for form in _OTHER_FORMS:
        if getattr(rule, form, None):
            return f"it is of another form ({form})"
    return ""


# --- a rule's call ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class RuleArguments:
    """The arguments of one call, arrays as shapes and dtypes.

    Attributes:
      whole: All arguments, in their places.
      static: Which of them JAX hands over as they are (`nondiff_argnums`).
      names: A name for each leaf of the others.
      text: What tells calls apart.
    """

    whole: tuple[PyTree, ...]
    static: tuple[int, ...]
    names: tuple[str, ...]
    text: str

    @property
    def moving(self) -> tuple[PyTree, ...]:
        """The arguments that JAX differentiates by."""
        return tuple(a for i, a in enumerate(self.whole) if i not in self.static)

    def placed(self, moving: tuple[PyTree, ...]) -> tuple[PyTree, ...]:
        """Returns all arguments, with others in place of the moving ones."""
        rest = iter(moving)
        return tuple(
            a if i in self.static else next(rest) for i, a in enumerate(self.whole)
        )


def arguments_of(rule: Any, args: Any, kwargs: Any) -> RuleArguments:
    """Reads the arguments of a call of a rule object.

    Raises:
      TypeError: They don't fit its function.
    """
    held = vars(rule)
    static = tuple(held.get("nondiff_argnums") or held.get("static_argnums") or ())
    bound = inspect.signature(function_of(rule)).bind(*args, **kwargs)
    bound.apply_defaults()
    whole = tuple(
        a if i in static else jax.tree_util.tree_map(_type_of, a)
        for i, a in enumerate(bound.args)
    )
    names = _names_of(bound, len(whole))
    moving = {names[i]: a for i, a in enumerate(whole) if i not in static}
    leaves = jax.tree_util.tree_flatten_with_path(list(moving.values()))[0]
    shown = [
        list(moving)[path[0].idx] + jax.tree_util.keystr(path[1:])
        for path, _ in leaves
        if isinstance(path[0], jax.tree_util.SequenceKey)
    ]
    text = f"{moving} {[repr(whole[i]) for i in static]}"
    return RuleArguments(whole, static, tuple(shown), text)


def _names_of(bound: inspect.BoundArguments, count: int) -> list[str]:
    names: list[str] = []
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            names += [f"{name}[{i}]" for i in range(len(value))]
        else:
            names.append(name)
    return names[:count]


def _type_of(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct | bool | int):
        return leaf
    try:
        aval = jax.typeof(leaf)
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    except Exception:  # it is no array
        return leaf


def with_perturbed(leaf: Any) -> Any:
    """Wraps a leaf as a `fwd` with `symbolic_zeros=True` wants it."""
    return jax.custom_derivatives.CustomVJPPrimal(leaf, True)


def wants_symbolic_zeros(rule: Any) -> bool:
    """Whether a rule sees which inputs and outputs take no part."""
    return bool(vars(rule).get("symbolic_zeros") or vars(rule).get("symz"))


# --- watching and replacing ---------------------------------------------------------


@contextlib.contextmanager
def calls_told(note: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    """Calls `note(rule, args, kwargs)` before each call of any rule object inside."""
    original = {kind: vars(kind)["__call__"] for kind in _classes()}
    running: list[Any] = []

    def telling(call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
            function = function_of(self)
            # JAX may make another object of the same function while one is called.
            if not any(function is other for other in running):
                note(self, args, kwargs)
            running.append(function)
            try:
                return call(self, *args, **kwargs)
            finally:
                running.pop()

        return __call__

    try:
        for kind, call in original.items():
            kind.__call__ = telling(call)  # type: ignore[method-assign]
        yield
    finally:
        for kind, call in original.items():
            kind.__call__ = call  # type: ignore[method-assign]


@contextlib.contextmanager
def parts_replaced(
    rules: list[Any], replace: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replaces each part of some rule objects by `replace(name, part)` inside.

    JAX's caches are cleared before and after.
    """
    saved = [(rule, parts_of(rule)) for rule in rules]
    try:
        for rule, parts in saved:
            for name, part in parts.items():
                setattr(rule, name, replace(name, part))
        clear_caches()
        yield
    finally:
        for rule, parts in saved:
            for name, part in parts.items():
                setattr(rule, name, part)
        clear_caches()


def clear_caches() -> None:
    """Makes JAX forget what it has traced and compiled."""
    jax.clear_caches()
    chex = sys.modules.get("chex")
    if chex is not None:  # else `chex.assert_max_traces` counts what we have cleared
        chex.clear_trace_counter()


# --- where rules were written -------------------------------------------------------


def is_users_file(path: str) -> bool:
    """Whether a file is neither installed nor part of Python."""
    if not path or path.startswith("<frozen"):
        return False
    parts = path.split(os.sep)
    if any(part.endswith("-packages") for part in parts):
        return False
    standard = sysconfig.get_path("stdlib")
    return not path.startswith((standard + os.sep, *folders_of(_LIBRARIES)))


def author_of(function: Any, wanted: Callable[[str], bool]) -> Any:
    """Returns the function whose file is wanted: itself, or one that it wraps."""
    seen: set[int] = set()
    level = [function]
    for _ in range(_DEPTH):
        following: list[Any] = []
        for item in level:
            if id(item) in seen:
                continue
            seen.add(id(item))
            code = getattr(item, "__code__", None)
            if isinstance(code, types.CodeType) and wanted(code.co_filename):
                return item
            following += _held_by(item)
        level = following
    return None


def _held_by(item: Any) -> list[Any]:
    held = [getattr(item, "__wrapped__", None), getattr(item, "func", None)]
    if inspect.isfunction(item):
        for cell in item.__closure__ or ():
            with contextlib.suppress(ValueError):  # a cell that is not filled yet
                held.append(cell.cell_contents)
    elif callable(item) and hasattr(item, "__dict__"):
        held += vars(item).values()
    return [each for each in held if callable(each)]


def rules_of_module(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Yields the rule objects of a module and of its classes, with their names."""
    for name, value in list(vars(module).items()):
        yield from _rules_named(name, value)
        if inspect.isclass(value) and value.__module__ == module.__name__:
            for inner, held in list(vars(value).items()):
                yield from _rules_named(f"{name}.{inner}", held)


def _rules_named(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    for _ in range(_DEPTH):
        if kind_of(value):
            yield name, value
            return
        held = getattr(value, "__dict__", {})
        # nnx keeps JAX's rule object in its own.
        inner = held.get("custom_vjp_fn") or held.get("__wrapped__")
        if isinstance(value, functools.partial):
            inner = value.func
        elif isinstance(value, staticmethod | classmethod):
            inner = value.__func__
        if inner is None:
            return
        value = inner
