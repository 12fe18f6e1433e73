"""Passes by recordings are those without: here recorded on a CPU, where a recording is the pass itself, run again."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from unspool.errors import ModelError
from unspool.huggingface import HuggingFaceRunner, graphs, probe
from unspool.huggingface.flex import FlexPlan
from unspool.huggingface.graphs import BUCKETS, Graphs
from unspool.runner import Batch, Output, Span
from unspool_testing.compiling import plain_flex
from unspool_testing.networks import ARCHITECTURES, tiny_model

SLOTS = 600


@pytest.fixture(scope="module", autouse=True)
def plain() -> Iterator[None]:
    with plain_flex():
        yield


class Recorded:
    """Counts what is recorded and played."""

    def __init__(self) -> None:
        self.recordings, self.plays = 0, 0

    def __call__(self, step: graphs.Pass) -> graphs.Pass:
        self.recordings += 1

        def play() -> Output:
            self.plays += 1
            return step()

        return play


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setattr(graphs, "_unrecorded", found)
    return found


def steps(count: int, length: int, hidden: tuple[int, ...] = ()) -> Batch:
    """A step of each of some sequences, `length` tokens long and scattered over the pool."""
    slots = np.random.default_rng(0).permutation(SLOTS)[: count * length].reshape(count, length)
    every = np.arange(count)
    spans = [Span(row, 1, slots[row]) for row in every.tolist()]
    return Batch(every % 60 + 3, np.full(count, length - 1), slots[:, -1], spans, every, hidden)


def prompts(batch: Batch) -> Batch:
    """What must run before those steps, with no logits wanted."""
    contexts: list[Any] = [span.context[:-1] for span in batch.spans]  # type: ignore[index]
    places = [np.arange(len(context)) for context in contexts]
    starts = np.cumsum([0, *map(len, contexts)]).tolist()
    slots, positions = np.concatenate(contexts), np.concatenate(places)
    spans = [Span(start, len(context), context) for start, context in zip(starts, contexts, strict=False)]
    return Batch(slots % 60 + 3, positions, slots, spans, np.array([], dtype=np.int64))


def same(one: Output, two: Output) -> None:
    torch.testing.assert_close(one.logits, two.logits, rtol=1e-6, atol=1e-6)
    assert one.hidden.keys() == two.hidden.keys()
    for number, states in one.hidden.items():
        torch.testing.assert_close(states, two.hidden[number], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arch", "count"), [*((arch, 5) for arch in sorted(ARCHITECTURES)), ("gemma2", 1), ("gpt_oss", 2), ("llama", 40)]
)
def test_padded_passes_are_those_of_the_models_own_code(arch: str, count: int, recorded: Recorded) -> None:
    runners = [HuggingFaceRunner(tiny_model(arch), graphs=by_graphs) for by_graphs in (False, True)]
    assert [runner.compiled for runner in runners] == [[], ["attention", "graphs"]]
    outputs = []
    for runner in runners:
        runner.allocate(SLOTS)
        recorded.plays = 0
        batch = steps(count, 12, (0, 2, -1))
        runner.forward(prompts(batch))
        assert recorded.plays == 0
        outputs.append(runner.forward(batch))
    assert recorded.plays == 1
    assert outputs[1].logits.shape == (count, 64)
    same(*outputs)


def test_there_is_one_recording_for_each_number_of_rows_and_for_what_is_wanted(recorded: Recorded) -> None:
    runner = HuggingFaceRunner(tiny_model("llama"), graphs=True)
    runner.allocate(SLOTS)
    recorded.recordings, made = 0, []
    for count in (3, 4, 3, 5, 8, 1, 2, 256):
        runner.forward(steps(count, 2))
        made.append(recorded.recordings)
    assert made == [1, 1, 1, 2, 2, 3, 4, 5]
    runner.forward(steps(3, 2, hidden=(1,)))
    runner.forward(steps(4, 2, hidden=(1,)))
    assert recorded.recordings == 6
    runner.allocate(SLOTS)  # a recording is of one pool
    runner.forward(steps(3, 2))
    assert recorded.recordings == 7


def test_a_row_of_nobody_changes_no_slot_but_its_own_and_sees_no_other(recorded: Recorded) -> None:
    runner = HuggingFaceRunner(tiny_model("gpt_oss"), graphs=True)
    runner.allocate(SLOTS)
    batch = steps(5, 12)
    runner.forward(prompts(batch))
    pool = runner._pool
    assert pool is not None
    assert len(pool.positions) > SLOTS
    before = [row.clone() for row in pool.rows]
    first = runner.forward(batch)
    changed = np.append(batch.slots, len(pool.positions) - 1)
    for row, old in zip(pool.rows, before, strict=True):
        places = (row != old).any(-1).any(1)[0].nonzero().flatten()
        assert set(places.tolist()) == set(changed.tolist())
    for row in pool.rows:
        row[:, :, len(pool.positions) - 1] = 9.0
    same(runner.forward(batch), first)


def test_what_a_recording_gave_is_not_overwritten_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[str, Any] = {}

    def into_the_same_tensors(step: Callable[[], Output]) -> Callable[[], Output]:
        given = step()

        def play() -> Output:
            output = step()
            given.logits.copy_(output.logits)
            for number, states in output.hidden.items():
                given.hidden[number].copy_(states)
            return given

        return play

    monkeypatch.setattr(graphs, "_unrecorded", into_the_same_tensors)
    runner = HuggingFaceRunner(tiny_model("llama"), graphs=True)
    runner.allocate(SLOTS)
    first = runner.forward(steps(3, 2, (1,)))
    kept["logits"], kept["hidden"] = first.logits.clone(), first.hidden[1].clone()
    runner.forward(steps(4, 9, (1,)))
    assert torch.equal(first.logits, kept["logits"])
    assert torch.equal(first.hidden[1], kept["hidden"])


def test_what_no_recording_is_for_runs_without(recorded: Recorded) -> None:
    runner = HuggingFaceRunner(tiny_model("llama"), graphs=True)
    runner.allocate(SLOTS)
    (made,) = runner._made
    assert isinstance(made, Graphs)
    batch = steps(BUCKETS[-1], 2)
    assert made.takes(batch)
    token = np.arange(BUCKETS[-1] + 1)
    spans = [Span(0, len(token), slice(0, len(token)))]
    assert not made.takes(Batch(token, token, token, spans, token))
    assert not made.takes(prompts(batch))
    some = steps(3, 2)
    assert not made.takes(Batch(some.token_ids, some.positions, some.slots, some.spans, np.arange(1, 3)))
    assert not made.takes(Batch(some.token_ids, some.positions, some.slots, some.spans, some.wanted, layers=1))


def test_the_probe_goes_by_recordings_and_by_large_tiles(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int] = []
    right = FlexPlan.of

    def of(pool: Any, batch: Batch) -> Any:
        tiles.extend(span.count for span in batch.spans)
        return right(pool, batch)

    monkeypatch.setattr(FlexPlan, "of", of)
    HuggingFaceRunner(tiny_model("mistral"), graphs=True)
    assert recorded.plays >= 3
    assert max(tiles) > 16


def test_a_model_that_cannot_be_recorded_runs_and_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[graphs.Pass] = []
    own = HuggingFaceRunner(tiny_model("llama"))
    runner = HuggingFaceRunner(tiny_model("llama"), graphs=True)
    monkeypatch.setattr(graphs, "_unrecorded", asked.append)  # gives None: it could not
    for each in (own, runner):
        each.allocate(SLOTS)
    assert runner.compiled == ["attention", "graphs"]
    for count in (3, 5, 3):
        same(runner.forward(steps(count, 2)), own.forward(steps(count, 2)))
    assert runner.compiled == ["attention"]
    assert len(asked) == 1


def test_a_recording_that_gives_other_logits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(step: Callable[[], Output]) -> Callable[[], Output]:
        return lambda: Output(step().logits.roll(1, -1))

    monkeypatch.setattr(graphs, "_unrecorded", wrong)
    with pytest.raises(ModelError, match="packed, its logits differ"):
        HuggingFaceRunner(tiny_model("llama"), graphs=True)


@pytest.mark.parametrize("compiled", ["off", "auto", "on"])
def test_graphs_are_for_a_gpu_and_only_where_they_are_asked_for(
    compiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def runner(model: object, *, graphs: bool, **_: object) -> None:
        asked.append(graphs)
        raise ModelError("asked enough")

    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    loading = importlib.import_module("unspool.huggingface.load")  # the package has a function of that name
    monkeypatch.setattr(loading, "HuggingFaceRunner", runner)
    monkeypatch.setattr(loading, "_tokenizer", lambda *_: None)
    monkeypatch.setattr(PreTrainedModel, "to", lambda self, *_: self)
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(loading, "_device", torch.device)
        with pytest.raises(ModelError, match="asked enough"):
            loading.load(str(tmp_path), device=device, compile=compiled)
    assert asked == [False, compiled == "on"]


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


@gpu
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt_oss", "mistral", "qwen3"])
@pytest.mark.parametrize("count", [1, 3, 64, 200])
def test_on_a_gpu_graphs_give_what_the_models_own_code_gives(arch: str, count: int) -> None:
    outputs = []
    for by_graphs in (False, True):
        model: Any = tiny_model(arch, torch.float32, **WIDE)
        runner = HuggingFaceRunner(model.to("cuda"), graphs=by_graphs)
        runner.allocate(SLOTS)
        batch = steps(count, 2, (0, 2, -1))
        runner.forward(prompts(batch))
        runner.forward(batch)
        outputs.append(runner.forward(batch))  # the second is played, the first was recorded
    assert probe.difference(outputs[1].logits, outputs[0].logits) < 1e-3
    for number, states in outputs[0].hidden.items():
        torch.testing.assert_close(outputs[1].hidden[number], states, rtol=1e-3, atol=1e-3)


@gpu
def test_on_a_gpu_a_pass_that_waits_for_it_runs_unrecorded(caplog: pytest.LogCaptureFixture) -> None:
    numbers = torch.ones(4, device="cuda")

    def waiting() -> Output:
        return Output(numbers * numbers.sum().item())

    recorder = graphs.CudaRecorder()
    with torch.inference_mode():
        assert recorder(waiting) is None
        assert "cannot be recorded" in caplog.text
        assert waiting().logits.tolist() == [4.0] * 4
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
