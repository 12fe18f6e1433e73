"""Generate what can be generated: the hook reference, the plugin tables, the config reference and its JSON Schema.

    python docs/generate.py            writes them
    python docs/generate.py --check    says which are out of date, and exits with 1 if any is

Whole files are written from code alone. In pages that are written by hand only what stands between
`<!-- generated: NAME -->` and `<!-- end -->` is. The plugins are those of this workspace, whatever else is installed.
docs/json-schemas.md needs outside data, and is left alone where that is absent.
"""

from __future__ import annotations

import difflib
import inspect
import itertools
import json
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import json_schema_suite
from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from tables import table

from unspool.config import EngineSettings, LimitSettings, ModelSettings, Variation
from unspool.errors import ConfigError
from unspool.generation_config import ARGUMENTS, FIELDS, AsPlugin, AsSetting, Ignored, Unsupported
from unspool.hooks import Growth, Hooks
from unspool.pipeline import HOOKS, Pipeline
from unspool.plugin import Companion, Plugin, per_request_fields
from unspool.registry import Entry, Registry
from unspool.request import Hypothesis, Request, Result, Stats
from unspool.schema import config_schema
from unspool.step import Drafts, Step
from unspool_testing.claims import METHODS, Claims
from unspool_testing.laws import LAWS

ROOT = Path(__file__).parents[1]
JSON_SCHEMAS = ROOT / "docs" / "json-schemas.md"
PLUGINS = """\
Every plugin of this repository with its parameters. `unspool plugins` lists what is installed where you are, and
`unspool plugins NAME` shows one. A bare value sets the parameter in bold: `top_k: 40`. Parameters marked * may differ
between requests that share their hook calls."""
HOOKS_READING = """\
Read [how it works](how-it-works.md) for the whole and [write a strategy](write-a-strategy.md) for a first plugin. `[n]`
is a shape; integers are int64; floats have the working dtype: float32, or float64 where the model is float64. Only
`step.raw` has the model's own dtype."""
LAWS_READING = """\
What the [test kit](../plugins/testing/README.md) holds a plugin to. [Prove a strategy](prove.md) shows how to run them:
`unspool check NAME`, `@parametrize_with_laws(NAME)`, `pytest --unspool-check NAME`. On exact models, tables and tiny
networks in float64, they are equalities. Which of them apply follows from what a plugin does and declares. How they are
known to see faults is on a page of its own: [planted faults](faults.md)."""
CLAIMS_READING = """\
Most laws hold for every plugin. What one plugin is *for*, only its author can say, and a claim says it a second time,
slowly, the way that the paper does. A class of claims has any of these static methods; an entry point in the group
`unspool.claims` names it under the plugin's own name. Names and arguments are checked. A `row` has `prompt`, `tokens`,
`path`, `logits`, `logprobs`, `end_ids`, `max_new_tokens`, `uniform(purpose)` and `model`.
Where parameters leave it open, `texts` and `score` give None; `allows` and `finishes` raise `NotImplementedError`.

Without claims a search is held to almost nothing that is its own: give it `texts`, the whole search by hand, or `score`
and `exhaustive`. Beam search (`strategies/beam/unspool_beam/claims.py`) is an example. Equal scores are told apart in
one way: rows keep the order in which `select` grew them, and texts of equal score the order in which they ended. Texts
of searches are compared on tables in which no two paths agree, so that rounding never decides."""
REQUIRED: dict[str, dict[str, Any]] = {
    "bad_words": {"sequences": [[0]]},
    "begin_suppress_tokens": {"token_ids": [0]},
    "choices": {"choices": ["yes", "no"]},
    "constrained_beam": {"phrases": [[0]]},
    "contrastive_decoding": {"layers": 1},
    "dola": {"layers": [1]},
    "draft_model": {"model": "draft"},
    "exponential_decay_length_penalty": {"start": 1, "factor": 1.1},
    "forced_bos": {"token_ids": [0]},
    "forced_eos": {"token_ids": [0]},
    "grammar": {"grammar": 'root ::= "a"'},
    "green_list": {"key": 1},
    "json_schema": {"schema": {"type": "integer"}},
    "layer_skip": {"layers": 1},
    "logit_bias": {"biases": {0: 1.0}},
    "regex": {"pattern": "a"},
    "rejection": {"layers": 1},
    "sequence_bias": {"sequences": [[[0], 1.0]]},
    "suppress_tokens": {"token_ids": [0]},
    "tagged": {"tags": [{"begin": "<", "end": ">", "regex": "a+"}]},
    "tournament": {"key": 1},
}
"""Plugin -> what it has no default for."""
NOTE = "<!-- Written by docs/generate.py from the code. Change the code, then run `make docs`. -->"


