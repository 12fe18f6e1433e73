"""The engine on llguidance: an Earley parser over a lexer of derivatives, which finds a mask in some 50 microseconds.

Grammars are compiled with `no_forcing`: a mask then allows every spelling of a forced text, as `advance` does, and not
the canonical one alone. The end of a text is ours, not a matcher's: it knows one end token beyond the vocabulary, and
is never given it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from unspool.masks import Octets
from unspool_constrained.engine import GrammarError, Position
from unspool_constrained.guidance_position import GuidanceGrammar, GuidancePosition, first_line
from unspool_constrained.languages import Language
from unspool_constrained.notation import lark_of
from unspool_constrained.vocabulary import Vocabulary

KEPT = 128
"""Compiled grammars that are kept, the least recently used out first."""
MOST_SIDE_BY_SIDE = 20_000
"""Alternatives that a parser may hold at one place: of the default, a union of 2000 schemas would not be parsed."""
SIDE_BY_SIDE = 8
"""Masks from which on it pays to wake other threads for them."""
_END = "the end of the text"


class _Tokens:
    """A vocabulary as llguidance wants it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        end = len(vocabulary)
        self.tokens = [*vocabulary.tokens, _END.encode()]
        self.eos_token_id, self.bos_token_id, self.special_token_ids = end, None, [end]
        self._encode = vocabulary.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text if isinstance(text, str) else text.decode())


class Guidance:
    """Compiles languages with llguidance. Any thread may use it."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._tokenizers: WeakKeyDictionary[Vocabulary, LLTokenizer] = WeakKeyDictionary()
        self._compiled: OrderedDict[tuple[Vocabulary, Language], GuidanceGrammar] = OrderedDict()
        self._checked: OrderedDict[Language, str] = OrderedDict()
        self._threads = _Threads(0)

    def check(self, language: Language) -> None:
        """Raise a `GrammarError` where a language is refused whatever the vocabulary."""
        with self._lock:
            if (reason := self._checked.get(language)) is None:
                broken, said = LLMatcher.validate_grammar_with_warnings(lark_of(language), None, limits=_limits())
                reason = self._checked[language] = first_line(said[0]) if broken else ""
                _trim(self._checked)
        if reason:
            raise GrammarError(reason)

    def compile(self, language: Language, vocabulary: Vocabulary) -> GuidanceGrammar:
        """Compile a language, or find it compiled.

        Raises:
            GrammarError: the language is refused.
        """
        with self._lock:
            key = vocabulary, language
            found = self._compiled.get(key)
            if found is None:
                found = self._compiled[key] = self._compile(language, vocabulary)
                _trim(self._compiled)
            self._compiled.move_to_end(key)
            return found

    def _compile(self, language: Language, vocabulary: Vocabulary) -> GuidanceGrammar:
        tokenizer = self._tokenizers.get(vocabulary)
        if tokenizer is None:
            tokenizer = LLTokenizer(TokenizerWrapper(_Tokens(vocabulary)))
            self._tokenizers[vocabulary] = tokenizer
        matcher = LLMatcher(tokenizer, lark_of(language), log_level=0, limits=_limits())
        if matcher.is_error():
            raise GrammarError(first_line(matcher.get_error()))
        grammar = GuidanceGrammar(matcher, _spelled(vocabulary), len(vocabulary))
        start = grammar.start()
        if start.has_stopped or not self.masks([start]).any():
            raise GrammarError("a language with at least one text that is not empty, in tokens of this model")
        return grammar

    def prefetch(self, positions: Sequence[Position]) -> None:
        """Begin, on another thread, to find out which tokens may follow, and to copy matchers for who goes on."""
        pending = _pending(positions)
        if pending:
            future = self._pool().background.submit(self._prepare, pending)
            for position, _ in pending:
                position._filling = future

    def _prepare(self, pending: Sequence[tuple[GuidancePosition, LLMatcher]]) -> None:
        self._fill(pending)
        for position, matcher in pending:
            if not position.has_stopped:
                position._spare.append(matcher.deep_copy())
            position._filling = None  # who comes later need not ask the future

    def masks(self, positions: Sequence[Position]) -> Octets:
        """Say which tokens of the vocabulary may follow: `[positions, octets]`, a copy.

        Raises:
            GrammarError: a language grew too large.
        """
        found = []
        for position in positions:
            assert isinstance(position, GuidancePosition)
            if position._filling is not None or position._found is None:
                position._settle()
                self._fill(_pending(positions))
            assert position._found is not None
            if position._refused:
                raise GrammarError(position._refused)
            found.append(position._found)
        together = found[0][0]
        if len(together) == len(found) and all(masks is together and row == i for i, (masks, row) in enumerate(found)):
            return together.copy()  # in one piece: row by row it takes several times as long
        return np.array([masks[row] for masks, row in found])

    def _fill(self, pending: Sequence[tuple[GuidancePosition, LLMatcher]]) -> None:
        """Ask the matchers, outside the interpreter's lock and side by side."""
        if not pending:
            return
        spelled = pending[0][0]._grammar.spelled
        bits = np.zeros((len(pending), spelled.shape[1]), dtype=np.uint8)
        asked = [(row, matcher) for row, (position, matcher) in enumerate(pending) if not position.has_stopped]
        if len(asked) >= SIDE_BY_SIDE:
            matchers = [(matcher, row) for row, matcher in asked]
            self._pool().masks.unsafe_compute_mask_ptr(matchers, bits.ctypes.data, bits.shape[1], len(bits))
        else:
            for row, matcher in asked:
                matcher.unsafe_compute_mask_ptr(bits[row].ctypes.data, bits[row].nbytes)
        bits &= spelled  # the end is no text, and a grammar may name special tokens by their ids
        for row, matcher in asked:
            if matcher.is_error():
                error = first_line(matcher.get_error())
                bits[row] = 0
                pending[row][0]._refused = "" if error.startswith("NoExtension") else error  # a dead end is no fault
        for row, (position, _) in enumerate(pending):
            position._found = bits, row

    def _pool(self) -> _Threads:
        """Give this process's threads: those of a parent do not survive a fork."""
        threads = self._threads
        if threads.process == os.getpid():
            return threads
        with self._lock:
            if self._threads.process != os.getpid():
                self._threads = _Threads(os.getpid())
            return self._threads


