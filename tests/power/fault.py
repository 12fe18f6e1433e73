"""A planted fault: a slip that a good programmer makes, in a plugin or in the core, and the law that finds it.

`prove` must break the law on the plugin `of` while the slips are planted, and must not without them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from power.slips import Slip
from unspool.plugin import Plugin
from unspool_testing import LAWS, Subject, Verdict, prove

EXAMPLES = 3000
"""How many cases are tried at most. Nearly all faults are found within a few dozen; the rarest took 280 on average.

Which cases a seed draws changes with every constant in our source, since Hypothesis draws those too. So a limit close
to what is needed would find all faults today and miss one or two after the next commit that has nothing to do with
them. A limit far above costs nothing where the fault is found.
"""


@dataclass(frozen=True)
class Fault:
    """A planted fault.

    Args:
        name: what is wrong, in a sentence.
        of: the plugin on which a law finds it: installed, of the kit, or a class.
        law: the law that finds it.
        slips: the changes.
        claims: what the plugin claims, where it has no claims of its own.
        params: parameters of the plugin that are not drawn.
    """

    name: str
    of: str | type[Plugin]
    law: str
    slips: tuple[Slip, ...]
    claims: type | None = None
    params: Mapping[str, Any] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Name the functions and classes that are changed."""
        return ", ".join(dict.fromkeys(slip.where for slip in self.slips))

    @property
    def subject(self) -> Subject:
        """Give the plugin, ready to be proved."""
        return Subject.find(self.of, params=self.params, claims=self.claims)

    def find(self, *, examples: int = EXAMPLES, seed: int = 0, shrink: bool = False) -> Verdict:
        """Plant the fault and try to break its law.

        Args:
            examples: how many cases to try at most.
            seed: chooses the cases.
            shrink: look for the smallest case that breaks it, which takes longer than finding one.
        """
        with self.planted():
            return prove(LAWS[self.law], self.subject, examples=examples, seed=seed, shrink=shrink)

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Plant the fault for as long as the context lasts."""
        with pytest.MonkeyPatch.context() as monkeypatch:
            for slip in self.slips:
                slip.plant(monkeypatch)
            yield


def fault(
    name: str, of: str | type[Plugin], law: str, *slips: Slip, claims: type | None = None, **params: Any
) -> Fault:
    """Describe a fault."""
    return Fault(name, of, law, slips, claims, params)
