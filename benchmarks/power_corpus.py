"""The right programs whose rules `benchmarks.power` breaks."""

import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gradtest.domains import Domain
from tests.broken_rules import BROKEN_RULES
from tests.right_rules import RIGHT_RULES, RightRule

Made = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]
_EXAMPLES = Path(__file__).parents[1] / "examples"


@dataclasses.dataclass(frozen=True)
class Program:
    """A program whose custom rules are right, or as they are declared.

    Attributes:
      name: Short identifier.
      make: Returns the function, its arguments, and options for gradtest's assertion.
    """

    name: str
    make: Callable[[], Made]


def example(name: str) -> Any:
    """Imports one of the examples."""
    folder = str(_EXAMPLES)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def _layers(case: str) -> Callable[[], Made]:
    def make() -> Made:
        module = example("custom_vjp_layers")
        loss, args = getattr(module, case)()
        return loss, args, {"expect_differs": module.INTENTIONS}

    return make


def _kernels() -> Made:
    module = example("pallas_kernels")
    return module.losses, module.arguments(), {"order": 1}


def _digits() -> Made:
    """The network that is trained on digits, at random numbers in their place."""
    module = example("train_flax_optax")
    images = jax.random.uniform(jax.random.key(0), (module.CHECKED, 64))
    labels = jnp.arange(module.CHECKED) % 10, jnp.arange(module.CHECKED) % 2
    params = module.DigitsNet().init(jax.random.key(1), images)
    options = {"argnums": 0, "expect_differs": module.INTENTIONS}
    return module.loss_fn, (params, images, *labels), options


def _meta() -> Made:
    module = example("meta_learning")
    learner = module.Learner(module.swish)
    task = module.draw_task(jax.random.key(1))

    def loss_after_steps(start: Any, log_rate: jax.Array) -> jax.Array:
        return learner.loss_after_steps(start, log_rate, task)

    return loss_after_steps, (learner.start(jax.random.key(0)), jnp.log(0.05)), {}


def _watched() -> Made:
    module = example("watch_training")
    x = jax.random.normal(jax.random.key(0), (16, 4))
    params = {
        "w1": jax.random.normal(jax.random.key(1), (4, 8)),
        "b1": jnp.zeros(8),
        "w2": jax.random.normal(jax.random.key(2), (8,)),
    }
    loss = module.make_loss(module.right_hard_tanh)
    return loss, (params, (x, jnp.sin(x[:, 0]))), {"argnums": 0}


EXAMPLES = (
    Program("custom_vjp_layers: Linen", _layers("linen_case")),
    Program("custom_vjp_layers: NNX", _layers("nnx_case")),
    Program("pallas_kernels", _kernels),
    Program("train_flax_optax", _digits),
    Program("meta_learning", _meta),
    Program("watch_training", _watched),
    Program("power", lambda: example("power").program()),
)

# Called at their kinks, or with a zero: a slip that shows everywhere else is right
# there, so that the special points are asked for as well.
_AT_A_SPECIAL_POINT = frozenset(
    {"at_its_kink", "exactly_at_its_bounds", "of_jax_itself", "of_optax"}
)


def _right(entry: RightRule) -> Made:
    is_special = entry.name in _AT_A_SPECIAL_POINT
    return (*entry.make(), {"hazards": True} if is_special else {})


RIGHT = tuple(
    Program(entry.name, functools.partial(_right, entry)) for entry in RIGHT_RULES
)

ZOO = tuple(
    Program(
        f"zoo: {entry.name}",
        lambda entry=entry: (entry.program(entry.make(True)), entry.args(), {}),
    )
    for entry in BROKEN_RULES
    if entry.devices == 1
)


def in_dtype(programs: tuple[Program, ...], dtype: Any) -> Iterator[Program]:
    """Yields programs with their float32 arguments in another dtype."""

    def of(program: Program) -> Made:
        fn, args, options = program.make()
        return fn, jax.tree.map(cast, args), options

    def cast(leaf: Any) -> Any:
        is_float = getattr(leaf, "dtype", None) == np.float32
        return leaf.astype(dtype) if is_float and hasattr(leaf, "astype") else leaf

    for program in programs:
        name = f"{program.name} in {np.dtype(dtype).name}"
        yield Program(name, lambda program=program: of(program))


def values(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Returns arguments with what is drawn drawn, for checkers that draw nothing."""
    return jax.tree.map(
        lambda leaf: leaf.draw(np.random.default_rng(0)) if _is_drawn(leaf) else leaf,
        args,
        is_leaf=_is_drawn,
    )


def _is_drawn(leaf: Any) -> bool:
    return isinstance(leaf, Domain)
