"""What a plugin claims to do, written slowly and plainly by its author, so that a law can hold it to that.

Many laws hold for every plugin. What a *particular* plugin is for, only its author can say: that a nucleus is the
smallest set of mass p, that a grammar allows these texts, that a score is a sum divided by a length. A claim says it a
second time, without tensors, the way that the paper does. It is a class with any of the static methods of `Claims`,
named by an entry point in the group `unspool.claims` under the plugin's own name:

    [project.entry-points."unspool.claims"]
    top_p = "unspool_sample.claims:TopP"

The class needs no base and imports nothing of this kit, so a distribution can bring its claims without depending on it.
Why they stand apart from the plugin: `docs/decisions/claims.md`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from unspool.errors import ConfigError, Problem
from unspool_testing.table import Path, TableModel


@dataclass(frozen=True)
class Row:
    """One place in a text, as a claim sees it.

    Args:
        prompt: token ids.
        tokens: the new token ids so far; the one that is asked for comes next.
        logits: what the plugin is given there, `vocab` numbers, -inf where a token is forbidden.
        logprobs: of each new token, in the distribution that the strategy saw.
        end_ids: token ids that end the text.
        max_new_tokens: the request's limit.
        uniform: purpose -> the row's uniform number in (0, 1), as `step.uniform` gives it.
        model: the target, for claims that look at more than logits.
    """

    prompt: Path
    tokens: Path
    logits: Sequence[float]
    logprobs: Sequence[float]
    end_ids: Sequence[int]
    max_new_tokens: int
    uniform: Callable[[str], float]
    model: TableModel

    @property
    def path(self) -> Path:
        """Give prompt and new tokens."""
        return (*self.prompt, *self.tokens)


class Claims(Protocol):
    """The methods that a class of claims may have.

    All are static, and all are optional; `params` is the plugin's. `texts` and `score` may give None where parameters
    leave it open; `allows` and `finishes` raise `NotImplementedError` there.
    """

    @staticmethod
    def transform(params: Any, row: Row) -> Sequence[float]:
        """Say what `logits_transform` makes of the logits of one row (law `reference`)."""

    @staticmethod
    def distribution(params: Any, row: Row) -> Sequence[float]:
        """Say, of a strategy with one child a row, how likely it chooses each token (law `distribution`).

        It speaks of all noise at once: `row.uniform` is not known.
        """

    @staticmethod
    def texts(params: Any, model: TableModel, request: Any) -> Sequence[tuple[Path, float | None]]:
        """Say, of a strategy, which texts it returns without plugins: pairs of new tokens and score (or None).

        Best first, at most `request.n` of them; none at a dead end. `request` has `prompt_ids`, `limits`, `end_ids` and
        `n`. `model.logits_after(path)` gives the logits `[vocab]` that follow a path, prompt included; that end tokens
        are banned below `limits.min_new_tokens` is for the claim to do (law `reference`).
        """

    @staticmethod
    def score(params: Any, request: Any, tokens: Path, finish_reason: str, logprobs: Sequence[float]) -> float:
        """Say how a strategy scores a text, from its log-probabilities in the pipeline (law `scores_add_up`)."""

    @staticmethod
    def allows(params: Any, request: Any, tokens: Path, ended: bool) -> bool:
        """Say whether a constraint allows a text, as a whole if it `ended`, else as a beginning (law `constraint`).

        An end token, where there is one, is the last of `tokens`.
        """

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Path) -> str | None:
        """Say with which word `stop_check` ends a text after its last token, if it does (law `reference`)."""

    @staticmethod
    def passes(params: Any, request: Any, result: Any) -> int:
        """Count the forward passes that a strategy needs by itself, undisturbed (law `cost`)."""

    @staticmethod
    def rows(params: Any, request: Any, result: Any) -> int:
        """Count the tokens that the model runs for a strategy by itself, without the prompt's (law `cost`)."""

    @staticmethod
    def exhaustive(request: Any, vocab_size: int) -> dict[str, Any]:
        """Give parameters under which a search overlooks nothing (law `ranking`: it equals brute force)."""


METHODS = tuple(name for name in vars(Claims) if not name.startswith("_"))


def claim(claims: type | None, name: str) -> Callable[..., Any] | None:
    """Give one method of a class of claims, or None where it has none.

    Raises:
        ConfigError: the class has a public method that no law knows, or one with other arguments.
    """
    if claims is None:
        return None
    for method in (method for method in vars(claims) if not method.startswith("_")):
        where = f"claims {claims.__qualname__}.{method}"
        if method not in METHODS:
            raise ConfigError([Problem(where, f"no such claim: allowed: {', '.join(METHODS)}")])
        wanted, given = (list(inspect.signature(getattr(of, method)).parameters) for of in (Claims, claims))
        if given != wanted:
            raise ConfigError([Problem(where, f"its arguments are ({', '.join(wanted)}), not ({', '.join(given)})")])
    found: Callable[..., Any] | None = getattr(claims, name, None)
    return found


def floats(row: Tensor) -> list[float]:
    """List the numbers of a row for a claim."""
    values: list[float] = row.double().tolist()
    return values
