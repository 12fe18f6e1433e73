"""A case: all that a run depends on, small enough to read. It is written as YAML, which reproduces it.

    subject: top_p
    model: {vocab_size: 3, table: {any: [0.0, 1.0, 2.0], 2 2: [5.0, 0.0, 0.0]}}
    requests:
    - {strategy: kit_sample, plugins: [{top_p: 0.5}], prompt: [1], max_new_tokens: 3}
    schedule: {token_budget: 2}

Why it is text: `docs/decisions/cases.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from unspool.huggingface.runner import HuggingFaceRunner
from unspool.request import Logprobs, PreparedRequest
from unspool.runner import ModelRunner
from unspool_testing.compare import with_pipeline, with_plugin
from unspool_testing.driver import Circumstances, least_slots, request
from unspool_testing.known import Known, Spec
from unspool_testing.letters import letters
from unspool_testing.networks import ARCHITECTURES, tiny_model
from unspool_testing.table import Path, TableModel

NETWORK_VOCABULARY = 64
ROOMY = 4096
DRAFT_MODEL = "draft"
"""The name by which a companion may ask for another model than the target."""


ANY = "any"
"""How the row is written that counts where no other does."""


def _path(key: Any) -> Any:
    if isinstance(key, int):
        return (key,)
    return tuple(int(token) for token in key.split() if token != ANY) if isinstance(key, str) else key


def _words(path: Path) -> str:
    return " ".join(map(str, path)) or ANY


PathKey = Annotated[Path, BeforeValidator(_path), PlainSerializer(_words, return_type=str)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Part):
    """The target: a table, or a tiny network in float64."""

    vocab_size: int = 3
    seed: int = 0
    """Chooses the distributions that no row of the table names."""
    memory: int | None = None
    """How many last tokens these look at; none: all."""
    table: dict[PathKey, tuple[float, ...]] | None = None
    """Endings of paths -> the logits that follow."""
    network: str | None = None
    """An architecture of `networks.py`, instead of a table."""

    def runner(self) -> ModelRunner:
        """Make the model."""
        if self.network is not None:
            return _network(self.network, self.seed)
        made = TableModel(self.vocab_size, self.seed, table=self.table, memory=self.memory)
        if (tables := _TABLES.get()) is not None:
            tables.append(made)
        return made

    def companions(self) -> Mapping[str, ModelRunner]:
        """Make the models that companions may name: `draft`, which knows the last token only."""
        if self.network is not None:
            return {DRAFT_MODEL: _network(self.network, self.seed + 1)}
        return {DRAFT_MODEL: TableModel(self.vocab_size, self.seed + 1, memory=1)}


class Asked(_Part):
    """A request: its pipeline as a config has it, its prompt and its limits."""

    strategy: Spec
    plugins: tuple[Spec, ...] = ()
    prompt: tuple[int, ...] = (1,)
    max_new_tokens: int = 4
    min_new_tokens: int = 0
    end_ids: tuple[int, ...] = (0,)
    seed: int = 0
    n: int = 1
    logprobs: Logprobs | None = None

    def prepared(self, known: Known, id_: str = "0") -> PreparedRequest:
        """Make it ready for the loop, or raise a `ConfigError`."""
        pipeline = known.pipeline(self.strategy, self.plugins)
        return request(
            pipeline,
            self.prompt,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            end_ids=self.end_ids,
            seed=self.seed,
            n=self.n,
            logprobs=self.logprobs,
            id=id_,
            # Constraints read texts. All others are shown ids alone: what has no text of its own is a number then.
            tokenizer=letters() if any(plugin.constraint for plugin in pipeline.plugins) else None,
        )


class Schedule(_Part):
    """How much room there is, who comes when, and who is disturbed. The fields are those of `Circumstances`."""

    spare_slots: int | None = None
    """Cache slots beyond those that the largest request needs alone; none: plenty."""
    token_budget: int = 512
    max_running: int = 256
    arrivals: tuple[int, ...] = ()
    cancels: dict[int, int] = Field(default_factory=dict)
    preempts: tuple[int, ...] = ()


class Case(_Part):
    """All that a run depends on."""

    subject: str
    """The plugin that is checked."""
    model: Model = Model()
    requests: tuple[Asked, ...]
    schedule: Schedule = Schedule()
    drafter: Spec | None = None
    """Beside the pipelines of all requests, in laws about drafts."""
    fault: Literal["nan", "dead", "raise"] | None = None
    """What the model does wrong, in laws about faults."""
    replace: dict[str, Any] = Field(default_factory=dict)
    """What else a law varies; its page says what."""

    @classmethod
    def read(cls, text: str) -> Case:
        """Read a case from YAML."""
        return cls.model_validate(yaml.safe_load(text))

    def write(self) -> str:
        """Write the case as YAML, defaults left out."""
        lines = []
        for name, value in self.model_dump(exclude_defaults=True).items():
            if name == "requests":
                lines += ["requests:", *(f"- {_flow(asked)}" for asked in value)]
            else:
                lines.append(f"{name}: {_flow(value)}")
        return "\n".join(lines)

    def prepared(self, known: Known) -> list[PreparedRequest]:
        """Make the requests ready for the loop, or raise a `ConfigError`."""
        return [asked.prepared(known, str(number)) for number, asked in enumerate(self.requests)]

    def drafting(self, known: Known) -> list[PreparedRequest]:
        """Make the requests ready for the loop, the case's drafter in the first one's pipeline."""
        first, *others = self.prepared(known)
        if self.drafter is not None:
            first = with_pipeline(first, with_plugin(first.pipeline, known.plugin(self.drafter)))
        return [first, *others]

    def first(self) -> Asked:
        """Give the request that the law is about."""
        return self.requests[0]


def circumstances(case: Case, asked: Sequence[PreparedRequest]) -> Circumstances:
    """Give what the case's requests have to cope with. How many slots they need is measured."""
    schedule, slots = case.schedule, ROOMY
    if schedule.spare_slots is not None:
        slots = least_slots(case.model.runner(), asked, case.model.companions()) + schedule.spare_slots
    return Circumstances(
        slots=slots,
        token_budget=schedule.token_budget,
        max_running=schedule.max_running,
        arrivals=schedule.arrivals,
        cancels=schedule.cancels,
        preempts=frozenset(schedule.preempts),
    )


