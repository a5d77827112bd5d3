import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import gradtest
import gradtest.flax
from gradtest import Verdict

flow = gradtest.flax.assert_grads_flow

X = jax.random.normal(jax.random.key(0), (4, 5))


class Deep(nn.Module):
    act: object = nn.relu
    layers: int = 2
    bias: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        for _ in range(self.layers):
            bias = nn.initializers.constant(self.bias)
            x = self.act(nn.Dense(8, bias_init=bias)(x))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(3)(x)


class Frozen(nn.Module):
    @nn.compact
    def __call__(self, x):
        self.param("unused", nn.initializers.ones, (2,))
        return nn.Dense(2)(jax.lax.stop_gradient(nn.Dense(3, name="encoder")(x)))


class Pair(nnx.Module):
    def __init__(self, bias=0.0):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(5, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.second = nnx.Linear(8, 2, rngs=rngs)
        self.first.bias[...] = jnp.full(8, bias)

    def __call__(self, x):
        return self.second(self.norm(nnx.relu(self.drop(self.first(x)))))


def failing(*args, **options):
    """Returns the report of a check that fails."""
    with pytest.raises(gradtest.GradientMismatch) as caught:
        flow(*args, **options)
    return caught.value.report


@pytest.mark.parametrize("train", [False, True])
def test_every_parameter_of_a_linen_module_gets_a_gradient(train):
    report = flow(Deep(), X, train=train, rngs=1)
    assert report.verdict is Verdict.PASS
    assert "params['Dense_2']['kernel']" in {f.name for f in report.findings}
    assert any("weighted by fixed random numbers" in note for note in report.notes)


def test_an_nnx_module_stays_as_it_is():
    pair = Pair()
    before = jax.tree_util.tree_leaves(nnx.state(pair, nnx.BatchStat, nnx.RngCount))
    flow(pair, X, loss=lambda y: jnp.mean(y**2))
    after = jax.tree_util.tree_leaves(nnx.state(pair, nnx.BatchStat, nnx.RngCount))
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


def test_symmetric_outputs_hide_no_gradient():
    flow(nn.Sequential([nn.Dense(3), nn.softmax]), X)


def test_dead_units_are_named_with_module_and_line():
    report = failing(Deep(bias=-99.0), X)
    dead = {f.name: f for f in report.findings if f.verdict is Verdict.FAIL}
    assert {f.cause.name for f in dead.values()} == {"dead ReLU"}
    # Nothing comes out of the first layer, so nothing into the second.
    assert "params['Dense_2']['bias']" not in dead
    first = dead["params['Dense_0']['kernel']"]
    assert "in Deep are at or below zero for every example" in first.cause.says
    assert first.line.function == "Deep.__call__"


def test_dead_units_of_an_nnx_module_are_named_behind_dropout():
    report = failing(Pair(bias=-99.0), X)
    found = report.leaf("params['first']['kernel']")
    assert found.cause.name == "dead ReLU"
    assert "all 8 units" in found.cause.says


def test_what_is_stopped_and_unused_is_told_apart():
    report = failing(Frozen(), X)
    stopped = report.leaf("params['encoder']['kernel']").cause
    assert stopped.name == "behind stop_gradient"
    assert "name it in `frozen`" in stopped.remedy
    assert report.leaf("params['unused']").cause.name == "unused"
    assert report.replay == "gradtest.flax.assert_grads_flow(Frozen, ..., key=0)"


@pytest.mark.parametrize(
    "frozen",
    [["encoder", "unused"], lambda path, value: "Dense_0" not in path],
)
def test_frozen_parameters_are_listed_as_such(frozen):
    report = flow(Frozen(), X, frozen=frozen)
    assert "params['encoder']['bias'] (frozen on purpose)" in report.unchecked
    assert "params['unused'] (frozen on purpose)" in report.unchecked
    assert not any("Dense_0" in line for line in report.unchecked)


def test_nnx_filters_freeze():
    report = flow(Pair(bias=0.5), X, frozen=nnx.PathContains("first"))
    assert "params['first']['kernel'] (frozen on purpose)" in report.unchecked


def test_a_loss_of_plain_parameters_is_taken():
    module = Deep()
    variables = module.init(jax.random.key(0), X)

    def loss(params, x):
        return jnp.mean(module.apply(variables | {"params": params}, x) ** 2)

    params = variables["params"]
    assert flow(loss, params, X).subject == "loss"
    report = flow(loss, params, X, frozen="Dense_*")
    assert "params['Dense_1']['bias'] (frozen on purpose)" in report.unchecked
    dead = params | {
        "Dense_1": {"kernel": jnp.zeros((8, 8)), "bias": jnp.full(8, -1.0)}
    }
    found = failing(loss, dead, X).leaf("params['Dense_0']['kernel']")
    assert found.cause.name == "dead ReLU"


def test_a_loss_of_an_nnx_module_is_taken():
    def loss(model, x):
        return jnp.mean((model(x) - 1) ** 2)

    report = flow(loss, Pair(), X)
    assert "params['norm']['scale']" in {f.name for f in report.findings}
    found = failing(loss, Pair(bias=-99.0), X).leaf("params['first']['bias']")
    assert found.cause.name == "dead ReLU"
    flow(loss, Pair(), X, frozen=[nnx.PathContains("norm")])


def test_a_method_with_auxiliary_data_is_a_loss_too():
    class Objective:
        def evaluate(self, params, x, scale=1.0):
            return scale * jnp.sum(params["w"] * x), {"x": x}

    report = flow(Objective().evaluate, {"w": jnp.ones(5)}, X, has_aux=True, scale=2.0)
    assert report.verdict is Verdict.PASS


def test_layers_are_ranked_by_their_gradient():
    notes = " ".join(flow(Deep(nn.sigmoid, layers=8), X).notes)
    assert "smallest of 10" in notes
    assert "orders of magnitude" in notes
    smallest, largest = notes.split("largest: ")
    assert "params['Dense_0']" in smallest
    assert "params['Dense_8']" in largest
    ranked = " ".join(flow(Deep(), X).notes)
    assert "from the smallest: " in ranked


def test_a_limit_makes_a_vanishing_or_exploding_layer_a_failure():
    deep = Deep(nn.sigmoid, layers=8)
    flow(deep, X, vanishing=1e-9, exploding=1e9)
    gone = failing(deep, X, vanishing=0.5)
    vanished = [f for f in gone.findings if f.verdict is Verdict.FAIL]
    assert vanished
    assert {f.cause.name for f in vanished} == {"vanishing gradient"}
    assert all(f.size < f.allowed == 0.5 for f in vanished)
    found = failing(deep, X, exploding=100.0).leaf("params['Dense_8']")
    assert found.cause.name == "exploding gradient"
    assert "times the median layer's" in found.cause.says


def test_the_message_of_a_limit():
    with pytest.raises(gradtest.GradientMismatch, match="vanishes or explodes at"):
        flow(Deep(nn.sigmoid, layers=8), X, exploding=100.0)


SLIPS = {
    "a class": (lambda: flow(nn.Dense, X), TypeError, "`module` must be an instance"),
    "no params": (lambda: flow(jnp.sum), TypeError, "`params` is missing"),
    "a loss of a loss": (
        lambda: flow(jnp.sum, X, loss=jnp.sum),
        TypeError,
        "`loss` is about a module",
    ),
    "aux of a module": (
        lambda: flow(nn.Dense(2), X, has_aux=True),
        TypeError,
        "`has_aux` is about a loss",
    ),
    "frozen names nothing": (
        lambda: flow(Deep(), X, frozen="Dens"),
        ValueError,
        "`frozen` selects no parameter: 'Dens'",
    ),
    "frozen names nothing of a loss": (
        lambda: flow(lambda p: jnp.sum(p["w"]), {"w": X}, frozen="v"),
        ValueError,
        "`frozen` selects no parameter: 'v'",
    ),
    "everything is frozen": (
        lambda: flow(nn.Dense(2), X, frozen="*"),
        ValueError,
        "`frozen` leaves nothing to check",
    ),
    "vanishing": (lambda: flow(Deep(), X, vanishing=2), ValueError, "`vanishing` must"),
    "exploding": (lambda: flow(Deep(), X, exploding=1), ValueError, "`exploding` must"),
    "a trace": (
        lambda: jax.jit(lambda x: flow(Deep(), x))(X),
        TypeError,
        "was called on traced values",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_bad_input_is_named(slip):
    call, kind, message = SLIPS[slip]
    with pytest.raises(kind) as caught:
        call()
    assert message in str(caught.value)


def test_a_loss_is_refused_by_the_name_of_its_argument():
    told = "`module` must return one real number, a loss, got "
    with pytest.raises(TypeError, match=told + "result: float32"):
        gradtest.flax.assert_grads_flow(lambda w: 2 * w, jnp.ones(3))
    with pytest.raises(TypeError, match="beside it say has_aux=True"):
        gradtest.flax.assert_grads_flow(lambda w: (jnp.sum(w), {"a": 1}), jnp.ones(3))
