"""The distributions of the workspace: complete, of one version, and independent of each other where they should be."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

from unspool.registry import GROUP, Registry

ROOT = Path(__file__).parents[1]
FOLDERS = [
    ROOT / "core",
    *sorted(path.parent for group in ("strategies", "plugins") for path in ROOT.glob(f"{group}/*/pyproject.toml")),
]
each = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def project(folder: Path) -> dict[str, Any]:
    """Read the project table of a distribution."""
    table: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


VERSION = project(ROOT / "core")["version"]
PLUGINS = {name for folder in FOLDERS for name in project(folder).get("entry-points", {}).get(GROUP, {})}


@each
def test_it_says_what_it_is(folder: Path) -> None:
    table = project(folder)
    assert table["name"] == ("unspool" if folder.name == "core" else f"unspool-{folder.name}")
    assert table["version"] == VERSION
    assert table["license"] == "Apache-2.0"
    assert table["requires-python"] == ">=3.11"
    readme = (folder / table["readme"]).read_text(encoding="utf-8")
    assert readme.startswith(f"# {table['name']}\n")


@each
def test_its_wheel_holds_its_types_and_the_license(folder: Path, tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=folder, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (license_file,) = (name for name in names if name.endswith("/licenses/LICENSE"))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    package = project(folder)["name"].replace("-", "_")
    assert f"{package}/py.typed" in names
    assert {name.partition("/")[0] for name in names} == {package, f"{package}-{VERSION}.dist-info"}


@each
def test_it_depends_on_this_core_alone_of_all_of_them(folder: Path) -> None:
    own = [need for need in project(folder)["dependencies"] if need.startswith("unspool")]
    assert own == ([] if folder.name == "core" else [f"unspool=={VERSION}"])


@each
def test_it_is_installed_by_the_requirements(folder: Path) -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert f"-e ./{folder.relative_to(ROOT).as_posix()}" in lines
    assert importlib.metadata.version(project(folder)["name"]) == VERSION


@each
def test_its_plugins_can_be_loaded(folder: Path) -> None:
    installed = {entry.name: entry for entry in Registry.installed()}
    for name, target in project(folder).get("entry-points", {}).get(GROUP, {}).items():
        entry = installed[name]
        assert (entry.target, entry.distribution, entry.broken) == (target, project(folder)["name"], None)
        assert entry.plugin.__doc__
        assert sys.modules[entry.plugin.__module__].__doc__


def test_torch_is_pinned_first() -> None:
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    assert wanted[0].startswith("torch==")


def test_the_core_names_no_plugin_and_imports_none() -> None:
    # A model's generation config says `do_sample` and `top_k`: what these become must name plugins, and nothing else.
    found, names = [], PLUGINS - {"json"}  # which is a word of its own besides
    for path in sorted((ROOT / "core" / "unspool").rglob("*.py")):
        if path.name == "generation_config.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Constant(value=str(word)) if word in names:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} names {word}")
                case ast.Import(names=modules):
                    found += [f"{path.name} imports {n.name}" for n in modules if n.name.startswith("unspool_")]
                case ast.ImportFrom(module=str(module)) if module.startswith("unspool_"):
                    found.append(f"{path.name} imports {module}")
    assert not found


@each
def test_a_strategy_or_plugin_imports_no_other(folder: Path) -> None:
    packages = {path.name.removesuffix(".py") for path in folder.glob("unspool*")}
    for path in (path for package in folder.glob("unspool*") for path in [package, *package.rglob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if path.suffix == ".py" else ():
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("unspool"):
                assert node.module.partition(".")[0] in {"unspool", *packages}, path


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_unspool_does_nothing() -> None:
    run(
        "import os, sys, threading\n"
        "environment = dict(os.environ)\n"
        "import unspool\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pluggy', 'pydantic', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert environment == dict(os.environ) and threading.active_count() == 1\n"
    )


def test_importing_the_engine_loads_no_plugin_and_touches_no_device_and_no_seed() -> None:
    run(
        "import sys, torch\n"
        "state = torch.get_rng_state()\n"
        "import unspool\n"
        "unspool.Engine, unspool.Plugin, unspool.Step\n"
        "loaded = [name for name in sys.modules if name.startswith('unspool_')]\n"
        "assert not loaded, loaded\n"
        "assert 'transformers' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert torch.equal(state, torch.get_rng_state())\n"
    )


def test_the_command_line_lists_its_help_without_torch() -> None:
    run(
        "import sys\n"
        "sys.argv = ['unspool', '--help']\n"
        "from unspool.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules\n"
    )
