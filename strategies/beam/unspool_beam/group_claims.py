"""What diverse beam search claims, written a second time: slowly, group after group, without tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from unspool_beam.claims import Text, logprobs_after, weight

Beam = tuple[float, float, Text]
"""The total that the search goes by, the log-probability, the text."""


class DiverseBeamSearch:
    """Groups that choose one after another, each paying for what those before it took."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Text, finish_reason: str, logprobs: Sequence[float]) -> float | None:
        """Divide the sum by the length, weighed. With penalties in it, it is more than its log-probabilities say."""
        if params.penalized_scores or not params.renormalize:
            return None
        return math.fsum(logprobs) / weight(params, len(tokens))

    @staticmethod
    def texts(params: Any, model: Any, request: Any) -> list[tuple[Text, float]]:
        """Search by hand: in each step one group after the other."""
        each, ends, most = params.width // params.groups, set(request.end_ids), request.limits.max_new_tokens
        beams: list[list[Beam]] = [[(0.0, 0.0, ())] for _ in range(params.groups)]
        finished: list[list[tuple[float, Text]]] = [[] for _ in beams]
        length = 0
        while any(beams):
            length += 1
            taken: Counter[int] = Counter()
            for group in range(params.groups):
                candidates = [
                    (total + logprob - params.diversity * taken[token], sum_ + logprob, (*text, token))
                    for total, sum_, text in beams[group]
                    for token, logprob in enumerate(logprobs_after(params, model, request, text))
                ]
                possible = [candidate for candidate in candidates if candidate[0] > -math.inf]
                ranked = sorted(possible, key=lambda beam: -beam[0])[: max(2, 1 + len(ends)) * each]
                taken.update([text[-1] for _, _, text in ranked if text[-1] not in ends][:each])
                running = [beam for beam in ranked if beam[2][-1] not in ends and length < most][:each]
                for total, sum_, text in ranked[:each]:
                    if text[-1] in ends or length == most:
                        merit = total if params.penalized_scores else sum_
                        finished[group].append((merit / weight(params, length), text))
                finished[group] = sorted(finished[group], key=lambda found: -found[0])[:each]
                beams[group] = [] if _is_over(params, running, finished[group], length, most) else running
        rounds = zip_longest(*finished)
        ordered = [
            found
            for texts in rounds
            for found in sorted((text for text in texts if text is not None), key=lambda found: -found[0])
        ]
        return [(text, score) for score, text in ordered[: request.n]]


def _is_over(params: Any, running: list[Beam], finished: list[tuple[float, Text]], length: int, most: int) -> bool:
    if not running or len(finished) < params.width // params.groups:
        return not running
    if params.early_stopping is True:
        return True
    hopeful = params.early_stopping == "never" and params.length_penalty > 0
    best = max(total if params.penalized_scores else sum_ for total, sum_, _ in running)
    return bool(best / weight(params, most if hopeful else length) <= finished[-1][0])
