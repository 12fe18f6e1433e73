"""What stochastic beam search claims, written a second time: text after text, by the formula as it is printed."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from unspool import noise
from unspool_beam.claims import Text, logprobs_after

Beam = tuple[float, float, Text, int]
"""G, the log-probability, the text, and the stream that its children draw from."""


class StochasticBeamSearch:
    """The largest perturbed log-probabilities, found from the top down."""

    @staticmethod
    def texts(params: Any, model: Any, request: Any) -> list[tuple[Text, float]]:
        """Search by hand, with the noise of the request: in each step, of all that has ended or goes on the largest."""
        uniform = float(noise.uniform(_key(request, 0, 1))[0])
        beams: list[Beam] = [(-math.log(-math.log(uniform)), 0.0, (), 0)]
        finished: list[tuple[float, Text]] = []
        for length in range(1, request.limits.max_new_tokens + 1):
            children = sorted((child for beam in beams for child in _children(model, request, beam)), reverse=True)
            numbered = [(value, phi, text, place) for place, (value, phi, text) in enumerate(children)]
            ends = {text for _, text in finished}
            best = sorted([*numbered, *((value, 0.0, text, -1) for value, text in finished)], reverse=True)
            beams, finished = [], []
            for value, phi, text, stream in best[: params.width]:
                if text in ends or text[-1] in request.end_ids or length == request.limits.max_new_tokens:
                    finished.append((value, text))
                else:
                    beams.append((value, phi, text, stream))
        return [(text, value) for value, text in finished[: request.n]]


def _children(model: Any, request: Any, beam: Beam) -> list[tuple[float, float, Text]]:
    """Give G, log-probability and text of each child: Gumbel noise around its log-probability, below its parent's G."""
    above, so_far, text, stream = beam
    logprobs = logprobs_after(SimpleNamespace(renormalize=True), model, request, text)
    drawn = noise.gumbel(_key(request, stream, len(text) + 1), len(logprobs), torch.float64)[0].tolist()
    noisy = {t: so_far + logprob + drawn[t] for t, logprob in enumerate(logprobs) if logprob > -math.inf}
    largest = max(noisy.values(), default=0.0)
    return [
        (
            -math.log(math.exp(-above) + (math.exp(-value) - math.exp(-largest))),
            so_far + logprobs[token],
            (*text, token),
        )
        for token, value in noisy.items()
    ]


def _key(request: Any, stream: int, position: int) -> torch.Tensor:
    seed, streams, positions = (torch.tensor([value]) for value in (request.seed, stream, position))
    return noise.key(seed, streams, positions, noise.purpose_key("stochastic_beam"))
