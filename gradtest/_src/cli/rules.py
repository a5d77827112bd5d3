"""`gradtest rules`: which custom rules does a function call, and are they right?"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from gradtest._src.cli import options, output
from gradtest._src.cli.bar import shown
from gradtest._src.cli.check import report_of
from gradtest._src.cli.errors import UsageError, running_users_code
from gradtest._src.cli.expected import intentions, rule_targets
from gradtest._src.cli.subject import Subject, subject

if TYPE_CHECKING:
    from gradtest._src.findings import Report, Rule
    from gradtest._src.listing import Listing

_DESCRIPTION = """
Lists the custom rules that TARGET calls anywhere inside, yours and those of libraries,
JAX's own among them, and checks each by itself at the values that reach it, as
gradtest.assert_custom_rules_match does.
"""


def add_to(commands: Any) -> None:
    """Adds the command to the program."""
    parser = commands.add_parser(
        "rules", usage="%(prog)s TARGET [--args TARGET] [options]",
        help="which custom rules does a function call, and are they right?",
        description=_DESCRIPTION, epilog=options.EXIT_CODES, allow_abbrev=False,
    )  # fmt: skip
    options.add_target(parser)
    options.add_checking(parser, "default: 2")
    parser.add_argument(
        "--only", action="append", metavar="NAME",
        help="a rule by its name (with *), its Python module or its path in the model; "
        "repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--list", action="store_true", help="list the rules; check nothing"
    )
    options.add_output(parser)
    parser.set_defaults(run=run)


def run(chosen: argparse.Namespace) -> int:
    """Runs the command; returns the exit code."""
    if chosen.list and (chosen.html or chosen.json):
        raise UsageError("--list makes no report that --html or --json could write.")
    options.require_writable(chosen.html, chosen.json)
    with subject(chosen, rule_targets(chosen.expect_differs)) as under_test:
        listing = _listing(chosen, under_test)
        if chosen.list or not listing.rules:
            return _show_listing(listing, chosen)
        report = _audit(chosen, under_test)
        for rule in report.rules:
            output.tell(f"{_verdict(report, rule):13s} {_told(rule)}")
        output.tell()
        output.show(report, chosen)
        code = output.exit_code([report.verdict])
        output.write([report], chosen, code)
    return code


def _listing(chosen: argparse.Namespace, under_test: Subject) -> Listing:
    from gradtest._src.listing import list_rules
    from gradtest._src.options import Options

    doing = "looking for custom rules"
    options_ = Options(**options.chosen(chosen, "argnums", "key", "has_aux", "exclude"))
    with running_users_code(doing), shown(doing, chosen.quiet):
        return list_rules(under_test.fn, under_test.args, options_, chosen.only)


def _show_listing(listing: Listing, chosen: argparse.Namespace) -> int:
    for rule in listing.rules:
        output.tell(_told(rule))
    for line in listing.unreached:
        output.tell(f"not reached: {line}")
    if listing.rules:
        return output.RIGHT
    output.tell("no custom rule is called")
    return output.RIGHT if chosen.list else output.INCONCLUSIVE


def _audit(chosen: argparse.Namespace, under_test: Subject) -> Report:
    import gradtest

    keywords = options.chosen(chosen, *options.SHARED, "order", "only", "hazards")
    keywords |= intentions(under_test.others)
    return report_of(
        chosen,
        gradtest.assert_custom_rules_match,
        under_test.fn,
        *under_test.args,
        **keywords,
    )


def _verdict(report: Report, rule: Rule) -> str:
    from gradtest._src.findings import worst

    found = [f.verdict for f in report.findings if f.rule == rule]
    return worst(found).value


def _told(rule: Rule) -> str:
    """Says what a rule is, where it was written and where it is called."""
    from gradtest._src.report import rules

    return f"{rule.kind:11s} {rule.name}: {rules.whereabouts(rule)}"
