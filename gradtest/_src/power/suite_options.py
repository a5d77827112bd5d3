"""What `--gradtest-power` and its like ask for. It imports no JAX."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

NAME = "gradtest-power"
_OPTION = f"--{NAME}"
_ALL = ""
_INI = {
    "gradtest_power": "the module or package whose rules --gradtest-power breaks where "
    "it names none (default: all rules of your code)",
    "gradtest_power_mutants": "how many mutants of each rule --gradtest-power runs",
    "gradtest_power_fail_under": "the percentage of mutants that must be caught under "
    "--gradtest-power",
}


@dataclasses.dataclass(frozen=True)
class PowerOptions:
    """What a run against mutants is to do.

    Attributes:
      module: The module or package whose rules are broken; empty for all.
      mutants: The largest number of mutants of each rule; None for all.
      least: The percentage that must be caught; None for any.
    """

    module: str = _ALL
    mutants: int | None = None
    least: float | None = None


def add_options(parser: pytest.Parser, group: pytest.OptionGroup) -> None:
    """Adds the options, and the settings of the same names."""
    group.addoption(
        _OPTION,
        nargs="?",
        const=_ALL,
        metavar="MODULE",
        help="run the tests against broken versions of your custom rules, and tell "
        "which ones they miss; of one module or package only: "
        f"{_OPTION}=MODULE",
    )
    group.addoption(
        f"{_OPTION}-mutants",
        type=int,
        metavar="N",
        help=f"{_INI['gradtest_power_mutants']} (default: all)",
    )
    group.addoption(
        f"{_OPTION}-fail-under",
        type=float,
        metavar="PERCENT",
        help=f"{_INI['gradtest_power_fail_under']} (default: any)",
    )
    for name, says in _INI.items():
        parser.addini(name, says, default="")


def read_options(config: pytest.Config) -> PowerOptions | None:
    """Returns what is asked for; None where `--gradtest-power` is not given.

    Raises:
      pytest.UsageError: An option is wrong.
    """
    module = config.getoption("gradtest_power")
    if module is None:
        _refuse_alone(config)
        return None
    _refuse_path(config, module)
    mutants = _number(config, "gradtest_power_mutants", int)
    if mutants is not None and mutants < 1:
        raise pytest.UsageError(f"{_OPTION}-mutants must be at least 1, got {mutants}")
    least = _number(config, "gradtest_power_fail_under", float)
    if least is not None and not 0 <= least <= 100:
        raise pytest.UsageError(
            f"{_OPTION}-fail-under must lie between 0 and 100, got {least:g}"
        )
    module = module or config.getini("gradtest_power")
    return PowerOptions(module, None if mutants is None else int(mutants), least)


def _refuse_path(config: pytest.Config, module: str) -> None:
    """Refuses a path that stands behind the option as if it were a module."""
    is_name = all(part.isidentifier() for part in module.split("."))
    given = list(config.invocation_params.args)
    is_apart = any(
        before == _OPTION and value == module
        for before, value in itertools.pairwise(given)
    )
    if module and (is_apart or not is_name):
        behind = " behind a space" if is_apart else ""
        meant = module if is_name else "my_package.layers"
        raise pytest.UsageError(
            f"{_OPTION} takes a module or package, got {module!r}{behind}: write "
            f"{_OPTION}={meant} for its rules, or {_OPTION} behind the paths for all "
            "rules"
        )


def _refuse_alone(config: pytest.Config) -> None:
    """Refuses options that would do nothing: no share of mutants would be asked for."""
    for name in ("mutants", "fail-under"):
        if config.getoption(f"gradtest_power_{name.replace('-', '_')}") is not None:
            raise pytest.UsageError(f"{_OPTION}-{name} needs {_OPTION}")


def _number(
    config: pytest.Config, name: str, kind: type[int] | type[float]
) -> float | None:
    given = config.getoption(name)
    if given is not None:
        return kind(given)
    setting = config.getini(name)
    if not setting:
        return None
    try:
        return kind(setting)
    except ValueError:
        raise pytest.UsageError(f"{name} must be a number, got {setting!r}") from None
