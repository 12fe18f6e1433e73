"""The engine: the loop on a thread of its own, and everything that people call.

In short:

    engine = unspool.Engine.load("smollm2")
    print(engine.generate("What is the capital of France?", strategy="greedy").text)
"""

from __future__ import annotations

import asyncio
import atexit
import dataclasses
import importlib.metadata
import itertools
import json
import os
import queue
import secrets
import threading
import warnings
import weakref
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unspool import noise
from unspool.config import Config, EngineSettings
from unspool.errors import Busy, Closed, ConfigError, ConstraintError, InputError, OutputError, Problem, UnspoolError
from unspool.generation_config import from_generate_kwargs, generation_fields
from unspool.handle import Handle, Piece, Stream, newly_final
from unspool.layers import Layer
from unspool.live import Live
from unspool.loop import Loop
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool.prefixes import PrefixStats
from unspool.prompt import encode_prompt
from unspool.registry import Registry
from unspool.request import Limits, PreparedRequest, Prompt, Request, Result, Stats
from unspool.resolved import Defaults, Resolved, describe, load_defaults, resolve_request
from unspool.runner import ModelRunner
from unspool.scoring import Given, Score
from unspool.text import Detokenizer
from unspool.trace import Recorder
from unspool.worker import Worker
from unspool.wrapped import wrap_criteria, wrap_processor

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from unspool.huggingface.load import LoadedModel

MAX_RUNNING = 256
MAX_WAITING = 1024
POOL_SHARE = 0.5
"""The part of the free memory that the pool of cache slots takes unless told otherwise."""
_REQUEST_FIELDS = frozenset(f.name for f in dataclasses.fields(Request))
_WORKING: weakref.WeakSet[Engine] = weakref.WeakSet()
"""Engines that have a thread that steps."""


@atexit.register
def _close_all() -> None:
    """Stop engines that nobody has closed: a thread that Python ends inside a tensor operation ends the process."""
    for engine in list(_WORKING):
        engine.close()


if hasattr(os, "register_at_fork"):  # the threads are not there in a child
    os.register_at_fork(after_in_child=_WORKING.clear)


