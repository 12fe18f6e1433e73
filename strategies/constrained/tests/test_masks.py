"""Masks: the same in a batch as alone, nothing but text, ends where the text may stop; budgets; tags."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.errors import DeadEnd, InputError
from unspool.masks import forbid
from unspool.pipeline import Pipeline
from unspool_beam.beam import BeamSearch
from unspool_constrained.any_json import AnyJson
from unspool_constrained.choices import Choices
from unspool_constrained.engine import GrammarError
from unspool_constrained.grammar import ContextFree
from unspool_constrained.guidance import ENGINE, KEPT, Guidance
from unspool_constrained.guidance_position import REMEMBERED
from unspool_constrained.json_schema import JsonSchema
from unspool_constrained.languages import Lark, Pattern, Schema, Strings
from unspool_constrained.mask import allow_ends, long_enough
from unspool_constrained.regex import Regex
from unspool_constrained.tagged import Tagged
from unspool_constrained.vocabulary import Vocabulary, vocabulary_of
from unspool_greedy import Greedy
from unspool_sample.sample import Sample
from unspool_testing.driver import alone, drive, plugin, request
from unspool_testing.hosts import Fails
from unspool_testing.letters import tokenizer_of
from unspool_testing.networks import tiny_model
from unspool_testing.table import TableModel

BYTES = Vocabulary([bytes([byte]) for byte in range(256)] + [b"", b"ab", b'"}'], lambda text: list(text.encode()))
JSON_TOKENS = ["<end>", "{", "}", '"', "a", ":", "1", ",", "[", "]", '"}', '":', "{}", "true", "<pad>"]
JSON = tokenizer_of(JSON_TOKENS, ["<end>", "<pad>"])


def run(model: TableModel, *plugins: Any, strategy: Any = None, tokenizer: Any = JSON, **fields: Any) -> Any:
    pipe = Pipeline(strategy or plugin(Greedy), list(plugins))
    return alone(model, [request(pipe, tokenizer=tokenizer, **fields)])[0]


def test_the_masks_of_a_batch_are_those_of_each_row_however_they_were_asked_for() -> None:
    language = Pattern("(ab|[0-9]{2,4}|x*)+")
    start = ENGINE.compile(language, BYTES).start()
    positions = [start]
    for text in ("a", "ab", "ab1", "x", "xx12", "ab1234"):
        position: Any = start
        for byte in text.encode():
            position = position.advance(byte)
        positions.append(position)
    single = [Guidance().masks([fresh(language, text)])[0] for text in ("", "a", "ab", "ab1", "x", "xx12", "ab1234")]
    ENGINE.prefetch(positions[:3])
    together = ENGINE.masks(positions + positions[::-1])
    assert np.array_equal(together, np.stack(single + single[::-1]))


def fresh(language: Any, text: str) -> Any:
    position: Any = Guidance().compile(language, BYTES).start()
    for byte in text.encode():
        position = position.advance(byte)
    return position


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 80), st.integers(1, 90))
def test_what_has_no_bit_is_forbidden_and_nothing_else_changes(seed: int, tokens: int, size: int) -> None:
    octets = -(-tokens // 8)
    chance = np.random.default_rng(seed)
    bits = chance.integers(256, size=(3, octets), dtype=np.uint8)
    ends = [(int(chance.integers(3)), token, bool(chance.integers(2))) for token in {0, size // 2, size - 1}]
    told = {(row, token): may for row, token, may in ends}
    for dtype in (torch.float32, torch.float64):
        logits = torch.from_numpy(chance.choice([-2.5, -0.0, 7.0, np.inf, np.nan], (3, size))).to(dtype)
        before, masks = logits.clone(), long_enough(bits.copy(), size)
        allow_ends(masks, ends)
        forbid(logits, masks)
        for row, mask in enumerate(bits):
            for token in range(size):
                has_bit = token < 8 * octets and bool(int(mask[token >> 3]) >> (token & 7) & 1)
                expected = before[row, token] if told.get((row, token), has_bit) else torch.tensor(-torch.inf)
                assert str(logits[row, token].item()) == str(expected.item())


def test_a_model_with_more_tokens_than_its_tokenizer_never_says_the_rest() -> None:
    tokens = ["<end>", "a", "b"]
    for size in (3, 4, 31, 40):  # a mask has one bit beyond the vocabulary, for its own end
        model = TableModel(size, table={(): [0.0] * 3 + [9.0] * (size - 3)})
        result = run(model, plugin(Regex, pattern="[ab]*"), tokenizer=tokenizer_of(tokens, ["<end>"]), max_new_tokens=5)
        assert set(result.token_ids) <= {0, 1, 2}


def test_special_tokens_never_stand_in_a_text_and_a_grammar_cannot_name_them() -> None:
    table: dict[tuple[int, ...], list[float]] = {
        (): [5.0 if token in ("<pad>", "<end>") else 0.0 for token in JSON_TOKENS]
    }
    for ends in ((), (0,)):
        for made in (
            plugin(Regex, pattern="(?s:.)*"),
            plugin(AnyJson),
            plugin(Tagged, tags=[{"begin": "[", "end": "]", "regex": "1"}]),
        ):
            result = run(TableModel(len(JSON_TOKENS), table=table), made, end_ids=ends, max_new_tokens=4)
            assert not {0, 14} & set(result.token_ids[:-1]) and 14 not in result.token_ids
    for grammar in ('start: <pad> "a"', "start: <[14]>", "start: <[0-14]>"):
        result = run_or_error(plugin(ContextFree, grammar=grammar))
        assert isinstance(result, Exception) or not {0, 14} & set(result.token_ids)


def run_or_error(made: Any) -> Any:
    try:
        result = run(TableModel(len(JSON_TOKENS), seed=1), made, end_ids=())
    except InputError as error:
        return error
    return result.error or result


def test_an_end_is_forbidden_until_the_text_may_stop_and_alone_where_it_must() -> None:
    table: dict[tuple[int, ...], list[float]] = {(): [9.0, *[0.0] * 14]}
    result = run(TableModel(15, table=table), plugin(Choices, choices=["aaa", "a"]))
    assert (result.token_ids, result.hypotheses[0].finish_reason) == ((4, 0), "eos")
    result = run(TableModel(15, table=table), plugin(Choices, choices=["aaa"]))
    assert (result.token_ids, result.hypotheses[0].finish_reason) == ((4, 4, 4), "grammar_end")


def test_a_text_token_that_ends_a_request_is_an_end_and_no_text() -> None:
    table: dict[tuple[int, ...], list[float]] = {
        (): [0.0] * 4 + [1.0] + [0.0] * 10
    }  # "a" is likeliest, and ends this request
    result = run(TableModel(15, table=table), plugin(Regex, pattern="1a?"), end_ids=(4,))
    assert (result.token_ids, result.hypotheses[0].finish_reason) == ((6, 4), "eos")


def test_a_language_that_allows_everything_changes_nothing() -> None:
    tokens = ["<end>", *"abcdefg"]
    everything = plugin(Regex, pattern="(?s:.)*")
    for strategy in (plugin(Greedy), plugin(Sample), plugin(BeamSearch, width=3)):
        for seed in range(8):
            model = TableModel(8, seed=seed)
            free = alone(model, [request(Pipeline(strategy), seed=seed)])[0]
            held = run(model, everything, strategy=strategy, tokenizer=tokenizer_of(tokens, ["<end>"]), seed=seed)
            assert [(h.token_ids, h.score) for h in free.hypotheses] == [
                (h.token_ids, h.score) for h in held.hypotheses
            ]


def test_a_place_where_nothing_can_follow_is_a_dead_end_with_its_path() -> None:
    tokenizer = tokenizer_of(["<end>", "a", "b"], ["<end>"])
    result = run(TableModel(3, seed=0), plugin(Regex, pattern="abz"), tokenizer=tokenizer)
    assert isinstance(result.error, DeadEnd) and result.error.path == (1, 2)
    beside = run(
        TableModel(3, table={(): [0.0, 1.0, 0.5]}),
        plugin(Regex, pattern="abz|b+"),
        tokenizer=tokenizer,
        strategy=plugin(BeamSearch, width=3),
    )
    assert beside.error is None and set(beside.token_ids) <= {0, 2}


def test_a_request_that_fails_leaves_the_others_as_they_are() -> None:
    model = TableModel(15, seed=2)
    good = Pipeline(plugin(Greedy), [plugin(AnyJson)])
    ill = Pipeline(plugin(Greedy), [plugin(AnyJson), plugin(Fails, hook="logits_transform", after=1)])
    dead = Pipeline(plugin(Greedy), [plugin(Regex, pattern="aaz")])
    requests = [
        request(pipe, tokenizer=JSON, seed=seed, max_new_tokens=9) for seed, pipe in enumerate((good, ill, dead, good))
    ]
    got, expected = drive(model, requests), alone(model, requests)
    assert [type(result.error).__name__ for result in got] == ["NoneType", "PluginError", "DeadEnd", "NoneType"]
    assert [got[i].token_ids for i in (0, 3)] == [expected[i].token_ids for i in (0, 3)]


def test_compiled_grammars_are_kept_once_a_vocabulary_and_no_more_than_so_many() -> None:
    engine = Guidance()
    assert engine.compile(Pattern("a+"), BYTES) is engine.compile(Pattern("a+"), BYTES)
    for number in range(KEPT + 20):
        engine.compile(Strings((str(number),)), BYTES)
    assert len(engine._compiled) == KEPT
    assert vocabulary_of(JSON) is vocabulary_of(JSON)


def test_many_threads_may_use_one_compiled_grammar() -> None:
    found: list[Any] = []

    def work() -> None:
        position: Any = ENGINE.compile(Pattern("(ab|a1)*x"), BYTES).start()
        for byte in b"aba1ab":
            ENGINE.masks([position])
            position = position.advance(byte)
        found.append(ENGINE.masks([position]).tobytes())

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8 and len(set(found)) == 1


def test_all_who_go_on_from_a_place_get_matchers_of_their_own_though_a_copy_was_made_ahead() -> None:
    language = Pattern("(a[0-9]|bc)+")
    start: Any = ENGINE.compile(language, BYTES).start()
    ENGINE.prefetch([start])
    ENGINE.masks([start])
    assert len(start._spare) == 1, "the first one finds a copy"
    children = {text: start.advance(ord(text)) for text in "ab"}
    assert not start._spare and start.advance(ord("c")) is None
    ENGINE.prefetch([*children.values()])
    further = {"a7": children["a"].advance(ord("7")), "bc": children["b"].advance(ord("c"))}
    for text, position in {"": start, **children, **further, "a1": children["a"].advance(ord("1"))}.items():
        assert np.array_equal(ENGINE.masks([position]), Guidance().masks([fresh(language, text)]))


@pytest.mark.parametrize("count", [1, 2])
def test_masks_may_be_written_to(count: int) -> None:
    position = ENGINE.compile(Pattern("[a-z]+"), BYTES).start()
    before = ENGINE.masks([position] * count)
    ENGINE.masks([position] * count)[:] = 0
    assert before.any() and np.array_equal(ENGINE.masks([position] * count), before)


def test_what_a_long_text_has_behind_it_is_forgotten_and_made_again_when_it_is_wanted() -> None:
    position: Any = ENGINE.compile(Pattern("([a-z]+ [0-9]{2},)*"), BYTES).start()
    positions, masks = [position], [ENGINE.masks([position])]
    for byte in b"ab 12,xyz 34," * 20:
        position = position.advance(byte)
        positions.append(position)
        masks.append(ENGINE.masks([position]))
    assert sum(one._matcher is not None for one in positions) <= 2 * REMEMBERED + 1
    for one, mask in zip(positions, masks, strict=True):
        assert np.array_equal(ENGINE.masks([one]), mask)
    assert positions[7].advance(ord("y")) == positions[8] and positions[7].advance(ord("1")) is None


def test_thousands_of_alternatives_are_parsed() -> None:
    choices = Strings(tuple(f"label {number}" for number in range(5000)))
    kinds = [{"type": "object", "properties": {f"k{n}": {}}, "required": [f"k{n}"]} for n in range(3000)]
    for language, text in ((choices, b"label 321"), (Schema(json.dumps({"anyOf": kinds}), True), b'{"k2999":[1]}')):
        position: Any = ENGINE.compile(language, BYTES).start()
        for byte in text:
            ENGINE.masks([position])
            position = position.advance(byte)
        assert position.may_stop


def test_a_grammar_that_forces_text_for_ever_is_cut_off_and_not_spelled_out() -> None:
    start = ENGINE.compile(Lark('start: "a" start'), BYTES).start()
    assert start.forced(100) == []
    assert ENGINE.masks([start]).any()


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "[", "*", r"\bfoo"])
def test_expressions_that_are_not_regular_are_refused(pattern: str) -> None:
    with pytest.raises(GrammarError):
        ENGINE.check(Regex.language(Regex.Params(pattern=pattern)))


@pytest.mark.parametrize("pattern", ["(a*)*b", "((a{1,1000}){1,1000}){1,1000}", "(x+x+)+y", "a{0,100000}", ".*a.{20}"])
def test_expressions_that_others_take_for_ever_to_match_take_no_time_or_say_so(pattern: str) -> None:
    position: Any = ENGINE.compile(Pattern(pattern), BYTES).start()
    start = time.perf_counter()
    with contextlib.suppress(GrammarError):  # its states grew too many
        for byte in b"xxaa" * 20:
            ENGINE.masks([position])
            position = position.advance(byte) or position
    assert time.perf_counter() - start < 2


# ---- budgets ---------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "array", "items": {"type": "string"}}, "aa": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(9, 40), st.booleans(), st.sampled_from(["schema", "json", "regex", "grammar"]))
def test_a_text_that_is_to_be_complete_is_complete_within_its_budget(
    seed: int, most: int, ends: bool, kind: str
) -> None:
    within: dict[str, Any] = {"complete_within": True}
    made = {
        "schema": plugin(JsonSchema, schema=SCHEMA, **within),
        "json": plugin(AnyJson, value="object", **within),
        "regex": plugin(Regex, pattern="(a{1,3}1)*(a|1a)\\]", **within),
        "grammar": plugin(ContextFree, grammar='root ::= "{" (root ",")* "a" "1"? "}"', **within),
    }[kind]
    model = TableModel(15, seed=seed)
    result = run(model, made, strategy=plugin(Sample), max_new_tokens=most, seed=seed, end_ids=(0,) if ends else ())
    assert result.error is None
    assert result.hypotheses[0].finish_reason in ("eos", "grammar_end"), "".join(
        JSON_TOKENS[t] for t in result.token_ids
    )
    assert len(result.token_ids) <= most
    if kind in ("schema", "json"):
        json.loads("".join(JSON_TOKENS[token] for token in result.token_ids if token))


def test_far_from_the_end_of_its_budget_a_text_is_what_it_would_be() -> None:
    for seed in range(10):
        free, held = (
            run(
                TableModel(15, seed=seed),
                plugin(JsonSchema, schema=SCHEMA, complete_within=within),
                strategy=plugin(Sample),
                seed=seed,
                max_new_tokens=60,
            )
            for within in (False, True)
        )
        assert free.token_ids[:20] == held.token_ids[:20]


def test_a_budget_that_is_too_small_is_refused_with_the_number() -> None:
    with pytest.raises(InputError, match="max_new_tokens = 4: at least 9"):
        run(TableModel(15), plugin(Regex, pattern="a{8}", complete_within=True), max_new_tokens=4)


def test_where_a_text_just_fits_it_says_what_it_likes() -> None:
    for seed in range(10):
        free, held = (
            run(
                TableModel(15, seed=seed),
                plugin(Regex, pattern="[a1:,]{5}", complete_within=within),
                seed=seed,
                max_new_tokens=most,
            )
            for within, most in ((False, 60), (True, 6))
        )
        assert held.token_ids == free.token_ids and held.hypotheses[0].finish_reason == "grammar_end"


def test_a_beam_that_is_to_be_complete_returns_complete_texts() -> None:
    for seed in range(5):
        made = plugin(JsonSchema, schema=SCHEMA, complete_within=True)
        result = run(TableModel(15, seed=seed), made, strategy=plugin(BeamSearch, width=3), max_new_tokens=14, n=3)
        assert result.reports["jsonschema"]["complete"] == [True] * len(result.hypotheses)


# ---- tags ------------------------------------------------------------------------------------------------------------


def test_what_stands_in_a_tag_is_constrained_and_the_rest_is_free() -> None:
    tokens = ["<end>", "hi", "/", "<call>", "</call>", "1", "2", "[", "]", "<", ">", "call"]
    tokenizer = tokenizer_of(tokens, ["<end>"])
    made = plugin(
        Tagged,
        tags=[{"begin": "<call>", "end": "</call>", "json_schema": {"type": "array", "items": {"enum": [1, 2]}}}],
        required=True,
    )
    seen = 0
    for seed in range(60):
        result = run(
            TableModel(12, seed=seed), made, strategy=plugin(Sample), seed=seed, max_new_tokens=30, tokenizer=tokenizer
        )
        text = "".join(tokens[token] for token in result.token_ids if token)
        calls = re.findall(r"<call>(.*?)</call>", text)
        assert all(set(json.loads(call)) <= {1, 2} for call in calls), text
        if result.hypotheses[0].finish_reason == "eos":
            seen += 1
            assert calls and "<call>" not in re.sub(r"<call>.*?</call>", "", text), text
    assert seen > 10


def test_an_end_marker_that_the_grammar_could_go_on_with_ends_the_tag() -> None:
    tokens = ["<end>", "a", "e", "n", "d", "[", "end"]
    made = plugin(Tagged, tags=[{"begin": "[", "end": "end", "grammar": "root ::= [a-z]+"}], required=True)
    tokenizer = tokenizer_of(tokens, ["<end>"])
    results = [
        run(TableModel(7, seed=seed), made, strategy=plugin(Sample), max_new_tokens=40, tokenizer=tokenizer)
        for seed in range(20)
    ]
    ended = [result for result in results if result.hypotheses[0].finish_reason == "eos"]
    assert len(ended) > 5


def test_several_kinds_of_tags_each_have_their_own_language() -> None:
    tokens = ["<end>", "a", "b", "1", "2", "(", ")", "[", "]"]
    made = plugin(
        Tagged,
        tags=[
            {"begin": "(", "end": ")", "regex": "a+"},
            {"begin": "[", "end": "]", "grammar": 'root ::= "1" root? "2"'},
        ],
    )
    for seed in range(40):
        result = run(
            TableModel(9, seed=seed),
            made,
            strategy=plugin(Sample),
            seed=seed,
            max_new_tokens=16,
            tokenizer=tokenizer_of(tokens, ["<end>"]),
        )
        text = "".join(tokens[token] for token in result.token_ids if token)
        rest = re.sub(
            r"\(a+\)|\[(1+)(2+)\]", lambda found: "" if len(found[1] or "") == len(found[2] or "") else found[0], text
        )
        if result.hypotheses[0].finish_reason == "eos":
            assert not re.search(r"[(\[]", rest), text


@pytest.mark.slow
def test_networks_are_constrained_as_tables_are() -> None:
    from unspool.huggingface.runner import HuggingFaceRunner

    runner = HuggingFaceRunner(tiny_model("llama"))
    tokens = ["<end>", *"abcdefghijklmnopqrstuvwxyz0123456789 .,:;!?()[]{}<>\"'-+*/="]
    tokenizer = tokenizer_of(tokens, ["<end>"])
    pipe = Pipeline(plugin(Sample), [plugin(Regex, pattern="[a-z]{3,5} [a-z]{2}\\.")])
    results = drive(runner, [request(pipe, tokenizer=tokenizer, seed=seed, max_new_tokens=40) for seed in range(3)])
    assert all(result.hypotheses[0].finish_reason == "grammar_end" for result in results)
    assert len({result.token_ids for result in results}) == 3
