"""Every installed plugin keeps every law that applies to it, with few cases; `make proof` tries many."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test
from transformers import MaxLengthCriteria, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper

from unspool_testing import LAWS, Case, Subject, engine_machine, prove
from unspool_testing.known import KIT
from unspool_testing.proof import applicable

INSTALLED = sorted(name for entry in Subject.find("greedy").known.registry if (name := entry.name) not in KIT)
HOSTS = ["kit_search", "kit_forks", "kit_particles", "kit_holds"]
"""The kit's own strategies, which search, fork, resample and hold: what is proved with them must be right itself."""
EXAMPLES = 6
"""Cases for each law and plugin. There are hundreds of pairs, and plugins that are alike share what they try."""

SUBJECTS = {name: Subject.find(name) for name in [*INSTALLED, *HOSTS]}
WRAPPED = {
    "a processor": TopKLogitsWarper(2),
    "a processor that reads the path": RepetitionPenaltyLogitsProcessor(1.3),
    "a criterion": MaxLengthCriteria(4),
}
PAIRS = [(name, law) for name, subject in SUBJECTS.items() for law in LAWS if not applicable(LAWS[law], subject)]


@pytest.mark.parametrize(("name", "law"), PAIRS, ids=[f"{name}-{law}" for name, law in PAIRS])
def test_an_installed_plugin_keeps_the_law(name: str, law: str) -> None:
    strategy = SUBJECTS[name].is_strategy
    verdict = prove(LAWS[law], SUBJECTS[name], examples=4 * EXAMPLES if strategy else EXAMPLES)
    assert verdict.status != "broken", verdict.counterexample


@pytest.mark.parametrize("what", WRAPPED)
def test_a_wrapped_object_of_transformers_keeps_all_laws(what: str) -> None:
    subject = Subject.find(WRAPPED[what])
    verdicts = [prove(law, subject, examples=EXAMPLES) for law in LAWS.values()]
    assert not [verdict.counterexample for verdict in verdicts if verdict.status == "broken"]
    assert sum(verdict.status == "held" for verdict in verdicts) >= 8


@pytest.mark.parametrize("name", [*(name for name in INSTALLED if SUBJECTS[name].is_strategy), *HOSTS])
def test_the_engine_keeps_its_books_whatever_is_done_to_it(name: str) -> None:
    machine = engine_machine(name)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=15, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


def test_every_law_applies_to_somebody() -> None:
    assert {law for _, law in PAIRS} == set(LAWS)


def test_a_case_that_is_written_and_read_again_is_the_same() -> None:
    text = """
        subject: top_p
        model: {vocab_size: 3, table: {any: [0.0, 1.0, 2.0], 2 2: [5.0, 0.0, 0.0]}}
        requests:
        - {strategy: kit_sample, plugins: [{top_p: 0.5}], prompt: [1], max_new_tokens: 3}
        schedule: {spare_slots: 0, cancels: {0: 2}}
    """
    case = Case.read(text)
    assert case.model.table == {(): (0.0, 1.0, 2.0), (2, 2): (5.0, 0.0, 0.0)}
    assert case.schedule.cancels == {0: 2}
    assert Case.read(case.write()) == case


def test_a_guess_that_has_run_is_not_run_again_when_a_strategy_holds_it() -> None:
    LAWS["cost"].check(
        """
        subject: lookahead
        model: {vocab_size: 4, seed: 1, memory: 1}
        requests:
        - strategy: contrastive_search
          plugins: [{lookahead: {ngram: 3}}]
          prompt: [3, 2, 1, 3]
          min_new_tokens: 4
          end_ids: [0, 1]
          seed: 4
        """
    )


def test_a_row_stays_held_when_the_request_whose_plugins_were_called_ends() -> None:
    """Equal pipelines of two requests are two objects, and a group calls those of its first request."""
    case = Case.read(
        """
        subject: kit_holds
        model: {memory: 0}
        requests:
        - {strategy: kit_holds, prompt: [0], max_new_tokens: 1, min_new_tokens: 1}
        - {strategy: kit_holds, prompt: [0], max_new_tokens: 1}
        schedule: {spare_slots: 0, preempts: [1]}
        """
    )
    LAWS["batch_invariance"].check(case, Subject.find("kit_holds").known)
