"""Arrays of any shape, made as small as a picture can show."""

import numpy as np
import pytest

from gradtest._src.report import folding


def test_a_fold_is_as_square_as_can_be():
    assert folding.fold(np.zeros((2, 3, 4, 24))).matrix.shape == (24, 24)
    assert folding.fold(np.zeros((1, 7, 1, 5))).matrix.shape == (7, 5)


def test_a_fold_keeps_the_order_of_entries():
    array = np.arange(24).reshape(2, 3, 4)
    folded = folding.fold(array, start=(0, 0, 8))
    assert folded.matrix.ravel().tolist() == list(range(24))
    assert folded.start == (0, 8)


@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000, 12_345])
def test_no_block_loses_its_largest_entry(size):
    values = np.random.default_rng(0).normal(size=size)
    maxima, length = folding.block_maxima(values, 128)
    assert maxima.size <= 128
    assert maxima.max() == values.max()
    assert maxima[int(np.argmax(values)) // length] == values.max()


def test_a_block_with_nan_is_nan():
    values = np.zeros(1000)
    values[999] = np.nan
    maxima, _ = folding.block_maxima(values, 10)
    assert np.isnan(maxima).tolist() == [False] * 9 + [True]
