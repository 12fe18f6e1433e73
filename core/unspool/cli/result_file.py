"""A file of results, one JSON object a line, each written whole and at once, so that a kill leaves complete lines.

Each record carries the run's seed. A run that is resumed cuts off what a kill left of a last line, takes the seed up
again, and passes over what is done.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from unspool.errors import InputError, OutputError

RUN_SEED = "run_seed"


class ResultFile:
    """Where the results of a run go.

    Args:
        path: a file, or `-` for stdout.
        resume: go on with the file that is there.
        overwrite: replace the file that is there.

    Raises:
        InputError: the file is there and neither is asked for, or it cannot be a file of results.
    """

    def __init__(self, path: str, *, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self._resume = path, resume
        self.ids: set[str] = set()
        """Requests that are done."""
        self.bad_lines: set[int] = set()
        """Lines of the request file that were found wrong."""
        self.failed = 0
        """How many records have an error."""
        self.run_seed: int | None = None
        """The seed of the run, if the file is resumed."""
        self._descriptor = -1
        self._length = 0
        self._regular = False
        if path != "-":
            self._look(Path(path), resume, overwrite)

    def _look(self, path: Path, resume: bool, overwrite: bool) -> None:
        """Check what is there, and change nothing yet."""
        if resume and overwrite:
            raise InputError("--overwrite", path.name, "not together with --resume")
        if path.is_dir():
            raise InputError("-o", str(path), "a file, and this is a folder")
        if not path.parent.is_dir():
            raise InputError("-o", str(path), "a file in a folder that is there")
        if not path.is_file():
            return
        if not resume and not overwrite:
            raise InputError("-o", str(path), "it is there already: --resume goes on with it, --overwrite replaces it")
        if not os.access(path, os.W_OK):
            raise InputError("-o", str(path), "a file that may be written")
        if resume:
            self._read(path)

    def _read(self, path: Path) -> None:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break  # what a kill left of a line
                try:
                    record = json.loads(line)
                    self._note(record)
                    self.run_seed = record["provenance"][RUN_SEED]
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError("-o", str(path), f"a file of results, which line {number} is not") from error
                self._length += len(line)

    def _note(self, record: dict[str, Any]) -> None:
        self.failed += "error" in record
        if "line" in record:
            self.bad_lines.add(record["line"])
        else:
            self.ids.add(record["id"])

    def __enter__(self) -> ResultFile:
        """Open the file, cutting it to its complete lines."""
        try:
            if self.path == "-":
                sys.stdout.flush()
                self._descriptor = os.dup(sys.stdout.fileno())
            else:
                self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            self._regular = self.path != "-" and stat.S_ISREG(os.fstat(self._descriptor).st_mode)
            if self._regular:
                os.ftruncate(self._descriptor, self._length)
                os.lseek(self._descriptor, self._length, os.SEEK_SET)
        except OSError as error:
            raise self._failure(error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            os.close(self._descriptor)
        except OSError as failure:
            raise self._failure(failure) from failure

    def write(self, record: dict[str, Any], run_seed: int) -> None:
        """Write one record as one line.

        Raises:
            OutputError: it cannot be written; the lines before it stay.
        """
        record = {**record, "provenance": {**record["provenance"], RUN_SEED: run_seed}}
        # A prompt may hold a lone surrogate, which no UTF-8 can: ASCII escapes say what was there.
        line = (json.dumps(record) + "\n").encode()
        left = memoryview(line)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            if self._regular:
                with suppress(OSError):
                    os.ftruncate(self._descriptor, self._length)
            raise self._failure(error) from error
        self._length += len(line)
        self._note(record)

    def _failure(self, error: OSError) -> OutputError:
        where = "stdout" if self.path == "-" else self.path
        return OutputError(
            f"cannot write {where}: {error.strerror}; complete lines stay, and --resume goes on from them"
        )
