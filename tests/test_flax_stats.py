import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import gradtest
import gradtest.flax
from gradtest import Verdict, domains

hold = gradtest.flax.assert_stats_hold

X = jax.random.normal(jax.random.key(0), (4, 5))


class Norm(nn.Module):
    """A batch norm whose flag is heeded, inverted or ignored."""

    flag: str = "heeded"

    @nn.compact
    def __call__(self, x, train=False):
        average = {"heeded": not train, "inverted": train, "ignored": False}[self.flag]
        x = nn.BatchNorm(use_running_average=average)(nn.Dense(3)(x))
        return nn.Dropout(0.2, deterministic=not train)(x)


class Average(nn.Module):
    """Subtracts a running mean that is updated in one of several ways."""

    way: str = "held"

    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("stats", "mean", lambda: jnp.full(5, 0.5))
        batch = jnp.mean(x, axis=0)
        new = {
            "held": mean.value,
            "blended": 0.9 * mean.value + 0.1 * batch,
            "moved": mean.value + 0.1 * (batch - mean.value),
            "stopped": jax.lax.stop_gradient(0.9 * mean.value + 0.1 * batch),
            "centred": mean.value,
        }[self.way]
        if train and not self.is_initializing():
            mean.value = new
        if self.way == "centred":
            return (batch - mean.value) * self.param("w", nn.initializers.ones, (5,))
        return x - new


class Tracked(nn.Module):
    """Writes a value of one collection in every call."""

    way: str = "count"

    @nn.compact
    def __call__(self, x, train=None):
        if self.way == "parameter":
            value = self.param("mean", nn.initializers.zeros, (5,))
            if not self.is_initializing():
                self.put_variable("params", "mean", 0.9 * value + 0.1 * x.mean(0))
            return x - value
        held = self.variable("seen", "value", lambda: jnp.zeros(()))
        if self.is_initializing():
            return x
        peak = jnp.max(jnp.abs(x))
        if self.way == "count":
            held.value += 1
        if self.way == "peak":
            held.value = 0.9 * held.value + 0.1 * peak
        if self.way == "where":
            held.value = jnp.where(train, peak, held.value)
        if self.way == "cond":
            held.value = jax.lax.cond(
                train, lambda old: peak, lambda old: old, held.value
            )
        if self.way == "sow":
            self.sow("losses", "peak", peak)
        return x


class Block(nnx.Module):
    def __init__(self, way="right"):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(5, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs, use_running_average=False)
        self.drop = nnx.Dropout(0.2, rngs=rngs)
        self.count = nnx.Variable(jnp.int32(0))
        self.mean = nnx.Param(jnp.zeros(6))
        self.way = way

    def __call__(self, x):
        x = self.drop(self.dense(x))
        if self.way == "count":
            self.count[...] += 1
        if self.way == "parameter":
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * x.mean(0)
        if self.way == "at the call":
            return self.norm(x, use_running_average=False)
        return self.norm(x)