# ---- what there is ---------------------------------------------------------------------------------------------------


def projects() -> list[Path]:
    """Find the distributions of the workspace: the core, then the strategies, then the plugins."""
    return [
        ROOT / "core",
        *sorted(
            path.parent for folder in ("strategies", "plugins") for path in ROOT.glob(f"{folder}/*/pyproject.toml")
        ),
    ]


@cache
def project_table(folder: Path) -> dict[str, Any]:
    """Read the `[project]` table of a distribution."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


@cache
def workspace() -> Registry:
    """Know the plugins that the workspace registers, and no others."""
    entries: list[Entry] = []
    for folder in projects():
        project = project_table(folder)
        points = project.get("entry-points", {}).get("unspool", {})
        entries += [Entry(name, target, project["name"], project["version"]) for name, target in points.items()]
    return Registry(entries)


def plugins_of(folder: Path) -> list[Entry]:
    """List the plugins of one distribution, strategies first, else as it registers them."""
    entries = [entry for entry in workspace() if entry.distribution == project_table(folder)["name"]]
    return sorted(entries, key=lambda entry: not entry.is_strategy)


# ---- words -----------------------------------------------------------------------------------------------------------


def first_line(thing: object) -> str:
    """Give the first sentence of a docstring."""
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def prose(thing: object) -> str:
    """Give a docstring as Markdown: what stands under `Args`, `Returns` and `Raises` becomes lists."""
    lines: list[str] = []
    section = False
    for line in (inspect.getdoc(thing) or "").splitlines():
        if match := re.fullmatch(r"(Args|Returns|Raises):", line):
            section = True
            lines += [f"*{match[1]}*", ""]
        elif section and (entry := re.fullmatch(r" {4}([\w, ]+): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        elif section and line.startswith(" " * 8):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line.removeprefix(" " * 4) if section else line)
    return "\n".join(lines).strip()


def comment_below(owner: type, name: str) -> str:
    """Give the string that stands below an attribute in the source of a class."""
    source = inspect.getsource(owner)
    match = re.search(rf'^    {name}: .*?\n    """(.*?)"""', source, re.MULTILINE | re.DOTALL)
    return re.sub(r"\s+", " ", match[1]) if match else ""


def signature(function: Callable[..., Any]) -> str:
    """Write a method's name and parameters, without `self`."""
    shown = inspect.signature(function)
    parameters = [parameter for parameter in shown.parameters.values() if parameter.name != "self"]
    return f"{function.__name__}{shown.replace(parameters=parameters)}".replace("'", "")


def kind(annotation: Any) -> str:
    """Write a type the way a reader of a config file thinks of it."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(a) for a in arguments if a is not type(None)))
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (tuple, list):
        inner = [kind(a) for a in arguments if a is not Ellipsis]
        return f"list of {inner[0]}" if len(set(inner)) == 1 else f"[{', '.join(inner)}]"
    if isinstance(origin, type):
        return f"map of {kind(arguments[0])} to {kind(arguments[1])}" if len(arguments) == 2 else origin.__name__
    names = {int: "integer", float: "number", str: "text", bool: "true or false", Any: "anything"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def bounds(metadata: Iterable[Any], annotation: Any = None) -> str:
    """Write the bounds of a field."""
    marks = [*metadata]
    for part in (annotation, *typing.get_args(annotation)):
        if typing.get_origin(part) is typing.Annotated:
            marks += typing.get_args(part)[1:]
    found: dict[str, Any] = {}
    for mark in marks:
        for part in (mark, *getattr(mark, "metadata", ())):
            for name in ("ge", "gt", "le", "lt", "min_length"):
                if (value := getattr(part, name, None)) is not None:
                    found[name] = "2^63" if value == 2**63 else value
    low = f"from {found['ge']}" if "ge" in found else f"above {found['gt']}" if "gt" in found else ""
    high = f"to {found['le']}" if "le" in found else f"below {found['lt']}" if "lt" in found else ""
    long = f"at least {found['min_length']} long" if "min_length" in found else ""
    return ", ".join(filter(None, (f"{low} {high}".strip(), long)))


def default(field: Any) -> str:
    """Write a field's default."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined or (not isinstance(value, bool | int | float) and not value):
        return ""
    return f"`{json.dumps(value)}`" if isinstance(value, bool | int | float) else f"`{value}`"


