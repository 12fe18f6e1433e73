"""What beam search claims, written a second time: slowly, one beam after another, without tensors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Text = tuple[int, ...]


class BeamSearch:
    """Sums of log-probabilities over lengths, and the texts that come of them."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Text, finish_reason: str, logprobs: Sequence[float]) -> float | None:
        """Divide the sum by the length, weighed. Unnormalised, it is a sum of what no law is shown."""
        if not params.renormalize:
            return None
        return math.fsum(logprobs) / weight(params, len(tokens))

    @staticmethod
    def texts(params: Any, model: Any, request: Any) -> list[tuple[Text, float]] | None:
        """Search by hand: all beams by all tokens, the best candidates, those that ended, those that go on."""
        if params.sample:
            return None
        limits, ends = request.limits, set(request.end_ids)
        beams: list[tuple[float, Text]] = [(0.0, ())]
        finished: list[tuple[float, Text]] = []
        while beams:
            candidates = []
            for total, text in beams:
                logprobs = logprobs_after(params, model, request, text)
                candidates += [(total + logprob, (*text, token)) for token, logprob in enumerate(logprobs)]
            possible = [candidate for candidate in candidates if candidate[0] > -math.inf]
            ranked = sorted(possible, key=lambda candidate: -candidate[0])[: max(2, 1 + len(ends)) * params.width]
            length = len(ranked[0][1]) if ranked else 0
            beams = []
            for place, (total, text) in enumerate(ranked):
                if text[-1] not in ends and length < limits.max_new_tokens:
                    beams.append((total, text))
                elif place < params.width:
                    finished.append((total / weight(params, length), text))
            beams = beams[: params.width]
            finished = sorted(finished, key=lambda found: -found[0])[: params.width]
            if beams and len(finished) == params.width:
                hopeful = params.early_stopping == "never" and params.length_penalty > 0
                reach = beams[0][0] / weight(params, limits.max_new_tokens if hopeful else length)
                if params.early_stopping is True or reach <= finished[-1][0]:
                    break
        return [(text, score) for score, text in finished[: request.n]]

    @staticmethod
    def exhaustive(request: Any, vocab_size: int) -> dict[str, Any]:
        """Keep every text there can be."""
        width = min(1024, vocab_size**request.limits.max_new_tokens)
        return {
            "width": width,
            "length_penalty": 0.0,
            "early_stopping": "never",
            "sample": False,
            "renormalize": True,
        }


class LogSoftmax:
    """Log-probabilities."""

    @staticmethod
    def transform(params: Any, row: Any) -> list[float]:
        """Subtract the log of the sum of exponentials."""
        norm = math.log(math.fsum(map(math.exp, row.logits)))
        return [logit - norm for logit in row.logits]


def logprobs_after(params: Any, model: Any, request: Any, text: Text) -> list[float]:
    """Give what the next token of a text adds to its sum, by token."""
    logits = model.logits_after((*request.prompt_ids, *text)).tolist()
    banned = request.end_ids if len(text) < request.limits.min_new_tokens else ()
    logits = [-math.inf if token in banned else logit for token, logit in enumerate(logits)]
    if max(logits) == -math.inf:
        return list(logits)  # nothing follows this text
    norm = math.log(math.fsum(map(math.exp, logits))) if params.renormalize else 0.0
    return [logit - norm for logit in logits]


def weight(params: Any, length: int) -> float:
    """Say what a sum over so many tokens is divided by."""
    base: float = length if params.length_form == "power" else (5 + length) / 6
    return float(base**params.length_penalty)
