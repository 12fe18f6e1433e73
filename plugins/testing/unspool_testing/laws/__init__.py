"""The laws, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Mapping

from unspool_testing.law import Law
from unspool_testing.laws.batch import BATCH_INVARIANCE
from unspool_testing.laws.cache import CACHE_EQUALS_RECOMPUTE
from unspool_testing.laws.config import CONFIG_ROUND_TRIP
from unspool_testing.laws.conservation import CONSERVATION
from unspool_testing.laws.constraint import CONSTRAINT
from unspool_testing.laws.cost import COST
from unspool_testing.laws.distribution import DISTRIBUTION, INDEPENDENCE
from unspool_testing.laws.faults import FAULT_ISOLATION
from unspool_testing.laws.path import PATH_PURITY
from unspool_testing.laws.reference import REFERENCE
from unspool_testing.laws.scores import RANKING, SCORES_ADD_UP
from unspool_testing.laws.speculation import SPECULATION_IS_INVISIBLE
from unspool_testing.laws.statelessness import STATELESSNESS
from unspool_testing.laws.stop import STOP_IS_EXACT
from unspool_testing.laws.streaming import STREAMING_IS_FINAL

LAWS: Mapping[str, Law] = {
    law.name: law
    for law in (
        BATCH_INVARIANCE,
        CACHE_EQUALS_RECOMPUTE,
        SPECULATION_IS_INVISIBLE,
        PATH_PURITY,
        STATELESSNESS,
        STOP_IS_EXACT,
        STREAMING_IS_FINAL,
        CONSERVATION,
        FAULT_ISOLATION,
        COST,
        CONFIG_ROUND_TRIP,
        REFERENCE,
        DISTRIBUTION,
        INDEPENDENCE,
        CONSTRAINT,
        SCORES_ADD_UP,
        RANKING,
    )
}
"""All laws by name."""
