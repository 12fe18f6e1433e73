"""Lets tests here import what stands beside them (`small_plugins`)."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
