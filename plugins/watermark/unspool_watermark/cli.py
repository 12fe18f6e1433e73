"""`unspool watermark detect`: whether texts bear a watermark whose key a config holds.

Exit codes: 0 every text was judged, whatever the verdict; 2 the input is wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unspool.cli import options
from unspool.cli.failure import reported

if TYPE_CHECKING:
    from rich.table import Table

    from unspool.config import ModelSettings
    from unspool.resolved import Defaults
    from unspool_watermark.detection import Detection, Detector

THRESHOLD = 4.0
"""Standard deviations above chance that convince, unless told otherwise: three texts in 100 000 lie there by chance."""

app = typer.Typer(help="Look for watermarks.", no_args_is_help=True)


@app.callback()
def _root() -> None:
    """Keep `detect` a command of its own, though it is the only one."""


@dataclass(frozen=True)
class Text:
    """A text to judge.

    Args:
        id: of the request that it comes from; the name of the file.
        number: of the hypothesis, from 1.
        text: token ids where they are known, else the text.
        before: token ids of its prompt, where they are known.
    """

    id: str
    number: int
    text: str | Sequence[int]
    before: Sequence[int] = ()


@app.command()
def detect(
    source: Annotated[
        str, typer.Argument(metavar="FILE", help="A text, or results of `unspool run` (.jsonl); - reads stdin.")
    ] = "-",
    config: options.ConfigFile = None,
    profile: options.Profile = None,
    plugins: options.Plugins = None,
    model: options.Model = None,
    results: Annotated[
        bool | None,
        typer.Option(
            "--results/--text", help="What FILE holds. By default .jsonl is results, all else text.", show_default=False
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            metavar="Z", help=f"Standard deviations above chance that convince ({THRESHOLD:g}).", show_default=False
        ),
    ] = None,
    fpr: Annotated[
        float | None,
        typer.Option(
            metavar="P",
            help="Instead: how many texts without the watermark may be called marked, such as 1e-6.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON document.")] = False,
    debug: options.Debug = False,
) -> None:
    """Say of each text whether it bears the watermarks that the config names.

    The key and all else come from the config, as they did when the text was written. Results hold token ids, and the
    prompt's too; a text is cut into tokens by the model's tokenizer. No weight is loaded.
    """
    with reported(debug):
        from unspool.cli.output import rendered, write
        from unspool.registry import Registry

        convinces = _verdict(threshold, fpr)
        defaults = options.command_line(
            Registry.installed(), config=config, profile=profile, model=model, plugins=plugins
        )
        detectors = _detectors(defaults)
        tokenizer = _Tokenizer(defaults.config.model)
        as_results = results if results is not None else Path(source).suffix.lower() == ".jsonl"
        found = []
        for text in _results(source) if as_results else [_text(source)]:
            cut = tokenizer.loaded if isinstance(text.text, str) else None
            for name, detector in detectors.items():
                detection = detector.detect(text.text, tokenizer=cut, before=text.before)
                found.append((text, name, detection, convinces(detection)))
        if as_json:
            write(json.dumps({"texts": [_record(*line) for line in found]}, ensure_ascii=False, indent=2) + "\n")
        else:
            write(rendered(_table(found)))


def _verdict(threshold: float | None, fpr: float | None) -> Any:
    """Make what decides on a `Detection`."""
    from unspool.errors import InputError

    if threshold is not None and fpr is not None:
        raise InputError("--fpr", fpr, "not together with --threshold: they are two ways of saying the same")
    if fpr is not None:
        if not 0 < fpr < 1:
            raise InputError("--fpr", fpr, "a probability between 0 and 1")
        return lambda detection: detection.p_value <= fpr
    least = THRESHOLD if threshold is None else threshold
    if not least > 0:
        raise InputError("--threshold", threshold, "a number above 0")
    return lambda detection: detection.z >= least


def _detectors(defaults: Defaults) -> Mapping[str, Detector]:
    """Make a detector for each watermark that the config and the command line name."""
    from unspool.errors import ConfigError, Problem
    from unspool.layers import merge
    from unspool.pipeline import build_plugin

    registry, specs = defaults.registry, merge(defaults.layers()).plugins
    marks = [spec for spec in specs if hasattr(registry.find(spec.name).plugin, "detector")]
    if not marks:
        known = " or ".join(entry.name for entry in registry if not entry.broken and hasattr(entry.plugin, "detector"))
        raise ConfigError([Problem("plugins", f"no watermark is named: name {known}, in a config (-c) or with -p")])
    made: list[Any] = [build_plugin(spec, registry) for spec in marks]
    return {plugin.name: plugin.detector() for plugin in made}


class _Tokenizer:
    """The model's tokenizer, loaded when the first text needs it."""

    def __init__(self, model: ModelSettings) -> None:
        self._model = model

    @cached_property
    def loaded(self) -> Any:
        from transformers import AutoTokenizer

        from unspool.errors import ModelError
        from unspool.huggingface.hub import check_reachable
        from unspool.huggingface.load import local_folder

        model = self._model
        folder = local_folder(model.name)
        if not Path(folder).is_dir():
            check_reachable(folder, model.revision)
        settings = {} if model.revision is None else {"revision": model.revision}
        try:
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code, **settings)
        except Exception as error:  # transformers raises errors of every kind for a bad folder
            reason = f"{type(error).__name__}: {error}"
            raise ModelError(f"the tokenizer of {model.name!r} cannot be loaded: {reason}") from error


