"""What constrained beam search claims, written a second time: slowly, one beam after another, without tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from unspool_beam.claims import Text, logprobs_after, weight

Wish = list[Text]
"""The alternatives of one phrase."""


class ConstrainedBeamSearch:
    """A beam that is shared among banks by how much of the phrases is met."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Text, finish_reason: str, logprobs: Sequence[float]) -> float | None:
        """Divide the sum by the length, weighed. Unnormalised, it is a sum of what no law is shown."""
        return math.fsum(logprobs) / weight(params, len(tokens)) if params.renormalize else None

    @staticmethod
    def texts(params: Any, model: Any, request: Any) -> list[tuple[Text, float]]:
        """Search by hand: candidates, banks, what each bank keeps."""
        ends, most = set(request.end_ids), request.limits.max_new_tokens
        wishes = _wishes(params, ends)
        beams: list[tuple[float, Text]] = [(0.0, ())]
        finished: list[tuple[float, Text]] = []
        pool: list[float] = []
        length = 0
        while beams:
            length += 1
            everything, wanted = [], set()
            for total, text in beams:
                forbidden = ends if not all(_contains(text, wish) for wish in wishes) else set()
                children = [
                    (total + logprob, (*text, token))
                    for token, logprob in enumerate(logprobs_after(params, model, request, text))
                    if logprob > -math.inf and token not in forbidden
                ]
                everything += children
                wanted |= {max(children, key=lambda child: child[0])[1]} if children else set()
                wanted |= {(*text, token) for token in _next_tokens(text, wishes)}
            ranked = sorted(everything, key=lambda child: -child[0])
            general = {text for _, text in ranked[: max(2, 1 + len(ends)) * params.width]}
            ranked = [child for child in ranked if child[1] in general | wanted]
            over = [child for child in ranked if child[1][-1] in ends or length == most]
            running = _shared([child for child in ranked if child not in over], wishes, ends, params.width)
            for total, text in _shared(ranked, wishes, ends, params.width):
                if (total, text) in over:
                    finished.append((total / weight(params, length), text))
                    if all(_contains(text, wish) for wish in wishes):
                        pool = sorted([*pool, finished[-1][0]], reverse=True)[: params.width]
            beams = running
            if running and len(pool) == params.width:
                hopeful = params.early_stopping == "never" and params.length_penalty > 0
                reach = max(total for total, _ in running) / weight(params, most if hopeful else length)
                if params.early_stopping is True or reach <= pool[-1]:
                    break
        finished.sort(key=lambda found: (not all(_contains(found[1], wish) for wish in wishes), -found[0]))
        return [(text, score) for score, text in finished[: request.n]]


def _shared(
    ranked: list[tuple[float, Text]], wishes: list[Wish], ends: set[int], width: int
) -> list[tuple[float, Text]]:
    """Keep `width` of some beams: each bank its share, the last one the rest, what is left from the top down."""
    banks = 1 + sum(max(map(len, wish)) for wish in wishes)
    bank = {text: banks - 1 if text[-1] in ends else _bank(text, wishes) for _, text in ranked}
    share, rest = divmod(width, banks)
    kept, left = [], []
    for number in reversed(range(banks)):
        places = share + (rest if number == banks - 1 else 0)
        own = [text for _, text in ranked if bank[text] == number]
        kept += own[:places]
        left += own[places:]
    kept += left[: width - len(kept)]
    return [child for child in ranked if child[1] in kept]


def _wishes(params: Any, ends: set[int]) -> list[Wish]:
    """Give the phrases that do not end a text as token ids: no law has a tokenizer."""
    given = [[tuple(text) for text in (getattr(entry, "any", None) or (entry,))] for entry in params.phrases]
    return [[text for text in wish if not ends & set(text)] for wish in given]


def _contains(text: Text, wish: Wish) -> bool:
    return any(text[at : at + len(phrase)] == phrase for phrase in wish for at in range(len(text)))


def _at_the_end(text: Text, phrase: Text) -> int:
    """Count how much of a phrase, but not all of it, stands at the end of a text."""
    return max(count for count in range(len(phrase)) if count == 0 or text[-count:] == phrase[:count])


def _bank(text: Text, wishes: list[Wish]) -> int:
    said = [wish for wish in wishes if _contains(text, wish)]
    begun = [_at_the_end(text, phrase) for wish in wishes if wish not in said for phrase in wish]
    return max(begun, default=0) + sum(max(map(len, wish)) for wish in said)


def _next_tokens(text: Text, wishes: list[Wish]) -> set[int]:
    unmet = [wish for wish in wishes if not _contains(text, wish)]
    return {phrase[_at_the_end(text, phrase)] for wish in unmet for phrase in wish}
