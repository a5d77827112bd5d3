"""One verdict in all processes of a job, by JAX's own coordination service.

Every process calls the same assertions in the same order. In each call they meet twice:
when the check is made, before anything runs that spans processes, and when each has a
verdict. What a process posts is written once: by itself, or, where it does not come in
time, by the first that gives up on it. So all read the same: all raise, or none does.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import hashlib
import itertools
import os
import pickle
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

from gradtest._src import jaxprs, seeding, session
from gradtest._src.devices import spanning
from gradtest._src.findings import Report, Verdict
from gradtest._src.jaxprs import Job

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")

TIMEOUT_VARIABLE = "GRADTEST_PROCESS_TIMEOUT"
_DEFAULT_TIMEOUT = 300.0
# A wait is cut into pieces, between which Ctrl-C is heard.
_PIECE = 1.0
_READY, _DONE = "ready", "done"
# Messages may differ between processes, and functions' keys can't be sorted.
_NOT_COMPARED = frozenset(
    {
        "custom_message",
        "custom_message_format_vars",
        "include_default_message",
        "exception_type",
        "expect_differs",
    }
)


def agreed(
    assertion: Callable[_Parameters, _Result],
) -> Callable[_Parameters, _Result]:
    """Makes an assertion come to one verdict in all processes of a job.

    Outside of a job of several processes it changes nothing, and starts no backend.

    Raises:
      RuntimeError: Another process raised an error of its own, asserts something else,
        or does not come within the bounded wait.
    """

    @functools.wraps(assertion)
    def in_all(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        job = jaxprs.current_job()
        try:
            if job is None:
                return assertion(*args, **kwargs)
            return _together(job, assertion, args, kwargs)
        except Exception as error:
            if isinstance(vars(error).get("report"), Report):
                session.hide_frames(error.__traceback__)
            raise

    return in_all


def _together(
    job: Job,
    assertion: Callable[..., _Result],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> _Result:
    """Runs an assertion as one of the processes of a job."""
    outermost = _current.get() is None
    call = _Call(job, assertion.__name__, args, kwargs) if outermost else None
    token = _current.set(call or _ALONE)
    try:
        return assertion(*args, **kwargs)
    except BaseException as error:
        if call is not None:
            call.leave(error)
        raise
    finally:
        _current.reset(token)


def meet() -> None:
    """Waits until every process has made its check, before any of them runs it.

    Raises:
      RuntimeError: As `agreed` says.
    """
    call = _current.get()
    if isinstance(call, _Call):
        call.meet()


def agree(report: Report) -> Report:
    """Returns the report that all processes go by: the gravest, of the lowest rank.

    Raises:
      RuntimeError: As `agreed` says.
    """
    call = _current.get()
    return call.agree(report) if isinstance(call, _Call) else report


@dataclasses.dataclass(frozen=True)
class _Post:
    """What one process tells the others.

    Attributes:
      error: The type and the first line of the error that it raised, if any.
      missed_by: The rank that gave up on it, if one did.
      signature: What it asserts, item by item.
      report: What it found; of a pass only the verdict is told.
    """

    error: str = ""
    missed_by: int | None = None
    signature: tuple[str, ...] = ()
    verdict: Verdict | None = None
    report: Report | None = None

    def packed(self) -> bytes:
        return zlib.compress(pickle.dumps(self))


def _unpacked(data: bytes) -> _Post:
    return pickle.loads(zlib.decompress(data))


class _Call:
    """One call of an assertion, as the processes of a job make it together."""

    def __init__(
        self,
        job: Job,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ):
        self._job = job
        self._name = name
        self._arguments = (args, kwargs)
        self._turn: int | None = None
        self._to_post = [_READY, _DONE]

    def meet(self) -> None:
        """Posts what is asserted, and compares it with what the others assert."""
        posts = self._exchange(_READY, _Post(signature=self._signature()))
        self._raise_errors(posts)
        self._raise_on_differences([post.signature for post in posts])

    def agree(self, report: Report) -> Report:
        """Posts a verdict, and picks the one that counts."""
        verdict = report.verdict
        told = None
        if verdict is not Verdict.PASS:  # arrays stay where they are
            told = dataclasses.replace(report, exhibits=(), inputs=())
        posts = self._exchange(_DONE, _Post(verdict=verdict, report=told))
        self._raise_errors(posts)
        found = [post.verdict for post in posts if post.verdict is not None]
        gravest = max(found, key=lambda verdict: verdict.severity)
        if gravest is Verdict.PASS:
            return report
        ranks = [i for i, post in enumerate(posts) if post.verdict is gravest]
        own = verdict is gravest and ranks[0] == self._job.rank
        chosen = report if own else posts[ranks[0]].report
        assert chosen is not None
        return chosen if len(ranks) == self._job.size else self._at(ranks, chosen)

    def leave(self, error: BaseException) -> None:
        """Tells the others, where they still wait, that this process raises."""
        lines = str(error).strip().splitlines() or [""]
        post = _Post(error=f"{type(error).__name__}: {lines[0]}")
        with contextlib.suppress(jaxprs.StoreError):
            for stage in self._to_post[:]:
                self._put(stage, post)

    def _at(self, ranks: Sequence[int], report: Report) -> Report:
        found_in = _processes(ranks, self._job.size)
        return dataclasses.replace(report, found_in=found_in)

    # --- the exchange -------------------------------------------------------------

    def _put(self, stage: str, post: _Post) -> bool:
        if self._turn is None:
            self._turn = next(_turns)
        self._to_post.remove(stage)
        key = self._key(stage, self._job.rank)
        _kept.append((self._turn, key))
        return self._job.put(key, post.packed())

    def _key(self, stage: str, rank: int) -> str:
        return f"gradtest/{self._turn}/{stage}/{rank}"

    def _exchange(self, stage: str, post: _Post) -> list[_Post]:
        """Returns what every process posts at this stage, in order of rank."""
        seconds = _timeout()
        try:
            came_in_time = self._put(stage, post)
            deadline = time.monotonic() + seconds
            posts = [
                self._wait(stage, rank, deadline) for rank in range(self._job.size)
            ]
        except jaxprs.StoreError as error:
            self._to_post.clear()
            raise RuntimeError(
                f"{self._name}: the processes can't come to one verdict, for JAX's "
                f"coordination service (in process 0) does not answer: {error}"
            ) from None
        if not came_in_time:
            self._raise_late(posts[self._job.rank])
        self._raise_missing(posts, seconds)
        self._forget_older()
        return posts

    def _wait(self, stage: str, rank: int, deadline: float) -> _Post:
        key = self._key(stage, rank)
        while True:
            left = deadline - time.monotonic()
            found = self._job.get(key, min(max(left, 0.0), _PIECE))
            if found is not None:
                return _unpacked(found)
            if left <= 0:  # written once: it may have come just now
                self._job.put(key, _Post(missed_by=self._job.rank).packed())

    def _forget_older(self) -> None:
        """Deletes posts of earlier calls: who is in this one has read them."""
        assert self._turn is not None
        while _kept[0][0] < self._turn:
            self._job.delete(_kept.pop(0)[1])

    # --- what is wrong ------------------------------------------------------------

    def _raise_late(self, post: _Post) -> None:
        self._to_post.clear()
        raise RuntimeError(
            f"{self._name}: process {self._job.rank} came too late: process "
            f"{post.missed_by} gave up on it. {_LONGER}"
        )

    def _raise_missing(self, posts: Sequence[_Post], seconds: float) -> None:
        missing = [i for i, post in enumerate(posts) if post.missed_by is not None]
        if missing:
            self._to_post.clear()
            raise RuntimeError(
                f"{self._name}: {_processes(missing, self._job.size)} did not come to "
                f"this call within {seconds:g} s. Every process must call the same "
                "assertions in the same order; one may have ended, hang, or still be "
                f"at work. {_LONGER}"
            )

    def _raise_errors(self, posts: Sequence[_Post]) -> None:
        raised = [(rank, post.error) for rank, post in enumerate(posts) if post.error]
        if raised:
            self._to_post.clear()
            others = f" (and {len(raised) - 1} more)" if len(raised) > 1 else ""
            raise RuntimeError(
                f"{self._name}: process {raised[0][0]} of {self._job.size}{others} "
                f"raised {raised[0][1]}"
            )

    def _raise_on_differences(self, signatures: Sequence[tuple[str, ...]]) -> None:
        for rank, signature in enumerate(signatures):
            pairs = itertools.zip_longest(signatures[0], signature, fillvalue="nothing")
            for one, other in pairs:
                if one != other:
                    self._to_post.clear()
                    raise RuntimeError(
                        f"{self._name}: the processes assert different things: process "
                        f"0 has {one}, process {rank} has {other}. Every process must "
                        "call the same assertions in the same order, and values that "
                        "stand beside arrays over several processes must be equal."
                    )

    def _signature(self) -> tuple[str, ...]:
        args, kwargs = self._arguments
        return (self._name, *_described(args, kwargs))


_ALONE = object()  # within a call: what it calls has no verdict of its own
_current: contextvars.ContextVar[Any] = contextvars.ContextVar("call", default=None)
_turns = itertools.count()
_kept: list[tuple[int, str]] = []

_LONGER = f"To wait longer set {TIMEOUT_VARIABLE} (in seconds)."


def _timeout() -> float:
    """Returns how long a process waits for the others, in seconds."""
    given = os.environ.get(TIMEOUT_VARIABLE)
    if given is None:
        return _DEFAULT_TIMEOUT
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"{TIMEOUT_VARIABLE} must be a positive number of seconds, got {given!r}."
        )
    return seconds


def _processes(ranks: Sequence[int], size: int) -> str:
    word = "process" if len(ranks) == 1 else "processes"
    return f"{word} {', '.join(map(str, ranks))} of {size}"


# --- what is asserted --------------------------------------------------------------


def _described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[str]:
    """Describes the arguments of an assertion, but for values that are local."""
    named = {k: v for k, v in kwargs.items() if k not in _NOT_COMPARED}
    options = session.with_defaults(named)
    yield f"key={_described_key(options.pop('key'))}"
    flat, _ = jax.tree_util.tree_flatten_with_path(
        (tuple(args), options), is_leaf=lambda leaf: leaf is None
    )
    alike = any(spanning.spans(leaf) for _, leaf in flat)
    for path, leaf in flat:
        of_options, place = path[:2]
        is_option = of_options.idx == 1
        name = place.key if is_option else f"args[{place.idx}]"
        # Of the functions only the one under test has to be the same: a step may be
        # wrong in one process alone.
        if not callable(leaf) or name in ("args[0]", "fn"):
            described = _described_leaf(leaf, told=is_option or alike, alike=alike)
            yield f"{name}{jax.tree_util.keystr(path[2:])}: {described}"


def _described_key(key: Any) -> str:
    try:
        return seeding.describe(key)
    except TypeError:
        return type(key).__name__  # the assertion itself says what is wrong with it


def _described_leaf(leaf: Any, *, told: bool, alike: bool) -> str:
    """Describes a leaf: by its value where numbers are `told` or arrays `alike`."""
    if callable(leaf):
        return getattr(leaf, "__name__", type(leaf).__name__)
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        plain = leaf is None or isinstance(leaf, bool | int | float | complex | str)
        return repr(leaf) if told and plain else type(leaf).__name__
    described = f"{leaf.dtype}{list(leaf.shape)}"
    if spanning.spans(leaf):
        return f"{described} over {len(leaf.sharding.device_set)} devices"
    is_array = isinstance(leaf, np.ndarray | np.generic | jax.Array)
    if not (alike and is_array) or jax.dtypes.issubdtype(
        leaf.dtype, jax.dtypes.extended
    ):
        return described
    digest = hashlib.sha256(np.ascontiguousarray(leaf).tobytes()).hexdigest()
    return f"{described} with values of digest {digest[:8]}"
