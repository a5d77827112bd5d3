"""Gradient bugs that really happened, each as a right and a wrong twin.

Every bug is re-expressed in our own formulation from a public discussion, which its
`source` names. The twins have one primal: only their derivatives differ.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

Fn = Callable[..., Any]
Args = tuple[Any, ...]
PyTree = Any

_HIGHEST = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class RealBug:
    """A gradient bug and its repair.

    Attributes:
      name: Short identifier.
      source: The public discussion that the bug comes from.
      kind: What sort of mistake it is.
      make_right: Returns `(fn, args)` whose derivative is right at `args`.
      make_wrong: Returns `(fn, args)` whose derivative is wrong at `args`.
      argnums: The arguments to differentiate.
      order: The order of derivative at which the bug shows.
      modes: The modes that the derivative rule supports.
      devices: How many devices are needed for the bug to show.
      generic_args: Returns arguments at which the wrong twin looks right.
    """

    name: str
    source: str
    kind: str
    make_right: Callable[[], tuple[Fn, Args]]
    make_wrong: Callable[[], tuple[Fn, Args]]
    argnums: tuple[int, ...]
    order: int = 1
    modes: tuple[str, ...] = ("rev",)
    devices: int = 1
    generic_args: Callable[[], Args] | None = None


def _make(
    build: Callable[[bool], Fn], make_args: Callable[[], Args], wrong: bool
) -> Any:
    return build(wrong), make_args()


def _bug(
    name: str,
    source: str,
    kind: str,
    build: Callable[[bool], Fn],
    make_args: Callable[[], Args],
    argnums: tuple[int, ...],
    **options: Any,
) -> RealBug:
    """Pairs the twins of `build(wrong)`; nothing touches a device until called."""
    return RealBug(
        name=name,
        source=source,
        kind=kind,
        make_right=functools.partial(_make, build, make_args, False),
        make_wrong=functools.partial(_make, build, make_args, True),
        argnums=argnums,
        **options,
    )


def _random(seed: int) -> np.random.RandomState:
    return np.random.RandomState(seed)


def _float32(values: Any) -> jax.Array:
    return jnp.asarray(np.asarray(values, np.float32))


def _at_least_float32(x: jax.Array) -> jax.Array:
    """Widens half precision for accumulation; float64 stays float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _smoothing(wrong: bool, sigma: float = 0.5) -> Fn:
    """Gaussian smoothing whose score-function derivative lacks 1 / sigma."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(8)
    weights = weights / weights.sum()

    def value_and_slope(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        shape = (-1,) + (1,) * x.ndim
        z = jnp.asarray(nodes.reshape(shape), x.dtype)
        w = jnp.asarray(weights.reshape(shape), x.dtype)
        moved = x[None] + sigma * z
        values = moved**3 - 2 * moved
        slope = jnp.sum(w * values * z, 0)
        return jnp.sum(w * values, 0), slope if wrong else slope / sigma

    @jax.custom_jvp
    def smoothed(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: value_and_slope(x)[0], tree)

    @smoothed.defjvp
    def _(primals: Args, tangents: Args) -> tuple[PyTree, PyTree]:
        (tree,), (tangent,) = primals, tangents
        moved = jax.tree.map(lambda x, dx: value_and_slope(x)[1] * dx, tree, tangent)
        return smoothed(tree), moved

    return smoothed


def _smoothing_args() -> Args:
    return (
        {"a": _float32(_random(0).randn(4)), "b": _float32(_random(1).randn(2, 3))},
    )


def _triangular_solve(wrong: bool) -> Fn:
    """A triangular solve whose JVP reads the half of dL that the solve never reads."""
    solve_lower = functools.partial(jax.scipy.linalg.solve_triangular, lower=True)

    @jax.custom_jvp
    def solve(matrix: jax.Array, rhs: jax.Array) -> jax.Array:
        return solve_lower(matrix, rhs)

    @solve.defjvp
    def _(primals: Args, tangents: Args) -> tuple[jax.Array, jax.Array]:
        (matrix, rhs), (d_matrix, d_rhs) = primals, tangents
        x = solve(matrix, rhs)
        read = d_matrix if wrong else jnp.tril(d_matrix)
        return x, solve_lower(matrix, d_rhs - read @ x)

    return solve


def _triangular_solve_args() -> Args:
    matrix = np.tril(_random(2).randn(5, 5) * 0.3) + 2 * np.eye(5)
    return _float32(matrix), _float32(_random(3).randn(5))


def _dense_with_shift(wrong: bool) -> Fn:
    """A dense layer: 1024 weights are right, the gradient of its one shift is zero."""

    def primal(params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.tanh(jnp.dot(x, params["w"], precision=_HIGHEST) + params["shift"])

    @jax.custom_vjp
    def dense(params: PyTree, x: jax.Array) -> jax.Array:
        return primal(params, x)

    def forward(params: PyTree, x: jax.Array) -> tuple[jax.Array, Any]:
        y = primal(params, x)
        return y, (params, x, y)

    def backward(residuals: Any, cotangent: jax.Array) -> Args:
        params, x, y = residuals
        dz = cotangent * (1 - y * y)
        d_shift = jnp.zeros_like(params["shift"]) if wrong else dz.sum()
        d_w = jnp.dot(x.T, dz, precision=_HIGHEST)
        dx = jnp.dot(dz, params["w"].T, precision=_HIGHEST)
        return {"w": d_w, "shift": d_shift}, dx

    dense.defvjp(forward, backward)
    return dense


def _dense_with_shift_args() -> Args:
    w = _float32(_random(6).randn(32, 32) / 6)
    return {"w": w, "shift": _float32(0.1)}, _float32(_random(7).randn(8, 32))


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    wide_q, wide_k = _at_least_float32(q), _at_least_float32(k)
    return jnp.einsum("bhqd,bhkd->bhqk", wide_q, wide_k, precision=_HIGHEST)


def _attend(scores: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the output, the weights and the log-sum-exp of the scores."""
    peak = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    total = peak + jnp.log(jnp.exp(scores - peak).sum(-1, keepdims=True))
    weights = jnp.exp(scores - total)
    wide_v = _at_least_float32(v)
    out = jnp.einsum("bhqk,bhkd->bhqd", weights, wide_v, precision=_HIGHEST)
    return out, weights, total


