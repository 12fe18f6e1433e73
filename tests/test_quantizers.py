"""Models that libraries quantized run, near the exact ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

QUANTIZERS = os.environ.get("UNSPOOL_QUANTIZERS", "")
RUN = """
import json, sys
import numpy as np
from unspool.huggingface import load
from unspool.runner import Batch, Span

batch = Batch(np.arange(3, 23), np.arange(20), np.arange(20), [Span(0, 20, slice(0, 20))], np.arange(20))
found = []
for quantization in (None, sys.argv[2], sys.argv[2]):
    runner = load(sys.argv[1], device="cpu", dtype="bfloat16", quantization=quantization).runner
    runner.allocate(64)
    found.append((runner.digest, runner.forward(batch).logits.float()))
(exact, right), (digest, near), (again, same) = found
print(json.dumps({
    "error": float((right - near).square().mean().sqrt() / right.std()),
    "repeats": bool((near == same).all()) and digest == again,
    "told_apart": digest != exact,
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a model whose layers are as wide as a GPU's products of 4 bits want them, with a tokenizer."""
    from unspool.huggingface.load import local_folder

    made = tmp_path_factory.mktemp("wide")
    config: Any = transformers.LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(made)
    transformers.AutoTokenizer.from_pretrained(local_folder("smollm2")).save_pretrained(made)
    return made


@pytest.mark.real_model  # its tokenizer
@pytest.mark.skipif(not QUANTIZERS, reason="UNSPOOL_QUANTIZERS names no folder (make test sets it)")
@pytest.mark.parametrize(
    ("quantization", "most"),
    [("bitsandbytes-8bit", 0.1), ("bitsandbytes-4bit", 0.4), ("torchao-int8", 0.1), ("torchao-int4", 0.4)],
)
def test_a_model_that_a_library_quantized_runs_near_the_exact_one(folder: Path, quantization: str, most: float) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(QUANTIZERS).resolve())}
    command = [sys.executable, "-c", RUN, str(folder), quantization]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    told = json.loads(run.stdout.splitlines()[-1])
    assert 0 < told["error"] < most
    assert told["repeats"] and told["told_apart"]
