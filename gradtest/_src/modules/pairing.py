"""Which parameter of one module is which of another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any
Path = tuple[str, ...]
# A leaf's path, as strings, and its shape.
Leaves = dict[Path, tuple[int, ...]]


def leaves_of(tree: PyTree, depth: int = 0) -> Leaves:
    """Returns the leaves of nested dicts; `depth` names at the front are left out."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path(path)[depth:]: tuple(jnp.shape(leaf)) for path, leaf in flat}


def rebuilt(tree: PyTree, values: Mapping[Path, Any], depth: int = 0) -> PyTree:
    """Returns a tree with the values that are known by their paths in their places."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: values.get(_path(path)[depth:], leaf), tree
    )


def values_of(tree: PyTree, depth: int = 0) -> dict[Path, Any]:
    """Returns the leaves of nested dicts by their paths."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_path(path)[depth:]: leaf for path, leaf in flat}


def _path(path: Any) -> Path:
    return tuple(str(getattr(each, "key", getattr(each, "idx", each))) for each in path)


def pairs(
    first: Leaves, second: Leaves, chosen: Mapping[str, str] | None
) -> dict[Path, Path]:
    """Pairs the leaves of two modules, as far as that can be done in one way only.

    Args:
      first: The leaves of the first.
      second: Those of the second.
      chosen: Module paths of the first, and what they are in the second.

    Returns:
      For paths of the second the path of the first.

    Raises:
      ValueError: `chosen` names nothing in one of the two, or sends two to one.
    """
    found = _as_chosen(chosen or {}, first, second)
    for kind in _KINDS:
        while True:
            taken = set(found.values())
            left = [path for path in first if path not in taken]
            right = [path for path in second if path not in found]
            more = _siblings(found, left, right, first, second) or _unique(
                _by_kind(left, first, kind), _by_kind(right, second, kind)
            )
            if not more:
                break
            found |= more
    return found


def _as_chosen(
    chosen: Mapping[str, str], first: Leaves, second: Leaves
) -> dict[Path, Path]:
    """Pairs the leaves that a user names; of two that name one the longer path counts.

    Raises:
      ValueError: A name is none, or a leaf is left without a place that it was sent to.
    """
    found: dict[Path, Path] = {}
    sent: dict[Path, list[tuple[Path, str]]] = {}
    for one, two in sorted(chosen.items(), key=lambda pair: len(split(pair[1]))):
        more = _beneath(split(one), split(two), first, second)
        for target, source in more.items():
            sent.setdefault(target, []).append((source, one))
        found |= more
    kept = set(found.values())
    for target, sources in sent.items():
        lost = [source for source, _ in sources if source not in kept]
        if lost:
            names = " and ".join(repr(one) for _, one in sources)
            raise ValueError(
                f"`params_map` sends {names} to one place of the second module, "
                f"{'/'.join(target)}: each parameter can have one source only."
            )
    return found


def _siblings(
    found: Mapping[Path, Path],
    left: Sequence[Path],
    right: Sequence[Path],
    first: Leaves,
    second: Leaves,
) -> dict[Path, Path]:
    """Pairs the leaves of one name in layers of which other leaves are paired."""
    layers = {two[:-1]: one[:-1] for two, one in found.items()}
    wanted = {two: (*layers[two[:-1]], two[-1]) for two in right if two[:-1] in layers}
    return {
        two: one
        for two, one in wanted.items()
        if one in left and first[one] == second[two]
    }


def split(path: Any) -> Path:
    """Returns the parts of a module path that a user wrote."""
    if not isinstance(path, str):
        raise TypeError(
            "`params_map` must map module paths such as 'encoder/Dense_0' to module "
            f"paths, got {path!r}."
        )
    return tuple(part for part in path.replace(".", "/").split("/") if part)


def _beneath(one: Path, two: Path, first: Leaves, second: Leaves) -> dict[Path, Path]:
    """Pairs the leaves below two module paths that have the same path there."""
    ends = [path[len(one) :] for path in first if path[: len(one)] == one]
    if not ends:
        raise ValueError(_names_nothing(one, "first", first))
    if not any(path[: len(two)] == two for path in second):
        raise ValueError(_names_nothing(two, "second", second))
    return {two + end: one + end for end in ends if two + end in second}


def _names_nothing(path: Path, which: str, leaves: Leaves) -> str:
    return (
        f"`params_map` names {'/'.join(path)!r}, which is no path of the {which} "
        f"module: it has {listed(list(leaves))}."
    )


