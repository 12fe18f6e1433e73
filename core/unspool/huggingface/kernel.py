"""Kernels: C++ operators, built once for a machine and a release of torch, kept in the user's cache.

Attention reads keys and values where they lie in the pool, any path of any tree, and a prefix that many paths share
once for all of them (`attention.cpp`). Products of bfloat16 rows with bfloat16 or 8-bit weights cost what reading these
or multiplying takes (`products.cpp`); they are there where the processor multiplies bfloat16 and looks bytes up in
tables (`projections.py`). What reads a vocabulary more than once in plain torch is here in one or two readings: the
divergence and the ratio of distributions (`distributions.cpp`), draws (`draws.cpp`), the best of a row (`ranks.cpp`);
hidden states are compared where they lie (`likeness.cpp`), and masks write where they forbid (`masks.cpp`). The modules
of the core that offer these use them where they are. Compiled passes (`package.py`) run without the interpreter's lock
(`passes.cpp`). Where there is no C++ compiler, or on a GPU, all of this is plain torch; a GPU may use `flex.py`.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from unspool.errors import ModelError
from unspool.huggingface import cache

_log = logging.getLogger(__name__)
_NAMES = "attention", "products", "distributions", "draws", "ranks", "likeness", "masks", "passes"
_SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in _NAMES)
_HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("vectors", "work", "tiles", "pairs"))
_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")
_PRODUCTS = "project", "project_gated"
_SHIMS = {
    "attend": """AOTITorchError aoti_torch_cpu_attend(
        AtenTensorHandle query, AtenTensorHandle key, AtenTensorHandle value, AtenTensorHandle keys,
        AtenTensorHandle values, AtenTensorHandle table, AtenTensorHandle mask, AtenTensorHandle* sinks,
        AtenTensorHandle* cosines, AtenTensorHandle* sines, double scaling, double softcap,
        AtenTensorHandle* attended)""",
    **{
        name: f"""AOTITorchError aoti_torch_cpu_{name}(
        AtenTensorHandle x, AtenTensorHandle laid, AtenTensorHandle* scale, AtenTensorHandle* bias, int64_t width,
        AtenTensorHandle* product)"""
        for name in _PRODUCTS
    },
}
_TIMEOUT_S = 600
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What it computes on; float64 is left to plain torch."""


def cache_folder() -> Path:
    """Give the folder in the user's cache where what is compiled is kept."""
    return cache.folder("compiled")


@functools.cache
def machine() -> str:
    """Name what compiled code depends on: the processor's instructions, the system, and torch's release."""
    features = ""
    with_flags = Path("/proc/cpuinfo")
    if with_flags.is_file():
        lines = with_flags.read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    told = f"{platform.machine()} {platform.system()} {features} {torch.__version__}"
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def path() -> Path:
    """Give where the built kernel is, or would be."""
    text = b"".join(file.read_bytes() for file in (*_SOURCES, *_HEADERS)) + " ".join(_FLAGS).encode()
    source = hashlib.sha256(text).hexdigest()[:16]
    return cache_folder() / f"attention-{machine()}-{source}.so"


def compiler() -> str | None:
    """Find a C++ compiler: what `CXX` names, else one of the usual names."""
    asked = os.environ.get("CXX")
    return shutil.which(asked) if asked else next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)


def build() -> Path:
    """Build the kernel, if that was not done before, and give its path.

    Raises:
        ModelError: there is no compiler, or it fails; with its words.
    """
    built = path()
    if built.is_file():
        return built
    command = compiler()
    if command is None:
        raise ModelError("the attention kernel needs a C++ compiler, and none is found: install g++, or set CXX")
    from torch.utils import cpp_extension

    libraries = Path(torch.__file__).parent / "lib"
    openmp = ("-fopenmp", "-DAT_PARALLEL_OPENMP=1") if platform.system() == "Linux" else ()
    native = ("-mcpu=native",) if platform.machine() in ("arm64", "aarch64") else ("-march=native",)
    includes = [part for folder in cpp_extension.include_paths() for part in ("-isystem", folder)]
    flags = [*_FLAGS, *native, *openmp]
    _log.info("building the attention kernel (once)")
    with cache.draft(built.parent) as draft, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = {str(source): str(draft / f"{source.stem}.o") for source in _SOURCES}
        each = [[*flags, *includes, "-c", source, "-o", to] for source, to in objects.items()]
        list(threads.map(functools.partial(_compile, command), each))
        output = draft / built.name
        links = [f"-L{libraries}", f"-Wl,-rpath,{libraries}", "-ltorch_cpu", "-lc10"]
        _compile(command, [*flags, "-shared", *objects.values(), "-o", str(output), *links])
        output.replace(built)  # whole or absent, whoever else builds it
    return built


def _compile(command: str, arguments: Sequence[str]) -> None:
    try:
        done = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ModelError(f"the attention kernel could not be built: {error}") from error
    if done.returncode:
        raise ModelError(f"the attention kernel could not be built: {command} says: {done.stderr.strip()[-2000:]}")


@functools.cache
def load() -> bool:
    """Load the kernel if it is built, and say whether it is there. A file that cannot be loaded is removed."""
    built = path()
    if not built.is_file():
        return False
    try:
        ctypes.CDLL(str(built), mode=ctypes.RTLD_GLOBAL)  # for packages, which call it
        torch.ops.load_library(str(built))  # type: ignore[no-untyped-call]
    except OSError as error:
        _log.warning("the attention kernel in %s cannot be loaded and is removed: %s", built, error)
        built.unlink(missing_ok=True)
        return False

    torch.library.register_fake("unspool::attend", _attended)
    for product in _PRODUCTS:
        if hasattr(torch.ops.unspool, product):
            torch.library.register_fake(f"unspool::{product}", _projected)
    return True


def _attended(*arguments: torch.Tensor) -> torch.Tensor:
    """Say what comes out, for the compiler."""
    query, _, value, *_ = arguments
    return query.new_empty((1, query.shape[2], query.shape[1], value.shape[3]))


def _projected(x: torch.Tensor, *others: Any) -> torch.Tensor:
    *_, width = others
    return x.new_empty((x.shape[0], width))


def shims() -> dict[Any, list[str]]:
    """Give the functions in C by which packages call the operators, a microsecond sooner than by torch's dispatcher."""
    operators = {name: getattr(torch.ops.unspool, name, None) for name in _SHIMS}
    return {operator.default: [_SHIMS[name]] for name, operator in operators.items() if operator is not None}


def multiplies() -> bool:
    """Say whether there are products here: `torch.ops.unspool.project`, of weights from `torch.ops.unspool.lay_out`."""
    return available() and hasattr(torch.ops.unspool, "project")


def available() -> bool:
    """Say whether the kernel can be used now: it may have been built since this was last asked."""
    if not load():
        if not path().is_file():
            return False
        load.cache_clear()
    return load()
