"""Streams: what they show adds up to the result, and nothing is shown that may still change."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from unspool.engine import Engine
from unspool.errors import ModelError, PluginError
from unspool.handle import Handle, Piece
from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool.registry import Registry
from unspool.request import Hypothesis, Request, Result
from unspool.runner import Batch, Output
from unspool.step import Step
from unspool_testing.driver import check_conservation
from unspool_testing.runners import CountingRunner, MisbehavingRunner
from unspool_testing.table import TableModel

FOREVER = 3000
_BYTES = pre_tokenizers.ByteLevel.alphabet()

# ---- what the tests need ---------------------------------------------------------------------------------------------


def _spelled(text: str) -> str:
    """Write a text in the alphabet of byte-level BPE."""
    byte_level: Any = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(piece for piece, _ in byte_level.pre_tokenize_str(text))


@cache
def tokenizer() -> Any:
    """Make a byte-level tokenizer of few tokens: letters, words of several, and single bytes of two characters."""
    whole = ["a", "b", "c", "ab", "bc", "ca", "abc", " ", " a", "é", "🎉", "好"]
    pieces = ["</s>", *map(_spelled, whole), *_spelled("🎉"), *_spelled("好")]
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    made = Tokenizer(models.BPE(vocab, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=made, eos_token="</s>")


class Search(Plugin):
    """Keep the best `width` of all continuations: a small beam search, whose end tokens finish hypotheses."""

    class Params(Parameters):
        width: int = Field(2, ge=1)

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        total = step.score[:, :1] + logits.log_softmax(-1)
        rows, tokens, scores = [], [], []
        for grid in step.grid:
            mine = grid[grid >= 0]
            best, index = total[mine].flatten().topk(2 * self.params.width)
            rows.append(mine[index // logits.shape[1]])
            tokens.append(index % logits.shape[1])
            scores.append(best)
        return Growth(row=torch.cat(rows), token=torch.cat(tokens), score=torch.cat(scores))

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        kept = [0] * len(step.requests)
        for child, request in enumerate(growth.request.tolist()):
            if growth.finish[child] is None:
                kept[request] += 1
                growth.drop[child] = kept[request] > self.params.width


class Explode(Plugin):
    """Raise once a text has so many tokens."""

    row_local = True

    class Params(Parameters):
        after: int = 3

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        if bool((step.length >= self.params.after).any()):
            raise ZeroDivisionError("as it was asked to")


class Write(Plugin):
    """Leave nothing but given tokens."""

    row_local = True

    class Params(Parameters):
        token_ids: tuple[int, ...]

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        for row, length in enumerate(step.length.tolist()):
            logits[row] = -1000.0
            logits[row, self.params.token_ids[length]] = 0.0


class Both(Plugin):
    """Grow the two best children of each row for some tokens, all in one stream, then the best."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        token = logits.topk(2).indices
        row = torch.arange(len(logits)).unsqueeze(1).expand_as(token)
        wanted = torch.stack([torch.ones(len(logits), dtype=torch.bool), (step.length >= 2) & (step.length < 5)], 1)
        return Growth(row=row[wanted], token=token[wanted])


REGISTRY = Registry.installed().with_plugins({"search": Search, "explode": Explode, "both": Both})


class Paced(CountingRunner):
    """Takes a moment for each pass."""

    def forward(self, batch: Batch) -> Output:
        time.sleep(0.001)
        return super().forward(batch)


def table(seed: int = 0, **options: Any) -> TableModel:
    return TableModel(len(tokenizer()), seed, **{"memory": 3, "spread": 3.0, **options})


def make(runner: Any) -> Engine:
    return Engine(runner, tokenizer(), registry=REGISTRY, generation={"eos_token_id": 0}, slots=8192)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with make(table()) as engine:
        yield engine
        settle(engine)


@pytest.fixture
def paced() -> Iterator[Engine]:
    with make(Paced(table())) as engine:
        yield engine
        settle(engine)