class Engine:
    """Decodes requests over one model, with whatever strategies they name, in one continuous batch.

    Safe to call from any thread. Use it as a context manager, or call `close()`.

    Args:
        runner: the model.
        tokenizer: of transformers; None: prompts are token ids, and there is no text.
        config: a config, a path to one, or the defaults that the command line made.
        registry: the plugins that may be named; None: those that are installed.
        generation: fields of the model's own generation config (`eos_token_id`, ...).
        models: loads a companion's model by name.
        worker: the thread that loaded the model, to run it as well.
        settings: fields of `EngineSettings` (`slots`, `token_budget`, ...), over the config's.
    """

    def __init__(
        self,
        runner: ModelRunner,
        tokenizer: Any = None,
        *,
        config: Config | Defaults | str | Path | None = None,
        registry: Registry | None = None,
        generation: Mapping[str, Any] | None = None,
        models: Callable[[str], ModelRunner] | None = None,
        worker: Worker | None = None,
        **settings: Any,
    ) -> None:
        defaults = load_defaults(config, registry or Registry.installed())
        self._defaults = dataclasses.replace(defaults, generation=dict(generation or {}))
        self.settings = _settings(self._defaults.config.engine, settings)
        self.runner, self.tokenizer = runner, tokenizer
        self.detokenizer = Detokenizer(tokenizer)
        slots = self.settings.slots or _slots(runner, self.settings)
        on_cpu = runner.device.type == "cpu"
        self._loop = Loop(
            runner,
            slots,
            token_budget=self.settings.token_budget or (512 if on_cpu else 4096),
            max_running=self.settings.max_running or MAX_RUNNING,
            models=models,
            prefix_cache=self.settings.prefix_cache,
            detokenizer=self.detokenizer if tokenizer is not None else None,
            finished=self._finished,
            progressed=self._progressed,
        )
        self._seed = secrets.randbits(48)
        self._names = itertools.count(1)
        self._max_waiting = self.settings.max_waiting or MAX_WAITING
        self._inbox: deque[Handle] = deque()
        self._to_cancel: deque[Handle] = deque()
        self._handles: dict[Live, Handle] = {}
        self._wake = threading.Condition()
        self._worker, self._working = worker, False
        self._closed = False
        self._waiting = 0
        self._prompt_tokens = self._cached_tokens = 0
        self._given: OrderedDict[tuple[Any, ...], Pipeline] = OrderedDict()
        self._versions = {
            name: importlib.metadata.version(name) for name in ("unspool", "torch", "transformers") if _installed(name)
        }

    @classmethod
    def load(
        cls,
        model: str | None = None,
        *,
        config: Config | Defaults | str | Path | None = None,
        registry: Registry | None = None,
        dtype: str | None = None,
        device: str | None = None,
        quantization: str | Mapping[str, Any] | None = None,
        revision: str | None = None,
        trust_remote_code: bool | None = None,
        compile: str | None = None,  # noqa: A002 -- as the config has it
        **settings: Any,
    ) -> Engine:
        """Load a model and make an engine of it. Arguments override the config's `model` and `engine` sections.

        Args:
            model: a folder, a hub name, a GGUF file, or `smollm2`.
            config: a config, or a path to one; validated before any weight is loaded.
            registry: the plugins that may be named; None: those that are installed.
            dtype: `auto`, `float32`, `bfloat16`, ...
            device: `auto`, `cpu`, `cuda`, `cuda:1`, ...
            quantization: `int8`, or a scheme of bitsandbytes or torchao.
            revision: a branch, tag or commit on the hub.
            trust_remote_code: run model code that comes with the weights.
            compile: `off`, `auto` or `on`: whether machine code made for this model is used, and made.
            settings: fields of `EngineSettings`.

        Raises:
            ConfigError: the config is wrong.
            ModelError: the model cannot be loaded or run this way.
        """
        defaults = load_defaults(config, registry or Registry.installed())
        _settings(defaults.config.engine, settings)
        given = {
            "dtype": dtype,
            "device": device,
            "quantization": quantization,
            "revision": revision,
            "trust_remote_code": trust_remote_code,
            "compile": compile,
        }
        chosen = defaults.config.model.model_dump() | {k: v for k, v in given.items() if v is not None}
        chosen["name"] = model or chosen["name"]
        from unspool.huggingface.load import load  # transformers takes seconds to import

        threads = _settings(defaults.config.engine, settings).threads

        def loading() -> LoadedModel:
            if threads:
                torch.set_num_threads(threads)
            return load(**chosen)

        worker = Worker()
        try:
            loaded = worker.call(loading)
        except BaseException:
            worker.stop()
            raise
        like = {key: chosen[key] for key in ("dtype", "device", "compile")}
        return cls(
            loaded.runner,
            loaded.tokenizer,
            config=defaults,
            generation=generation_fields(loaded.generation_config or {}),
            models=lambda name: load(name, **like).beside(loaded),
            worker=worker,
            **settings,
        )

    @property
    def slots(self) -> int:
        """Count the cache slots of the pool."""
        return self._loop.main.cache.pool.size

    @property
    def prefix_stats(self) -> PrefixStats:
        """Say how far prompts were served from what was kept of others, since the engine was made."""
        kept = self._loop.main.cache.kept
        return PrefixStats(self._prompt_tokens, self._cached_tokens, kept.held, kept.evicted)

    # ---- one request ------------------------------------------------------------------------------------------------

    def generate(
        self, prompt: Prompt, *, generation_config: GenerationConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> Result:
        """Decode one prompt and wait for the result.

        Args:
            prompt: text, chat messages, or token ids.
            generation_config: one of transformers.
            options: fields of `Request`, or keywords of transformers' `generate()`; those that cannot be honoured are
                said in a warning.

        Raises:
            UnspoolError: the request is wrong, or failed.
        """
        handle = self._submit(self._asked(prompt, generation_config, options))
        try:
            return _raised(handle.result())
        finally:  # interrupted while it waited
            handle.cancel()

    def stream(
        self, prompt: Prompt, *, generation_config: GenerationConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> Stream:
        """Decode one prompt and give its tokens as they become final. Arguments as `generate`."""
        handle = self._asked(prompt, generation_config, options)
        stream = handle.stream()
        self._submit(handle)
        return stream

    def submit(self, request: Request) -> Handle:
        """Queue a request.

        Raises:
            InputError, ConfigError: it is wrong.
            Busy: the waiting room is full.
        """
        return self._submit(Handle(self, self._prepared(request)))

    def run(self, requests: Iterable[Request], *, ordered: bool = False) -> Iterator[Result]:
        """Decode many requests, taking them as there is room, and give the results as they end.

        A request that is wrong or fails gives a result with an error; the others go on.

        Args:
            requests: read lazily, as many ahead as the engine runs at once.
            ordered: give the results in the order of the requests.
        """
        ahead = self._loop.scheduler.max_running
        ended: queue.SimpleQueue[Handle | Result] = queue.SimpleQueue()
        pending: OrderedDict[Handle | Result, None] = OrderedDict()
        source, exhausted = iter(requests), False
        try:
            while True:
                while not exhausted and len(pending) < ahead:
                    request = next(source, None)
                    exhausted = request is None
                    if request is not None:
                        pending[self._start(request, ended)] = None
                    if not ended.empty():  # a slow source keeps no result back
                        break
                if not pending:
                    return
                first = ended.get()
                if not ordered:
                    del pending[first]
                    yield _result(first)
                while ordered and pending and _has_ended(first := next(iter(pending))):
                    del pending[first]
                    yield _result(first)
        finally:
            for left in pending:
                if isinstance(left, Handle):
                    left.cancel()

    def _start(self, request: Request, ended: queue.SimpleQueue[Handle | Result]) -> Handle | Result:
        """Submit one of many requests; what is wrong with it becomes its result."""
        try:
            handle = Handle(self, self._prepared(request))
        except UnspoolError as error:
            refused = self._refused(request, error)
            ended.put(refused)
            return refused
        handle.on_end(lambda: ended.put(handle))
        return self._submit(handle, patient=True)

    def score(
        self,
        prompt: Prompt,
        continuation: str | Sequence[int],
        *,
        plugins: Sequence[str | Mapping[str, Any]] | None = None,
        top: int = 0,
        prompt_logprobs: bool = False,
        **options: Any,
    ) -> Score:
        """Give the log-probabilities of a given text after a prompt.

        Args:
            prompt: text, chat messages, or token ids.
            continuation: text or token ids.
            plugins: score under the distribution that these transforms make; None: under the model's own.
            top: how many of the most probable alternatives to give at each place.
            prompt_logprobs: give those of the prompt's tokens as well (the model's own, from the second token on).
            options: `raw`, `chat`, `continue_final_message`.
        """
        request = Request(prompt=prompt, plugins=plugins or [], replace_plugins=True, **options)
        resolved = resolve_request(self._defaults, dataclasses.replace(request, strategy=None))
        text, ids = self._encode(request, resolved)
        wanted = self._continuation(continuation)
        score = self._scored(text, ids, wanted, resolved, top)
        if not prompt_logprobs:
            return score
        bare = dataclasses.replace(request, plugins=[])
        own = self._scored("", ids[:1], ids[1:], resolve_request(self._defaults, bare), 0).logprobs if ids[1:] else ()
        return dataclasses.replace(score, prompt_logprobs=own)

    def _scored(self, text: str, ids: tuple[int, ...], wanted: tuple[int, ...], resolved: Resolved, top: int) -> Score:
        given = Given(Given.Params(token_ids=wanted, top=top))
        given.name = "given"
        pipeline = Pipeline(given, [p for p in resolved.pipeline.plugins if p is not resolved.pipeline.strategy])
        limits = Limits(max_new_tokens=len(wanted))
        request = PreparedRequest(f"score-{next(self._names)}", ids, pipeline, pipeline.parameters, limits, prompt=text)
        with suppress(ConstraintError):  # a constraint forbids the text: what was noted stands
            _raised(self._submit(Handle(self, request)).result())
        return given.score()

    def _continuation(self, continuation: str | Sequence[int]) -> tuple[int, ...]:
        if isinstance(continuation, str):
            if self.tokenizer is None:
                raise InputError("continuation", continuation, "token ids: the model has no tokenizer")
            wanted: list[int] = self.tokenizer.encode(continuation, add_special_tokens=False)
        else:
            wanted = list(continuation)
        if not wanted:
            raise InputError("continuation", continuation, "at least one token")
        _, ids = encode_prompt(None, wanted, vocab_size=self.runner.vocab_size)
        return ids

    # ---- the async twins --------------------------------------------------------------------------------------------

    async def agenerate(
        self, prompt: Prompt, *, generation_config: GenerationConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> Result:
        """Decode one prompt, as `generate`. Cancelling the task cancels the request."""
        handle = self._asked(prompt, generation_config, options)
        self._submit(handle)
        return _raised(await _ended(handle))

    async def astream(
        self, prompt: Prompt, *, generation_config: GenerationConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> AsyncIterator[Piece]:
        """Give the tokens of one prompt as they become final, as `stream`."""
        handle = self._asked(prompt, generation_config, options)
        stream, changed = handle.stream(), asyncio.Event()
        running = asyncio.get_running_loop()
        handle.on_change(lambda: _call_soon(running, changed.set))
        self._submit(handle)
        try:
            done = False
            while not done:
                await changed.wait()
                changed.clear()
                done = handle.done
                for piece in stream.take():
                    yield piece
        finally:
            if not handle.done:
                handle.cancel()
        _raised(handle.result())

    async def arun(
        self, requests: Iterable[Request] | AsyncIterator[Request], *, ordered: bool = False
    ) -> AsyncIterator[Result]:
        """Decode many requests and give the results as they end, as `run`."""
        source = requests if isinstance(requests, AsyncIterator) else _async(requests)
        pending: OrderedDict[asyncio.Future[Any], None] = OrderedDict()
        coming: asyncio.Future[Request | None] | None = None
        exhausted = False
        try:
            while True:
                if coming is None and not exhausted and len(pending) < self._loop.scheduler.max_running:
                    coming = asyncio.ensure_future(_next(source))
                waited: list[asyncio.Future[Any]] = [coming] if coming else []
                waited += list(pending)[: 1 if ordered else None]
                if not waited:
                    return
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if coming and coming.done():
                    request, coming = coming.result(), None
                    exhausted = request is None
                    if request is not None:
                        pending[asyncio.ensure_future(self._one(request))] = None
                for task in [task for task in waited if task in pending and task.done()]:
                    del pending[task]
                    yield task.result()
        finally:
            for task in [*pending, *([coming] if coming else [])]:
                task.cancel()

    async def _one(self, request: Request) -> Result:
        try:
            handle = Handle(self, self._prepared(request))
        except UnspoolError as error:
            return self._refused(request, error)
        while True:
            try:
                self._submit(handle)
                return await _ended(handle)
            except Busy:
                await asyncio.sleep(0.01)

    # ---- tracing and closing ----------------------------------------------------------------------------------------

    @contextmanager
    def trace(self, path: str | Path) -> Iterator[None]:
        """Write what every step does to a JSONL file, for as long as the context lasts.

        Raises:
            OutputError: the file cannot be written.
        """
        try:
            file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - closed below, after the recorder is gone
        except OSError as error:
            raise OutputError(f"cannot write the trace to {path}: {error.strerror}") from error
        failed: list[OSError] = []
        writing = threading.Lock()

        def write(record: dict[str, Any]) -> None:
            try:
                with writing:
                    if not failed and not file.closed:  # the step that runs when the context ends goes on
                        file.write(json.dumps(record) + "\n")
            except OSError as error:
                failed.append(error)

        self._loop.recorder = Recorder(write)
        try:
            yield
        finally:
            self._loop.recorder = None
            try:
                with writing:
                    file.close()
            except OSError as error:
                failed.append(error)
            if failed:
                raise OutputError(f"cannot write the trace to {path}: {failed[0].strerror}") from failed[0]

    def close(self) -> None:
        """Stop the engine. Requests that wait or run end with `Closed`."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
            worker, self._worker = self._worker, None
            _WORKING.discard(self)
        if worker is not None:
            worker.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # ---- preparing a request ----------------------------------------------------------------------------------------

    def _asked(
        self, prompt: Prompt, generation_config: GenerationConfig | Mapping[str, Any] | None, options: dict[str, Any]
    ) -> Handle:
        """Prepare a request from the keywords of `generate`, ours and transformers'."""
        own = {name: value for name, value in options.items() if name in _REQUEST_FIELDS}
        foreign = {name: value for name, value in options.items() if name not in _REQUEST_FIELDS}
        wrapped = [wrap_processor(p) for p in foreign.pop("logits_processor", None) or ()]
        wrapped += [wrap_criteria(c) for c in foreign.pop("stopping_criteria", None) or ()]
        if wrapped:
            own["plugins"] = [*(own.get("plugins") or ()), *wrapped]
        layer = None
        if generation_config is not None or foreign:
            base = resolve_request(self._defaults, Request(prompt="", profile=own.get("profile")))
            keywords = {**generation_fields(generation_config or {}), **foreign}
            layer, missing = from_generate_kwargs(
                keywords, self._defaults.registry, base.merged, self._defaults.generation
            )
            for what in missing:
                warnings.warn(f"not honoured: {what}", stacklevel=3)
        return Handle(self, self._prepared(Request(prompt=prompt, **own), layer))

    def _prepared(self, request: Request, layer: Layer | None = None) -> PreparedRequest:
        instances = [plugin for plugin in request.plugins or () if isinstance(plugin, Plugin)]
        if instances:
            named = [plugin for plugin in request.plugins or () if not isinstance(plugin, Plugin)]
            request = dataclasses.replace(request, plugins=named)
        resolved = resolve_request(self._defaults, request, layer)
        pipeline = self._with_instances(resolved.pipeline, instances) if instances else resolved.pipeline
        text, ids = self._encode(request, resolved)
        limits = resolved.limits(len(ids), self.runner.window)
        id_ = request.id if request.id is not None else str(next(self._names))
        if not isinstance(id_, str):
            raise InputError("id", id_, "text")
        seed = request.seed
        if seed is None:
            seed = noise.derive_seed(resolved.seed if resolved.seed is not None else self._seed, id_)
        elif not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise InputError("seed", seed, "a whole number from 0 to 2**63 - 1")
        parameters = {**pipeline.parameters, **resolved.parameters}
        provenance = {
            "seed": seed,
            "config": {
                **describe(pipeline, parameters),
                "limits": {**dataclasses.asdict(limits), "stop": list(limits.stop)},
                "n": resolved.n,
            },
            "model": self.runner.digest,
            "versions": self._versions,
        }
        return PreparedRequest(
            id=id_,
            prompt_ids=ids,
            pipeline=pipeline,
            parameters=parameters,
            limits=limits,
            end_ids=resolved.end_ids,
            seed=seed,
            n=resolved.n,
            logprobs=resolved.logprobs,
            prompt=text,
            tokenizer=self.tokenizer,
            raw=resolved.raw,
            chat=resolved.chat,
            provenance=provenance,
        )

    def _encode(self, request: Request, resolved: Resolved) -> tuple[str, tuple[int, ...]]:
        return encode_prompt(
            self.tokenizer,
            request.prompt,
            raw=resolved.raw,
            chat=resolved.chat,
            continue_final_message=request.continue_final_message,
            vocab_size=self.runner.vocab_size,
        )

    def _with_instances(self, pipeline: Pipeline, instances: Sequence[Plugin]) -> Pipeline:
        """Add plugin objects that a caller gave to a pipeline."""
        key = (pipeline, *map(id, instances))
        if key not in self._given:
            self._given[key] = Pipeline(pipeline.strategy, [*pipeline.plugins[:-1], *instances])
            if len(self._given) > 256:
                self._given.popitem(last=False)
        return self._given[key]

    def _refused(self, request: Request, error: UnspoolError) -> Result:
        """Give the result of a request that was wrong from the start."""
        id_ = request.id if isinstance(request.id, str) else str(next(self._names))
        return Result(id_, request.prompt if isinstance(request.prompt, str) else "", (), error=error)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _submit(self, handle: Handle, *, patient: bool = False) -> Handle:
        with self._wake:
            if patient:
                self._wake.wait_for(lambda: self._waiting < self._max_waiting or self._closed)
            if self._closed:
                raise Closed("the engine is closed")
            if self._waiting >= self._max_waiting:
                raise Busy(f"{self._waiting} requests wait, and max_waiting is {self._max_waiting}: try again later")
            self._waiting += 1
            self._inbox.append(handle)
            if not self._working:
                self._worker = self._worker or Worker()
                self._worker.start(self._work)
                self._working = True
                _WORKING.add(self)
            self._wake.notify_all()
        return handle

    def _cancel(self, handle: Handle) -> None:
        with self._wake:
            self._to_cancel.append(handle)
            self._wake.notify_all()

    def _work(self) -> None:
        """Step for as long as there is something to do."""
        loop = self._loop
        if self.settings.threads:
            torch.set_num_threads(self.settings.threads)
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._inbox or self._to_cancel or self._closed or loop.busy)
                    if self._closed:
                        break
                    arrived, self._inbox = self._inbox, deque()
                    cancelled, self._to_cancel = self._to_cancel, deque()
                for handle in arrived:
                    self._enter(handle)
                for handle in cancelled:
                    if handle.live is not None and not handle.done:
                        loop.cancel(handle.live)
                with torch.inference_mode():
                    if loop.busy:
                        loop.step()
                with self._wake:
                    self._waiting = len(self._inbox) + len(loop.scheduler.waiting)
                    self._wake.notify_all()
            self._abandon(Closed("the engine was closed"))
        except BaseException as error:
            self._abandon(error if isinstance(error, Exception) else Closed(repr(error)))
            raise

    def _enter(self, handle: Handle) -> None:
        try:
            handle.live = self._loop.submit(handle.request)
        except Exception as error:
            request = handle.request
            stats = Stats(prompt_tokens=len(request.prompt_ids))
            handle.finish(
                Result(request.id, request.prompt, request.prompt_ids, (), stats, error, {}, request.provenance)
            )
            return
        self._handles[handle.live] = handle

    def _abandon(self, error: Exception) -> None:
        with self._wake:
            self._closed = True
            left = [*self._inbox]
            self._inbox.clear()
            self._wake.notify_all()
        try:
            self._loop.abandon(error)
        except Exception:
            left += self._handles.values()  # whatever state the loop is in, nobody waits for ever
        for handle in left:
            if not handle.done:
                request = handle.request
                handle.finish(Result(request.id, request.prompt, request.prompt_ids, error=error))
        self._handles.clear()

    def _progressed(self, lives: Sequence[Live]) -> None:
        for live in lives:
            handle = self._handles.get(live)
            if handle is not None and handle.watched:
                handle.advance(newly_final(self._loop.tree, live, handle.final))

    def _finished(self, live: Live) -> None:
        handle = self._handles.pop(live, None)
        assert live.result is not None
        self._prompt_tokens += live.result.stats.prompt_tokens
        self._cached_tokens += live.result.stats.cached_tokens
        if handle is not None:
            handle.finish(live.result)


def _settings(base: EngineSettings, given: Mapping[str, Any]) -> EngineSettings:
    from pydantic import ValidationError

    unknown = given.keys() - EngineSettings.model_fields.keys()
    if unknown:
        known = ", ".join(EngineSettings.model_fields)
        raise ConfigError([Problem(f"engine.{name}", f"no such setting: {known}") for name in sorted(unknown)])
    chosen = {name: value for name, value in given.items() if value is not None}
    below = base.model_dump()
    if chosen.keys() & {"slots", "memory"}:
        below |= {"slots": None, "memory": None}
    try:
        return EngineSettings.model_validate(below | chosen)
    except ValidationError as error:
        problems = [Problem(f"engine.{'.'.join(map(str, e['loc']))}", e["msg"]) for e in error.errors()]
        raise ConfigError(problems) from error


def _slots(runner: ModelRunner, settings: EngineSettings) -> int:
    """Choose the size of the pool: what was asked for in bytes, else half of what is free, no more than is of use."""
    size = max(1, runner.slot_bytes())
    if settings.memory_bytes is not None:
        return max(1, settings.memory_bytes // size)
    useful = (settings.max_running or MAX_RUNNING) * (runner.window or 4096)
    return max(1, min(int(runner.free_bytes() * POOL_SHARE) // size, useful))


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _has_ended(pending: Handle | Result) -> bool:
    return isinstance(pending, Result) or pending.done


def _result(ended: Handle | Result) -> Result:
    return ended if isinstance(ended, Result) else ended.result()


def _raised(result: Result) -> Result:
    """Raise the error of a request that failed."""
    if result.error is not None:
        raise result.error
    return result


async def _ended(handle: Handle) -> Result:
    running = asyncio.get_running_loop()
    ended = asyncio.Event()
    handle.on_end(lambda: _call_soon(running, ended.set))
    try:
        await ended.wait()
    except asyncio.CancelledError:
        handle.cancel()
        raise
    return handle.result()


def _call_soon(running: asyncio.AbstractEventLoop, call: Callable[[], Any]) -> None:
    with suppress(RuntimeError):  # that event loop is closed: nobody listens any more
        running.call_soon_threadsafe(call)


async def _next(source: AsyncIterator[Request]) -> Request | None:
    return await anext(source, None)


async def _async(requests: Iterable[Request]) -> AsyncIterator[Request]:
    for request in requests:
        yield request
