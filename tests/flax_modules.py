"""Every layer of Flax that has parameters, Linen and NNX, as a module to check.

`LINEN` and `NNX` map a layer's public name to functions that make (module, inputs,
options of `assert_module_grads`), one for each way to call it. A layer that is new in
Flax and stands in neither table nor in `WITHOUT_PARAMETERS` fails a test.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from gradtest import domains

Made = tuple[Any, tuple[Any, ...], dict[str, Any]]
Make = Callable[[Any], Made]

_ROWS = domains.normal((2, 4))
_IMAGE = domains.normal((1, 4, 4, 2))
_SEQUENCE = domains.normal((2, 3, 4))
_TOKENS = domains.integers((2,), 0, 3)
_MASK = nn.make_causal_mask(jnp.ones((2, 3)))


def _rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


def _made(module: Any, *inputs: Any, **options: Any) -> Made:
    return module, inputs, options


class _Cell(nn.Module):
    """Runs a recurrent cell from its own first carry."""

    cell: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        carry = self.cell.initialize_carry(jax.random.key(0), x.shape)
        return self.cell(carry, x)


class _NnxCell(nnx.Module):
    """The same for a cell of NNX."""

    def __init__(self, cell: Any):
        self.cell = cell

    def __call__(self, x: jax.Array) -> Any:
        return self.cell(self.cell.initialize_carry(x.shape, nnx.Rngs(1)), x)


def _step(module: Any) -> Made:
    """One step of decoding, from a cache as `init` or `init_cache` leaves it."""
    if isinstance(module, nn.Module):
        full = module.init(jax.random.key(0), jnp.ones((2, 3, 4)))
        return _made(module, domains.normal((2, 1, 4)), variables=full)
    module.init_cache((2, 3, 4), module.dtype)
    return _made(module, domains.normal((2, 1, 4)))


# Made when asked for, with the dtype to compute in.
LINEN: dict[str, dict[str, Make]] = {
    "BatchNorm": {
        "training": lambda d: _made(
            nn.BatchNorm(use_running_average=False, dtype=d), _ROWS
        ),
        "evaluation": lambda d: _made(
            nn.BatchNorm(use_running_average=True, dtype=d), _ROWS
        ),
    },
    "Bidirectional": {
        "": lambda d: _made(
            nn.Bidirectional(
                nn.RNN(nn.LSTMCell(2, dtype=d)), nn.RNN(nn.GRUCell(2, dtype=d))
            ),
            _SEQUENCE,
        )
    },
    "Conv": {
        "": lambda d: _made(nn.Conv(2, (3, 3), dtype=d), _IMAGE),
        "strided": lambda d: _made(
            nn.Conv(4, (3, 3), 2, feature_group_count=2, dtype=d), _IMAGE
        ),
    },
    "ConvLSTMCell": {
        "": lambda d: _made(_Cell(nn.ConvLSTMCell(2, (3, 3), dtype=d)), _IMAGE)
    },
    "ConvLocal": {"": lambda d: _made(nn.ConvLocal(2, (3, 3), dtype=d), _IMAGE)},
    "ConvTranspose": {
        "": lambda d: _made(nn.ConvTranspose(2, (3, 3), dtype=d), _IMAGE)
    },
    "Dense": {"": lambda d: _made(nn.Dense(3, dtype=d), _ROWS)},
    "DenseGeneral": {
        "": lambda d: _made(nn.DenseGeneral((2, 3), axis=(-2, -1), dtype=d), _SEQUENCE)
    },
    "Einsum": {"": lambda d: _made(nn.Einsum((4, 3), "ab,bc->ac", dtype=d), _ROWS)},
    "Embed": {
        "": lambda d: _made(nn.Embed(3, 4, dtype=d), _TOKENS),
        "attend": lambda d: _made(nn.Embed(3, 4, dtype=d), _ROWS, method="attend"),
    },
    "GRUCell": {"": lambda d: _made(_Cell(nn.GRUCell(3, dtype=d)), _ROWS)},
    "GroupNorm": {"": lambda d: _made(nn.GroupNorm(2, dtype=d), _ROWS)},
    "InstanceNorm": {"": lambda d: _made(nn.InstanceNorm(dtype=d), _IMAGE)},
    "LSTMCell": {"": lambda d: _made(_Cell(nn.LSTMCell(3, dtype=d)), _ROWS)},
    "LayerNorm": {"": lambda d: _made(nn.LayerNorm(dtype=d), _ROWS)},
    "MGUCell": {"": lambda d: _made(_Cell(nn.MGUCell(3, dtype=d)), _ROWS)},
    "MultiHeadAttention": {
        "": lambda d: _made(nn.MultiHeadAttention(2, dtype=d), _SEQUENCE)
    },
    "MultiHeadDotProductAttention": {
        "masked, dropout": lambda d: _made(
            nn.MultiHeadDotProductAttention(
                2, dtype=d, dropout_rate=0.5, deterministic=False
            ),
            _SEQUENCE,
            mask=_MASK,
        ),
        "decoding": lambda d: _step(
            nn.MultiHeadDotProductAttention(2, dtype=d, decode=True)
        ),
    },
    "OptimizedLSTMCell": {
        "": lambda d: _made(_Cell(nn.OptimizedLSTMCell(3, dtype=d)), _ROWS)
    },
    "PReLU": {"": lambda d: _made(nn.PReLU(), _ROWS)},
    "RMSNorm": {"": lambda d: _made(nn.RMSNorm(dtype=d), _ROWS)},
    "RNN": {"": lambda d: _made(nn.RNN(nn.LSTMCell(3, dtype=d)), _SEQUENCE)},
    "SelfAttention": {
        "": lambda d: _made(nn.SelfAttention(num_heads=2, dtype=d), _SEQUENCE)
    },
    "Sequential": {
        "": lambda d: _made(nn.Sequential([nn.Dense(3, dtype=d), nn.relu]), _ROWS)
    },
    "SimpleCell": {"": lambda d: _made(_Cell(nn.SimpleCell(3, dtype=d)), _ROWS)},
    "SpectralNorm": {
        "training": lambda d: _made(
            nn.SpectralNorm(nn.Dense(3, dtype=d)), _ROWS, update_stats=True
        ),
        "evaluation": lambda d: _made(
            nn.SpectralNorm(nn.Dense(3, dtype=d)), _ROWS, update_stats=False
        ),
    },
    "WeightNorm": {"": lambda d: _made(nn.WeightNorm(nn.Dense(3, dtype=d)), _ROWS)},
}


def _cell(name: str) -> Make:
    return lambda d: _made(
        _NnxCell(getattr(nnx, name)(4, 3, dtype=d, rngs=_rngs())), _ROWS
    )


def _attention(d: Any, *, decode: bool = False, rate: float = 0.0) -> Any:
    return nnx.MultiHeadAttention(
        2, 4, dtype=d, decode=decode, dropout_rate=rate, deterministic=not rate,
        rngs=_rngs(),
    )  # fmt: skip


NNX: dict[str, dict[str, Make]] = {
    "BatchNorm": {
        "training": lambda d: _made(nnx.BatchNorm(4, dtype=d, rngs=_rngs()), _ROWS),
        "evaluation": lambda d: _made(
            nnx.BatchNorm(4, use_running_average=True, dtype=d, rngs=_rngs()), _ROWS
        ),
    },
    "Bidirectional": {
        "": lambda d: _made(
            nnx.Bidirectional(
                nnx.RNN(nnx.LSTMCell(4, 2, dtype=d, rngs=_rngs())),
                nnx.RNN(nnx.GRUCell(4, 2, dtype=d, rngs=_rngs())),
            ),
            _SEQUENCE,
        )
    },
    "Conv": {
        "": lambda d: _made(nnx.Conv(2, 2, (3, 3), dtype=d, rngs=_rngs()), _IMAGE)
    },
    "ConvTranspose": {
        "": lambda d: _made(
            nnx.ConvTranspose(2, 2, (3, 3), dtype=d, rngs=_rngs()), _IMAGE
        )
    },
    "Einsum": {
        "": lambda d: _made(
            nnx.Einsum("ab,bc->ac", (4, 3), (3,), dtype=d, rngs=_rngs()), _ROWS
        )
    },
    "Embed": {
        "": lambda d: _made(nnx.Embed(3, 4, dtype=d, rngs=_rngs()), _TOKENS),
        "attend": lambda d: _made(
            nnx.Embed(3, 4, dtype=d, rngs=_rngs()), _ROWS, method="attend"
        ),
    },
    "GRUCell": {"": _cell("GRUCell")},
    "GroupNorm": {
        "": lambda d: _made(nnx.GroupNorm(4, 2, dtype=d, rngs=_rngs()), _ROWS)
    },
    "InstanceNorm": {
        "": lambda d: _made(nnx.InstanceNorm(2, dtype=d, rngs=_rngs()), _IMAGE)
    },
    "LSTMCell": {"": _cell("LSTMCell")},
    "LayerNorm": {"": lambda d: _made(nnx.LayerNorm(4, dtype=d, rngs=_rngs()), _ROWS)},
    "Linear": {"": lambda d: _made(nnx.Linear(4, 3, dtype=d, rngs=_rngs()), _ROWS)},
    "LinearGeneral": {
        "": lambda d: _made(
            nnx.LinearGeneral((3, 4), (2, 3), axis=(-2, -1), dtype=d, rngs=_rngs()),
            _SEQUENCE,
        )
    },
    "LoRA": {"": lambda d: _made(nnx.LoRA(4, 2, 3, dtype=d, rngs=_rngs()), _ROWS)},
    "LoRALinear": {
        "": lambda d: _made(
            nnx.LoRALinear(4, 3, lora_rank=2, dtype=d, rngs=_rngs()), _ROWS
        )
    },
    "MultiHeadAttention": {
        "masked, dropout": lambda d: _made(
            _attention(d, rate=0.5), _SEQUENCE, mask=_MASK
        ),
        "decoding": lambda d: _step(_attention(d, decode=True)),
    },
    "OptimizedLSTMCell": {"": _cell("OptimizedLSTMCell")},
    "PReLU": {"": lambda d: _made(nnx.PReLU(), _ROWS)},
    "RMSNorm": {"": lambda d: _made(nnx.RMSNorm(4, dtype=d, rngs=_rngs()), _ROWS)},
    "RNN": {
        "": lambda d: _made(
            nnx.RNN(nnx.LSTMCell(4, 3, dtype=d, rngs=_rngs())), _SEQUENCE
        )
    },
    "Sequential": {
        "": lambda d: _made(
            nnx.Sequential(nnx.Linear(4, 3, dtype=d, rngs=_rngs()), nnx.relu), _ROWS
        )
    },
    "SimpleCell": {"": _cell("SimpleCell")},
    "SpectralNorm": {
        "training": lambda d: _made(
            nnx.SpectralNorm(nnx.Linear(4, 3, dtype=d, rngs=_rngs()), rngs=_rngs()),
            _ROWS,
            update_stats=True,
        )
    },
    "WeightNorm": {
        "": lambda d: _made(
            nnx.WeightNorm(nnx.Linear(4, 3, dtype=d, rngs=_rngs()), rngs=_rngs()),
            _ROWS,
        )
    },
}
# Modules that have none of their own, and bases of modules.
WITHOUT_PARAMETERS: dict[Any, set[str]] = {
    nn: {
        "Dropout",
        # 8-bit products: their rules return the scales' updates in place of cotangents.
        "Fp8DirectDotGeneralOp",
        "Fp8DotGeneral",
        "Fp8DotGeneralOp",
        "Fp8Einsum",
        "Module",
        "NANOOFp8DotGeneralOp",
        "RNNCellBase",
    },
    nnx: {"Dict", "Dropout", "List", "Module", "RNNCellBase", "RoPE"},
}
TABLES: dict[Any, dict[str, dict[str, Make]]] = {nn: LINEN, nnx: NNX}
DTYPES = (jnp.float32, jnp.bfloat16)


def unlisted(library: Any) -> list[str]:
    """Returns the public module classes that no table names."""
    base = library.Module
    public = [
        name
        for name, value in vars(library).items()
        if isinstance(value, type) and issubclass(value, base)
    ]
    known = set(TABLES[library]) | WITHOUT_PARAMETERS[library]
    return sorted(set(public) - known)


def cases(library: Any) -> list[tuple[str, str, Make]]:
    """Returns (layer, way to call it, function that makes it) of all that there are."""
    return [
        (name, way, make)
        for name, ways in TABLES[library].items()
        if hasattr(library, name)
        for way, make in ways.items()
    ]
