"""The zoo's labels are true by JAX's own means: no part of gradtest is asked here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import zoo_layers
from tests.broken_rules import BROKEN_RULES, MALFORMED
from tests.hiding_places import HIDING_PLACES
from tests.zoo_entry import cases, is_forward

_CLOSE, _APART = 1e-9, 1e-5


def _wide(leaf):
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return leaf
    is_complex = jnp.issubdtype(leaf.dtype, jnp.complexfloating)
    return leaf.astype(jnp.complex128 if is_complex else jnp.float64)


def _floats(tree):
    leaves = jax.tree.leaves(tree)
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]


def _like(tree, seed=0):
    """Random numbers for the float leaves of a tree; they are the same each time."""
    rng = np.random.RandomState(seed)

    def draw(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return np.zeros(leaf.shape, jax.dtypes.float0)
        drawn = rng.randn(*leaf.shape) + 0.3
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            drawn = drawn + 1j * rng.randn(*leaf.shape)
        return jnp.asarray(drawn, leaf.dtype)

    return jax.tree.map(draw, tree)


def _pull(fn, args, factor=1.0):
    """The cotangents of `args` for a fixed cotangent of the value, times a factor."""
    value, pull = jax.vjp(fn, *args)
    return _floats(pull(jax.tree.map(lambda g: factor * g, _like(value))))


def _push(fn, args, factor=1.0):
    def scale(t):
        return t if t.dtype == jax.dtypes.float0 else factor * t

    moved = jax.tree.map(scale, _like(args, seed=1))
    return _floats(jax.jvp(fn, args, moved)[1])


def _pull_twice(fn, args):
    """The second derivative: of a fixed combination of the cotangents."""

    def combined(*args):
        pulled = _pull(fn, args)
        pairs = zip(_like(pulled), pulled, strict=True)
        return sum(jnp.vdot(weight, leaf).real for weight, leaf in pairs)

    moving = tuple(n for n, arg in enumerate(args) if _floats(arg))
    return _floats(jax.grad(combined, moving)(*args))


def _gap(claimed, true):
    """The largest relative gap of a leaf."""
    gaps = [0.0]
    for one, other in zip(claimed, true, strict=True):
        scale = jnp.linalg.norm(jnp.ravel(other)) or 1.0
        gaps.append(float(jnp.linalg.norm(jnp.ravel(one - other)) / scale))
    return max(gaps)


def _value_gap(fn, bare, args, forward):
    ruled = jax.jvp(fn, args, _like(args))[0] if forward else jax.vjp(fn, *args)[0]
    return _gap(_floats(ruled), _floats(bare(*args)))


def _derivative_gap(fn, bare, args, forward):
    gap = _gap(_push(fn, args), _push(bare, args)) if forward else 0.0
    return max(gap, _gap(_pull(fn, args), _pull(bare, args)))


def _linearity_gap(fn, bare, args, forward):
    # Negative: the size of a cotangent is linear in what is positive.
    move = _push if forward else _pull
    return _gap(move(fn, args, -2.0), [-2 * leaf for leaf in move(fn, args)])


def _zero_gap(fn, bare, args, forward):
    moved = (_push if forward else _pull)(fn, args, 0.0)
    return max(float(jnp.abs(leaf).max()) for leaf in moved)


def _jit_gap(fn, bare, args, forward):
    return _gap(jax.jit(lambda *args: _pull(fn, args))(*args), _pull(fn, args))


def _repeat_gap(fn, bare, args, forward):
    return _gap(_pull(fn, args), _pull(fn, args))


def _second_order_gap(fn, bare, args, forward):
    return _gap(_pull_twice(fn, args), _pull_twice(bare, args))


def _vmap_gap(fn, bare, args, forward):
    many = jnp.stack([args[0], 2 * args[0]])

    def mapped(many):
        return jax.vmap(fn)(many)

    def one_by_one(many):
        return jnp.stack([fn(one) for one in many])

    values = _gap([mapped(many)], [one_by_one(many)])
    return max(values, _gap(_pull(mapped, (many,)), _pull(one_by_one, (many,))))


_GAPS = {
    "value": _value_gap,
    "derivative": _derivative_gap,
    "linear": _linearity_gap,
    "zero cotangent": _zero_gap,
    "jit": _jit_gap,
    "repeat": _repeat_gap,
    "second order": _second_order_gap,
    "vmap": _vmap_gap,
    # The entry's program brings the symbolic zero about.
    "symbolic zeros": _derivative_gap,
}
_WITHOUT_A_MIRROR = ("linear", "zero cotangent", "jit", "repeat")
_OF_EVERY_RULE = ("value", "derivative", *_WITHOUT_A_MIRROR)


def _gap_of(entry, right, name, args=None):
    """What is off in one of the twins, in the line of the audit of this name."""
    rule = entry.make(right)
    fn, bare = entry.program(rule), entry.program(rule.fun)
    with jax.enable_x64(True):
        args = jax.tree.map(_wide, entry.args() if args is None else args())
        return _GAPS[name](fn, bare, args, is_forward(rule))


def test_every_name_is_used_once_and_there_are_58():
    names = [entry.name for entry in (*BROKEN_RULES, *MALFORMED)]
    assert len(set(names)) == len(names) >= 58


@pytest.mark.parametrize("entry", cases(BROKEN_RULES))
def test_the_right_twin_is_the_derivative_of_its_primal(entry):
    names = {*(_OF_EVERY_RULE if entry.mirrored else _WITHOUT_A_MIRROR)}
    names |= {*entry.checks} & {"vmap", "second order"}
    gaps = {name: _gap_of(entry, True, name) for name in names}
    assert {name for name in names if gaps[name] > _CLOSE} == set()


@pytest.mark.parametrize(
    "entry", cases(entry for entry in BROKEN_RULES if entry.checks[0] in _GAPS)
)
def test_the_wrong_twin_is_wrong_in_what_it_is_labelled_with(entry):
    assert _gap_of(entry, False, entry.checks[0]) > _APART


_HIDDEN = ("value", "second order", "vmap")


@pytest.mark.parametrize(
    "entry",
    cases(e for e in BROKEN_RULES if e.checks[0] in _HIDDEN and e.mirrored),
)
def test_the_gradient_shows_nothing_of_a_mistake_elsewhere(entry):
    assert _gap_of(entry, False, "derivative") < _CLOSE


@pytest.mark.parametrize(
    "entry", cases(entry for entry in BROKEN_RULES if entry.looks_right_at)
)
def test_the_wrong_twin_looks_right_at_a_usual_point(entry):
    assert _gap_of(entry, False, "derivative", entry.looks_right_at) < _CLOSE


def _in_working_precision(check):
    return cases(entry for entry in BROKEN_RULES if entry.checks[0] == check)


@pytest.mark.parametrize("entry", _in_working_precision("structure"))
def test_jax_lets_a_cotangent_of_another_dtype_pass(entry):
    (x,) = entry.args()
    (right,), (wrong,) = (_pull(entry.make(twin), (x,)) for twin in (True, False))
    assert right.dtype == x.dtype != wrong.dtype


@pytest.mark.parametrize("entry", _in_working_precision("rounding"))
def test_a_backward_pass_in_half_precision_is_far_off(entry):
    right, wrong = (_pull(entry.make(twin), entry.args()) for twin in (True, False))
    assert _gap(wrong, right) > 1e-3


def _scanned(rule, args):
    """A rule of one array in the body of a loop; any other one as it is."""
    if len(args) > 1:
        return rule
    return lambda x: jax.lax.scan(lambda c, _: (rule(c), None), x, None, 2)[0]


def _works(entry, right):
    rule, args = entry.make(right), entry.args()
    try:
        moved = _pull(_scanned(rule, args), args)
    except (TypeError, ValueError, RuntimeError, jax.errors.UnexpectedTracerError):
        return False
    return all(jnp.isfinite(leaf).all() for leaf in moved)


@pytest.mark.parametrize("entry", cases(MALFORMED))
def test_a_malformed_rule_fails_by_itself_and_its_twin_does_not(entry):
    assert _works(entry, right=True)
    assert not _works(entry, right=False)


def _loss_and_gradient(place, right):
    loss, args = place.make(zoo_layers.layer_norm_without_the_mean.make(right))
    if not place.differentiable:
        return loss(*args), None
    return jax.value_and_grad(loss, argnums=(0, 1))(*args)


@pytest.mark.parametrize("place", HIDING_PLACES, ids=lambda place: place.name)
def test_a_mistake_reaches_the_gradient_from_all_places_but_inside_other_rules(place):
    (value, right), (same, wrong) = (
        _loss_and_gradient(place, twin) for twin in (True, False)
    )
    assert abs(value - same) < 1e-6
    passed_by = not place.differentiable or "primal" in place.name
    assert (_gap(jax.tree.leaves(wrong), jax.tree.leaves(right)) < 1e-5) == passed_by
