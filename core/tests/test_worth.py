"""Drafts are run where they save more time than they take, and never change what is said."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from unspool.pipeline import Pipeline
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool.runner import Batch, Output
from unspool.schedule import Plan
from unspool.step import Step
from unspool.worth import FORGET, LEAST, PATIENCE, REST, TRIAL, Pace, Record, Trial, Worth
from unspool_testing.compare import check_equal, check_speculation
from unspool_testing.driver import alone, drive, plugin, request
from unspool_testing.hosts import Likeliest
from unspool_testing.table import TableModel


def learnt(seconds: dict[int, float], passes: int = 40) -> Pace:
    pace = Pace()
    for _ in range(passes):
        for tokens, value in seconds.items():
            pace.observe(tokens, value)
    return pace


def estimate(pace: Pace, *tokens: int) -> list[float]:
    return pace.seconds(tokens)


def test_what_is_known_of_a_size_is_its_time_and_between_sizes_it_rises() -> None:
    pace = learnt({1: 0.03, 8: 0.05, 32: 0.2})
    assert estimate(pace, 1, 8, 32) == pytest.approx([0.03, 0.05, 0.2], rel=0.02)
    between = estimate(pace, *range(1, 33))
    assert between == sorted(between)


def test_a_size_that_is_unknown_is_thought_to_take_what_will_have_it_tried() -> None:
    """In a known band half of what its tokens are more, beyond it nothing at first, and then what they are."""
    pace = learnt({4: 0.04})
    assert estimate(pace, 2, 4, 8) == pytest.approx([0.03, 0.04, 0.06])
    assert estimate(pace, 1, 16, 32) == pytest.approx([0.015, 0.04 * 16 / 6, 0.04 * 32 / 6])
    assert estimate(Pace(), 1, 16, 32) == [1.0, 1.0, 2.0]
    assert estimate(Pace(), 32, 40, 80) == [1.0, 1.0, 2.0], "of no size at all too"


def test_a_pass_of_nothing_takes_what_a_token_does() -> None:
    pace = learnt({0: 0.03})
    assert estimate(pace, 0, 1) == pytest.approx([0.03, 0.03])


def test_a_token_that_needs_other_code_is_told_from_one_more_of_the_same() -> None:
    """Eight tokens take 14 ms and nine 23: known apart, though they are neighbours."""
    pace = learnt({4: 0.0120, 8: 0.0136, 9: 0.0230, 32: 0.0345})
    assert estimate(pace, 4, 6, 8, 9, 16, 32) == pytest.approx([0.012, 0.0128, 0.0136, 0.023, 0.0265, 0.0345], rel=0.01)


def test_what_a_token_costs_is_learnt_from_passes_of_all_sizes() -> None:
    """Whatever else slows them: the same passes, some of them slower by a tenth, one in a hundred by twice."""
    generator, pace = np.random.default_rng(0), Pace()
    for _ in range(400):
        tokens = 32 + int(generator.integers(0, 12))
        pace.observe(tokens, (0.006 + 0.001 * tokens) * generator.choice([1, 1.1, 2], p=[0.6, 0.39, 0.01]))
    few, more = estimate(pace, 32, 44)
    assert more - few == pytest.approx(0.0125, rel=0.25)


def test_a_slower_machine_is_slower_at_every_size() -> None:
    pace = learnt({1: 0.03, 8: 0.06})
    for _ in range(60):
        pace.observe(1, 0.06)
    one, eight = estimate(pace, 1, 8)
    assert one == pytest.approx(0.06, rel=0.05) and eight > 0.08


def test_the_first_pass_of_a_size_and_hiccups_condemn_it_for_no_time() -> None:
    pace = learnt({1: 0.03})
    pace.observe(2, 3.0)
    assert estimate(pace, 2)[0] == pytest.approx(0.03, rel=0.02), "the first says nothing"
    pace.observe(2, 0.04)
    assert estimate(pace, 2)[0] == pytest.approx(0.04, rel=0.02)
    for _ in range(5):
        pace.observe(2, 0.04)
    pace.observe(2, 3.0)
    one, two = estimate(pace, 1, 2)
    assert two / one == pytest.approx(4 / 3, rel=0.05), "the machine seems slower, and no size more than another"


def test_what_has_not_come_for_long_is_unknown_again_and_will_be_tried() -> None:
    pace = learnt({1: 0.03})
    pace.observe(2, 3.0)
    pace.observe(2, 3.0)
    assert estimate(pace, 2)[0] > 1
    for _ in range(FORGET + 1):
        pace.observe(1, 0.03)
    assert estimate(pace, 2)[0] == pytest.approx(0.03, rel=0.1)


def test_a_record_begins_with_what_the_drafter_says_and_ends_with_what_was_true() -> None:
    record = Record(keep=0.99, fade=0.99)
    assert record.mean(("a", 1), 0.7) == 0.7
    for number in range(100):
        record.note(("a", 1), number % 4 == 0)
    assert record.mean(("a", 1), 0.7) == pytest.approx(0.25, abs=0.06)
    for _ in range(1000):
        record.age()
    assert record.mean(("a", 1), 0.7) == pytest.approx(0.7, abs=0.01), "what was long ago is forgotten"


class Hopeful(Plugin):
    """Hang the same chain below every row, with the confidence that it is told."""

    row_local = True

    class Params(Parameters):
        tokens: tuple[int, ...]
        confidence: float | None = 0.9

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        nodes, sure = step.node, self.params.confidence
        for token in self.params.tokens:
            nodes = step.draft(nodes, [token] * len(nodes), None, None if sure is None else [sure] * len(nodes))


SAME: dict[tuple[int, ...], list[float]] = {(): [0.0, -9.0, -9.0, 9.0]}
"""Whatever stands before it, 3 follows."""


def hopeful(tokens: tuple[int, ...], confidence: float | None = 0.9) -> tuple[Pipeline, Pipeline]:
    plain = Pipeline(plugin(Likeliest))
    return plain, Pipeline(plain.strategy, [plugin(Hopeful, tokens=tokens, confidence=confidence)])


class Linear(TableModel):
    """A model that takes its time, by a clock of its own: as much for every token."""

    now = 0.0

    def forward(self, batch: Batch) -> Output:
        Linear.now += len(batch.token_ids)
        return super().forward(batch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unspool.drafting.time", SimpleNamespace(perf_counter=lambda: Linear.now))


@pytest.mark.usefixtures("clock")
def test_right_guesses_pay_and_wrong_ones_are_given_up_where_each_row_takes_its_time() -> None:
    plain, wrong = hopeful((1, 1, 1, 1))
    asked = request(plain, (2,), max_new_tokens=60, end_ids=())
    result = check_speculation(Linear(4, table=SAME), asked, plain, wrong)
    assert result.stats.accepted == 0 and result.stats.drafted < 60, "of 240 that were hung"
    _, right = hopeful((3, 3, 3, 3))
    result = alone(TableModel(4, table=SAME), [request(right, (2,), max_new_tokens=60, end_ids=())])[0]
    assert result.stats.forward_passes < 30 and result.stats.accepted > 30


@pytest.mark.usefixtures("clock")
def test_without_a_confidence_all_drafts_are_run_whatever_they_cost() -> None:
    plain, wrong = hopeful((1, 1, 1, 1), None)
    asked = request(plain, (2,), max_new_tokens=20, end_ids=())
    assert check_speculation(Linear(4, table=SAME), asked, plain, wrong).stats.drafted >= 4 * 15


def test_a_confidence_outside_its_bounds_is_a_fault_of_the_drafter() -> None:
    _, bold = hopeful((1,), 1.5)
    result = alone(TableModel(4), [request(bold)])[0]
    assert "confidence must lie in [0, 1]" in str(result.error) and "'hopeful' failed in pre_forward" in str(
        result.error
    )


def test_counts_by_drafter_and_depth_add_up() -> None:
    _, right = hopeful((3, 3, 1), None)
    result = alone(TableModel(4, table=SAME), [request(right, (2,), max_new_tokens=30, end_ids=())])[0]
    drafts = result.stats.drafters["hopeful"]
    assert sum(drafts.run) == result.stats.drafted and sum(drafts.accepted) == result.stats.accepted
    assert drafts.accepted[2] == 0 < drafts.accepted[1] == drafts.accepted[0]
    assert result.to_dict()["stats"]["drafters"]["hopeful"]["run"] == drafts.run


@pytest.mark.usefixtures("clock")
def test_a_draft_below_which_another_hangs_for_certain_is_kept() -> None:
    class Below(Hopeful):
        pass

    plain = Pipeline(plugin(Likeliest))
    both = Pipeline(plain.strategy, [plugin(Hopeful, tokens=(1, 1)), plugin(Below, tokens=(1, 1, 1), confidence=None)])
    asked = request(plain, (2,), max_new_tokens=20, end_ids=())
    result = check_speculation(Linear(4, table=SAME), asked, plain, both)
    assert result.stats.drafters["hopeful"].run[0] >= 15


def test_one_request_learns_nothing_that_changes_another() -> None:
    model = TableModel(4, seed=2)
    _, wrong = hopeful((1, 2, 3))
    asked = [request(wrong, (2, i), max_new_tokens=20, end_ids=(), seed=i) for i in range(4)]
    for one, other in zip(alone(model, asked), drive(model, asked), strict=True):
        check_equal(one, other)


def test_drafts_that_lost_a_trial_rest_twice_as_long_each_time_and_begin_again() -> None:
    trial, rests = Trial(), []
    for saved in (-1.0, -1.0, -1.0, -1.0, 1.0, -1.0):
        for _ in range(TRIAL):
            assert trial.rest == 0, "a trial ends with its last step"
            trial.note(saved, 2.0 * TRIAL)
        rests.append(trial.rest)
        trial.rest = 0
    assert rests == [REST, 2 * REST, 4 * REST, 8 * REST, 0, REST]


def test_a_trial_that_loses_much_ends_early_and_one_that_loses_and_gains_goes_on() -> None:
    trial = Trial()
    for saved in (-0.2, 0.1, -0.1, 0.1, -0.15):
        trial.note(saved, 0.26)
        assert trial.rest == 0
    trial.note(-0.02, 0.26)
    assert (trial.rest, trial.left, trial.saved) == (REST, TRIAL, 0.0)


@pytest.mark.parametrize(("branches", "bearable"), [(1, 1.0), (2, 0.5), (8, PATIENCE), (32, PATIENCE)])
def test_what_drafts_may_lose_is_a_part_of_a_step_or_a_token(branches: int, bearable: float) -> None:
    """Looking for drafts in vain takes a ninth of each step."""
    worth = Worth()
    plan = Plan(ready=[SimpleNamespace(branches=range(branches), order=0)], tokens=branches)  # type: ignore[list-item]
    for _ in range(5):
        worth.begin(plan, [])
        worth.learn(plan, 0.0, 0.011)
    steps = 0
    while not worth._trial.rest:
        worth.begin(plan, [])
        worth.learn(plan, 0.0012, 0.011)
        steps += 1
    assert steps == int(bearable * 0.011 / 0.0012) + 1


class Laborious(Hopeful):
    """Think before any are hung, if they are taken at all, for as long as so many tokens take."""

    thoughts = 0

    class Params(Hopeful.Params):
        thought: float

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        if any(step.takes([1.0])):
            Linear.now += self.params.thought
            Laborious.thoughts += 1
        super().pre_forward(step)


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(("thought", "least", "most"), [(0.0, 168, 200), (0.5, 6, 20)])
def test_who_thinks_in_vain_for_longer_than_it_saves_is_asked_now_and_then(
    thought: float, least: int, most: int
) -> None:
    plain = Pipeline(plugin(Likeliest))
    wrong = Pipeline(plain.strategy, [plugin(Laborious, tokens=(1,), confidence=0.5, thought=thought)])
    Laborious.thoughts = 0
    result = alone(Linear(4, table=SAME), [request(wrong, (2,), max_new_tokens=200, end_ids=())])[0]
    assert result.stats.accepted == 0 and least <= Laborious.thoughts <= most


def test_beside_prompts_a_draft_costs_what_each_of_their_tokens_does() -> None:
    """A pass of 512 tokens takes 500 ms, eight branches alone 16: a token of theirs is worth two of a prompt's."""
    worth, plan = Worth(), Plan(ready=[SimpleNamespace(branches=range(8), order=0)], tokens=8)  # type: ignore[list-item]
    for tokens, prompts, seconds in ((8, 0, 0.016), (512, 504, 0.5)) * 10:
        plan.tokens, plan.prompts = tokens, prompts
        worth.begin(plan, [])
        worth.learn(plan, 0.0, seconds)
    worth.begin(plan, [])
    assert worth.least == pytest.approx(8 / 0.016 * 0.5 / 512, rel=0.01)


