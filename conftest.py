"""Builds the attention kernel before any test runs, and lets each begin with the same random numbers.

So all tests run by the kernel, and what a test finds does not depend on which ran before it.
"""

from __future__ import annotations

import contextlib

import pytest
import torch


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build it once, in the process that hands out the tests."""
    if not hasattr(session.config, "workerinput"):
        from unspool.errors import ModelError
        from unspool.huggingface import kernel

        with contextlib.suppress(ModelError):  # no compiler: plain torch
            kernel.build()


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["float64", "float32"], ids=["plain", "kernel"])
def working(request: pytest.FixtureRequest) -> torch.dtype:
    """Give a working dtype that kernels leave to plain torch, and the one that they take."""
    from unspool.huggingface import kernel

    if request.param == "float32" and not kernel.available():
        pytest.skip("there is no kernel here")
    chosen: torch.dtype = getattr(torch, request.param)
    return chosen
