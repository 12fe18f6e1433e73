"""Children that wait for the next step, though the pass has run their nodes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from unspool.hooks import Growth
from unspool.pipeline import Pipeline
from unspool.plugin import Parameters, hookimpl
from unspool.step import Step
from unspool_testing.compare import check_speculation, texts, with_plugin
from unspool_testing.drafters import GuessTrees, Recall
from unspool_testing.driver import alone, plugin, recording, request
from unspool_testing.hosts import Likeliest
from unspool_testing.table import TableModel

MODEL = TableModel(4, seed=2)


class Patient(Likeliest):
    """Take what is likeliest, each stream from a first token of its own; those before `until` wait in each step."""

    class Params(Parameters):
        until: int = 0

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        token = logits.argmax(-1).where(step.length > 0, step.stream)
        return Growth(row=torch.arange(len(logits)), token=token, waits=step.stream < self.params.until)


class PatientTogether(Patient):
    """The same, but its rows are said to depend on each other."""

    row_local = False

    def start(self, request: object) -> int:
        return 3


@pytest.mark.parametrize("until", [0, 1, 2, 3])
def test_who_waits_grows_by_a_token_a_step_and_the_others_by_all_their_drafts(until: int) -> None:
    plain = Pipeline(plugin(Patient, until=until))
    one = request(plain, (3,), n=3, max_new_tokens=5, end_ids=())
    known = tuple(tokens for tokens, _ in texts(alone(MODEL, [one])[0]))
    with recording() as runs:
        result = check_speculation(MODEL, one, plain, with_plugin(plain, plugin(Recall, texts=known)))
    assert result.stats.forward_passes == (5 if until else 1)
    assert result.stats.accepted == 4 * (3 - until), "what waits is not accepted"
    rows = [row for record in runs[-1].records if record["event"] == "round" for row in record["rows"]]
    shown = [(row["stream"], child["finish"]) for row in rows for child in row["children"] if child["accepted"]]
    assert len(shown) == result.stats.accepted
    assert all(stream >= until and finish is None for stream, finish in shown)


def test_where_rows_depend_on_each_other_all_wait_for_one() -> None:
    for until, passes in ((0, 1), (1, 5)):
        plain = Pipeline(plugin(PatientTogether, until=until))
        one = request(plain, (3,), n=3, max_new_tokens=5, end_ids=())
        known = tuple(tokens for tokens, _ in texts(alone(MODEL, [one])[0]))
        recalling = with_plugin(plain, plugin(Recall, texts=known))
        assert check_speculation(MODEL, one, plain, recalling).stats.forward_passes == passes


def test_it_waits_whatever_is_guessed() -> None:
    for kind in (Patient, PatientTogether):
        plain = Pipeline(plugin(kind, until=2))
        one = request(plain, (3,), n=3, max_new_tokens=5, end_ids=(1,))
        check_speculation(MODEL, one, plain, with_plugin(plain, plugin(GuessTrees, seed=1, vocab_size=4, width=2)))
