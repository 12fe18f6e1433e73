"""Law 7: a strategy chooses each token as often as it claims, and its draws are independent.

Both laws hold a strategy with one child a row to its claim `distribution`. What it chooses is a function of the row and
of its noise, so the first law goes through the noise instead of drawing it. The second draws whole texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor

from unspool.errors import ConfigError
from unspool.plugin import Plugin
from unspool.rank import argmax
from unspool.request import PreparedRequest
from unspool.step import Step
from unspool_testing.case import Asked, Case, Model
from unspool_testing.claims import floats
from unspool_testing.compare import with_pipeline, with_plugin
from unspool_testing.driver import Circumstances, drive
from unspool_testing.enumeration import claimed_texts, row_without_noise
from unspool_testing.generators import around
from unspool_testing.known import Known, Spec
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.spy import watch
from unspool_testing.subject import Subject
from unspool_testing.table import Path, TableModel

STREAMS = 4096
"""Places of noise, each a stream, at which a row is shown."""
HUGE = 40.0
"""More Gumbel noise than anybody ever draws."""
CHANCE = 1e-9
"""How often a right strategy is called wrong where noise is drawn, for a token of a case."""
SEEDS, STREAMS_OF_A_SEED = 300, 10
"""Texts that the second law draws."""
FALSE_ALARM = 1e-6
"""How often it calls a right strategy wrong. Seeds are fixed, so for one case it is always or never."""


# ---- one token -------------------------------------------------------------------------------------------------------


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    vocab_size = draw(st.integers(2, 3))
    logit = st.one_of(st.integers(-400, 400).map(lambda hundredths: hundredths / 100), st.just(-math.inf))
    logits = draw(st.lists(logit, min_size=vocab_size, max_size=vocab_size).filter(lambda row: max(row) > -math.inf))
    plugins: tuple[Spec, ...] = draw(st.sampled_from([(), ({"kit_bias": {"token": 1, "bias": 1.5}},)]))
    return Case(
        subject=subject.name,
        model=Model(vocab_size=vocab_size, table={(): tuple(logits)}),
        requests=(
            _asked(draw, subject, vocab_size, plugins, max_new_tokens=1, min_new_tokens=draw(st.integers(0, 1))),
        ),
    )


def _asked(draw: st.DrawFn, subject: Subject, vocab_size: int, plugins: tuple[Spec, ...], **limits: int) -> Asked:
    strategy, _ = draw(around(subject, vocab_size, most_beside=0))
    try:
        subject.known.pipeline(strategy, plugins)
    except ConfigError:
        plugins = ()
    return Asked(strategy=strategy, plugins=plugins, **limits)


def check_distribution(case: Case, known: Known) -> None:
    """Check how often each token is chosen, over all noise."""
    claim = known.claim(case.subject, "distribution")
    assert claim is not None
    model = case.model.runner()
    assert isinstance(model, TableModel)
    grid = Grid()
    while True:
        numbers = grid.numbers
        request, logits, chosen = _choices(case, known, model, grid)
        if grid.numbers == numbers:
            break
    if logits is None:
        return
    expected = claim(request.pipeline.strategy.params, row_without_noise(request, (), logits, model))
    if len(expected) != case.model.vocab_size or not math.isclose(math.fsum(expected), 1, abs_tol=1e-9):
        raise Broken(f"its claim `distribution` is {list(expected)}: numbers for all tokens that add up to 1")
    counts = Counter(chosen)
    for token, probability in enumerate(expected):
        got = counts[token] / len(chosen)
        bound = grid.bound if 0 < probability < 1 else 0.0
        if abs(got - probability) > bound + 1e-9:
            allowed = f", within {bound:.2g}" if bound else ""
            raise Broken(
                f"of the logits {[round(value, 6) for value in floats(logits)]} it chooses token {token} with "
                f"frequency {got:.6g}, and claims {probability:.6g}{allowed}"
            )


def _choices(
    case: Case, known: Known, model: TableModel, grid: Grid
) -> tuple[PreparedRequest, Tensor | None, list[int]]:
    """Show one row to the strategy in every stream of a grid of noise: the logits, and the token of each stream."""
    request = replace(case.first().prepared(known), n=grid.size)
    shown: list[Tensor] = []
    tokens: dict[int, int] = {}
    twice = False

    def around(call: Callable[[], Any], step: Step, logits: Tensor) -> Any:
        nonlocal twice
        shown.append(logits[0].clone())
        growth = call()
        streams = step.stream[growth.row].tolist()
        twice = twice or len(set(streams)) < len(streams) or any(stream in tokens for stream in streams)
        tokens.update(zip(streams, growth.token.tolist(), strict=True))
        return growth

    watch(request.pipeline, "select", around)
    with grid.instead_of_noise():
        [result] = drive(model, [request], Circumstances(slots=2 * STREAMS), name="in all streams")
    if not lawful_end(result) or not shown:
        return request, None, []
    if twice:
        raise Broken("it claims a distribution, and gives a row more than one child")
    grid.allowed = [token for token, logit in enumerate(floats(shown[0])) if logit > -math.inf]
    return request, shown[0], list(tokens.values())


@dataclass
class Grid:
    """A grid of noise: its streams go through every value that a row's random numbers can have.

    With one number, `STREAMS` midpoints: a token that owns an interval of (0, 1) comes with the right frequency to
    within 1 / streams. With two, M x M midpoints: what one number decides, given the other, is an interval again, and
    its length changes monotonically, so the frequency is right to within 2 / M (1 / M where both are Gumbel noise: an
    argmax cuts each line once). Of more numbers a grid is coarser than chance: then the noise stays what it is, and
    Hoeffding's inequality bounds the frequency.
    """

    uniforms: list[str] = field(default_factory=list)
    """The purposes for which uniform numbers are drawn."""
    gumbels: list[str] = field(default_factory=list)
    """Those for which Gumbel noise is."""
    allowed: list[int] = field(default_factory=list)
    """The tokens that are not forbidden. The noise of a forbidden one shall make no difference: it is huge."""

    @property
    def numbers(self) -> list[tuple[str, int]]:
        """List a row's numbers: (purpose, -1) a uniform one, (purpose, token) the noise of a token."""
        noise = [(purpose, token) for purpose in self.gumbels for token in self.allowed]
        return [*((purpose, -1) for purpose in self.uniforms), *noise]

    @property
    def side(self) -> int:
        """Count the values of each number; 0: noise stays what it is."""
        return {0: 1, 1: STREAMS, 2: math.isqrt(STREAMS)}.get(len(self.numbers), 0)

    @property
    def size(self) -> int:
        """Count the streams."""
        return self.side ** len(self.numbers) if self.side else STREAMS

    @property
    def bound(self) -> float:
        """Say how far a frequency may lie from a probability."""
        if not self.numbers:
            return 0.0
        if not self.side:
            return math.sqrt(math.log(2 / CHANCE) / (2 * STREAMS))
        uniform = any(token < 0 for _, token in self.numbers)
        return (2 if uniform and len(self.numbers) > 1 else 1) / self.side

    @contextmanager
    def instead_of_noise(self) -> Iterator[None]:
        """Stand in for the noise of all steps while the context lasts, and note what is drawn."""
        real_uniform, real_gumbel = Step.uniform, Step.gumbel
        numbers = self.numbers

        def uniform(step: Step, purpose: str) -> Tensor:
            if purpose not in self.uniforms:
                self.uniforms.append(purpose)
            return self._midpoints(numbers, (purpose, -1), step.stream, real_uniform(step, purpose))

        def gumbel(step: Step, purpose: str) -> Tensor:
            if purpose not in self.gumbels:
                self.gumbels.append(purpose)
            real = real_gumbel(step, purpose)
            columns = []
            for token, column in enumerate(real.unbind(1)):
                as_uniform = torch.exp(-torch.exp(-column.double()))
                midpoints = self._midpoints(numbers, (purpose, token), step.stream, as_uniform)
                columns.append(
                    -torch.log(-torch.log(midpoints)) if token in self.allowed else torch.full_like(column, HUGE)
                )
            return torch.stack(columns, 1).to(real)

        def sample(step: Step, purpose: str, logits: Tensor) -> Tensor:
            return argmax(logits + gumbel(step, purpose))

        with mock.patch.multiple(Step, uniform=uniform, gumbel=gumbel, sample=sample):
            yield

    def _midpoints(
        self, numbers: Sequence[tuple[str, int]], number: tuple[str, int], stream: Tensor, real: Tensor
    ) -> Tensor:
        """Give each stream's value of one number: `[rows]` in (0, 1)."""
        if number not in numbers or not self.side:
            return real
        place: Tensor = stream // self.side ** numbers.index(number) % self.side
        return (place.to(real.dtype) + 0.5) / self.side


