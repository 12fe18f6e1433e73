"""Lexically constrained beam search: texts that contain given phrases, wherever these fit best.

A plain beam would drop a text that begins an unlikely phrase before the phrase is worth it. So the beam is shared among
banks: texts that have met no token of the phrases, one, two, ..., all of them. Each bank compares only texts that have
paid as much. A text may not end before every phrase is in it. Of phrases that are begun only the furthest counts: going
on with it leads one bank up, so a beam of any width has met all after at most C tokens, unless tokens are forbidden.

    candidates  =  the best children of all beams,  and of each beam its likeliest child
                   and those by the next token of each unmet phrase
    bank b      <- the best of those candidates that have met b tokens, width / (C + 1) of them
    what a bank leaves free goes to the others, from the one that has met most down        (C: tokens of all phrases)

Post & Vilar 2018, dynamic beam allocation; their rule for free places differs in which neighbour is served first. A
phrase with alternatives (Hokamp & Liu 2017) is met by any of them, and counts as its longest one. Scores, lengths and
early ends are those of beam search: a text scores what the model says of it, whatever it had to contain. Texts that are
cut off with a phrase unmet rank below all others.

Costs one forward pass a token with `width` rows, as beam search does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from unspool.errors import InputError
from unspool.hooks import Growth
from unspool.plugin import Parameters, TokenIds, hookimpl
from unspool.prompt import encode_phrase
from unspool.rank import best
from unspool_beam.phrases import Phrase, Progress, fewest
from unspool_beam.pool import Pool
from unspool_beam.search import Search, candidates, lengths_after
from unspool_beam.side_by_side import by_request

if TYPE_CHECKING:
    from unspool.request import Hypothesis, PreparedRequest
    from unspool.step import Step

PhraseText = Annotated[str, Field(min_length=1)] | TokenIds


class AnyOf(Parameters):
    """Alternatives, one of which is enough."""

    any: tuple[PhraseText, ...] = Field(min_length=1, description="The alternatives.")


class ConstrainedBeamSearch(Search):
    """Search for the best texts that contain all phrases."""

    class Params(Search.Params):
        """Which phrases, how wide, how it ends, and how lengths are weighed."""

        main: ClassVar[str | None] = "phrases"
        phrases: Annotated[tuple[PhraseText | AnyOf, ...], Field(min_length=1)] = Field(
            description="What must be in the text: phrases as text or token ids, or `{any: [...]}`. A phrase that is "
            "text may stand with a space before it or without.",
        )
        width: int = Field(8, ge=1, le=1024, description="Beams of all banks, and finished texts that are kept.")

    def start(self, request: PreparedRequest) -> int:
        """Begin with one beam on the prompt."""
        most, given = request.limits.max_new_tokens, self.params.phrases
        if (least := fewest(self._wishes(request))) > most:
            shown = [entry.model_dump() if isinstance(entry, AnyOf) else entry for entry in given]
            allowed = f"phrases that fit into {most} new tokens, and these need at least {least}"
            raise InputError(f"{self.name}.phrases", shown, allowed)
        return super().start(request)

    def _wishes(self, request: PreparedRequest) -> list[list[Phrase]]:
        """Give the tokens of all phrases. What holds an end token can never be said, for it ends the text."""
        wishes, ends = [], set(request.end_ids)
        for entry in self.params.phrases:
            alternatives = entry.any if isinstance(entry, AnyOf) else (entry,)
            spelled = [s for text in alternatives for s in ((text, f" {text}") if isinstance(text, str) else (text,))]
            tokens = dict.fromkeys(encode_phrase(request, spelling) for spelling in spelled)
            possible = [Phrase.of(ids) for ids in tokens if not ends.intersection(ids)]
            if not possible:
                shown = entry.model_dump() if isinstance(entry, AnyOf) else entry
                allowed = f"a phrase without a token that ends the text, {sorted(ends)}"
                raise InputError(f"{self.name}.phrases", shown, allowed)
            wishes.append(possible)
        return wishes

    def initial(self, request: PreparedRequest) -> Progress:
        """Begin with nothing said."""
        return Progress.start(self._wishes(request))

    def advance(self, state: Progress, token: int, logprob: float = 0.0) -> Progress:
        """Say what is met one token later."""
        return state.after(token)

    def open(self, request: PreparedRequest) -> Pool:
        """Begin with no finished text."""
        return Pool(self.params.width)

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        """Take the best candidates of each request, and those that bring a phrase on; best first."""
        vocab = logits.shape[-1]
        logprobs = self._without_early_ends(step, self.logprobs(logits))
        totals = by_request(step, step.score[:, :1] + logprobs)  # [requests, widest * vocab]
        counts = [candidates(request, self.params.width) for request in step.requests]
        general = best(totals, min(max(counts), totals.shape[1])).tolist()
        likeliest = best(logprobs, 1).squeeze(1).tolist()
        progress, rows, tokens, scores, streams = step.states(self), [], [], [], []
        for number, grid in enumerate(step.grid.tolist()):
            chosen = set(general[number][: counts[number]])
            for place, row in enumerate(grid):
                if row >= 0:
                    wanted = {likeliest[row], *progress[row].next_tokens()}
                    if (largest := max(wanted)) >= vocab:
                        allowed = f"token ids below {vocab}, the size of the model's vocabulary"
                        raise InputError(f"{self.name}.phrases", largest, allowed)
                    chosen |= {place * vocab + token for token in wanted}
            index = torch.tensor(sorted(chosen), device=logits.device)
            score, order = totals[number, index].sort(descending=True, stable=True)
            index = index[order]
            rows.append(step.grid[number, index // vocab])
            tokens.append(index % vocab)
            scores.append(score)
            streams.append(torch.arange(len(index), device=logits.device))
        row, score = torch.cat(rows), torch.cat(scores)
        kept = (row >= 0) & (score > -torch.inf)
        return Growth(row=row[kept], token=torch.cat(tokens)[kept], score=score[kept], stream=torch.cat(streams)[kept])

    def _without_early_ends(self, step: Step, logprobs: Tensor) -> Tensor:
        """Forbid the end where a phrase is unmet. What is left is not normalised again: to go on has its price."""
        unmet = [row for row, progress in enumerate(step.states(self)) if not progress.met]
        ends = [(row, end) for row in unmet for end in step.requests[int(step.request[row])].end_ids]
        if not ends:
            return logprobs
        early = torch.zeros_like(logprobs, dtype=torch.bool)
        row, end = torch.tensor(ends, device=logprobs.device).T
        early[row, end] = True
        return logprobs.masked_fill(early, -torch.inf)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Share the beam among the banks, score what ended, and end searches that cannot get better."""
        assert growth.score is not None
        score, drop, lengths, width = growth.score, growth.drop, lengths_after(step, growth), self.params.width
        progress: list[Progress | None] = growth.states(self)  # None after an end token, before which all was met
        children: list[list[int]] = [[] for _ in step.requests]
        for child, number in enumerate(growth.request.tolist()):
            children[number].append(child)
        before = dict(zip(step.request.tolist(), step.states(self), strict=True))
        for number, (its, pool) in enumerate(zip(children, step.own(self), strict=True)):
            banks = before[number].banks
            bank = {c: banks - 1 if (state := progress[c]) is None else state.bank for c in its}
            running = [child for child in its if growth.finish[child] is None]
            among_all, among_running = (allot(of, bank, banks, width) for of in (its, running))
            for child in its:
                if growth.finish[child] is None:
                    drop[child] = child not in among_running
                elif child in among_all:
                    score[child] /= self.weight(lengths[child])
                    if bank[child] == banks - 1:
                        pool.add(float(score[child]))
                else:
                    drop[child] = True
            if among_running:
                highest = max(float(score[child]) for child in among_running)
                if self.is_over(step.requests[number], pool, highest, lengths[running[0]]):
                    drop[running] = True

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        """Put texts that contain all phrases first, by score, then the others."""
        begin = self.initial(request)
        return sorted(super().rank(request, hypotheses), key=lambda hypothesis: not _met(begin, hypothesis))

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Tell of each returned text whether it contains all phrases, best first."""
        begin = self.initial(request)
        return {"met": [_met(begin, hypothesis) for hypothesis in hypotheses[: request.n]]}


def _met(progress: Progress, hypothesis: Hypothesis) -> bool:
    return reduce(Progress.after, hypothesis.token_ids, progress).met


def allot(children: Sequence[int], bank: Mapping[int, int], banks: int, width: int) -> set[int]:
    """Choose `width` children: as many of each bank, then whatever is best in the banks that have met most.

    Args:
        children: best first.
        bank: child -> its bank, from 0 to `banks` - 1.
        banks: how many there are.
        width: how many places.
    """
    share, rest = divmod(width, banks)
    queues: list[list[int]] = [[] for _ in range(banks)]
    for child in children:
        queues[bank[child]].append(child)
    queues.reverse()  # the one that has met most first
    places = [share + rest, *[share] * (banks - 1)]
    kept = [child for queue, room in zip(queues, places, strict=True) for child in queue[:room]]
    left = [child for queue, room in zip(queues, places, strict=True) for child in queue[room:]]
    return {*kept, *left[: width - len(kept)]}
