"""Curves as a picture: reads what `curves.py --json` writes from the standard input, and draws `curves-DTYPE.svg`.

    python benchmarks/plots.py FOLDER < FIGURES

Needs matplotlib alone; `curves.py --plot` runs it in an environment of its own (`benchmarks/peers/plots.txt`).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot

TITLES = {
    "batch": ("Batch", "rows"),
    "context": ("Context, batch 1", "tokens of the prompt"),
    "width": ("Beam search, batch 1", "beams"),
    "drafts": ("Drafts, batch 1", "drafts below a row"),
}
COLOURS = {"unspool": "#0b6e99", "transformers": "#d9730d"}


def draw(dtype: str, rows: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Draw an axis a column: speed above, keys and values below."""
    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, grid = pyplot.subplots(2, len(axes), figsize=(4 * len(axes), 6.5), squeeze=False)
    for column, axis in enumerate(axes):
        own = [row for row in rows if row["axis"] == axis]
        above, below = grid[0][column], grid[1][column]
        title, label = TITLES[axis]
        above.set_title(title)
        for side in dict.fromkeys(row["side"] for row in own):
            points = [row for row in own if row["side"] == side]
            style = {"marker": "o", "color": COLOURS.get(side), "label": side}
            above.plot([row["at"] for row in points], [row["speed"] for row in points], **style)
            kept = [row for row in points if row["kv"] is not None]
            below.plot([row["at"] for row in kept], [row["kv"] / 1e6 for row in kept], **style)
        if limits := {row["at"]: row["limit"] for row in own if "limit" in row}:
            above.plot(list(limits), list(limits.values()), color="grey", linestyle="--", label="the machine's limit")
        above.set_ylabel("tokens a second")
        below.set_ylabel("keys and values, MB")
        for place in (above, below):
            if axis == "drafts":
                place.set_xscale("symlog", base=2, linthresh=1)
            else:
                place.set_xscale("log", base=2)
            if axis == "batch":
                place.set_yscale("log")
            place.set_xticks(sorted({row["at"] for row in own}), labels=sorted({row["at"] for row in own}))
            place.minorticks_off()
            place.set_xlabel(label)
            place.grid(alpha=0.3)
        above.legend(fontsize="small")
    figure.suptitle(f"SmolLM2-135M, {dtype}")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def main() -> None:
    """Draw a picture a dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    mpl.rcParams |= {"svg.hashsalt": "unspool", "svg.fonttype": "none"}  # the same figures give the same, small file
    rows = [row for row in json.load(sys.stdin)["rows"] if row["speed"] is not None]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        draw(dtype, [row for row in rows if row["dtype"] == dtype], folder / f"curves-{dtype}.svg")


if __name__ == "__main__":
    main()
