"""Where a custom rule can hide in a program: in modules, loops, branches, other rules.

Each place takes a rule of one array, whose value has the array's shape, and returns
`(loss, args)`: a program that calls the rule somewhere inside.
"""

import dataclasses
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from tests.zoo_entry import Args, Fn, PyTree, Rule, normal, with_jvp, with_vjp

Made = tuple[Fn, Args]
_WIDTH = 8


@dataclasses.dataclass(frozen=True)
class HidingPlace:
    """A program around a rule.

    Attributes:
      name: Short identifier.
      make: Takes the rule and returns `(loss, args)`; devices are touched only here.
      path: Names that the path to the rule has in it: those of Flax modules.
      differentiable: Whether JAX has a reverse mode of the loss.
    """

    name: str
    make: Callable[[Rule], Made]
    path: tuple[str, ...] = ()
    differentiable: bool = True


def _arrays() -> Args:
    return normal(0, 5, _WIDTH), normal(1, _WIDTH, _WIDTH) / 2


def _loss_of(layer: Callable[[jax.Array], jax.Array]) -> Made:
    """A loss that has the layer between two others."""

    def loss(x: jax.Array, w: jax.Array) -> jax.Array:
        return jnp.mean(jnp.tanh(layer(x @ w)) ** 2)

    return loss, _arrays()


def _in_jit(rule: Rule) -> Made:
    return _loss_of(jax.jit(lambda x: 2 * rule(x)))


def _in_checkpoint(rule: Rule) -> Made:
    return _loss_of(jax.checkpoint(lambda x: jnp.sin(rule(x))))


def _in_vmap(rule: Rule) -> Made:
    return _loss_of(jax.vmap(lambda row: rule(row) + row))


def _in_map(rule: Rule) -> Made:
    return _loss_of(lambda x: jax.lax.map(lambda row: rule(row) + row, x))


def _in_cond(rule: Rule) -> Made:
    def layer(x: jax.Array) -> jax.Array:
        return jax.lax.cond(jnp.sum(x) < 1e3, rule, jnp.negative, x)

    return _loss_of(layer)


def _in_switch(rule: Rule) -> Made:
    def layer(x: jax.Array) -> jax.Array:
        index = jnp.where(x[0, 0] > 1e3, 0, 1)
        return jax.lax.switch(index, (jnp.negative, rule, jnp.sin), x)

    return _loss_of(layer)


def _in_fori_loop(rule: Rule) -> Made:
    def layer(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 3, lambda _, y: rule(y) + 0.1 * x, x)

    return _loss_of(layer)


def _in_while_loop(rule: Rule) -> Made:
    def layer(x: jax.Array) -> jax.Array:
        def step(state: Args) -> Args:
            count, y = state
            return count + 1, rule(y) + 0.1 * x

        return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, x))[1]

    return _loss_of(layer)


def _in_the_primal_of_a_custom_vjp(rule: Rule) -> Made:
    def outer(x: jax.Array) -> jax.Array:
        return rule(x) * x

    def fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return outer(x), x

    def bwd(x: jax.Array, g: jax.Array) -> Args:
        # Right in itself: it goes past the inner rule.
        return jax.vjp(lambda x: rule.fun(x) * x, x)[1](g)

    return _loss_of(with_vjp(outer, fwd, bwd))


def _in_the_primal_of_a_custom_jvp(rule: Rule) -> Made:
    def outer(x: jax.Array) -> jax.Array:
        return rule(x) * x

    def jvp(primals: Args, tangents: Args) -> Args:
        return jax.jvp(lambda x: rule.fun(x) * x, primals, tangents)

    return _loss_of(with_jvp(outer, jvp))


def _in_shard_map(rule: Rule) -> Made:
    auto = (jax.sharding.AxisType.Auto,)
    devices = jax.devices()[:1]
    mesh = jax.make_mesh((1,), ("data",), devices=devices, axis_types=auto)
    spec = PartitionSpec("data")
    return _loss_of(jax.shard_map(rule, mesh=mesh, in_specs=spec, out_specs=spec))


