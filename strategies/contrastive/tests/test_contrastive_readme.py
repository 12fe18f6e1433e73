"""The picture in the README of the contrastive distribution is worked out rightly."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_likeness_in_the_picture_is_weighed_as_it_says() -> None:
    rows = re.findall(r"─ \" \w+\" +([\d.]+) +([\d.]+) +(-[\d.]+)( +◄)?", README)
    scores = [0.4 * float(p) - 0.6 * float(likeness) for p, likeness, *_ in rows]
    assert [f"{score:.2f}" for score in scores] == [score for *_, score, _ in rows]
    assert [bool(mark) for *_, mark in rows] == [score == max(scores) for score in scores]
