"""Compiling for tests: into a folder of their own, without the tuning that takes minutes, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.nn.attention import flex_attention

from unspool.huggingface import kernel, package

UNTUNED = {
    "freezing": True,
    "max_autotune_report_choices_stats": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
"""What makes a package soon: no candidates are timed, and the code that only calls compiled code is not optimized."""


@contextmanager
def untuned(cache: Path) -> Iterator[None]:
    """Keep what is compiled in `cache`, with the attention kernel that is built already, and tune nothing."""
    built = kernel.build()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        kernel.cache_folder().mkdir(parents=True)
        (kernel.cache_folder() / built.name).symlink_to(built)
        patch.setattr(package, "_OPTIONS", UNTUNED)
        yield


@contextmanager
def plain_flex() -> Iterator[None]:
    """Run FlexAttention as plain torch, without compiling it for each shape."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield
