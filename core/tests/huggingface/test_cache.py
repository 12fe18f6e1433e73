"""What takes long to make: nothing half made is left behind for long, and nobody's work is taken away."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unspool.huggingface import cache


def test_a_draft_is_gone_whatever_happens(tmp_path: Path) -> None:
    def fail() -> None:
        with cache.draft(tmp_path / "new") as draft:
            (draft / "half").write_text("made")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not list((tmp_path / "new").iterdir())


def test_what_a_killed_process_left_goes_after_a_day_and_what_another_makes_now_stays(tmp_path: Path) -> None:
    now, left, whole = tmp_path / "draft-now", tmp_path / "draft-left", tmp_path / "whole"
    for folder in (now, left, whole):
        folder.mkdir()
        (folder / "part").write_text("made")
    for old in (left, whole):
        os.utime(old, (time.time() - 25 * 3600,) * 2)
    with cache.draft(tmp_path) as draft:
        assert draft.parent == tmp_path
        assert now.is_dir()
        assert whole.is_dir()
        assert not left.exists()


def test_drafts_may_be_made_by_many_at_once(tmp_path: Path) -> None:
    def make(_: int) -> None:
        with cache.draft(tmp_path) as place:
            assert place.is_dir()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(make, range(800)))
    assert not list(tmp_path.iterdir())
