"""Which derivatives of a program a check is about, in the modes that there are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

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


Claiming = Callable[[Program, Point], Claims]


def autodiff_claims(options: Options) -> Claiming:
    """Returns a function that traces what JAX differentiates, in the modes it has."""

    def claims(traced: Program, point: Point) -> Claims:
        found: dict[str, Claim | None] = {"rev": None, "fwd": None}
        unsupported = []
        for mode, trace in (
            ("rev", _claims.reverse_claim),
            ("fwd", _claims.forward_claim),
        ):
            if options.modes is not None and mode not in options.modes:
                continue
            try:
                found[mode] = trace(traced, point, options.variant)
            except Exception as error:
                if not is_missing_mode(error):
                    raise
                if options.modes is not None:
                    raise ValueError(
                        f"`modes` asks for {mode!r}, which the function does not "
                        f"support: {error}"
                    ) from error
                unsupported.append(f"{mode}: {str(error).strip().splitlines()[0]}")
        if not any(found.values()):
            raise ValueError(
                "`fn` has neither reverse-mode nor forward-mode derivatives: "
                + "; ".join(unsupported)
            )
        return Claims(found["rev"], found["fwd"], tuple(unsupported), dtype_findings)

    return claims


def hand_written_claims(grad_fn: Callable[..., Any], options: Options) -> Claiming:
    """Returns a function that traces a hand-written gradient."""

    def claims(traced: Program, point: Point) -> Claims:
        if not traced.is_scalar:
            described = ", ".join(
                f"{out.name}: {np.dtype(out.dtype).name}{list(out.shape)}"
                for out in traced.outputs[:4]
            )
            raise TypeError(
                "`fn` must return one real number to have a gradient, got "
                f"{described}; use assert_autodiff_matches for other functions."
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
