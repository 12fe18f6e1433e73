"""Self-consistency: how answers are read and written, how they vote, and what comes back."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from typing import Any

import pytest

from unspool.errors import ConfigError, PluginError
from unspool.pipeline import Pipeline, PluginSpec, build_plugin
from unspool.registry import Registry
from unspool.request import Hypothesis, Result
from unspool_many import self_consistency
from unspool_many.self_consistency import SelfConsistency, normal
from unspool_sample.sample import Sample
from unspool_testing.driver import alone, plugin, request
from unspool_testing.table import TableModel

MODEL = TableModel(vocab_size=6, seed=4)


def voting(samples: int, *, seed: int = 0, n: int | None = None, **params: Any) -> Result:
    pipeline = Pipeline(plugin(SelfConsistency, "vote", samples=samples, **params))
    [result] = alone(MODEL, [request(pipeline, seed=seed, n=n or samples, max_new_tokens=5)])
    return result


def drawn(count: int, seed: int) -> list[tuple[Hypothesis, str]]:
    """Give `sample`'s texts, likeliest first: without a tokenizer, their token ids."""
    asked = request(Pipeline(plugin(Sample)), seed=seed, n=count, max_new_tokens=5, logprobs="pipeline")
    [result] = alone(MODEL, [asked])
    ranked = sorted(result.hypotheses, key=lambda h: (-math.fsum(h.logprobs or ()), h.stream))
    return [(h, " ".join(str(token) for token in h.token_ids if token != 0)) for h in ranked]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pattern", [None, r"(\d) \d$", "[45]"])
@pytest.mark.parametrize("seed", range(6))
def test_it_is_what_counting_by_hand_gives(weighted: bool, pattern: str | None, seed: int) -> None:
    votes: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    silent, total = [], 0.0
    for hypothesis, text in drawn(9, seed):
        found = re.findall(pattern or r"\d", text)
        assert hypothesis.logprobs is not None
        vote = math.exp(math.fsum(hypothesis.logprobs) / len(hypothesis.logprobs)) if weighted else 1.0
        total += vote
        if found:
            votes[found[-1]] += vote
            counts[found[-1]] += 1
            groups[found[-1]].append(hypothesis.token_ids)
        else:
            silent.append(hypothesis.token_ids)
    result = voting(9, seed=seed, weighted=weighted, pattern=pattern)
    winners = sorted(votes, key=lambda answer: -round(votes[answer], 9))  # in dicts the likeliest text stands first
    assert [h.token_ids for h in result.hypotheses] == [t for a in winners for t in groups[a]] + silent
    shares = [votes[answer] / total for answer in winners for _ in groups[answer]] + [0.0] * len(silent)
    assert [h.score for h in result.hypotheses] == pytest.approx(shares)
    assert result.reports["vote"] == {
        "answers": [
            {"answer": answer, "votes": counts[answer], "share": pytest.approx(votes[answer] / total)}
            for answer in winners
        ],
        "without_answer": len(silent),
    }


def test_weights_turn_some_votes() -> None:
    winners = [[voting(9, seed=seed, weighted=weighted).token_ids for seed in range(30)] for weighted in (False, True)]
    assert winners[0] != winners[1]


def test_fewer_texts_than_samples_come_back_and_all_have_voted() -> None:
    one = voting(12, n=1)
    assert len(one.hypotheses) == 1
    assert one.reports == voting(12).reports
    assert sum(a["votes"] for a in one.reports["vote"]["answers"]) + one.reports["vote"]["without_answer"] == 12


def answer(text: str, **params: Any) -> str | None:
    made = plugin(SelfConsistency, **params)
    assert isinstance(made, SelfConsistency)
    return made.answer(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("3 + 4 = 7", "7"),
        ("It costs $1,234.50 in all.", "1234.5"),
        ("5-3", "3"),
        ("5 - 3 is 2; minus 5 is -3.", "-3"),
        ("so 0.50", "0.5"),
        ("so 007.", "7"),
        ("-0.0", "0"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        ("the year 2024.", "2024"),
        ("12345678901234567890123456789012345678901", "12345678901234567890123456789012345678901"),
        ("none at all", None),
        ("", None),
    ],
)
def test_the_last_number_is_the_answer(text: str, found: str | None) -> None:
    assert answer(text) == found


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [
        (r"[Aa]nswer is (.+)", "First the answer is no. Then\nthe Answer is  New   York.", "new york"),
        (r"\\boxed\{([^}]*)\}", r"so \boxed{1,000.0} it is", "1000"),
        ("yes|no", "yes, or no", "no"),
        ("(yes)|no", "yes, or no", None),
        ("x*", "ab", None),
        ("#### ?(.*)", "#### $18", "18"),
    ],
)
def test_a_pattern_gives_its_last_match_and_of_that_the_first_group(pattern: str, text: str, found: str | None) -> None:
    assert answer(text, pattern=pattern) == found


def test_answers_stay_as_they_are_written_where_that_is_asked_for() -> None:
    assert answer("is New  York. ", pattern="is (.*)", normalize=False) == "New  York."
    assert answer("1,000.0", normalize=False) == "1,000.0"


@pytest.mark.parametrize(
    ("one", "other"),
    [("Paris.", " paris"), ("1,000", "1000.00"), ("-$5", "-5"), ("Straße", "STRASSE"), ("a  b", "A b")],
)
def test_answers_that_mean_the_same_are_written_alike(one: str, other: str) -> None:
    assert normal(one) == normal(other)


@pytest.mark.parametrize(("one", "other"), [("1.5", "15"), ("-5", "5"), ("1,00", "100"), ("a", "b"), ("5%", "5")])
def test_answers_that_differ_stay_different(one: str, other: str) -> None:
    assert normal(one) != normal(other)


def test_a_pattern_that_would_take_years_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_consistency, "PATIENCE", 0.05)
    before = time.monotonic()
    with pytest.raises(ValueError, match=r"aa\)\+\$' takes more than 0.05 s on a text: simplify it"):
        answer("a" * 60 + "b", pattern="(a|aa)+$")
    assert time.monotonic() - before < 2


def test_a_pattern_that_is_given_up_fails_its_own_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_consistency, "PATIENCE", 0.02)
    model = TableModel(vocab_size=2, table={(): [-9.0, 9.0]})  # "1 1 1 ..."
    slow = Pipeline(plugin(SelfConsistency, "vote", samples=2, pattern=r"(1|1 1| )+[xy]"))
    asked = request(slow, max_new_tokens=40), request(Pipeline(plugin(Sample)), max_new_tokens=3)
    [one, other] = alone(model, asked)
    assert isinstance(one.error, PluginError) and "rank" in str(one.error) and "simplify" in str(one.error)
    assert other.error is None


def test_a_pattern_that_is_none_is_refused_with_the_config() -> None:
    with pytest.raises(ConfigError, match=r"self_consistency\.pattern: .*no regular expression: .*, not '\(a'"):
        build_plugin(PluginSpec("self_consistency", {"pattern": "(a"}), Registry.installed(), "strategy")