class Wrapped(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.SpectralNorm(nn.Dense(4))(x, update_stats=train)


class Normed(nn.Module):
    """Normalises by what it holds, by the batch, or by both."""

    way: str = "held"

    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("batch_stats", "mean", jnp.zeros, (5,))
        var = self.variable("batch_stats", "var", jnp.ones, (5,))
        if self.way == "auxiliary":
            return nn.Dense(5)(x)
        if self.way == "contrasted":
            x = (x - mean.value) / jnp.sqrt(var.value)
            return nn.softmax(x @ x.T) + jnp.sum(x, 0).sum()
        by_mean = x.mean(0) if self.way in ("batch", "both") else mean.value
        by_var = x.var(0) if self.way in ("batch", "variance") else var.value
        if not self.is_initializing():
            if self.way == "decayed":
                mean.value = 0.9 * mean.value
            if self.way == "clamped":
                var.value = jnp.maximum(var.value, 1e-5)
            if self.way == "reset":
                mean.value = jnp.zeros(5)
        return (x - by_mean) / jnp.sqrt(by_var + 1e-5)


class Rewriting(nnx.Module):
    """Puts something in the place of its weights in every call."""

    def __init__(self, way):
        self.dense = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
        self.training = way == "own flag"
        self.norm = nnx.BatchNorm(5, rngs=nnx.Rngs(0))
        self.way = way

    def __call__(self, x):
        weights = self.dense.kernel[...]
        if self.way == "normalised":
            self.dense.kernel[...] = weights / jnp.linalg.norm(weights)
        if self.way == "ones":
            self.dense.kernel[...] = jnp.ones_like(weights)
        if self.way == "decayed":
            self.dense.bias[...] = 0.9 * self.dense.bias[...]
        if self.way == "own flag":
            return self.norm(x, use_running_average=not self.training)
        return self.dense(x)


def failing(*args, **options):
    """Returns the report of a check that fails."""
    with pytest.raises(gradtest.GradientMismatch) as caught:
        hold(*args, **options)
    return caught.value.report


RIGHT = {
    "batch norm": (Norm(), (X,)),
    "its flag given": (nn.BatchNorm(use_running_average=True), (X,)),
    "no parameters": (
        nn.BatchNorm(use_running_average=True, use_bias=False, use_scale=False),
        (X,),
    ),
    "group norm": (nn.GroupNorm(1), (X,)),
    "spectral norm": (Wrapped(), (X,)),
    "weight norm": (nn.WeightNorm(nn.Dense(4)), (X,)),
    "a held mean": (Average(), (X,)),
    "centred by a held mean": (Average("centred"), (X,)),
    "a where that is not taken": (Tracked("where"), (X, jnp.array(False))),
    "a branch that is not taken": (Tracked("cond"), (X, jnp.array(False))),
    "an nnx module left in training": (Block(), (X,)),
    "an auxiliary head that is left out": (Normed("auxiliary"), (X,)),
    "contrasted within the batch": (Normed("contrasted"), (X,)),
}


@pytest.mark.parametrize("case", RIGHT)
def test_evaluation_that_holds_its_state_passes(case):
    module, inputs = RIGHT[case]
    assert hold(module, *inputs).verdict is Verdict.PASS


WRONG = {
    "training": (Norm(), {"train": True}, "BatchNorm_0']['mean", "training mode"),
    "inverted": (Norm("inverted"), {}, "BatchNorm_0']['mean", "inverted flag"),
    "inverted, handed over": (
        Norm("inverted"),
        {"train": False},
        "BatchNorm_0']['var",
        "inverted flag",
    ),
    "ignored": (
        Norm("ignored"),
        {"train": False},
        "BatchNorm_0']['mean",
        "flag ignored",
    ),
    "always": (
        nn.Sequential([nn.Dense(3), nn.BatchNorm(use_running_average=False)]),
        {},
        "layers_1']['mean",
        "use_running_average not set",
    ),
    "an attribute": (
        nn.BatchNorm(use_running_average=False),
        {},
        "['mean",
        "training mode",
    ),
    "spectral norm": (Wrapped(), {"train": True}, "kernel/u", "training mode"),
    "a counter": (Tracked("count"), {}, "seen['value", "updated in every call"),
    "an average": (Tracked("peak"), {}, "seen['value", "updated in every call"),
    "a taken where": (
        Tracked("where"),
        {"train": jnp.array(True)},
        "seen['value",
        "training mode",
    ),
    "a parameter": (Tracked("parameter"), {}, "params['mean", "parameter written"),
    "nnx, at the call": (Block("at the call"), {}, "['norm']['mean", "not set by eval"),
    "nnx, a counter": (Block("count"), {}, "Variable['count", "not set by eval"),
    "nnx, a parameter": (
        Block("parameter"),
        {},
        "params['mean",
        "parameter written",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_changes_is_named_with_the_slip(case):
    module, options, name, cause = WRONG[case]
    report = failing(module, X, **options)
    found = [f for f in report.findings if name in f.name and f.cause]
    assert [(f.verdict, f.cause.name) for f in found] == [(Verdict.FAIL, cause)]
    assert found[0].entry.claimed != found[0].entry.true


@pytest.mark.parametrize("way", ["blended", "moved", "stopped"])
def test_an_output_through_an_updated_average_is_caught(way):
    found = failing(Average(way), X).leaf("output")
    assert found.cause.name == "updated average used"
    assert "stats['mean']" in found.cause.says
    assert "0.9 times what is held" in found.cause.says


def test_a_change_that_cannot_be_seen_at_this_point_is_caught():
    found = failing(Tracked("peak"), 0 * X).leaf("seen['value']")
    assert found.entry is None
    assert "is updated from x (at this point its value stays" in found.cause.says


def test_what_is_declared_may_change():
    report = hold(Tracked("count"), X, changes="seen")
    assert report.unchecked == ("seen['value'] (declared to change)",)
    assert hold(Block("count"), X, changes=nnx.Variable).verdict is Verdict.PASS
    assert hold(Tracked("parameter"), X, changes=["params/mean"])
    with pytest.raises(ValueError, match="`changes` names 'sean', which is no"):
        hold(Tracked("count"), X, changes="sean")
    with pytest.raises(TypeError, match="`changes` must name collections or paths"):
        hold(Tracked("count"), X, changes=3)


def test_a_decoding_cache_is_to_be_declared():
    attend = nn.MultiHeadDotProductAttention(1, decode=True)
    x = X[:2, None]
    found = failing(attend, x).leaf("cache['cache_index']")
    assert found.cause.remedy == "if that is meant, declare it: changes='cache'"
    hold(attend, x, changes="cache")


def test_what_is_sown_is_no_state():
    report = hold(Tracked("sow"), X)
    assert report.notes == ("what the call sows is no state: losses['peak'][0]",)


def test_a_module_without_collections_passes_and_says_so():
    report = hold(nn.Dense(3), X)
    assert report.verdict is Verdict.PASS
    assert any("no collection but its parameters" in note for note in report.notes)


@pytest.mark.parametrize("way", ["normalised", "ones", "decayed"])
def test_a_parameter_that_is_written_is_caught(way):
    name = "bias" if way == "decayed" else "kernel"
    found = failing(Rewriting(way), X).leaf(f"params['dense']['{name}']")
    assert found.cause.name == "parameter written"
    assert ("a second call leaves it" in found.cause.says) == (way != "decayed")


def test_a_parameter_rewritten_with_its_own_bits_is_noted():
    module = Rewriting("ones")
    module(X)
    (note,) = [n for n in hold(module, X).notes if "is rewritten" in n]
    assert note.startswith("params['dense']['kernel'] is rewritten by the call")


@pytest.mark.parametrize("layer", [nnx.SpectralNorm, nnx.WeightNorm])
def test_layers_of_nnx_that_normalise_in_place_are_to_be_declared(layer):
    norm = layer(nnx.Linear(5, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    options = {"update_stats": False} if layer is nnx.SpectralNorm else {}
    found = failing(norm, X, **options).leaf("params['layer_instance']['kernel']")
    assert "(nnx.SpectralNorm, nnx.WeightNorm), name it in" in found.cause.remedy
    kernel = "params/layer_instance/kernel"
    assert hold(norm, X, changes=kernel, **options).verdict is Verdict.PASS


@pytest.mark.parametrize("way", ["batch", "variance", "both"])
def test_statistics_of_the_batch_in_evaluation_are_caught(way):
    found = failing(Normed(way), X).leaf("output")
    assert found.cause.name == "batch statistics in evaluation"
    held = "var" if way == "variance" else "mean"
    assert f"does not depend on batch_stats['{held}']" in found.cause.says


def test_averages_that_are_not_used_are_noted():
    assert not any("not used" in note for note in hold(Normed(), X).notes)
    (note,) = [n for n in hold(Normed("auxiliary"), X).notes if "not used" in n]
    told = "batch_stats['mean'], batch_stats['var']"
    assert note == f"held averages are not used: {told}"


@pytest.mark.parametrize("way", ["decayed", "clamped", "reset"])
def test_state_computed_of_itself_is_caught_where_it_stays_the_same(way):
    name = "var" if way == "clamped" else "mean"
    found = failing(Normed(way), X).leaf(f"batch_stats['{name}']")
    assert "is computed anew from what is held" in found.cause.says


def test_a_flag_that_eval_does_not_set_is_named_as_the_modules():
    report = failing(Rewriting("own flag"), X)
    cause = report.leaf("BatchStat['norm']['mean']").cause
    assert "Rewriting.training is True and .eval() does not set it" in cause.says
    assert cause.remedy.startswith("set module.training = False before")


def test_an_nnx_module_stays_in_training_mode():
    block = Block()
    hold(block, X)
    assert block.norm.use_running_average is False
    assert block.drop.deterministic is False
    assert not block.norm.mean[...].any()


def test_loops_over_layers_are_followed():
    class Layer(nn.Module):
        train: bool

        @nn.compact
        def __call__(self, x, _):
            norm = nn.BatchNorm(use_running_average=not self.train)
            return norm(nn.Dense(5)(x)), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            axes = {"params": 0, "batch_stats": 0}
            layers = nn.scan(
                Layer, variable_axes=axes, split_rngs={"params": True}, length=3
            )
            return layers(train)(x, None)[0]

    hold(Stack(), X)
    report = failing(Stack(), X, train=True)
    assert [f.shape for f in report.findings if f.cause] == [(3, 5), (3, 5)]


def test_inputs_are_drawn_in_each_trial():
    report = hold(Norm(), domains.normal((4, 5)), trials=2, loss=jnp.mean)
    assert report.trials == 2


def test_a_plain_function_is_refused():
    with pytest.raises(TypeError, match="`module` must be an instance of a Linen"):
        hold(jnp.sum, X)


def test_the_message_of_a_change():
    with pytest.raises(gradtest.GradientMismatch) as caught:
        hold(Tracked("count"), X)
    first, at, *rest = str(caught.value).splitlines()
    assert first == (
        "assert_stats_hold failed: Tracked does not hold its state in evaluation mode: "
        "seen['value'] (float32[])."
    )
    assert "in Tracked.__call__: held.value += 1" in at
    assert rest == [
        "  seen['value']: after the call 1, before 0.",
        "  Likely cause: seen['value'] changes: the call has no flag for evaluation, "
        "and updates it always.",
        "  Try: add a flag to the call, and update its state only in training; if it "
        "is meant to change, name it in `changes`.",
        "  Replay: gradtest.flax.assert_stats_hold(Tracked, ..., key=0)",
    ]