def test_rows_that_are_free_only_after_others_are_not_free() -> None:
    """Up to 64 tokens each takes a millisecond; more are thought to take nothing, since 100 did not take longer."""
    worth, plan = Worth(), Plan(ready=[SimpleNamespace(branches=range(32), order=0)])  # type: ignore[list-item]
    for plan.tokens, seconds in ((32, 0.032), (64, 0.064), (100, 0.064)) * 10:
        worth.begin(plan, [])
        worth.learn(plan, 0.0, seconds)
    plan.tokens = 32
    worth.begin(plan, [])
    assert worth.least == pytest.approx(32 / 0.032 * 0.032 / 64, rel=0.05)


def test_drafts_that_fill_a_band_are_weighed_whatever_their_number() -> None:
    """Five tokens take 10 ms, 9 to 64 take 20: one draft takes least where there are 59, which is no power of two."""
    worth, plan = Worth(), Plan(ready=[SimpleNamespace(branches=range(5), order=0)])  # type: ignore[list-item]
    for plan.tokens, seconds in ((2, 0.007), (8, 0.013), (12, 0.02), (64, 0.02), (100, 0.04)) * 10:
        worth.begin(plan, [])
        worth.learn(plan, 0.0, seconds)
    plan.tokens = 5
    worth.begin(plan, [])
    assert worth.least == pytest.approx(5 / 0.01 * 0.01 / 59, rel=0.05)


