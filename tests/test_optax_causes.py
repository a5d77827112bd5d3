"""What a wrong update is put down to: epsilons, conventions, schedules, sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradtest
from gradtest.optax import assert_update_matches

RATE = 0.1
PARAMS = {"w": jnp.arange(1.0, 7.0).reshape(2, 3), "s": jnp.float32(1.3)}
GRADS = {
    "w": jnp.array([[0.3, -0.2, 0.5], [-1.0, 0.7, 0.1]]),
    "s": jnp.float32(-0.7),
}


def descent(params, grads, rate=lambda step: RATE, most=np.inf):
    for step, each in enumerate(grads):
        size = sum(jnp.sum(g**2) for g in jax.tree.leaves(each)) ** 0.5
        times = rate(step) * jnp.minimum(1.0, most / size)
        params = jax.tree.map(lambda p, g, t=times: p - t * g, params, each)
    return params


def adam(params, grads):
    def leaf(p, *grads):
        m = v = 0 * p
        for t, g in enumerate(grads, 1):
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            root = (v / (1 - 0.999**t)) ** 0.5
            p = p - RATE * m / (1 - 0.9**t) / (root + 1e-8)
        return p

    return jax.tree.map(leaf, params, *grads)


class _Adam:
    """Adam by hand, with a slip."""

    def __init__(self, slip):
        self.slip = slip

    def init(self, params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return {"m": zeros, "v": zeros, "t": jnp.int32(0)}

    def update(self, grads, state, params=None):
        t, slip = state["t"] + 1, self.slip
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, state["m"], grads)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g**2, state["v"], grads)
        late = t + 1 if slip == "late" else t
        c1, c2 = 1 - 0.9**late, 1 - 0.999**late
        if slip == "exchanged":
            c1, c2 = c2, c1

        def leaf(m, v):
            if slip == "inside":
                return -RATE * m / c1 / jnp.sqrt(v / c2 + 1e-8)
            return -RATE * m / c1 / (jnp.sqrt(v / c2) + 1e-8)

        kept = {"m": state["m"] if slip == "stuck" else m, "v": v, "t": t}
        return jax.tree.map(leaf, m, v), kept


def _sgd(rate):
    return optax.sgd(rate)


def _halves(step):
    return RATE * 0.5**step


def _plain(update):
    return optax.GradientTransformation(lambda params: (), update)


def _by_leaf(updates, params=None):
    return {"w": 2 * updates["w"], "s": 0.5 * updates["s"]}


def _summed(params, grads):
    pairs = zip(grads[::2], grads[1::2], strict=False)
    return descent(params, [jax.tree.map(jnp.add, *pair) for pair in pairs])


def _updates(params, grads):
    return jax.tree.map(lambda p, *gs: -RATE * sum(gs), params, *grads)


CLIP, SMALLER = optax.clip_by_global_norm(0.5), "gradients 1000 times smaller"
WRONG = {
    "a rate of 0.09": (_sgd(0.1), lambda p, gs: descent(p, gs, lambda step: 0.09),
                       ["times too large"], ["epsilon"]),
    "one step late": (_Adam("late"), adam, ["state['t'] one less"], ["epsilon"]),
    "corrections exchanged": (_Adam("exchanged"), adam, ["times"], ["epsilon"]),
    "epsilon inside": (_Adam("inside"), adam,
                       ["(1.0e-08) stands inside of"], ["schedule"]),
    "another epsilon": (optax.adam(RATE, eps=1e-7), adam,
                        ["1e-07", "1e-08"], ["schedule"]),
    "a moment is stuck": (_Adam("stuck"), adam, ["state['m']", "is zero"], []),
    "a delayed schedule": (_sgd(lambda step: _halves(jnp.maximum(step - 1, 0))),
                           lambda p, gs: descent(p, gs, _halves),
                           ["one step behind"], ["return the new state"]),
    "a schedule half as fast": (_sgd(lambda step: _halves(step // 2)),
                                lambda p, gs: descent(p, gs, _halves),
                                ["the state is returned and moves"],
                                ["return the new state"]),
    "the reference returns updates": (_sgd(RATE), _updates,
                                      ["it returns updates"], ["decay"]),
    "the reference takes one step": (_sgd(RATE), lambda p, gs: descent(p, gs[:1]),
                                     ["after the first one"], ["relative gap", "mask"]),
    "new params": (_plain(lambda g, s, p: (jax.tree.map(
        lambda x, y: x - RATE * y, p, g), s)), descent,
        ["returns new params"], ["decay"]),
    "micro-batches averaged": (optax.MultiSteps(_sgd(RATE), 2), _summed,
                               ["2 times too small"], ["is zero at first"]),
    "no clipping": (_sgd(RATE), lambda p, gs: descent(p, gs, most=0.5),
                    [SMALLER], ["in all", "in every entry"]),
    "a clipping after the rate": (optax.chain(_sgd(RATE), optax.clip_by_global_norm(
        0.02)), lambda p, gs: descent(p, gs, most=0.02),
        [SMALLER], ["in all", "in every entry"]),
    "rates by leaf": (optax.chain(optax.stateless(_by_leaf), _sgd(RATE)), descent,
                      ["2 times too large", "0.5 times the reference's"], ["norm"]),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_the_cause_is_the_right_one(name):
    tx, reference, told, not_told = WRONG[name]
    with pytest.raises(gradtest.GradientMismatch) as caught:
        assert_update_matches(tx, reference, PARAMS, GRADS)
    message = str(caught.value)
    for words in told:
        assert words in message
    for words in not_told:
        assert words not in message


def test_the_right_ones_are_accepted():
    assert_update_matches(_Adam(""), adam, PARAMS, GRADS)
    assert_update_matches(
        optax.chain(CLIP, _sgd(RATE)), lambda p, gs: descent(p, gs, most=0.5), PARAMS,
        GRADS,
    )  # fmt: skip


class _InPython:
    """Descent that keeps something outside of its state."""

    def __init__(self, kind):
        self.kind, self.calls, self.moment, self.seen = kind, 0, None, []

    def init(self, params):
        return ()

    def update(self, grads, state, params=None):
        self.calls += 1
        times = RATE
        if self.kind == "momentum":
            old = self.moment or jax.tree.map(jnp.zeros_like, grads)
            self.moment = jax.tree.map(lambda m, g: 0.9 * m + g, old, grads)
            grads = self.moment
        elif self.kind == "history":
            self.seen.append(grads)
            grads = jax.tree.map(lambda *gs: sum(gs), *self.seen)
        elif self.kind == "first call":
            times = 0.0 if self.calls == 1 else RATE
        return jax.tree.map(lambda g: -times * g, grads), state


@pytest.mark.parametrize("kind", ["momentum", "history", "first call"])
def test_what_python_keeps_between_calls_is_caught(kind):
    with pytest.raises(gradtest.GradientMismatch, match="outside of the state"):
        assert_update_matches(_InPython(kind), descent, PARAMS, GRADS)


def test_a_python_counter_that_changes_nothing_is_accepted():
    assert_update_matches(_InPython("counts"), descent, PARAMS, GRADS)


def test_a_traced_value_that_is_kept_is_caught():
    def update(grads, state, params=None):
        if isinstance(grads["s"], jax.core.Tracer):
            kept.append(grads["s"])
            grads = jax.tree.map(lambda g: g + 0 * kept[0], grads)
        return jax.tree.map(lambda g: -RATE * g, grads), state

    kept = []
    with pytest.raises(gradtest.GradientMismatch, match="outside of the state"):
        assert_update_matches(_plain(update), descent, PARAMS, GRADS)


def test_updates_of_another_shape_are_told_of():
    wrong = _plain(lambda g, s, p=None: (jax.tree.map(lambda x: x[None], g), s))
    with pytest.raises(gradtest.GradientMismatch, match="`update` returns it as"):
        assert_update_matches(wrong, descent, PARAMS, GRADS)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="`reference` must take two arguments"):
        assert_update_matches(_sgd(RATE), lambda params: params, PARAMS, GRADS)
    with pytest.raises(TypeError, match=r"`extra_args` must be .*'value'"):
        assert_update_matches(optax.polyak_sgd(), descent, PARAMS, GRADS)
    with pytest.raises(ValueError, match=r"`params` must hold .* int32"):
        assert_update_matches(_sgd(RATE), descent, jnp.arange(3), jnp.arange(3))
