"""Which derivatives of a program a check is about, in the modes that there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from gradtest._src import claims as _claims
from gradtest._src.case import Case
from gradtest._src.claims import Claim
from gradtest._src.findings import Finding
from gradtest._src.inputs import Point
from gradtest._src.malformed import dtype_findings
from gradtest._src.options import Options
from gradtest._src.program import Program


@dataclasses.dataclass(frozen=True)
class Claims:
    """The derivatives of one program that are under test.

    Attributes:
      reverse: The reverse-mode one, if there is one.
      forward: The forward-mode one, if there is one.
      unsupported: The modes that JAX lacks, with the reason.
      beside: Judges what else must hold at a case.
    """

    reverse: Claim | None
    forward: Claim | None
    unsupported: tuple[str, ...] = ()
    beside: Callable[[Case], list[Finding]] = lambda case: []

    @property
    def modes(self) -> tuple[str, ...]:
        """The modes that are claimed."""
        pairs = (("rev", self.reverse), ("fwd", self.forward))
        return tuple(mode for mode, claim in pairs if claim is not None)


_T = TypeVar("_T")
Claiming = Callable[[Program, Point], Claims]


def autodiff_claims(options: Options) -> Claiming:
    """Returns a function that traces what JAX differentiates, in the modes it has."""

    def claims(traced: Program, point: Point) -> Claims:
        at = (traced, point, options.variant)
        found, lacking = in_each_mode(
            options.modes,
            lambda: _claims.reverse_claim(*at),
            lambda: _claims.forward_claim(*at),
        )
        return Claims(found.get("rev"), found.get("fwd"), lacking, dtype_findings)

    return claims


def in_each_mode(
    modes: Sequence[str] | None, reverse: Callable[[], _T], forward: Callable[[], _T]
) -> tuple[dict[str, _T], tuple[str, ...]]:
    """Returns what is made in each mode that JAX has here, and why it lacks others.

    Args:
      modes: The modes that are asked for; None for all that there are.
      reverse: What is done in reverse mode.
      forward: What is done in forward mode.

    Raises:
      ValueError: There is no mode, or not one that is asked for.
    """
    found: dict[str, _T] = {}
    lacking = []
    for mode, make in (("rev", reverse), ("fwd", forward)):
        if modes is not None and mode not in modes:
            continue
        try:
            found[mode] = make()
        except Exception as error:
            if not is_missing_mode(error):
                raise
            if modes is not None:
                raise ValueError(
                    f"`modes` asks for {mode!r}, which the function does not "
                    f"support: {error}"
                ) from error
            lacking.append(f"{mode}: {str(error).strip().splitlines()[0]}")
    if not found:
        raise ValueError(
            "`fn` has neither reverse-mode nor forward-mode derivatives: "
            + "; ".join(lacking)
        )
    return found, tuple(lacking)


def hand_written_claims(grad_fn: Callable[..., Any], options: Options) -> Claiming:
    """Returns a function that traces a hand-written gradient."""

    def claims(traced: Program, point: Point) -> Claims:
        traced.require_scalar(
            "`fn` must return one real number to have a gradient",
            "use assert_autodiff_matches for other functions",
        )
        argnums = options.argnums if options.argnums is not None else 0
        claim = _claims.hand_written_claim(
            traced, point, grad_fn, argnums, options.variant
        )
        return Claims(claim, None)

    return claims


def is_missing_mode(error: Exception) -> bool:
    """Whether an exception says that JAX has no such mode here; not a user's slip."""
    text = str(error)
    return isinstance(error, NotImplementedError) or any(
        phrase in text
        for phrase in (
            "Reverse-mode differentiation does not work",
            "forward-mode differentiation (jvp)",
            "no forward-mode derivative",
            "transpose_solve required",
        )
    )
