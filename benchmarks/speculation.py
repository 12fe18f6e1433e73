"""Drafters against plain decoding and transformers' prompt lookup, side by side in one run, on the real model.

    python benchmarks/speculation.py [--dtype float32] [--batches 1,8,32] [--prompts 8] [--new 128]
                                     [--drafters prompt_lookup,suffix] [--again] [--full] [--queues 3] [--data FOLDER]
                                     [--json OUT]

Prompts of Spec-Bench (summarisation and retrieval), greedy, up to `--new` tokens each, in chats of the model's own
template. All sides take turns at the same prompts, another one first in each round, so that a change of the machine's
speed meets all. Plain decoding takes two turns: others are compared with their mean, and how far the two are apart
tells what a ratio is worth. A ratio is that of two sides' tokens a second; the figure is the median of the rounds, with
a 95 % interval by bootstrap. transformers' `prompt_lookup_num_tokens` takes one prompt at a time, so it is compared at
batch 1 alone; there our speed after the first token is told too. Of larger batches most of the time is the prompts, so
each round is decoded once more on an engine that has kept them: "prompts kept". The last of a round's texts ends alone,
however much sooner the others did; so we tell how much sooner a text ends on average too, and decode the prompts of all
rounds as one queue, so many at a time. `suffix` remembers nothing from one prompt to the next, but for the side that
`--again` adds: there each prompt has been answered before. In float32 our texts must be the same with drafts and
without, and those that are not are counted. In bfloat16 some differ, and end sooner or later: with `--full` all go on
to `--new` tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from figures import versions, write

import unspool
from unspool.huggingface.load import local_folder

CATEGORIES = ("summarization", "rag")
PLAIN, PLAIN_TOO = "plain", "plain once more"
THEIRS = "transformers"
THEIR_LOOKUP = "transformers prompt lookup"

AGAIN = "suffix, asked again"

DRAFTERS: dict[str, Any] = {"suffix": {"suffix": {"remember": 0}}, AGAIN: "suffix"}
"""What a name stands for where it is more than the plugin's name."""


@dataclass(frozen=True)
class Said:
    """What came of a batch."""

    seconds: float
    texts: list[tuple[int, ...]]
    first: float = 0.0
    """Seconds to the first token."""
    passes: int = 0
    accepted: int = 0
    each: float = 0.0
    """Seconds to the end of a text, on average."""

    @property
    def tokens(self) -> int:
        """Count the tokens of all texts."""
        return sum(map(len, self.texts))


def prompts_of(folder: Path, count: int) -> list[str]:
    """Give the first prompts, both categories in turn."""
    lines = (folder / "spec_bench_dev.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    by_kind = [[r["turns"][0] for r in records if r["category"] == kind] for kind in CATEGORIES]
    return [prompt for pair in zip(*by_kind, strict=False) for prompt in pair][:count]


class Ours:
    """The engine, with the model loaded.

    Args:
        options: of the command.
        keeps: keep prompts.
        at_once: most requests that run at a time.
    """

    def __init__(self, options: argparse.Namespace, *, keeps: bool = False, at_once: int | None = None) -> None:
        settings: dict[str, Any] = {"prefix_cache": keeps, "max_running": at_once}
        self.engine = unspool.Engine.load("smollm2", dtype=options.dtype, device=options.device, **settings)
        self._new, self._full = options.new, options.full

    def say(self, prompts: Sequence[str], drafters: Sequence[str], new: int | None = None) -> Said:
        """Decode a batch."""
        plugins = [DRAFTERS.get(name, name) for name in drafters]
        requests = [
            unspool.Request(
                prompt=prompt,
                strategy="greedy",
                plugins=plugins,
                max_new_tokens=new or self._new,
                ignore_eos=self._full,
            )
            for prompt in prompts
        ]
        start = time.perf_counter()
        results = sorted(self.engine.run(requests), key=lambda result: int(result.id.rpartition("-")[2]))
        seconds = time.perf_counter() - start
        stats = [result.stats for result in results]
        return Said(
            seconds,
            [result.token_ids for result in results],
            min(each.first_token_s for each in stats),
            sum(each.forward_passes for each in stats),
            sum(each.accepted for each in stats),
            statistics.mean(each.total_s for each in stats),
        )


class Theirs:
    """transformers, with the model loaded."""

    def __init__(self, dtype: str, device: str, new: int, tokenizer: Any) -> None:
        made = transformers.AutoModelForCausalLM.from_pretrained(local_folder("smollm2"), dtype=getattr(torch, dtype))
        self._model, self._tokenizer, self._new = made.to(device).eval(), tokenizer, new

    def say(self, prompt: str, lookup: int | None) -> Said:
        """Decode one prompt."""
        chat = [{"role": "user", "content": prompt}]
        ids = self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self._model.device)
        start = time.perf_counter()
        more = {} if lookup is None else {"prompt_lookup_num_tokens": lookup}
        out = self._model.generate(**ids, do_sample=False, max_new_tokens=self._new, pad_token_id=0, **more)
        seconds = time.perf_counter() - start
        return Said(seconds, [tuple(out[0, ids["input_ids"].shape[1] :].tolist())])


def interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Give the median of some ratios, and its 95 % interval by bootstrap."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[-51]


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Let all sides take turns."""
    sides = {PLAIN: [], PLAIN_TOO: [], **{name: name.split("+") for name in options.drafters.split(",")}}
    if options.again:
        sides[AGAIN] = [AGAIN]
    kept = {batch: decoded(options, batch, sides) for batch in options.batches if batch > 1}
    nothing: tuple[list[dict[str, Said]], list[dict[str, Said]]] = [], []
    ours = Ours(options)
    theirs = Theirs(options.dtype, options.device, options.new, ours.engine.tokenizer)
    rows = []
    for batch in options.batches:
        warm(ours, batch, sides)
        said: list[dict[str, Said]] = []
        for number, round_ in enumerate(rounds_of(options, batch)):
            turns = in_turn(ours, number, round_, sides)
            if batch == 1:
                turns[THEIRS] = theirs.say(round_[0], None)
                turns[THEIR_LOOKUP] = theirs.say(round_[0], options.lookup)
            said.append(turns)
        rows += [row_of(batch, name, said, *kept.get(batch, nothing)) for name in said[0]]
        unequal = sum(turns[name].texts != turns[PLAIN].texts for turns in said for name in sides)
        print(f"batch {batch}: {len(said)} rounds, {unequal} of our texts differ from the plain ones", flush=True)
    return rows


def decoded(
    options: argparse.Namespace, batch: int, sides: dict[str, list[str]]
) -> tuple[list[dict[str, Said]], list[dict[str, Said]]]:
    """Let all sides take turns where prompts were kept, on an engine alone: threads of two are in each other's way.

    Returns:
        What came of each round, and of all rounds as one queue, `--queues` times.
    """
    ours = Ours(options, keeps=True, at_once=batch)
    warm(ours, batch, sides)
    rounds, said = rounds_of(options, batch), []
    for number, round_ in enumerate(rounds):
        ours.say(round_, [], new=1)
        said.append(in_turn(ours, number, round_, sides))
    queue = [prompt for round_ in rounds for prompt in round_]
    queued = [in_turn(ours, number, queue, sides) for number in range(options.queues)]
    ours.engine.close()
    return said, queued


def in_turn(ours: Ours, number: int, prompts: Sequence[str], sides: dict[str, list[str]]) -> dict[str, Said]:
    """Decode a round by each side; which one is first depends on the number of the round."""
    names, said = list(sides), {}
    first = number % len(names)
    for name in names[first:] + names[:first]:
        if name == AGAIN:
            ours.say(prompts, sides[name])
        said[name] = ours.say(prompts, sides[name])
    return {name: said[name] for name in names}


def rounds_of(options: argparse.Namespace, batch: int) -> list[list[str]]:
    """Give the prompts of each round."""
    prompts = prompts_of(options.data, options.prompts if batch == 1 else batch * options.rounds)
    return [prompts[i : i + batch] for i in range(0, len(prompts) - batch + 1, batch)]


def warm(ours: Ours, batch: int, sides: dict[str, list[str]]) -> None:
    """Let each side decode something."""
    for drafters in sides.values():
        ours.say(["Count to one hundred."] * batch, drafters)


def row_of(
    batch: int,
    name: str,
    said: Sequence[dict[str, Said]],
    kept: Sequence[dict[str, Said]],
    queued: Sequence[dict[str, Said]],
) -> dict[str, Any]:
    """Sum up one side, and print it."""
    own = [turns[name] for turns in said]
    row: dict[str, Any] = {"batch": batch, "side": name}
    row["tok/s"] = round(statistics.median(each.tokens / each.seconds for each in own), 2)
    for other in (PLAIN, THEIRS, THEIR_LOOKUP):
        if other in said[0] and other != name:
            row[f"/ {other}"] = ratio(said, name, other, _speed)
    if batch == 1 and own[0].passes:
        row["after the first token"] = round(statistics.median(_pace(each) for each in own), 2)
        if name != PLAIN:
            row["/ plain, after the first token"] = ratio(said, name, PLAIN, _pace)
    for how, turns_there in (("prompts kept", kept), ("a queue of them", queued)):
        if turns_there:
            row[f"tok/s, {how}"] = round(statistics.median(_speed(turns[name]) for turns in turns_there), 2)
        if turns_there and name != PLAIN:
            row[f"/ plain, {how}"] = ratio(turns_there, name, PLAIN, _speed)
    if kept and name != PLAIN:
        row["times as soon ends a text, prompts kept"] = ratio(kept, name, PLAIN, lambda said: 1 / said.each)
    if passes := sum(each.passes for each in own):
        row["tokens a pass"] = round(sum(each.tokens for each in own) / passes, 2)
        row["accepted"] = sum(each.accepted for each in own)
    print(json.dumps(row), flush=True)
    return row


def ratio(said: Sequence[dict[str, Said]], name: str, other: str, what: Callable[[Said], float]) -> list[float]:
    """Compare a side with another, plain decoding with the mean of its turns: median and interval of the rounds."""
    beside = [side for side in (other, *([PLAIN_TOO] if other == PLAIN else [])) if side != name]
    ratios = [what(turns[name]) / statistics.mean(what(turns[side]) for side in beside) for turns in said]
    return [round(value, 2) for value in interval(ratios)]


def _speed(said: Said) -> float:
    return said.tokens / said.seconds


def _pace(said: Said) -> float:
    return (said.tokens - 1) / (said.seconds - said.first)


def main() -> None:
    """Run the comparison and print its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=lambda text: [int(n) for n in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--prompts", type=int, default=8, help="prompts at batch 1")
    parser.add_argument("--rounds", type=int, default=3, help="rounds at larger batches")
    parser.add_argument("--queues", type=int, default=3, help="times that all rounds are decoded as one queue")
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--lookup", type=int, default=10, help="transformers' prompt_lookup_num_tokens")
    parser.add_argument("--drafters", default="prompt_lookup,suffix", help="`a+b` is both together")
    parser.add_argument("--again", action="store_true", help="add `suffix` on prompts that were answered before")
    parser.add_argument("--full", action="store_true", help="let no text end before `--new` tokens")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("UNSPOOL_TEST_DATA", "../shared/data")))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    print(versions())
    rows = compare(options)
    write(options.json, rows)


if __name__ == "__main__":
    main()
