"""The model runner for Hugging Face causal language models: packed passes over a pool of slots.

The model's own code runs unchanged, on one row of tokens that belong to many sequences; only attention is ours.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from unspool.errors import ModelError
from unspool.huggingface import attention, cache, flex, kernel, memory, package, probe
from unspool.huggingface import survey as surveys
from unspool.huggingface.attention import Attends
from unspool.huggingface.compiler import Compiler
from unspool.huggingface.flex import FlexPlan
from unspool.huggingface.graphs import Graphs
from unspool.huggingface.package import Subject
from unspool.huggingface.plan import Plan
from unspool.huggingface.pool import Pool
from unspool.huggingface.projections import quicken
from unspool.huggingface.table import TablePlan
from unspool.runner import Batch, Output

_log = logging.getLogger(__name__)


class Made(Protocol):
    """Passes that were made ready for this model: packages, or graphs."""

    @property
    def name(self) -> str:
        """Name them."""
        ...

    def takes(self, batch: Batch) -> bool:
        """Say whether it can run a batch."""
        ...

    def run(self, pool: Pool, batch: Batch) -> Output:
        """Run one packed pass."""
        ...


class HuggingFaceRunner:
    """Runs a `PreTrainedModel`. From here on the model's attention is ours: it answers to this runner alone.

    Args:
        model: a causal language model, on its device.
        compiled: use what has been compiled for this machine, such as the attention kernel, where it can be used.
        graphs: attend by FlexAttention, and run steps as CUDA graphs. It is for a GPU; elsewhere the same code runs
            uncompiled and unrecorded, which is slow, and good for tests.
        remember: do not compare the model with itself again if it agreed before (`probe.py`).

    Raises:
        ModelError: it cannot be run packed, or does not then give what it gives by itself; with the reason.
    """

    def __init__(
        self, model: PreTrainedModel, *, compiled: bool = True, graphs: bool = False, remember: bool = False
    ) -> None:
        model.train(False)
        self._model = model
        self._device = model.device
        memory.keep_freed()
        text = model.config.get_text_config(decoder=True)
        own = model.config._attn_implementation
        try:
            surveys.refuse_by_config(model.config)
            attention.register()
            model.set_attn_implementation(attention.NAME)
            found, self._layers_name, logits = surveys.survey(model)
            self.layer_kinds = found.layers
            """What each layer keeps and sees."""
            self._stack: nn.ModuleList = model.get_submodule(self._layers_name)  # type: ignore[assignment]
            self._vocab_size, self._dtype = logits.shape[-1], logits.dtype
            self._width = int(text.hidden_size)
            self._window = _window(text)
            self._shallow: dict[int, PreTrainedModel] = {}
            self._pool: Pool | None = None
            self._made: Sequence[Made] = ()
            self._all_made = False
            self._put_off: Callable[[], None] | None = None
            self.compiler: Compiler | None = None
            """Compiles the model when it has computed for long enough, if that is wanted and was not done before."""
            self._flex = graphs and self._can_flex()
            self._kernel = compiled and not self._flex and self.can_compile and kernel.available()
            self._digest = _digest(model)
            (probe.compare_once if remember else probe.compare)(self, model)
            self._free()
        except Exception as error:
            model.set_attn_implementation(own)
            reason = str(error) if isinstance(error, ModelError) else f"{type(error).__name__}: {error}"
            raise ModelError(f"{type(model).__name__} cannot be run packed: {reason}") from error

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self._vocab_size

    @property
    def window(self) -> int | None:
        """Most positions that the model was made for; None: no limit."""
        return self._window

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return self._width

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.layer_kinds)

    @property
    def device(self) -> torch.device:
        """Where logits and hidden states live."""
        return self._device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its logits."""
        return self._dtype

    @property
    def digest(self) -> str:
        """A short name of exactly these weights: a hash of the config and of a sample of every weight."""
        return self._digest

    @property
    def can_compile(self) -> bool:
        """Tell whether there is machine code to be made for this model: on a CPU, for all dtypes but float64."""
        return self._device.type == "cpu" and all(layer.dtype in kernel.DTYPES for layer in self.layer_kinds)

    @property
    def compiled(self) -> Sequence[str]:
        """Name what runs as code made for it: `attention`; passes of `one`, `few`, `many`, `more` tokens; `graphs`."""
        if self._flex:
            unrecorded = any(isinstance(made, Graphs) and not made.records for made in self._made)
            return ["attention", *([] if unrecorded else [Graphs.name])]
        return [*(["attention"] if self._kernel else []), *(made.name for made in self._made)]

    @property
    def subject(self) -> Subject:
        """Give what its packages are made of."""
        return Subject(self._model, self.layer_kinds, self._listening)

    def use_compiled(self) -> bool:
        """Use all that has been compiled for it from the next pass on, and say whether nothing is missing."""
        self._kernel = kernel.available()
        subject = self.subject
        made = subject.made() if self._kernel else []
        if sum(cache.size(subject.path(kind)) for kind in made) < self.free_bytes() // 2:
            self._made = [found for kind in made if (found := package.loaded(subject, kind))]
        self._all_made = len(self._made) == len(subject.kinds)
        return self._all_made

    def quicken(self, *, by_kernel: bool = True) -> None:
        """Replace the model's linear layers by quicker ones that compute the same, on a CPU (`projections.py`).

        That takes half a second or more, and a copy of the weights. Where packages run passes of all sizes, it is
        put off until the model's own code runs after all (some of its layers, its output matrix): it may never do.
        """
        self._put_off = functools.partial(quicken, self._model, by_kernel=by_kernel)
        if not self._all_made:
            self._catch_up()

    def _catch_up(self) -> None:
        if self._put_off is None:
            return
        with torch.inference_mode(mode=False):
            self._put_off()
        self._put_off = None
        self._shallow.clear()  # they have the layers that were replaced

    def slot_bytes(self) -> int:
        """Bytes of keys and values that one slot takes."""
        return sum(layer.slot_bytes for layer in self.layer_kinds)

    def free_bytes(self) -> int:
        """Bytes of memory that are free on the device now."""
        return memory.free_bytes(self._device)

    def allocate(self, slots: int) -> None:
        """Make (or remake) the pool of keys and values, all zero."""
        self._free()
        self._pool = Pool(self.layer_kinds, flex.room(slots) if self._flex else slots, self._device)
        if self._flex:
            self._made = [Graphs(self.subject, self._pool)]

    def _free(self) -> None:
        self._pool = None
        if self._flex:  # graphs hold the pool that they were recorded with
            self._made = ()

    @torch.inference_mode()
    def forward(self, batch: Batch) -> Output:
        """Run one packed pass, storing keys and values in the batch's slots."""
        assert self._pool is not None, "allocate before the first pass"
        start = time.monotonic()
        made = next((found for found in self._made if found.takes(batch)), None)
        output = self._eager(self._pool, batch) if made is None else made.run(self._pool, batch)
        self._pool.look_at(output.logits)
        if self.compiler is not None:
            self.compiler.note(time.monotonic() - start)
        return output

    def _eager(self, pool: Pool, batch: Batch) -> Output:
        """Run one packed pass by the model's own code."""
        self._catch_up()
        model = self._model if batch.layers is None else self._first(batch.layers)
        with self._listening(model, batch.hidden) as hidden:
            output = model(
                input_ids=self._tensor(batch.token_ids)[None],
                position_ids=self._tensor(batch.positions)[None],
                use_cache=False,
                logits_to_keep=self._tensor(batch.wanted),
                unspool=self._plan(pool, batch),
            )
        return Output(output.logits[0], hidden)

    def _plan(self, pool: Pool, batch: Batch) -> Attends:
        if self._flex:
            return FlexPlan.of(pool, batch)
        return TablePlan(pool, batch) if self._kernel else Plan(pool, batch)

    def _can_flex(self) -> bool:
        """Tell whether FlexAttention takes all layers; say so if not."""
        why = flex.refusal(self.layer_kinds) if self._device.type == "cuda" else None
        if why is not None:
            _log.warning("the model runs without CUDA graphs: %s", why)
        return why is None

    @torch.inference_mode()
    def head(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the output matrix to an earlier layer: `[n, width]` -> `[n, vocab]`."""
        self._catch_up()
        places = torch.zeros(1, len(hidden), dtype=torch.long, device=self._device)
        plan = _Resume(hidden[None])
        logits: Tensor = self._first(0)(input_ids=places, position_ids=places, use_cache=False, unspool=plan).logits
        return logits[0]

    def _first(self, count: int) -> PreTrainedModel:
        """Give the model with only its first layers, sharing every weight."""
        if count not in self._shallow:
            layers = self._stack[:count] if count else nn.ModuleList([_Resumed()])
            self._shallow[count] = _with_module(self._model, self._layers_name.split("."), layers)
        return self._shallow[count]

    @contextmanager
    def _listening(self, model: PreTrainedModel, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect hidden states during a pass: what enters a layer, and what leaves the final norm."""
        heard: dict[int, Tensor] = {}
        stack: nn.ModuleList = model.get_submodule(self._layers_name)  # type: ignore[assignment]
        with ExitStack() as hooks:
            for number in wanted:
                if number in (-1, len(stack)):
                    decoder = model.get_submodule(self._layers_name.rpartition(".")[0])
                    hooks.enter_context(decoder.register_forward_hook(_leaving(heard, number)))
                else:
                    layer = stack[number if number >= 0 else number + 1]
                    hooks.enter_context(layer.register_forward_pre_hook(_entering(heard, number), with_kwargs=True))
            yield heard

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.as_tensor(array, device=self._device)


@dataclass(frozen=True)
class _Resume:
    """Stands in for a plan where no layer runs: the hidden states `[1, n, width]` to go on from."""

    hidden: Tensor


class _Resumed(nn.Module):
    """Stands in for all layers: whatever enters, the plan's hidden states leave.

    So the model's own code applies its final norm, output matrix, scaling and soft cap, whatever they are called.
    """

    def forward(self, *_: Any, unspool: _Resume, **__: Any) -> Tensor:
        """Give the plan's hidden states."""
        return unspool.hidden


def _with_module(model: Any, path: Sequence[str], module: nn.Module) -> Any:
    """Copy a model with one submodule replaced, sharing all the others and every weight."""
    if not path:
        return module
    twin = copy.copy(model)
    twin.__dict__["_modules"] = dict(model._modules)
    twin._modules[path[0]] = _with_module(model._modules[path[0]], path[1:], module)
    return twin


def _entering(heard: dict[int, Tensor], number: int) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard[number] = (args[0] if args else kwargs["hidden_states"])[0]

    return hook


def _leaving(heard: dict[int, Tensor], number: int) -> Any:
    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        heard[number] = output[0][0]

    return hook


def _window(text: PreTrainedConfig) -> int | None:
    """Give the most positions at which every token's rotary angles depend on its own position alone.

    Two kinds of rope change all angles once the longest sequence of a batch passes what the model was first trained
    for; up to there they are like any other.

    Raises:
        ModelError: the config does not say where that is.
    """
    window: int | None = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    for parameters in [rope, *(entry for entry in rope.values() if isinstance(entry, dict))]:
        kind = parameters.get("rope_type") or ""
        if kind == "longrope" or "dynamic" in kind:
            first = parameters.get("original_max_position_embeddings")
            first = first or getattr(text, "original_max_position_embeddings", None)
            if (first is None and kind == "longrope") or window is None:
                raise ModelError(
                    f"its {kind} rope looks at a batch's longest sequence, and sets no limit to stay below"
                )
            window = min(window, first or window)
    return window


def _digest(model: PreTrainedModel) -> str:
    """Hash the config and 64 evenly spaced entries of every weight."""
    config = model.config.to_dict()
    for name in ("_name_or_path", "transformers_version", "dtype", "architectures"):
        config.pop(name, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    samples = []
    with torch.inference_mode():
        for name, weight in chain(model.named_parameters(), model.named_buffers()):  # which integer weights are
            digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
            for part in _parts(weight):
                flat = part.detach().reshape(-1)
                samples.append(flat[:: max(1, len(flat) // 64)][:64].to(torch.float64))
        digest.update(np.ascontiguousarray(torch.cat(samples).cpu().numpy()).tobytes())
    return digest.hexdigest()[:16]


def _parts(weight: Tensor) -> Iterator[Tensor]:
    """Give the plain tensors that a weight is made of: one, but for those of libraries that quantize."""
    if type(weight) in (Tensor, nn.Parameter) or not hasattr(weight, "__tensor_flatten__"):
        yield weight
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from _parts(getattr(weight, name))