def settle(engine: Engine) -> None:
    """Wait until nothing is under way, and check that nothing is left."""
    until = time.monotonic() + 10
    while (engine._loop.busy or engine._inbox or engine._to_cancel or engine._handles) and time.monotonic() < until:
        time.sleep(0.002)
    check_conservation(engine._loop)


def check_adds_up(pieces: list[Piece], result: Result, independent: bool = True) -> None:
    """Check that the pieces of each stream come to its hypothesis."""
    shown = {index: [p for p in pieces if p.index == index] for index in {p.index for p in pieces}}
    expected: dict[int, Hypothesis] = (
        {h.stream: h for h in result.hypotheses} if independent else {0: result.hypotheses[0]}
    )
    assert shown.keys() <= expected.keys()
    for index, hypothesis in expected.items():
        own = shown.get(index, [])
        assert tuple(token for piece in own for token in piece.token_ids) == hypothesis.token_ids
        assert "".join(piece.text for piece in own) == hypothesis.text
    assert all(piece.text or piece.token_ids for piece in pieces)


# ---- pieces add up ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("strategy", "n"), [("greedy", 1), ("sample", 1), ("sample", 4)])
def test_the_pieces_come_to_the_result(engine: Engine, strategy: str, n: int) -> None:
    for seed in range(15):
        stream = engine.stream([1, 2], strategy=strategy, n=n, seed=seed, max_new_tokens=12)
        check_adds_up(list(stream), stream.result())


def test_a_stream_shows_what_comes_while_it_comes(paced: Engine) -> None:
    stream = paced.stream([1], strategy="greedy", max_new_tokens=200, ignore_eos=True)
    before_the_end = sum(not stream.handle.done for _ in stream)
    assert before_the_end > 5


def test_a_sample_that_has_ended_is_shown_whole_while_others_go_on(paced: Engine) -> None:
    """Stream 0 or 1 ends early; its last token is there long before the request ends."""
    for seed in range(30):
        handle = paced.submit(Request(prompt=[1], strategy="sample", n=2, seed=seed, max_new_tokens=60))
        stream = handle.stream()
        pieces = [(handle.done, piece) for piece in stream]
        result = stream.result()
        check_adds_up([piece for _, piece in pieces], result)
        by_length = sorted(result.hypotheses, key=lambda h: len(h.token_ids))
        if len(by_length[0].token_ids) + 20 < len(by_length[1].token_ids) and len(by_length[0].token_ids) > 2:
            early = [piece for done, piece in pieces if piece.index == by_length[0].stream and not done]
            shown = sum(len(piece.token_ids) for piece in early)
            assert shown >= len(by_length[0].token_ids) - 1  # an end token is no text, and comes with the result
            return
    raise AssertionError("no seed gave an early end")


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("n", [1, 3])
def test_a_search_shows_only_what_all_that_may_be_returned_agree_on(width: int, n: int) -> None:
    for seed in range(8):
        with make(table(seed)) as engine:
            strategy = {"search": {"width": width}}
            handle = engine.submit(Request(prompt=[1, 2], strategy=strategy, n=n, max_new_tokens=14))
            pieces = list(handle.stream())
            result = handle.result()
            check_adds_up(pieces, result, independent=False)
            settle(engine)


def test_branches_of_one_stream_show_what_they_agree_on() -> None:
    for seed in range(10):
        with make(table(seed)) as engine:
            stream = engine.stream([1, 2], strategy="both", max_new_tokens=10)
            check_adds_up(list(stream), stream.result())
            settle(engine)


