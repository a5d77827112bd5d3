"""Where the mistakes of the zoo stand: the lines that differ between the twins.

A twin is made by a function of `right`; so the statements that look at `right`, or at
the name of the mistake, are those where it is planted. Where one block is run for
the right twin alone, what it lacks shows in the statement after it; where it returns,
all that follows belongs to the wrong twin.
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The entries whose line is not the planted one, and what is named instead.
NAMED_BESIDE = {
    "gated_cell_without_its_gate": "the line that adds the term which is zero",
    "log_sum_exp_with_unnormalised_weights": "the line before the one that is missing",
    "masked_mean_over_the_padded_length": "the line that divides by the count",
    "masked_mean_that_leaks_into_the_padding": "the line before, where a mask mends it",
    "routing_that_ignores_its_weights": "the line that uses the sum without the term",
    "sine_that_normalises_its_cotangent": "the line that divides by the length",
    "mean_square_with_a_half_precision_backward": "the line that casts to the dtype",
    "logarithm_whose_slope_has_a_broken_rule": "the call; the inner rule has its own",
    "softmax_with_a_batched_kernel_that_mixes_rows": "the next line of the kernel",
    "centring_with_a_batched_kernel_of_another_value": "what bwd returns",
    "cubic_with_a_warm_up": "the line that multiplies by the factor",
    "cumulative_sum_wrong_in_reverse_mode": "what jvp returns: `linear_call` hides it",
    "logarithm_that_stands_still_with_its_base": "the line that makes the zeros",
}
# The same of the bugs that really happened.
BUGS_NAMED_BESIDE = {
    "nan_through_untaken_square_root": "the line where the NaN is made",
    "smoothing_without_inverse_sigma": "the line that makes what is not divided",
    "triangular_solve_unmasked_tangent": "the line that uses what is not masked",
    "data_parallel_sum_for_mean": "the line on which devices are summed over",
}

_FLAGS = {"right", "wrong", "wrong_forwards", "reverse", "reverse_transpose"}


def planted_lines(make: Any) -> set[tuple[str, int]]:
    """Returns the planted lines of `make(right)`, as (name of the file, line)."""
    makers = [make, *_helpers(make)]
    mistake = _mistake(make)
    found: set[tuple[str, int]] = set()
    for maker in makers:
        lines, first = inspect.getsourcelines(maker)
        tree = ast.parse(textwrap.dedent("".join(lines)))
        name = Path(inspect.getfile(maker)).name
        found |= {(name, first + line - 1) for line in _lines(tree, mistake)}
    return found


def is_planted(line: Any, make: Any) -> bool:
    """Whether a finding's line, if it has one, is among the planted ones."""
    return line is not None and (
        (Path(line.file).name, line.number) in planted_lines(make)
    )


def _helpers(make: Any) -> list[Any]:
    """Returns what a maker hands its flag on to."""
    module = inspect.getmodule(make)
    names = make.__code__.co_names
    functions = [getattr(module, name, None) for name in names]
    return [
        function
        for function in functions
        if inspect.isfunction(function) and "right" in function.__code__.co_varnames
    ]


def _mistake(make: Any) -> str:
    constants = [c for c in make.__code__.co_consts if isinstance(c, str)]
    return constants[-1] if _helpers(make) and constants else ""


def _lines(tree: ast.AST, mistake: str) -> Iterator[int]:
    for block in _blocks(tree):
        for i, statement in enumerate(block):
            if isinstance(statement, ast.FunctionDef | ast.With | ast.For):
                continue
            if isinstance(statement, ast.If):
                if _mentions(statement.test, mistake):
                    yield from _span(statement)
                    returns = isinstance(statement.body[-1], ast.Return)
                    after = block[i + 1 :] if returns else block[i + 1 : i + 2]
                    for other in after:
                        yield from _span(other)
            elif _mentions(statement, mistake):
                yield from _narrowed(statement, mistake)


def _narrowed(statement: ast.stmt, mistake: str) -> Iterator[int]:
    """Yields the lines of a statement; of a table of mistakes that of this one."""
    keys = [
        (key, value)
        for node in ast.walk(statement)
        if isinstance(node, ast.Dict)
        for key, value in zip(node.keys, node.values, strict=True)
    ]
    for key, value in keys:
        if isinstance(key, ast.Constant) and key.value == mistake:
            yield from range(key.lineno, (value.end_lineno or value.lineno) + 1)
            return
    yield from _span(statement)


def _blocks(tree: ast.AST) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(tree):
        for field in ("body", "orelse"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                yield block


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _mentions(node: ast.AST, mistake: str) -> bool:
    """Whether a statement looks at what makes the twin wrong."""
    if any(isinstance(each, ast.Return) and _hands_on(each.value) for each in [node]):
        return False
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and each.id in _FLAGS:
            return True
        if mistake and isinstance(each, ast.Constant) and each.value == mistake:
            return True
    return False


def _hands_on(value: ast.AST | None) -> bool:
    """Whether a function only hands its flag on to a `_dense_rule(right, "zero")`."""
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Name)
        and value.func.id.endswith("_rule")
    )
