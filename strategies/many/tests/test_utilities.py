"""Utilities are what their papers say."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool_many.utilities import chrf, exact, token_f1

WORDS = st.text(alphabet="ab c", max_size=12)


def chrf_by_hand(hypothesis: str, reference: str) -> float:
    """Count every n-gram with lists, one after another."""
    ours, theirs = hypothesis.replace(" ", ""), reference.replace(" ", "")
    shares = []
    for n in range(1, 7):
        here = [ours[i : i + n] for i in range(max(0, len(ours) - n + 1))]
        there = [theirs[i : i + n] for i in range(max(0, len(theirs) - n + 1))]
        left, agreed = list(there), 0
        for gram in here:
            if gram in left:
                left.remove(gram)
                agreed += 1
        if here and there:
            shares.append((agreed / len(here), agreed / len(there)))
    if not shares:
        return 0.0
    precision, recall = (sum(share[side] for share in shares) / len(shares) for side in (0, 1))
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def test_chrf_is_that_of_sacrebleu() -> None:
    hypothesis = "The relationship between Obama and Netanyahu is not exactly friendly."
    reference = "The ties between Obama and Netanyahu are not particularly friendly."
    assert 100 * chrf(hypothesis, reference) == pytest.approx(61.576379378113785, abs=1e-9)  # as its metric card says


def test_chrf_of_short_texts_is_an_average_over_the_lengths_that_both_have() -> None:
    # n = 1: 2 of 2 and 2 of 3; n = 2: 1 of 1 and 1 of 2.
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    assert chrf("ab", "a bc") == pytest.approx(5 * precision * recall / (4 * precision + recall))
    assert chrf("", "") == chrf("", "a") == chrf("a", "b") == 0


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS)
def test_chrf_is_what_counting_by_hand_gives(hypothesis: str, reference: str) -> None:
    assert chrf(hypothesis, reference) == pytest.approx(chrf_by_hand(hypothesis, reference), abs=1e-12)


@pytest.mark.parametrize(
    ("hypothesis", "reference", "score"),
    [
        ("the cat sat", "The cat, sat!", 1.0),
        ("a a b", "a b b c", 2 * 2 / 7),
        ("a", "b", 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("...", "!", 1.0),
        ("Straße", "STRASSE", 1.0),
    ],
)
def test_token_f1_compares_multisets_of_words(hypothesis: str, reference: str, score: float) -> None:
    assert token_f1(hypothesis, reference) == token_f1(reference, hypothesis) == pytest.approx(score)


def test_exact_overlooks_spaces_around_a_text_and_nothing_else() -> None:
    assert exact(" a b\n", "a b") == 1
    assert exact("a  b", "a b") == exact("A b", "a b") == 0
