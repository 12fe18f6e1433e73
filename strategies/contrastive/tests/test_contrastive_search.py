"""Contrastive search is what its paper says, computed anew for every text, at the price of one pass a token."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from unspool.errors import InputError
from unspool.huggingface.runner import HuggingFaceRunner
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.request import Result
from unspool_contrastive.search import ContrastiveSearch
from unspool_testing import hosts
from unspool_testing.compare import check_batch, check_speculation
from unspool_testing.drafters import GuessChains, GuessTrees, Recall
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.networks import tiny_model
from unspool_testing.table import Table, TableModel

ARCHITECTURES = ["llama", "gpt2", "gemma2", "qwen3"]
PROMPTS = [(2, 9, 5), (2,), (2, 33, 4, 8, 61, 17)]
NEW = 10


@cache
def theirs(arch: str) -> PreTrainedModel:
    return tiny_model(arch)


@cache
def ours(arch: str) -> HuggingFaceRunner:
    return HuggingFaceRunner(tiny_model(arch))


def search(*plugins: Plugin, **params: Any) -> Pipeline:
    return Pipeline(plugin(ContrastiveSearch, "contrastive_search", **params), list(plugins))


def run(model: Any, asked: Any) -> Result:
    [result] = alone(model, [asked])
    assert result.error is None
    return result


@torch.inference_mode()
def by_hand(
    model: PreTrainedModel, prompt: tuple[int, ...], *, top_k: int, alpha: float, ends: tuple[int, ...], least: int = 0
) -> tuple[int, ...]:
    """Decode as section 3 of Su et al. says, running every text from its beginning for every candidate."""

    def run(path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        out = model(torch.tensor([path]), use_cache=False, output_hidden_states=True)
        return out.logits[0, -1], out.hidden_states[-1][0]

    text: tuple[int, ...] = ()
    while len(text) < NEW and text[-1:] not in [(end,) for end in ends]:
        logits, _ = run((*prompt, *text))
        if len(text) < least:
            logits[list(ends)] = -torch.inf
        confidence = logits.softmax(-1)
        scores = {}
        for token in sorted(range(len(logits)), key=lambda token: -float(logits[token]))[:top_k]:
            _, hidden = run((*prompt, *text, token))
            likeness = max(float(torch.dot(hidden[-1], h) / (hidden[-1].norm() * h.norm())) for h in hidden[:-1])
            if confidence[token] > 0:
                scores[token] = (1 - alpha) * float(confidence[token]) - alpha * likeness
        text = (*text, max(scores, key=lambda token: scores[token]))
    return text


# ---- the paper -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_its_text_is_that_of_the_paper(arch: str) -> None:
    for prompt, top_k, alpha, ends in zip(PROMPTS, [4, 7, 2], [0.6, 0.9, 0.3], [(1,), (1, 5), (1,)], strict=True):
        asked = request(search(top_k=top_k, alpha=alpha), prompt, max_new_tokens=NEW, end_ids=ends)
        expected = by_hand(theirs(arch), prompt, top_k=top_k, alpha=alpha, ends=ends)
        assert run(ours(arch), asked).token_ids == expected


def test_the_choice_is_not_greedy() -> None:
    asked = [request(search(alpha=alpha), PROMPTS[0], max_new_tokens=NEW) for alpha in (0.0, 0.6)]
    assert run(ours("llama"), asked[0]).token_ids != run(ours("llama"), asked[1]).token_ids


def test_end_tokens_that_are_banned_are_no_candidates() -> None:
    prompt, ends = PROMPTS[0], tuple(range(20, 64))
    asked = request(search(top_k=6), prompt, max_new_tokens=NEW, min_new_tokens=4, end_ids=ends)
    expected = by_hand(theirs("gpt2"), prompt, top_k=6, alpha=0.6, ends=ends, least=4)
    assert run(ours("gpt2"), asked).token_ids == expected
    assert len(expected) > 4


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("params", [{"top_k": 1, "alpha": 0.9}, {"top_k": 5, "alpha": 0.0}])
def test_with_one_candidate_or_no_penalty_it_is_greedy_and_costs_as_much(arch: str, params: dict[str, Any]) -> None:
    greedy = Pipeline(plugin(hosts.Likeliest))
    for prompt in PROMPTS:
        one = run(ours(arch), request(search(**params), prompt, max_new_tokens=NEW, end_ids=(1,)))
        other = run(ours(arch), request(greedy, prompt, max_new_tokens=NEW, end_ids=(1,)))
        assert one.token_ids == other.token_ids
        assert one.stats.rows == other.stats.rows and one.stats.forward_passes == other.stats.forward_passes


# ---- what it costs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [2, 3, 8])
def test_a_token_costs_one_pass_of_k_rows(top_k: int) -> None:
    model = TableModel(vocab_size=9, seed=4)
    for new in (1, 2, 7):
        result = run(model, request(search(top_k=top_k), (1, 2, 3), max_new_tokens=new, end_ids=()))
        assert len(result.token_ids) == new
        assert result.stats.forward_passes == 1 + new
        assert result.stats.rows == 3 + top_k * new


def test_requests_of_all_lengths_share_the_passes_and_run_no_row_twice() -> None:
    model, pipeline = TableModel(vocab_size=9, seed=4), search()
    asked = [request(pipeline, (1, 2, last), max_new_tokens=1 + last, end_ids=()) for last in range(8)]
    results = drive(model, asked)
    assert model.passes == 9 and model.tokens == sum(3 + 4 * new for new in range(1, 9))
    assert len({result.token_ids[:1] for result in results}) > 1


def test_candidates_that_are_forbidden_are_not_run() -> None:
    model = TableModel(vocab_size=9, seed=4)
    asked = request(search(top_k=4), (1,), max_new_tokens=2, min_new_tokens=2, end_ids=(0, 2, 3, 4, 5, 6, 7))
    assert run(model, asked).stats.rows == 1 + 2 * 2  # two tokens are left


# ---- which candidates ------------------------------------------------------------------------------------------------

# After the prompt token 1 is likelier, and says what the prompt said; token 2 says the opposite; token 0 ends a text.
SAME, OPPOSITE = [-4.0, 1.0, 0.5], [4.0, -1.0, -0.5]
ROWS = {(): SAME, (2,): OPPOSITE, (0,): OPPOSITE}


def test_unlikeness_wins_where_it_may() -> None:
    asked = request(search(top_k=2), (1,), max_new_tokens=1)
    assert run(TableModel(3, table=ROWS), asked).token_ids == (2,)


def test_a_masked_candidate_never_wins() -> None:
    grammar = plugin(hosts.NoDoubles, most=9)  # forbids the last token: here that is 2
    table = {**ROWS, (2, 2): OPPOSITE, (2,): SAME}
    asked = request(search(grammar, top_k=3), (2,), max_new_tokens=1, min_new_tokens=1)
    assert run(TableModel(3, table=table), asked).token_ids == (1,)


def test_a_candidate_of_probability_zero_never_wins() -> None:
    bias = plugin(hosts.Bias, token=2, bias=-1e4)  # its logit is finite, its probability is not
    asked = request(search(bias, top_k=3), (1,), max_new_tokens=1, min_new_tokens=1)
    assert run(TableModel(3, table=ROWS), asked).token_ids == (1,)


def test_an_end_token_competes_by_what_it_is_like() -> None:
    table = {(): [0.4, 1.0, 0.5], (0,): [-0.4, -1.0, -0.5]}
    result = run(TableModel(3, table=table), request(search(top_k=3), (1,), max_new_tokens=5))
    assert result.token_ids == (0,) and result.hypotheses[0].finish_reason == "eos"
    table[(0,)] = table[()]
    result = run(TableModel(3, table=table), request(search(top_k=3), (1,), max_new_tokens=5))
    assert result.token_ids == (1, 1, 1, 1, 1) and result.hypotheses[0].finish_reason == "length"


def test_fewer_allowed_tokens_than_candidates_are_enough() -> None:
    grammar = plugin(hosts.NoDoubles, most=4)
    result = run(TableModel(2, seed=3), request(search(grammar, top_k=50), (1,), max_new_tokens=9, end_ids=()))
    assert result.token_ids == (0, 1, 0, 1) and result.hypotheses[0].finish_reason == "grammar_end"


def test_a_candidate_that_a_grammar_calls_impossible_is_passed_over() -> None:
    grammar = plugin(hosts.NoDoubles, most=9, lies=True)  # its mask all but wants what it then cannot take
    result = run(TableModel(4, seed=3), request(search(grammar, top_k=4), (1,), max_new_tokens=8, end_ids=()))
    text = (1, *result.token_ids)
    assert len(text) == 9 and all(one != other for one, other in pairwise(text))


def test_of_equal_scores_the_likelier_wins_and_then_the_lowest_id() -> None:
    table: Table = {(): [0.0, 0.0, 0.0, 0.0, -1.0]}  # whatever is chosen, the same is said after it
    asked = request(search(top_k=3), (4,), max_new_tokens=3, end_ids=())
    assert run(TableModel(5, table=table), asked).token_ids == (0, 0, 0)
    table = {(): [0.0, 0.0, -1.0, 0.5, 0.5]}
    assert run(TableModel(5, table=table), asked).token_ids == (3, 3, 3)


# ---- circumstances ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drafter", [GuessChains, GuessTrees])
def test_drafters_change_nothing(drafter: type[Plugin]) -> None:
    model = TableModel(5, seed=1)
    for strategy in (search(top_k=3), search(plugin(hosts.NoDoubles, most=20), top_k=3, alpha=0.8)):
        drafting = Pipeline(strategy.strategy, [*strategy.plugins[:-1], plugin(drafter)])
        asked = request(strategy, (1, 2), max_new_tokens=12, end_ids=())
        assert check_speculation(model, asked, strategy, drafting).stats.drafted > 12


def test_a_drafter_that_knows_the_text_changes_nothing() -> None:
    model, plain = TableModel(5, seed=1), search(top_k=3)
    asked = request(plain, (1, 2), max_new_tokens=12, end_ids=())
    text = run(model, asked).token_ids
    drafting = Pipeline(plain.strategy, [plugin(Recall, "recall")])
    check_speculation(model, asked, plain, drafting, recall=Recall.Params(texts=(text,)))


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_in_a_mixed_batch_everybody_gets_what_he_gets_alone(arch: str) -> None:
    pipelines = [
        search(),
        search(plugin(hosts.NoDoubles, most=30), top_k=6, alpha=0.9),
        Pipeline(plugin(hosts.Drawn), [plugin(hosts.Tired)]),
        search(plugin(hosts.Guidance, prompt=(0, 1), scale=0.5), top_k=3),
        Pipeline(plugin(hosts.NarrowSearch)),
    ]
    asked = [
        request(pipeline, prompt, max_new_tokens=6, end_ids=(1,), seed=seed)
        for seed, (pipeline, prompt) in enumerate((pipeline, prompt) for pipeline in pipelines for prompt in PROMPTS)
    ]
    check_batch(ours(arch), asked, Circumstances(slots=120, token_budget=24, preempts=frozenset({3, 4, 9})))


def test_more_than_one_text_is_refused() -> None:
    with pytest.raises(InputError, match=r"n = 2: 1: .*single text"):
        alone(TableModel(3), [request(search(), n=2)])