def _read(source: str) -> bytes:
    from unspool.errors import InputError

    if source == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(source).read_bytes()
    except OSError as error:
        raise InputError("FILE", source, f"a file that can be read: {error.strerror}") from error


def _text(source: str) -> Text:
    from unspool.errors import InputError

    try:
        text = _read(source).decode()
    except UnicodeDecodeError as error:
        raise InputError("FILE", source, f"UTF-8: {error.reason} at byte {error.start}") from error
    text = text.removesuffix("\n")  # a shell's, or an editor's
    if not text:
        raise InputError("FILE", source, "at least one character")
    return Text("stdin" if source == "-" else source, 1, text)


def _results(source: str) -> Iterator[Text]:
    """Read the hypotheses of a file of results. A record of a request that failed has none."""
    from unspool.errors import InputError

    for number, line in enumerate(_read(source).splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt = record.get("prompt_token_ids", ())
            hypotheses = [] if "error" in record else record["hypotheses"]
            for place, hypothesis in enumerate(hypotheses, 1):
                ids = hypothesis.get("token_ids")
                text = str(hypothesis["text"]) if ids is None else [int(token) for token in ids]
                yield Text(str(record["id"]), place, text, [int(token) for token in prompt])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError("FILE", source, f"results of `unspool run`, which line {number} is not") from error


def _record(text: Text, watermark: str, detection: Detection, marked: bool) -> dict[str, Any]:
    return {
        "id": text.id,
        "hypothesis": text.number,
        "watermark": watermark,
        "marked": marked,
        **asdict(detection),
    }


def _table(found: Sequence[tuple[Text, str, Detection, bool]]) -> Table:
    from rich.table import Table
    from rich.text import Text as Words

    table = Table(box=None, pad_edge=False)
    for column in ("text", "watermark"):
        table.add_column(column, overflow="fold")
    for column in ("scored", "score", "chance", "z", "p-value"):
        table.add_column(column, justify="right")
    table.add_column("verdict", no_wrap=True)
    for text, watermark, seen, marked in found:
        name = text.id if text.number == 1 else f"{text.id} #{text.number}"
        verdict = Words("marked", style="bold green") if marked else Words("not marked", style="dim")
        numbers = (
            str(seen.scored),
            f"{seen.score:.3f}",
            f"{seen.expected:.3f}",
            f"{seen.z:.2f}",
            f"{seen.p_value:.2g}",
        )
        table.add_row(Words(name), watermark, *numbers, verdict if seen.scored else Words("too short"))
    return table
