"""`--expect-differs RULE=TARGET`: custom rules that differ on purpose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradtest._src.cli.errors import UsageError

_OPTION = "--expect-differs "


def rule_targets(texts: Sequence[str]) -> dict[str, str]:
    """Returns the TARGET of each RULE, by what it is for.

    Raises:
      UsageError: One is no RULE=TARGET.
    """
    found: dict[str, str] = {}
    for text in texts:
        rule, equals, target = text.partition("=")
        if not rule or not equals or not target:
            raise UsageError(
                f"--expect-differs must be RULE=TARGET, the name of a custom rule and "
                f"the function that it stands in for, got {text!r}."
            )
        found[_OPTION + rule] = target
    return found


def intentions(functions: dict[str, Any]) -> dict[str, Any]:
    """Returns the keyword `expect_differs` for what was loaded, if anything was."""
    found = {
        role.removeprefix(_OPTION): function
        for role, function in functions.items()
        if role.startswith(_OPTION)
    }
    return {"expect_differs": found} if found else {}
