"""The trace: what every step did, in JSON lines, without changing a token, and nothing where nobody asks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unspool.engine import Engine
from unspool.errors import OutputError
from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool.registry import Registry
from unspool.request import Request, Result
from unspool.step import Step
from unspool.trace import TOP, Recorder
from unspool_testing.drafters import GuessTrees, Recall
from unspool_testing.table import TableModel

VOCAB = 6


class Ban(Plugin):
    """Forbid tokens, all after a text of some length if asked to."""

    row_local = True

    class Params(Parameters):
        tokens: tuple[int, ...] = (1, 2)
        all_after_token: int = -1

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits[:, list(self.params.tokens)] = -torch.inf
        paths, lengths = step.paths()
        last = paths[torch.arange(len(paths)), lengths - 1]
        logits[last == self.params.all_after_token] = -torch.inf


class Pairs(Plugin):
    """Grow the two best children of all rows of a request, keep two, and end a text at a token that it likes."""

    class Params(Parameters):
        ends: int = -1

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        best, token = logits.log_softmax(-1).topk(2)
        row = torch.arange(len(logits)).unsqueeze(1).expand_as(token).flatten()
        score = (step.score[:, :1] + best).flatten()
        order = score.argsort(descending=True, stable=True)
        return Growth(row=row[order], token=token.flatten()[order], score=score[order])

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        kept = [0] * len(step.requests)
        for child, request in enumerate(growth.request.tolist()):
            if growth.finish[child] is None and int(growth.token[child]) == self.params.ends:
                growth.finish[child] = "liked"
            elif growth.finish[child] is None:
                kept[request] += 1
                growth.drop[child] = kept[request] > 2


REGISTRY = Registry.installed().with_plugins({"ban": Ban, "pairs": Pairs, "recall": Recall, "guess_trees": GuessTrees})


@pytest.fixture
def engine() -> Iterator[Engine]:
    with Engine(TableModel(VOCAB), registry=REGISTRY, generation={"eos_token_id": 0}, slots=2048) as engine:
        yield engine


def traced(engine: Engine, path: Path, *asked: Request) -> tuple[list[Result], list[dict[str, Any]]]:
    with engine.trace(path):
        results = list(engine.run(asked, ordered=True))
        while engine._loop.busy:
            time.sleep(0.001)
    return results, [json.loads(line) for line in path.read_text().splitlines()]


def rows_of(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [row for r in records if r["event"] == "round" for row in r["rows"] if row["request"] == name]


def test_a_record_shows_who_has_rows_and_which_pipeline_they_share(engine: Engine, tmp_path: Path) -> None:
    asked = [
        Request(prompt=[1], strategy="greedy", max_new_tokens=3, ignore_eos=True, id="a"),
        Request(prompt=[2], strategy="greedy", max_new_tokens=3, ignore_eos=True, id="b"),
        Request(prompt=[2], strategy="sample", plugins=["ban"], max_new_tokens=3, ignore_eos=True, id="c"),
    ]
    _, records = traced(engine, tmp_path / "trace.jsonl", *asked)
    steps = [record for record in records if record["event"] == "step"]
    assert [step["step"] for step in steps] == sorted({step["step"] for step in steps})
    groups = [(tuple(g["pipeline"]), name) for step in steps for g in step["groups"] for name in g["requests"]]
    assert set(groups) == {(("greedy",), "a"), (("greedy",), "b"), (("ban", "sample"), "c")}
    assert len(groups) == 9


def test_a_row_shows_what_each_transform_banned_and_the_best_before_and_after(engine: Engine, tmp_path: Path) -> None:
    plugins: list[Any] = ["ban", {"temperature": {"temperature": 0.5}}]
    asked = Request(prompt=[3], strategy="greedy", plugins=plugins, max_new_tokens=4, ignore_eos=True, id="a")
    (result,), records = traced(engine, tmp_path / "trace.jsonl", asked)
    rows = rows_of(records, "a")
    assert len(rows) == 4
    for place, row in enumerate(rows):
        ban, temperature = row["transforms"]
        logits = TableModel(VOCAB).logits_after([3, *result.token_ids[:place]])
        best = logits.topk(TOP)
        assert row["new_token_ids"] == list(result.token_ids[:place])
        assert (ban["plugin"], ban["banned"], temperature["plugin"], temperature["banned"]) == (
            "ban",
            2,
            "temperature",
            0,
        )
        assert ban["top_before"] == [[t, v] for t, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        assert not {1, 2} & {token for token, _ in ban["top_after"]}
        assert ban["top_after"] == temperature["top_before"]
        assert temperature["top_after"][0] == [ban["top_after"][0][0], pytest.approx(2 * ban["top_after"][0][1])]
        assert [child["token"] for child in row["children"]] == [result.token_ids[place]]
    assert [row["children"][0]["finish"] for row in rows] == [None, None, None, "length"]


def test_what_finished_and_what_was_dropped_is_shown_with_its_score(engine: Engine, tmp_path: Path) -> None:
    asked = Request(
        prompt=[3], strategy={"pairs": {"ends": 4}}, max_new_tokens=5, ignore_eos=True, logprobs="pipeline", id="a", n=9
    )
    (result,), records = traced(engine, tmp_path / "trace.jsonl", asked)
    rows = rows_of(records, "a")
    children = [(row, child) for row in rows for child in row["children"]]
    ended = [
        (tuple(row["new_token_ids"] + [c["token"]]), c["finish"], c["score"]) for row, c in children if c["finish"]
    ]
    assert sorted(ended) == sorted((h.token_ids, h.finish_reason, h.score) for h in result.hypotheses)
    assert {finish for _, finish, _ in ended} <= {"liked", "length"}
    assert any(child["dropped"] for _, child in children)
    standing = {tuple(row["new_token_ids"]) for row in rows}
    for row, child in children:
        grown = (*row["new_token_ids"], child["token"])
        assert (grown in standing) == (not child["dropped"] and child["finish"] is None)


def test_the_transforms_of_a_search_stand_at_their_own_rows_when_another_row_dies(
    engine: Engine, tmp_path: Path
) -> None:
    plugins: list[Any] = [{"ban": {"tokens": [], "all_after_token": 2}}, {"temperature": {"temperature": 0.5}}]
    dead = 0
    for first in range(1, VOCAB):
        asked = Request(prompt=[3, first], strategy="pairs", plugins=plugins, max_new_tokens=6, ignore_eos=True, id="a")
        _, records = traced(engine, tmp_path / "trace.jsonl", asked)
        for row in rows_of(records, "a"):
            path = [3, first, *row["new_token_ids"]]
            assert row["dead"] == (path[-1] == 2)
            assert not (row["dead"] and row["children"])
            dead += row["dead"]
            best = TableModel(VOCAB).logits_after(path).topk(TOP)
            expected = [[t, v] for t, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
            assert row["transforms"][0]["top_before"] == expected
    assert dead


@pytest.mark.parametrize("strategy", ["greedy", "pairs"])
def test_drafts_are_shown_accepted_or_rejected(engine: Engine, tmp_path: Path, strategy: str) -> None:
    options: dict[str, Any] = {"strategy": strategy, "max_new_tokens": 5, "ignore_eos": True}
    text = engine.generate([3], **options).token_ids
    wrong = (*text[:2], (text[2] + 1) % VOCAB, 1)
    for recalled in (text, wrong):
        asked = Request(prompt=[3], plugins=[{"recall": {"texts": [list(recalled)]}}], id="a", **options)
        (result,), records = traced(engine, tmp_path / "trace.jsonl", asked)
        assert result.token_ids == text
        drafts = [d for r in records if r["event"] == "prune" for d in r["drafts"]]
        assert drafts and all(d["plugin"] == "recall" and d["request"] == "a" for d in drafts)
        for draft in drafts:
            tokens = tuple(draft["new_token_ids"])
            grown = [
                child
                for row in rows_of(records, "a")
                for child in row["children"]
                if (*row["new_token_ids"], child["token"]) == tokens
            ]
            if strategy == "greedy":
                assert draft["accepted"] == (tokens == text[: len(tokens)])
            if draft["accepted"]:
                assert grown
        assert any(d["accepted"] for d in drafts)
        assert result.stats.accepted == 0 or any(
            c["accepted"] for row in rows_of(records, "a") for c in row["children"]
        )


def test_tracing_changes_no_token(engine: Engine, tmp_path: Path) -> None:
    asked = [
        Request(prompt=[1 + i % 5], strategy=strategy, plugins=plugins, n=2, seed=i, max_new_tokens=8, logprobs="model")
        for strategy in ("greedy", "sample", "pairs")
        for plugins in ([], ["ban"], ["guess_trees"])
        for i in range(4)
    ]
    plain = list(engine.run(asked, ordered=True))
    results, records = traced(engine, tmp_path / "trace.jsonl", *asked)
    assert records
    for before, after in zip(plain, results, strict=True):
        assert before.hypotheses == after.hypotheses
        assert type(before.error) is type(after.error)
    again = list(engine.run(asked, ordered=True))
    assert [r.hypotheses for r in again] == [r.hypotheses for r in plain]


def test_nothing_is_recorded_where_nobody_asks(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trace.jsonl"
    with engine.trace(path):
        engine.generate([1], strategy="greedy", max_new_tokens=3)
    size = path.stat().st_size
    assert size

    def never(*_: object) -> None:
        raise AssertionError("a recorder was called")

    for method in ("step", "begin", "transformed", "end", "prune"):
        monkeypatch.setattr(Recorder, method, never)
    assert engine.generate([1], strategy="sample", plugins=["ban", "guess_trees"], max_new_tokens=5).token_ids
    assert path.stat().st_size == size and engine._loop.recorder is None


def test_a_trace_may_begin_and_end_while_requests_run(engine: Engine, tmp_path: Path) -> None:
    """However a step falls, each line is whole and the request is well."""
    options: dict[str, Any] = {"plugins": ["ban", "guess_trees"], "max_new_tokens": 60, "ignore_eos": True}
    plain = engine.generate([1], strategy="sample", seed=1, **options).token_ids
    results: list[Result] = []

    def work() -> None:
        results.extend(engine.generate([1], strategy="sample", seed=1, **options) for _ in range(6))

    worker = threading.Thread(target=work)
    worker.start()
    number = 0
    while worker.is_alive():
        path = tmp_path / f"{number % 4}.jsonl"
        with engine.trace(path):
            time.sleep(0.001)
        lines = path.read_text().splitlines()
        assert all(json.loads(line)["event"] in {"step", "round", "prune"} for line in lines)
        number += 1
    worker.join()
    assert [result.token_ids for result in results] == [plain] * 6


def test_a_path_that_cannot_be_written_is_an_output_error(engine: Engine, tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match=r"cannot write the trace to .*no_such"),
        engine.trace(tmp_path / "no_such" / "t"),
    ):
        raise AssertionError("never entered")
    assert engine._loop.recorder is None
    assert engine.generate([1], strategy="greedy", max_new_tokens=2).error is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_disk_that_fills_up_is_an_output_error_at_the_end_and_the_requests_are_well(engine: Engine) -> None:
    with pytest.raises(OutputError, match="/dev/full"), engine.trace("/dev/full"):
        result = engine.generate([1], strategy="greedy", max_new_tokens=40, ignore_eos=True)
    assert len(result.token_ids) == 40
