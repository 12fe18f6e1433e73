"""Cases drawn by Hypothesis: models, prompts, limits, pipelines around a plugin, neighbours, schedules, drafts.

Everything shrinks towards what is quickly read: a vocabulary of two, a table that knows one token, the kit's greedy
strategy, no plugin beside, one new token, plenty of room.
"""

from __future__ import annotations

from typing import Any

from hypothesis import assume
from hypothesis import strategies as st

from unspool.errors import ConfigError, InputError, UnspoolError
from unspool_testing.case import NETWORK_VOCABULARY, Asked, Model, Schedule
from unspool_testing.compare import with_plugin
from unspool_testing.known import Known, Spec
from unspool_testing.parameters import parameters
from unspool_testing.subject import Subject

HOSTS: tuple[Spec, ...] = (
    "kit_greedy",
    "kit_sample",
    "kit_search",
    {"kit_search": {"children": 3, "width": 3, "enough": 2}},
    "kit_forks",
    "kit_particles",
    "kit_holds",
    {"kit_holds": {"k": 2, "by": "likeness"}},
)
"""Strategies that a plugin is tried under."""

BESIDE: tuple[Spec, ...] = (
    "kit_tired",
    {"kit_bias": {"token": 1, "bias": 1.5}},
    "kit_grammar",
    "kit_guidance",
)
"""Plugins that stand beside the one that is tried: a path state, a parameter of a request, a grammar, a companion."""

NEIGHBOURS: tuple[tuple[Spec, tuple[Spec, ...]], ...] = (
    ("kit_greedy", ()),
    ("kit_sample", ("kit_tired",)),
    ("kit_search", ()),
    ("kit_particles", ("kit_guidance",)),
    ("kit_holds", ("kit_grammar",)),
)
"""Pipelines of strangers in the batch."""


@st.composite
def models(draw: st.DrawFn, least: int = 2, most: int = 6) -> Model:
    """Draw a table."""
    return Model(
        vocab_size=draw(st.integers(least, most)),
        memory=draw(st.sampled_from([0, 1, 2, None])),
        seed=draw(st.integers(0, 5)),
    )


@st.composite
def tied(draw: st.DrawFn, least: int = 2, most: int = 5) -> Model:
    """Draw a table in which equal logits are common: what follows depends on the last token."""
    vocab_size = draw(st.integers(least, most))
    logits = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.0, -4.0])
    row = st.lists(logits, min_size=vocab_size, max_size=vocab_size).map(tuple)
    last = draw(st.lists(st.integers(0, vocab_size - 1), max_size=2, unique=True))
    return Model(vocab_size=vocab_size, table={(): draw(row), **{(token,): draw(row) for token in last}})


@st.composite
def networks(draw: st.DrawFn) -> Model:
    """Draw a tiny network of a real architecture, in float64."""
    arch = draw(st.sampled_from(["llama", "gpt2", "gemma3_text"]))
    return Model(vocab_size=NETWORK_VOCABULARY, network=arch, seed=draw(st.integers(0, 1)))


@st.composite
def around(
    draw: st.DrawFn,
    subject: Subject,
    vocab_size: int,
    *,
    most_beside: int = 2,
) -> tuple[Spec, tuple[Spec, ...]]:
    """Draw a pipeline that the subject is in: its host, if it is no strategy itself, and plugins beside it.

    Args:
        draw: of Hypothesis.
        subject: the plugin.
        vocab_size: of the model.
        most_beside: most plugins beside it.
    """
    known = subject.known
    own: Spec = subject.name  # an object that was given has its parameters
    if subject.name not in known.instances:
        own = subject.spec(draw(parameters(subject.kind, vocab_size, subject.params)))
    beside: list[Spec] = draw(
        st.lists(st.sampled_from(BESIDE), max_size=most_beside, unique_by=str).map(list) if most_beside else st.just([])
    )
    if most_beside and draw(st.integers(0, 3)) == 3:
        names = [name for name in known.names("logits_transform") if name != subject.name]
        name = draw(st.sampled_from(names)) if names else None
        if name is not None and name not in known.instances:
            beside.append({name: draw(_drawable(known, name, vocab_size))})
    if subject.is_strategy:
        return own, _accepted(known, own, (), tuple(beside))
    strategies = [*HOSTS, *(name for name in known.names("select") if not _required(known, name))]
    host = draw(st.sampled_from(strategies).filter(lambda host: _fits(known, host, (own,))))
    place = draw(st.integers(0, len(beside)))
    return host, _accepted(known, host, (own,), tuple(beside), place)


def _drawable(known: Known, name: str, vocab_size: int) -> st.SearchStrategy[dict[str, Any]]:
    try:
        return parameters(known.of(name), vocab_size)
    except ConfigError:
        return st.nothing()


def _required(known: Known, name: str) -> bool:
    return any(field.is_required() for field in known.of(name).Params.model_fields.values())


def _accepted(
    known: Known, strategy: Spec, own: tuple[Spec, ...], beside: tuple[Spec, ...], place: int = 0
) -> tuple[Spec, ...]:
    """Put plugins beside the subject, without those that refuse."""
    kept: tuple[Spec, ...] = ()
    for spec in beside:
        if _fits(known, strategy, (*kept, spec, *own)):
            kept = (*kept, spec)
    place = min(place, len(kept))
    return (*kept[:place], *own, *kept[place:])


