"""Packed passes give what the model gives by itself, for every architecture of the test kit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from unspool.huggingface import HuggingFaceRunner, plan
from unspool.runner import Batch, Span
from unspool_testing.networks import ARCHITECTURES, tiny_model

every_architecture = pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
# transformers' own eager attention takes its softmax in float32, whatever the model's dtype.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 2e-5}


@cache
def runner_of(arch: str) -> HuggingFaceRunner:
    return HuggingFaceRunner(tiny_model(arch))


@cache
def reference_of(arch: str) -> PreTrainedModel:
    model = tiny_model(arch)
    model.set_attn_implementation("eager")
    return model


@torch.inference_mode()
def alone(arch: str, tokens: Sequence[int] | NDArray[np.int64], **options: Any) -> Any:
    """Run one whole sequence through the model itself."""
    return reference_of(arch)(input_ids=torch.as_tensor(np.asarray(tokens))[None], use_cache=False, **options)


def tokens_of(seed: int, length: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(3, 64, length)


class Feeder:
    """Feeds whole sequences to a runner, a chunk at a time, each in the slots that it was given."""

    def __init__(self, runner: HuggingFaceRunner, sequences: Sequence[NDArray[np.int64]], slots: Sequence[Any]) -> None:
        self.runner, self.sequences, self.slots = runner, sequences, slots
        self.done = [0] * len(sequences)
        self.logits: list[list[Tensor]] = [[] for _ in sequences]

    def feed(self, chunks: Sequence[int], **options: Any) -> None:
        spans, parts, start = [], [], 0
        for number, count in enumerate(chunks):
            if count:
                begin, end = self.done[number], self.done[number] + count
                slots = self.slots[number]
                whole = slice(slots[0], slots[0] + end) if isinstance(slots, range) else slots[:end]
                spans.append(Span(start, count, whole))
                part = np.arange(begin, end)
                parts.append((self.sequences[number][begin:end], part, np.asarray(slots)[begin:end]))
                self.done[number], start = end, start + count
        ids, positions, places = (np.concatenate(column) for column in zip(*parts, strict=True))
        output = self.runner.forward(Batch(ids, positions, places, spans, np.arange(start), **options))
        for span, number in zip(spans, [i for i, count in enumerate(chunks) if count], strict=True):
            self.logits[number].append(output.logits[span.start : span.start + span.count])


@every_architecture
def test_chunks_and_steps_of_many_packed_sequences_give_the_models_own_logits(arch: str) -> None:
    runner = runner_of(arch)
    runner.allocate(200)
    sequences = [tokens_of(seed, length) for seed, length in enumerate([17, 5, 9, 14, 12, 20])]
    scattered = np.random.default_rng(9).permutation(np.arange(100, 200))
    slots = [range(17), scattered[:5], range(17, 26), scattered[5:19], range(30, 42), scattered[19:39]]
    feeder = Feeder(runner, sequences, slots)
    feeder.feed([8, 4, 0, 3, 1, 0])
    feeder.feed([8, 0, 8, 7, 3, 18])
    feeder.feed([1, 1, 0, 3, 7, 1])
    feeder.feed([0, 0, 1, 1, 1, 1])
    for sequence, logits in zip(sequences, feeder.logits, strict=True):
        torch.testing.assert_close(torch.cat(logits), alone(arch, sequence).logits[0], **CLOSE)


@every_architecture
@pytest.mark.parametrize("copied", [True, False], ids=["together", "one by one"])
def test_steps_of_many_sequences_give_the_models_own_logits(
    arch: str, copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_WORTH_COPYING", 10**9 if copied else 0)
    runner = runner_of(arch)
    runner.allocate(200)
    sequences = [tokens_of(seed, length) for seed, length in enumerate([3, 12, 13, 30, 10, 13, 11])]
    slots = [range(start, start + len(s)) for start, s in zip(range(0, 200, 30), sequences, strict=False)]
    feeder = Feeder(runner, sequences, slots)
    feeder.feed([len(sequence) - 1 for sequence in sequences])
    feeder.feed([1] * len(sequences))
    for sequence, logits in zip(sequences, feeder.logits, strict=True):
        torch.testing.assert_close(torch.cat(logits), alone(arch, sequence).logits[0], **CLOSE)


@every_architecture
def test_every_node_of_a_tree_sees_its_own_path_alone(arch: str) -> None:
    runner = runner_of(arch)
    runner.allocate(64)
    prompt, nodes = tokens_of(0, 9), tokens_of(1, 6)
    parents = [-1, -1, 0, 0, 2, 1]  # -1: the prompt's last token
    slots = np.array([50, 20, 21, 40, 9, 33])
    paths: list[list[int]] = []
    for node, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), node])
    Feeder(runner, [prompt], [range(9)]).feed([9])
    mask = np.zeros((6, 15), dtype=np.bool_)
    mask[:, :9] = True
    for node, path in enumerate(paths):
        mask[node, [9 + ancestor for ancestor in path]] = True
    positions = np.array([8 + len(path) for path in paths])
    span = Span(0, 6, np.concatenate([np.arange(9), slots]), mask)
    logits = runner.forward(Batch(nodes, positions, slots, [span], np.arange(6))).logits
    for node, path in enumerate(paths):
        expected = alone(arch, [*prompt, *nodes[path]]).logits[0, -1]
        torch.testing.assert_close(logits[node], expected, **CLOSE)
    # The tree grows from one of its leaves in a later pass, beside a step of another branch.
    contexts = [np.concatenate([np.arange(9), slots[paths[leaf]], [slot]]) for leaf, slot in ((4, 60), (5, 61))]
    spans = [Span(0, 1, contexts[0]), Span(1, 1, contexts[1])]
    batch = Batch(np.array([7, 8]), np.array([12, 11]), np.array([60, 61]), spans, np.arange(2))
    for row, leaf, token in zip(runner.forward(batch).logits, (4, 5), (7, 8), strict=True):
        torch.testing.assert_close(row, alone(arch, [*prompt, *nodes[paths[leaf]], token]).logits[0, -1], **CLOSE)


@every_architecture
@pytest.mark.parametrize("count", [2, 40])
@pytest.mark.parametrize("spoilt", [False, True])
def test_a_view_may_have_holes_whatever_they_hold(arch: str, count: int, spoilt: bool) -> None:
    """Siblings below one prompt, with a slot between any two of them that nobody sees: few siblings, or many."""
    runner = runner_of(arch)
    runner.allocate(9 + 2 * count)
    prompt, nodes = tokens_of(0, 9), tokens_of(1, count)
    Feeder(runner, [prompt], [range(9)]).feed([9])
    slots = 9 + 2 * np.arange(count)
    if spoilt:
        pool = runner._pool
        assert pool is not None
        pool.look_at(torch.full((1, 4), torch.nan))
        for group, _ in pool.places:
            group.keys[..., slots + 1, :] = torch.nan
            group.values[..., slots + 1, :] = torch.nan
    mask = np.zeros((count, 9 + 2 * count), dtype=np.bool_)
    mask[:, :9] = True
    mask[np.arange(count), slots] = True
    span = Span(0, count, slice(0, 9 + 2 * count), mask)
    logits = runner.forward(Batch(nodes, np.full(count, 9), slots, [span], np.arange(count))).logits
    for row, node in zip(logits, nodes, strict=True):
        torch.testing.assert_close(row, alone(arch, [*prompt, node]).logits[0, -1], **CLOSE)


def test_a_runner_notes_that_a_pass_gave_nan() -> None:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = torch.nan
    runner = HuggingFaceRunner(model)
    runner.allocate(8)
    assert runner._pool is not None
    for token, spoilt in ((4, False), (5, True), (4, True)):
        runner.forward(Batch(np.array([token]), *_chain(1)[:2], _chain(1)[2], np.array([0])))
        assert runner._pool.spoilt == spoilt


@every_architecture
def test_a_token_that_is_run_again_in_its_slot_gives_the_same_logits(arch: str) -> None:
    runner = runner_of(arch)
    runner.allocate(32)
    prompt = tokens_of(3, 12)
    feeder = Feeder(runner, [prompt], [range(4, 16)])
    feeder.feed([12])
    again = Batch(prompt[-1:], np.array([11]), np.array([15]), [Span(0, 1, slice(4, 16))], np.array([0]))
    torch.testing.assert_close(runner.forward(again).logits[0], feeder.logits[0][0][-1], rtol=1e-6, atol=1e-6)


@every_architecture
def test_hidden_states_are_those_of_transformers(arch: str) -> None:
    runner = runner_of(arch)
    runner.allocate(32)
    prompt = tokens_of(4, 10)
    wanted = (-2, -1, *range(runner.layers + 1))
    batch = Batch(prompt, np.arange(10), np.arange(10), [Span(0, 10, slice(0, 10))], np.array([9]), hidden=wanted)
    output = runner.forward(batch)
    expected = alone(arch, prompt, output_hidden_states=True).hidden_states
    assert set(output.hidden) == set(wanted)
    for number in wanted:
        assert output.hidden[number].shape == (10, runner.width)
        torch.testing.assert_close(output.hidden[number], expected[number][0], **CLOSE)
    assert runner.forward(Batch(prompt, *_chain(10), np.array([9]))).hidden == {}


@every_architecture
def test_the_first_layers_give_what_the_head_makes_of_their_hidden_states(arch: str) -> None:
    runner = runner_of(arch)
    runner.allocate(32)
    prompt = tokens_of(5, 10)
    whole = runner.forward(Batch(prompt, *_chain(10), np.arange(10), hidden=(1, 2)))
    for count in (1, 2):
        batch = Batch(prompt, *_chain(10), np.array([3, 9]), hidden=(0, -1), layers=count)
        part = runner.forward(batch)
        torch.testing.assert_close(part.logits, runner.head(whole.hidden[count])[[3, 9]], rtol=1e-9, atol=1e-9)
        assert set(part.hidden) == {0, -1}
        assert not torch.allclose(part.logits, whole.logits[[3, 9]])
    shallow = tiny_model(arch)
    _forget_layers(shallow, runner)
    shallow.set_attn_implementation("eager")
    with torch.inference_mode():
        expected = shallow(input_ids=torch.as_tensor(prompt)[None], use_cache=False).logits[0, [3, 9]]
    torch.testing.assert_close(part.logits, expected, **CLOSE)


def _forget_layers(model: PreTrainedModel, runner: HuggingFaceRunner) -> None:
    name = next(name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    parent = model.get_submodule(name.rpartition(".")[0])
    layers: Any = model.get_submodule(name)
    setattr(parent, name.rpartition(".")[2], layers[: runner.layers - 1])


def _chain(length: int) -> tuple[NDArray[np.int64], NDArray[np.int64], list[Span]]:
    return np.arange(length), np.arange(length), [Span(0, length, slice(0, length))]


@every_architecture
def test_only_wanted_rows_come_back_and_there_may_be_none(arch: str) -> None:
    runner = runner_of(arch)
    runner.allocate(16)
    prompt = tokens_of(6, 8)
    everything = runner.forward(Batch(prompt, *_chain(8), np.arange(8))).logits
    some = runner.forward(Batch(prompt, *_chain(8), np.array([2, 7]))).logits
    torch.testing.assert_close(some, everything[[2, 7]], rtol=1e-9, atol=1e-9)
    none = runner.forward(Batch(prompt, *_chain(8), np.array([], dtype=np.int64))).logits
    assert none.shape == (0, runner.vocab_size)


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt_oss"])
def test_what_foreign_slots_hold_never_reaches_a_request(arch: str) -> None:
    runner = runner_of(arch)
    sequences = [tokens_of(seed, length) for seed, length in enumerate([9, 11, 12, 10, 3])]
    slots: list[Any] = [range(2, 11), np.arange(40, 51)[::-1].copy(), range(12, 24), np.arange(26, 36), range(37, 40)]

    def run(poison: Callable[[], None]) -> list[Tensor]:
        runner.allocate(60)
        poison()
        feeder = Feeder(runner, sequences, slots)
        feeder.feed([len(sequence) - 2 for sequence in sequences])
        feeder.feed([1] * 5)
        feeder.feed([1] * 5)
        return [torch.cat(logits) for logits in feeder.logits]

    def fill_with_nan() -> None:
        assert runner._pool is not None
        for group, _ in runner._pool.places:
            group.keys.fill_(float("nan"))
            group.values.fill_(float("nan"))

    for clean, poisoned in zip(run(lambda: None), run(fill_with_nan), strict=True):
        assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_near_the_exact_logits(dtype: torch.dtype) -> None:
    runner = HuggingFaceRunner(tiny_model("qwen3", dtype))
    runner.allocate(16)
    prompt = tokens_of(7, 12)
    logits = runner.forward(Batch(prompt, *_chain(12), np.arange(12))).logits
    assert logits.dtype == runner.dtype == dtype
    error = (logits.double() - alone("qwen3", prompt).logits[0]).square().mean().sqrt()
    assert error < (1e-4 if dtype == torch.float32 else 0.2)


def test_a_runner_says_what_its_model_is() -> None:
    runner = runner_of("llama")
    assert (runner.vocab_size, runner.width, runner.layers, runner.window) == (64, 32, 3, 512)
    assert runner.device == torch.device("cpu")
    assert runner.dtype == torch.float64
    assert runner.slot_bytes() == 3 * 2 * (8 + 8) * 8
    assert 0 < runner.free_bytes() < 2**50


def test_the_digest_names_the_weights() -> None:
    digests = [HuggingFaceRunner(tiny_model("llama", seed=seed)).digest for seed in (0, 0, 1)]
    assert digests[0] == digests[1] != digests[2]
    assert HuggingFaceRunner(tiny_model("llama", rms_norm_eps=0.1)).digest != digests[0]


@pytest.mark.parametrize(
    ("arch", "rope", "window"),
    [
        ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, 512),
        (
            "phi3",
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [9.0] * 4,
                "original_max_position_embeddings": 40,
                "partial_rotary_factor": 1.0,
            },
            40,
        ),
        ("llama", {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}, 512),
    ],
    ids=["dynamic", "longrope", "linear"],
)
def test_a_rope_that_looks_at_the_whole_batch_limits_the_window(arch: str, rope: dict[str, Any], window: int) -> None:
    extra: dict[str, Any] = {"original_max_position_embeddings": 40} if arch == "phi3" else {}
    assert HuggingFaceRunner(tiny_model(arch, rope_parameters=rope, **extra)).window == window
