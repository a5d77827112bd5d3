"""The layers of Flax, Linen and NNX, each with arguments to try; see `jax_rules`."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from tests.jax_rules import MASKS, QKV, Entry, Fn, Points, entry
from tests.zoo_entry import normal

_ROWS = normal(10, 2, 4)
_IMAGE = normal(11, 1, 4, 4, 2)
_SEQUENCE = normal(12, 2, 3, 4)
_TOKENS = jnp.array([0, 2])
_MASK_ROWS = jnp.array([[True, False, True], [False, False, False]])
_QKV_MASK = nn.make_attention_mask(_MASK_ROWS, _MASK_ROWS)


def _linen(module: nn.Module, *inputs: Any, **options: Any) -> tuple[Fn, Points]:
    """Returns a layer's output as a function of its parameters and first input."""
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = module.init(rngs, *inputs, **options)
    mutable = [name for name in variables if name != "params"]

    def apply(variables: Any, *inputs: Any) -> Any:
        keys = {"dropout": jax.random.key(1)}
        return module.apply(variables, *inputs, rngs=keys, mutable=mutable, **options)[
            0
        ]

    return apply, {"ordinary": (variables, *inputs)}


def _nnx(module: Any, *inputs: Any) -> tuple[Fn, Points]:
    """Returns a layer's output as a function of its state and inputs."""
    graph, state = nnx.split(module)

    def apply(state: Any, *inputs: Any) -> Any:
        return nnx.merge(graph, state)(*inputs)

    return apply, {"ordinary": (nnx.to_pure_dict(state), *inputs)}


def _rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


class _Cell(nn.Module):
    """Runs a recurrent cell from its own first carry."""

    cell: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        carry = self.cell.initialize_carry(jax.random.key(0), x.shape)
        return self.cell(carry, x)


class _Fp8(nn.Module):
    """A dense layer whose product is taken in 8 bits."""

    product: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(4, dot_general_cls=self.product)(x)


class _Fp8Einsum(nn.Module):
    """A matrix product in 8 bits."""

    @nn.compact
    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        return nn.Fp8Einsum()("ab,bc->ac", x, y)


def _linen_attention() -> tuple[Fn, Points]:
    layer = nn.MultiHeadDotProductAttention(num_heads=2)
    variables = layer.init(jax.random.key(0), _SEQUENCE)

    def apply(variables: Any, x: jax.Array, mask: Any) -> jax.Array:
        return layer.apply(variables, x, mask=mask)

    return apply, {
        "ordinary": (variables, _SEQUENCE, None),
        "masked": (variables, _SEQUENCE, _QKV_MASK),
    }


def _nnx_attention() -> tuple[Fn, Points]:
    layer = nnx.MultiHeadAttention(2, 4, decode=False, rngs=_rngs())
    graph, state = nnx.split(layer)

    def apply(state: Any, x: jax.Array, mask: Any) -> jax.Array:
        return nnx.merge(graph, state)(x, mask=mask)

    pure = nnx.to_pure_dict(state)
    return apply, {
        "ordinary": (pure, _SEQUENCE, None),
        "masked": (pure, _SEQUENCE, _QKV_MASK),
    }


def _nnx_rope() -> tuple[Fn, Points]:
    rope = nnx.RoPE(4)
    fn = nnx.dot_product_attention_with_rope
    return lambda q, k, v: fn(q, k, v, rope=rope), {"ordinary": QKV}


def _nnx_cell(cell: Any) -> tuple[Fn, Points]:
    graph, state = nnx.split(cell)

    def apply(state: Any, x: jax.Array) -> Any:
        merged = nnx.merge(graph, state)
        return merged(merged.initialize_carry(x.shape, _rngs()), x)

    return apply, {"ordinary": (nnx.to_pure_dict(state), _ROWS)}


def _masked_attention(fn: Fn) -> tuple[Fn, Points]:
    return (lambda q, k, v, mask: fn(q, k, v, mask=mask)), {
        "ordinary": (*QKV, None),
        "masked": (*QKV, MASKS["one row false"]),
    }


