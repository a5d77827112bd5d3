"""The assertion that a function has one gradient, however JAX runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gradtest._src.cells.check import CellCheck
from gradtest._src.cells.chosen import read_choice
from gradtest._src.findings import Report
from gradtest._src.job import agreement as processes
from gradtest._src.keywords import Inconclusive, Keywords, require_callable, settled
from gradtest._src.options import DEFAULT_RTOL, Options
from gradtest._src.traced import checks as in_trace

PyTree = Any
Transformation = Callable[..., Any]


@processes.agreed
def assert_variants_agree(
    fn: Callable[..., PyTree],
    *args: PyTree,
    variants: str
    | Transformation
    | Sequence[str | Transformation]
    | Mapping[str, Transformation]
    | None = None,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    trials: int | None = None,
    key: Any = None,
    rtol: float = DEFAULT_RTOL,
    rounding_rtol: float | None = None,
    exclude: Sequence[str] = (),
    inconclusive: Inconclusive = "raise",
    custom_message: str | None = None,
    custom_message_format_vars: Sequence[Any] = (),
    include_default_message: bool = True,
    exception_type: type[Exception] | None = None,
) -> Report:
    """Asserts that JAX's derivative of `fn` is the same however JAX runs it.

    Values and gradients, custom rules included, are computed in each of these ways and
    compared with the derivative traced by itself, point by point and, over several
    devices, device by device: in float64, where only another program can differ, and
    as they run, compiled, donated and spread over devices as they are.

    ==============  =================================================================
    `"repeat"`      traced a second time
    `"eager"`       operation by operation, Python with concrete values
    `"jit"`         under `jax.jit`
    `"remat"`       under `jax.checkpoint`
    `"vmap"`        under `jax.vmap`: the gradient of each of 3 points, of 1, of the
                    batch as a whole, over one argument or the cotangents alone
    `"scan"`        inside of `jax.lax.scan`, and as the gradient of it
    `"donated"`     with donated arguments (copies; yours are never donated)
    `"pmap"`        another point on each device
    `"shard_map"`   the same with `check_vma=True` and `False`; on replicated
                    arguments, and as the gradient of the region
    `"sharded jit"` arguments sharded on each axis that divides, one at a time, and
                    on axes that look like a batch together
    ==============  =================================================================

    The last three run on 1, 2, 4 and all devices. Whether the gradient is the right one
    is not asked: see `assert_autodiff_matches`.

    Args:
      fn: A function of trees, differentiable by JAX; may return any tree of arrays.
      *args: As for `assert_autodiff_matches`. Where several points are needed, domains
        are drawn anew and given arrays are scaled down a little.
      variants: Which ways to run it, in any number: a family (`"pmap"`), single ones by
        what tells them apart (`"pmap[4]"`, `"shard_map[2, check_vma=False]"`, as the
        report names them), transformations of your own that take a function of arrays
        and return one (`self.variant`, `functools.partial(jax.pmap, axis_name="i")`);
        or a mapping of names to such. None takes all that can run here; the report
        lists what can't, with what would make it possible.
      argnums: Arguments to differentiate; None takes each with a float or complex leaf.
      has_aux: Whether `fn` returns a pair of result and auxiliary data.
      trials: How many sets of points and cotangents to try. None: 1, or what pytest's
        `--gradtest-trials` says.
      key: An integer or a JAX key: fixes every draw. None: 0, or what pytest's
        `--gradtest-seed` says.
      rtol: Allowed relative difference of a leaf in float64; never scaled by its size.
      rounding_rtol: Allowed relative difference in working precision, in place of what
        is measured.
      exclude: Names of leaves or sub-trees that are held; the report lists them.
      inconclusive: Whether an inconclusive check raises or warns.
      custom_message: Added to the message, as in every Chex assertion.
      custom_message_format_vars: Fill the custom message's placeholders.
      include_default_message: Whether the assertion's name leads the message.
      exception_type: Raised in place of gradtest's own; carries `.report` as well.

    Returns:
      The report, with one finding for each way: `check` is its name, `size` and
      `allowed` the worst difference in float64, `rounding` that in working precision.
      Marked NOT CHECKED under `chex.disable_asserts()`.

    Raises:
      GradientMismatch: The gradient departs somewhere; the first such way is named,
        with the factor and the devices where they can be told.
      GradientInconclusive: Nothing could be concluded, and `inconclusive="raise"`.
      ValueError: `variants` names none that there is, or `fn` has no gradient.
      TypeError, ValueError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import gradtest
      >>> report = gradtest.assert_variants_agree(
      ...     jnp.tanh, jnp.arange(3.0), variants=["jit", "vmap[3]", "scan[3]"]
      ... )
      >>> [finding.check for finding in report.findings]
      ['jit', 'vmap[3]', 'scan[3]']
    """
    name, chosen = "assert_variants_agree", Keywords.of(locals())
    require_callable("fn", fn)
    in_trace.refuse(name, args)
    choice = read_choice(variants)

    def make_check(options: Options) -> CellCheck:
        return CellCheck(fn, args, choice, options)

    return settled(name, fn, chosen, make_check)
