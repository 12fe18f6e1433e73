"""What a strategy costs, counted exactly: passes, tokens that were run, slots. Nothing is run twice or copied."""

from __future__ import annotations

from collections import Counter

from hypothesis import strategies as st

from unspool.live import Live
from unspool.loop import Loop
from unspool.request import PreparedRequest, Result
from unspool_testing.case import Case
from unspool_testing.driver import Circumstances, drive
from unspool_testing.generators import models, requests
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.subject import Subject
from unspool_testing.table import Path, TableModel


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    asked = draw(requests(subject, model, most_beside=0, most_new=8))
    return Case(subject=subject.name, model=model, requests=(asked,))


@check_of
def check_cost(case: Case, known: Known) -> None:
    """Count what one undisturbed request runs, and compare it with what it must run and with what it reports."""
    table = case.model.runner()
    assert isinstance(table, TableModel)
    [request] = case.prepared(known)
    most_slots, streams, comes_back = 0, set[int](), False

    def look(loop: Loop) -> None:
        nonlocal most_slots, comes_back
        comes_back = comes_back or any(_stays_above(loop, live) for live in loop.scheduler.running)
        most_slots = max(most_slots, loop.main.cache.pool.size - loop.main.cache.free)
        streams.update(branch.stream for live in loop.scheduler.running for branch in live.branches)

    room = Circumstances(slots=4096, token_budget=4096)
    [result] = drive(table, [request], room, case.model.companions(), look, name="the run")
    if not lawful_end(result):
        return
    stats = result.stats
    if not request.pipeline.companions:  # which run the same paths once more, in slots of their own
        waits = request.pipeline.drafts and not request.pipeline.row_local  # then an accepted draft may be run again
        twice = [path for (_, path), times in Counter(table.paths).items() if times > 1]
        if twice and not (waits or comes_back):
            raise Broken(f"the path {list(twice[0])} was run twice")
        if stats.forward_passes != table.passes or stats.rows != table.tokens:
            raise Broken(
                f"it reports {stats.forward_passes} passes and {stats.rows} tokens, and the model ran {table.passes} "
                f"and {table.tokens}"
            )
        if most_slots > table.tokens:
            raise Broken(f"{most_slots} slots were taken, and {table.tokens} tokens were run: something was copied")
    _check_claimed(case, known, request, result)
    if streams <= set(range(request.pipeline.strategy.start(request))):  # it does not fork
        _check_one_child(request, result)


def _stays_above(loop: Loop, live: Live) -> bool:
    """Tell whether a branch is held where others have gone on: what they gave up may be begun anew from there."""
    held = {branch.node for branch in live.branches if branch.held is not None}
    parents = loop.main.tree.parent
    for branch in live.branches:
        node = branch.node
        while node != live.root and node not in held:
            node = parents[node]
        if node in held and node != branch.node:
            return True
    return False


def _check_claimed(case: Case, known: Known, request: PreparedRequest, result: Result) -> None:
    pipeline, stats = request.pipeline, result.stats
    own = stats.rows - stats.prompt_tokens
    strategy = pipeline.strategy
    for name, got in (("passes", stats.forward_passes), ("rows", own)):
        claimed = known.claim(strategy.name, name) if strategy.name == case.subject else None
        if claimed is not None and (expected := claimed(strategy.params, request, result)) != got:
            raise Broken(f"it claims {expected} {name} and costs {got}")


def _check_one_child(request: PreparedRequest, result: Result) -> None:
    """Check a strategy that grows one child a row: all that was run can be read off the texts."""
    pipeline, stats = request.pipeline, result.stats
    own = stats.rows - stats.prompt_tokens
    simple = pipeline.independent and not pipeline.drafts and not pipeline.strategy.holds
    if simple and pipeline.strategy.start(request) == len(result.hypotheses):
        texts = [h.token_ids for h in result.hypotheses]
        passes, rows = max(map(len, texts)), len(_beginnings(texts))
        if (stats.forward_passes, own) != (passes, rows):
            raise Broken(
                f"texts of at most {passes} tokens with {rows} different beginnings cost {stats.forward_passes} passes "
                f"and {own} tokens"
            )


def _beginnings(texts: list[Path]) -> set[Path]:
    """List what must run beside the prompt: every beginning of a text but the text itself."""
    return {text[:length] for text in texts for length in range(1, len(text))}


COST = Law(
    "cost",
    "No path is run twice unless a strategy comes back to where it stayed, nothing copies keys and values, a strategy "
    "with one child a row costs one pass a token, and what a result reports is what the model ran.",
    "People choose strategies by what they cost. A strategy that runs a prompt again for each beam, or looks at "
    "candidates that it could know, is slower than its paper says. What a strategy should cost beyond that, its author "
    "can claim (`passes`, `rows`).",
    check_cost,
    _cases,
    examples=40,
)