@contextmanager
def noting_tables() -> Iterator[list[TableModel]]:
    """List the tables that are made while the context lasts."""
    tables: list[TableModel] = []
    token = _TABLES.set(tables)
    try:
        yield tables
    finally:
        _TABLES.reset(token)


_TABLES: ContextVar[list[TableModel] | None] = ContextVar("tables", default=None)


def explicit(case: Case, tables: Sequence[TableModel], most: int = 16) -> Case:
    """Give the case with the table that it used written out, where that is short enough to read."""
    if case.model.table is not None or case.model.network is not None:
        return case
    rows: dict[Path, tuple[float, ...]] = {}
    for table in tables:
        rows |= {path: tuple(row) for path, row in table.rows().items()}
    if not 0 < len(rows) <= most:
        return case
    kept = {"vocab_size": case.model.vocab_size, "seed": case.model.seed, "memory": case.model.memory}
    return case.model_copy(update={"model": Model(table=rows, **kept)})


def _plain(value: Any) -> Any:
    """Write tuples as lists. Numbers that are keys stay numbers, which JSON could not do."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(_plain(value), default_flow_style=True, sort_keys=False, width=10**6)
    return text.strip().removesuffix("...").strip()


@cache
def _network(arch: str, seed: int) -> HuggingFaceRunner:
    assert arch in ARCHITECTURES, f"no architecture {arch!r}"
    network = tiny_model(arch, seed=seed)
    network.config.pad_token_id = None  # nothing is padded here, and transformers warns where a prompt holds that token
    return HuggingFaceRunner(network)
