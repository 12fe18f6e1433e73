"""The catalogue of planted faults: a module for each distribution, and one for the core."""

from __future__ import annotations

from power.catalogue import (
    beam,
    beam_variants,
    contrastive,
    core,
    kit,
    many,
    penalties,
    sampling,
    speculation,
    watermark,
)
from power.fault import Fault

FAULTS: tuple[Fault, ...] = (
    *sampling.FAULTS,
    *penalties.FAULTS,
    *beam.FAULTS,
    *beam_variants.FAULTS,
    *contrastive.FAULTS,
    *many.FAULTS,
    *speculation.FAULTS,
    *watermark.FAULTS,
    *kit.FAULTS,
    *core.FAULTS,
)
