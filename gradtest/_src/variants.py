"""Chex: its variants, its switch, and the keywords of its assertions.

The one file that imports chex.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax

from gradtest._src import jaxprs
from gradtest._src.findings import (
    GradientInconclusive,
    GradientMismatch,
    Report,
    Verdict,
)
from gradtest._src.report import text as report_text

Variant = Callable[..., Any]

# Options that number or name the arguments of the function that is transformed.
_COUNTING = (
    "static_argnums",
    "static_argnames",
    "donate_argnums",
    "donate_argnames",
    "static_broadcasted_argnums",
    "ignore_argnums",
    "in_axes",
)
# These variants only decide where arguments live, which tracing can't see.
_PLACING = ("without_device", "with_device", "without_jit")


def apply_variant(variant: Variant, function: Callable[..., Any]) -> Any:
    """Returns `variant(function)`; a chex variant keeps every device's result."""
    _check_keywords(variant)
    if _is_chex(variant):
        return variant(function, reduce_fn=None)
    transformed = variant(function)
    if not callable(transformed):
        raise TypeError(
            "`variant` must be a transformation: it takes a function and returns one, "
            f"got {describe_variant(variant)}, which returned {transformed!r}."
        )
    return transformed


def require_transformation(
    variant: Variant, arguments: Sequence[Any], error: Exception, role: str = "variant"
) -> None:
    """Raises TypeError where a variant can't run any function of these arguments.

    Args:
      variant: The variant.
      arguments: Trees of arrays.
      error: What was raised under it.
      role: The argument of the assertion that it came as.
    """
    try:
        run = apply_variant(variant, lambda *args: jax.tree_util.tree_leaves(args))
        jax.eval_shape(run, *arguments)
    except Exception as own:
        first = (str(own).strip().splitlines() or [""])[0]
        raise TypeError(
            f"`{role}` must be a transformation that takes any function of trees of "
            "arrays and returns one of the same arguments (jax.jit, self.variant), got "
            f"{describe_variant(variant)}: under it a function that only returns its "
            f"arguments raises {type(own).__name__}: {first}"
        ) from error


def _check_keywords(variant: Variant) -> None:
    """Raises TypeError where a variant counts the arguments of the user's function."""
    while isinstance(variant, functools.partial):
        for name in _COUNTING:
            if variant.keywords.get(name) is not None:
                raise TypeError(
                    f"`variant` sets {name}, but it is applied to a function of "
                    "gradtest's own, of arrays alone: leave it out. Arguments that are "
                    "no arrays are static already, and nothing is donated."
                )
        variant = variant.func


def only_places_arguments(variant: Variant) -> bool:
    """Whether a variant leaves the program itself as it is."""
    return _is_chex(variant) and _kind(variant) in _PLACING


def describe_variant(variant: Variant) -> str:
    """Returns a short name of a variant, for reports."""
    if _is_chex(variant):
        return f"chex variant {_kind(variant)}"
    return getattr(variant, "__name__", type(variant).__name__)


def cut_notes(traced: Sequence[Any]) -> list[str]:
    """Says so where programs keep the first device's results of several.

    Args:
      traced: The jaxprs of what was checked.
    """
    count = max(jaxprs.devices_cut_to_one(jaxpr) for jaxpr in traced)
    if not count:
        return []
    return [
        f"of the results of {count} devices the first alone was seen: a function under "
        "a pmap variant has dropped the others; hand the variant over as `variant=` to "
        "have every device checked"
    ]


def _base(variant: Variant) -> Any:
    while isinstance(variant, functools.partial):
        variant = variant.func
    return variant


def _is_chex(variant: Variant) -> bool:
    base = _base(variant)
    kind = getattr(base, "type", None)
    return isinstance(kind, chex.ChexVariantType) or repr(base).startswith("chex_")


def _kind(variant: Variant) -> str:
    base = _base(variant)
    kind = getattr(base, "type", None)
    name = str(kind) if kind is not None else repr(base).removeprefix("chex_")
    return name.removeprefix("_")


class BackendRefusedError(RuntimeError):
    """`chex.restrict_backends` forbids a backend that a check has to compile for."""


@contextlib.contextmanager
def explaining_refusals(what: str, where: str) -> Iterator[None]:
    """Says what was to be compiled where `chex.restrict_backends` forbids it.

    Args:
      what: The program, as messages name it.
      where: What it has to do with that backend.

    Raises:
      BackendRefusedError: It is forbidden.
    """
    try:
        yield
    except RuntimeError as error:
        if type(error).__name__ != "RestrictedBackendError":  # private in Chex
            raise
        found = re.search(r"for (\w+) is forbidden", str(error))
        backend = found.group(1) if found else "this backend"
        raise BackendRefusedError(
            f"{what} was to be compiled for {backend} ({where}), and "
            "chex.restrict_backends() forbids that: call the assertion outside of it, "
            f"or allow {backend!r} there."
        ) from error


def asserts_are_disabled() -> bool:
    """Whether `chex.disable_asserts()` is in force: asks one that must fail."""
    try:
        chex.assert_equal(0, 1)
    except AssertionError:
        return False
    return True


# These carry the report from the start.
_OWN_KINDS = (GradientMismatch, GradientInconclusive)


@dataclasses.dataclass(frozen=True)
class MessageOptions:
    """The keywords that every Chex assertion takes."""

    custom_message: str | None = None
    custom_message_format_vars: Sequence[Any] = ()
    include_default_message: bool = True
    exception_type: type[Exception] | None = None

    def __post_init__(self) -> None:
        """Raises TypeError where `exception_type` is no exception class."""
        kind = self.exception_type
        if kind is not None and not (
            isinstance(kind, type) and issubclass(kind, Exception)
        ):
            raise TypeError(
                f"`exception_type` must be a class of exceptions, got {kind!r}."
            )
        if kind is None or issubclass(kind, _OWN_KINDS):
            return
        try:
            kind("")
        except TypeError as error:
            raise TypeError(
                "`exception_type` must be made of a message alone, but "
                f"{kind.__name__}(message) raises: {error}"
            ) from None

    def error(self, name: str, text: str, report: Report) -> Exception:
        """Returns the exception for a report that is no pass."""
        message = f"{name} failed: {text}" if self.include_default_message else text
        if self.custom_message:
            custom = self.custom_message
            if self.custom_message_format_vars:
                custom = custom.format(*self.custom_message_format_vars)
            message = report_text.capped(f"{message} [{custom}]")
        kind = self.exception_type
        if kind is not None and issubclass(kind, _OWN_KINDS):
            return kind(message, report)
        if kind is not None:
            error = kind(message)
            error.report = report  # type: ignore[attr-defined]
            return error
        if report.verdict is Verdict.FAIL:
            return GradientMismatch(message, report)
        return GradientInconclusive(message, report)