# ---- plugins.md, and the table of the README -------------------------------------------------------------------------


def plugin_table() -> str:
    """Give the table of the README: every plugin in a line."""
    rows = []
    for folder in projects():
        path = folder.relative_to(ROOT).as_posix()
        for entry in plugins_of(folder):
            what = "strategy" if entry.is_strategy else ", ".join(_roles(entry.plugin))
            rows.append(
                [f"`{entry.name}`", what, first_line(entry.plugin), f"[{entry.distribution}]({path}/README.md)"]
            )
    return table(["name", "is", "what it does", "from"], rows)


def _roles(plugin: type[Plugin]) -> list[str]:
    words = {"pre_forward": "drafter", "logits_transform": "transform", "stop_check": "stop"}
    roles = [word for hook, word in words.items() if hasattr(plugin, hook)]
    return ["constraint" if role == "transform" and plugin.constraint else role for role in roles]


def plugins_page() -> str:
    """Give docs/plugins.md."""
    parts = [f"{NOTE}\n\n# Plugins\n\n{PLUGINS}"]
    for folder in projects():
        if not (entries := plugins_of(folder)):
            continue
        path = folder.relative_to(ROOT).as_posix()
        parts.append(f"## {entries[0].distribution}\n\nMore in its [README](../{path}/README.md).")
        for entry in entries:
            what = "A strategy" if entry.is_strategy else f"A {' and '.join(_roles(entry.plugin))}"
            parts.append(f"### `{entry.name}`\n\n{what}. {first_line(entry.plugin)}{_flags(entry.plugin)}")
            if rows := list(_parameters(entry.plugin)):
                parts.append(table(["parameter", "default", "type", "bounds", "meaning"], rows))
    parts.append(f"## Pairs that are refused\n\n{_refused()}")
    return "\n\n".join(parts) + "\n"


def _flags(plugin: type[Plugin]) -> str:
    said = []
    if plugin.constraint:
        said.append("It forbids tokens, so it acts before all others, wherever it stands in the list.")
    if not plugin.row_local:
        said.append("It looks at more than its own row (not `row_local`).")
    if plugin.reads_logprob:
        said.append("Its state depends on the model (`reads_logprob`), so a step goes round by round.")
    if plugin.holds:
        said.append("It looks before it chooses (`holds`).")
    return "".join(f" {sentence}" for sentence in said)


def _parameters(plugin: type[Plugin]) -> Iterator[list[str]]:
    shared, main = per_request_fields(plugin.Params), plugin.Params.main_field()
    for name, field in plugin.Params.model_fields.items():
        shown = f"**`{name}`**" if name == main else f"`{name}`"
        star = " *" if name in shared else ""
        yield [
            shown + star,
            default(field),
            kind(field.annotation),
            bounds(field.metadata, field.annotation),
            field.description or "",
        ]


def _refused() -> str:
    """Ask every plugin about every other, and write down who refuses whom. Two plugins meet in greedy."""
    built = [_by_default(entry) for entry in workspace()]
    strategies = [plugin for plugin in built if hasattr(plugin, "select")]
    others = [plugin for plugin in built if not hasattr(plugin, "select")]
    greedy = next(plugin for plugin in strategies if plugin.name == "greedy")
    pairs: list[tuple[Plugin, tuple[Plugin, ...]]] = [
        (strategy, (other,)) for strategy in strategies for other in others
    ]
    pairs += [(greedy, pair) for pair in itertools.permutations(others, 2)]
    rows = []
    for strategy, plugins in pairs:
        try:
            Pipeline(strategy, plugins)
        except ConfigError as error:
            one, other = [strategy, *plugins][-2:]
            rows.append([f"`{one.name}`", f"`{other.name}`", "; ".join(p.message for p in error.problems)])
    count = len(built) * (len(built) - 1) // 2
    said = (
        "A pipeline has one strategy: a second one is refused. All other pairs of the plugins on this page were asked, "
    )
    said += f"in both orders, each plugin at its defaults: {count} pairs."
    return f"{said}\n\n" + (table(["plugin", "beside", "reason"], rows) if rows else "No pair is refused.")