def _fits(known: Known, strategy: Spec, plugins: tuple[Spec, ...]) -> bool:
    try:
        known.pipeline(strategy, plugins)
    except UnspoolError:
        return False
    return True


@st.composite
def requests(
    draw: st.DrawFn,
    subject: Subject,
    model: Model,
    *,
    pipeline: tuple[Spec, tuple[Spec, ...]] | None = None,
    most_new: int = 6,
    most_beside: int = 2,
) -> Asked:
    """Draw a request of the subject's, or of a given pipeline. Token 0 ends a text, as a rule."""
    strategy, plugins = pipeline or draw(around(subject, model.vocab_size, most_beside=most_beside))
    new = draw(st.integers(1, most_new))
    ends = [(0,), (0,), (), (0, 1)]
    asked = Asked(
        strategy=strategy,
        plugins=plugins,
        prompt=tuple(draw(st.lists(st.integers(0, model.vocab_size - 1), min_size=1, max_size=4))),
        max_new_tokens=new,
        min_new_tokens=draw(st.integers(0, new)),
        end_ids=draw(st.sampled_from(ends)),
        seed=draw(st.integers(0, 20)),
        n=draw(st.integers(1, 3)),
        logprobs=draw(st.sampled_from([None, "pipeline", "model"])),
    )
    single = asked.model_copy(update={"n": 1})
    fitting = [one for one in (asked, single) if _is_taken(one, subject.known)]  # a beam returns no more than it has
    assume(fitting)
    return fitting[0]


def _is_taken(asked: Asked, known: Known) -> bool:
    """Tell whether all plugins take a request: what one of them refuses is no case of any law."""
    try:
        prepared = asked.prepared(known)
        prepared.pipeline.strategy.start(prepared)
        for plugin in prepared.pipeline.stateful:
            plugin.initial(prepared)
    except InputError:
        return False
    return True


@st.composite
def neighbours(draw: st.DrawFn, subject: Subject, model: Model, most: int = 2) -> tuple[Asked, ...]:
    """Draw requests of strangers."""
    pipelines = draw(st.lists(st.sampled_from(NEIGHBOURS), max_size=most))
    return tuple(draw(requests(subject, model, pipeline=pipeline)) for pipeline in pipelines)


@st.composite
def beginning_alike(draw: st.DrawFn, subject: Subject, asked: tuple[Asked, ...]) -> tuple[Asked, ...]:
    """Let requests begin like the first one, in half of all cases, so that they share what has run of its prompt."""
    if draw(st.booleans()):
        return asked
    first, *others = asked
    for at, one in enumerate(others):
        cut = draw(st.integers(0, len(first.prompt)))
        alike = one.model_copy(update={"prompt": (*first.prompt[:cut], *one.prompt)})
        if _is_taken(alike, subject.known):
            others[at] = alike
    return first, *others


@st.composite
def schedules(draw: st.DrawFn, count: int, *, cancels: bool = False, quiet: bool = True) -> Schedule:
    """Draw a schedule for so many requests. `quiet`: sometimes nothing happens at all."""
    if quiet and draw(st.booleans()):
        return Schedule(token_budget=draw(st.sampled_from([512, 512, 6, 3, 1])))
    cancelled = st.dictionaries(st.integers(0, count - 1), st.integers(0, 6), max_size=2)
    return Schedule(
        spare_slots=draw(st.sampled_from([None, 0, 1, 5])),
        token_budget=draw(st.sampled_from([512, 12, 6, 3, 2, 1])),
        max_running=draw(st.sampled_from([256, 2, 1])),
        arrivals=tuple(draw(st.lists(st.integers(0, 6), max_size=count))),
        cancels=draw(cancelled) if cancels else {},
        preempts=tuple(sorted(draw(st.sets(st.integers(1, 9), max_size=2)))),
    )


@st.composite
def drafters(draw: st.DrawFn, known: Known, asked: Asked, model: Model) -> Spec:
    """Draw a drafter that may stand in a request's pipeline: random chains and trees, one that is right, a model."""
    vocab, seed = model.vocab_size, draw(st.integers(0, 9))
    choices: list[Spec] = [
        {"kit_chains": {"length": 1 + seed % 5, "vocab_size": vocab, "seed": seed}},
        {"kit_trees": {"width": 1 + seed % 3, "vocab_size": vocab, "seed": seed}},
        "kit_recall",
    ]
    strategy = known.plugin(asked.strategy)
    if strategy.row_local and not strategy.holds:
        choices += ["kit_draft_model", {"kit_draft_model": {"model": "draft", "length": 2}}]
    return draw(st.sampled_from(choices))


@st.composite
def a_drafter(draw: st.DrawFn, known: Known, asked: Asked, model: Model) -> Spec | None:
    """Draw a drafter beside a pipeline, or none."""
    if draw(st.booleans()):
        return None
    drafter = draw(drafters(known, asked, model))
    assume(bears(known, asked, drafter))
    return drafter


def bears(known: Known, asked: Asked, plugin: Spec) -> bool:
    """Tell whether nobody in a request's pipeline refuses one plugin more."""
    try:
        with_plugin(known.pipeline(asked.strategy, asked.plugins), known.plugin(plugin))
    except ConfigError:
        return False
    return True
