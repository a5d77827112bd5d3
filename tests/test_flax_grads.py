"""assert_module_grads: whole Flax modules, right and wrong."""

import itertools
import random
import time
from collections.abc import Callable
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import gradtest
import gradtest.flax
from gradtest import Verdict, domains

check = gradtest.flax.assert_module_grads
ROWS = domains.normal((6, 3))
TOKENS = domains.integers((2, 4), 0, 11)


def refused(module: Any, *inputs: Any, **options: Any) -> gradtest.Report:
    with pytest.raises(gradtest.GradientMismatch) as caught:
        check(module, *inputs, **options)
    assert str(caught.value).startswith("assert_module_grads failed: ")
    return caught.value.report


def leaves(report: gradtest.Report) -> set[str]:
    return {f.name for f in report.findings if f.name.startswith("params")}


@jax.custom_vjp
def too_steep(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


too_steep.defvjp(
    lambda x: (jnp.tanh(x), x), lambda x, g: (1.5 * g * (1 - jnp.tanh(x) ** 2),)
)


@jax.custom_vjp
def frozen_slope(x: jax.Array) -> jax.Array:
    return jnp.tanh(x)


frozen_slope.defvjp(
    lambda x: (jnp.tanh(x), x),
    lambda x, g: (g * jax.lax.stop_gradient(1 - jnp.tanh(x) ** 2),),
)


# --- right modules --------------------------------------------------------------------


class Block(nn.Module):
    activation: Callable[[jax.Array], jax.Array] = nn.gelu

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        half = jnp.bfloat16
        mask = nn.make_causal_mask(jnp.ones(x.shape[:2]))
        y = nn.LayerNorm(dtype=half)(x)
        x = x + nn.SelfAttention(2, dtype=half)(y, mask=mask)
        y = nn.Dense(16, dtype=half)(nn.RMSNorm(dtype=half)(x))
        y = nn.Dropout(0.2, deterministic=False)(self.activation(y))
        return x + nn.Dense(8, dtype=half)(y), None


class Language(nn.Module):
    """A transformer in bfloat16: scanned, rematerialised, its embedding used twice."""

    activation: Callable[[jax.Array], jax.Array] = nn.gelu

    @nn.compact
    def __call__(
        self, tokens: jax.Array, segments: Any = None, *, scale: float = 1.0
    ) -> dict[str, Any]:
        embed = nn.Embed(11, 8, dtype=jnp.bfloat16)
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=2,
        )
        hidden, _ = stack(self.activation)(embed(tokens), None)
        return {"logits": scale * embed.attend(hidden), "hidden": hidden, "none": None}


def _likelihood(output: dict[str, Any]) -> jax.Array:
    logits = output["logits"].astype(jnp.float32)
    return -jnp.mean(jax.nn.log_softmax(logits)[..., 1])


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x)))
        return nn.Dense(2)(nn.Dropout(0.5, deterministic=not train)(x))


class Experts(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        gates = nn.softmax(nn.Dense(4)(x))
        values, chosen = jax.lax.top_k(gates, 2)
        experts = nn.vmap(
            nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True},
            in_axes=None, axis_size=4,
        )(5)(x)  # fmt: skip
        self.sow("losses", "balance", jnp.sum(gates.mean(0) ** 2))
        weights = jax.nn.one_hot(chosen, 4) * values[..., None]
        return jnp.einsum("bke,ebd->bd", weights, experts), chosen


def test_a_bfloat16_transformer_with_scan_remat_and_dropout_passes():
    report = check(
        Language(), TOKENS, None, loss=_likelihood, rngs={"dropout": 1}, scale=2.0
    )
    assert "params['Embed_0']['embedding']" in leaves(report)
    # Its random bits are no reason to measure in half precision.
    assert report.smallest_seen <= 2e-6


@pytest.mark.core
@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_and_dropout_pass_in_either_mode(train: bool):
    report = check(Classifier(), ROWS, train=train, loss=lambda y: jnp.mean(y**2))
    assert len(leaves(report)) == 6
    assert [rule.name for rule in report.rules] == ["relu"]