def test_beside_a_short_prompt_a_draft_costs_what_a_longer_pass_does() -> None:
    """A pass of 8 tokens takes no longer than one of 2: nor does one of 8 of which one is of a prompt."""
    worth, plan = Worth(), Plan(ready=[SimpleNamespace(branches=range(1), order=0)])  # type: ignore[list-item]
    for plan.tokens in (2, 8) * 10:
        worth.begin(plan, [])
        worth.learn(plan, 0.0, 0.01)
    plan.tokens, plan.prompts = 3, 1
    worth.begin(plan, [])
    assert worth.least == LEAST


@pytest.mark.usefixtures("clock")
def test_before_anything_is_known_a_large_batch_is_not_flooded_with_guesses() -> None:
    """Thirty-two rows with four guesses each were passes of 160 tokens, three times, before their time was known."""
    _, wrong = hopeful((1, 1, 1, 1), 0.5)
    sizes = []

    class Counting(Linear):
        def forward(self, batch: Batch) -> Output:
            sizes.append(len(batch.token_ids))
            return super().forward(batch)

    asked = [request(wrong, (2,), max_new_tokens=8, end_ids=(), seed=seed) for seed in range(32)]
    drive(Counting(4, table=SAME), asked)
    assert max(sizes) <= 32 + 32 // 4


