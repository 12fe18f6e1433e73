"""The catalogue of planted faults: a module for each distribution, and one for the core."""

from __future__ import annotations

from power.catalogue import beam, contrastive, core, kit, many, penalties, sampling
from power.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *sampling.FAULTS,
    *penalties.FAULTS,
    *beam.FAULTS,
    *contrastive.FAULTS,
    *many.FAULTS,
    *kit.FAULTS,
    *core.FAULTS,
)
