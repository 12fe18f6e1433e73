"""The engine: from many threads and event loops at once, with a full waiting room, with what goes wrong, and closed."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import pytest
import torch
import transformers
from pydantic import Field
from torch import Tensor

from unspool.config import Config
from unspool.engine import Engine
from unspool.errors import Busy, Closed, ConfigError, DeadEnd, InputError, ModelError, PluginError
from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool.registry import Registry
from unspool.request import Hypothesis, PreparedRequest, Request, Result
from unspool.runner import Batch, Output
from unspool.step import Step
from unspool_testing.driver import check_conservation
from unspool_testing.runners import CountingRunner, MisbehavingRunner
from unspool_testing.table import TableModel

VOCAB = 6
FOREVER = 3000
"""More tokens than any test waits for."""

# ---- what the tests need ---------------------------------------------------------------------------------------------


class Paced(CountingRunner):
    """Waits in each pass until it may go on, and then a moment."""

    def __init__(self, pause: float = 0.001) -> None:
        super().__init__(TableModel(VOCAB, memory=2))
        self.gate = threading.Event()
        self.gate.set()
        self.waits = False
        self._pause = pause

    def forward(self, batch: Batch) -> Output:
        self.waits = not self.gate.is_set()
        assert self.gate.wait(30)
        time.sleep(self._pause)
        return super().forward(batch)


class Ban(Plugin):
    """Forbid a token."""

    row_local = True

    class Params(Parameters):
        token: int = 1

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits[:, self.params.token] = -torch.inf


class Spoil(Plugin):
    """Make every row NaN, or forbid everything."""

    row_local = True

    class Params(Parameters):
        value: Literal["nan", "-inf"] = "nan"

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits.fill_(float(self.params.value))


class Books(Plugin):
    """Keep count of what is opened and closed."""

    row_local = True
    open_now = 0

    def open(self, request: PreparedRequest) -> object:
        Books.open_now += 1
        return object()

    def close(self, own: object, result: Result) -> None:
        Books.open_now -= 1


class Troubled(Plugin):
    """A greedy strategy that fails outside its hooks."""

    row_local = True

    class Params(Parameters):
        where: Literal["initial", "open", "start", "close", "rank", "start 0", "rank none"] = "open"

    def _fail_in(self, where: str) -> None:
        if self.params.where == where:
            raise ZeroDivisionError("as it was asked to")

    def initial(self, request: PreparedRequest) -> int:
        self._fail_in("initial")
        return 0

    def open(self, request: PreparedRequest) -> int:
        self._fail_in("open")
        return 0

    def close(self, own: int, result: Result) -> None:
        self._fail_in("close")

    def start(self, request: PreparedRequest) -> int:
        self._fail_in("start")
        return 0 if self.params.where == "start 0" else 1

    def rank(self, request: PreparedRequest, hypotheses: Any) -> list[Hypothesis]:
        self._fail_in("rank")
        return [] if self.params.where == "rank none" else list(hypotheses)

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        return Growth(row=torch.arange(len(logits)), token=logits.argmax(-1))


class TwoSearch(Plugin):
    """Keep the two best of all continuations: not row-local, so branches are ranked together."""

    class Params(Parameters):
        width: int = Field(2, ge=1)

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        logprobs = logits.log_softmax(-1)
        total = step.score[:, :1] + logprobs
        rows, tokens, scores = [], [], []
        for grid in step.grid:
            mine = grid[grid >= 0]
            best, index = total[mine].flatten().topk(self.params.width)
            rows.append(mine[index // logits.shape[1]])
            tokens.append(index % logits.shape[1])
            scores.append(best)
        return Growth(row=torch.cat(rows), token=torch.cat(tokens), score=torch.cat(scores))


REGISTRY = Registry.installed().with_plugins(
    {"ban": Ban, "spoil": Spoil, "books": Books, "troubled": Troubled, "two_search": TwoSearch}
)


def make(runner: Any = None, **settings: Any) -> Engine:
    settings = {"slots": 8192, **settings}
    return Engine(runner or TableModel(VOCAB), registry=REGISTRY, generation={"eos_token_id": 0}, **settings)


@pytest.fixture
def engine() -> Iterator[Engine]:
    with make() as engine:
        yield engine
        settle(engine)


@pytest.fixture
def paced() -> Iterator[tuple[Engine, Paced]]:
    runner = Paced()
    with make(runner) as engine:
        yield engine, runner
        runner.gate.set()


def settle(engine: Engine) -> None:
    """Wait until nothing is under way, and check that nothing is left."""
    until = time.monotonic() + 10
    while (engine._loop.busy or engine._inbox or engine._to_cancel or engine._handles) and time.monotonic() < until:
        time.sleep(0.002)
    check_conservation(engine._loop)


def long(**fields: Any) -> Request:
    return Request(**{"prompt": [1, 2], "strategy": "greedy", "max_new_tokens": FOREVER, "ignore_eos": True, **fields})


def short(number: int, **fields: Any) -> Request:
    options = {"strategy": "sample", "seed": number, "max_new_tokens": 8}
    return Request(**{"prompt": [1 + number % 5, 2], **options, **fields})


def after_some_tokens(runner: CountingRunner) -> None:
    """Wait until there were some passes more."""
    enough, until = len(runner.batches) + 5, time.monotonic() + 10
    while len(runner.batches) < enough and time.monotonic() < until:
        time.sleep(0.001)


# ---- handles ---------------------------------------------------------------------------------------------------------


def test_a_result_that_takes_too_long_is_a_timeout_and_the_request_goes_on(paced: tuple[Engine, Paced]) -> None:
    engine, runner = paced
    runner.gate.clear()
    handle = engine.submit(long(max_new_tokens=5, id="slow"))
    with pytest.raises(TimeoutError, match=r"'slow' has not ended within 0.01 s"):
        handle.result(0.01)
    assert not handle.done
    runner.gate.set()
    assert len(handle.result(10).token_ids) == 5
    settle(engine)


def test_a_request_cancelled_before_it_starts_has_no_tokens_and_says_so(paced: tuple[Engine, Paced]) -> None:
    engine, runner = paced
    runner.gate.clear()
    first = engine.submit(long(max_new_tokens=3))
    while not engine._loop.scheduler.running:
        time.sleep(0.001)
    waiting = engine.submit(long())
    waiting.cancel()
    runner.gate.set()
    result = waiting.result(10)
    assert (result.token_ids, result.hypotheses[0].finish_reason, result.error) == ((), "cancelled", None)
    assert len(first.result(10).token_ids) == 3
    settle(engine)


def test_a_request_cancelled_midway_keeps_its_tokens(paced: tuple[Engine, Paced]) -> None:
    engine, runner = paced
    handle = engine.submit(long())
    after_some_tokens(runner)
    handle.cancel()
    result = handle.result(10)
    assert result.hypotheses[0].finish_reason == "cancelled"
    whole = engine.generate([1, 2], strategy="greedy", max_new_tokens=len(result.token_ids), ignore_eos=True)
    assert result.token_ids == whole.token_ids and 0 < len(result.token_ids) < FOREVER
    settle(engine)


def test_cancelling_what_has_ended_changes_nothing(engine: Engine) -> None:
    handle = engine.submit(short(1))
    result = handle.result()
    handle.cancel()
    handle.cancel()
    assert handle.result() is result
    assert engine.generate([1], strategy="greedy", max_new_tokens=2).error is None


def test_cancelled_samples_rank_after_finished_ones() -> None:
    """Stream 0 never ends, some later stream does: it comes first."""
    mixed = 0
    runner = Paced()
    with make(runner) as engine:
        for seed in range(12):
            handle = engine.submit(short(seed, n=4, max_new_tokens=FOREVER // 4))
            after_some_tokens(runner)
            handle.cancel()
            result = handle.result(10)
            order = [(h.finish_reason == "cancelled", h.stream) for h in result.hypotheses]
            assert order == sorted(order) and len(order) == 4
            mixed += order != sorted(order, key=lambda pair: pair[1])
        settle(engine)
    assert mixed, "no case put a finished stream before a cancelled one"


def test_a_cancelled_search_ranks_its_branches_after_what_it_finished(paced: tuple[Engine, Paced]) -> None:
    engine, runner = paced
    handle = engine.submit(long(strategy="two_search", n=2))
    after_some_tokens(runner)
    handle.cancel()
    result = handle.result(10)
    assert [h.finish_reason for h in result.hypotheses] == ["cancelled"] * 2
    assert result.hypotheses[0].score >= result.hypotheses[1].score  # type: ignore[operator]
    settle(engine)


def test_a_listener_for_the_end_is_called_once_even_if_it_comes_late(engine: Engine) -> None:
    heard: list[str] = []
    handle = engine.submit(short(1))
    handle.result()
    handle.on_end(lambda: heard.append("late"))
    assert heard == ["late"]


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_eight_threads_get_what_one_gets(engine: Engine) -> None:
    strategies = ["greedy", "sample", "two_search"]
    asked = [short(i, strategy=strategies[i % 3], n=1 + i % 2, logprobs="model") for i in range(48)]
    serial = [engine.submit(request).result() for request in asked]
    with ThreadPoolExecutor(8) as pool:
        parallel = list(pool.map(lambda request: engine.submit(request).result(30), asked))
    for one, other in zip(serial, parallel, strict=True):
        assert [(h.token_ids, h.finish_reason, h.logprobs) for h in one.hypotheses] == [
            (h.token_ids, h.finish_reason, h.logprobs) for h in other.hypotheses
        ]


def test_a_full_waiting_room_is_busy_and_says_the_numbers() -> None:
    runner = Paced()
    with make(runner, max_waiting=2, max_running=1) as engine:
        runner.gate.clear()
        first = engine.submit(long(max_new_tokens=2))
        while not engine._loop.scheduler.running:
            time.sleep(0.001)
        handles = [first]

        def crowd() -> None:
            for _ in range(4):
                handles.append(engine.submit(long(max_new_tokens=2)))  # noqa: PERF401 - those before the refusal count

        try:
            with pytest.raises(Busy, match=r"2 requests wait, and max_waiting is 2: try again later"):
                crowd()
        finally:
            runner.gate.set()
        assert all(len(handle.result(10).token_ids) == 2 for handle in handles)
        assert engine.submit(long(max_new_tokens=2)).result(10).error is None, "later there is room"
        settle(engine)


def test_run_reads_only_as_far_ahead_as_requests_run_at_once() -> None:
    read = 0

    def requests() -> Iterator[Request]:
        nonlocal read
        for i in range(60):
            read += 1
            yield short(i, id=str(i))

    with make(max_running=4) as engine:
        for got, result in enumerate(engine.run(requests()), 1):
            assert result.error is None
            assert read <= got + 4
        assert got == read == 60
        settle(engine)


def test_run_with_a_small_waiting_room_waits_and_is_never_busy() -> None:
    with make(max_running=8, max_waiting=1) as engine:
        results = list(engine.run([short(i) for i in range(40)]))
        assert len(results) == 40 and all(result.error is None for result in results)
        settle(engine)


def test_run_gives_results_as_they_end_or_in_order(engine: Engine) -> None:
    lengths = [400, 1, 1, 1]
    asked = [long(max_new_tokens=length, id=str(i)) for i, length in enumerate(lengths)]
    assert [result.id for result in engine.run(asked)][-1] == "0"
    assert [result.id for result in engine.run(asked, ordered=True)] == ["0", "1", "2", "3"]


def test_run_keeps_no_result_back_while_its_source_waits(engine: Engine) -> None:
    """The source gives the second request only once the first result is there."""
    seen: list[str] = []

    def requests() -> Iterator[Request]:
        yield short(1, id="a")
        yield short(2, id="b")
        until = time.monotonic() + 5
        while not engine_has_ended() and time.monotonic() < until:
            time.sleep(0.005)
        yield short(3, id="c")
        assert seen, "a result was ready while the source was read"
        yield short(4, id="d")

    def engine_has_ended() -> bool:
        return not engine._loop.busy and not engine._inbox and not engine._handles

    for result in engine.run(requests()):
        seen.append(result.id)  # noqa: PERF401 - the source looks at it meanwhile
    assert sorted(seen) == ["a", "b", "c", "d"]


def test_run_says_what_is_wrong_with_one_request_and_goes_on(engine: Engine) -> None:
    asked = [
        short(1, id="a"),
        short(2, id="bad", strategy="no_such"),
        Request(prompt=[99], id="range"),
        short(3, id="b"),
    ]
    results = {result.id: result for result in engine.run(asked, ordered=True)}
    assert list(results) == ["a", "bad", "range", "b"]
    assert isinstance(results["bad"].error, ConfigError) and isinstance(results["range"].error, InputError)
    assert results["a"].error is None and results["b"].error is None


def test_an_exception_of_the_callers_iterable_goes_through_and_frees_everything(paced: tuple[Engine, Paced]) -> None:
    engine, _ = paced

    def requests() -> Iterator[Request]:
        yield long()
        yield long()
        raise KeyError("the caller's own")

    with pytest.raises(KeyError, match="the caller's own"):
        list(engine.run(requests()))
    settle(engine)


def test_run_left_midway_cancels_the_rest(paced: tuple[Engine, Paced]) -> None:
    engine, _ = paced
    results = engine.run(itertools.chain([long(max_new_tokens=1)], (long() for _ in range(20))))
    assert len(next(results).token_ids) == 1
    results.close()  # type: ignore[attr-defined]
    settle(engine)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["initial", "open", "start", "close", "rank", "start 0", "rank none"])
def test_a_plugin_that_fails_outside_its_hooks_is_named_and_others_go_on(engine: Engine, where: str) -> None:
    beside = engine.submit(long(max_new_tokens=50))
    strategy = {"troubled": {"where": where}}
    asked = Request(prompt=[1, 2], strategy=strategy, plugins=["books"], max_new_tokens=3)
    error = engine.submit(asked).result(10).error
    assert isinstance(error, PluginError)
    assert (error.plugin, error.hook) == ("troubled", where.split(maxsplit=1)[0])
    assert "as it was asked to" in str(error) or " " in where
    assert len(beside.result(10).token_ids) == 50
    assert Books.open_now == 0, "what another plugin had opened is closed"


def test_a_forward_that_raises_fails_those_in_the_pass_and_the_engine_lives_on() -> None:
    runner = MisbehavingRunner(TableModel(VOCAB), raises=lambda number: number == 2)
    with make(runner) as engine:
        failed = engine.submit(long(max_new_tokens=9)).result(10)
        assert isinstance(failed.error, ModelError)
        with pytest.raises(IndexError):
            _ = failed.text
        assert len(engine.generate([1, 2], strategy="greedy", max_new_tokens=9, ignore_eos=True).token_ids) == 9
        settle(engine)


def test_generate_raises_the_error_of_a_request_that_failed(engine: Engine) -> None:
    with pytest.raises(PluginError, match="'spoil' failed in logits_transform"):
        engine.generate([1], strategy="greedy", plugins=["spoil"])
    with pytest.raises(DeadEnd):
        engine.generate([1], strategy="greedy", plugins=[{"spoil": {"value": "-inf"}}])


def test_closing_ends_what_waits_and_runs_with_closed_and_plugins_hear_of_it() -> None:
    runner = Paced()
    engine = make(runner, max_running=2)
    handles = [engine.submit(long(plugins=["books"], id=str(i))) for i in range(6)]
    after_some_tokens(runner)
    waited: list[Result] = []
    waiter = threading.Thread(target=lambda: waited.append(handles[5].result(10)))
    waiter.start()
    engine.close()
    waiter.join(10)
    for handle in handles:
        result = handle.result(1)
        assert isinstance(result.error, Closed) and result.id == handle.id
    assert isinstance(waited[0].error, Closed)
    assert Books.open_now == 0
    check_conservation(engine._loop)
    engine.close()


def test_a_program_that_leaves_an_engine_at_work_ends_well() -> None:
    code = (
        "import time\n"
        "from unspool import Engine, Request\n"
        "from unspool_testing.table import TableModel\n"
        "engine = Engine(TableModel(64), slots=9000)\n"
        "handle = engine.submit(Request(prompt=[1], strategy='sample', max_new_tokens=8000, ignore_eos=True))\n"
        "time.sleep(0.2)\n"
        "assert not handle.done\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_closing_ends_a_run_that_waits_for_room() -> None:
    runner = Paced()
    engine = make(runner, max_waiting=1, max_running=8)
    runner.gate.clear()
    errors: list[Exception] = []

    def run() -> None:
        try:
            list(engine.run(long() for _ in range(8)))
        except Closed as error:
            errors.append(error)

    runs = threading.Thread(target=run, daemon=True)
    runs.start()
    while not runner.waits:
        time.sleep(0.001)
    threading.Timer(0.05, runner.gate.set).start()
    engine.close()
    runs.join(10)
    assert not runs.is_alive() and len(errors) == 1


def test_a_closed_engine_refuses(engine: Engine) -> None:
    engine.close()
    for call in (
        lambda: engine.generate([1]),
        lambda: engine.submit(short(1)),
        lambda: engine.stream([1]),
        lambda: list(engine.run([short(1)])),
        lambda: engine.score([1], [2]),
        lambda: asyncio.run(engine.agenerate([1])),
    ):
        with pytest.raises(Closed, match="closed"):
            call()


def test_a_deadline_ends_a_long_request(paced: tuple[Engine, Paced]) -> None:
    engine, _ = paced
    begin = time.monotonic()
    result = engine.generate([1, 2], strategy="two_search", max_new_tokens=FOREVER, ignore_eos=True, deadline=0.15)
    assert 0.15 <= time.monotonic() - begin < 5
    assert result.hypotheses[0].finish_reason == "deadline"
    assert 0 < len(result.token_ids) < FOREVER
    settle(engine)


def test_no_text_goes_beyond_its_limits_or_ends_too_early(engine: Engine) -> None:
    for seed in range(40):
        least, most = seed % 5, 5 + seed % 4
        result = engine.submit(short(seed, min_new_tokens=least, max_new_tokens=most, n=2)).result()
        for hypothesis in result.hypotheses:
            tokens = hypothesis.token_ids
            assert least <= len(tokens) - (hypothesis.finish_reason == "eos") and len(tokens) <= most
            assert (hypothesis.finish_reason == "eos") == (tokens[-1] == 0)
            assert 0 not in tokens[:-1]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"slots": 0}, "engine.slots"),
        ({"slots": -5}, "engine.slots"),
        ({"slots": "many"}, "engine.slots"),
        ({"slots": 8, "memory": "1MiB"}, "engine"),
        ({"slots": None, "memory": "a lot"}, "engine.memory"),
        ({"slots": None, "memory": "0"}, "engine.memory"),
        ({"token_budget": 0}, "engine.token_budget"),
        ({"token_budget": True}, "engine.token_budget"),
        ({"threads": 0}, "engine.threads"),
        ({"max_waiting": 0}, "engine.max_waiting"),
        ({"max_running": 1.5}, "engine.max_running"),
        ({"batch_size": 8}, "engine.batch_size"),
    ],
)
def test_a_wrong_setting_is_a_config_error_that_names_it(settings: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**settings)
    assert any(problem.field.startswith(field) for problem in caught.value.problems)


def test_the_size_of_the_pool_is_what_was_asked_for_in_slots_or_in_bytes() -> None:
    with make(slots=100) as engine:
        assert engine.slots == 100
    with make(slots=None, memory="3200") as engine:
        assert engine.slots == 100  # a table's slot takes 32 bytes
    with make(slots=None, max_running=2) as engine:
        assert engine.slots == 2 * 4096


# ---- seeds and log-probabilities -------------------------------------------------------------------------------------


def test_the_effective_seed_replays_a_request(engine: Engine) -> None:
    options: dict[str, Any] = {"strategy": "sample", "max_new_tokens": 12, "ignore_eos": True, "n": 2}
    first = engine.generate([1, 2], **options)
    again = engine.generate([1, 2], seed=first.provenance["seed"], **options)
    other = engine.generate([1, 2], **options)
    assert [h.token_ids for h in first.hypotheses] == [h.token_ids for h in again.hypotheses]
    assert first.token_ids != other.token_ids
    assert first.provenance["config"]["strategy"] and first.provenance["versions"]["unspool"]


def test_the_seed_of_the_run_and_the_id_make_the_seed() -> None:
    def seeds(run_seed: int, ids: list[str]) -> list[int]:
        config = Config(seed=run_seed)
        with Engine(TableModel(VOCAB), registry=REGISTRY, config=config, slots=512) as engine:
            return [r.provenance["seed"] for r in engine.run([short(1, seed=None, id=i) for i in ids], ordered=True)]

    assert seeds(7, ["a", "b"]) == list(reversed(seeds(7, ["b", "a"])))
    assert len({*seeds(7, ["a", "b"]), *seeds(8, ["a", "b"])}) == 4


@pytest.mark.parametrize("strategy", ["greedy", "sample", "two_search"])
@pytest.mark.parametrize("plugins", [[], [{"temperature": {"temperature": 0.6}}, "ban"]])
def test_what_generate_says_of_its_tokens_is_what_score_says(engine: Engine, strategy: str, plugins: list[Any]) -> None:
    for which in ("model", "pipeline"):
        result = engine.generate([3, 1], strategy=strategy, plugins=plugins, logprobs=which, seed=5, max_new_tokens=7)
        score = engine.score([3, 1], result.token_ids, plugins=plugins if which == "pipeline" else None)
        assert score.token_ids == result.token_ids
        assert result.hypotheses[0].logprobs == pytest.approx(score.logprobs, abs=1e-12)
        if strategy == "two_search" and which == "pipeline":
            assert result.hypotheses[0].score == pytest.approx(score.total, abs=1e-12)


def test_score_is_the_tables_own(engine: Engine) -> None:
    model, text = TableModel(VOCAB), [2, 0, 4, 1, 1]
    score = engine.score([3, 1], text, top=3, prompt_logprobs=True)
    for place, token in enumerate(text):
        logprobs = model.logits_after([3, 1, *text[:place]]).log_softmax(-1)
        assert score.logprobs[place] == pytest.approx(float(logprobs[token]), abs=1e-12)
        best, ids = logprobs.topk(3)
        assert [token for token, _ in score.top[place]] == ids.tolist()
        assert [value for _, value in score.top[place]] == pytest.approx(best.tolist())
    assert score.prompt_logprobs == pytest.approx([float(model.logits_after([3]).log_softmax(-1)[1])])
    assert engine.score([3], [2]).prompt_logprobs is None
    assert engine.score([3], [2], prompt_logprobs=True).prompt_logprobs == ()


def test_a_forbidden_token_scores_minus_infinity_and_a_spoilt_row_is_named(engine: Engine) -> None:
    assert engine.score([3], [2, 1, 2], plugins=["ban"]).logprobs[1] == -torch.inf
    dead = engine.score([3], [2, 1], plugins=[{"spoil": {"value": "-inf"}}])
    assert dead.logprobs == (-torch.inf, -torch.inf)
    with pytest.raises(PluginError, match="'spoil'"):
        engine.score([3], [2, 1], plugins=["spoil"])


def test_texts_of_any_length_are_scored_together_with_others(engine: Engine) -> None:
    texts = [[1 + (i * j) % 5 for j in range(1, 2 + 30 * i)] for i in range(6)]
    alone = [engine.score([2], text) for text in texts]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda text: engine.score([2], text), texts)) == alone


@pytest.mark.parametrize("continuation", [[], [VOCAB], [-1], "text"])
def test_a_continuation_that_cannot_be_scored_is_an_input_error(engine: Engine, continuation: Any) -> None:
    with pytest.raises(InputError):
        engine.score([1], continuation)


# ---- the words of transformers ---------------------------------------------------------------------------------------


def test_a_generation_config_and_keywords_of_transformers_are_honoured(engine: Engine) -> None:
    make_config: Any = transformers.GenerationConfig  # it has no types
    config = make_config(do_sample=True, top_k=3, temperature=0.7, max_new_tokens=9)
    ours = engine.generate(
        [1, 2],
        strategy="sample",
        plugins=[{"temperature": {"temperature": 0.7}}, {"top_k": {"k": 3}}],
        max_new_tokens=9,
        seed=3,
    )
    assert engine.generate([1, 2], generation_config=config, seed=3).token_ids == ours.token_ids
    keywords: dict[str, Any] = {"do_sample": True, "top_k": 3, "temperature": 0.7, "max_new_tokens": 9}
    assert engine.generate([1, 2], seed=3, **keywords).token_ids == ours.token_ids
    greedy = engine.generate([1, 2], do_sample=False, repetition_penalty=1.5, max_new_tokens=9)
    plain = engine.generate(
        [1, 2], strategy="greedy", plugins=[{"repetition_penalty": {"penalty": 1.5}}], max_new_tokens=9
    )
    assert greedy.token_ids == plain.token_ids


def test_processors_and_criteria_of_transformers_are_wrapped(engine: Engine) -> None:
    suppress: Any = transformers.SuppressTokensLogitsProcessor([0, 1, 2])
    processors: Any = transformers.LogitsProcessorList([suppress])
    criteria: Any = transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(6)])
    result = engine.generate([1, 2], max_new_tokens=20, logits_processor=processors, stopping_criteria=criteria)
    assert len(result.token_ids) == 4 and not {0, 1, 2} & set(result.token_ids)
    assert result.hypotheses[0].finish_reason == "stopping_criteria"
    with pytest.raises(InputError, match="pure=True"):
        engine.generate([1], logits_processor=[lambda ids, scores: scores])


def test_keywords_that_cannot_be_honoured_are_said_in_a_warning_and_unknown_ones_refused(engine: Engine) -> None:
    with pytest.warns(UserWarning, match="not honoured: .*output_attentions"):
        engine.generate([1], max_new_tokens=2, output_attentions=True)
    with pytest.raises((ConfigError, InputError), match="max_new_token"):
        engine.generate([1], max_new_token=2)


# ---- the async twins -------------------------------------------------------------------------------------------------


def test_agenerate_and_astream_give_what_their_twins_give(engine: Engine) -> None:
    options: dict[str, Any] = {"strategy": "sample", "seed": 4, "max_new_tokens": 10}
    expected = engine.generate([1, 2], **options)

    async def both() -> tuple[Result, list[int]]:
        tokens = [t async for piece in engine.astream([1, 2], **options) for t in piece.token_ids]
        return await engine.agenerate([1, 2], **options), tokens

    result, tokens = asyncio.run(both())
    assert result.token_ids == expected.token_ids == tuple(tokens)


def test_several_event_loops_share_an_engine(engine: Engine) -> None:
    asked = [short(i) for i in range(24)]
    expected = [engine.submit(request).result().token_ids for request in asked]

    async def gathered(part: list[Request]) -> list[tuple[int, ...]]:
        calls = (engine.agenerate(r.prompt, strategy="sample", seed=r.seed, max_new_tokens=8) for r in part)
        return [result.token_ids for result in await asyncio.gather(*calls)]

    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(lambda part: asyncio.run(gathered(part)), [asked[i::3] for i in range(3)]))
    assert [parts[i % 3][i // 3] for i in range(24)] == expected


def test_cancelling_a_task_cancels_its_request(paced: tuple[Engine, Paced]) -> None:
    engine, _ = paced

    async def cancelled() -> None:
        options: dict[str, Any] = {"strategy": "greedy", "max_new_tokens": FOREVER, "ignore_eos": True}

        async def streaming() -> None:
            async for _ in engine.astream([1], **options):
                pass

        tasks = [asyncio.ensure_future(engine.agenerate([1], **options)), asyncio.ensure_future(streaming())]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        assert all(isinstance(e, asyncio.CancelledError) for e in await asyncio.gather(*tasks, return_exceptions=True))

    asyncio.run(cancelled())
    settle(engine)


def test_leaving_an_async_stream_early_cancels_its_request(paced: tuple[Engine, Paced]) -> None:
    engine, _ = paced

    async def left() -> None:
        pieces = engine.astream([1], strategy="greedy", max_new_tokens=FOREVER, ignore_eos=True)
        await anext(pieces)
        await pieces.aclose()  # type: ignore[attr-defined]

    asyncio.run(left())
    settle(engine)


def test_arun_takes_any_iterable_and_keeps_order_when_asked() -> None:
    with make(max_running=3, max_waiting=1) as engine:
        asked = [short(i, id=str(i), max_new_tokens=1 + 7 * (i % 2)) for i in range(20)]
        expected = {r.id: r.token_ids for r in engine.run(asked)}

        async def source() -> AsyncIterator[Request]:
            for request in asked:
                await asyncio.sleep(0)
                yield request

        async def collected(requests: Any, ordered: bool) -> list[Result]:
            return [result async for result in engine.arun(requests, ordered=ordered)]

        for requests in (asked, source()):
            results = asyncio.run(collected(requests, ordered=True))
            assert [r.id for r in results] == [r.id for r in asked]
            assert {r.id: r.token_ids for r in results} == expected
        bad = [*asked, Request(prompt=[1], strategy="no_such", id="bad")]
        results = asyncio.run(collected(bad, ordered=False))
        assert {r.id: r.token_ids for r in results if r.error is None} == expected
        assert isinstance(next(r for r in results if r.id == "bad").error, ConfigError)
        settle(engine)


def test_arun_keeps_no_result_back_while_its_source_waits(engine: Engine) -> None:
    async def listens() -> list[str]:
        first_is_there = asyncio.Event()
        seen = []

        async def source() -> AsyncIterator[Request]:
            yield short(1, id="a")
            await asyncio.wait_for(first_is_there.wait(), 5)
            yield short(2, id="b")

        async for result in engine.arun(source()):
            seen.append(result.id)
            first_is_there.set()
        return seen

    assert asyncio.run(listens()) == ["a", "b"]


def test_an_exception_of_an_async_source_goes_through_and_frees_everything(paced: tuple[Engine, Paced]) -> None:
    engine, _ = paced

    async def source() -> AsyncIterator[Request]:
        yield long()
        raise KeyError("the caller's own")

    async def collected() -> None:
        async for _ in engine.arun(source()):
            pass

    with pytest.raises(KeyError, match="the caller's own"):
        asyncio.run(collected())
    settle(engine)


# ---- a real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Iterator[Engine]:
    with Engine.load("smollm2", dtype="float32", slots=4096) as engine:
        yield engine


@pytest.mark.real_model
def test_chat_messages_are_written_by_the_models_template(real: Engine) -> None:
    messages = [{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Say hi."}]
    result = real.generate(messages, strategy="greedy", max_new_tokens=4)
    assert "You are terse." in result.prompt and result.prompt.endswith("<|im_start|>assistant\n")
    assert list(result.prompt_token_ids) == real.tokenizer.encode(result.prompt, add_special_tokens=False)
    begun = [*messages, {"role": "assistant", "content": "Hello, my"}]
    going_on = real.generate(begun, strategy="greedy", max_new_tokens=2, continue_final_message=True)
    assert going_on.prompt.endswith("Hello, my")
    with pytest.raises(InputError, match="continue_final_message"):
        real.generate(messages, continue_final_message=True)


@pytest.mark.real_model
def test_no_beginning_is_doubled_and_raw_text_stays_as_it_is(real: Engine) -> None:
    text = "The capital of France is"
    raw = real.generate(text, raw=True, strategy="greedy", max_new_tokens=2)
    assert raw.prompt == text
    bos = real.tokenizer.bos_token
    if bos:
        again = real.generate(bos + text, raw=True, strategy="greedy", max_new_tokens=2)
        assert again.prompt_token_ids.count(real.tokenizer.bos_token_id) <= 1
    chat = real.generate(text, strategy="greedy", max_new_tokens=2)
    assert chat.prompt.count("<|im_start|>system") <= 1
    assert chat.prompt_token_ids[:2] != (real.tokenizer.bos_token_id,) * 2


@pytest.mark.real_model
def test_tools_reach_the_template(real: Engine) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}]
    template = (
        "{% for t in tools %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    messages = [{"role": "user", "content": "Hi"}]
    result = real.generate(
        messages, strategy="greedy", max_new_tokens=1, chat={"tools": tools, "chat_template": template}
    )
    assert result.prompt == "[get_weather]Hi"


@pytest.mark.real_model
def test_scores_of_the_real_model_equal_its_logprobs(real: Engine) -> None:
    result = real.generate("Tell me a story.", strategy="sample", seed=1, max_new_tokens=12, logprobs="model")
    score = real.score("Tell me a story.", result.token_ids, prompt_logprobs=True)
    assert result.hypotheses[0].logprobs == pytest.approx(score.logprobs, abs=1e-4)
    assert len(score.prompt_logprobs or ()) == len(result.prompt_token_ids) - 1
