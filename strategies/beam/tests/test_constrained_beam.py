"""Constrained beam search finds the best texts that contain the phrases, and says when it finds none."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from unspool.engine import Engine
from unspool.errors import ConfigError, DeadEnd, InputError
from unspool.pipeline import Pipeline
from unspool.request import Request, Result
from unspool_beam.constrained import ConstrainedBeamSearch, allot
from unspool_beam.phrases import Phrase, Progress, fewest, overlap
from unspool_penalties.suppress import SuppressTokens
from unspool_sample.top_p import TopP
from unspool_testing.driver import alone, plugin, request
from unspool_testing.table import TableModel

END = 0


def constrained(*plugins: Any, **params: Any) -> Pipeline:
    return Pipeline(plugin(ConstrainedBeamSearch, "constrained_beam", **params), list(plugins))


def search(model: TableModel, new: int, n: int = 1, *plugins: Any, **params: Any) -> Result:
    asked = request(constrained(*plugins, **params), (1,), max_new_tokens=new, end_ids=(END,), n=n)
    return alone(model, [asked])[0]


def brute_force(model: TableModel, new: int, phrases: list[list[tuple[int, ...]]]) -> list[tuple[float, Any]]:
    """Score every text that ends, or has full length, and contains an alternative of each phrase; best first."""
    found = []
    for length in range(1, new + 1):
        for text in itertools.product(range(model.vocab_size), repeat=length):
            if END in text[:-1] or (length < new and text[-1] != END):
                continue
            if all(any(contains(text, phrase) for phrase in alternatives) for alternatives in phrases):
                score = 0.0
                for at, token in enumerate(text):
                    score += float(model.logits_after((1, *text[:at])).log_softmax(0)[token])
                found.append((score, text))
    return sorted(found, key=lambda pair: -pair[0])


def contains(text: tuple[int, ...], phrase: tuple[int, ...]) -> bool:
    return any(text[at : at + len(phrase)] == phrase for at in range(len(text)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("given", "phrases"),
    [
        ([[2]], [[(2,)]]),
        ([[2, 1]], [[(2, 1)]]),
        ([[2, 2], [1]], [[(2, 2)], [(1,)]]),
        ([{"any": [[1, 2], [2, 2, 1]]}], [[(1, 2), (2, 2, 1)]]),
        ([[1, 2], [2, 1]], [[(1, 2)], [(2, 1)]]),
    ],
)
def test_wide_enough_it_equals_brute_force_over_the_texts_that_contain_the_phrases(
    given: Any, phrases: Any, seed: int
) -> None:
    model = TableModel(3, seed=seed)
    result = search(model, 5, 8, phrases=given, width=600, length_penalty=0, early_stopping="never")
    best = brute_force(model, 5, phrases)[:8]
    assert [h.token_ids for h in result.hypotheses] == [text for _, text in best]
    assert [h.score for h in result.hypotheses] == pytest.approx([score for score, _ in best])
    assert result.reports["constrained_beam"]["met"] == [True] * 8


def test_few_beams_find_phrases_that_nobody_would_say() -> None:
    table = {(): [0.0, 5.0, -9.0, -9.0], (2,): [0.0, 5.0, -9.0, -9.0]}
    for width in (1, 2, 4):
        result = search(TableModel(4, table=table), 8, phrases=[[2, 3], [3, 2]], width=width)
        assert contains(result.token_ids, (2, 3)) and contains(result.token_ids, (3, 2))


@pytest.mark.parametrize("width", [1, 2, 3, 8])
@pytest.mark.parametrize(
    "phrases", [[[1, 2], [1, 3]], [[1, 1, 2], [1, 1, 3]], [[1, 2], [1, 3], {"any": [[1], [1, 1, 2]]}]]
)
def test_phrases_that_begin_alike_are_met_within_their_tokens_however_narrow_the_beam(phrases: Any, width: int) -> None:
    model = TableModel(4, table={(): [-9.0, 9.0, -9.0, -9.0]})  # says 1, and nothing else
    tokens = sum(max(map(len, p["any"])) if isinstance(p, dict) else len(p) for p in phrases)
    result = search(model, tokens, phrases=phrases, width=width)
    for phrase in phrases:
        alternatives = phrase["any"] if isinstance(phrase, dict) else [phrase]
        assert any(contains(result.token_ids, tuple(one)) for one in alternatives)


def test_a_text_that_is_cut_off_with_a_phrase_unmet_comes_last_and_says_so() -> None:
    never = plugin(SuppressTokens, token_ids=[2])
    result = search(TableModel(3), 3, 2, never, phrases=[[2]], width=4)
    assert {h.finish_reason for h in result.hypotheses} == {"length"}
    assert not any(result.reports["constrained_beam"]["met"])
    model = TableModel(3, table={(): [0.0, 9.0, -9.0]})
    mixed = search(model, 2, 8, phrases=[[2]], width=8)
    met = [contains(h.token_ids, (2,)) for h in mixed.hypotheses]
    assert met == sorted(met, reverse=True) == mixed.reports["constrained_beam"]["met"]
    assert any(met) and not all(met)


def test_where_plugins_leave_nothing_but_the_end_it_is_a_dead_end() -> None:
    model = TableModel(3, table={(): [9.0, 0.0, 0.0]})
    assert isinstance(search(model, 6, 1, plugin(TopP, p=0.5), phrases=[[1], [2]], width=4).error, DeadEnd)


def test_a_phrase_that_does_not_fit_is_refused_with_the_numbers() -> None:
    fits = "phrases that fit into 3 new tokens, and these need at least 4"
    for phrases in ([[1, 2, 1, 2]], [[1, 2], [3, 3]], [[1], {"any": [[2, 3], [3, 2, 2]]}, [4]]):
        with pytest.raises(InputError, match=fits):
            search(TableModel(5), 3, phrases=phrases)
    with pytest.raises(InputError, match="no tokenizer"):
        alone(TableModel(3), [request(constrained(phrases=["a"]), (1,), max_new_tokens=2)])


def test_phrases_that_overlap_or_hold_each_other_are_not_refused_where_they_fit() -> None:
    for phrases in ([[1, 2], [2, 3]], [[1, 2], [1, 2]], [[2], [1, 2, 3], [2, 3]], [[2, 3], [1, 2]]):
        assert all(contains(search(TableModel(5), 3, phrases=phrases).token_ids, tuple(p)) for p in phrases)


def test_no_text_is_shorter_than_the_fewest_tokens_of_its_phrases() -> None:
    some = [p for length in (1, 2, 3) for p in itertools.product((1, 2), repeat=length)]
    texts = [text for length in range(1, 7) for text in itertools.product((1, 2), repeat=length)]
    for pair in itertools.combinations_with_replacement(some, 2):
        shortest = min(len(text) for text in texts if all(contains(text, phrase) for phrase in pair))
        bound = fewest([[Phrase.of(phrase)] for phrase in pair])
        assert bound <= shortest
        if not any(overlap(one, other) for one, other in (pair, pair[::-1])):
            assert bound == shortest


def test_a_phrase_that_no_text_can_hold_is_refused() -> None:
    with pytest.raises(InputError, match=r"phrases = \(2, 0\): a phrase without a token that ends the text, \[0\]"):
        search(TableModel(5), 6, phrases=[[1], [2, 0]])
    assert contains(search(TableModel(5), 6, phrases=[{"any": [[2, 0], [2, 3]]}]).token_ids, (2, 3))
    error = search(TableModel(5), 6, phrases=[[1, 77]]).error
    assert isinstance(error, InputError) and "77: token ids below 5" in str(error)


def test_no_phrase_at_all_is_refused() -> None:
    from unspool.pipeline import PluginSpec, build_plugin
    from unspool.registry import Registry

    registry = Registry([]).with_plugins({"constrained_beam": ConstrainedBeamSearch})
    wrong: list[list[Any]] = [[], [[]], [""]]
    for phrases in wrong:
        with pytest.raises(ConfigError, match="phrases"):
            build_plugin(PluginSpec("constrained_beam", {"phrases": phrases}), registry)


def test_a_phrase_that_is_text_may_stand_with_a_space_before_it_or_without() -> None:
    words = {"</s>": 0, "a": 1, "b": 2, "Ġa": 3, "Ġb": 4, "Ġ": 5}
    made = Tokenizer(models.BPE(words, [("Ġ", "a"), ("Ġ", "b")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    make: Any = transformers.PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=made, eos_token="</s>")
    for liked, token in (((0.0, 3.0, 2.0, 0.0, 0.0, -9.0), 2), ((0.0, 0.0, 0.0, 3.0, 2.0, -9.0), 4)):
        with Engine(TableModel(6, table={(): list(liked)}), tokenizer) as engine:
            strategy = {"constrained_beam": {"phrases": ["b"], "width": 4}}
            (result,) = engine.run([Request(prompt=[1], strategy=strategy, max_new_tokens=3, ignore_eos=True)])
            assert token in result.token_ids


def test_a_phrase_is_found_as_a_plain_search_finds_it() -> None:
    for phrase in itertools.product(range(2), repeat=4):
        made = Phrase.of(phrase)
        for text in itertools.product(range(2), repeat=9):
            said = 0
            for at, token in enumerate(text, 1):
                said = made.after(said, token)
                longest = max(c for c in range(5) if c == 0 or (c <= at and text[at - c : at] == phrase[:c]))
                assert said == longest
                if said == 4:
                    break


def test_progress_counts_what_is_met_and_forgets_what_was_broken_off() -> None:
    progress = Progress.start([[Phrase.of((1, 2, 3))], [Phrase.of((4,)), Phrase.of((5, 6))]])
    banks = []
    for token in (1, 2, 9, 5, 4, 1, 2, 3):
        progress = progress.after(token)
        banks.append(progress.bank)
    assert banks == [1, 2, 0, 1, 2, 3, 4, 5]
    assert progress.met and progress.banks == 6 and progress.next_tokens() == set()


@pytest.mark.parametrize("width", [1, 3, 4, 7, 12])
def test_every_bank_has_its_share_and_no_place_is_left_free(width: int) -> None:
    bank = {child: (child * 7) % 4 for child in range(10)}
    kept = allot(list(range(10)), bank, 4, width)
    assert len(kept) == min(width, 10)
    for number in range(4):
        there = [child for child in range(10) if bank[child] == number]
        share = width // 4 + (width % 4 if number == 3 else 0)
        assert {*there[:share]} <= kept
        mine = [child for child in there if child in kept]
        assert mine == there[: len(mine)], "of each bank the best"


def test_scores_are_weighed_sums() -> None:
    asked = request(constrained(phrases=[[2]], length_penalty=0.5), (1,), max_new_tokens=5, n=3, logprobs="pipeline")
    for hypothesis in alone(TableModel(4), [asked])[0].hypotheses:
        total = math.fsum(hypothesis.logprobs or ())
        assert hypothesis.score == pytest.approx(total / len(hypothesis.token_ids) ** 0.5)
