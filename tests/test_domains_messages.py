import jax.numpy as jnp
import numpy as np
import pytest

from gradtest import domains

GENERATOR = np.random.default_rng(0)

SLIPS = {
    "shape of another kind": (
        lambda: domains.normal(2.5),
        TypeError,
        "`shape` must be a tuple of sizes and names, got float: 2.5",
    ),
    "size of another kind": (
        lambda: domains.normal((2, 2.5)),
        TypeError,
        "`shape` must be an integer, got float: 2.5",
    ),
    "bool as a size": (
        lambda: domains.normal((True,)),
        TypeError,
        "`shape` must be an integer, got bool: True",
    ),
    "negative size": (
        lambda: domains.normal((2, -1)),
        ValueError,
        "`shape` must not be negative, got -1",
    ),
    "name with a space": (
        lambda: domains.normal(("my batch",)),
        ValueError,
        "`shape` names an axis 'my batch', which is no identifier",
    ),
    "integer dtype": (
        lambda: domains.normal(3, dtype=jnp.int32),
        TypeError,
        "`dtype` must be a floating or complex dtype, got int32",
    ),
    "no dtype": (
        lambda: domains.normal(3, dtype=None),
        TypeError,
        "`dtype` must be a floating or complex dtype, got None",
    ),
    "unknown dtype": (
        lambda: domains.normal(3, dtype="float33"),
        TypeError,
        "`dtype` must be a floating or complex dtype, got 'float33'",
    ),
    "narrow dtype": (
        lambda: domains.normal(3, dtype=jnp.float8_e4m3fn),
        TypeError,
        "`dtype` must be a floating or complex dtype, got float8_e4m3fn",
    ),
    "complex positive": (
        lambda: domains.positive(3, dtype=jnp.complex64),
        TypeError,
        "`dtype` must be a real floating dtype, got complex64",
    ),
    "floating integers": (
        lambda: domains.integers(3, 0, 2, dtype=jnp.float32),
        TypeError,
        "`dtype` must be an integer dtype, got float32",
    ),
    "complex one_hot": (
        lambda: domains.one_hot(3, dtype=jnp.complex64),
        TypeError,
        "`dtype` must be a real floating, integer or bool dtype, got complex64",
    ),
    "ends in the wrong order": (
        lambda: domains.uniform(3, 1.0, 0.0),
        ValueError,
        "`low` must be below `high` in float32, got low=1.0, high=0.0",
    ),
    "ends that round together": (
        lambda: domains.uniform(3, 1.0, 1.001, dtype=jnp.bfloat16),
        ValueError,
        "`low` must be below `high` in bfloat16, got low=1.0, high=1.001",
    ),
    "end of another kind": (
        lambda: domains.uniform(3, "0", 1),
        TypeError,
        "`low` must be a real number, got str: '0'",
    ),
    "infinite end": (
        lambda: domains.uniform(3, 0, float("inf")),
        ValueError,
        "`high` must be finite in float32, got inf",
    ),
    "end out of range": (
        lambda: domains.uniform(3, 0, 1e6, dtype=jnp.float16),
        ValueError,
        "`high` must be finite in float16, got 1000000.0",
    ),
    "integers in the wrong order": (
        lambda: domains.integers(3, 2, 2),
        ValueError,
        "`low` must be below `high`, got low=2, high=2",
    ),
    "integer end of another kind": (
        lambda: domains.integers(3, 0, 2.0),
        TypeError,
        "`high` must be an integer, got float: 2.0",
    ),
    "integers too large": (
        lambda: domains.integers(3, 0, 300, dtype=jnp.uint8),
        ValueError,
        "`dtype` must hold the integers from 0 to 299, got uint8",
    ),
    "spd not square": (
        lambda: domains.spd((2, 3)),
        ValueError,
        "`shape` of spd must end in two equal axes, got (2, 3)",
    ),
    "invertible of two names": (
        lambda: domains.invertible(("n", "m")),
        ValueError,
        "`shape` of invertible must end in two equal axes, got ('n', 'm')",
    ),
    "orthogonal vector": (
        lambda: domains.orthogonal(3),
        ValueError,
        "`shape` of orthogonal must end in two equal axes, got (3,)",
    ),
    "unknown sign": (
        lambda: domains.invertible((2, 2), det="plus"),
        ValueError,
        "`det` must be 'any', 'positive' or 'negative', got 'plus'",
    ),
    "sign of a complex determinant": (
        lambda: domains.invertible((2, 2), det="positive", dtype=jnp.complex64),
        ValueError,
        "`det` must be 'any' for complex64, got 'positive'",
    ),
    "scalar simplex": (
        lambda: domains.simplex(()),
        ValueError,
        "`shape` of simplex must end in an axis of size 1 or more, got ()",
    ),
    "empty one_hot": (
        lambda: domains.one_hot((2, 0)),
        ValueError,
        "`shape` of one_hot must end in an axis of size 1 or more, got (2, 0)",
    ),
    "no margin": (
        lambda: domains.away_from(3, 0, margin=0),
        ValueError,
        "`margin` must be above 0, got 0",
    ),
    "kink of another kind": (
        lambda: domains.away_from(3, [0, "1"]),
        TypeError,
        "`values` must be a real number, got str: '1'",
    ),
    "kink nowhere": (
        lambda: domains.away_from(3, float("nan")),
        ValueError,
        "`values` must be finite in float32, got nan",
    ),
    "no room left": (
        lambda: domains.away_from(3, [0.0], margin=4.0),
        ValueError,
        "`values` and `margin` exclude more than 99 % of all normal numbers, got "
        "values=[0.0], margin=4.0",
    ),
    "generator of another kind": (
        lambda: domains.normal(3).draw(0),
        TypeError,
        "`generator` must be a numpy.random.Generator, got int",
    ),
    "negative size by name": (
        lambda: domains.normal("n").draw(GENERATOR, {"n": -1}),
        ValueError,
        "`sizes['n']` must not be negative, got -1",
    ),
    "size by name of another kind": (
        lambda: domains.normal("n").draw(GENERATOR, {"n": "3"}),
        TypeError,
        "`sizes['n']` must be an integer, got str: '3'",
    ),
    "last axis emptied by name": (
        lambda: domains.simplex((2, "n")).draw(GENERATOR, {"n": 0}),
        ValueError,
        "`sizes` must leave a last axis of size 1 or more, got the shape (2, 0)",
    ),
}


@pytest.mark.parametrize(("slip", "kind", "message"), SLIPS.values(), ids=SLIPS)
def test_a_slip_is_named_with_what_came_and_what_was_wanted(slip, kind, message):
    with pytest.raises(kind) as caught:
        slip()
    assert str(caught.value) == message
