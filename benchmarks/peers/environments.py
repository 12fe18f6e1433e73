"""Environments of the peers: each engine's packages in a folder of its own under `.peers`, out of the others' way.

An environment is what the files NAME.txt and, without dependencies, NAME-nodeps.txt beside this module list. It is made
once, and again when they change.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

PLACE = Path(__file__).resolve().parents[2] / ".peers"
LOGS = PLACE / "logs"
_LISTS = Path(__file__).parent


class NotInstalled(Exception):
    """An environment cannot be made, with the reason."""


def python_of(name: str) -> Path:
    """Give an environment's Python, making the environment if it is not there.

    Raises:
        NotInstalled: pip failed.
    """
    folder = PLACE / name
    lists = [file for file in (_LISTS / f"{name}.txt", _LISTS / f"{name}-nodeps.txt") if file.exists()]
    stamp, wanted = folder / ".installed", hashlib.sha256(b"".join(file.read_bytes() for file in lists)).hexdigest()
    python = folder / "bin" / "python"
    if not stamp.exists() or stamp.read_text(encoding="utf-8") != wanted:
        log = log_of(f"install-{name}")
        print(f"installing {name} into {folder} (its log: {log})", file=sys.stderr, flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        with log.open("w", encoding="utf-8") as stream:
            _run([sys.executable, "-m", "venv", str(folder)], stream, name, log)
            for file in lists:
                bare = ["--no-deps"] if file.stem.endswith("-nodeps") else []
                _run([str(python), "-m", "pip", "install", *bare, "-r", str(file)], stream, name, log)
        stamp.write_text(wanted, encoding="utf-8")
    return python


def log_of(name: str) -> Path:
    """Say where a log is to be written, and make the folders."""
    LOGS.mkdir(parents=True, exist_ok=True)
    (PLACE / ".gitignore").write_text("*\n", encoding="utf-8")
    return LOGS / f"{name}.txt"


def last_words(log: Path) -> str:
    """Give the line of a log that most likely says what went wrong."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower()]
    return (telling or lines or ["it said nothing"])[-1][:200]


def _run(command: list[str], stream: object, name: str, log: Path) -> None:
    done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, check=False)  # type: ignore[call-overload]
    if done.returncode:
        raise NotInstalled(f"{name} cannot be installed: {last_words(log)}")
