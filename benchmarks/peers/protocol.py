"""How a measured engine is spoken to: a job a line of JSON comes in, an answer a line of JSON goes out.

    in   {"prompts": [[1, 2, ...], ...], "new": 128, "width": 1, "drafts": null, "show": false}
    out  {"seconds": 5.2, "first": 0.3, "kv_bytes": 9200000, "passes": 128, "token_ids": [[...], ...] or null}

The first line out says what the engine offers, with its versions, or why it cannot be loaded. Greedy, ends ignored,
just `new` tokens a prompt. `width` above 1 is beam search; `drafts` is how many drafts may hang below a row.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TextIO


@dataclass(frozen=True)
class Job:
    """What is to be decoded.

    Args:
        prompts: token ids.
        new: tokens that each prompt gets.
        width: beams; 1: greedy.
        drafts: most drafts below a row; None: no drafter.
        show: answer with the tokens too.
    """

    prompts: list[list[int]]
    new: int
    width: int = 1
    drafts: int | None = None
    show: bool = False


@dataclass(frozen=True)
class Answer:
    """What a job took.

    Args:
        seconds: from the first prompt to the last token.
        token_ids: the new tokens of each prompt.
        first: seconds until every prompt had its first token; None: not known.
        kv_bytes: keys and values at their most; None: not known.
        passes: forward passes; None: not known.
    """

    seconds: float
    token_ids: list[list[int]] | None
    first: float | None = None
    kv_bytes: int | None = None
    passes: int | None = None


class Served(Protocol):
    """An engine with its model loaded."""

    offers: tuple[str, ...]
    """Of `greedy`, `beam`, `drafts` and `sharing` (many requests with one prefix) those that it can do."""
    packages: tuple[str, ...]
    """What runs, to say its versions."""

    def run(self, job: Job) -> Answer:
        """Decode a job."""


def serve(load: Callable[[argparse.Namespace], Served]) -> None:
    """Load an engine by the command line's options, and answer jobs until there are no more."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--settings", type=json.loads, default={})
    out = _own_output()
    try:
        engine = load(parser.parse_args())
        versions = {name: importlib.metadata.version(name) for name in engine.packages}
    except BaseException as error:
        _say(out, {"error": _reason(error)})
        raise
    _say(out, {"offers": engine.offers, "versions": versions})
    for line in sys.stdin:
        job = Job(**json.loads(line))
        try:
            answer = engine.run(job)
            _check(answer, job)
        except Exception as error:
            _say(out, {"error": _reason(error)})
            continue
        _say(out, {**asdict(answer), "token_ids": answer.token_ids if job.show else None})


def _own_output() -> TextIO:
    """Keep the standard output for answers: whatever else is printed, by C too, goes where errors go."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return out


def _say(out: TextIO, message: dict[str, Any]) -> None:
    out.write(json.dumps(message) + "\n")
    out.flush()


def _check(answer: Answer, job: Job) -> None:
    lengths = None if answer.token_ids is None else [len(ids) for ids in answer.token_ids]
    if lengths != [job.new] * len(job.prompts):
        raise RuntimeError(f"not {job.new} tokens for each of {len(job.prompts)} prompts, but {lengths}")


def _reason(error: BaseException) -> str:
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:300]}"
