"""The laws about what a plugin does see what is wrong, and let pass what is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

from unspool.hooks import Growth
from unspool.plugin import Parameters, Plugin, hookimpl, per_request
from unspool.request import PreparedRequest
from unspool.step import Step
from unspool_testing import host_claims, hosts
from unspool_testing.case import Case
from unspool_testing.claims import Row
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law
from unspool_testing.laws.constraint import CONSTRAINT
from unspool_testing.laws.distribution import DISTRIBUTION, INDEPENDENCE
from unspool_testing.laws.reference import REFERENCE
from unspool_testing.laws.scores import RANKING, SCORES_ADD_UP
from unspool_testing.proof import Verdict, prove
from unspool_testing.subject import Subject


def tried(law: Law, plugin: type[Plugin], claims: type | None = None, **params: Any) -> Verdict:
    """Try to break a law, with a class and what it claims."""
    return prove(law, Subject.find(plugin, claims=claims, params=params), examples=min(law.examples, 30))


def assert_holds(law: Law, plugin: type[Plugin], claims: type | None = None, **params: Any) -> None:
    """Check that a law holds."""
    verdict = tried(law, plugin, claims, **params)
    assert verdict.status == "held", verdict.reason + verdict.counterexample


def assert_broken(law: Law, plugin: type[Plugin], how: str, claims: type | None = None, **params: Any) -> None:
    """Check that a law is found broken, that the message says how, and that the case reproduces it."""
    subject = Subject.find(plugin, claims=claims, params=params)
    verdict = prove(law, subject)
    assert verdict.status == "broken", f"{law.name} held in {verdict.examples} cases"
    assert how in verdict.reason, verdict.reason
    assert "\n" not in verdict.reason
    assert verdict.case is not None
    with pytest.raises(AssertionError):
        law.check(Case.read(verdict.case.write()), subject.known)


# ---- reference -------------------------------------------------------------------------------------------------------


class Halves:
    """Claim to keep what has at least half of the largest probability."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Compare with the largest."""
        return [logit if math.exp(logit - max(row.logits)) >= 0.5 else -math.inf for logit in row.logits]


class KeepHalves(Plugin):
    """Keep what has at least half of the largest probability."""

    row_local = True
    least = 0.5

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        probs = logits.softmax(-1)
        logits.masked_fill_(probs < self.least * probs.amax(-1, keepdim=True), -torch.inf)


class KeepThirds(KeepHalves):
    """Keep too much."""

    least = 0.333


class Pushes:
    """Claim to raise new tokens that were said."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Raise them once."""
        return [logit + (params.by if token in row.tokens else 0) for token, logit in enumerate(row.logits)]


class Push(Plugin):
    """Raise what was said: lawful, and base of those that are not."""

    row_local = True

    class Params(Parameters):
        by: float = per_request(1.0, ge=-3, le=3)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        ids, lengths = step.paths()
        by = self.by(step)
        for row in range(len(logits)):
            said = set(ids[row, self.first(step, row) : int(lengths[row])].tolist())
            logits[row, sorted(said)] += by[row]

    def by(self, step: Step) -> Tensor:
        return step.values(self, "by")

    def first(self, step: Step, row: int) -> int:
        return len(step.requests[int(step.request[row])].prompt_ids)


class PushOfAnother(Push):
    """Take the parameter of whoever made the group."""

    def by(self, step: Step) -> Tensor:
        return torch.full((len(step.node),), self.params.by)


class PushWithThePrompt(Push):
    """Count the prompt."""

    def first(self, step: Step, row: int) -> int:
        return 0


class Coin(Plugin):
    """Forbid the best token where a coin says so."""

    row_local = True
    purpose = "coin"

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        heads = step.uniform(self.purpose) < 0.5
        best = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.argmax(-1, keepdim=True), True)
        logits.masked_fill_(best & heads.unsqueeze(-1), -torch.inf)


class OtherCoin(Coin):
    """Look at another coin."""

    purpose = "another"


class Coins:
    """Claim to forbid the best token where the coin says so."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Forbid it."""
        best = list(row.logits).index(max(row.logits))
        heads = row.uniform("coin") < 0.5
        return [-math.inf if heads and token == best else logit for token, logit in enumerate(row.logits)]


