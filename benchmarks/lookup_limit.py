"""What prompt lookup could give at most: the model's own texts are replayed, as if rows cost nothing.

    python benchmarks/lookup_limit.py [--prompts 16] [--new 128] [--data FOLDER] [--json OUT]

Plain greedy texts of Spec-Bench prompts are decoded once. Then each is gone through again with all that a lookup would
have drafted at every place, every draft run: 16 tokens after each of the longest earlier matches, the latest first, as
a tree. Tokens a pass bound what a drafter of that kind can gain, rows a pass are what it would pay.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from figures import versions, write
from speculation import prompts_of

import unspool

LENGTH, LONGEST = 16, 16
"""Drafts of a chain, and tokens of the longest match."""
WAYS = ((2, 1), (1, 1), (1, 2), (1, 1000))
"""Shortest match, and most chains of a tree."""


def continuations(path: Sequence[int], shortest: int) -> Iterator[tuple[int, ...]]:
    """Give what followed each earlier match of a path's end, the longest match first, of equal ones the latest."""
    matches = []
    for end in range(len(path) - 1, 0, -1):
        length = 0
        while length < min(end, LONGEST) and path[end - 1 - length] == path[-1 - length]:
            length += 1
        if length >= shortest:
            matches.append((-length, -end))
    for _, negative in sorted(matches):
        chain = list(path[-negative : -negative + LENGTH])
        while len(chain) < LENGTH:  # beyond the path's end it goes on with itself
            chain.append(chain[len(chain) - len(path) - negative])
        yield tuple(chain)


def replay(prompt: Sequence[int], text: Sequence[int], shortest: int, chains: int) -> tuple[int, int]:
    """Count the passes of a text, and the drafts that were run."""
    path, done, passes, rows = list(prompt), 0, 0, 0
    while done < len(text):
        tree: set[tuple[int, ...]] = set()
        for number, chain in enumerate(dict.fromkeys(continuations(path, shortest))):
            if number == chains:
                break
            tree.update(chain[: depth + 1] for depth in range(LENGTH))
        right = 0
        while done + right < len(text) and tuple(text[done : done + right + 1]) in tree:
            right += 1
        taken = min(right + 1, len(text) - done)
        path += text[done : done + taken]
        done, passes, rows = done + taken, passes + 1, rows + len(tree)
    return passes, rows


def main() -> None:
    """Decode, replay and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("UNSPOOL_TEST_DATA", "../shared/data")))
    parser.add_argument("--json", help="write the figures to this file")
    options = parser.parse_args()
    print(versions())
    with unspool.Engine.load("smollm2", dtype="float32") as engine:
        asked = [
            unspool.Request(prompt=prompt, strategy="greedy", max_new_tokens=options.new)
            for prompt in prompts_of(options.data, options.prompts)
        ]
        said = [(result.prompt_token_ids, result.token_ids) for result in engine.run(asked)]
    tokens = sum(len(text) for _, text in said)
    rows = []
    for shortest, chains in WAYS:
        counts = [replay(prompt, text, shortest, chains) for prompt, text in said]
        passes, drafts = (sum(each) for each in zip(*counts, strict=True))
        row = {"shortest match": shortest, "chains": chains}
        rows.append({**row, "tokens a pass": round(tokens / passes, 2), "rows a pass": round(drafts / passes, 1)})
        print(json.dumps(rows[-1]), flush=True)
    write(options.json, rows)


if __name__ == "__main__":
    main()