class _Threads:
    """The threads that look for masks: one that waits, and those that llguidance keeps."""

    def __init__(self, process: int) -> None:
        self.process = process
        if process:
            self.background = ThreadPoolExecutor(1, thread_name_prefix="unspool-masks")
            self.masks = LLExecutor()


def _pending(positions: Sequence[Position]) -> list[tuple[GuidancePosition, LLMatcher]]:
    """List, each once, the positions of which nobody has asked, with their matchers."""
    unasked: dict[int, GuidancePosition] = {}
    for position in positions:
        assert isinstance(position, GuidancePosition)
        if position._found is None and position._filling is None:
            unasked[id(position)] = position
    return [(position, position.matcher) for position in unasked.values()]


def _spelled(vocabulary: Vocabulary) -> Octets:
    """Give a bit for each token that has a text: `[1, octets]`, whole words of 32, in which the end has a place."""
    there = np.zeros(32 * (len(vocabulary) // 32 + 1), dtype=bool)
    there[: len(vocabulary)] = [bool(token) for token in vocabulary.tokens]
    return np.packbits(there, bitorder="little")[np.newaxis]


def _limits() -> LLParserLimits:
    return LLParserLimits(max_items_in_row=MOST_SIDE_BY_SIDE, verbose_errors=False)


def _trim(cache: OrderedDict[Any, Any]) -> None:
    while len(cache) > KEPT:
        cache.popitem(last=False)


ENGINE = Guidance()
"""The engine of this process. It makes nothing until it is asked."""