def test_rules_are_audited_to_second_order_unless_the_first_is_asked_for():
    class Frozen(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return frozen_slope(nn.Dense(4)(x))

    report = refused(Frozen(), ROWS)
    wrong = [f for f in report.findings if f.verdict is Verdict.FAIL]
    assert {(f.rule.name, f.order) for f in wrong} == {("frozen_slope", 2)}
    assert check(Frozen(), ROWS, order=1).verdict is Verdict.PASS
    assert refused(Frozen(), ROWS, order=2).leaf("params['Dense_0']['kernel']")


def test_a_mixture_of_experts_passes_with_the_losses_that_it_sows():
    def loss(output: Any) -> jax.Array:
        (y, _), updated = output
        return jnp.mean(y**2) + sum(jax.tree.leaves(updated["losses"]))

    assert len(leaves(check(Experts(), ROWS, loss=loss, mutable=["losses"]))) == 4
    assert check(Experts(), ROWS, order=2).order == 2


def test_a_bound_module_is_checked_at_its_own_variables():
    variables = Classifier().init(jax.random.key(3), jnp.ones((6, 3)), train=False)
    bound = Classifier().bind(variables)
    report = check(bound, ROWS, train=False, wrt="Dense_0")
    kernel = variables["params"]["Dense_0"]["kernel"]
    assert report.verdict is Verdict.PASS
    assert kernel is bound.variables["params"]["Dense_0"]["kernel"]


class Stack(nnx.Module):
    """Blocks made by nnx.vmap, run by nnx.scan and nnx.remat; counts its calls."""

    def __init__(self, activation: Callable[[jax.Array], jax.Array] = nnx.relu):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def made(rngs: nnx.Rngs) -> nnx.Sequential:
            return nnx.Sequential(
                nnx.Linear(3, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs), activation,
                nnx.Dropout(0.3, rngs=rngs),
            )  # fmt: skip

        self.blocks = made(nnx.Rngs(0))
        self.calls = nnx.Variable(jnp.zeros((), int))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1

        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(block: nnx.Sequential, x: jax.Array) -> jax.Array:
            return nnx.remat(lambda block, x: block(x))(block, x)

        return run(self.blocks, x)


def test_lifted_transforms_of_nnx_pass_and_the_module_stays_as_it_is():
    module = Stack()
    before = jax.tree.map(np.asarray, _numbers(module))
    report = check(module, ROWS, rngs=1)
    chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, _numbers(module)))
    assert "params['blocks']['layers'][0]['kernel']" in leaves(report)


def _numbers(module: nnx.Module) -> Any:
    state = nnx.state(module, nnx.Not(nnx.RngKey))
    return nnx.to_pure_dict(state)


class Adapted(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(3, 4, rngs=rngs)
        self.adapter = nnx.LoRA(3, 2, 4, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.adapter(x)

    def twice(self, x: jax.Array) -> jax.Array:
        return 2 * self(x)


class Bare(nnx.Module):
    def __init__(self) -> None:
        self.linear = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        self.scale = jnp.ones(3)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.scale * self.linear(x)


def test_what_is_held_stands_in_the_notes():
    (note,) = [n for n in check(Bare(), ROWS).notes if "without an nnx.Variable" in n]
    assert note.endswith(": scale")
    notes = check(Classifier(), ROWS, train=True).notes
    assert "collections that are held: batch_stats" in notes


# --- filters --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ({"wrt": nnx.LoRAParam}, {"lora_a", "lora_b"}),
        ({"wrt": nnx.Not(nnx.LoRAParam)}, {"kernel", "bias"}),
        ({"wrt": nnx.PathContains("bias")}, {"bias"}),
        ({"wrt": "base"}, {"kernel", "bias"}),
        ({"wrt": ["*/kernel", "adapter/lora_a"]}, {"kernel", "lora_a"}),
        ({"wrt": lambda path, value: value.ndim == 1}, {"bias"}),
        ({"exclude": "adapter"}, {"kernel", "bias"}),
        ({"exclude": ("params['base']['bias']",), "wrt": "base"}, {"kernel"}),
    ],
)
def test_filters_choose_parameters_and_the_report_lists_the_others(
    chosen: dict[str, Any], wanted: set[str]
):
    report = check(Adapted(), ROWS, method="twice", **chosen)
    assert {name.split("'")[-2] for name in leaves(report)} == wanted
    listed = [line for line in report.unchecked if line.endswith("(excluded)")]
    assert len(listed) == 4 - len(wanted)


