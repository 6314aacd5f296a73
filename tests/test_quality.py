"""Measures of written texts: closed forms of small cases, and real libraries where they are installed."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esolm import quality

TEXTS = st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=20), min_size=1, max_size=5)


def test_entropy_is_that_of_each_text_averaged():
    assert quality.entropy([[7] * 10]) == 0
    assert quality.entropy([[1, 2, 3, 4]]) == pytest.approx(math.log(4))
    assert quality.entropy([[1, 1, 1, 2], [5]]) == pytest.approx((0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / 2)


def test_distinct_counts_over_all_texts_and_repetition_within_each():
    twice = [[1, 2, 3], [1, 2, 3]]
    assert quality.distinct(twice, 1) == 3 / 6
    assert quality.distinct(twice, 2) == 2 / 4
    assert quality.repetition(twice, 1) == 0
    assert quality.repetition([[1, 2, 1, 2, 1], [3]], 2) == pytest.approx(2 / 4)  # 12 21 12 21; [3] has no run of two
    assert math.isnan(quality.distinct([[1]], 2))
    assert math.isnan(quality.repetition([[1]], 2))


@given(TEXTS, st.integers(1, 4))
def test_measures_lie_where_they_can(texts, n):
    assert 0 <= quality.entropy(texts) <= math.log(6) + 1e-9
    found, again = quality.distinct(texts, n), quality.repetition(texts, n)
    assert math.isnan(found) or 0 < found <= 1
    assert math.isnan(again) or 0 <= again < 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quality.entropy([]), "there is no text"),
        (lambda: quality.distinct([[1], []], 1), "text 1 is empty"),
        (lambda: quality.repetition([[1]], 0), "at least 1 token, got n = 0"),
        (lambda: quality.mauve(np.zeros((10, 2), "f4"), np.zeros((99, 2), "f4")), "at least 50 texts .* got 10 and 99"),
        (lambda: quality.pieces(["short"], ["a text that is longer"]), "0 pieces of 21 characters"),
    ],
)
def test_what_cannot_be_measured_is_said(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def test_real_pieces_are_as_many_and_as_long_as_the_texts_and_spread_over_the_documents():
    documents = ["a" * 100, "b" * 55, "c" * 3, "d" * 40]
    found = quality.pieces(documents, ["x" * 12, "y" * 8, "zzzzzzzzzz"])
    assert found == ["a" * 10, "a" * 10, "b" * 10]
    assert {text[0] for text in quality.pieces(documents, ["x" * 10] * 19)} == {"a", "b", "d"}


def test_mauve_tells_a_cloud_from_itself_and_from_another():
    pytest.importorskip("mauve", reason="MAUVE is not installed: pip install esolm[eval]")
    rng = np.random.default_rng(0)
    one, same, far = (rng.normal(at, 1, (120, 8)).astype("f4") for at in (0, 0, 9))
    assert quality.mauve(one, same, seed=1) > 0.7
    assert quality.mauve(one, far, seed=1) < 0.1
    assert quality.mauve(one, same, seed=1) == quality.mauve(one, same, seed=1)
