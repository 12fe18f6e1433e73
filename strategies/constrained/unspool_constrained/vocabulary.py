"""The tokens of a model as bytes: what a grammar reads.

They are spelled as the detokenizer spells them, so a grammar speaks of exactly the text that a result shows. Special
tokens have no spelling and can never stand inside a text. The table is made once for each tokenizer.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from unspool.text import Detokenizer


class Vocabulary:
    """A vocabulary.

    Args:
        tokens: the bytes of each token id; none where a token is special, or no token at all.
        encode: gives the canonical token ids of a text, without special tokens.
    """

    def __init__(self, tokens: Sequence[bytes], encode: Callable[[str], list[int]]) -> None:
        self.tokens, self.encode = tuple(tokens), encode
        self.kinds: list[NDArray[np.int64]] | None = None
        """The ids by kind, as a way to the end tries them; None: nobody asked yet."""

    def __len__(self) -> int:
        return len(self.tokens)


_known: WeakKeyDictionary[Any, Vocabulary] = WeakKeyDictionary()
_lock = threading.Lock()


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """Give the vocabulary of a tokenizer of transformers.

    Raises:
        ValueError: its tokens have no fixed bytes.
    """
    with _lock:
        found = _known.get(tokenizer)
        if found is None:
            found = _known[tokenizer] = _read(tokenizer)
        return found


def _read(tokenizer: Any) -> Vocabulary:
    table = Detokenizer(tokenizer).spellings
    if table is None:
        raise ValueError("a tokenizer whose tokens have fixed bytes (byte-level BPE, SentencePiece, WordLevel)")
    backend = getattr(tokenizer, "backend_tokenizer", None)

    def encode(text: str) -> list[int]:
        if backend is not None:  # without the reference to the tokenizer that would keep it for ever
            ids: list[int] = backend.encode(text, add_special_tokens=False).ids
            return ids
        return []

    return Vocabulary(table, encode)
