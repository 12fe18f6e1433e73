"""The whole proof: every law on everything installed with many cases and seeds, and every planted fault.

python tests/power/proof.py                       an hour; before each release (`make proof`)
python tests/power/proof.py --seeds 2 --examples 50
python tests/power/proof.py --faults              the faults alone; writes docs/faults.md
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402

from power.catalogue import FAULTS  # noqa: E402
from power.write_page import PAGE, page  # noqa: E402
from unspool_testing import LAWS, Case, Subject, Verdict, prove  # noqa: E402
from unspool_testing.known import KIT  # noqa: E402
from unspool_testing.proof import applicable  # noqa: E402

HOSTS = ("kit_search", "kit_forks", "kit_particles", "kit_holds")
SLOW = {"independence": 12}
"""Law -> most cases a seed: each of them draws thousands of texts."""


def main(arguments: Sequence[str]) -> int:
    """Prove, and say what was unexpected."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--examples", type=int, default=200, help="cases of each law, plugin and seed (200)")
    parser.add_argument("--seeds", type=int, default=20, help="seeds of Hypothesis (20)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--faults", action="store_true", help="only the planted faults; writes docs/faults.md")
    parser.add_argument("--alarms", action="store_true", help="only that right plugins keep all laws")
    parser.add_argument("--json", action="store_true", help="say it as JSON")
    given = parser.parse_args(arguments)
    console = Console(stderr=True)
    with Progress(console=console, disable=given.json) as progress:
        alarms = [] if given.faults else list(_false_alarms(given.examples, given.seeds, given.jobs, progress))
        missed = [] if given.alarms else _missed(1 if given.faults else given.seeds, given.jobs, progress)
        if not given.alarms and not missed:
            PAGE.write_text(page(_smallest(given.jobs, progress)), encoding="utf-8")
    if given.json:
        json.dump({"false_alarms": alarms, "missed": missed, "faults": len(FAULTS)}, sys.stdout, indent=2)
    else:
        for alarm in alarms:
            console.print(f"[red]broken[/]: {alarm}", markup=True)
        for name in missed:
            console.print(f"[red]missed[/]: {name}", markup=True)
        console.print(f"{len(alarms)} laws broken; {len(missed)} of {len(FAULTS)} planted faults missed")
    return int(bool(alarms or missed))


def _false_alarms(examples: int, seeds: int, jobs: int, progress: Progress) -> Iterator[str]:
    names = [e.name for e in Subject.find("greedy").known.registry if e.name not in KIT and e.broken is None]
    pairs = [(name, law) for name in [*names, *HOSTS] for law in LAWS if not applicable(LAWS[law], Subject.find(name))]
    bar = progress.add_task("right plugins", total=len(pairs) * seeds)
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(_held, *pair, examples, seed) for pair in pairs for seed in range(seeds)}
        for done in as_completed(waiting):
            progress.advance(bar)
            if told := done.result():
                yield told


def _held(name: str, law: str, examples: int, seed: int) -> str:
    verdict = prove(LAWS[law], Subject.find(name), examples=min(examples, SLOW.get(law, examples)), seed=seed)
    return f"{name}, seed {seed}: {verdict.counterexample}" if verdict.status == "broken" else ""


def _missed(seeds: int, jobs: int, progress: Progress) -> list[str]:
    bar = progress.add_task("planted faults", total=len(FAULTS) * seeds)
    missed = []
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = [pool.submit(_finds, number, seed) for number in range(len(FAULTS)) for seed in range(seeds)]
        for done in as_completed(waiting):
            progress.advance(bar)
            missed += [done.result()] if done.result() else []
    return sorted(missed)


def _finds(number: int, seed: int) -> str:
    found = FAULTS[number].find(seed=seed).status == "broken"
    return "" if found else f"{FAULTS[number].name} (seed {seed})"


def _smallest(jobs: int, progress: Progress) -> dict[str, Verdict]:
    """Find the smallest case of each fault."""
    bar = progress.add_task("their smallest cases", total=len(FAULTS))
    found = {}
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        waiting = {pool.submit(_shrunk, number): fault.name for number, fault in enumerate(FAULTS)}
        for done in as_completed(waiting):
            progress.advance(bar)
            case, reason = done.result()
            found[waiting[done]] = Verdict(LAWS[FAULTS[0].law], "broken", reason, case=Case.read(case))
    return found


def _shrunk(number: int) -> tuple[str, str]:
    verdict = FAULTS[number].find(shrink=True)
    assert verdict.case is not None, f"{FAULTS[number].law} does not see that {FAULTS[number].name}"
    return verdict.case.write(), verdict.reason


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
