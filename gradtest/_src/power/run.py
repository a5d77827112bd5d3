"""`gradtest.power`: breaks a program's custom rules and counts what a test catches."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from gradtest._src import progress as progress_of
from gradtest._src import rules, seeding, session
from gradtest._src.asserts import assert_custom_rules_match
from gradtest._src.cli import bar
from gradtest._src.findings import Verdict
from gradtest._src.inputs import read_inputs
from gradtest._src.keywords import require_callable
from gradtest._src.power import quick
from gradtest._src.power.equivalence import FRESH, Difference, difference
from gradtest._src.power.mutations import Mutation, mutations_of, scaled
from gradtest._src.power.report import Mutant, Outcome, Power, RulePower
from gradtest._src.power.subjects import (
    BrokenProgram,
    Subject,
    broken_uses,
    find_subjects,
)

Assertion = Callable[..., Any]
# The errors of scale that are tried, as powers of ten.
_SCALES = range(1, 8)


def power(
    fn: Callable[..., Any],
    *args: Any,
    assertion: Assertion = assert_custom_rules_match,
    mutations: int | str | Sequence[str] | None = None,
    rules: str | Sequence[str] | None = None,
    scales: bool = True,
    key: Any = None,
    progress: bool | None = None,
    **options: Any,
) -> Power:
    """Breaks each custom rule that `fn` calls, and counts what an assertion catches.

    One rule is broken at a time, in one way at a time: its derivative scaled by 1.01,
    with the other sign, zero in an entry or in rows, without a leaf, with two exchanged
    or transposed; a term or a factor of its program left out, a sum skipped; a residual
    under `stop_gradient`, or another one in its place. The program that is traced has
    the broken rule in it, at any depth; the source and the rule itself are untouched.

    Args:
      fn: A function that calls custom rules, such as a model's loss.
      *args: Its arguments, as the assertion takes them: trees of arrays, numbers, keys,
        None, `jax.ShapeDtypeStruct` or `gradtest.domains` entries.
      assertion: Called as `assertion(broken_fn, *args, **options)`; it catches a mutant
        by raising AssertionError. Any other checker may be wrapped in a lambda.
      mutations: How many mutants of each rule to try, drawn by `key`, or the kinds of
        them by name (`"scale*"`); None for all.
      rules: Names of the rules to break (`"swiglu"`, patterns with `*`); None for all.
      scales: Whether to look for the smallest error of scale that is seen.
      key: An integer or a JAX key: fixes every draw, and is handed on to gradtest's own
        assertions. None: 0, or what pytest's `--gradtest-seed` says.
      progress: Whether a bar shows on a terminal. None: only where one is looked for.
      **options: Handed to the assertion.

    Returns:
      What came of each mutant: caught, survived, equivalent (it is not wrong: its
      derivative is the right one at 32 fresh points and at all special ones), seen at
      second order only, or malformed; the smallest error of scale that is seen; the
      rules that were not reached. `print` shows it, `to_json()` keeps it.

    Raises:
      ValueError: The assertion fails on the unbroken program, or `fn` calls no custom
        rule, or none that `rules` names.
      TypeError: An argument is not what it must be; the message names it.

    Example:
      >>> import jax.numpy as jnp
      >>> import jax
      >>> import gradtest
      >>> def loss(x):
      ...     return jnp.sum(jax.nn.relu(x) ** 2)
      >>> x = jnp.arange(1.0, 4.0)
      >>> found = gradtest.power(loss, x, mutations=["sign flip"])
      >>> len(found.caught), len(found.survived)
      (1, 0)
    """
    require_callable("fn", fn)
    require_callable("assertion", assertion)
    chosen = _Choice.of(mutations, rules)
    own_key = session.key() if key is None else key
    if key is not None and _is_own(assertion):
        options = {"key": key, **options}
    run = _Run(fn, args, assertion, options, chosen, own_key, scales)
    with contextlib.ExitStack() as stack:
        if progress:
            stack.enter_context(bar.shown(f"breaking the rules of {run.name}"))
        stack.enter_context(session.silent())
        return run.report()


@dataclasses.dataclass(frozen=True)
class _Choice:
    """Which mutants of which rules are wanted."""

    most: int | None
    kinds: tuple[str, ...]
    rules: tuple[str, ...]

    @classmethod
    def of(cls, mutations: Any, rules: Any) -> _Choice:
        """Reads what the user chose.

        Raises:
          TypeError, ValueError: It is no choice.
        """
        most = None
        if isinstance(mutations, int) and not isinstance(mutations, bool):
            most, mutations = mutations, None
            if most < 1:
                raise ValueError(f"`mutations` must be 1 or more, got {most}.")
        return cls(most, _names("mutations", mutations), _names("rules", rules))

    def has_rule(self, subject: Subject) -> bool:
        """Whether a rule is wanted."""
        return not self.rules or any(
            fnmatch.fnmatchcase(subject.source.name, rule) for rule in self.rules
        )

    def of_mutations(
        self, made: Sequence[Mutation], key: Any, rule: str
    ) -> list[Mutation]:
        """Returns the mutations of a rule that are wanted, in their order."""
        kept = [
            each
            for each in made
            if not self.kinds
            or any(fnmatch.fnmatchcase(each.name, kind) for kind in self.kinds)
        ]
        if self.most is None or len(kept) <= self.most:
            return kept
        random = seeding.generator(key, "mutants", rule)
        places = sorted(random.permutation(len(kept))[: self.most])
        return [kept[place] for place in places]


def _names(role: str, names: Any) -> tuple[str, ...]:
    if names is None:
        return ()
    found = (names,) if isinstance(names, str) else names
    if not isinstance(found, Sequence | set | frozenset) or not all(
        isinstance(name, str) for name in found
    ):
        raise TypeError(
            f"`{role}` must be None or names{', or a number' * (role != 'rules')}, "
            f"got {names!r}."
        )
    if not found:
        raise ValueError(f"`{role}` is empty: name at least one, or leave it out.")
    return tuple(found)


def _is_own(assertion: Assertion) -> bool:
    module = getattr(assertion, "__module__", "") or ""
    return module.split(".")[0] == "gradtest"


class _Run:
    """One program, broken again and again."""

    def __init__(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        assertion: Assertion,
        options: Mapping[str, Any],
        chosen: _Choice,
        key: Any,
        scales: bool,
    ):
        self.fn, self.args, self.assertion = fn, args, assertion
        self.options, self.chosen = dict(options), chosen
        self.key, self.scales = key, scales
        self.name = getattr(fn, "__name__", type(fn).__name__)
        self.inputs = read_inputs(fn, args, argnums=self.options.get("argnums"))
        self.point = self.inputs.draw(key, 0)
        # Whether the audit sees the rules where this program calls them, and all.
        self._is_plain = not {"variant", "only"} & set(self.options)

    def report(self) -> Power:
        """Breaks every rule that is wanted."""
        wanted = self._wanted()
        self._require_right()
        plans = [(subject, self._mutations(subject)) for subject in wanted]
        if (
            self.chosen.kinds
            and any(m for _, (_, m) in plans)
            and not any(chosen for _, (chosen, _) in plans)
        ):
            raise ValueError(
                f"`mutations` names {', '.join(self.chosen.kinds)}, which is no "
                "mutation of these rules: see docs/power.md."
            )
        total = sum(len(chosen) for _, (chosen, _) in plans)
        done = progress_of.following(self._outcomes(plans), "mutants", total)
        found: dict[int, list[Mutant]] = {id(subject): [] for subject in wanted}
        for subject, mutant in done:
            found[id(subject)].append(mutant)
        told = [
            self._of_rule(subject, found[id(subject)], made)
            for subject, (_, made) in plans
        ]
        name = getattr(self.assertion, "__name__", type(self.assertion).__name__)
        return Power(self.name, name, tuple(told), seeding.describe(self.key))

    def _wanted(self) -> list[Subject]:
        subjects = find_subjects(self.fn, self.inputs, self.point, self.options)
        if not subjects:
            raise ValueError(
                "`fn` calls no custom rule (custom_vjp or custom_jvp), so there is "
                "nothing to break."
            )
        wanted = [each for each in subjects if self.chosen.has_rule(each)]
        if not wanted:
            called = ", ".join(dict.fromkeys(each.source.name for each in subjects))
            raise ValueError(
                f"`rules` names {', '.join(self.chosen.rules)}, which is no custom "
                f"rule that `fn` calls: it calls {called}."
            )
        return wanted

    def _require_right(self) -> None:
        """Raises where the assertion fails on the program as it is."""
        try:
            report = self.assertion(self.fn, *self.args, **self.options)
        except AssertionError as error:
            raise ValueError(
                f"`assertion` fails on {self.name} before any rule is broken, so what "
                f"it catches says nothing: {_first_line(error)}"
            ) from error
        if getattr(report, "verdict", None) is Verdict.NOT_CHECKED:
            raise ValueError(
                "`assertion` checks nothing here (chex.disable_asserts), so it can "
                "catch nothing."
            )

    def _mutations(self, subject: Subject) -> tuple[list[Mutation], int]:
        if subject.seen is None or subject.trouble:
            return [], 0
        made = mutations_of(subject.seen)
        # Not by its place: what is drawn is the same wherever packages lie.
        rule = subject.source.name
        return self.chosen.of_mutations(made, self.key, rule), len(made)

    def _outcomes(self, plans: Any) -> Iterator[tuple[Subject, Mutant]]:
        for subject, (chosen, _) in plans:
            for mutation in chosen:
                yield subject, self._outcome(subject, mutation)

    def _of_rule(
        self, subject: Subject, mutants: Sequence[Mutant], made: int
    ) -> RulePower:
        source = subject.source
        scale = self._smallest_scale(subject) if mutants and self.scales else None
        return RulePower(
            name=source.name,
            kind=source.kind,
            at=rules.shorten(source.where[0]),
            mutants=tuple(mutants),
            smallest_scale=scale,
            trouble=subject.trouble,
            made=made,
        )

    def _outcome(self, subject: Subject, mutation: Mutation) -> Mutant:
        mutant = Mutant(
            mutation.name,
            mutation.which,
            mutation.says,
            subject.part_at(mutation.part),
            Outcome.CAUGHT,
        )
        try:
            caught = self._catches(subject, mutation)
        except _NotBound:
            why = "the program never calls the broken rule"
            return dataclasses.replace(mutant, outcome=Outcome.MALFORMED, why=why)
        except Exception as error:  # a broken rule may make anything raise
            why = f"{type(error).__name__}: {_first_line(error)}"
            return dataclasses.replace(mutant, outcome=Outcome.MALFORMED, why=why)
        if caught:
            return dataclasses.replace(mutant, why=caught)
        found = self._difference(subject, mutation)
        if mutation.second_order and (found is None or not found.points):
            why = "it is wrong in second derivatives alone, by how it is made"
            return dataclasses.replace(mutant, outcome=Outcome.SECOND_ORDER, why=why)
        return _survivor(mutant, found)

    def _difference(self, subject: Subject, mutation: Mutation) -> Difference | None:
        reached = [use for use in subject.uses if use.samples]
        try:
            uses, _ = self._broken_uses(self._broken(subject, mutation), subject)
        except Exception:  # a broken rule may make anything raise
            return None
        return difference(reached, uses, self.key)

    def _broken(self, subject: Subject, mutation: Mutation) -> BrokenProgram:
        return BrokenProgram(self.fn, subject, mutation)

    def _broken_uses(self, broken: BrokenProgram, subject: Subject) -> Any:
        return broken_uses(broken, subject, self.inputs, self.point, self.options)

    def _catches(self, subject: Subject, mutation: Mutation) -> str:
        """Returns the first line of what the assertion raises; empty if nothing."""
        broken = self._broken(subject, mutation)
        if self.assertion is assert_custom_rules_match and self._is_plain:
            with contextlib.suppress(Exception):  # then the assertion itself is asked
                uses, anew = self._broken_uses(broken, subject)
                why = quick.refused(
                    uses,
                    anew,
                    self.options,
                    subject,
                    second_order=mutation.second_order,
                )
                if why:
                    return why
        try:
            self.assertion(broken, *self.args, **self.options)
        except AssertionError as error:
            return _first_line(error)
        if not broken.times:
            raise _NotBound
        return ""

    def _smallest_scale(self, subject: Subject) -> float | None:
        """Returns the smallest of 1e-1, 1e-2, ... by which a rule may not be off."""
        assert subject.seen is not None
        first, last = 0, _SCALES[-1] + 1
        while last - first > 1:
            middle = (first + last) // 2
            mutation = scaled(subject.seen, 1 + 10.0**-middle)
            try:
                is_caught = bool(self._catches(subject, mutation))
            except Exception:  # a broken rule may make anything raise
                is_caught = False
            first, last = (middle, last) if is_caught else (first, middle)
        return 10.0**-first if first else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class _NotBound(Exception):
    """The broken rule was never called."""


def _survivor(mutant: Mutant, found: Difference | None) -> Mutant:
    """Says of a mutant that was not caught whether it is wrong."""
    if found is None or not found.points:
        why = "how far off it is, is not known"
        return dataclasses.replace(mutant, outcome=Outcome.SURVIVED, why=why)
    if found.is_equivalent:
        why = (
            f"the rule's derivative in float64 is the same, to 1e-12, at "
            f"{found.points} other points, {FRESH} of them drawn"
        )
        if not found.has_second:
            why += "; it has no second derivative"
        return dataclasses.replace(
            mutant, outcome=Outcome.EQUIVALENT, why=why, error=found.first
        )
    if found.is_of_second_order:
        why = f"first derivatives agree, second ones differ by {found.second:.1e}"
        outcome, error = Outcome.SECOND_ORDER, found.second
        return dataclasses.replace(mutant, outcome=outcome, why=why, error=error)
    if not found.at:
        why = "first derivatives agree, second ones could not be compared"
        return dataclasses.replace(mutant, outcome=Outcome.SECOND_ORDER, why=why)
    why = f"off by {found.first:.1e} at {found.at}"
    return dataclasses.replace(
        mutant, outcome=Outcome.SURVIVED, why=why, error=found.first
    )
