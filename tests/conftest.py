"""Lets tests here import what stands beside them (`small_plugins`, `pipelines`)."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)  # tests run side by side, and on small tensors threads only wait for each other
