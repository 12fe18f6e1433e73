"""Each penalty equals transformers' processor of the same name row by row, or a plain statement of its rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from unspool.errors import ConfigError, InputError
from unspool.pipeline import PluginSpec, build_plugin
from unspool.plugin import Plugin
from unspool.registry import Registry
from unspool_penalties.bias import BadWords, LogitBias, SequenceBias
from unspool_penalties.dry import LONGEST, Dry
from unspool_penalties.forced import ForcedBos, ForcedEos
from unspool_penalties.frequency import FrequencyPenalty
from unspool_penalties.length import ExponentialDecayLengthPenalty
from unspool_penalties.no_repeat_ngram import NoRepeatNgram
from unspool_penalties.presence import PresencePenalty
from unspool_penalties.repetition import RepetitionPenalty
from unspool_penalties.suppress import BeginSuppressTokens, SuppressTokens

INF = float("inf")
VOCAB = 12
PLUGINS: dict[str, type[Plugin]] = {
    "repetition_penalty": RepetitionPenalty,
    "presence_penalty": PresencePenalty,
    "frequency_penalty": FrequencyPenalty,
    "no_repeat_ngram": NoRepeatNgram,
    "dry": Dry,
    "logit_bias": LogitBias,
    "sequence_bias": SequenceBias,
    "bad_words": BadWords,
    "suppress_tokens": SuppressTokens,
    "begin_suppress_tokens": BeginSuppressTokens,
    "forced_bos": ForcedBos,
    "forced_eos": ForcedEos,
    "exponential_decay_length_penalty": ExponentialDecayLengthPenalty,
}
Path = tuple[list[int], list[int]]
"""Prompt and new tokens."""


def build(name: str, **params: Any) -> Plugin:
    return build_plugin(PluginSpec(name, params), Registry([]).with_plugins(PLUGINS))


class FakeStep:
    """One row for each path, each of a request of its own; what pads the paths looks like a token."""

    def __init__(self, plugin: Plugin, paths: Sequence[Path], limit: int = 8, pad: int = 1) -> None:
        self.rows, self.pad = paths, pad
        limits = SimpleNamespace(max_new_tokens=limit)
        self.requests = [
            SimpleNamespace(parameters={plugin.name: plugin.params}, limits=limits, end_ids=(0, 3)[: 1 + row % 2])
            for row in range(len(paths))
        ]
        self.request = torch.arange(len(paths))
        self.length = torch.tensor([len(new) for _, new in paths])

    def paths(self) -> tuple[Tensor, Tensor]:
        whole = [prompt + new for prompt, new in self.rows]
        longest = max(map(len, whole))
        return (
            torch.tensor([path + [self.pad] * (longest - len(path)) for path in whole]),
            torch.tensor([len(path) for path in whole]),
        )

    def values(self, plugin: Plugin, field: str) -> Tensor:
        return torch.tensor([getattr(plugin.params, field)] * len(self.rows))


def apply(plugin: Plugin, paths: Sequence[Path], logits: Tensor, limit: int = 8) -> Tensor:
    out = logits.clone()
    cast(Any, plugin).logits_transform(FakeStep(plugin, paths, limit), out)
    other_pad = logits.clone()
    cast(Any, plugin).logits_transform(FakeStep(plugin, paths, limit, pad=7), other_pad)
    assert torch.equal(out, other_pad), "padding must not count"
    return out


def reference(processor: Any, paths: Sequence[Path], logits: Tensor) -> Tensor:
    """Apply a processor of transformers row by row, each with its own path."""
    whole = [torch.tensor([prompt + new]) for prompt, new in paths]
    return torch.cat([processor(ids, row.unsqueeze(0).clone()) for ids, row in zip(whole, logits, strict=True)])


@st.composite
def paths_and_logits(draw: st.DrawFn) -> tuple[list[Path], Tensor]:
    token = st.integers(0, draw(st.sampled_from([1, 3, VOCAB - 1])))
    prompt, new = st.lists(token, min_size=1, max_size=6), st.lists(token, max_size=7)
    paths = draw(st.lists(st.tuples(prompt, new), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(len(paths), VOCAB, generator=generator) * 4
    banned = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.4]))
    return paths, logits.masked_fill(banned, -INF)


BAD = [[1], [2, 0], [0, 0, 1], [1, 1]]
BIASES: list[Any] = [[[1], -2.5], [[2, 0], 3.0], [[1, 0], 1.0], [[0, 0, 1], -7.0]]
PARITY: list[tuple[str, dict[str, Any], Callable[[], Any]]] = [
    ("repetition_penalty", {"penalty": 1.3}, lambda: hf.RepetitionPenaltyLogitsProcessor(1.3)),
    ("repetition_penalty", {"penalty": 0.7}, lambda: hf.RepetitionPenaltyLogitsProcessor(0.7)),
    ("no_repeat_ngram", {"n": 1}, lambda: hf.NoRepeatNGramLogitsProcessor(1)),
    ("no_repeat_ngram", {"n": 2}, lambda: hf.NoRepeatNGramLogitsProcessor(2)),
    ("no_repeat_ngram", {"n": 3}, lambda: hf.NoRepeatNGramLogitsProcessor(3)),
    ("sequence_bias", {"sequences": BIASES}, lambda: hf.SequenceBiasLogitsProcessor(BIASES)),
    ("bad_words", {"sequences": BAD}, lambda: hf.NoBadWordsLogitsProcessor(BAD)),
    ("suppress_tokens", {"token_ids": [2, 5]}, lambda: hf.SuppressTokensLogitsProcessor([2, 5])),
]


@pytest.mark.parametrize(("name", "params", "processor"), PARITY)
def test_it_equals_the_processor_of_transformers(
    name: str, params: dict[str, Any], processor: Callable[[], Any]
) -> None:
    @settings(max_examples=60, deadline=None)
    @given(paths_and_logits())
    def check(case: tuple[list[Path], Tensor]) -> None:
        paths, logits = case
        torch.testing.assert_close(apply(build(name, **params), paths, logits), reference(processor(), paths, logits))

    check()


@settings(max_examples=40, deadline=None)
@given(paths_and_logits())
def test_repetition_of_generated_tokens_alone_equals_transformers_with_the_prompt_ignored(
    case: tuple[list[Path], Tensor],
) -> None:
    paths, logits = case
    out = apply(build("repetition_penalty", penalty=1.5, include_prompt=False), paths, logits)
    for path, row, result in zip(paths, logits, out, strict=True):
        processor = hf.RepetitionPenaltyLogitsProcessor(1.5, prompt_ignore_length=len(path[0]))
        torch.testing.assert_close(result, reference(processor, [path], row.unsqueeze(0))[0])


@settings(max_examples=60, deadline=None)
@given(paths_and_logits(), st.floats(-2, 2), st.booleans())
def test_presence_is_paid_once_and_frequency_for_each_occurrence(
    case: tuple[list[Path], Tensor], penalty: float, include_prompt: bool
) -> None:
    paths, logits = case

    def close(value: float) -> Any:
        return pytest.approx(value, rel=1e-5, abs=1e-5)  # a float32 difference near zero keeps few digits

    params = {"penalty": penalty, "include_prompt": include_prompt}
    presence = apply(build("presence_penalty", **params), paths, logits)
    frequency = apply(build("frequency_penalty", **params), paths, logits)
    for row, (prompt, new) in enumerate(paths):
        counted = prompt + new if include_prompt else new
        for token in range(VOCAB):
            times = counted.count(token)
            before = logits[row, token].item()
            assert presence[row, token].item() == close(before - penalty * min(times, 1))
            assert frequency[row, token].item() == close(before - penalty * times)


def test_field_conventions_say_whether_the_prompt_counts() -> None:
    paths, logits = [([4], [5])], torch.ones(1, VOCAB)
    changed = {
        name: (apply(build(name), paths, logits)[0] != 1).nonzero().squeeze(-1).tolist()
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    }
    assert changed == {"repetition_penalty": [4, 5], "presence_penalty": [5], "frequency_penalty": [5]}


@pytest.mark.parametrize(
    "name", ["repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram", "dry"]
)
def test_ids_beyond_the_output_vocabulary_are_passed_over(name: str) -> None:
    params = {"n": 1} if name == "no_repeat_ngram" else {}
    out = apply(build(name, **params), [([VOCAB + 5, 2], [VOCAB + 5, 2, VOCAB + 5, 2])], torch.zeros(1, VOCAB))
    assert not out.isnan().any()


def dry_by_definition(path: list[int], breakers: Sequence[int]) -> dict[int, int]:
    """Find the longest match for each token, straight from the definition."""
    longest: dict[int, int] = {}
    for end in range(1, len(path)):
        length = 0
        while (
            length < min(end, LONGEST)
            and path[end - 1 - length] == path[-1 - length]
            and path[-1 - length] not in breakers
        ):
            length += 1
        if length and path[end] not in breakers:
            longest[path[end]] = max(longest.get(path[end], 0), length)
    return longest


@settings(max_examples=100, deadline=None)
@given(paths_and_logits(), st.integers(1, 4), st.lists(st.integers(0, 3), max_size=2))
def test_dry_penalises_what_would_extend_the_longest_repetition(
    case: tuple[list[Path], Tensor], allowed: int, breakers: list[int]
) -> None:
    paths, logits = case
    out = apply(build("dry", multiplier=0.8, base=1.75, allowed_length=allowed, breakers=breakers), paths, logits)
    expected = logits.clone()
    for row, (prompt, new) in enumerate(paths):
        for token, length in dry_by_definition(prompt + new, breakers).items():
            if length >= allowed:
                expected[row, token] -= 0.8 * 1.75 ** (length - allowed)
    torch.testing.assert_close(out, expected)


def test_dry_is_right_on_long_loops_and_stays_finite() -> None:
    generator = random.Random(0)
    paths: list[Path] = [([5, 6] * 300, []), ([generator.randrange(3) for _ in range(700)], [])]
    out = apply(build("dry", base=4, multiplier=100, allowed_length=1), paths, torch.zeros(2, VOCAB))
    assert out.isfinite().all()
    assert out[0].argmin() == 5 and out[0, 5] == pytest.approx(-100 * 4.0**49, rel=1e-5)
    for token, length in dry_by_definition(paths[1][0], ()).items():
        assert out[1, token].item() == pytest.approx(-100 * 4.0 ** (length - 1), rel=1e-5)


def test_logit_bias_adds_to_every_row() -> None:
    out = apply(build("logit_bias", biases={"2": 1.5, 4: -100}), [([1], []), ([1, 2], [3])], torch.zeros(2, VOCAB))
    assert out[:, 2].tolist() == [1.5, 1.5] and out[:, 4].tolist() == [-100, -100]
    assert out.count_nonzero() == 4


def test_begin_suppress_tokens_acts_on_one_position() -> None:
    paths: list[Path] = [([1, 1], []), ([1], [2]), ([1], [2, 2])]
    logits = torch.zeros(3, VOCAB)
    first = apply(build("begin_suppress_tokens", token_ids=[3, 4]), paths, logits)
    expected = reference(hf.SuppressTokensAtBeginLogitsProcessor([3, 4], begin_index=2), paths[:1], logits[:1])
    assert torch.equal(first[:1], expected) and torch.equal(first[1:], logits[1:])
    second = apply(build("begin_suppress_tokens", token_ids=3, position=1), paths, logits)
    assert (second == -INF).nonzero().tolist() == [[1, 3]]


def test_forced_tokens_are_the_only_ones_left_at_their_position() -> None:
    paths: list[Path] = [([1, 1], []), ([1], [2]), ([1], [2] * 7)]
    logits = torch.randn(3, VOCAB)
    first = apply(build("forced_bos", token_ids=5), paths, logits)
    assert (first[0] > -INF).nonzero().tolist() == [[5]] and torch.equal(first[1:], logits[1:])
    last = apply(build("forced_eos", token_ids=[0, 3]), paths, logits, limit=8)
    assert (last[2] > -INF).nonzero().squeeze(-1).tolist() == [0, 3] and torch.equal(last[:2], logits[:2])
    assert torch.equal(last[2, [0, 3]], logits[2, [0, 3]])
    distribution = reference(hf.ForcedEOSTokenLogitsProcessor(9, 0), paths[2:], logits[2:]).softmax(-1)
    alone = apply(build("forced_eos", token_ids=0), paths[2:], logits[2:], limit=8).softmax(-1)
    assert torch.equal(alone, distribution)


def test_a_force_yields_where_its_tokens_are_forbidden() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 5] = -INF
    assert torch.equal(apply(build("forced_bos", token_ids=5), [([1], [])], logits), logits)


@settings(max_examples=60, deadline=None)
@given(paths_and_logits(), st.integers(0, 6), st.floats(0.5, 3))
def test_exponential_decay_equals_the_processor_of_transformers(
    case: tuple[list[Path], Tensor], start: int, factor: float
) -> None:
    paths, logits = case
    out = apply(build("exponential_decay_length_penalty", start=start, factor=factor), paths, logits)
    for row, path in enumerate(paths):
        processor = hf.ExponentialDecayLengthPenalty((start, factor), list((0, 3)[: 1 + row % 2]), len(path[0]))
        torch.testing.assert_close(out[row : row + 1], reference(processor, [path], logits[row : row + 1]))


def test_exponential_decay_stays_finite_however_long_the_text() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0], [-5.0, 1.0, 2.0, 3.0]])
    out = apply(build("exponential_decay_length_penalty", start=0, factor=100), [([1], [1] * 400)] * 2, logits)
    assert out.isfinite().all()
    assert out[1].argmax() == 0 and out[0, 0] == 0, "a logit of 0 has no size to grow by, as in transformers"


def test_exponential_decay_without_end_tokens_does_nothing() -> None:
    plugin = build("exponential_decay_length_penalty", start=0)
    step = FakeStep(plugin, [([1], [2])])
    step.requests[0].end_ids = ()
    logits = torch.ones(1, VOCAB)
    cast(Any, plugin).logits_transform(step, logits)
    assert torch.equal(logits, torch.ones(1, VOCAB))


ALL: list[tuple[str, dict[str, Any]]] = [
    ("repetition_penalty", {}),
    ("presence_penalty", {}),
    ("frequency_penalty", {}),
    ("no_repeat_ngram", {"n": 2}),
    ("dry", {}),
    ("logit_bias", {"biases": {1: 2.0}}),
    ("sequence_bias", {"sequences": BIASES}),
    ("bad_words", {"sequences": BAD}),
    ("suppress_tokens", {"token_ids": 1}),
    ("begin_suppress_tokens", {"token_ids": 1}),
    ("forced_bos", {"token_ids": 1}),
    ("forced_eos", {"token_ids": 1}),
    ("exponential_decay_length_penalty", {"start": 1}),
]


@pytest.mark.parametrize(("name", "params"), ALL)
@settings(max_examples=20, deadline=None)
@given(paths_and_logits(), st.sampled_from([torch.float32, torch.float64]))
def test_forbidden_stays_forbidden_and_rows_are_independent(
    name: str, params: dict[str, Any], case: tuple[list[Path], Tensor], dtype: torch.dtype
) -> None:
    paths, logits = case
    logits = logits.to(dtype)
    logits[0] = -INF  # a dead row beside others
    plugin = build(name, **params)
    assert plugin.row_local
    out = apply(plugin, paths, logits)
    assert out.dtype == dtype and not out.isnan().any() and not (out == INF).any()
    assert (out[logits == -INF] == -INF).all()
    if name != "exponential_decay_length_penalty":  # there the fake request's end ids go by the row's number
        for row, path in enumerate(paths):
            assert torch.equal(apply(plugin, [path], logits[row : row + 1]), out[row : row + 1])


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("logit_bias", {"biases": {VOCAB: 1.0}}),
        ("sequence_bias", {"sequences": [[[1, VOCAB], 1.0]]}),
        ("bad_words", {"sequences": [[VOCAB]]}),
        ("suppress_tokens", {"token_ids": [VOCAB]}),
        ("begin_suppress_tokens", {"token_ids": [VOCAB]}),
        ("forced_bos", {"token_ids": VOCAB}),
        ("forced_eos", {"token_ids": VOCAB}),
    ],
)
def test_a_token_that_the_model_lacks_is_named(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=rf"{name} = {VOCAB}: token ids below {VOCAB}"):
        apply(build(name, **params), [([1], [2])], torch.zeros(1, VOCAB))


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("repetition_penalty", {"penalty": 0}),
        ("no_repeat_ngram", {"n": 0}),
        ("dry", {"base": 0.5}),
        ("logit_bias", {"biases": {}}),
        ("logit_bias", {"biases": {1: float("-inf")}}),
        ("bad_words", {"sequences": [[]]}),
        ("suppress_tokens", {"token_ids": [-1]}),
        ("suppress_tokens", {}),
    ],
)
def test_parameters_out_of_bounds_are_refused(name: str, params: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=name):
        build(name, **params)
