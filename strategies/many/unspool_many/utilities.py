"""Utilities: how well one text would do if another one were right.

A utility is a function `(hypothesis, reference) -> float` of two texts, larger is better. It is named by an entry point
in the group `unspool.utilities`. Those here lie between 0 and 1.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import lru_cache

ORDER, BETA = 6, 2
"""Of chrF: the longest character n-grams, and how many times recall counts as much as precision."""


def exact(hypothesis: str, reference: str) -> float:
    """Ask for the same text, but for spaces around it. The least risk is then the mode: the commonest sample."""
    return float(hypothesis.strip() == reference.strip())


def token_f1(hypothesis: str, reference: str) -> float:
    """Compare words, case folded, as multisets: the harmonic mean of precision and recall (Rajpurkar et al. 2016).

    Two texts without words agree. Unlike the score of SQuAD it knows no articles: it works in any language with words.
    """
    ours, theirs = _words(hypothesis), _words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * _shared(ours, theirs) / (ours.total() + theirs.total())


def chrf(hypothesis: str, reference: str) -> float:
    """Compare character n-grams: F-score of precision and recall averaged over n (chrF2, Popovic 2015).

    As sacrebleu defines it, divided by 100: n = 1 to 6, beta = 2, white space left out, no smoothing, averages over
    those n of which both texts have an n-gram; 0 where there is none.
    """
    precisions, recalls = [], []
    for ours, theirs in zip(_ngrams(hypothesis), _ngrams(reference), strict=True):
        if ours and theirs:
            shared = _shared(ours, theirs)
            precisions.append(shared / ours.total())
            recalls.append(shared / theirs.total())
    precision, recall = (sum(values) / max(1, len(values)) for values in (precisions, recalls))
    weighed = BETA**2 * precision + recall
    return (1 + BETA**2) * precision * recall / weighed if weighed else 0.0


def _shared(ours: Counter[str], theirs: Counter[str]) -> int:
    """Count the intersection of two multisets. That of `Counter` looks up every entry, and few are shared."""
    return sum(min(ours[entry], theirs[entry]) for entry in ours.keys() & theirs.keys())


@lru_cache(maxsize=2048)  # each text is compared with all others
def _words(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.casefold()))


@lru_cache(maxsize=2048)
def _ngrams(text: str) -> tuple[Counter[str], ...]:
    dense = "".join(text.split())
    return tuple(Counter(dense[i : i + n] for i in range(len(dense) - n + 1)) for n in range(1, ORDER + 1))