# Made when asked for: to make a layer is to run it.
LINEN: dict[str, Callable[[], tuple[Fn, Points]]] = {
    "BatchApply": lambda: (nn.BatchApply(jax.nn.relu), {"ordinary": (_SEQUENCE,)}),
    "BatchNorm": lambda: _linen(nn.BatchNorm(use_running_average=False), _ROWS),
    "Bidirectional": lambda: _linen(
        nn.Bidirectional(nn.RNN(nn.LSTMCell(2)), nn.RNN(nn.GRUCell(2))), _SEQUENCE
    ),
    "Conv": lambda: _linen(nn.Conv(2, (3, 3)), _IMAGE),
    "ConvLSTMCell": lambda: _linen(_Cell(nn.ConvLSTMCell(2, (3, 3))), _IMAGE),
    "ConvLocal": lambda: _linen(nn.ConvLocal(2, (3, 3)), _IMAGE),
    "ConvTranspose": lambda: _linen(nn.ConvTranspose(2, (3, 3)), _IMAGE),
    "Dense": lambda: _linen(nn.Dense(3), _ROWS),
    "DenseGeneral": lambda: _linen(nn.DenseGeneral(3), _ROWS),
    "Dropout": lambda: _linen(nn.Dropout(0.5, deterministic=False), _ROWS),
    "Einsum": lambda: _linen(nn.Einsum((4, 3), "ab,bc->ac"), _ROWS),
    "Embed": lambda: _linen(nn.Embed(3, 4), _TOKENS),
    "GRUCell": lambda: _linen(_Cell(nn.GRUCell(3)), _ROWS),
    "GroupNorm": lambda: _linen(nn.GroupNorm(2), _ROWS),
    "InstanceNorm": lambda: _linen(nn.InstanceNorm(), _IMAGE),
    "LSTMCell": lambda: _linen(_Cell(nn.LSTMCell(3)), _ROWS),
    "LayerNorm": lambda: _linen(nn.LayerNorm(), _ROWS),
    "MGUCell": lambda: _linen(_Cell(nn.MGUCell(3)), _ROWS),
    "MultiHeadAttention": _linen_attention,
    "MultiHeadDotProductAttention": _linen_attention,
    "OptimizedLSTMCell": lambda: _linen(_Cell(nn.OptimizedLSTMCell(3)), _ROWS),
    "PReLU": lambda: _linen(nn.PReLU(), _ROWS),
    "RMSNorm": lambda: _linen(nn.RMSNorm(), _ROWS),
    "RNN": lambda: _linen(nn.RNN(nn.SimpleCell(3)), _SEQUENCE),
    "SelfAttention": lambda: _linen(nn.SelfAttention(num_heads=2), _SEQUENCE),
    "Sequential": lambda: _linen(nn.Sequential([nn.Dense(3), nn.relu]), _ROWS),
    "SimpleCell": lambda: _linen(_Cell(nn.SimpleCell(3)), _ROWS),
    "SpectralNorm": lambda: _linen(
        nn.SpectralNorm(nn.Dense(3)), _ROWS, update_stats=True
    ),
    "WeightNorm": lambda: _linen(nn.WeightNorm(nn.Dense(3)), _ROWS),
    "avg_pool": lambda: (
        lambda x: nn.avg_pool(x, (2, 2)),
        {"ordinary": (_IMAGE,)},
    ),
    "dot_product_attention": lambda: _masked_attention(nn.dot_product_attention),
    "dot_product_attention_weights": lambda: (
        lambda q, k, mask: nn.dot_product_attention_weights(q, k, mask=mask),
        {
            "ordinary": (*QKV[:2], None),
            "masked": (*QKV[:2], MASKS["one row false"]),
        },
    ),
    "max_pool": lambda: (
        lambda x: nn.max_pool(x, (2, 2)),
        {"ordinary": (_IMAGE,), "ties": (0 * _IMAGE,)},
    ),
    "pool": lambda: (
        lambda x: nn.pool(x, 0.0, jax.lax.add, (2, 2), (1, 1), "SAME"),
        {"ordinary": (_IMAGE,)},
    ),
}
# Their rules differ on purpose: what they return for scales are the scales' updates.
FP8: dict[str, Callable[[], tuple[Fn, Points]]] = {
    "Fp8DirectDotGeneralOp": lambda: _linen(_Fp8(nn.Fp8DirectDotGeneralOp), _ROWS),
    "Fp8DotGeneral": lambda: _linen(_Fp8(nn.Fp8DotGeneral), _ROWS),
    "Fp8DotGeneralOp": lambda: _linen(_Fp8(nn.Fp8DotGeneralOp), _ROWS),
    "Fp8Einsum": lambda: _linen(_Fp8Einsum(), _ROWS, normal(13, 4, 3)),
    "NANOOFp8DotGeneralOp": lambda: _linen(_Fp8(nn.NANOOFp8DotGeneralOp), _ROWS),
}
NNX: dict[str, Callable[[], tuple[Fn, Points]]] = {
    "BatchNorm": lambda: _nnx(nnx.BatchNorm(4, rngs=_rngs()), _ROWS),
    "Bidirectional": lambda: _nnx(
        nnx.Bidirectional(
            nnx.RNN(nnx.LSTMCell(4, 2, rngs=_rngs())),
            nnx.RNN(nnx.GRUCell(4, 2, rngs=_rngs())),
        ),
        _SEQUENCE,
    ),
    "Conv": lambda: _nnx(nnx.Conv(2, 2, (3, 3), rngs=_rngs()), _IMAGE),
    "ConvTranspose": lambda: _nnx(
        nnx.ConvTranspose(2, 2, (3, 3), rngs=_rngs()), _IMAGE
    ),
    "Dropout": lambda: _nnx(nnx.Dropout(0.0, rngs=_rngs()), _ROWS),
    "Einsum": lambda: _nnx(nnx.Einsum("ab,bc->ac", (4, 3), rngs=_rngs()), _ROWS),
    "Embed": lambda: _nnx(nnx.Embed(3, 4, rngs=_rngs()), _TOKENS),
    "GRUCell": lambda: _nnx_cell(nnx.GRUCell(4, 3, rngs=_rngs())),
    "GroupNorm": lambda: _nnx(nnx.GroupNorm(4, 2, rngs=_rngs()), _ROWS),
    "InstanceNorm": lambda: _nnx(nnx.InstanceNorm(2, rngs=_rngs()), _IMAGE),
    "LSTMCell": lambda: _nnx_cell(nnx.LSTMCell(4, 3, rngs=_rngs())),
    "LayerNorm": lambda: _nnx(nnx.LayerNorm(4, rngs=_rngs()), _ROWS),
    "Linear": lambda: _nnx(nnx.Linear(4, 3, rngs=_rngs()), _ROWS),
    "LinearGeneral": lambda: _nnx(nnx.LinearGeneral(4, 3, rngs=_rngs()), _ROWS),
    "LoRA": lambda: _nnx(nnx.LoRA(4, 2, 3, rngs=_rngs()), _ROWS),
    "LoRALinear": lambda: _nnx(nnx.LoRALinear(4, 3, lora_rank=2, rngs=_rngs()), _ROWS),
    "MultiHeadAttention": _nnx_attention,
    "OptimizedLSTMCell": lambda: _nnx_cell(nnx.OptimizedLSTMCell(4, 3, rngs=_rngs())),
    "PReLU": lambda: _nnx(nnx.PReLU(), _ROWS),
    "RMSNorm": lambda: _nnx(nnx.RMSNorm(4, rngs=_rngs()), _ROWS),
    "RNN": lambda: _nnx(nnx.RNN(nnx.SimpleCell(4, 3, rngs=_rngs())), _SEQUENCE),
    "RoPE": lambda: (lambda x: nnx.RoPE(4)(x), {"ordinary": (QKV[0],)}),
    "SimpleCell": lambda: _nnx_cell(nnx.SimpleCell(4, 3, rngs=_rngs())),
    "SpectralNorm": lambda: _nnx(
        nnx.SpectralNorm(nnx.Linear(4, 3, rngs=_rngs()), rngs=_rngs()), _ROWS
    ),
    "WeightNorm": lambda: _nnx(
        nnx.WeightNorm(nnx.Linear(4, 3, rngs=_rngs()), rngs=_rngs()), _ROWS
    ),
    "dot_product_attention": lambda: _masked_attention(nnx.dot_product_attention),
    "dot_product_attention_with_rope": _nnx_rope,
}
# Bases of layers, and what makes masks.
_NO_LAYERS = {
    "LoRAParam",
    "RNNCellBase",
    "combine_masks",
    "make_attention_mask",
    "make_causal_mask",
}
_HOMES = {
    nn: tuple(
        f"flax.linen.{name}"
        for name in [
            "activation",
            "attention",
            "batch_apply",
            "combinators",
            "fp8_ops",
            "linear",
            "normalization",
            "pooling",
            "recurrent",
            "stochastic",
        ]
    ),
    nnx: ("flax.nnx.nn.",),
}


def layers(library: Any) -> set[str]:
    """Returns the public names of Linen's or NNX's layers and their functions."""
    return {
        name
        for name, value in vars(library).items()
        if str(getattr(value, "__module__", "")).startswith(_HOMES[library])
        and callable(value)
        and not name.startswith("_")
        and name not in _NO_LAYERS
    }


def layer_entries(library: Any, table: dict[str, Any]) -> list[Entry]:
    """Makes entries of `{name: function that makes (function, points)}`."""
    found = []
    for name, make in table.items():
        if hasattr(library, name):
            fn, points = make()
            prefix = f"{library.__name__}.{name}"
            found += [entry(prefix, point, fn, args) for point, args in points.items()]
    return found