class Surprised(Plugin):
    """Sharpen by the last token's log-probability."""

    row_local = True
    reads_logprob = True

    def initial(self, request: PreparedRequest) -> float:
        return 0.0

    def advance(self, state: float, token: int, logprob: float = 0.0) -> float:
        return logprob

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        logits *= 1 - logits.new_tensor(step.states(self)).unsqueeze(-1)


class SurprisedSoFar(Surprised):
    """Sharpen by all of them."""

    def advance(self, state: float, token: int, logprob: float = 0.0) -> float:
        return state + logprob


class Surprises:
    """Claim to sharpen by the last token's log-probability."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Multiply."""
        return [logit * (1 - row.logprobs[-1] if row.logprobs else 1) for logit in row.logits]


class Stutters(Plugin):
    """End a text that says a token so often in a row."""

    row_local = True

    class Params(Parameters):
        times: int = Field(2, ge=2, le=3)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        ids, lengths = growth.paths()
        for child, request in enumerate(growth.request.tolist()):
            text = ids[child, self.first(step.requests[request]) : int(lengths[child])].tolist()
            if len(text) >= self.params.times and len(set(text[-self.params.times :])) == 1:
                growth.finish[child] = "stutter"

    def first(self, request: PreparedRequest) -> int:
        return len(request.prompt_ids)


class StuttersWithThePrompt(Stutters):
    """Count the prompt."""

    def first(self, request: PreparedRequest) -> int:
        return 0


class Stuttering:
    """Claim to end a text that says a new token so often in a row."""

    @staticmethod
    def finishes(params: Any, request: Any, tokens: Sequence[int]) -> str | None:
        """Look at its end."""
        return "stutter" if len(tokens) >= params.times and len(set(tokens[-params.times :])) == 1 else None


