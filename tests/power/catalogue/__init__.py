"""The catalogue of planted faults: a module for each distribution, and one for the core."""

from __future__ import annotations

from power.catalogue import beam, core, kit, penalties, sampling
from power.fault import Fault

FAULTS: tuple[Fault, ...] = (*sampling.FAULTS, *penalties.FAULTS, *kit.FAULTS, *beam.FAULTS, *core.FAULTS)
