"""Compiled passes: the model's own code as one graph of machine code, attention by the kernel, weights laid out for it.

A *package* is what AOTInductor makes of the model for passes of so many tokens, with its weights frozen into it. It is
made once for a machine, a model and a number of threads, takes a minute or more, and lies in the user's cache, as the
library that it is: it is loaded from there, in a fraction of a second. Its weights are copied into a process's memory.

Where the kernel multiplies by most weights of a model (`products.cpp`), there is a package for a single token and one
for more, since a size of 1 is another program. The compiler's products are each quickest for some number of tokens, so
where it makes them there is a package for a single token, one for a few (decoding, drafts) and one for many (prompts).

A processor without bfloat16 instructions multiplies float32 several times faster. There the packages for more than one
token hold the weights as float32 and compute in it (the cache stays bfloat16), and only the pass of one token, which
does nothing but read the weights, reads them as bfloat16.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import shutil
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim
from transformers import PreTrainedModel

from unspool.errors import ModelError
from unspool.huggingface import cache, kernel
from unspool.huggingface.attention import Call
from unspool.huggingface.int8 import widen
from unspool.huggingface.pool import Layer, Pool
from unspool.huggingface.probe import allowed, difference
from unspool.huggingface.projections import can_pack, join, multiplied_by_kernel, multiply_by_kernel
from unspool.huggingface.rotations import leave_to_attention
from unspool.huggingface.table import Table, TablePlan, attend_by_kernel
from unspool.runner import Batch, Output, Span

_log = logging.getLogger(__name__)
_FORMAT = 5
"""Raised when packages that were made before must not be used any more."""
_STEM, _SUFFIXES, _SIZES = "pass", (".so", ".json"), "sizes.json"
"""Its files: the library, what it says of operators that it calls by torch's dispatcher, if any, and their sizes."""
_OPTIONS = {
    "freezing": True,
    "max_autotune": True,
    "max_autotune_gemm_backends": "CPP,ATEN",
    "max_autotune_report_choices_stats": False,
}
Listening = Callable[[PreTrainedModel, Sequence[int]], AbstractContextManager[dict[int, Tensor]]]


@dataclass(frozen=True)
class Kind:
    """One of a model's packages.

    Args:
        name: of its file.
        tuned: the number of tokens for which its products are tuned.
        first: the fewest tokens of a pass that it runs.
        last: the most.
    """

    name: str
    tuned: int
    first: int
    last: int

    @property
    def tokens(self) -> str:
        """Name the passes that it runs."""
        return f"{self.name} token{'s' if self.last > 1 else ''}"


KINDS = (Kind("one", 1, 1, 1), Kind("few", 16, 2, 64), Kind("many", 256, 65, 1 << 16))
"""What there is where the compiler makes the products."""
KINDS_BY_KERNEL = (KINDS[0], Kind("more", 16, 2, 1 << 16))
"""What there is where the kernel multiplies."""


