"""`unspool generate`: one prompt in, text out, as it comes."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unspool.cli import options
from unspool.cli.failure import reported
from unspool.cli.loading import load_engine

if TYPE_CHECKING:
    from unspool.engine import Engine
    from unspool.request import Result


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - or nothing reads it from stdin.")] = None,
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
    seed: Annotated[int | None, typer.Option(help="The seed of this prompt's noise.", show_default=False)] = None,
    n: options.Number = None,
    logprobs: options.Logprobs = None,
    system: Annotated[str | None, typer.Option(help="A system message for the chat template.")] = None,
    raw: options.Raw = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, when it is complete.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Say on stderr what it cost.")] = False,
    trace: options.Trace = None,
    debug: options.Debug = False,
) -> None:
    """Answer a prompt.

    A text prompt becomes a user turn in the model's chat template, where the model has one: use --raw for none.
    """
    with reported(debug):
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
            n=n,
            logprobs=logprobs,
            raw=raw,
        )
        messages = _messages(_read_prompt(prompt), system, raw)
        asked = Request(prompt=messages, seed=seed)
        several = resolve_request(defaults, asked).n > 1  # and whatever is wrong is said before weights load

        with load_engine(defaults) as engine:
            with engine.trace(trace) if trace is not None else nullcontext():
                if as_json or several:
                    result = engine.generate(messages, seed=seed)
                    _print(result, as_json)
                else:
                    result = _stream(engine, messages, seed)
            if stats:
                _tell_stats(result)


def _read_prompt(given: str | None) -> str:
    from unspool.errors import InputError

    if given is not None and given != "-":
        return given
    if given is None and sys.stdin.isatty():
        raise InputError("prompt", None, "give it as an argument, or pipe it in")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError("prompt", "stdin", f"UTF-8: {error.reason} at byte {error.start}") from error
    return text.removesuffix("\n").removesuffix("\r")


def _messages(prompt: str, system: str | None, raw: bool) -> Any:
    from unspool.errors import InputError

    if not prompt:
        raise InputError("prompt", prompt, "at least one character")
    if system is None:
        return prompt
    if raw:
        raise InputError("--system", system, "it is part of the chat template, which --raw leaves out")
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _stream(engine: Engine, prompt: Any, seed: int | None) -> Result:
    from unspool.cli.output import write

    stream = engine.stream(prompt, seed=seed)
    for piece in stream:
        write(piece.text)
    result = stream.result()
    if result.error is not None:
        raise result.error
    write("\n")
    return result


def _print(result: Result, as_json: bool) -> None:
    from unspool.cli.output import write

    if as_json:
        write(json.dumps(result.to_dict(), ensure_ascii=False) + "\n")
        return
    for number, hypothesis in enumerate(result.hypotheses, 1):
        write(f"[{number}] {hypothesis.text}\n")


def _tell_stats(result: Result) -> None:
    from rich.console import Console
    from rich.table import Table

    stats = result.stats
    table = Table(show_header=False, box=None, pad_edge=False)
    speed = f" ({stats.new_tokens / stats.total_s:.1f} tok/s)" if stats.total_s else ""
    table.add_row("new tokens", f"{stats.new_tokens} in {stats.total_s:.2f} s{speed}")
    table.add_row("finish", ", ".join(hypothesis.finish_reason for hypothesis in result.hypotheses))
    table.add_row("first token", f"{stats.first_token_s * 1000:.0f} ms")
    table.add_row("prompt tokens", f"{stats.prompt_tokens} ({stats.cached_tokens} from cache)")
    table.add_row("forward passes", f"{stats.forward_passes} ({stats.rows} rows)")
    if stats.drafted:
        table.add_row("drafts", f"{stats.drafted}, {stats.accepted} accepted")
        for name, drafts in stats.drafters.items():
            shares = " ".join(f"{right}/{ran}" for ran, right in zip(drafts.run, drafts.accepted, strict=True))
            table.add_row(f"  {name}", f"{shares} by depth")
    table.add_row("seed", str(result.provenance.get("seed")))
    Console(stderr=True, highlight=False).print(table)