def _score_cotangent(
    weights: jax.Array, v: jax.Array, out: jax.Array, cotangent: jax.Array
) -> jax.Array:
    wide_v = _at_least_float32(v)
    d_weights = jnp.einsum("bhqd,bhkd->bhqk", cotangent, wide_v, precision=_HIGHEST)
    return weights * (d_weights - (cotangent * out).sum(-1, keepdims=True))


def _causal_attention(wrong: bool, q_block: int = 4, k_block: int = 2) -> Fn:
    """Causal attention whose dq counts key blocks in units of the query block.

    It is exact where both block sizes agree, or the sequence fits into one block.
    """

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        length, scale = q.shape[2], q.shape[-1] ** -0.5
        seen = jnp.tril(jnp.ones((length, length), bool))
        return _attend(jnp.where(seen, _scores(q, k) * scale, -1e9), v)

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend(q, k, v)[0]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        out, weights, _ = attend(q, k, v)
        return out, (q, k, v, out, weights)

    def backward(residuals: Any, cotangent: jax.Array) -> Args:
        q, k, v, out, weights = residuals
        length, scale = q.shape[2], q.shape[-1] ** -0.5
        ds = _score_cotangent(weights, v, out, cotangent)
        ds_for_q = ds
        if wrong:
            q_index = np.arange(length)[:, None] // q_block
            k_index = np.arange(length)[None] // k_block
            ds_for_q = jnp.where(jnp.asarray(k_index <= q_index), ds, 0)
        return (
            jnp.einsum("bhqk,bhkd->bhqd", ds_for_q, k, precision=_HIGHEST) * scale,
            jnp.einsum("bhqk,bhqd->bhkd", ds, q, precision=_HIGHEST) * scale,
            jnp.einsum("bhqk,bhqd->bhkd", weights, cotangent, precision=_HIGHEST),
        )

    attention.defvjp(forward, backward)
    return attention