def _by_default(entry: Entry) -> Plugin:
    plugin = entry.plugin(entry.plugin.Params.model_validate(REQUIRED.get(entry.name, {})))
    plugin.name = entry.name
    return plugin


# ---- laws.md ---------------------------------------------------------------------------------------------------------


def laws_page() -> str:
    """Give docs/laws.md."""
    parts = ["# Laws", NOTE, LAWS_READING]
    for law in LAWS.values():
        check = law.check.__name__  # type: ignore[attr-defined]
        parts.append(f"## {law.name}\n\n**{law.says}**\n\n{law.why}\n\nIn a test: `{check}(case)`.")
    claims = [[f"`{_call(name)}`", prose(getattr(Claims, name))] for name in METHODS]
    parts.append(f"## Claims\n\n{CLAIMS_READING}\n\n{table(('claim', 'what it says'), claims)}")
    return "\n\n".join(parts) + "\n"


def _call(claim: str) -> str:
    return f"{claim}({', '.join(inspect.signature(getattr(Claims, claim)).parameters)})"


# ---- hooks.md --------------------------------------------------------------------------------------------------------


def hooks_page() -> str:
    """Give docs/hooks.md."""
    module = sys.modules[Hooks.__module__]
    parts = [
        f"{NOTE}\n\n# The hooks\n\n{prose(module).partition(chr(10))[2].strip()}",
        HOOKS_READING,
        "## Hooks\n\nA plugin is a subclass of `unspool.Plugin` with methods of these names, each marked `@hookimpl`.",
    ]
    parts += [f"### `{signature(getattr(Hooks, name))}`\n\n{prose(getattr(Hooks, name))}" for name in HOOKS]
    parts.append(f"## `Growth`\n\n{prose(Growth)}")
    parts += [f"### `growth.{signature(method)}`\n\n{prose(method)}" for _, method in _members(Growth)]
    parts.append(f"## `Step`\n\n{prose(Step)}")
    parts.append(table(["member", "meaning"], ([f"`step.{name}`", _flat(value)] for name, value in _values(Step))))
    methods = [(name, method) for name, method in _members(Step) if name != "calls_for"]
    parts += [f"### `step.{signature(method)}`\n\n{prose(method)}" for _, method in methods]
    parts.append(f"## `Drafts`\n\n{prose(Drafts)}")
    parts.append(f"## What a plugin declares\n\n{prose(Plugin)}")
    attributes = [name for name in inspect.get_annotations(Plugin) if comment_below(Plugin, name)]
    parts.append(
        table(
            ["member", "default", "meaning"],
            ([f"`{name}`", f"`{getattr(Plugin, name)!r}`", comment_below(Plugin, name)] for name in attributes),
        )
    )
    parts += [f"### `{signature(method)}`\n\n{prose(method)}" for _, method in _members(Plugin)]
    parts.append(f"## `Companion`\n\n{prose(Companion)}")
    return "\n\n".join(parts) + "\n"


def _members(owner: type) -> list[tuple[str, Callable[..., Any]]]:
    return [(n, m) for n, m in vars(owner).items() if inspect.isfunction(m) and not n.startswith("_")]


def _values(owner: type) -> list[tuple[str, object]]:
    named = vars(owner).items()
    return [(n, v) for n, v in named if isinstance(v, property | cached_property) and not n.startswith("_")]


def _flat(thing: object) -> str:
    return re.sub(r"\s+", " ", inspect.getdoc(thing) or "")


# ---- json-schemas.md -------------------------------------------------------------------------------------------------


def json_schemas_page() -> str:
    """Give docs/json-schemas.md. The suite must be there."""
    return f"{NOTE}\n\n{json_schema_suite.page(json_schema_suite.run(json_schema_suite.SUITE))}"


# ---- parts of pages that are written by hand -------------------------------------------------------------------------


