"""A check traced anew in float64: the user's Python runs again."""

from __future__ import annotations

from collections.abc import Callable

import jax

from gradtest._src import jaxprs
from gradtest._src.case import Case
from gradtest._src.execution import SlipError
from gradtest._src.inputs import Inputs, Point


def retraced(
    inputs: Inputs, point: Point, make: Callable[[Inputs, Point], Case]
) -> Case | None:
    """Returns a case traced anew in float64; None where that can't be done.

    Args:
      inputs: The arguments of the check.
      point: The point to be widened.
      make: Traces everything anew, with arguments that are wider.
    """
    widened, wide = inputs.widened(point)
    try:
        case = make(widened, wide)
        if _fits_together(case):
            return case
    except SlipError:
        return None
    except TypeError:
        pass
    except Exception:  # the user's code does not work in float64
        return None
    # Functions that JAX traced in the other mode may be cached with indices of that
    # mode's integers, or whole as they were.
    jax.clear_caches()
    try:
        case = make(widened, wide)
        return case if _fits_together(case) else None
    except Exception:
        return None


def _fits_together(case: Case) -> bool:
    traces = (case.program.jaxpr, case.claim.jaxpr)
    return all(jaxprs.fits_together(jaxpr) for jaxpr in traces)
