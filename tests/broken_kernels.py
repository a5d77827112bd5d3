"""The kernels of the examples with one mistake each, as their authors make them.

Each is right but for its mistake, which is in one place and concerns some leaves only.
"""

import jax

from examples import pallas_kernels
from examples.pallas_kernels import BLOCK


def cross_entropy_with_mask_off_by_one():
    """The mask of the classes ends one too early: the sum lacks the last class."""

    def forward(logits, labels):
        return pallas_kernels.cross_entropy_forward(
            logits, labels, classes=logits.shape[1] - 1
        )

    @jax.custom_vjp
    def cross_entropy(logits, labels):
        return forward(logits, labels)[0]

    cross_entropy.defvjp(forward, pallas_kernels.cross_entropy_backward)
    return cross_entropy


def rms_norm_without_scale():
    """The backward pass sums where it should average."""

    @jax.custom_vjp
    def rms_norm(x, weight):
        return pallas_kernels.rms_norm_forward(x, weight)[0]

    def backward(saved, cotangent):
        return pallas_kernels.rms_norm_backward(saved, cotangent, mean_of=1)

    rms_norm.defvjp(pallas_kernels.rms_norm_forward, backward)
    return rms_norm


def attention_without_tail():
    """Keys and values get nothing from the queries in the last, uneven block."""

    @jax.custom_vjp
    def attention(query, key, value):
        return pallas_kernels.attention_forward(query, key, value)[0]

    def backward(saved, cotangent):
        whole_blocks = saved[0].shape[0] // BLOCK
        return pallas_kernels.attention_backward(saved, cotangent, whole_blocks)

    attention.defvjp(pallas_kernels.attention_forward, backward)
    return attention