# ---- whole texts -----------------------------------------------------------------------------------------------------


@st.composite
def _whole_cases(draw: st.DrawFn, subject: Subject) -> Case:
    vocab_size = 3
    plugins: tuple[Spec, ...] = draw(st.sampled_from([(), ("kit_tired",), ({"kit_bias": {"token": 1, "bias": 1.5}},)]))
    drafter = draw(
        st.sampled_from([None, {"kit_chains": {"vocab_size": vocab_size}}, {"kit_trees": {"vocab_size": 3}}])
    )
    asked = _asked(draw, subject, vocab_size, plugins, max_new_tokens=3, min_new_tokens=1)
    try:
        with_plugin(subject.known.pipeline(asked.strategy, asked.plugins), subject.known.plugin(drafter or "kit_trees"))
    except ConfigError:
        drafter = None
    model = Model(vocab_size=vocab_size, seed=draw(st.integers(0, 2)))
    return Case(subject=subject.name, model=model, requests=(asked,), drafter=drafter)


def check_independence(case: Case, known: Known) -> None:
    """Check by a chi-squared test that whole texts come as often as they should."""
    model = case.model.runner()
    assert isinstance(model, TableModel)
    first = case.first().prepared(known)
    if case.drafter is not None:
        first = with_pipeline(first, with_plugin(first.pipeline, known.plugin(case.drafter)))
    asked = [replace(first, n=STREAMS_OF_A_SEED, seed=seed, id=str(seed)) for seed in range(SEEDS)]
    results = drive(model, asked, Circumstances(token_budget=STREAMS), name="all seeds")
    counts = Counter(h.token_ids for result in results if lawful_end(result) for h in result.hypotheses)
    claimed = claimed_texts(known, first, model, known.claim(case.subject, "distribution"))
    exact = {text: math.exp(math.fsum(logprobs)) for text, logprobs in claimed.items()}
    for text in counts:
        if text not in exact:
            raise Broken(f"{list(text)} was drawn, and by the claims it has probability 0")
    probability, worst = _chi_squared(counts, exact)
    if probability < FALSE_ALARM:
        draws = counts.total()
        raise Broken(
            f"{list(worst)} was drawn {counts[worst]} times of {draws}, and {exact[worst] * draws:.1f} times "
            f"are claimed; texts so far from the claims come with probability {probability:.1g}"
        )