def test_what_a_search_has_shown_stands_in_every_branch_when_it_is_cancelled(paced: Engine) -> None:
    for width in (2, 3):
        options: dict[str, Any] = {"max_new_tokens": FOREVER // width, "ignore_eos": True, "n": width}
        stream = paced.stream([1, 2], strategy={"search": {"width": width}}, **options)
        shown: list[int] = []
        text = ""
        for piece in stream:
            shown += piece.token_ids
            text += piece.text
            if len(shown) > 5 and not stream.handle.done:
                before = list(shown)
                stream.handle.cancel()
        result = stream.result()
        assert all(list(h.token_ids[: len(before)]) == before for h in result.hypotheses)
        assert (tuple(shown), text) == (result.token_ids, result.text)


def test_the_end_token_is_in_the_ids_and_not_in_the_text(engine: Engine) -> None:
    ended = 0
    for seed in range(20):
        stream = engine.stream([1], strategy="sample", seed=seed, max_new_tokens=40)
        pieces = list(stream)
        result = stream.result()
        assert "</s>" not in result.text and "</s>" not in "".join(piece.text for piece in pieces)
        if result.hypotheses[0].finish_reason == "eos":
            ended += 1
            assert pieces[-1].token_ids[-1] == 0
            assert result.text == engine.detokenizer.text([1], result.token_ids[:-1])
    assert ended


@settings(deadline=None, max_examples=60)
@given(
    stops=st.lists(st.text("abc é", min_size=1, max_size=5), min_size=1, max_size=3),
    seed=st.integers(0, 10_000),
    strategy=st.sampled_from(["sample", "search", "greedy"]),
    n=st.integers(1, 2),
)
def test_no_part_of_a_stop_string_is_ever_shown(
    engine: Engine, stops: list[str], seed: int, strategy: str, n: int
) -> None:
    prompt = [1 + seed % 7, 1 + seed % 5]
    stream = engine.stream(prompt, strategy=strategy, seed=seed, n=n, stop=stops, max_new_tokens=16)
    pieces = list(stream)
    result = stream.result()
    check_adds_up(pieces, result, independent=strategy != "search")
    for index in {piece.index for piece in pieces}:
        text = "".join(piece.text for piece in pieces if piece.index == index)
        assert not any(stop in text for stop in stops)
    for hypothesis in result.hypotheses:
        whole = engine.detokenizer.text(prompt, hypothesis.token_ids)
        found = sorted((whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole)
        assert (hypothesis.finish_reason == "stop_string") == bool(found)
        if found:
            assert hypothesis.text == whole[: found[0][1]]


def test_no_half_of_a_character_is_ever_shown(engine: Engine) -> None:
    """Whole characters that several tokens spell come at once; only what stays broken becomes U+FFFD."""
    for seed in range(30):
        stream = engine.stream([1], strategy="sample", seed=seed, max_new_tokens=30, ignore_eos=True)
        pieces = list(stream)
        check_adds_up(pieces, stream.result())
        spelled = engine.tokenizer.decode([1, *stream.result().token_ids])
        assert "a" + "".join(piece.text for piece in pieces) == spelled or "\ufffd" in spelled


# ---- readers ---------------------------------------------------------------------------------------------------------


def test_a_slow_reader_gets_everything_in_larger_pieces(paced: Engine) -> None:
    stream = paced.stream([1], strategy="sample", seed=1, max_new_tokens=100, ignore_eos=True)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        time.sleep(0.02)
    check_adds_up(pieces, stream.result())
    assert len(pieces) < 60


def test_leaving_a_stream_early_cancels_it_and_frees_everything(paced: Engine) -> None:
    stream = paced.stream([1], strategy="greedy", max_new_tokens=FOREVER, ignore_eos=True)
    for piece in stream:
        assert piece.token_ids
        break
    result = stream.result(10)
    assert result.hypotheses[0].finish_reason == "cancelled" and len(result.token_ids) < FOREVER


def test_an_exception_of_the_reader_cancels_too(paced: Engine) -> None:
    stream = paced.stream([1], strategy="greedy", max_new_tokens=FOREVER, ignore_eos=True)

    def read() -> None:
        for _ in stream:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    assert stream.result(10).hypotheses[0].finish_reason == "cancelled"


def test_a_request_that_fails_raises_out_of_its_stream_after_what_was_final(engine: Engine) -> None:
    stream = engine.stream([1], strategy="greedy", plugins=["explode"], max_new_tokens=9, ignore_eos=True)
    with pytest.raises(PluginError, match="'explode' failed in logits_transform"):
        list(stream)
    assert isinstance(stream.result().error, PluginError)
    with make(MisbehavingRunner(table(), raises=lambda number: number == 1)) as broken:
        with pytest.raises(ModelError):
            list(broken.stream([1], strategy="greedy", max_new_tokens=9, ignore_eos=True))

        async def read() -> list[Piece]:
            return [
                piece async for piece in engine.astream([1], strategy="greedy", plugins=["explode"], ignore_eos=True)
            ]

        with pytest.raises(PluginError):
            asyncio.run(read())


@pytest.mark.parametrize("when", ["at once", "midway", "after the end"])
def test_a_stream_opened_at_any_time_gives_everything(paced: Engine, when: str) -> None:
    for strategy, n in (("sample", 2), ("search", 1)):
        handle: Handle = paced.submit(
            Request(prompt=[1], strategy=strategy, n=n, seed=5, max_new_tokens=40, stop="abc")
        )
        if when == "midway":
            time.sleep(0.02)
        elif when == "after the end":
            handle.result()
        pieces = list(handle.stream())
        check_adds_up(pieces, handle.result(), independent=strategy == "sample")
        check_adds_up(list(handle.stream()), handle.result(), independent=strategy == "sample")


def test_an_async_stream_gives_the_same_pieces_in_the_end(engine: Engine) -> None:
    async def read(**options: Any) -> list[Piece]:
        return [piece async for piece in engine.astream([1, 2], **options)]

    for n in (1, 3):
        options: dict[str, Any] = {"strategy": "sample", "seed": 8, "n": n, "max_new_tokens": 20, "stop": ["bc", "ca"]}
        check_adds_up(asyncio.run(read(**options)), engine.generate([1, 2], **options))


def test_a_model_without_a_tokenizer_streams_ids() -> None:
    with Engine(TableModel(5), registry=REGISTRY, slots=512) as engine:
        pieces = list(engine.stream([1], strategy="greedy", max_new_tokens=6))
        assert all(not piece.text for piece in pieces)
        assert sum(len(piece.token_ids) for piece in pieces) == 6


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[Engine]:
    with Engine.load("smollm2", dtype="float32", slots=4096, registry=REGISTRY) as engine:
        yield engine


@pytest.mark.real_model
def test_emoji_and_characters_of_many_tokens_are_shown_whole(real: Engine) -> None:
    """A plugin makes the model write them, token by token."""
    text = "🎉 naïve 你好世界 👩‍👩‍👧 Ωmega"
    given_ids = real.tokenizer.encode(text, add_special_tokens=False)
    prompt = real.tokenizer.encode("Say:", add_special_tokens=False)
    write = Write(Write.Params(token_ids=given_ids))
    write.name = "write"
    for strategy in ("search", "sample"):
        stream = real.stream(prompt, strategy=strategy, plugins=[write], max_new_tokens=len(given_ids))
        pieces = list(stream)
        assert "".join(piece.text for piece in pieces) == text == stream.result().text
        assert not any("\ufffd" in piece.text for piece in pieces)
        check_adds_up(pieces, stream.result(), independent=strategy == "sample")


@pytest.mark.real_model
@pytest.mark.parametrize("strategy", ["greedy", "sample", "search"])
def test_the_real_models_pieces_come_to_its_result_with_stop_strings(real: Engine, strategy: str) -> None:
    options: dict[str, Any] = {"strategy": strategy, "seed": 2, "max_new_tokens": 24, "stop": ["ing", ". ", "\n\n"]}
    stream = real.stream("Write two sentences about rain.", **options)
    pieces = list(stream)
    check_adds_up(pieces, stream.result(), independent=strategy != "search")
    assert not any(stop in stream.result().text for stop in options["stop"])
