"""What `unspool run` says while it runs, and when it is done."""

from __future__ import annotations

import pytest

from unspool.cli.run import _Progress
from unspool.request import Drafted, Stats


def test_the_closing_line_counts_requests_tokens_and_the_drafts_of_each_drafter(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with (progress := _Progress(3)):
        progress.ended(Stats(new_tokens=5, drafters={"one": Drafted((3, 2), (2, 1))}), failed=False)
        progress.ended(
            Stats(new_tokens=7, drafters={"one": Drafted((4,), (0,)), "two": Drafted((1,), (1,))}), failed=False
        )
        progress.ended(Stats(), failed=True)
    told = capsys.readouterr().err
    assert "3 requests, 1 failed, 12 tokens" in told
    assert "drafts accepted: one 3 of 9, two 1 of 1" in told


def test_without_drafters_nothing_is_said_of_drafts(capsys: pytest.CaptureFixture[str]) -> None:
    with (progress := _Progress(1)):
        progress.ended(Stats(new_tokens=5), failed=False)
    assert "draft" not in capsys.readouterr().err


def test_the_share_of_prompts_that_came_from_cache_is_said_if_there_is_any(capsys: pytest.CaptureFixture[str]) -> None:
    with (progress := _Progress(2)):
        progress.ended(Stats(prompt_tokens=10), failed=False)
    assert "cache" not in capsys.readouterr().err
    with (progress := _Progress(2)):
        progress.ended(Stats(prompt_tokens=10), failed=False)
        progress.ended(Stats(prompt_tokens=30, cached_tokens=20), failed=False)
    assert "prompt tokens from cache: 20 of 40 (50%)" in capsys.readouterr().err