def listed(paths: Sequence[Path], most: int = 8) -> str:
    """Names the first of several paths."""
    names = ", ".join("/".join(path) for path in paths[:most])
    return names + ", …" * (len(paths) > most)


# What two leaves must share, the surest first; each at first with its shape.
_KINDS: tuple[Callable[[Path], Hashable], ...] = (
    lambda path: path,
    lambda path: path[-2:],
    lambda path: path[-1:],
)


def _by_kind(
    paths: Sequence[Path], shapes: Leaves, kind: Callable[[Path], Hashable]
) -> dict[Hashable, list[Path]]:
    groups: dict[Hashable, list[Path]] = {}
    for path in paths:
        groups.setdefault((kind(path), shapes[path]), []).append(path)
    return groups


def _unique(
    left: Mapping[Hashable, list[Path]], right: Mapping[Hashable, list[Path]]
) -> dict[Path, Path]:
    return {
        right[key][0]: paths[0]
        for key, paths in left.items()
        if len(paths) == 1 and len(right.get(key, ())) == 1
    }


def map_for_params(
    first: PyTree, second: PyTree, params_map: Any
) -> Callable[[PyTree], PyTree]:
    """Returns what makes the second's parameters of the first's.

    Raises:
      TypeError: `params_map` is of no known kind.
      ValueError: A parameter could not be paired, or the trees do not fit.
    """
    if params_map is not None and not isinstance(params_map, Mapping):
        if not callable(params_map):
            raise TypeError(
                "`params_map` must be a function of the first module's parameters, or "
                f"a dict of module paths, got {params_map!r}."
            )
        _require_alike(jax.eval_shape(params_map, first), second)
        return params_map
    one, two = leaves_of(first), leaves_of(second)
    found = pairs(one, two, params_map)
    spare = [path for path in one if path not in set(found.values())]
    lacking = [path for path in two if path not in found]
    absent = [
        *_absent(spare, {p: q for q, p in found.items()}, two, "second"),
        *_absent(lacking, found, one, "first"),
    ]
    if absent:
        raise ValueError(
            f"`reference` must have the parameters of `module`: {'; '.join(absent)}. "
            "Build both alike (use_bias, use_scale, ...); parameters that are made of "
            "others need a function as `params_map`."
        )
    if spare or lacking:
        is_given = params_map is not None
        raise ValueError(
            f"`params_map` {'leaves some out' if is_given else 'is needed'}: "
            + " and ".join(
                f"of the {which} module {listed(paths)} could not be paired"
                for which, paths in (("first", spare), ("second", lacking))
                if paths
            )
            + ". Write params_map={'path in the first': 'path in the second'}, or a "
            "function of the first's parameters."
        )
    unlike = [(p, q) for q, p in found.items() if one[p] != two[q]]
    if unlike:
        p, q = unlike[0]
        raise ValueError(
            f"`params_map` pairs {'/'.join(p)} of shape {one[p]} with {'/'.join(q)} of "
            f"shape {two[q]}: hand over a function that reshapes it."
        )
    return functools.partial(_mapped, second=second, found=found)


def _absent(
    open_: Sequence[Path], partners: Mapping[Path, Path], other: Leaves, which: str
) -> list[str]:
    """Names leaves of paired layers where the other layer has no such leaf."""
    layers = {path[:-1]: partner[:-1] for path, partner in partners.items()}
    told = []
    for path in open_:
        layer = layers.get(path[:-1])
        if layer is None or (*layer, path[-1]) in other:
            continue
        own = sorted({leaf[-1] for leaf in other if leaf[:-1] == layer})
        where = "/".join(layer) or "it"
        told.append(
            f"the {which} module has nothing for {'/'.join(path)} ({where} has "
            f"{', '.join(own)} alone)"
        )
    return told


def _mapped(params: PyTree, *, second: PyTree, found: Mapping[Path, Path]) -> PyTree:
    values = values_of(params)
    return rebuilt(second, {two: values[one] for two, one in found.items()})


def _require_alike(made: PyTree, wanted: PyTree) -> None:
    """Raises ValueError where a function does not make the second's parameters."""
    one, two = leaves_of(made), leaves_of(wanted)
    for path in {**two, **one}:
        if one.get(path) != two.get(path):
            told = "nothing" if path not in one else f"shape {one[path]}"
            asked = "nothing" if path not in two else f"shape {two[path]}"
            raise ValueError(
                f"`params_map` must return the second module's parameters: it returned "
                f"{told} at {'/'.join(path)}, wanted {asked}."
            )
