"""Every way that chance can go, each with its probability: what a strategy that draws comes to, exactly.

A run is repeated, depth first, with the next outcome of its last choice. A walk's draws stand in for the strategy's own
(by `monkeypatch`), so that expectations are sums and no estimates.

    walk = Walk()
    monkeypatch.setattr(module, "draw", walk.draw)
    mean = sum(probability * value(result) for probability, result in walk.runs(lambda: alone(model, [asked])[0]))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unspool.request import Result


@dataclass
class Walk:
    """All ways that choices can go. Subclass it for choices of other kinds."""

    script: list[tuple[int, int]] = field(default_factory=list)
    """Of each choice of the present run: which outcome, and how many there are."""
    place: int = 0
    probability: float = 1.0

    def choose(self, probabilities: Sequence[float]) -> int:
        """Choose among outcomes, none of them of probability 0."""
        if self.place == len(self.script):
            self.script.append((0, len(probabilities)))
        outcome, _ = self.script[self.place]
        self.place += 1
        self.probability *= probabilities[outcome]
        return outcome

    def runs(self, run: Callable[[], Result]) -> Iterator[tuple[float, Result]]:
        """Give the result of each way, with its probability."""
        while True:
            self.place, self.probability = 0, 1.0
            result = run()
            yield self.probability, result
            while self.script and self.script[-1][0] + 1 == self.script[-1][1]:
                self.script.pop()
            if not self.script:
                return
            outcome, count = self.script[-1]
            self.script[-1] = outcome + 1, count

    def draw(self, logits: Tensor, keys: Tensor) -> Tensor:
        """Choose a token of each distribution `[n, vocab]`, in place of a draw with the noise of `[n]` keys."""
        tokens = []
        for row in logits.softmax(-1).tolist():
            possible = [token for token, probability in enumerate(row) if probability > 0]
            tokens.append(possible[self.choose([row[token] for token in possible])])
        return torch.tensor(tokens, dtype=torch.int64)
