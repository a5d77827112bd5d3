"""Right gradients that gradtest has to accept with its default options.

`scaled_leaf` turns any of them into a model with one wrong leaf, or one wrong entry, to
see how small a mistake is still found.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from tests import right_functions as functions
from tests import right_networks as networks

Fn = Callable[..., Any]
PyTree = Any

_FLOATS = (jnp.float32, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class RightModel:
    """A program whose derivative is right.

    Attributes:
      name: Short identifier.
      make: Takes a dtype and returns `(fn, args)`; devices are touched only here.
      dtypes: The dtypes that `make` can be called with.
      argnums: The arguments to differentiate; None for all with inexact leaves.
      devices: How many devices `make` needs.
    """

    name: str
    make: Callable[[Any], tuple[Fn, tuple[Any, ...]]]
    dtypes: tuple[Any, ...] = _FLOATS
    argnums: tuple[int, ...] | None = None
    devices: int = 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def scale_cotangent(
    x: jax.Array, factor: float, compute_dtype: Any = None
) -> jax.Array:
    """Returns `x`; its cotangent is wrong by `factor`.

    Args:
      x: An array of floats.
      factor: Multiplies the cotangent.
      compute_dtype: Where the product is taken, before it is cast back; None for the
        dtype of `x`, in which a factor near 1 may round to 1.
    """
    del factor, compute_dtype
    return x


def _scale_cotangent_forward(
    x: jax.Array, factor: float, compute_dtype: Any
) -> tuple[jax.Array, None]:
    del factor, compute_dtype
    return x, None


def _scale_cotangent_backward(
    factor: float, compute_dtype: Any, _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    wide = cotangent.astype(compute_dtype or cotangent.dtype)
    return ((wide * factor).astype(cotangent.dtype),)


scale_cotangent.defvjp(_scale_cotangent_forward, _scale_cotangent_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def scale_entry(x: jax.Array, index: tuple[int, ...], factor: float) -> jax.Array:
    """Returns `x`; the entry at `index` of its cotangent is wrong by `factor`."""
    del index, factor
    return x


def _scale_entry_forward(
    x: jax.Array, index: tuple[int, ...], factor: float
) -> tuple[jax.Array, None]:
    del index, factor
    return x, None


def _scale_entry_backward(
    index: tuple[int, ...], factor: float, _: None, cotangent: jax.Array
) -> tuple[jax.Array]:
    return (cotangent.at[index].multiply(factor),)


scale_entry.defvjp(_scale_entry_forward, _scale_entry_backward)


def leaf_paths(args: tuple[Any, ...]) -> list[str]:
    """Returns the path of every float or complex leaf, as `scaled_leaf` takes it."""
    leaves = jax.tree_util.tree_leaves_with_path(args)
    return [
        jax.tree_util.keystr(path)
        for path, leaf in leaves
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]


def scaled_leaf(
    fn: Fn,
    path: str,
    factor: float,
    index: tuple[int, ...] | None = None,
    compute_dtype: Any = None,
) -> Fn:
    """Returns `fn` with the gradient of one leaf of its arguments wrong by `factor`.

    Args:
      fn: A right function.
      path: The leaf's path in the tuple of arguments, one of `leaf_paths(args)`.
      factor: Multiplies the cotangent of the leaf, or of its one entry.
      index: The only entry to scale; None for the whole leaf.
      compute_dtype: See `scale_cotangent`; of no account where `index` is given.

    Raises:
      ValueError: When called, if the arguments have no leaf at `path`.
    """

    def scale(x: jax.Array) -> jax.Array:
        if index is None:
            return scale_cotangent(x, factor, compute_dtype)
        return scale_entry(x, index, factor)

    @functools.wraps(fn)
    def scaled(*args: PyTree) -> Any:
        leaves, structure = jax.tree_util.tree_flatten_with_path(args)
        paths = [jax.tree_util.keystr(leaf_path) for leaf_path, _ in leaves]
        if path not in paths:
            raise ValueError(f"path: no leaf at {path!r}; there are {paths}")
        values = [leaf for _, leaf in leaves]
        where = paths.index(path)
        values[where] = scale(values[where])
        return fn(*structure.unflatten(values))

    return scaled


_FLOATS_AND_HALF = (*_FLOATS, jnp.float16)
_NO_HALF = (jnp.float32,)

RIGHT_MODELS: tuple[RightModel, ...] = (
    RightModel("cnn", networks.make_cnn),
    RightModel("transformer", networks.make_transformer),
    RightModel("lstm", networks.make_lstm),
    RightModel("batch_norm_and_dropout", networks.make_normed_mlp),
    RightModel("nnx_mlp", networks.make_nnx_mlp),
    RightModel("wide_relu", networks.make_wide_relu),
    RightModel("ctc_loss", networks.make_ctc_loss),
    RightModel("stopped_rnn", networks.make_stopped_rnn),
    RightModel("pmapped_loss", networks.make_pmapped_loss, devices=4),
    RightModel("shard_mapped_loss", networks.make_shard_mapped_loss, devices=4),
    RightModel("svd", functions.make_svd),
    RightModel("eigh", functions.make_eigh),
    RightModel("qr", functions.make_qr),
    RightModel("cholesky", functions.make_cholesky),
    RightModel("solve", functions.make_solve),
    RightModel("inverse", functions.make_inverse),
    RightModel("slogdet", functions.make_slogdet),
    RightModel("cg", functions.make_cg),
    RightModel("gmres", functions.make_gmres),
    RightModel("bicgstab", functions.make_bicgstab),
    RightModel("custom_linear_solve", functions.make_custom_linear_solve),
    RightModel("custom_root", functions.make_custom_root),
    RightModel("odeint", functions.make_odeint),
    RightModel("bisection", functions.make_bisection),
    RightModel("rfft", functions.make_rfft),
    RightModel("fft", functions.make_fft),
    RightModel("complex_loss", functions.make_complex_loss, _NO_HALF),
    RightModel("complex_map", functions.make_complex_map, _NO_HALF),
    RightModel("top_k", functions.make_top_k),
    RightModel("sort", functions.make_sort),
    RightModel("median", functions.make_median),
    RightModel("straight_through", functions.make_straight_through),
    RightModel("cond", functions.make_cond),
    RightModel("switch", functions.make_switch),
    RightModel("segment_sum", functions.make_segment_sum),
    RightModel("softmax", functions.make_softmax),
    RightModel("cumulative", functions.make_cumulative),
    RightModel("conv_transpose", functions.make_conv_transpose),
    RightModel("avg_pool", functions.make_avg_pool),
    RightModel("einsum", functions.make_einsum),
    RightModel("erf", functions.make_erf),
    RightModel("exact_gelu", functions.make_exact_gelu),
    RightModel("cube_root", functions.make_cube_root),
    RightModel("erf_inv", functions.make_erf_inv, _FLOATS_AND_HALF),
)
