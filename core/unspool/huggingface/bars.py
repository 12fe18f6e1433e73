"""The progress bars of transformers: none while we load, and afterwards as they were."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ContextDecorator
from functools import partial
from typing import Any

from transformers import modeling_gguf_pytorch_utils
from transformers.utils import logging

_READER: Any = modeling_gguf_pytorch_utils  # draws its bar past transformers' own switch
_LOGGING: Any = logging  # its functions have no types


class _NoBars(ContextDecorator):
    """Draws no bars in a block. Loads on several threads may overlap: the last to end puts all back."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._hook: Any = None
        self._bar: Any = None

    def __enter__(self) -> None:
        with self._lock:
            self._inside += 1
            if self._inside == 1:
                self._hook, self._bar = _LOGGING.set_tqdm_hook(_disabled), _READER.tqdm
                _READER.tqdm = partial(self._bar, disable=True)

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                _LOGGING.set_tqdm_hook(self._hook)
                _READER.tqdm = self._bar


def _disabled(bar: Callable[..., Any], args: Sequence[Any], settings: Mapping[str, Any]) -> Any:
    return bar(*args, **{**settings, "disable": True})


no_bars = _NoBars()