# --- wrong modules --------------------------------------------------------------------


def test_a_wrong_rule_in_a_scanned_block_is_named_with_leaf_and_line():
    report = refused(Language(too_steep), TOKENS, loss=_likelihood)
    failed = [f for f in report.findings if f.verdict is Verdict.FAIL]
    assert any(f.name.startswith("params['ScanCheckpointBlock_0']") for f in failed)
    assert any(f.rule and f.rule.name == "too_steep" for f in failed)
    message = str(report)
    assert "too_steep" in message
    assert "test_flax_grads.py:" in message


def test_a_wrong_rule_in_a_stack_of_nnx_is_named():
    report = refused(Stack(too_steep), ROWS)
    assert "rule of too_steep" in str(report)
    # What comes after the last wrong rule is right.
    assert any(f.rule and f.verdict is Verdict.FAIL for f in report.findings)


class Custom(nn.Module):
    """A dense layer with a derivative by nn.custom_vjp, times a factor."""

    factor: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def forward(module: Any, x: jax.Array) -> jax.Array:
            return module(x)

        def backward(pull: Any, g: jax.Array) -> Any:
            params, x = pull(g)
            return jax.tree.map(lambda leaf: self.factor * leaf, params), x

        run = nn.custom_vjp(
            forward, forward_fn=lambda m, x: nn.vjp(forward, m, x), backward_fn=backward
        )
        return run(nn.Dense(3), x)


def test_a_rule_of_linen_custom_vjp_is_judged():
    assert check(Custom(1.0), ROWS).verdict is Verdict.PASS
    report = refused(Custom(2.0), ROWS)
    assert report.leaf("params['Dense_0']['kernel']").verdict is Verdict.FAIL
    assert "2 times too large" in str(report)


class Scale(nnx.Module):
    def __init__(self) -> None:
        self.w = nnx.Param(jnp.arange(1.0, 4.0))


def _nnx_custom(factor: float) -> nnx.Module:
    @nnx.custom_vjp
    def scaled(module: Scale, x: jax.Array) -> jax.Array:
        return jnp.sin(module.w[...] * x)

    def forward(module: Scale, x: jax.Array) -> Any:
        return scaled(module, x), (module.w[...], x)

    def backward(kept: Any, g: Any) -> Any:
        (updates, _), g = g
        w, x = kept
        inner = factor * g * jnp.cos(w * x)
        updates["w"][...] = jnp.sum(inner * x, 0)
        return updates, inner * w

    scaled.defvjp(forward, backward)

    class Module(nnx.Module):
        def __init__(self) -> None:
            self.linear, self.scale = nnx.Linear(3, 3, rngs=nnx.Rngs(0)), Scale()

        def __call__(self, x: jax.Array) -> jax.Array:
            return scaled(self.scale, self.linear(x))

    return Module()


def test_a_rule_of_nnx_custom_vjp_is_judged_in_the_gradient():
    report = check(_nnx_custom(1.0), ROWS)
    assert any("nnx.custom_vjp" in line for line in report.unchecked)
    wrong = refused(_nnx_custom(1.7), ROWS)
    assert wrong.leaf("params['scale']['w']").verdict is Verdict.FAIL
    assert "rule of scaled" in str(wrong)


def test_the_audit_can_be_left_out_and_the_report_says_so():
    report = check(Classifier(), ROWS, train=False, audit=False)
    assert report.rules == ()
    assert any("audit=False" in line for line in report.unchecked)


# --- randomness -----------------------------------------------------------------------

_CALLS = itertools.count()
DRAWS: dict[str, Callable[[jax.Array], Any]] = {
    "python": lambda x: random.random(),
    "numpy": lambda x: np.random.normal(size=3).astype(np.float32),
    "counter": lambda x: float(next(_CALLS)),
    "time": lambda x: jax.random.normal(jax.random.key(int(time.time())), (3,)),
    "callback": lambda x: jax.pure_callback(
        lambda: np.random.normal(size=3).astype(np.float32),
        jax.ShapeDtypeStruct((3,), jnp.float32),
    ),
}


class Drawing(nn.Module):
    draw: Callable[[jax.Array], Any]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(x) * self.draw(x)