@dataclass(frozen=True)
class Subject:
    """What packages are made of.

    Args:
        model: whose attention is ours.
        layers: what each layer keeps and sees.
        listening: collects hidden states during a pass.
    """

    model: PreTrainedModel
    layers: Sequence[Layer]
    listening: Listening

    @property
    def windows(self) -> list[int | None]:
        """Give the windows that its layers have, each once: each has a table of its own."""
        return list(dict.fromkeys(layer.window for layer in self.layers))

    @property
    def by_kernel(self) -> bool:
        """Whether the kernel multiplies."""
        return multiplied_by_kernel(self.model)

    @property
    def kinds(self) -> Sequence[Kind]:
        """List the packages that there are for it on this machine."""
        return KINDS_BY_KERNEL if self.by_kernel else KINDS

    @functools.cached_property
    def setting(self) -> str:
        """Name this config, this code and this machine."""
        digest = hashlib.sha256(f"{_FORMAT} {_OPTIONS} {kernel.path().name} {transformers.__version__}".encode())
        config = {**self.model.config.to_dict(), "_name_or_path": None}  # wherever it was loaded from
        digest.update(f"{torch.get_num_threads()} {self.layers} {json.dumps(config, default=str)}".encode())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def name(self) -> str:
        """Name these weights in this setting: nothing else may run its packages. It takes a second a gigabyte."""
        digest = hashlib.sha256()
        for name, weight in self.model.state_dict().items():
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            digest.update(weight.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        return f"{self.setting}-{digest.hexdigest()[:24]}"

    def path(self, kind: Kind) -> Path:
        """Give where a package is, or would be."""
        return kernel.cache_folder() / f"{self.name}-{kind.name}"

    def made(self) -> list[Kind]:
        """List the packages that are there. The weights are read only where others of their setting are."""
        if not any(kernel.cache_folder().glob(f"{self.setting}-*")):
            return []
        return [kind for kind in self.kinds if self.path(kind).is_dir()]


class Package:
    """A compiled pass, loaded.

    Args:
        folder: where it is.
        subject: what it was made of.
        kind: which of its packages.

    Raises:
        OSError: it is not there, or not whole.
        RuntimeError: it cannot be loaded.
    """

    def __init__(self, folder: Path, subject: Subject, kind: Kind) -> None:
        self.kind, self.name = kind, kind.name
        _check_whole(folder)
        self._run, self._windows = torch.classes.unspool.Pass(str(folder / f"{_STEM}.so")).run, subject.windows

    def takes(self, batch: Batch) -> bool:
        """Say whether it can run a batch."""
        return batch.layers is None and self.kind.first <= len(batch.token_ids) <= self.kind.last

    def run(self, pool: Pool, batch: Batch) -> Output:
        """Run one packed pass."""
        plan, fewest = TablePlan(pool, batch), min(2, self.kind.first)
        wanted = batch.wanted if len(batch.wanted) else np.zeros(1, dtype=np.int64)
        if len(wanted) < fewest:  # a size of 1 would be another program
            wanted = np.resize(wanted, fewest)
        tables = [part for window in self._windows for part in plan.table(window)]
        integers = [_tensor(array) for array in (batch.token_ids[None], batch.positions[None], wanted)]
        logits, *hidden = self._run([*integers, *tables, *pool.rows])
        if len(wanted) > len(batch.wanted):
            logits = logits[: len(batch.wanted)]
        return Output(logits, {number: hidden[number % len(hidden)] for number in batch.hidden})


def loaded(subject: Subject, kind: Kind) -> Package | None:
    """Load a package that was made. One that cannot be loaded is removed."""
    try:
        return Package(subject.path(kind), subject, kind)
    except Exception as error:  # of torch, for a file that is broken
        _log.warning("the package %s cannot be loaded and is removed: %s", subject.path(kind), error)
        cache.remove(subject.path(kind))
        return None


class _Traced:
    """Stands in for a plan while the model is traced: the tensors of a pass, which the graph will be given."""

    def __init__(self, layers: Sequence[Layer], tables: dict[int | None, Table], rows: Sequence[Tensor]) -> None:
        self._layers, self._tables, self._rows, self._turn = layers, tables, rows, 0

    def attend(self, call: Call) -> Tensor:
        turn, self._turn = self._turn, self._turn + 1
        table = self._tables[self._layers[turn].window]
        return attend_by_kernel(call, self._rows[turn], self._rows[turn + len(self._layers)], table)


class _Pass(nn.Module):
    """The model as one function of tensors: what is traced.

    It gives the logits of the wanted tokens, then every hidden state from the embedding to after the final norm.
    """

    def __init__(self, subject: Subject, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = subject.model
        self._subject, self._dtype = subject, dtype

    def forward(
        self, token_ids: Tensor, positions: Tensor, wanted: Tensor, tables: list[Tensor], rows: list[Tensor]
    ) -> list[Tensor]:
        layers, windows = self._subject.layers, self._subject.windows
        by_window = {w: Table(*tables[2 * at : 2 * at + 2]) for at, w in enumerate(windows)}
        with self._subject.listening(self.model, range(len(layers) + 1)) as hidden:
            output = self.model(
                input_ids=token_ids,
                position_ids=positions,
                use_cache=False,
                logits_to_keep=wanted,
                unspool=_Traced(layers, by_window, rows),
            )
        states = [hidden[number] for number in range(len(layers) + 1)]
        return [state.to(self._dtype) for state in (output.logits[0], *states)]


def make(subject: Subject, kind: Kind) -> Path:
    """Compile one of a model's packages, if that was not done before, and give its path. It takes minutes.

    Raises:
        ModelError: the compiler fails, with its words; or what it makes gives other logits than the model's own code.
    """
    made = subject.path(kind)
    if made.is_dir():
        return made
    from torch._inductor import select_algorithm  # takes a second to import

    kernel.build()
    if not kernel.available():
        raise ModelError("the attention kernel cannot be loaded here")
    own, dtype = subject, subject.model.dtype
    model: Any = copy.deepcopy(subject.model)
    if subject.by_kernel:
        multiply_by_kernel(model)
    else:
        if kind.last > 1:  # more tokens do not only read the weights: they multiply
            widen(model, torch.float32 if dtype.itemsize == 2 and not can_pack(dtype) else dtype)
        join(model)
    _keep_rotations(model)
    subject = Subject(model, subject.layers, subject.listening)
    _log.info("compiling passes of %s (once)", kind.tokens)
    select_algorithm.PRINT_AUTOTUNE = False
    try:
        with torch.no_grad(), cache.draft(made.parent) as draft:
            program = export(subject, kind, dtype)
            archive, folder = draft / "package.pt2", draft / made.name
            options = {**_OPTIONS, "aot_inductor.custom_ops_to_c_shims": kernel.shims()}
            torch._inductor.aoti_compile_and_package(program, package_path=str(archive), inductor_configs=options)
            _unpack(archive, folder)
            _compare(Package(folder, own, kind), own)
            _move(folder, made)
    except ModelError:
        raise
    except Exception as error:  # of any of three compilers
        raise ModelError(f"the model cannot be compiled: {type(error).__name__}: {error}") from error
    return made


def export(subject: Subject, kind: Kind, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """Trace a pass as a graph that gives logits and states in a dtype. Attention rotates what it reads."""
    inputs, dynamic = _example(subject, kind)
    program = torch.export.export(_Pass(subject, dtype), inputs, dynamic_shapes=dynamic, strict=False)
    leave_to_attention(program.graph)
    return program


def _keep_rotations(model: nn.Module) -> None:
    """Have the cosines and sines of rotary positions written down once a pass.

    Left to itself, the compiler computes them anew in each layer. It never looks through the strides of a view.
    """

    def keep(_module: nn.Module, _given: object, rotations: Any) -> Any:
        if not isinstance(rotations, tuple):  # complex numbers, which it does not compute
            return rotations
        return tuple(part.as_strided(part.shape, part.stride()) for part in rotations)

    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding"):
            module.register_forward_hook(keep)


def _unpack(archive: Path, folder: Path) -> None:
    """Take out of what the compiler made what is needed to run it, and note how large that is."""
    folder.mkdir()
    sizes = {}
    with zipfile.ZipFile(archive) as entries:
        (library,) = (entry for entry in entries.namelist() if entry.endswith(".so"))
        for suffix in _SUFFIXES:
            name = library.removesuffix(".so") + suffix
            if name not in entries.namelist():  # it calls no operator by torch's dispatcher
                continue
            with entries.open(name) as source, (folder / f"{_STEM}{suffix}").open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                sizes[suffix] = target.tell()
    (folder / _SIZES).write_text(json.dumps(sizes))


def _check_whole(folder: Path) -> None:
    """See that no file is cut short: reading past the end of one that is mapped would end the process.

    Raises:
        OSError: one is, or is not there.
    """
    sizes = {_SUFFIXES[0]: None, **json.loads((folder / _SIZES).read_text())}
    for suffix, size in sizes.items():
        file = folder / f"{_STEM}{suffix}"
        if file.stat().st_size != size:
            raise OSError(f"{file.name} has {file.stat().st_size} bytes, not {size}")


def _move(folder: Path, made: Path) -> None:
    """Put a package where it is looked for, whole, unless somebody else did so meanwhile."""
    try:
        folder.rename(made)
    except OSError:
        if not made.is_dir():
            raise


def _compare(package: Package, subject: Subject) -> None:
    """Run random tokens by a package and by the model's own code.

    Raises:
        ModelError: the logits differ, with the numbers.
    """
    count, model = package.kind.tuned, subject.model
    embedding: Any = model.get_input_embeddings()
    places = np.arange(count)
    vocabulary = len(embedding.weight)
    tokens = np.random.default_rng(0).integers(0, vocabulary, count)
    batch = Batch(tokens, places, places, [Span(0, count, slice(0, count))], places)
    cpu = torch.device("cpu")
    expected = model(
        input_ids=_tensor(tokens)[None],
        position_ids=_tensor(places)[None],
        use_cache=False,
        unspool=TablePlan(Pool(subject.layers, count, cpu), batch),
    ).logits[0]
    # A pool of one slot would be another program.
    compiled = package.run(Pool(subject.layers, count + 1, cpu), batch).logits
    if (error := difference(compiled, expected)) > allowed(model.dtype):
        raise ModelError(
            f"compiled for {package.kind.tokens}, its logits differ from its own by {error:.2g} of their spread "
            f"(allowed: {allowed(model.dtype):g} in {model.dtype}), so it would be run wrongly"
        )


def _example(subject: Subject, kind: Kind) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Give inputs of the size that a package is tuned for, and say which of their sizes may differ."""
    count, slots = kind.tuned, max(64, kind.tuned)
    pool = Pool(subject.layers, slots, torch.device("cpu"))
    tables = [torch.zeros(64, dtype=dtype) for _ in subject.windows for dtype in (torch.int64, torch.uint8)]
    places = torch.arange(count)
    sizes = [{0: Dim(f"table_{at}", min=2)} for at in range(len(tables))]
    many: Any = {1: Dim("tokens", min=kind.first, max=kind.last)} if count > 1 else {}
    wanted: Any = {0: Dim("wanted", min=2, max=kind.last)} if count > 1 else {}
    dynamic = many, many, wanted, sizes, [{2: Dim("slots", min=2)}] * len(pool.rows)
    return (places[None], places[None], places, tables, pool.rows), dynamic


def _tensor(array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(array)
