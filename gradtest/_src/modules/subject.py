"""A Flax module, Linen or NNX, as pure functions of its variables."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from gradtest._src.execution import user_code
from gradtest._src.inputs import read_inputs
from gradtest._src.lifting import is_inexact
from gradtest._src.modules import filters, linen, nnx_modules
from gradtest._src.modules.calling import Arguments
from gradtest._src.modules.model import Call, Model
from gradtest._src.program import describe

PyTree = Any


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A Flax module at given inputs, as pure functions of its variables.

    Attributes:
      name: The module's class.
      params: What is differentiated, as nested dicts.
      collections: All other variables by collection, random state left out.
      inputs: What the module is called with: the positional inputs as the user gave
        them (numbers that are no arrays are wrapped, so that they stay Python's), then
        the keyword ones that hold arrays.
      loss: `loss(params, collections, *inputs)` returns the loss, or the module's
        output where there is none.
      apply: Takes the same; returns the output and the updated collections.
      frozen: Names of the leaves of `params` that the filters left out, as `exclude`
        takes them.
      notes: What a report should say of the module.
      after: As `apply`, but returns all variables as the call leaves them, with the
        parameters under "params".
    """

    name: str
    params: PyTree
    collections: PyTree
    inputs: tuple[Any, ...]
    loss: Callable[..., Any]
    apply: Callable[..., tuple[Any, PyTree]]
    frozen: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    after: Callable[..., tuple[Any, PyTree]] | None = None

    @property
    def args(self) -> tuple[Any, ...]:
        """The arguments of `loss` and `apply`."""
        return (self.params, self.collections, *self.inputs)


def read_module(
    module: Any,
    inputs: Sequence[Any],
    *,
    loss: Callable[[Any], Any] | None = None,
    rngs: Any = None,
    variables: Any = None,
    wrt: Any = None,
    exclude: Any = (),
    method: Any = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    key: Any = 0,
    differentiated: bool = True,
    role: str = "module",
) -> Subject:
    """Reads a module at its inputs; initialises a Linen one that has no variables.

    Args:
      module: A Linen or NNX module; it is not changed.
      inputs: What it is called with.
      loss: A function of its output; None for the output itself.
      rngs: None, an integer, a key, or a dict of streams.
      variables: Those to take; None to initialise (Linen), or the module's own (NNX).
      wrt: Filters of the parameters that are differentiated; None for all.
      exclude: Filters of those that are not.
      method: The method that is called, or its name; None for `__call__`.
      apply_kwargs: Keyword arguments of the module.
      key: Draws inputs, and whatever `rngs` leaves open.
      differentiated: Whether there must be parameters and a result to differentiate.
      role: The argument that the module came as, for messages.

    Raises:
      TypeError, ValueError: An argument is not what it must be; the message names it.
    """
    reader = _reader(module, role)
    name = type(module).__name__
    _check_loss(loss)
    _check_method(module, method, name)
    wanted = filters.as_filters("wrt", wrt)
    unwanted = filters.as_filters("exclude", exclude)
    arguments = Arguments.of(module, method, inputs, apply_kwargs or {})
    first = Call(*arguments.drawn(key), method, rngs, key)
    with user_code(), _explaining(name, inputs):
        model = reader(module, first, variables, wanted)
    if not model.entries and differentiated:
        raise ValueError(
            f"`{role}` must have parameters to differentiate, but {name} has none of "
            f"float or complex dtype{_other_variables(model)}."
        )
    subject = _subject(name, model, arguments, loss)
    if not differentiated:
        return subject
    left_out = filters.frozen(model.entries, wanted, unwanted)
    subject = dataclasses.replace(subject, frozen=left_out)
    _try(subject, loss, key, inputs)
    return subject


def _reader(module: Any, role: str) -> Callable[..., Model]:
    """Returns what reads modules of this library.

    Raises:
      TypeError: It is no module.
    """
    if isinstance(module, type):
        raise TypeError(
            f"`{role}` must be an instance of a Flax module, got the class "
            f"{module.__name__}: write {module.__name__}(...)."
        )
    if isinstance(module, nn.Module):
        return linen.read
    if isinstance(module, nnx.Module):
        return nnx_modules.read
    raise TypeError(
        f"`{role}` must be a Flax Linen or NNX module, got {describe(module)}: plain "
        "functions are checked by gradtest.assert_autodiff_matches."
    )


