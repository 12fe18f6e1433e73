"""Four laws that take no time, in the place of the real ones."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st

from unspool_testing import expected, laws, proving
from unspool_testing.case import Asked, Case
from unspool_testing.known import Known
from unspool_testing.law import Broken, Check, Law


def check_holds(case: Case | str, known: Known | None = None) -> None:
    pass


def check_breaks(case: Case | str, known: Known | None = None) -> None:
    raise Broken("it gave 3, not 4\nand more")


def law(name: str, check: Check = check_holds, excuse: str | None = None) -> Law:
    def cases(subject: object) -> st.SearchStrategy[Case]:
        asked = st.builds(Asked, strategy=st.just("kit_greedy"), prompt=st.tuples(st.integers(0, 99)))
        return st.builds(Case, subject=st.just("greedy"), requests=st.tuples(asked))

    return Law(name, f"What {name} says.", f"Why {name} matters.", check, cases, lambda subject: excuse, examples=9)


@pytest.fixture
def few_laws(monkeypatch: pytest.MonkeyPatch) -> dict[str, Law]:
    made = [
        law("holds"),
        law("breaks", check_breaks),
        law("holds_too"),
        law("is_about_others", excuse="it is no beam"),
    ]
    named = {one.name: one for one in made}
    for module in (laws, expected, proving):
        monkeypatch.setattr(module, "LAWS", named)
    return named
