"""Every planted fault is found by the law that should find it, in a case that can be written down and run again."""

from __future__ import annotations

from collections import Counter

import pytest

from power.catalogue import FAULTS
from power.fault import Fault
from power.write_page import PAGE, listed
from unspool_testing import LAWS, Case


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found_and_its_case_reproduces_it(fault: Fault) -> None:
    law, subject = LAWS[fault.law], fault.subject
    verdict = fault.find()
    with fault.planted():
        assert verdict.status == "broken"
        assert verdict.case is not None
        case = Case.read(verdict.case.write())
        assert case == verdict.case
        with pytest.raises(Exception):  # noqa: B017, PT011 - a fault may also make the engine itself stumble
            law.check(case, subject.known)
    law.check(case, subject.known)


def test_there_are_many_faults_of_every_kind() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 30
    assert {fault.law for fault in FAULTS} == set(LAWS), "every law has a fault that it finds"
    of_the_core = sum(fault.where.startswith("unspool.") for fault in FAULTS)
    assert min(of_the_core, len(FAULTS) - of_the_core) >= 15


def test_the_page_lists_exactly_these_faults() -> None:
    assert Counter(listed(PAGE.read_text("utf-8"))) == Counter((fault.name, fault.where, fault.law) for fault in FAULTS)
