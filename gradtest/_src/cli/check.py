"""`gradtest check`: is the derivative of a function right?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from gradtest._src.cli import options, output
from gradtest._src.cli.bar import shown
from gradtest._src.cli.errors import UsageError, running_users_code
from gradtest._src.cli.expected import intentions, rule_targets
from gradtest._src.cli.subject import Subject, subject

if TYPE_CHECKING:
    from gradtest._src.findings import Report

_DESCRIPTION = """
Checks what JAX differentiates of TARGET, as gradtest.check does, and, where it calls
custom rules of yours, each of these by itself, as gradtest.assert_custom_rules_match
does.
"""


def add_to(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "check", usage="%(prog)s TARGET [--args TARGET] [options]",
        help="is the derivative of a function right?",
        description=_DESCRIPTION, epilog=options.EXIT_CODES, allow_abbrev=False,
    )  # fmt: skip
    options.add_target(parser)
    options.add_checking(parser, "default: 1, and 2 for custom rules")
    parser.add_argument(
        "--modes", type=options.modes, metavar="rev,fwd",
        help="the modes of differentiation (default: all that there are)",
    )  # fmt: skip
    parser.add_argument(
        "--grad", metavar="TARGET",
        help="check this hand-written gradient, called with the same arguments, as "
        "gradtest.assert_grad_matches does; and nothing else",
    )  # fmt: skip
    parser.add_argument(
        "--variants", type=options.names, metavar="all|jit,pmap,...",
        help="also check that the gradient is the same under all transformations of "
        "gradtest.assert_variants_agree, or under these",
    )  # fmt: skip
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    _refuse_beside_grad(chosen)
    options.require_writable(chosen.html, chosen.json)
    others = rule_targets(chosen.expect_differs)
    if chosen.grad is not None:
        others["--grad"] = chosen.grad
    reports: list[Report] = []
    with subject(chosen, others) as under_test:
        for report in _reports(chosen, under_test):
            output.show(report, chosen)
            reports.append(report)
        code = output.exit_code(report.verdict for report in reports)
        left_open = _not_run(chosen.variants or [], reports)
        if left_open and code == output.RIGHT:
            print(f"gradtest: not checked: {'; '.join(left_open)}", file=sys.stderr)
            code = output.INCONCLUSIVE
        output.write(reports, chosen, code)
    return code


def _not_run(variants: list[str], reports: list[Report]) -> list[str]:
    """Returns why variants that were asked for by name did not run."""
    return [
        line
        for report in reports
        for line in report.unchecked
        if line.partition(":")[0] in variants
    ]


def _refuse_beside_grad(chosen: argparse.Namespace) -> None:
    for name in ("order", "modes", "variants", "expect_differs"):
        if chosen.grad is not None and getattr(chosen, name):
            raise UsageError(
                f"--grad checks a hand-written gradient, for which there is no "
                f"--{name.replace('_', '-')}: run the command twice."
            )


def _reports(chosen: argparse.Namespace, under_test: Subject) -> Iterator[Report]:
    """Makes the reports one after the other, so that each is seen when it is there."""
    import gradtest

    _require_variants(chosen.variants)
    fn, args = under_test.fn, under_test.args
    shared = options.chosen(chosen, *options.SHARED)
    grad_fn = under_test.others.get("--grad")
    if grad_fn is not None:
        claim = (fn, grad_fn, *args)
        further = options.chosen(chosen, "hazards")
        assertion = gradtest.assert_grad_matches
        yield report_of(chosen, assertion, *claim, **shared, **further)
        return
    declared = intentions(under_test.others) | options.chosen(chosen, "hazards")
    further = declared | options.chosen(chosen, "order", "modes")
    yield report_of(chosen, gradtest.check, fn, *args, **shared, **further)
    rules = _users_rules(under_test, shared)
    if rules:
        further = declared | options.chosen(chosen, "order")
        audit = gradtest.assert_custom_rules_match
        yield report_of(chosen, audit, fn, *args, only=rules, **shared, **further)
    if chosen.variants is not None:
        agree = gradtest.assert_variants_agree
        wanted = _wanted(chosen.variants)
        yield report_of(chosen, agree, fn, *args, variants=wanted, **shared)


def _wanted(variants: list[str]) -> list[str] | None:
    return None if variants == ["all"] else variants


def _require_variants(variants: list[str] | None) -> None:
    """Raises UsageError where variants are named that there are not."""
    from gradtest._src.cells.chosen import read_choice

    if variants is not None:
        with running_users_code("reading --variants"):
            read_choice(_wanted(variants))


def _users_rules(under_test: Subject, shared: dict[str, Any]) -> list[str]:
    from gradtest._src.listing import users_rules
    from gradtest._src.options import Options

    with running_users_code("tracing the function"):
        return users_rules(under_test.fn, under_test.args, Options(**shared))


def report_of(
    chosen: argparse.Namespace, assertion: Callable[..., Report], *args: Any, **kw: Any
) -> Report:
    """Returns the report of an assertion, also of one that raises it.

    Raises:
      UsageError: The assertion refuses its arguments.
      UsersError: The function under test raised.
    """
    doing = f"{assertion.__name__}({getattr(args[0], '__name__', args[0])})"
    with running_users_code(doing), shown(doing, chosen.quiet):
        try:
            return assertion(*args, **kw)
        except AssertionError as error:
            report = getattr(error, "report", None)
            if report is None:  # an assertion of the user's
                raise
            return report