def _nested(rule: Rule) -> Made:
    """A remat in a branch in a loop under jit and vmap."""

    def row_layer(row: jax.Array) -> jax.Array:
        def step(y: jax.Array, _: None) -> tuple[jax.Array, None]:
            block = jax.checkpoint(lambda y: rule(y) + row)
            return jax.lax.cond(jnp.sum(row) < 1e3, block, jnp.sin, y), None

        return jax.lax.scan(step, row, None, length=2)[0]

    return _loss_of(jax.jit(jax.vmap(row_layer)))


class Hidden(nn.Module):
    """A dense layer with the rule for its activation."""

    rule: Rule

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Applies the dense layer, then the rule."""
        return self.rule(nn.Dense(_WIDTH)(x))


class _Recurrent(nn.Module):
    rule: Rule

    @nn.compact
    def __call__(self, state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return Hidden(self.rule, name="hidden")(state) + x, None


class _Net(nn.Module):
    """Wraps the hidden layer in a transformation of Flax, or in none."""

    rule: Rule
    transform: str = "none"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(3)(self._middle(nn.Dense(_WIDTH)(x)))

    def _middle(self, x: jax.Array) -> jax.Array:
        if self.transform == "scan":
            shared = {"variable_broadcast": "params", "split_rngs": {"params": False}}
            run = nn.scan(_Recurrent, **shared)(self.rule, name="block")
            return run(x, jnp.stack([x, 2 * x]))[0]
        if self.transform == "vmap":
            own = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            return nn.vmap(Hidden, **own)(self.rule, name="block")(x)
        block = nn.remat(Hidden) if self.transform == "remat" else Hidden
        return block(self.rule, name="block")(x)


def _in_linen(transform: str) -> Callable[[Rule], Made]:
    def make(rule: Rule) -> Made:
        net, x = _Net(rule, transform), normal(2, 5, 4)

        def loss(params: PyTree, x: jax.Array) -> jax.Array:
            return jnp.mean(net.apply(params, x) ** 2)

        return loss, (net.init(jax.random.key(3), x), x)

    return make


class _NnxNet(nnx.Module):
    """A linear layer with the rule for its activation."""

    def __init__(self, rule: Rule, rngs: nnx.Rngs) -> None:
        self.rule = rule
        self.linear = nnx.Linear(4, _WIDTH, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.rule(self.linear(x))


def _in_nnx(rule: Rule) -> Made:
    graph, params = nnx.split(_NnxNet(rule, nnx.Rngs(4)), nnx.Param)

    def loss(params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.mean(nnx.merge(graph, params)(x) ** 2)

    return loss, (params, normal(5, 5, 4))


def _at_the_top(rule: Rule) -> Made:
    return _loss_of(rule)


HIDING_PLACES: tuple[HidingPlace, ...] = (
    HidingPlace("top_of_the_loss", _at_the_top),
    HidingPlace("jit", _in_jit),
    HidingPlace("checkpoint", _in_checkpoint),
    HidingPlace("vmap", _in_vmap),
    HidingPlace("map", _in_map),
    HidingPlace("cond", _in_cond),
    HidingPlace("switch", _in_switch),
    HidingPlace("fori_loop", _in_fori_loop),
    HidingPlace("while_loop", _in_while_loop, differentiable=False),
    HidingPlace("primal_of_a_custom_vjp", _in_the_primal_of_a_custom_vjp),
    HidingPlace("primal_of_a_custom_jvp", _in_the_primal_of_a_custom_jvp),
    HidingPlace("shard_map", _in_shard_map),
    HidingPlace("nested", _nested),
    HidingPlace("linen_submodule", _in_linen("none"), ("block",)),
    HidingPlace("linen_remat", _in_linen("remat"), ("block",)),
    HidingPlace("linen_scan", _in_linen("scan"), ("block", "hidden")),
    HidingPlace("linen_vmap", _in_linen("vmap"), ("block",)),
    HidingPlace("nnx", _in_nnx),
)