def settings_table(model: type[BaseModel], prefix: str = "") -> str:
    """Give the fields of one section of a config file."""
    rows = []
    for name, field in model.model_fields.items():
        if model is Variation and name in ("strategy", "plugins", "replace_plugins", "limits"):
            continue
        shown = ", ".join(filter(None, (kind(field.annotation), bounds(field.metadata, field.annotation))))
        rows.append([f"`{prefix}{name}`", shown, default(field), field.description or ""])
    return table(["field", "type", "default", "meaning"], rows)


def generation_table() -> str:
    """Give what becomes of every field of transformers' generation config."""
    rows = []
    for name, meaning in {**FIELDS, **ARGUMENTS}.items():
        if isinstance(meaning, AsPlugin):
            said = f"the plugin `{meaning.plugin}`" + (" (under `do_sample`)" if meaning.sampler else "")
        elif isinstance(meaning, AsSetting):
            said = f"`{meaning.setting}`"
        elif isinstance(meaning, Ignored):
            said = f"no effect: {meaning.reason}"
        else:
            assert isinstance(meaning, Unsupported)
            said = f"not honoured, and you are told: {meaning.reason}"
        rows.append([f"`{name}`", said])
    return table(["transformers", "here"], rows)


def arguments_table(owner: type) -> str:
    """Give the `Args` of a dataclass's docstring as a table."""
    found: list[list[str]] = []
    _, _, text = (inspect.getdoc(owner) or "").partition("Args:\n")
    for line in text.splitlines():
        if match := re.fullmatch(r" {4}(\w+): (.*)", line):
            found.append([f"`{match[1]}`", match[2]])
        elif line.startswith("        "):
            found[-1][1] += " " + line.strip()
    return table(["field", "meaning"], found)


def example() -> str:
    """Give the module of the example plugin as a snippet."""
    source = (ROOT / "docs/example-plugin/unspool_runner_up.py").read_text(encoding="utf-8")
    return f"```python\n{source}```"


PARTS: dict[str, Callable[[], str]] = {
    "example": example,
    "plugins": plugin_table,
    "settings": lambda: settings_table(Variation),
    "limits": lambda: settings_table(LimitSettings, "limits."),
    "model": lambda: settings_table(ModelSettings, "model."),
    "engine": lambda: settings_table(EngineSettings, "engine."),
    "generation_config": generation_table,
    "request": lambda: arguments_table(Request),
    "hypothesis": lambda: arguments_table(Hypothesis),
    "stats": lambda: arguments_table(Stats),
    "result": lambda: first_line(Result),
}


def with_parts(page: str) -> str:
    """Write anew what stands between the marks of a page."""

    def renew(match: re.Match[str]) -> str:
        return f"{match[1]}\n{PARTS[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", renew, page, flags=re.DOTALL)


def pages() -> dict[Path, str]:
    """Map every file that holds something generated to what it should hold."""
    files = {
        ROOT / "docs/hooks.md": hooks_page(),
        ROOT / "docs/laws.md": laws_page(),
        ROOT / "docs/plugins.md": plugins_page(),
        ROOT / "docs/config-schema.json": json.dumps(config_schema(workspace()), indent=2, ensure_ascii=False) + "\n",
    }
    if json_schema_suite.is_there():
        files[JSON_SCHEMAS] = json_schemas_page()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        if path not in files and "<!-- generated: " in (page := path.read_text(encoding="utf-8")):
            files[path] = with_parts(page)
    return files


def out_of_date() -> dict[Path, str]:
    """Map every file that is not current to a diff."""
    stale = {}
    for path, wanted in pages().items():
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        if there != wanted:
            name = path.relative_to(ROOT).as_posix()
            lines = difflib.unified_diff(there.splitlines(), wanted.splitlines(), name, name, lineterm="", n=0)
            stale[path] = "\n".join(lines)
    return stale


def main(arguments: list[str]) -> int:
    """Write what is out of date, or only say so."""
    stale = out_of_date()
    if not json_schema_suite.is_there():
        print(f"{JSON_SCHEMAS.relative_to(ROOT)} was not looked at: {json_schema_suite.ABSENT}")
    for path, diff in stale.items():
        if "--check" in arguments:
            print(diff)
        else:
            path.write_text(pages()[path], encoding="utf-8")
        print(f"{path.relative_to(ROOT)} {'is out of date: make docs' if '--check' in arguments else 'written'}")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
