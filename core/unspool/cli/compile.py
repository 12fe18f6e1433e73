"""`unspool compile`: machine code made for one model on this machine, kept for every later start."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from unspool.cli import options
from unspool.cli.failure import reported


def compile_model(
    model: Annotated[
        str | None, typer.Argument(help="A folder, a GGUF file, a hub name, or smollm2 (the default).")
    ] = None,
    config: options.ConfigFile = None,
    dtype: options.Dtype = None,
    quantization: Annotated[str | None, typer.Option(help="int8, or none.", show_default=False)] = None,
    revision: Annotated[str | None, typer.Option(help="A branch, tag or commit on the hub.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run model code that comes with the weights.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; by default torch's own choice.")] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Remove all that was compiled, for every model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was made as JSON.")] = False,
    debug: options.Debug = False,
) -> None:
    """Compile a model for this machine's CPU.

    It takes minutes, once; from then on every start uses it. Results are the same up to rounding.
    """
    with reported(debug):
        from unspool.huggingface import cache, kernel

        if clear:
            found = cache.kept(kernel.cache_folder())
            size = sum(cache.size(path) for path in found)
            for path in found:
                cache.remove(path)
            _tell([{"removed": str(path)} for path in found], f"{len(found)} removed, {size / 1e6:.0f} MB", as_json)
            return

        from unspool.registry import Registry

        defaults = options.command_line(Registry.installed(), config=config, model=model, dtype=dtype)
        settings = defaults.config.model.model_dump()
        settings |= {"device": "cpu", "compile": "off"}
        settings["quantization"] = quantization or settings["quantization"]
        settings["revision"] = revision or settings["revision"]
        settings["trust_remote_code"] = trust_remote_code or settings["trust_remote_code"]
        made = _compiled(settings, threads or defaults.config.engine.threads)
        _tell(made, "", as_json)


def _compiled(settings: dict[str, Any], threads: int | None) -> list[dict[str, Any]]:
    import torch
    from rich.console import Console

    from unspool.huggingface import cache, kernel, package
    from unspool.huggingface.load import load

    if threads:
        torch.set_num_threads(threads)
    console, made = Console(stderr=True), []

    def step(what: str, path: Path, make: Any) -> None:
        start, known = time.monotonic(), path.exists()
        with console.status(f"compiling {what} of {settings['name']}: this takes minutes, once"):
            make()
        seconds = 0.0 if known else time.monotonic() - start
        told = "was there" if known else f"{seconds:.0f} s"
        size = cache.size(path)
        console.print(f"{what}: {told}, {size / 1e6:.0f} MB", highlight=False)
        made.append({"what": what, "path": str(path), "seconds": round(seconds, 1), "bytes": size})

    step("attention", kernel.path(), kernel.build)
    runner = load(**settings, quick=False).runner
    for kind in runner.subject.kinds:
        step(
            f"passes of {kind.tokens}", runner.subject.path(kind), lambda kind=kind: package.make(runner.subject, kind)
        )
    return made


def _tell(made: list[dict[str, Any]], words: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(made))
    elif words:
        typer.echo(words)
