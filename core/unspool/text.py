"""The text of a path, token by token: detokenizing, and the search for stop strings.

What a state holds after a token is a small frozen value, so branches share their ancestors' and nothing is ever undone.

**Detokenizing.** Half a character is held back until the rest of it comes. What the pieces come to is what decoding
prompt and new tokens together adds to the prompt's own text: a word piece keeps its space, which decoding the new
tokens alone would lose. Most tokenizers give every token fixed bytes. Those are tabled once, and a token costs a
lookup. Which rule of spelling applies is not guessed from names: a table is used if it agrees with the tokenizer's own
decoding of random ids. All others decode a short window twice a token.

**Stop strings.** The first one to be complete ends the text, at its own beginning; of those complete at the same
character, the one that began first. It may begin and end inside tokens. As long as the end of the text may be the
beginning of a stop string, that end is held back.
"""

from __future__ import annotations

import codecs
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unspool.request import PreparedRequest

_SAMPLES, _SAMPLE_LENGTH = 64, 24
_PROBE = "Ça va, 世界? 🎉\n\tnaïve  x"
_CONTEXT = 6
"""Tokens of the prompt that the window begins with: enough for any rule about spaces between neighbours."""
_LONGEST_HELD = 16
"""Tokens after which the window gives up waiting: no character has so many bytes, so its text ends in U+FFFD itself."""


@dataclass(frozen=True, slots=True)
class TextState:
    """Where the text of a path stands.

    Args:
        pending: bytes of a character that is not complete.
        window: the last token ids, for tokenizers without a table.
        done: how many ids of the window have been turned into text.
        fresh: nothing has been written yet, prompt included.
    """

    pending: bytes = b""
    window: tuple[int, ...] = ()
    done: int = 0
    fresh: bool = False


class Detokenizer:
    """Turns token ids into text, piece by piece.

    Special tokens give no text. Whoever calls decides about end tokens, which may be no special ones.

    Args:
        tokenizer: of transformers; None: every text is empty.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def start(self, prompt_ids: Sequence[int] = ()) -> TextState:
        """Give the state after a prompt, from which new text is counted."""
        if self.tokenizer is None:
            return TextState()
        if self._table is None:
            window = tuple(prompt_ids[-_CONTEXT:])
            return TextState(window=window, done=len(window))
        # Three tokens hold the beginning of any character that the prompt breaks off.
        tail = b"".join(self._spelled(token) for token in prompt_ids[-3:])
        _, used = codecs.utf_8_decode(tail, "replace", False)
        return TextState(tail[used:], fresh=not any(map(self._spelled, prompt_ids)))

    def push(self, state: TextState, token: int) -> tuple[TextState, str]:
        """Give the state one token later and the text that has become certain."""
        if self.tokenizer is None:
            return state, ""
        if self._table is None:
            return self._push_window(state, token)
        spelled = self._spelled(token)
        if not spelled:
            return state, ""
        data = state.pending + spelled
        text, used = codecs.utf_8_decode(data, "replace", False)
        fresh = state.fresh
        if fresh and text:
            text, fresh = self._opening(text), False
        return TextState(data[used:], fresh=fresh), text

    def flush(self, state: TextState) -> str:
        """Give what was held back, as it is decoded when nothing more comes."""
        if self.tokenizer is None:
            return ""
        if self._table is None:
            before, after = self._decode(state.window[: state.done]), self._decode(state.window)
            return after[len(before) :]
        return state.pending.decode(errors="replace")

    def text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """Give the text that `token_ids` add to a prompt."""
        state, pieces = self.start(prompt_ids), []
        for token in token_ids:
            state, piece = self.push(state, token)
            pieces.append(piece)
        return "".join(pieces) + self.flush(state)

    def text_of(self, request: PreparedRequest, tokens: Sequence[int], finish_reason: str) -> str:
        """Give the text of a hypothesis: without the end token, and cut before a stop string."""
        text = self.text(request.prompt_ids, tokens[:-1] if finish_reason == "eos" else tokens)
        if request.limits.stop:
            stops = StopStrings(request.limits.stop)
            _, cut = stops.push(stops.start(), text)
            text = text if cut is None else text[:cut]
        return text

    def _push_window(self, state: TextState, token: int) -> tuple[TextState, str]:
        window = (*state.window, token)
        before, after = self._decode(window[: state.done]), self._decode(window)
        held = len(window) - state.done
        if len(after) <= len(before) or (after.endswith("\ufffd") and held < _LONGEST_HELD):
            return TextState(window=window, done=state.done), ""
        # The ids just turned into text are the context of the next: they end with a whole character.
        kept = window[state.done :]
        return TextState(window=kept, done=len(kept)), after[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _spelled(self, token: int) -> bytes:
        assert self._table is not None
        return self._table[token] if token < len(self._table) else b""

    def _opening(self, text: str) -> str:
        """Take away the space with which a word piece begins, where a text begins."""
        return text[1:] if self._spelling.strips and text.startswith(" ") else text

    @property
    def spellings(self) -> Sequence[bytes] | None:
        """List the bytes of every token id, none for a special token; None where tokens have no fixed bytes."""
        return self._table

    @cached_property
    def _table(self) -> list[bytes] | None:
        return self._spelling.table

    @cached_property
    def _spelling(self) -> _Spelling:
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        special.update(self.tokenizer.all_special_ids)
        for spell, strips in ((_spell_bytes, False), (_spell_pieces, False), (_spell_pieces, True)):
            table = [b"" if i in special or t is None else spell(t) for i, t in enumerate(tokens)]
            spelling = _Spelling(table, strips)
            if all(spelling.decode(sample) == self._decode(sample) for sample in self._samples(table)):
                return spelling
        return _Spelling(None, False)

    def _samples(self, table: Sequence[bytes]) -> Iterator[list[int]]:
        """Draw ids to try a table on: a text of all kinds, and whole tokens at random.

        Broken bytes are no test: where a run of them cannot be decoded, tokenizers differ in how much they replace.
        """
        yield self.tokenizer.encode(_PROBE)
        whole = [i for i, spelled in enumerate(table) if codecs.utf_8_decode(spelled, "ignore")[0].encode() == spelled]
        chance = random.Random(0)
        for _ in range(_SAMPLES if whole else 0):
            yield [chance.choice(whole) for _ in range(_SAMPLE_LENGTH)]


@dataclass(frozen=True)
class _Spelling:
    """The bytes of every token, and whether a text loses the space that it begins with."""

    table: list[bytes] | None
    strips: bool

    def decode(self, ids: Sequence[int]) -> str:
        assert self.table is not None
        text = b"".join(self.table[i] for i in ids).decode(errors="replace")
        return text[1:] if self.strips and text.startswith(" ") else text


def _byte_alphabet() -> dict[str, int]:
    """Map the printable stand-ins of byte-level BPE to bytes (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(rest)}