@pytest.mark.parametrize("kind", DRAWS)
def test_a_module_that_two_calls_differ_of_fails_and_is_told_why(kind: str):
    report = refused(Drawing(DRAWS[kind]), ROWS)
    (finding,) = report.findings
    assert finding.check == "repeat"
    assert finding.cause is not None
    assert finding.cause.name == "not repeatable"
    assert "random" in finding.cause.says
    assert "two calls of Drawing with the same keys differ" in str(report)


def test_a_fixed_key_of_its_own_and_a_policy_made_anew_pass():
    def draw(x: jax.Array) -> jax.Array:
        fixed = jax.random.normal(jax.random.key(7), (3,))
        return jax.checkpoint(jnp.sin, policy=lambda *a, **k: False)(fixed)

    assert check(Drawing(draw), ROWS).verdict is Verdict.PASS


# --- bad input ------------------------------------------------------------------------

DENSE = nn.Dense(2)
KERNEL = {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}
SLIPS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "class": (nn.Dense, {}, "`module` must be an instance.*Dense"),
    "function": (jnp.sin, {}, "`module` must be a Flax.*assert_autodiff_matches"),
    "no params": (DENSE, {"variables": KERNEL}, "`variables` must hold.*'params'"),
    "state": (DENSE, {"variables": nnx.state(Scale())}, "`variables` of a Linen"),
    "shape": (
        DENSE,
        {"variables": {"params": KERNEL | {"bias": jnp.ones(3)}}},
        "`variables` do not fit Dense.*bias",
    ),
    "no stats": (
        nn.BatchNorm(use_running_average=True),
        {"variables": {"params": {"scale": jnp.ones(3), "bias": jnp.ones(3)}}},
        "`variables` do not fit BatchNorm.*batch_stats",
    ),
    "linen's variables": (
        Adapted(),
        {"variables": {"params": KERNEL}},
        "`variables` has params/.*nnx.state",
    ),
    "loss of a vector": (DENSE, {"loss": lambda y: y}, "`loss` must return one real"),
    "loss without output": (DENSE, {"loss": lambda: 0.0}, "`loss` must be.*alone"),
    "no loss": (DENSE, {"loss": "mse"}, "`loss` must be a function"),
    "no path": (DENSE, {"wrt": "Dense_7"}, "`wrt` selects no.*'Dense_7'.*kernel"),
    "no filter": (DENSE, {"wrt": 3}, "`wrt` must be"),
    "all excluded": (DENSE, {"exclude": ("bias", "kernel")}, "`exclude` leaves"),
    "stream": (
        nn.Sequential([DENSE, nn.Dropout(0.5, deterministic=False)]),
        {"rngs": {"noise": 0}},
        "`rngs` lacks the stream 'dropout'.*'noise'",
    ),
    "nnx stream": (Adapted(), {"rngs": {"noise": 0}}, "`rngs` names.*'noise'"),
    "key": (DENSE, {"rngs": "dropout"}, "`rngs` must be an integer"),
    "method": (DENSE, {"method": "encode"}, "`method` names 'encode'"),
    "no parameter": (nn.Sequential([nn.relu]), {}, "`module` must have parameters"),
    "order": (DENSE, {"order": 3}, "`order` must be 1 or 2"),
}


@pytest.mark.core
@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named(slip: str):
    module, options, told = SLIPS[slip]
    with pytest.raises((TypeError, ValueError), match=f"(?s){told}"):
        check(module, jnp.ones((6, 3)), **options)


def test_a_traced_call_is_refused():
    with pytest.raises(TypeError, match="call it outside of jit"):
        jax.jit(lambda x: check(DENSE, x))(jnp.ones((6, 3)))


def test_nothing_is_checked_where_chex_is_told_so():
    chex.disable_asserts()
    try:
        assert check(DENSE, ROWS).verdict is Verdict.NOT_CHECKED
    finally:
        chex.enable_asserts()


def test_chex_keywords_shape_the_message():
    with pytest.raises(RuntimeError, match="layer 3"):
        check(
            Custom(2.0), ROWS, custom_message="layer {}",
            custom_message_format_vars=(3,), exception_type=RuntimeError,
        )  # fmt: skip
