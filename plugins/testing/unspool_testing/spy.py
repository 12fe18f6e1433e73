"""A spy on real runs: it stands around a hook, and notes what a plugin was shown and what it made of it.

It stands around the hook inside one pipeline, where pluggy keeps it, so the plugin itself, its name, its states and its
place among the others stay what they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unspool.hooks import Growth
from unspool.live import logprob_list
from unspool.pipeline import Pipeline
from unspool.request import PreparedRequest, Result
from unspool.step import Step
from unspool_testing.claims import Row, floats
from unspool_testing.table import Path, TableModel

Around = Callable[[Callable[[], Any], Step, Any], Any]
"""`(call, step, argument)`: what is called in place of a hook; `call()` calls the hook itself."""


def watch(pipeline: Pipeline, hook: str, around: Around, plugin: str | None = None) -> None:
    """Stand around a hook of a pipeline: of one plugin, or of every plugin that implements it."""
    second = "growth" if hook == "stop_check" else "logits"
    for found in getattr(pipeline.hook, hook).get_hookimpls():
        implementation: Any = found
        if plugin in (None, implementation.plugin_name):
            implementation.function = _standing_around(implementation.function, implementation.argnames, second, around)
            implementation.argnames = ("step", second)


def _standing_around(function: Any, names: Sequence[str], second: str, around: Around) -> Callable[..., Any]:
    def stand(step: Step, argument: Any = None, **named: Any) -> Any:
        given = {"step": step, second: named.get(second, argument)}
        return around(lambda: function(**{name: given[name] for name in names}), step, given[second])

    return stand


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Seen:
    """One row that a transform, or `select`, was shown.

    Args:
        request: whose it is.
        tokens: its new tokens.
        stream: keys its noise.
        ahead: it stands on a draft, so it may be that nobody comes here.
        before: the logits that were given, `[vocab]`.
        after: what was made of them (of `select`: the same, unless it wrote to them).
        state: the path state of the plugin, if it has one.
        logprobs: of the new tokens in the pipeline, where the request asks for these; NaN where they are not known.
        uniform: the row's uniform number for a purpose.
    """

    request: PreparedRequest
    tokens: Path
    stream: int
    ahead: bool
    before: Tensor
    after: Tensor
    state: Any
    logprobs: tuple[float, ...]
    uniform: Callable[[str], float]

    def row(self, model: TableModel) -> Row:
        """Show it to a claim."""
        return Row(
            prompt=self.request.prompt_ids,
            tokens=self.tokens,
            logits=floats(self.before),
            logprobs=self.logprobs,
            end_ids=self.request.end_ids,
            max_new_tokens=self.request.limits.max_new_tokens,
            uniform=self.uniform,
            model=model,
        )

    def __str__(self) -> str:
        stream = f", stream {self.stream}" if self.request.n > 1 else ""
        return f"request {self.request.id}, after the new tokens {list(self.tokens)}{stream}"


def transforms_of(pipeline: Pipeline, plugin: str, seen: list[Seen]) -> None:
    """Note all rows that a plugin's `logits_transform` is shown."""
    kept = next((p for p in pipeline.stateful if p.name == plugin), None)

    def around(call: Callable[[], Any], step: Step, logits: Tensor) -> None:
        before = logits.clone()
        states = [None] * len(before) if kept is None else step.states(kept)
        call()
        seen.extend(_rows(step, before, logits.clone(), states))

    watch(pipeline, "logits_transform", around, plugin)


def choices_of(pipeline: Pipeline, seen: list[Seen], growths: list[tuple[Step, Growth]] | None = None) -> None:
    """Note all rows that `select` is shown, and what it answers."""

    def around(call: Callable[[], Any], step: Step, logits: Tensor) -> Any:
        before = logits.clone()
        growth = call()
        seen.extend(_rows(step, before, logits.clone(), [None] * len(before)))
        if growths is not None and isinstance(growth, Growth):
            growths.append((step, growth))
        return growth

    watch(pipeline, "select", around)


def _rows(step: Step, before: Tensor, after: Tensor, states: Sequence[Any]) -> Iterable[Seen]:
    table = step._rows
    ids, lengths = step.paths()
    streams, new = step.stream.tolist(), step.length.tolist()  # asked now: nodes do not outlive the step

    def uniform(row: int) -> Callable[[str], float]:
        return lambda purpose: float(step.uniform(purpose)[row])

    for row, (request, branch) in enumerate(zip(step.request.tolist(), table.branch, strict=True)):
        length = int(lengths[row])
        known = logprob_list(branch.logprobs) if step.requests[request].logprobs == "pipeline" else ()
        yield Seen(
            request=step.requests[request],
            tokens=tuple(ids[row, length - new[row] : length].tolist()),
            stream=streams[row],
            ahead=branch.node != table.node[row],
            before=before[row],
            after=after[row],
            state=states[row],
            logprobs=(*known, *[math.nan] * (new[row] - len(known))),
            uniform=uniform(row),
        )


def reached(seen: Sequence[Seen], results: Sequence[Result]) -> list[Seen]:
    """Leave out rows on drafts that no text went through: they may lie behind an end, where nobody ever asks."""
    through: set[tuple[str, Path]] = set()
    for result in results:
        for hypothesis in result.hypotheses:
            tokens = hypothesis.token_ids
            through.update((result.id, tokens[:length]) for length in range(len(tokens)))
    return [row for row in seen if not row.ahead or (row.request.id, row.tokens) in through]
