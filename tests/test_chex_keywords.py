"""The keywords of every Chex assertion, and its switch, work as they do in Chex."""

import functools
import warnings

import chex
import jax.numpy as jnp
import pytest

import gradtest

pytestmark = pytest.mark.core

_X = jnp.linspace(0.5, 1.5, 4)


def square_sum(x):
    return jnp.sum(x**2)


def flipped(x):
    return -2 * x


def logarithm(x):
    return jnp.sum(jnp.log(x))


class CustomError(Exception):
    pass


def _autodiff(**options):
    # A logarithm of negative numbers: nothing can be concluded.
    gradtest.assert_autodiff_matches(logarithm, -_X, **options)


# One that fails and one that is inconclusive; Chex's own beside them.
_FAILING = {
    "assert_grad_matches": functools.partial(
        gradtest.assert_grad_matches, square_sum, flipped, _X
    ),
    "assert_autodiff_matches": _autodiff,
    "assert_equal": functools.partial(chex.assert_equal, 0, 1),
}
_GRADTEST = {name: call for name, call in _FAILING.items() if name != "assert_equal"}
_failing = pytest.mark.parametrize("name", _FAILING)
_ours = pytest.mark.parametrize("name", _GRADTEST)


def _message(name, **options):
    with pytest.raises(AssertionError) as caught:
        _FAILING[name](**options)
    return str(caught.value)


@_failing
def test_the_default_message_starts_with_the_assertions_name(name):
    assert f"{name} failed: " in _message(name).splitlines()[0]


@_failing
def test_without_the_default_message_only_what_was_found_remains(name):
    message = _message(name, include_default_message=False)
    assert f"{name} failed" not in message
    assert _message(name).endswith(message.removeprefix("[Chex] "))


@_failing
def test_a_custom_message_ends_the_message(name):
    assert _message(name, custom_message="layer 3") == f"{_message(name)} [layer 3]"


@_failing
def test_a_custom_message_is_filled_in(name):
    message = _message(
        name,
        custom_message="layer {} of {}",
        custom_message_format_vars=(3, "net"),
    )
    assert message.endswith(" [layer 3 of net]")


@_failing
def test_braces_are_kept_where_there_is_nothing_to_fill_in(name):
    assert _message(name, custom_message="{'w': 1}").endswith(" [{'w': 1}]")


@_failing
@pytest.mark.parametrize("kind", [CustomError, ValueError, AssertionError])
def test_the_exception_is_of_the_type_asked_for(name, kind):
    with pytest.raises(kind) as caught:
        _FAILING[name](exception_type=kind)
    assert type(caught.value) is kind


@_ours
def test_an_exception_of_any_type_carries_the_report(name):
    with pytest.raises(CustomError) as caught:
        _GRADTEST[name](exception_type=CustomError)
    report = caught.value.report
    assert report.assertion == name
    assert report.verdict is not gradtest.Verdict.PASS


def test_a_wrong_gradient_and_an_open_question_are_two_exceptions():
    with pytest.raises(gradtest.GradientMismatch) as caught:
        _FAILING["assert_grad_matches"]()
    assert caught.value.report.verdict is gradtest.Verdict.FAIL
    with pytest.raises(gradtest.GradientInconclusive) as caught:
        _FAILING["assert_autodiff_matches"]()
    assert caught.value.report.verdict is gradtest.Verdict.INCONCLUSIVE
    assert issubclass(gradtest.GradientMismatch, AssertionError)
    assert issubclass(gradtest.GradientInconclusive, AssertionError)


def test_an_open_question_may_be_a_warning():
    with pytest.warns(UserWarning, match="nothing can be concluded") as caught:
        report = gradtest.assert_autodiff_matches(
            logarithm, -_X, inconclusive="warn", custom_message="layer 3"
        )
    assert report.verdict is gradtest.Verdict.INCONCLUSIVE
    assert str(caught[0].message).endswith(" [layer 3]")
    # It points at the line that made the assertion.
    assert caught[0].filename == __file__


def test_a_wrong_gradient_is_never_only_a_warning():
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(square_sum, flipped, _X, inconclusive="warn")


def test_a_pass_returns_its_report_whatever_the_keywords():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = gradtest.assert_autodiff_matches(
            square_sum, _X, custom_message="layer 3", exception_type=CustomError
        )
    assert report.verdict is gradtest.Verdict.PASS


@pytest.fixture
def disabled():
    chex.disable_asserts()
    yield
    chex.enable_asserts()


@_ours
def test_disabled_asserts_check_nothing_and_say_so(name, disabled):
    def explodes(x):
        raise RuntimeError("must not be called")

    calls = {
        "assert_grad_matches": lambda: gradtest.assert_grad_matches(
            explodes, explodes, _X
        ),
        "assert_autodiff_matches": lambda: gradtest.assert_autodiff_matches(
            explodes, _X
        ),
    }
    report = calls[name]()
    assert report.verdict is gradtest.Verdict.NOT_CHECKED
    assert report.verdict.value == "NOT CHECKED"
    assert str(report).startswith(f"NOT CHECKED: {name}(explodes)")
    assert not report.findings


def test_enabled_asserts_check_again():
    chex.disable_asserts()
    chex.enable_asserts()
    with pytest.raises(gradtest.GradientMismatch):
        gradtest.assert_grad_matches(square_sum, flipped, _X)


@pytest.mark.parametrize(
    "kind", [gradtest.GradientMismatch, gradtest.GradientInconclusive, KeyError]
)
def test_exception_type_may_be_any_class_that_takes_a_message(kind):
    with pytest.raises(kind) as caught:
        gradtest.assert_grad_matches(square_sum, flipped, _X, exception_type=kind)
    assert caught.value.report.verdict is gradtest.Verdict.FAIL


def test_exception_type_that_takes_more_is_named():
    class TwoPartError(Exception):
        def __init__(self, message, place):
            super().__init__(message, place)

    with pytest.raises(TypeError, match="`exception_type` must be made of a message"):
        gradtest.assert_grad_matches(
            square_sum, flipped, _X, exception_type=TwoPartError
        )
