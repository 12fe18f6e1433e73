"""How a request begins and how it ends: by itself, by an error, or cancelled. All that it held is free then."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from unspool.errors import ConfigError, DeadEnd, InputError, PluginError, Problem
from unspool.lane import Lane
from unspool.live import Branch, Live, logprob_list
from unspool.pipeline import Pipeline, group_params
from unspool.plugin import Plugin
from unspool.request import Hypothesis, PreparedRequest, Result
from unspool.schedule import Scheduler
from unspool.text import Detokenizer

NOTHING: Mapping[str, Any] = {}


class Lifecycle:
    """Begins and ends requests.

    Args:
        main: the target's lane.
        scheduler: where requests wait and run.
        finished: called with each request that has ended, its result in `live.result`.
        detokenizer: for the texts; None where the model has no tokenizer.
    """

    def __init__(
        self, main: Lane, scheduler: Scheduler, finished: Callable[[Live], None], detokenizer: Detokenizer | None
    ) -> None:
        self._main, self._tree, self._scheduler, self._finished = main, main.tree, scheduler, finished
        self._detokenizer = detokenizer
        self._order = 0
        self._shared: dict[tuple[Any, ...], Any] = {}

    def begin(self, request: PreparedRequest) -> Live:
        """Queue a request.

        Raises:
            AdmissionError: it can never run here.
            PluginError, InputError: one of its plugins does not let it begin.
            ConfigError: a plugin wants a layer that the model has not.
        """
        pipeline = request.pipeline
        if pipeline.sharers:
            request = replace(request, shared={plugin.name: self._shared_by(plugin) for plugin in pipeline.sharers})
        starts, widest = (_ask(pipeline.strategy, asked, request) for asked in ("start", "widest"))
        for asked, answer in (("start", starts), ("widest", widest)):
            if not isinstance(answer, int) or answer < 1:
                raise PluginError(pipeline.strategy.name, asked, f"it must say how many branches, not {answer!r}")
        self._check_layers(pipeline)
        lengths = {lane: len(prompt) for lane, prompt in self._scheduler.prompts(request).items()}
        if refusal := self._scheduler.refuse(request, lengths):
            raise refusal
        states = tuple(_ask(plugin, "initial", request) for plugin in pipeline.stateful)
        live = Live(request, self._order, self._tree.root(request.prompt_ids), max(starts, widest))
        self._tree.states[live.root] = states
        for stream in range(starts):
            self._tree.hold(live.root)
            live.branches.append(Branch(live.root, stream, (0.0,), states=states))
        try:
            for plugin in pipeline.owners:
                live.own[plugin.name] = _ask(plugin, "open", request)
        except (PluginError, InputError) as error:
            self._release(live)
            self._tell_end(live, self._result(live, (), error))
            raise
        self._order += 1
        self._main.cache.want(pipeline.path_hidden)
        self._scheduler.waiting.append(live)
        return live

    def _shared_by(self, plugin: Plugin) -> Any:
        key = plugin.name, type(plugin), json.dumps(group_params(plugin.params), sort_keys=True, default=str)
        if key not in self._shared:
            self._shared[key] = _ask(plugin, "share")
        return self._shared[key]

    def _check_layers(self, pipeline: Pipeline) -> None:
        depth = self._main.cache.runner.layers
        for plugin in pipeline.plugins:
            for layer in (*plugin.hidden, *plugin.path_hidden):
                if not -depth - 1 <= layer <= depth:
                    reason = f"there is no layer {layer}: 0 is the embedding, and the model's last is {depth} (or -1)"
                    raise ConfigError([Problem(plugin.name, reason)])

    def cancel(self, live: Live) -> None:
        """End a request now: its branches become hypotheses as they are, ranked after finished ones."""
        if live.result is not None:
            return
        for branch in live.branches:
            live.hypotheses.append(
                Hypothesis(
                    self._tree.new_tokens(branch.node),
                    "cancelled",
                    branch.score[0] if self._scored(live) else None,
                    logprobs=logprob_list(branch.logprobs) if live.request.logprobs else None,
                    stream=branch.stream,
                )
            )
        self.end(live)

    def end(self, live: Live) -> None:
        """Rank the hypotheses, free everything, and hand the result over."""
        request = live.request
        if not live.hypotheses:
            self.fail(live, DeadEnd(live.dead_path or ()))
            return
        try:
            if request.pipeline.reads_texts:
                live.hypotheses = self._with_texts(request, live.hypotheses)
                ranked = self._ranked(live)
                hypotheses = ranked[: request.n]
                reports = self._reports(live, ranked)
            else:
                hypotheses, reports = self._with_texts(request, self._ranked(live)[: request.n]), {}
        except PluginError as error:
            self.fail(live, error)
            return
        self._close(live, self._result(live, tuple(hypotheses), None, reports))

    def _with_texts(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> list[Hypothesis]:
        if self._detokenizer is None:
            return list(hypotheses)
        text_of = self._detokenizer.text_of
        return [replace(h, text=text_of(request, h.token_ids, h.finish_reason)) for h in hypotheses]

    def _ranked(self, live: Live) -> list[Hypothesis]:
        strategy = live.request.pipeline.strategy
        if live.request.pipeline.independent:
            return sorted(live.hypotheses, key=lambda h: (h.finish_reason == "cancelled", h.stream))
        done = [h for h in live.hypotheses if h.finish_reason != "cancelled"]
        cancelled = [h for h in live.hypotheses if h.finish_reason == "cancelled"]
        ranked = [h for part in (done, cancelled) if part for h in _ask(strategy, "rank", live.request, part)]
        if not all(isinstance(h, Hypothesis) for h in ranked) or not ranked:
            raise PluginError(strategy.name, "rank", "it must return hypotheses, at least one")
        return ranked

    @staticmethod
    def _reports(live: Live, ranked: Sequence[Hypothesis]) -> dict[str, Mapping[str, Any]]:
        reports = {}
        for plugin in live.request.pipeline.reporters:
            report = _ask(plugin, "report", live.request, live.own.get(plugin.name), ranked)
            if not isinstance(report, Mapping):
                raise PluginError(plugin.name, "report", f"it must return a mapping, not {type(report).__name__}")
            try:
                json.dumps(dict(report), allow_nan=False)
            except (TypeError, ValueError) as error:
                raise PluginError(plugin.name, "report", f"JSON cannot carry it: {error}") from error
            if report:
                reports[plugin.name] = report
        return reports

    def fail(self, live: Live, error: Exception) -> None:
        """End a request with an error. Nobody else notices."""
        if live.result is None:
            self._close(live, self._result(live, (), error))

    @staticmethod
    def _result(
        live: Live,
        hypotheses: tuple[Hypothesis, ...],
        error: Exception | None,
        reports: Mapping[str, Mapping[str, Any]] = NOTHING,
    ) -> Result:
        request, stats = live.request, live.stats(hypotheses)
        return Result(
            request.id, request.prompt, request.prompt_ids, hypotheses, stats, error, reports, request.provenance
        )

    def _close(self, live: Live, result: Result) -> None:
        live.result = result
        self._release(live)
        if error := self._tell_end(live, result):
            live.result = self._result(live, (), error)
        self._finished(live)

    @staticmethod
    def _tell_end(live: Live, result: Result) -> PluginError | None:
        """Tell all plugins that opened something. Give the last one's error, if any raised."""
        failed = None
        for plugin in live.request.pipeline.owners:
            if plugin.name in live.own:
                try:
                    _ask(plugin, "close", live.own[plugin.name], result)
                except PluginError as error:
                    failed = error
        return failed

    def _release(self, live: Live) -> None:
        """Free all slots, nodes and states of a request."""
        for node in reversed(live.drafts):
            self._tree.release(node)
        live.drafts.clear()
        for branch in live.branches:
            for node in reversed(list(branch.held.drafts)) if branch.held else ():
                self._tree.release(node)
            self._tree.release(branch.node)
        live.branches.clear()
        self._tree.release(live.root)
        for lane in list(live.tracks):
            lane.leave(live, ())
        for queue in (self._scheduler.running, self._scheduler.waiting):
            if live in queue:
                queue.remove(live)

    @staticmethod
    def _scored(live: Live) -> bool:
        return live.request.pipeline.scores or live.request.logprobs is not None or live.scored


def _ask(plugin: Plugin, method: str, *arguments: Any) -> Any:
    """Call a plugin's method. What goes wrong in it is a `PluginError` that names both; it may refuse an input."""
    try:
        answer = getattr(plugin, method)(*arguments)
        return list(answer) if method == "rank" else answer
    except InputError:
        raise
    except Exception as error:
        raise PluginError(plugin.name, method, f"{type(error).__name__}: {error}") from error
