"""Hugging Face causal language models behind the runner's protocol."""

from unspool.huggingface.load import LoadedModel, from_model, load
from unspool.huggingface.runner import HuggingFaceRunner

__all__ = ["HuggingFaceRunner", "LoadedModel", "from_model", "load"]
