import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gradtest._src import seeding

KEYS = {
    "int": 5,
    "numpy": np.int64(5),
    "negative": -5,
    "huge": 2**70,
    "typed": jax.random.key(5),
    "split": jax.random.split(jax.random.key(5))[1],
    "old": jax.random.PRNGKey(5),
    "old split": jax.random.split(jax.random.PRNGKey(5))[1],
    "rbg": jax.random.key(5, impl="rbg"),
    "unsafe_rbg": jax.random.key(5, impl="unsafe_rbg"),
}


def draw(key, *context):
    return seeding.generator(key, *context).integers(2**63, size=4).tolist()


@pytest.mark.core
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_equal_arguments_give_equal_draws(key):
    assert draw(key, 0, "params/bias") == draw(key, 0, "params/bias")


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_each_trial_and_each_leaf_draws_anew(key):
    contexts = [(0, "x"), (1, "x"), (0, "y"), ("x", 0), ("0", "x"), ("0x",), (0,), ()]
    draws = {tuple(draw(key, *context)) for context in contexts}
    assert len(draws) == len(contexts)


def test_entries_of_the_context_do_not_run_together():
    assert draw(0, "ab", "c") != draw(0, "a", "bc")
    assert draw(0, "a", "") != draw(0, "a")
    assert draw(0, 1) != draw(0, "1")


def test_keys_of_different_data_draw_differently():
    keys = [0, 1, -1, *(jax.random.fold_in(jax.random.key(0), i) for i in range(3))]
    assert len({tuple(draw(key)) for key in keys}) == len(keys)


def test_a_typed_key_and_its_words_draw_alike():
    assert draw(jax.random.key(5), "x") == draw(jax.random.PRNGKey(5), "x")
    assert draw(np.asarray(jax.random.PRNGKey(5))) == draw(jax.random.PRNGKey(5))


def test_a_numpy_integer_draws_as_python_does():
    assert draw(np.int64(5), np.int32(1)) == draw(5, 1)


def test_draws_are_the_same_in_64_bit_mode():
    key = jax.random.key(5)
    expected = draw(key, "x")
    with jax.enable_x64(True):
        assert draw(key, "x") == expected


@pytest.mark.core
def test_draws_are_those_of_earlier_releases():
    # A line that replays an old failure must draw the old numbers.
    assert draw(0, 0, "x")[0] == 6818047461477781527
    assert draw(jax.random.key(0), 0, "x")[0] == 1813972734821524638


def test_the_global_random_state_is_left_alone():
    before = np.random.get_state()[1].tolist()
    draw(0, "x")
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_the_description_makes_the_key_again(key):
    again = eval(seeding.describe(key), {"jax": jax})
    assert draw(again, 0, "x") == draw(key, 0, "x")
    if isinstance(key, jax.Array):
        assert again.dtype == key.dtype


@pytest.mark.parametrize(
    ("key", "description"),
    [
        (0, "0"),
        (np.int64(5), "5"),
        (jax.random.key(5), "jax.random.key(5)"),
        (jax.random.PRNGKey(5), "jax.random.PRNGKey(5)"),
        (
            jax.random.wrap_key_data(jnp.array([1, 2], dtype="uint32")),
            'jax.random.wrap_key_data(jax.numpy.array([1, 2], dtype="uint32"), '
            "impl='threefry2x32')",
        ),
        (
            jnp.array([1, 2, 3, 4], dtype="uint32"),
            'jax.numpy.array([1, 2, 3, 4], dtype="uint32")',
        ),
    ],
)
def test_a_key_is_described_as_briefly_as_it_can_be(key, description):
    assert seeding.describe(key) == description


@pytest.mark.parametrize("function", [seeding.generator, seeding.describe])
@pytest.mark.parametrize(
    ("key", "came"),
    [
        (None, "NoneType: None"),
        (True, "bool: True"),
        (1.5, "float: 1.5"),
        ("seed", "str: 'seed'"),
        (np.zeros(2), "an array of shape (2,) and dtype float64"),
        (np.zeros((3, 2), "uint32"), "an array of shape (3, 2) and dtype uint32"),
        (jnp.uint32(3), "an array of shape () and dtype uint32"),
        (jax.random.split(jax.random.key(0)), "a batch of keys of shape (2,)"),
    ],
)
def test_what_is_no_key_is_refused_by_name(function, key, came):
    with pytest.raises(TypeError) as caught:
        function(key)
    assert str(caught.value) == (
        "`key` must be an integer, a `jax.random.key` or a `jax.random.PRNGKey`, "
        f"got {came}"
    )


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_traced_key_is_refused_as_such(make):
    with pytest.raises(TypeError, match="got a traced value, which has no number yet"):
        jax.jit(seeding.describe)(make(0))


def test_another_context_is_refused_by_name():
    with pytest.raises(TypeError) as caught:
        seeding.generator(0, "x", 1.5)
    assert str(caught.value) == (
        "`context` must hold strings and integers, got float: 1.5"
    )


@pytest.mark.devices
def test_a_key_draws_alike_on_one_device_and_on_eight():
    mesh = jax.make_mesh((8,), ("data",))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for key in (jax.random.key(5), jax.random.PRNGKey(5)):
        copied = jax.device_put(key, everywhere)
        assert len(copied.sharding.device_set) == 8
        assert draw(copied, "x") == draw(key, "x")
        assert seeding.describe(copied) == seeding.describe(key)
