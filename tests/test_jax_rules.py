"""The rules of JAX, Optax and Flax are accepted, but for those that are wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import gradtest
from gradtest import GradientInconclusive, GradientMismatch
from tests import flax_layers, jax_rules
from tests.flax_layers import FP8, LINEN, NNX
from tests.jax_rules import FUNCTIONS, Entry

# What calls a custom rule; every other entry of the tables calls none.
_CALLERS = {
    "jax.nn": "hard_sigmoid hard_silu hard_swish log1mexp log_sigmoid mish relu relu6 "
    "softplus",
    "jax.scipy.special": "dawsn entr erfcinv erfcx exp1 expi expn fresnel hyp1f1 "
    "hyp2f1 kl_div log_ndtr logit owens_t poch rel_entr sici wofz xlog1py xlogy zeta",
    "optax.losses": "ctc_loss ctc_loss_with_forward_probs log_cosh "
    "multiclass_sparsemax_loss safe_softmax_cross_entropy "
    "sigmoid_binary_cross_entropy sigmoid_focal_loss",
}
CALLERS = {
    f"{module}.{name}" for module, names in _CALLERS.items() for name in names.split()
}
if jax.__version_info__ >= (0, 12):
    # The last calls `nonzero`, whose results are integers: nothing is left to audit.
    CALLERS |= {f"jax.scipy.special.{name}" for name in ("i0", "i1", "ndtri")}
    CALLERS |= {"jax.scipy.special.sph_harm_y"}
# Seconds of compiling each: at their first point alone, in float32.
SLOW = {
    f"jax.scipy.special.{name}" for name in ("exp1", "expi", "expn", "hyp2f1", "sici")
}
CALLING = [
    entry
    for entry in FUNCTIONS
    if entry.name in CALLERS
    and (entry.name not in SLOW or entry.point in ("ordinary", "positive"))
]
# In bfloat16 the losses and activations, which are used in it.
HALVES = [
    entry.in_bfloat16()
    for entry in CALLING
    if not entry.name.startswith("jax.scipy") and entry.point != "zero"
]

# Right as a formula; in its own dtype a difference of nearly equal numbers.
INACCURATE = {
    "jax.nn.log1mexp-large": "log1mexp",  # the second derivative is NaN above 88.7
    "jax.nn.log1mexp-large-bfloat16": "log1mexp",
    "jax.scipy.special.dawsn-large": "_dawsn",
    "jax.scipy.special.log_ndtr-large": "log_ndtr",
}
# Infinite from one side, so no step along it is one.
INFINITE = {
    "jax.scipy.special.entr-zero": "_xlogx",
    "jax.scipy.special.xlog1py-y minus one": "xlog1py",
    "jax.scipy.special.xlogy-both zero": "xlogy",
}
# Wrong: see docs/found_in_jax.md.
_SAFE = "optax.losses.safe_softmax_cross_entropy-minus infinity"
WRONG = {
    # Its second derivative: in float32 farther off than an approximation may be.
    "jax.scipy.special.wofz-large": "_wofz",
    "jax.scipy.special.hyp1f1-a zero": "hyp1f1",
    _SAFE: "weighted_logsoftmax",  # NaN in forward mode
    f"{_SAFE}-bfloat16": "weighted_logsoftmax",
}
# The rule returns a bfloat16 tangent of a float32 result: JAX refuses it.
MALFORMED = {
    f"optax.losses.multiclass_sparsemax_loss-{point}-bfloat16": (
        "_projection_unit_simplex"
    )
    for point in ("ordinary", "large", "one left")
}
ACCUSED = INACCURATE | INFINITE | WRONG | MALFORMED
# Nothing can be concluded, and why.
OPEN = {
    "jax.nn.log1mexp-zero": "the value itself is infinite",
    "jax.scipy.special.hyp2f1-ordinary": "a loop in the program stops before",
}
if jax.__version_info__ >= (0, 12):
    # At the edge of the domain: beyond it the value is infinite.
    OPEN |= {
        f"jax.scipy.special.{name}-one zero": "differences of the value are uncertain"
        for name in ("kl_div", "rel_entr")
    }
    OPEN |= {
        "jax.scipy.special.ndtri-near the ends": "differences of the value",
        "jax.scipy.special.i0-large": "infinite in its own dtype",
        "jax.scipy.special.i1-large": "infinite in its own dtype",
        "jax.scipy.special.sph_harm_y-ordinary": "no float or complex result",
    }


def _params(entries: list[Entry]) -> list[object]:
    return [
        pytest.param(entry, id=entry.id, marks=[pytest.mark.core] if k % 3 == 0 else [])
        for k, entry in enumerate(entries)
    ]


@pytest.mark.parametrize("entry", _params([*CALLING, *HALVES]))
def test_a_rule_of_jax_is_accused_only_where_it_is_wrong(entry):
    fn, args = entry.make()
    if entry.id in OPEN:
        with pytest.raises(GradientInconclusive, match=OPEN[entry.id]):
            gradtest.assert_custom_rules_match(fn, *args)
        return
    if entry.id not in ACCUSED:
        assert gradtest.assert_custom_rules_match(fn, *args).rules
        return
    with pytest.raises(GradientMismatch) as caught:
        gradtest.assert_custom_rules_match(fn, *args)
    report = caught.value.report
    wrong = [f for f in report.findings if f.verdict is gradtest.Verdict.FAIL]
    assert ACCUSED[entry.id] in {f.rule.name for f in wrong}
    gaps = {"rounding": INACCURATE, "structure": MALFORMED}
    gap = next((gap for gap, ids in gaps.items() if entry.id in ids), "formula")
    assert gap in {f.gap.value for f in wrong}


def _calls_no_rule(fn, args):
    with pytest.raises(ValueError, match="calls no custom rule"):
        gradtest.assert_custom_rules_match(fn, *args)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Optax's old names
def test_the_other_functions_call_no_custom_rule():
    for entry in FUNCTIONS:
        if entry.name not in CALLERS:
            _calls_no_rule(*entry.make())


@pytest.mark.core
@pytest.mark.parametrize(
    ("module", "known"),
    [
        (jax.nn, {*jax_rules.NN, *jax_rules.NN_ELSEWHERE}),
        (jax.scipy.special, {*jax_rules.SPECIAL}),
        (jax_rules.losses, {*jax_rules.LOSSES}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_public_function_is_in_the_tables(module, known):
    assert jax_rules.functions(module) <= known


@pytest.mark.core
def test_every_layer_is_in_the_tables():
    assert flax_layers.layers(nn) <= {*LINEN, *FP8}
    assert flax_layers.layers(nnx) <= {*NNX}


@pytest.mark.parametrize(
    ("library", "table"), [(nn, LINEN), (nnx, NNX)], ids=["linen", "nnx"]
)
def test_rules_of_layers_are_those_of_their_activations(library, table):
    for entry in flax_layers.layer_entries(library, table):
        fn, args = entry.make()
        if entry.name in ("flax.linen.BatchApply", "flax.linen.Sequential"):
            (rule,) = gradtest.assert_custom_rules_match(fn, *args).rules
            assert rule.name == "relu"
        else:
            _calls_no_rule(fn, args)


@pytest.mark.parametrize("name", FP8)
def test_products_in_8_bits_differ_from_their_functions_on_purpose(name):
    (entry,) = flax_layers.layer_entries(nn, {name: FP8[name]})
    fn, args = entry.make()
    with pytest.raises(GradientMismatch):
        gradtest.assert_custom_rules_match(fn, *args, order=1)


def test_the_derivative_of_hyp1f1_by_its_first_argument_is_wrong_at_zero():
    with pytest.raises(GradientMismatch, match="zero in every entry"):
        gradtest.assert_autodiff_matches(
            lambda a: jax.scipy.special.hyp1f1(a, 1.5, 0.6), jnp.zeros(2)
        )


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="repaired")
@pytest.mark.parametrize(
    ("fn", "x"),
    [
        (jax.scipy.special.i0, 0.0),  # jax issue 40628
        (lambda x: jax.scipy.special.expn(0, x), 0.3),  # not reported
    ],
    ids=["i0 at zero", "expn of order zero"],
)
def test_what_later_releases_repaired_is_found(fn, x):
    with pytest.raises(GradientMismatch):
        gradtest.assert_autodiff_matches(fn, jnp.array([x]))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("name", ["digamma", "gammaln"])
def test_what_was_repaired_is_right(name, order):
    """Where x is negative (jax issues 37635, 39800)."""
    x = jnp.array([-0.5, -1.3, -2.7])
    fn = getattr(jax.scipy.special, name)
    gradtest.assert_autodiff_matches(fn, x, order=order)