_ALPHABET = _byte_alphabet()


def _spell_bytes(token: str) -> bytes:
    try:
        return bytes(_ALPHABET[char] for char in token)
    except KeyError:  # an added token, which stands for itself
        return token.encode()


def _spell_pieces(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("\u2581", " ").encode()


@dataclass(frozen=True, slots=True)
class StopState:
    """Where the search stands.

    Args:
        tail: the last characters, one less than the longest stop string has.
        length: how many characters the text has.
    """

    tail: str = ""
    length: int = 0


class StopStrings:
    """Searches the text of a path for stop strings.

    Args:
        stops: the strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(dict.fromkeys(stops))
        self._keep = max(map(len, self.stops), default=1) - 1
        self._beginnings = frozenset(stop[:k] for stop in self.stops for k in range(1, len(stop)))

    def start(self) -> StopState:
        """Give the state before any text."""
        return StopState()

    def push(self, state: StopState, text: str) -> tuple[StopState, int | None]:
        """Give the state after more text, and the length to cut the whole text to if a stop string is complete."""
        seen = state.tail + text
        after = StopState(seen[len(seen) - self._keep :] if self._keep < len(seen) else seen, state.length + len(text))
        ends = [(at + len(stop), at) for stop in self.stops if (at := self._find(seen, stop, len(state.tail))) >= 0]
        if not ends:
            return after, None
        _, begins = min(ends)
        return after, state.length - len(state.tail) + begins

    def held(self, state: StopState) -> int:
        """Say how many characters at the end may be the beginning of a stop string."""
        tail = state.tail
        return next((len(tail) - i for i in range(len(tail)) if tail[i:] in self._beginnings), 0)

    @staticmethod
    def _find(seen: str, stop: str, old: int) -> int:
        """Find the first place where `stop` ends beyond the `old` characters, which hold none."""
        return seen.find(stop, max(0, old - len(stop) + 1))
