"""`unspool run`: thousands of requests from a file, results into another as they end."""

from __future__ import annotations

import secrets
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO

import typer

from unspool.cli import options
from unspool.cli.failure import REQUEST_FAILED, reported
from unspool.cli.loading import load_engine

if TYPE_CHECKING:
    from unspool.cli.request_file import BadLine
    from unspool.cli.result_file import ResultFile
    from unspool.engine import Engine
    from unspool.request import Request, Stats


def run(
    requests: Annotated[
        str, typer.Argument(metavar="IN.jsonl", help="Requests, one JSON object a line; - reads stdin.")
    ],
    output: Annotated[str, typer.Option("--output", "-o", metavar="OUT.jsonl", help="Results; - writes to stdout.")],
    config: options.ConfigFile = None,
    profile: options.Profile = None,
    strategy: options.Strategy = None,
    plugins: options.Plugins = None,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    max_new_tokens: options.MaxNewTokens = None,
    min_new_tokens: options.MinNewTokens = None,
    stop: options.Stop = None,
    seed: Annotated[
        int | None,
        typer.Option(help="The seed of the run; a request's own is a hash of it and the id.", show_default=False),
    ] = None,
    n: options.Number = None,
    logprobs: options.Logprobs = None,
    raw: options.Raw = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with OUT.jsonl where an earlier run stopped.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.jsonl.")] = False,
    trace: options.Trace = None,
    debug: options.Debug = False,
) -> None:
    """Decode a file of requests.

    A line is {"prompt": ...} with, as it likes, strategy, plugins, profile, max_new_tokens, min_new_tokens, stop, seed,
    n, id and other fields of a request; they stand above the command line. Results are written as they end. A bad line
    becomes an error record. Text prompts go through the model's chat template unless --raw or "raw": true says
    otherwise.
    """
    with reported(debug):
        from unspool.cli.result_file import ResultFile
        from unspool.registry import Registry
        from unspool.request import Request
        from unspool.resolved import resolve_request

        defaults = options.command_line(
            Registry.installed(),
            config=config,
            profile=profile,
            model=model,
            dtype=dtype,
            device=device,
            strategy=strategy,
            plugins=plugins,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop=stop,
            seed=seed,
            n=n,
            logprobs=logprobs,
            raw=raw,
        )
        resolved = resolve_request(defaults, Request(prompt=""))
        with ExitStack() as stack:
            source = stack.enter_context(_open(requests, output))
            results = ResultFile(output, resume=resume, overwrite=overwrite)
            run_seed = _run_seed(results, resolved.seed, explicit=seed)
            engine = stack.enter_context(load_engine(defaults))
            stack.enter_context(results)
            stack.enter_context(engine.trace(trace) if trace is not None else nullcontext())
            _decode(engine, source, results, run_seed, total=_count(source))
        if results.failed:
            raise typer.Exit(REQUEST_FAILED)


@contextmanager
def _open(path: str, output: str) -> Iterator[BinaryIO]:
    from unspool.errors import InputError

    if path == "-":
        yield sys.stdin.buffer
        return
    if output != "-" and Path(output).exists() and Path(path).exists() and Path(path).samefile(output):
        raise InputError("-o", output, "another file than the requests")
    try:
        file = Path(path).open("rb")  # noqa: SIM115 - closed below
        file.read(1)
        file.seek(0)
    except OSError as error:
        raise InputError("IN.jsonl", path, f"a file that can be read: {error.strerror}") from error
    with file:
        yield file


def _run_seed(results: ResultFile, chosen: int | None, explicit: int | None) -> int:
    """Choose the seed of the run: that of the run which is resumed, else what was asked for, else a new one."""
    from unspool.errors import InputError

    if results.run_seed is None:
        return chosen if chosen is not None else secrets.randbits(48)
    if explicit is not None and explicit != results.run_seed:
        raise InputError("--seed", explicit, f"{results.run_seed}, the seed of the run that is resumed, or none")
    return results.run_seed


def _decode(engine: Engine, source: BinaryIO, results: ResultFile, run_seed: int, total: int | None) -> None:
    """Run what the source holds, and write every result as it ends."""
    from unspool.cli.request_file import BadLine, read_requests
    from unspool.errors import Closed
    from unspool.noise import derive_seed
    from unspool.request import Stats

    bad: deque[BadLine] = deque()
    done, bad_before = frozenset(results.ids), frozenset(results.bad_lines)
    progress = _Progress(total)

    def skip(line: int, id_: str) -> bool:
        skipped = line in bad_before if line else id_ in done
        if skipped:
            progress.skipped()
        return skipped

    def good() -> Iterator[Request]:
        for found in read_requests(source, lambda id_: derive_seed(run_seed, id_), skip):
            if isinstance(found, BadLine):
                bad.append(found)
            else:
                yield found

    def write_bad() -> None:
        while bad:
            results.write(bad.popleft().to_dict(), run_seed)
            progress.ended(Stats(), failed=True)

    with progress:
        for result in engine.run(good()):
            write_bad()
            if isinstance(result.error, Closed):
                raise result.error  # the engine is gone, and the request is not done
            results.write(result.to_dict(), run_seed)
            progress.ended(result.stats, failed=result.error is not None)
        write_bad()


def _count(source: BinaryIO) -> int | None:
    """Count the lines of a file that can be read again."""
    if not source.seekable():
        return None
    total = sum(1 for line in source if line.strip())
    source.seek(0)
    return total


class _Progress:
    """A progress bar with tokens a second where stderr is a terminal, and a closing line in any case."""

    def __init__(self, total: int | None) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]:.0f} tok/s"),
            TextColumn("{task.fields[failed]} failed"),
            TextColumn("{task.fields[drafts]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=total, speed=0.0, failed=0, drafts="")
        self._done = self._failed = self._tokens = self._skipped = 0
        self._prompt_tokens = self._cached_tokens = 0
        self._drafts: dict[str, tuple[int, int]] = {}
        self._started = time.monotonic()

    def __enter__(self) -> None:
        self._started = time.monotonic()
        self._bar.start()

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        before = f" ({self._skipped} done before)" if self._skipped else ""
        self._console.print(
            f"{self._done} requests{before}, {self._failed} failed, {self._tokens} tokens, {self._speed():.0f} tok/s"
        )
        if self._cached_tokens:
            share = self._cached_tokens / self._prompt_tokens
            self._console.print(
                f"prompt tokens from cache: {self._cached_tokens} of {self._prompt_tokens} ({share:.0%})"
            )
        if self._drafts:
            self._console.print(f"drafts accepted: {self._accepted()}")

    def skipped(self) -> None:
        """Count a request that was done in an earlier run."""
        self._skipped += 1
        self._bar.advance(self._task)

    def ended(self, stats: Stats, *, failed: bool) -> None:
        """Count a request that has ended."""
        for name, drafts in stats.drafters.items():
            ran, right = self._drafts.get(name, (0, 0))
            self._drafts[name] = ran + sum(drafts.run), right + sum(drafts.accepted)
        self._done += 1
        self._failed += failed
        self._tokens += stats.new_tokens
        self._prompt_tokens += stats.prompt_tokens
        self._cached_tokens += stats.cached_tokens
        self._bar.update(self._task, advance=1, speed=self._speed(), failed=self._failed, drafts=self._accepted())

    def _accepted(self) -> str:
        return ", ".join(f"{name} {right} of {ran}" for name, (ran, right) in self._drafts.items())

    def _speed(self) -> float:
        return self._tokens / max(time.monotonic() - self._started, 1e-9)