def _attention_args(seed: int, length: int = 8, width: int = 4) -> Args:
    random = _random(seed)
    return tuple(_float32(random.randn(1, 2, length, width)) for _ in range(3))


def _half_precision_attention(wrong: bool) -> Fn:
    """Attention that recomputes its scores in bfloat16 where the forward had float32.

    Invisible while the scores are of order 1; at 256 the error in the exponent is 1.
    """

    @jax.custom_vjp
    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return _attend(_scores(q, k), v)[0]

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        out, _, total = _attend(_scores(q, k), v)
        return out, (q, k, v, out, total)

    def backward(residuals: Any, cotangent: jax.Array) -> Args:
        q, k, v, out, total = residuals
        scores = _scores(q, k)
        if wrong:
            scores = scores.astype(q.dtype).astype(total.dtype)
        weights = jnp.exp(scores - total)
        ds = _score_cotangent(weights, v, out, cotangent)
        wide_q, wide_k = _at_least_float32(q), _at_least_float32(k)
        dq = jnp.einsum("bhqk,bhkd->bhqd", ds, wide_k, precision=_HIGHEST)
        dk = jnp.einsum("bhqk,bhqd->bhkd", ds, wide_q, precision=_HIGHEST)
        dv = jnp.einsum("bhqk,bhqd->bhkd", weights, cotangent, precision=_HIGHEST)
        return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)

    attention.defvjp(forward, backward)
    return attention


def _half_precision_args() -> Args:
    """A large score common to all keys, which cancels, and differences of order 1."""
    q, k, v = _attention_args(10, width=16)
    shifted = q.at[..., 0].set(16.0), k.at[..., 0].set(16.0), v
    return tuple(x.astype(jnp.bfloat16) for x in shifted)


def _half_precision_generic_args() -> Args:
    return tuple((x * 0.3).astype(jnp.bfloat16) for x in _attention_args(10, width=16))


def _segment_sum(wrong: bool, segments: int = 8) -> Fn:
    """The forward drops padded ids, the backward gathers with clamping."""
    ids = np.sort(_random(11).randint(0, segments, 64)).astype(np.int32)
    ids[-3:] = segments

    @jax.custom_vjp
    def segment_sum(x: jax.Array) -> jax.Array:
        return jnp.zeros((segments + 1,), x.dtype).at[ids].add(x)[:segments]

    def forward(x: jax.Array) -> tuple[jax.Array, None]:
        return segment_sum(x), None

    def backward(_: None, cotangent: jax.Array) -> Args:
        gathered = cotangent[np.minimum(ids, segments - 1)]
        return (gathered if wrong else jnp.where(ids < segments, gathered, 0),)

    segment_sum.defvjp(forward, backward)
    return segment_sum


def _softplus(wrong: bool) -> Fn:
    """The derivative at exactly 0 is 0 for 1/2: sparse inputs hit it constantly."""

    @jax.custom_jvp
    def softplus(x: jax.Array) -> jax.Array:
        return jnp.logaddexp(x, 0 * x)

    @softplus.defjvp
    def _(primals: Args, tangents: Args) -> tuple[jax.Array, jax.Array]:
        (x,), (dx,) = primals, tangents
        slope = jax.nn.sigmoid(x)
        return softplus(x), dx * (jnp.where(x == 0, 0, slope) if wrong else slope)

    return softplus


def _softplus_args() -> Args:
    is_zero = _random(16).rand(16) < 0.4
    return (_float32(np.where(is_zero, 0, _random(17).randn(16))),)


def _square_root_branch(wrong: bool) -> Fn:
    """The square root of a negative number in the branch not taken: 0 * NaN."""

    def branch(x: jax.Array) -> jax.Array:
        safe = x if wrong else jnp.where(x > 0.5, x, 1)
        return jnp.where(x > 0.5, jnp.sqrt(safe), x * x)

    return branch


