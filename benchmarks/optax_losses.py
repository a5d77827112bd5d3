"""The table of all of `optax.losses`: `python -m benchmarks.optax_losses`.

Each promise of a reduction is asserted; the table has the largest relative gap of a
gradient, the smallest error that would have been seen, and the time it took.
"""

import sys
import time
import warnings

import gradtest
import gradtest.optax
from tests.optax_losses import PROMISES, Promise, public_losses


def row(promise: Promise) -> tuple[str, ...]:
    """Returns a line of the table."""
    start = time.perf_counter()
    try:
        report = gradtest.optax.assert_loss_reduction(
            promise.fn, *promise.args, **promise.options
        )
    except (gradtest.GradientMismatch, gradtest.GradientInconclusive) as error:
        report = error.report  # type: ignore[attr-defined]
    gap = max(finding.size for finding in report.findings)
    return (
        f"`{promise.loss}`",
        promise.says,
        report.verdict.value,
        f"{gap:.0e}",
        f"{report.smallest_seen:.0e}",
        f"{time.perf_counter() - start:.1f} s",
    )


def main() -> int:
    """Prints the table; returns 1 where a promise is broken."""
    warnings.simplefilter("ignore", DeprecationWarning)
    print("| loss | promise | verdict | gap | would be seen | time |")
    print("| --- | --- | --- | --- | --- | --- |")
    rows = [row(promise) for promise in PROMISES]
    for cells in rows:
        print(f"| {' | '.join(cells)} |")
    names = {promise.loss for promise in PROMISES}
    print(f"{len(names)} of {len(public_losses())} losses, {len(rows)} promises")
    return int(any(cells[2] != "PASS" for cells in rows))


if __name__ == "__main__":
    sys.exit(main())