def _chi_squared(counts: Counter[Path], exact: dict[Path, float]) -> tuple[float, Path]:
    """Say how likely it is that counts lie so far from what is expected, and which text does most."""
    draws = counts.total()
    expected = {text: probability * draws for text, probability in exact.items()}
    cells = {text: (counts[text], mean) for text, mean in expected.items() if mean >= 5}
    rare = [(counts[text], mean) for text, mean in expected.items() if mean < 5]
    parts = {text: (seen - mean) ** 2 / mean for text, (seen, mean) in cells.items()}
    statistic, freedom = sum(parts.values()), len(parts) - 1
    if (rest := sum(mean for _, mean in rare)) >= 5:  # what is rare is counted together
        statistic, freedom = statistic + (sum(seen for seen, _ in rare) - rest) ** 2 / rest, freedom + 1
    worst = max(parts, key=lambda text: parts[text], default=next(iter(expected)))
    if freedom < 1:
        return 1.0, worst
    half = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*half)), worst


def _excuse(subject: Subject) -> str | None:
    if not subject.is_strategy:
        return "it is no strategy: it chooses nothing"
    if subject.claim("distribution") is None:
        return "it claims no `distribution`: see `unspool_testing.claims`"
    if not subject.kind.row_local:
        return "it is not row_local: what it chooses in one row has no distribution by itself"
    return None


def _excuse_of_texts(subject: Subject) -> str | None:
    if (reason := _excuse(subject)) is not None:
        return reason
    if subject.kind.rank is not Plugin.rank:
        return "it ranks its texts, so those that come back are chosen among draws"
    if subject.has("stop_check"):
        return "it ends or drops texts itself, so those that come back are not plain draws"
    return None


DISTRIBUTION = Law(
    "distribution",
    "Over all noise, each token is chosen as often as the strategy's claim says; a forbidden one never.",
    "A sampler whose frequencies are a little off writes fluent text, and what is estimated with it is wrong. Usual "
    "causes: noise used twice, or of the wrong kind; a cumulative sum that is read off by one; a token of "
    "probability 0 that wins by rounding; logits taken for probabilities.",
    check_of(check_distribution),
    _cases,
    _excuse,
    examples=15,
)

INDEPENDENCE = Law(
    "independence",
    "Whole texts come as often as the claimed distributions say, over seeds and over streams, with drafts and without.",
    "Samples that are secretly alike look like certainty: votes, estimates and evaluations over them are wrong. Usual "
    "causes: noise that leaves out the stream, the seed or the place; one purpose drawn for two decisions; a draft "
    "that is taken or refused with the noise that chose it.",
    check_of(check_independence),
    _whole_cases,
    _excuse_of_texts,
    examples=3,
)