def _square_root_generic_args() -> Args:
    return (_float32(_random(19).uniform(0.6, 2, 12)),)


def _square_root_args() -> Args:
    (x,) = _square_root_generic_args()
    return (x * _float32(np.where(_random(20).rand(12) < 0.3, -1, 1)),)


def _log_beta(wrong: bool) -> Fn:
    """Sorting the symmetric arguments keeps the gradient and breaks the Hessian."""

    def log_beta(a: jax.Array, b: jax.Array) -> jax.Array:
        if wrong:
            a, b = jnp.minimum(a, b), jnp.maximum(a, b)
        return jax.lax.lgamma(a) + jax.lax.lgamma(b) - jax.lax.lgamma(a + b)

    return log_beta


def _squared_modulus(wrong: bool) -> Fn:
    """JAX's convention for a C -> R function needs the conjugate."""

    @jax.custom_vjp
    def squared_modulus(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda z: jnp.real(z) ** 2 + jnp.imag(z) ** 2, tree)

    def forward(tree: PyTree) -> tuple[PyTree, PyTree]:
        return squared_modulus(tree), tree

    def backward(tree: PyTree, cotangent: PyTree) -> Args:
        def pull(z: jax.Array, g: jax.Array) -> jax.Array:
            return 2 * (z if wrong else jnp.conj(z)) * g

        return (jax.tree.map(pull, tree, cotangent),)

    squared_modulus.defvjp(forward, backward)
    return squared_modulus


def _complex_normal(seed: int, *shape: int) -> jax.Array:
    z = _random(seed).randn(*shape) + 1j * _random(seed + 1).randn(*shape)
    return jnp.asarray(z.astype(np.complex64))


def _squared_modulus_args() -> Args:
    return ({"a": _complex_normal(24, 3), "b": _complex_normal(26, 2, 2)},)


def _cubic_root(wrong: bool) -> Fn:
    """The implicit derivative reaches the right-hand side, not the coefficient."""

    def newton(params: PyTree) -> jax.Array:
        a, b = params["a"], params["b"]

        def step(_: int, x: jax.Array) -> jax.Array:
            return x - (x**3 + a * x - b) / (3 * x * x + a)

        return jax.lax.fori_loop(0, 60, step, jnp.zeros_like(b))

    @jax.custom_vjp
    def root(params: PyTree) -> jax.Array:
        return newton(params)

    def forward(params: PyTree) -> tuple[jax.Array, Any]:
        x = newton(params)
        return x, (params, x)

    def backward(residuals: Any, cotangent: jax.Array) -> Args:
        params, x = residuals
        db = cotangent / (3 * x * x + params["a"])
        return ({"a": jnp.zeros_like(db) if wrong else -db * x, "b": db},)

    root.defvjp(forward, backward)
    return root


def _cubic_root_args() -> Args:
    return (
        {"a": _float32(_random(32).rand(5) + 1), "b": _float32(_random(33).randn(5))},
    )


def _data_parallel(wrong: bool) -> Fn:
    """The loss is averaged over devices, its gradients are summed."""
    devices = jax.devices()[: min(4, len(jax.devices()))]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("data",), devices=devices, axis_types=auto)
    over_devices = functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("data"), PartitionSpec("data")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    reduce_gradient = jax.lax.psum if wrong else jax.lax.pmean

    def local_loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        predicted = jnp.tanh(jnp.dot(x, params["w"], precision=_HIGHEST)) + params["b"]
        return jnp.mean((predicted - y) ** 2)

    @over_devices
    def global_loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.lax.pmean(local_loss(params, x, y), "data")

    @over_devices
    def global_gradient(params: PyTree, x: jax.Array, y: jax.Array) -> PyTree:
        local = jax.grad(local_loss)(params, x, y)
        return jax.tree.map(lambda g: reduce_gradient(g, "data"), local)

    @jax.custom_vjp
    def loss(params: PyTree, x: jax.Array, y: jax.Array) -> jax.Array:
        return global_loss(params, x, y)

    def forward(params: PyTree, x: jax.Array, y: jax.Array) -> tuple[jax.Array, Args]:
        return global_loss(params, x, y), (params, x, y)

    def backward(args: Args, cotangent: jax.Array) -> Args:
        # The data's gradients are plain autodiff, right in both twins.
        dx, dy = jax.grad(local_loss, (1, 2))(*args)
        d_params = jax.tree.map(lambda g: cotangent * g, global_gradient(*args))
        return d_params, cotangent * dx, cotangent * dy

    loss.defvjp(forward, backward)
    return loss