def test_the_likeliest_of_many_are_believed_as_far_as_they_came_true() -> None:
    """A draft takes a tenth of a step of four, so it pays where two in five come true. All seem to, and none does."""

    def draft() -> SimpleNamespace:
        live = SimpleNamespace(record=Record(keep=0.99, fade=0.99), counts=SimpleNamespace(note_draft=lambda *_: None))
        what = {"runs": True, "held": False, "chosen": False, "gained": False, "confidence": 0.9, "chance": 0.9}
        return SimpleNamespace(live=live, plugin=None, base=0, parent=0, **what)

    worth, plan = Worth(), Plan(ready=[SimpleNamespace(branches=range(4), order=0)], tokens=4)  # type: ignore[list-item]
    kept = []
    for _ in range(100):
        drafts = {1: draft(), 2: draft()}
        group: Any = SimpleNamespace(lives=(), drafts=drafts, tree=SimpleNamespace(length=[0] * 3), forget=drafts.pop)
        worth.begin(plan, [group])
        worth.keep_the_best()
        kept.append(len(drafts))
        worth.learn(plan, 0.0, 0.01 * (1 + 0.1 * len(drafts)))
        worth._trials.clear()
    assert kept[0] == 2
    assert sum(kept[20:]) <= 80 / 4, "now and then, to see whether that is still so"


def test_other_requests_are_tried_however_the_last_ones_lost() -> None:
    trial = Trial(rest=64, next_rest=128)
    trial.renew(1 / 8)
    assert (trial.rest, trial.next_rest) == (56, 112), "of eight requests one is new"
    trial.renew(1)
    assert (trial.rest, trial.next_rest) == (0, REST)


def test_a_new_request_ends_a_rest_and_one_that_goes_on_does_not() -> None:
    worth, live = Worth(), SimpleNamespace(branches=range(1), order=0)
    worth.begin(Plan(ready=[live], tokens=1), [])  # type: ignore[list-item]
    worth._trials[0] = Trial(rest=64)
    worth.begin(Plan(ready=[live], tokens=1), [])  # type: ignore[list-item]
    assert worth.rests and worth._trials[0].rest == 63
    live.order = 1
    worth.begin(Plan(ready=[live], tokens=1), [])  # type: ignore[list-item]
    assert not worth.rests