@contextlib.contextmanager
def speaking_of(called: str, by: str) -> Iterator[None]:
    """Names an argument as its user does, where an error has another name for it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        told = str(error)
        if type(error) not in (TypeError, ValueError) or called not in told:
            raise
        clear = type(error)(told.replace(called, by))
        clear.__notes__ = getattr(error, "__notes__", [])
        raise clear from error


@contextlib.contextmanager
def _explaining(name: str, inputs: Sequence[Any]) -> Iterator[None]:
    """Names the argument where Flax refuses variables, a method or a string."""
    try:
        yield
    except Exception as error:
        clear = linen.explained(error, name)
        if clear is not None:
            raise clear from error
        for place, value in enumerate(inputs):
            if isinstance(value, str | bytes):
                raise TypeError(
                    f"`inputs` must be what {name} can be called with, arrays as a "
                    f"rule; it fails with {value!r} as number {place}: {error}"
                ) from error
        raise


def _other_variables(model: Model) -> str:
    others = ", ".join(map(str, model.collections))
    return f" (its other variables: {others})" if others else ""


def _check_loss(loss: Any) -> None:
    """Raises TypeError where a loss can't be called with an output alone."""
    if loss is None:
        return
    if not callable(loss):
        raise TypeError(
            f"`loss` must be a function of the module's output, got {loss!r}."
        )
    try:
        signature = inspect.signature(loss)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None)
    except TypeError as error:
        name = getattr(loss, "__name__", "loss")
        raise TypeError(
            f"`loss` must be a function of the module's output alone, got "
            f"{name}{signature}: {error}. Close over targets and the like."
        ) from None


def _check_method(module: Any, method: Any, name: str) -> None:
    """Raises TypeError or ValueError where there is no such method."""
    if isinstance(method, str) and not hasattr(module, method):
        raise ValueError(f"`method` names {method!r}, which {name} does not have.")
    if method is not None and not isinstance(method, str) and not callable(method):
        raise TypeError(f"`method` must be a method or its name, got {method!r}.")


def _subject(
    name: str, model: Model, arguments: Arguments, loss: Callable[[Any], Any] | None
) -> Subject:
    def apply(params: PyTree, collections: PyTree, *inputs: Any) -> tuple[Any, PyTree]:
        return model.apply(params, collections, *arguments.at(inputs))

    def after(params: PyTree, collections: PyTree, *inputs: Any) -> tuple[Any, PyTree]:
        assert model.after is not None
        return model.after(params, collections, *arguments.at(inputs))

    def result(params: PyTree, collections: PyTree, *inputs: Any) -> Any:
        output, _ = apply(params, collections, *inputs)
        return output if loss is None else loss(output)

    return Subject(
        name,
        model.params,
        model.collections,
        arguments.values,
        arguments.sign(result, name),
        arguments.sign(apply, name),
        notes=model.notes,
        after=arguments.sign(after, name),
    )


def _try(
    subject: Subject,
    loss: Callable[[Any], Any] | None,
    key: Any,
    given: Sequence[Any],
) -> None:
    """Traces the module once, for errors that name what is amiss.

    Raises:
      TypeError: The output can't be differentiated, or `loss` returns no scalar.
      Exception: What the module or the loss raises, with a note of whose it is.
    """
    inputs = read_inputs(subject.loss, subject.args, argnums=0)
    point = inputs.draw(key, 0)
    results: list[Any] = []

    def traced(moving: Any, held: Any) -> None:
        output, _ = _noting(
            f"the module {subject.name}",
            lambda: subject.apply(*inputs.arguments(moving, held)),
        )
        if loss is not None:
            output = _noting("`loss`", lambda: loss(output))
        results.append(_described(output))

    try:
        with user_code(), _explaining(subject.name, given):
            jax.eval_shape(traced, point.moving, point.held)
    except NameError as error:
        if "axis name" not in str(error):
            raise
        return  # what binds the axis is a variant, and comes later
    _check_result(results[-1], "`module`" if loss is None else "`loss`")


def _noting(what: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:
        error.add_note(f"gradtest: raised by {what} itself, while it was traced.")
        raise


def _described(result: Any) -> list[tuple[str, Any]]:
    """Returns the path and the type of every leaf of a result."""
    flat, _ = jax.tree_util.tree_flatten_with_path(result)
    return [(jax.tree_util.keystr(path), _type_of(leaf)) for path, leaf in flat]


def _type_of(leaf: Any) -> Any:
    try:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
    except TypeError:
        return describe(leaf)


def _check_result(leaves: list[tuple[str, Any]], role: str) -> None:
    """Raises TypeError where a result has no gradient, or a loss is no number."""
    told = ", ".join(
        f"{_written(kind)}" + (f" at {path}" if path else "")
        for path, kind in leaves[:4]
    )
    for path, kind in leaves:
        if isinstance(kind, str):
            raise TypeError(
                f"{role} must return arrays, got {kind} at output{path}: pick what is "
                "differentiated by `loss=lambda output: ...`."
            )
    is_number = len(leaves) == 1 and leaves[0][1].shape == ()
    if role == "`loss`" and not (
        is_number and jnp.issubdtype(leaves[0][1].dtype, jnp.floating)
    ):
        raise TypeError(
            f"`loss` must return one real number, got {told or 'nothing'}: reduce it, "
            "say by jnp.mean."
        )
    if not any(is_inexact(kind.dtype) for _, kind in leaves):
        raise TypeError(
            f"{role} must return a float or complex array, or a tree with one, got "
            f"{told or 'nothing'}: there is nothing to differentiate."
        )


def _written(kind: Any) -> str:
    return kind if isinstance(kind, str) else f"{kind.dtype}{list(kind.shape)}"
