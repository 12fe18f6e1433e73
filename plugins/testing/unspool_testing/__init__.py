"""The test kit: exact models, cases drawn by Hypothesis, and the laws that any decoding plugin can be held to.

@parametrize_with_laws("my_plugin")
def test_my_plugin(law):
    law()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unspool_testing.case import Case as Case
    from unspool_testing.claims import Row as Row
    from unspool_testing.driver import Circumstances as Circumstances
    from unspool_testing.driver import alone as alone
    from unspool_testing.driver import drive as drive
    from unspool_testing.enumeration import enumerate_texts as enumerate_texts
    from unspool_testing.law import Broken as Broken
    from unspool_testing.law import Law as Law
    from unspool_testing.laws import LAWS as LAWS
    from unspool_testing.laws.batch import check_batch_invariance as check_batch_invariance
    from unspool_testing.laws.cache import check_cache_equals_recompute as check_cache_equals_recompute
    from unspool_testing.laws.config import check_config_round_trip as check_config_round_trip
    from unspool_testing.laws.conservation import check_conservation as check_conservation
    from unspool_testing.laws.constraint import check_constraint as check_constraint
    from unspool_testing.laws.cost import check_cost as check_cost
    from unspool_testing.laws.distribution import check_distribution as check_distribution
    from unspool_testing.laws.distribution import check_independence as check_independence
    from unspool_testing.laws.faults import check_fault_isolation as check_fault_isolation
    from unspool_testing.laws.path import check_path_purity as check_path_purity
    from unspool_testing.laws.reference import check_reference as check_reference
    from unspool_testing.laws.scores import check_ranking as check_ranking
    from unspool_testing.laws.scores import check_scores_add_up as check_scores_add_up
    from unspool_testing.laws.speculation import check_speculation_is_invisible as check_speculation_is_invisible
    from unspool_testing.laws.statelessness import check_statelessness as check_statelessness
    from unspool_testing.laws.stop import check_stop_is_exact as check_stop_is_exact
    from unspool_testing.laws.streaming import check_streaming_is_final as check_streaming_is_final
    from unspool_testing.machine import engine_machine as engine_machine
    from unspool_testing.networks import tiny_model as tiny_model
    from unspool_testing.parametrize import parametrize_with_laws as parametrize_with_laws
    from unspool_testing.proof import Verdict as Verdict
    from unspool_testing.proof import prove as prove
    from unspool_testing.runners import CountingRunner as CountingRunner
    from unspool_testing.runners import MisbehavingRunner as MisbehavingRunner
    from unspool_testing.subject import Subject as Subject
    from unspool_testing.table import TableModel as TableModel

_HOMES = {
    "Broken": "law",
    "Case": "case",
    "Circumstances": "driver",
    "CountingRunner": "runners",
    "LAWS": "laws",
    "Law": "law",
    "MisbehavingRunner": "runners",
    "Row": "claims",
    "Subject": "subject",
    "TableModel": "table",
    "Verdict": "proof",
    "alone": "driver",
    "check_batch_invariance": "laws.batch",
    "check_cache_equals_recompute": "laws.cache",
    "check_config_round_trip": "laws.config",
    "check_conservation": "laws.conservation",
    "check_constraint": "laws.constraint",
    "check_cost": "laws.cost",
    "check_distribution": "laws.distribution",
    "check_fault_isolation": "laws.faults",
    "check_independence": "laws.distribution",
    "check_path_purity": "laws.path",
    "check_ranking": "laws.scores",
    "check_reference": "laws.reference",
    "check_scores_add_up": "laws.scores",
    "check_speculation_is_invisible": "laws.speculation",
    "check_statelessness": "laws.statelessness",
    "check_stop_is_exact": "laws.stop",
    "check_streaming_is_final": "laws.streaming",
    "drive": "driver",
    "engine_machine": "machine",
    "enumerate_texts": "enumeration",
    "parametrize_with_laws": "parametrize",
    "prove": "proof",
    "tiny_model": "networks",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: pytest loads this package in every run, and it must be quick."""
    if name in _HOMES:
        return getattr(importlib.import_module(f"unspool_testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'unspool_testing' has no attribute {name!r}")
