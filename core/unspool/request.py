"""Requests and results: what goes in and what comes out, both frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

if TYPE_CHECKING:
    from unspool.pipeline import Pipeline

Message = Mapping[str, Any]
"""One chat message: `role`, `content`, and what the model's template reads besides."""
Prompt = str | Sequence[Message] | Sequence[int]
"""A prompt as text, as chat messages, or as token ids."""
Logprobs = Literal["model", "pipeline"]
"""Which log-probabilities a result carries: of the raw model, or of the transformed distribution."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user asks for. Fields that are None come from the profile, the config, then the model.

    Args:
        prompt: text, messages, or token ids.
        strategy: a name, `{name: params}`, or a short string `name:key=value,...`.
        plugins: a list of the same; a plugin named again overrides its parameters in place.
        replace_plugins: `plugins` stands instead of the config's list, not on top of it.
        profile: a named variation of the config.
        max_new_tokens: most new tokens, the end token included.
        min_new_tokens: end tokens are banned before so many new tokens.
        stop: strings that end the text (left out of it).
        stop_token_ids: token ids that end the text, besides the model's own end ids.
        ignore_eos: do not end at the model's own end ids.
        deadline: seconds from submission after which it finishes as it is.
        seed: of the noise; None: a hash of the run's seed and `id`.
        n: how many hypotheses to return.
        logprobs: return the log-probability of every token: of the `"model"` or of the `"pipeline"`.
        id: names the request in results; None: one is given.
        raw: no chat template for a text prompt.
        chat: extra arguments of the chat template (`tools`, `enable_thinking`, ...).
        continue_final_message: the last message is an assistant turn to be continued.
    """

    prompt: Prompt
    strategy: str | Mapping[str, Any] | None = None
    plugins: Sequence[str | Mapping[str, Any]] | None = None
    replace_plugins: bool = False
    profile: str | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    deadline: float | None = None
    seed: int | None = None
    n: int | None = None
    logprobs: Logprobs | None = None
    id: str | None = None
    raw: bool | None = None
    chat: Mapping[str, Any] | None = None
    continue_final_message: bool = False


@dataclass(frozen=True)
class Limits:
    """Where a request ends, whatever its strategy."""

    max_new_tokens: int
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    deadline: float | None = None
    """Seconds after submission."""


@dataclass(frozen=True, eq=False)
class PreparedRequest:
    """A request with everything resolved: what the loop runs and what plugins see. Read only.

    Args:
        id: its name.
        prompt_ids: token ids of the prompt, at least one.
        pipeline: the plugins that decode it; requests with equal `pipeline.key` share their hook calls.
        parameters: plugin name -> that request's own validated parameters.
        limits: where it ends.
        end_ids: token ids that end a hypothesis with reason `eos`.
        seed: of all its noise, 0 <= seed < 2**63.
        n: hypotheses to return.
        logprobs: which log-probabilities to return.
        prompt: the prompt as text, for the result.
        tokenizer: of transformers; None: prompts are token ids, and there is no text.
        raw: text prompts stand outside the chat template.
        chat: extra arguments of the chat template.
        provenance: effective config and versions, for the result.
        shared: what `Plugin.share` made for all requests of the engine, by plugin name.
    """

    id: str
    prompt_ids: tuple[int, ...]
    pipeline: Pipeline
    parameters: Mapping[str, BaseModel]
    limits: Limits
    end_ids: tuple[int, ...] = ()
    seed: int = 0
    n: int = 1
    logprobs: Logprobs | None = None
    prompt: str = ""
    tokenizer: Any = None
    raw: bool = False
    chat: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Hypothesis:
    """One text that a request may return.

    Args:
        token_ids: new token ids, the end token that was drawn included.
        finish_reason: `eos`, `length`, `stop_string`, `deadline`, `grammar_end`, `cancelled`, or a plugin's own word.
        score: what it is ranked by; None if nothing scores.
        text: the new text, without end token and stop string.
        logprobs: log-probability of each token, when asked for.
        stream: the noise stream that drew it.
    """

    token_ids: tuple[int, ...]
    finish_reason: str
    score: float | None = None
    text: str = ""
    logprobs: tuple[float, ...] | None = None
    stream: int = 0


@dataclass(frozen=True)
class Drafted:
    """What one drafter guessed in a request.

    Args:
        run: drafts that were run, by their depth below the branch: the first number is that of depth 1.
        accepted: those of them that the strategy chose.
    """

    run: tuple[int, ...] = ()
    accepted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Stats:
    """What a request cost.

    Args:
        forward_passes: passes of the target in which it had a token.
        rows: tokens of it that the target ran, the prompt's and recomputed ones included.
        prompt_tokens: length of its prompt.
        cached_tokens: prompt tokens that were served from cache.
        new_tokens: tokens in the returned hypotheses.
        drafted: drafts that were run.
        accepted: drafts that the strategy chose.
        drafters: the same by drafter and depth.
        preemptions: how often it lost its slots and was recomputed.
        queued_s: seconds from submission to its first pass.
        first_token_s: seconds from submission to its first new token.
        total_s: seconds from submission to its end.
    """

    forward_passes: int = 0
    rows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    drafters: Mapping[str, Drafted] = field(default_factory=dict)
    preemptions: int = 0
    queued_s: float = 0.0
    first_token_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True, eq=False)
class Result:
    """What a request came to: hypotheses, best first, or an error.

    `text` and `token_ids` are those of the best hypothesis. `reports` is what plugins have to say about it, by name.
    """

    id: str
    prompt: str
    prompt_token_ids: tuple[int, ...]
    hypotheses: tuple[Hypothesis, ...] = ()
    stats: Stats = Stats()
    error: Exception | None = None
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Give the best hypothesis's text."""
        return self.hypotheses[0].text

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Give the best hypothesis's new token ids."""
        return self.hypotheses[0].token_ids

    @property
    def parsed(self) -> Any:
        """Give the best hypothesis's text as the value that a plugin parsed it to; None where none did, or could."""
        return next((report["parsed"] for report in self.reports.values() if "parsed" in report), None)

    def to_dict(self) -> dict[str, Any]:
        """Give the record that `--json` prints and `unspool run` writes."""
        record: dict[str, Any] = {
            "id": self.id,
            "prompt": self.prompt,
            "prompt_token_ids": list(self.prompt_token_ids),
        }
        if self.error is not None:
            record["error"] = {"type": type(self.error).__name__, "message": str(self.error)}
        else:
            record["hypotheses"] = [_hypothesis_record(h) for h in self.hypotheses]
            if self.reports:
                record["reports"] = {name: dict(report) for name, report in self.reports.items()}
        record["stats"] = dataclasses.asdict(self.stats)
        record["provenance"] = dict(self.provenance)
        return record


def _hypothesis_record(hypothesis: Hypothesis) -> dict[str, Any]:
    record: dict[str, Any] = {
        "text": hypothesis.text,
        "token_ids": list(hypothesis.token_ids),
        "score": hypothesis.score,
        "finish_reason": hypothesis.finish_reason,
    }
    if hypothesis.logprobs is not None:
        record["logprobs"] = list(hypothesis.logprobs)
    return record
