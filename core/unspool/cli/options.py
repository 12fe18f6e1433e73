"""The options that commands share, and what they come to: a config with the command line laid over it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unspool.cli.loading import staying

if TYPE_CHECKING:
    from unspool.registry import Registry
    from unspool.resolved import Defaults

SOURCE = "command line"


def plugin_names(incomplete: str) -> list[tuple[str, str]]:
    """Complete the name of a plugin. Imports none of them."""
    from unspool.registry import Registry

    return [(entry.name, entry.distribution) for entry in Registry.installed() if entry.name.startswith(incomplete)]


def profile_names(context: typer.Context, incomplete: str) -> list[str]:
    """Complete the name of a profile of the config that was named before."""
    import tomllib

    import yaml

    try:
        path = Path(context.params["config"])
        text = path.read_text(encoding="utf-8")
        data = tomllib.loads(text) if path.suffix.lower() == ".toml" else yaml.safe_load(text)
        return [name for name in data["profiles"] if name.startswith(incomplete)]
    except Exception:  # a shell's completion has nowhere to show an error
        return []


ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="A config file, YAML or TOML.", show_default=False)
]
Profile = Annotated[
    str | None,
    typer.Option(help="A named variation of the config.", autocompletion=profile_names, show_default=False),
]
Strategy = Annotated[
    list[str] | None,
    typer.Option(
        "--strategy",
        "-s",
        metavar="NAME[:KEY=VALUE,...]",
        help="The strategy, such as greedy, sample or beam:width=4.",
        autocompletion=plugin_names,
        show_default=False,
    ),
]
Plugins = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        "-p",
        metavar="NAME[:VALUE or KEY=VALUE,...]",
        help="A plugin, such as temperature:0.7, top_p:p=0.9 or top_k:off. Repeat for more, in order.",
        autocompletion=plugin_names,
        show_default=False,
    ),
]
Model = Annotated[
    str | None,
    typer.Option(help="A folder, a GGUF file, a hub name, or smollm2 (the default).", show_default=False),
]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16 or float64.", show_default=False)]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.", show_default=False)]
MaxNewTokens = Annotated[int | None, typer.Option(help="Most new tokens.", show_default=False)]
MinNewTokens = Annotated[int | None, typer.Option(help="No end before so many new tokens.", show_default=False)]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="A string that ends the text; repeat for more.", show_default=False),
]
Number = Annotated[int | None, typer.Option("-n", "--n", help="How many hypotheses to return.", show_default=False)]
Logprobs = Annotated[
    str | None,
    typer.Option(help="Return log-probabilities, of the model or of the pipeline.", show_default=False),
]
Raw = Annotated[
    bool,
    typer.Option(
        "--raw",
        help="Use the prompt as it is. Without it a text prompt becomes a user turn in the model's chat template, "
        "where the model has one.",
    ),
]


def _trace_file(path: Path | None) -> Path | None:
    if path is not None and not path.parent.is_dir():
        raise typer.BadParameter(f"{path}: it is in no folder that is there")
    return path


Trace = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write what every step does, as JSON lines.",
        dir_okay=False,
        writable=True,
        callback=_trace_file,
        show_default=False,
    ),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command_line(
    registry: Registry,
    *,
    config: Path | None = None,
    profile: str | None = None,
    model: str | None = None,
    dtype: str | None = None,
    device: str | None = None,
    strategy: list[str] | None = None,
    **given: Any,
) -> Defaults:
    """Read the config and lay the command line over it, or raise a `ConfigError` with all that is wrong.

    Args:
        registry: the plugins that may be named.
        config: a config file.
        profile: the profile for requests that name none.
        model, dtype, device: override the config's model section.
        strategy: as often as it was named; once at most is right.
        given: fields of a config, and of its limits; what is None or empty is not given.
    """
    from dataclasses import replace

    with staying():
        from unspool.config import LimitSettings, ModelSettings, Variation, validate
        from unspool.errors import InputError
        from unspool.layers import Layer
        from unspool.resolved import load_defaults

    if strategy and len(strategy) > 1:
        raise InputError("--strategy", " ".join(strategy), "one: a pipeline has one strategy")
    defaults = load_defaults(config, registry)
    given["strategy"] = strategy[0] if strategy else None
    said = {name: value for name, value in given.items() if value is not None and value is not False and value != []}
    limits = {name: said.pop(name) for name in LimitSettings.model_fields if name in said}
    data = {**said, "limits": limits} if limits else said
    overrides = (Layer(SOURCE, validate(Variation, data, registry, SOURCE)),) if data else ()
    loading = {"name": model, "dtype": dtype, "device": device}
    chosen = {name: value for name, value in loading.items() if value is not None}
    settings = validate(ModelSettings, defaults.config.model.model_dump(exclude_unset=True) | chosen, registry, SOURCE)
    merged = defaults.config.model_copy(update={"model": settings})
    return replace(defaults, config=merged, profile=profile, overrides=overrides)
