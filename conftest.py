"""Builds the attention kernel before any test runs, so that all tests run by it, whoever ran before them."""

from __future__ import annotations

import contextlib

import pytest


def pytest_sessionstart(session: pytest.Session) -> None:
    """Build it once, in the process that hands out the tests."""
    if not hasattr(session.config, "workerinput"):
        from unspool.errors import ModelError
        from unspool.huggingface import kernel

        with contextlib.suppress(ModelError):  # no compiler: plain torch
            kernel.build()
