"""A tokenizer whose tokens are the strings that one lists: what a constraint on a table needs to be tried exactly.

    tokenizer = tokenizer_of(["<end>", "a", "b", "ab"], special=["<end>"])
    request(pipeline, prompt=(1,), end_ids=(0,), tokenizer=tokenizer)

A text is cut into the longest tokens that fit, from the left.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any


def tokenizer_of(tokens: Sequence[str], special: Sequence[str] = ()) -> Any:
    """Make a fast tokenizer of transformers.

    Args:
        tokens: the text of each token id, all different.
        special: those of them that show no text.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token=tokens[0]))
    longest_first = sorted(set(tokens) - set(special), key=len, reverse=True)
    pattern = Regex("|".join(re.sub(r"(\W)", r"\\\1", token) for token in longest_first))
    made.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    made.decoder = decoders.Fuse()
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=tokens[0])  # type: ignore[no-untyped-call]
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


@cache
def letters() -> Any:
    """Give the tokenizer of every request of a case: 64 tokens, the first of them special, brackets among the next."""
    first = ["<end>", "a", "[", "]", "1", "[a"]
    return tokenizer_of([*first, *(chr(0x100 + n) for n in range(64 - len(first)))], first[:1])
