"""Faults in drafters, in `rejection`, and in what the core makes of drafts."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool.drafting import Drafting
from unspool.grow import Grower
from unspool.rounds import Rounds
from unspool_speculative.rejection import Rejection

FAULTS: tuple[Fault, ...] = (
    fault(
        "drafts of one request are judged as another's",
        "rejection",
        "batch_invariance",
        edit(Rejection.select, "owns[request].get((stream, node))", "owns[0].get((stream, node))"),
    ),
    fault(
        "branches of new streams wait though they have run",
        "lookahead",
        "cost",
        edit(Rounds._run_ahead, "left.append((live, branch))", "pass"),
    ),
    fault(
        "a guess that has run is run again when a strategy holds it",
        "lookahead",
        "cost",
        edit(Grower._hold, "draft.kept is None and self.group.ran(node)", "False"),
    ),
    fault(
        "a pass is made for guesses alone",
        "asap",
        "speculation_is_invisible",
        edit(Drafting._hang_below, "group.give_up_idle_guesses()", "pass"),
    ),
)
