"""`unspool new`: a distribution with one plugin, its claims, its tests and its README, ready to install and to change.

Each kind is a small real plugin. The templates stand beside this file: `pyproject.toml` is common to all kinds, the
rest is in a folder for each.
"""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unspool.cli import options
from unspool.cli.failure import reported

if TYPE_CHECKING:
    from collections.abc import Mapping


class Kind(StrEnum):
    """What a plugin may be; each is a folder of templates."""

    strategy = "strategy"
    transform = "transform"
    drafter = "drafter"
    constraint = "constraint"
    stop = "stop"


SUMMARIES = {
    Kind.strategy: "The most probable token, and a coin where two are nearly as probable",
    Kind.transform: "Forbid tokens too improbable beside the square of the largest probability",
    Kind.drafter: "Guess that what followed the last tokens before will follow them again",
    Kind.constraint: "No token more than so many times in direct succession",
    Kind.stop: "End a text that goes round in circles",
}
CLAIMS = """
# What it claims to do, for the laws that hold it to that.
[project.entry-points."unspool.claims"]
$name = "$module.claims:$Class"
"""


def new(
    kind: Annotated[Kind, typer.Argument(help="What it shall be.", show_default=False)],
    name: Annotated[str, typer.Argument(help="What configs shall call it, such as my_idea.", show_default=False)],
    into: Annotated[
        Path, typer.Option("--into", metavar="FOLDER", help="Where the distribution's folder is made.")
    ] = Path(),
    debug: options.Debug = False,
) -> None:
    """Write a distribution with a new plugin, to install and to change."""
    with reported(debug):
        from unspool.cli.output import write
        from unspool.errors import InputError, OutputError

        check_name(name)
        files = distribution(kind, name)
        folder = into / f"unspool-{name.replace('_', '-')}"
        if not into.is_dir():
            raise InputError("--into", str(into), "no such folder: make it first")
        if folder.exists():
            raise InputError("name", name, f"{folder} is there already, and nothing is overwritten")
        try:
            for path, text in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"cannot write {error.filename}: {error.strerror}") from error
        write(_account(kind, name, folder, files))


def distribution(kind: Kind, name: str) -> dict[str, str]:
    """Give the files of a distribution, by their paths in its folder.

    Raises:
        InputError: the name would give the class a name that its module needs for something else.
    """
    from unspool.errors import InputError

    title = "".join(part.capitalize() for part in name.split("_"))
    files = _rendered(kind, name, title)
    if title in _names_used(_rendered(kind, name, "PlaceOfTheClass")):
        raise InputError("name", name, f"another one: its class would be {title}, which the module uses already")
    return files


def check_name(name: str) -> None:
    """Raise an `InputError` where a plugin cannot have this name here, with the reason."""
    import importlib.util
    import re

    import yaml

    from unspool.errors import InputError
    from unspool.registry import Registry

    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        wanted = re.sub(r"[^a-z0-9]+", "_", re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()).strip("_0123456789")
        hint = f", such as {wanted}" if wanted else ""
        raise InputError("name", name, f"lower-case letters, digits and single underscores, a letter first{hint}")
    if yaml.safe_load(name) != name:
        raise InputError("name", name, f"another one: in a config, YAML would read it as {yaml.safe_load(name)}")
    for entry in Registry.installed():
        if entry.name == name:
            raise InputError("name", name, f"another one: {entry.distribution} has a plugin of this name")
    if importlib.util.find_spec(f"unspool_{name}") is not None:
        raise InputError("name", name, f"another one: a module unspool_{name} is installed already")


def _rendered(kind: Kind, name: str, title: str) -> dict[str, str]:
    from importlib.resources import files
    from string import Template

    from unspool import __version__

    folder = files(__name__)
    module = f"unspool_{name}"
    words = {
        "name": name,
        "Title": title,
        "Class": title,
        "module": module,
        "distribution": f"unspool-{name.replace('_', '-')}",
        "summary": SUMMARIES[kind],
        "version": __version__,
    }

    def filled(*path: str) -> str:
        return Template(folder.joinpath(*path).read_text(encoding="utf-8")).substitute(words)

    claims = folder.joinpath(kind, "claims.py.txt").is_file()
    words["claims"] = Template(CLAIMS).substitute(words) if claims else ""
    made = {
        "pyproject.toml": filled("pyproject.toml.txt"),
        "README.md": filled(kind, "README.md.txt") + filled("README.md.txt"),
        f"{module}/__init__.py": filled(kind, "plugin.py.txt"),
        f"{module}/py.typed": "",
        f"tests/test_{name}.py": filled(kind, "test.py.txt"),
    }
    if claims:
        made[f"{module}/claims.py"] = filled(kind, "claims.py.txt")
    return made


def _names_used(files: Mapping[str, str]) -> set[str]:
    """Collect the names that Python files bind or use."""
    import ast
    import keyword

    found = set(keyword.kwlist)
    for path, text in files.items():
        for node in ast.walk(ast.parse(text)) if path.endswith(".py") else ():
            match node:
                case ast.Name(id=used) | ast.alias(name=used) | ast.ClassDef(name=used):
                    found.add(used)
    return found


def _account(kind: Kind, name: str, folder: Path, files: Mapping[str, str]) -> str:
    use = f"-s {name}" if kind is Kind.strategy else f"-s greedy -p {name}"
    return "\n".join(
        [
            f"wrote {folder}:",
            *(f"  {path}" for path in sorted(files)),
            "next:",
            f"  cd {shlex.quote(str(folder))}",
            "  pip install -e .",
            "  pytest",
            f"  unspool check {name}",
            f'  unspool generate "Name a bird." {use}',
            "",
        ]
    )