def _data_parallel_args() -> Args:
    params = {"w": _float32(_random(34).randn(3)), "b": _float32(0.2)}
    return params, _float32(_random(35).randn(16, 3)), _float32(_random(36).randn(16))


_BOTH_MODES = ("fwd", "rev")

REAL_BUGS: tuple[RealBug, ...] = (
    _bug(
        "smoothing_without_inverse_sigma",
        "google-deepmind/optax#1308",
        "missing factor",
        _smoothing,
        _smoothing_args,
        (0,),
        modes=_BOTH_MODES,
    ),
    _bug(
        "triangular_solve_unmasked_tangent",
        "jax-ml/jax#1458",
        "structure of the input ignored",
        _triangular_solve,
        _triangular_solve_args,
        (0, 1),
        modes=_BOTH_MODES,
    ),
    _bug(
        "one_parameter_of_1025_zero",
        "jax-ml/jax#27184",
        "missing cotangent of a small leaf",
        _dense_with_shift,
        _dense_with_shift_args,
        (0, 1),
    ),
    _bug(
        "causal_attention_block_sizes",
        "jax-ml/jax#25647",
        "block dropped in the backward pass",
        _causal_attention,
        lambda: _attention_args(9),
        (0, 1, 2),
        generic_args=lambda: _attention_args(9, length=2),
    ),
    _bug(
        "attention_scores_in_bfloat16",
        "jax-ml/jax#19301",
        "precision lost in the backward pass",
        _half_precision_attention,
        _half_precision_args,
        (0, 1, 2),
        generic_args=_half_precision_generic_args,
    ),
    _bug(
        "segment_sum_padded_ids",
        "jax-ml/jax#8634",
        "wrong at padded entries",
        _segment_sum,
        lambda: (_float32(_random(12).randn(64)),),
        (0,),
    ),
    _bug(
        "softplus_at_zero",
        "jax-ml/jax#2107",
        "wrong at an exact zero",
        _softplus,
        _softplus_args,
        (0,),
        modes=_BOTH_MODES,
        generic_args=lambda: (_float32(_random(18).randn(16)),),
    ),
    _bug(
        "nan_through_untaken_square_root",
        "jax-ml/jax#5798",
        "NaN through an untaken branch",
        _square_root_branch,
        _square_root_args,
        (0,),
        modes=_BOTH_MODES,
        generic_args=_square_root_generic_args,
    ),
    _bug(
        "log_beta_hessian_at_tie",
        "jax-ml/jax#34353",
        "second order, at ties",
        _log_beta,
        lambda: (_float32([1.0, 2.0, 1.5]), _float32([1.0, 2.0, 1.5])),
        (0, 1),
        order=2,
        modes=_BOTH_MODES,
        generic_args=lambda: (_float32([1.0, 2.0, 1.5]), _float32([1.3, 0.7, 2.2])),
    ),
    _bug(
        "squared_modulus_conjugate",
        "jax-ml/jax#979",
        "missing conjugate",
        _squared_modulus,
        _squared_modulus_args,
        (0,),
    ),
    _bug(
        "implicit_root_coefficient",
        "danielward27/flowjax#176",
        "missing cotangent of a leaf",
        _cubic_root,
        _cubic_root_args,
        (0,),
    ),
    _bug(
        "data_parallel_sum_for_mean",
        "jax-ml/jax#3970",
        "scaled by the number of devices",
        _data_parallel,
        _data_parallel_args,
        (0, 1, 2),
        devices=2,
    ),
)