class Last(Plugin):
    """Choose the last of equal maxima."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        token = logits.shape[-1] - 1 - logits.flip(-1).argmax(-1)
        return Growth(row=torch.arange(len(logits)), token=token)


def greedy_claims() -> type:
    claims = Known.installed().claims["greedy"]
    loaded: type = claims if isinstance(claims, type) else claims.load()
    return loaded


def test_a_transform_that_does_what_it_claims_passes() -> None:
    assert_holds(REFERENCE, KeepHalves, Halves)
    assert_holds(REFERENCE, Push, Pushes)
    assert_holds(REFERENCE, Coin, Coins)
    assert_holds(REFERENCE, Surprised, Surprises)


@pytest.mark.parametrize(
    ("wrong", "claims"),
    [
        (KeepThirds, Halves),
        (PushOfAnother, Pushes),
        (PushWithThePrompt, Pushes),
        (OtherCoin, Coins),
        (SurprisedSoFar, Surprises),
    ],
)
def test_a_transform_that_does_something_else_is_caught(wrong: type[Plugin], claims: type) -> None:
    assert_broken(REFERENCE, wrong, "and claims to make", claims)


def test_a_stop_check_is_held_to_its_claim() -> None:
    assert_holds(REFERENCE, Stutters, Stuttering)
    assert_broken(REFERENCE, StuttersWithThePrompt, "and claims that it lets the text go on", Stuttering)


def test_a_strategy_is_held_to_the_texts_that_it_claims() -> None:
    assert_holds(REFERENCE, hosts.Likeliest, greedy_claims())
    assert_broken(REFERENCE, Last, "and the claim is", greedy_claims())


class TwoSigma(Plugin):
    """Keep what lies within n deviations, where rounding favours nobody. Of two logits, two deviations keep both."""

    row_local = True

    class Params(Parameters):
        n: float = Field(2.0, gt=0)
        rounding: float = Field(1e-13, ge=0)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        sigma = ((logits - logits.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True).sqrt()
        reach = self.params.n * sigma * (1 - self.params.rounding)
        logits.masked_fill_(logits < logits.amax(-1, keepdim=True) - reach, -torch.inf)


class TwoSigmas:
    """Claim the same."""

    @staticmethod
    def transform(params: Any, row: Row) -> list[float]:
        """Keep what lies within n deviations."""
        mean = sum(row.logits) / len(row.logits)
        sigma = math.sqrt(sum((logit - mean) ** 2 for logit in row.logits) / len(row.logits))
        return [logit if logit >= max(row.logits) - params.n * sigma else -math.inf for logit in row.logits]


def test_a_threshold_that_rounding_may_decide_is_no_fault() -> None:
    known = Subject.find(TwoSigma, claims=TwoSigmas).known
    case = """
        subject: two_sigma
        model: {vocab_size: 2, table: {any: [0.0, 1.0]}}
        requests: [{strategy: kit_greedy, plugins: [two_sigma: {n: N, rounding: ROUNDING}]}]
    """
    for rounding in ("0", "1.0e-13"):
        REFERENCE.check(case.replace("ROUNDING", rounding).replace("N,", "2,"), known)
    with pytest.raises(Broken, match="and claims to make 0 of it"):
        REFERENCE.check(case.replace("ROUNDING", "1.0e-3").replace("N,", "2.001,"), known)


def test_claims_that_fail_or_do_not_fit_are_named() -> None:
    class Fails:
        @staticmethod
        def transform(params: Any, row: Row) -> list[float]:
            raise ZeroDivisionError("as it was asked to")

    class Short:
        @staticmethod
        def transform(params: Any, row: Row) -> list[float]:
            return []

    assert_broken(REFERENCE, KeepHalves, "its claim `transform` failed: ZeroDivisionError", Fails)
    assert_broken(REFERENCE, KeepHalves, "gives 0 numbers for 2 tokens", Short)


def test_nothing_is_compared_where_nothing_is_claimed() -> None:
    assert "it claims none of transform, texts, finishes" in tried(REFERENCE, KeepHalves).reason


# ---- distribution ----------------------------------------------------------------------------------------------------


class Inverse(Plugin):
    """Draw by the inverse of the cumulative distribution: lawful, and base of those that are not."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        cumulative = self.probs(logits).cumsum(-1)
        token = (cumulative <= self.numbers(step).unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
        return Growth(row=torch.arange(len(logits)), token=token)

    def probs(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)

    def numbers(self, step: Step) -> Tensor:
        return step.uniform("inverse")


class Flat(Inverse):
    """Draw from a distribution that is a little flatter."""

    def probs(self, logits: Tensor) -> Tensor:
        return (logits / 1.02).softmax(-1)


class Squared(Inverse):
    """Draw with noise that is not uniform."""

    def numbers(self, step: Step) -> Tensor:
        return step.uniform("inverse") ** 1.05


class Floor(Inverse):
    """Take what is forbidden for what is unlikely."""

    def probs(self, logits: Tensor) -> Tensor:
        return logits.clamp(min=-6).softmax(-1)


class OneForAll(Inverse):
    """Leave the stream out of the noise."""

    def numbers(self, step: Step) -> Tensor:
        return step.uniform("inverse")[step.grid[step.request, 0]]


class TwoDecisions(Plugin):
    """Draw twice with two numbers: take the best token, or draw among all."""

    row_local = True
    second = "which"

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        cumulative = logits.softmax(-1).cumsum(-1)
        drawn = (cumulative <= step.uniform(self.second).unsqueeze(-1)).sum(-1).clamp(max=logits.shape[-1] - 1)
        token = torch.where(step.uniform("whether") < 0.5, logits.argmax(-1), drawn)
        return Growth(row=torch.arange(len(logits)), token=token)


class OneDecision(TwoDecisions):
    """Draw both with the same number."""

    second = "whether"


class HalfBest:
    """Claim to take the best token half of the time."""

    @staticmethod
    def distribution(params: Any, row: Row) -> list[float]:
        """Mix."""
        best = list(row.logits).index(max(row.logits))
        drawn = host_claims.Drawn.distribution(params, row)
        return [p / 2 + (0.5 if token == best else 0) for token, p in enumerate(drawn)]


class Twins(Plugin):
    """Give every row two children."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        row = torch.arange(len(logits))
        return Growth(row=row.repeat(2), token=torch.cat([torch.zeros_like(row), torch.ones_like(row)]))


def test_a_sampler_with_the_claimed_frequencies_passes() -> None:
    assert_holds(DISTRIBUTION, Inverse, host_claims.Drawn)
    assert_holds(DISTRIBUTION, TwoDecisions, HalfBest)
    assert_holds(DISTRIBUTION, hosts.Drawn, host_claims.Drawn)
    assert_holds(DISTRIBUTION, hosts.Likeliest, host_claims.Likeliest)


@pytest.mark.parametrize("wrong", [Flat, Squared, Floor, hosts.Likeliest])
def test_a_sampler_with_other_frequencies_is_caught(wrong: type[Plugin]) -> None:
    assert_broken(DISTRIBUTION, wrong, "it chooses token", host_claims.Drawn)


def test_one_number_for_two_decisions_is_caught() -> None:
    assert_broken(DISTRIBUTION, OneDecision, "it chooses token", HalfBest)


def test_a_distribution_is_of_one_child_a_row() -> None:
    assert_broken(DISTRIBUTION, Twins, "gives a row more than one child", host_claims.Drawn)


def test_a_claim_that_is_no_distribution_is_named() -> None:
    class Half:
        @staticmethod
        def distribution(params: Any, row: Row) -> list[float]:
            return [0.5] + [0.0] * (len(row.logits) - 1)

    assert_broken(DISTRIBUTION, Inverse, "numbers for all tokens that add up to 1", Half)


def test_streams_that_draw_the_same_are_caught() -> None:
    assert_holds(INDEPENDENCE, Inverse, host_claims.Drawn)
    assert_holds(INDEPENDENCE, hosts.Likeliest, host_claims.Likeliest)
    assert_broken(INDEPENDENCE, OneForAll, "times are claimed", host_claims.Drawn)


def test_a_text_that_cannot_be_is_caught() -> None:
    assert_broken(INDEPENDENCE, Inverse, "by the claims it has probability 0", host_claims.Likeliest)


# ---- constraint ------------------------------------------------------------------------------------------------------


class Rising(Plugin):
    """No token is lower than the one before it: lawful, and base of those that are not. The state is the last token."""

    row_local = True
    constraint = True

    def initial(self, request: PreparedRequest) -> int:
        return 0

    def advance(self, state: int, token: int, logprob: float = 0.0) -> int | None:
        return token if token >= state else None

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        for row, last in enumerate(step.states(self)):
            self.mask(logits[row], last)

    def mask(self, logits: Tensor, last: int) -> None:
        logits[:last] = -torch.inf


class Rises:
    """Claim that no token is lower than the one before it."""

    @staticmethod
    def allows(params: Any, request: Any, tokens: Sequence[int], ended: bool) -> bool:
        """Compare neighbours."""
        return all(one <= other for one, other in pairwise(tokens))


class Loud(Rising):
    """Raise what is allowed."""

    def mask(self, logits: Tensor, last: int) -> None:
        super().mask(logits, last)
        logits[last:] += 1


class Reviving(Rising):
    """Let a token through that others forbade, so that there is always one."""

    def mask(self, logits: Tensor, last: int) -> None:
        super().mask(logits, last)
        if bool((logits == -torch.inf).all()):
            logits[-1] = 0.0


class Late(Rising):
    """Mask one token too few."""

    def mask(self, logits: Tensor, last: int) -> None:
        logits[: max(0, last - 1)] = -torch.inf


class LateEverywhere(Late):
    """Mask one token too few, and advance over it."""

    def advance(self, state: int, token: int, logprob: float = 0.0) -> int | None:
        return token if token >= state - 1 else None


class Strict(Rising):
    """Forbid equal tokens too."""

    def mask(self, logits: Tensor, last: int) -> None:
        if last:
            logits[: last + 1] = -torch.inf


class Waits(Rising):
    """Act after the others."""

    @hookimpl(trylast=True)
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        for row, last in enumerate(step.states(self)):
            self.mask(logits[row], last)


def test_a_constraint_that_keeps_its_language_passes() -> None:
    assert_holds(CONSTRAINT, Rising, Rises)
    assert_holds(CONSTRAINT, Rising)
    assert_holds(CONSTRAINT, hosts.NoDoubles, host_claims.NoDoubles, lies=False)


@pytest.mark.parametrize(
    ("wrong", "how"),
    [
        (Loud, "it may leave it or forbid it"),
        (Reviving, "it may leave it or forbid it"),
        (Late, "`advance` calls it impossible"),
        (Waits, "acts before it"),
    ],
)
def test_a_constraint_that_is_at_odds_with_itself_is_caught(wrong: type[Plugin], how: str) -> None:
    assert_broken(CONSTRAINT, wrong, how)


def test_a_constraint_that_forbids_too_little_or_too_much_is_caught() -> None:
    assert_broken(CONSTRAINT, LateEverywhere, "and claims ", Rises)
    assert_broken(CONSTRAINT, Strict, "and claims to allow it", Rises)


# ---- scores ----------------------------------------------------------------------------------------------------------


class Mean(hosts.NarrowSearch):
    """Rank by the mean log-probability: lawful, and base of those that are not."""

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        super().stop_check(step, growth)
        assert growth.score is not None
        for child, row in enumerate(growth.row.tolist()):
            if growth.finish[child] is not None:
                growth.score[child] /= self.length(step, row, growth.finish[child])

    def length(self, step: Step, row: int, reason: str | None) -> int:
        return int(step.length[row]) + 1


class MeanWithoutEnd(Mean):
    """Leave the end token out of the length."""

    def length(self, step: Step, row: int, reason: str | None) -> int:
        return int(step.length[row]) + (1 if reason != "eos" else int(step.length[row] == 0))


class Means:
    """Claim the mean log-probability, the end token counted."""

    @staticmethod
    def score(params: Any, request: Any, tokens: Sequence[int], finish_reason: str, logprobs: Sequence[float]) -> float:
        """Divide the sum."""
        return sum(logprobs) / len(tokens)

    exhaustive = staticmethod(host_claims.NarrowSearch.exhaustive)


class Scribbles(Plugin):
    """Write to what the model said."""

    row_local = True

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        step.raw[:, 0] += 1


class Masks(Plugin):
    """Write to the logits in select."""

    row_local = True

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        token = logits.argmax(-1)
        logits[:, 1:] -= 1
        return Growth(row=torch.arange(len(logits)), token=token)


class Mothers(hosts.NarrowSearch):
    """Take the score of another row."""

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        growth = super().select(step, logits)
        assert growth.score is not None
        growth.score += step.score[:, 0].flip(0)[growth.row] - step.score[growth.row, 0]
        return growth


def test_scores_that_add_up_pass() -> None:
    assert_holds(SCORES_ADD_UP, hosts.NarrowSearch, host_claims.NarrowSearch)
    assert_holds(SCORES_ADD_UP, hosts.Particles, host_claims.Particles)
    assert_holds(SCORES_ADD_UP, Mean, Means)
    assert_holds(SCORES_ADD_UP, hosts.Drawn)
    assert_holds(SCORES_ADD_UP, Coin)


def test_scores_that_do_not_add_up_are_caught() -> None:
    assert_broken(SCORES_ADD_UP, MeanWithoutEnd, "and the claim is", Means)
    assert_broken(SCORES_ADD_UP, Mothers, "and the claim is", host_claims.NarrowSearch, width=3, children=3)
    assert_broken(SCORES_ADD_UP, Scribbles, "by what the model says")
    assert_broken(SCORES_ADD_UP, Masks, "by what `select` saw")


# ---- ranking ---------------------------------------------------------------------------------------------------------


class Forgets(hosts.NarrowSearch):
    """Drop what ended among the second half of the children."""

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        for child in range(len(growth.row) // 2, len(growth.row)):
            growth.drop[child] = growth.finish[child] == "eos"
        super().stop_check(step, growth)


class RanksTheSum(Mean):
    """Rank by the mean, and stop when the best sum cannot come back: it can, as means grow."""

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        super().stop_check(step, growth)
        for request in set(growth.request[[f == "eos" for f in growth.finish]].tolist()):
            growth.drop |= (growth.request == request) & torch.tensor([f is None for f in growth.finish])


def test_a_search_that_finds_all_passes() -> None:
    assert_holds(RANKING, hosts.NarrowSearch, host_claims.NarrowSearch)
    assert_holds(RANKING, Mean, Means)


def test_a_search_that_overlooks_something_is_caught() -> None:
    assert_broken(RANKING, Forgets, "are possible", host_claims.NarrowSearch)
    assert_broken(RANKING, RanksTheSum, "possible", Means)


def test_order_is_that_of_streams_or_of_scores() -> None:
    for plugin in (hosts.Drawn, hosts.Forks, hosts.Particles, hosts.NarrowSearch):
        assert_holds(RANKING, plugin)
