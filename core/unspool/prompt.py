"""From a prompt to token ids: chat templates, special tokens, and what is wrong with a prompt, said before it runs.

A model that was tuned on a chat format answers badly, and silently so, where it is given anything else. So a text
prompt is one user turn wherever the tokenizer has a chat template, unless `raw` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unspool.errors import InputError
from unspool.request import PreparedRequest, Prompt


def encode_prompt(
    tokenizer: Any,
    prompt: Prompt,
    *,
    raw: bool = False,
    chat: Mapping[str, Any] | None = None,
    continue_final_message: bool = False,
    vocab_size: int | None = None,
) -> tuple[str, tuple[int, ...]]:
    """Give a prompt as text and as token ids, special tokens and chat template included.

    Args:
        tokenizer: of transformers, or None for a model without one: token ids are all that it takes then.
        prompt: text, chat messages, or token ids.
        raw: leave out the chat template of a text prompt.
        chat: further arguments of the template: `tools`, `documents`, `enable_thinking`, ...
        continue_final_message: the last message is an assistant turn that the model goes on with.
        vocab_size: how many token ids the model knows; None: as many as the tokenizer.

    Raises:
        InputError: an empty prompt, an id out of range, messages that the template refuses, text that is not Unicode.
    """
    if hasattr(prompt, "tolist"):
        prompt = prompt.tolist()
    if isinstance(prompt, str):
        if not prompt:
            raise InputError("prompt", prompt, "at least one character")
        if raw or continue_final_message or not _has_template(tokenizer):
            if continue_final_message:
                raise InputError("continue_final_message", True, "messages whose last one is the assistant's")
            return _encode_text(tokenizer, prompt)
        return _encode_messages(tokenizer, [{"role": "user", "content": prompt}], chat, False)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
        raise InputError("prompt", prompt, "text, a list of messages, or a list of token ids")
    if not prompt:
        raise InputError("prompt", prompt, "at least one token or message")
    if all(isinstance(message, Mapping) for message in prompt):
        messages = [message for message in prompt if isinstance(message, Mapping)]
        return _encode_messages(tokenizer, messages, chat, continue_final_message)
    size = vocab_size if vocab_size is not None else len(tokenizer) if tokenizer is not None else None
    ids = _checked_ids(prompt, size)
    return ("" if tokenizer is None else _decode(tokenizer, ids)), ids


def encode_like(request: PreparedRequest, prompt: Prompt) -> tuple[int, ...]:
    """Give the token ids of another prompt, written as the request's own is: in the chat template, unless that is raw.

    Raises:
        InputError: as `encode_prompt`.
    """
    return encode_prompt(request.tokenizer, prompt, raw=request.raw, chat=request.chat)[1]


def encode_phrase(request: PreparedRequest, phrase: str | Sequence[int]) -> tuple[int, ...]:
    """Give the token ids of a piece of text, as it stands inside a text: without special tokens.

    Args:
        request: whose model's tokens are wanted.
        phrase: text, or its token ids, which are given back.

    Raises:
        InputError: it gives no token, or is text and the model has no tokenizer.
    """
    ids = phrase if not isinstance(phrase, str) else _encode(request.tokenizer, phrase, add_special_tokens=False)
    if not ids:
        raise InputError("phrase", phrase, "text or token ids that come to at least one token")
    return tuple(ids)


def _has_template(tokenizer: Any) -> bool:
    return getattr(tokenizer, "chat_template", None) is not None


def _encode_text(tokenizer: Any, text: str) -> tuple[str, tuple[int, ...]]:
    ids = _encode(tokenizer, text, add_special_tokens=True)
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:  # the text already began with it
        ids = ids[1:]
    if not ids:
        raise InputError("prompt", text, "text that gives at least one token")
    return text, tuple(ids)


def _encode_messages(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], chat: Mapping[str, Any] | None, go_on: bool
) -> tuple[str, tuple[int, ...]]:
    if not _has_template(tokenizer):
        raise InputError("prompt", list(messages), "text or token ids: the model has no chat template")
    for i, message in enumerate(messages):
        if not isinstance(message.get("role"), str):
            raise InputError(f"prompt.{i}", dict(message), "a message has a role: system, user, assistant, ...")
    if go_on and messages[-1]["role"] != "assistant":
        raise InputError("continue_final_message", True, "messages whose last one is the assistant's")
    options = {"add_generation_prompt": not go_on, **(chat or {})}
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, continue_final_message=go_on, **options
        )
    except Exception as error:  # templates raise what they like
        raise InputError("prompt", list(messages), f"messages that the chat template takes: {error}") from error
    # The template has written the special tokens itself: adding them again would double the first.
    ids = _encode(tokenizer, text, add_special_tokens=False)
    if not ids:
        raise InputError("prompt", list(messages), "messages that give at least one token")
    return text, tuple(ids)


def _encode(tokenizer: Any, text: str, *, add_special_tokens: bool) -> list[int]:
    if tokenizer is None:
        raise InputError("prompt", text, "token ids: the model has no tokenizer")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("prompt", text, f"valid Unicode: a lone surrogate stands at {error.start}") from error
    ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return ids


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _checked_ids(prompt: Sequence[Any], size: int | None) -> tuple[int, ...]:
    for i, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool):
            raise InputError(f"prompt.{i}", token, "a token id; a prompt is text, messages, or token ids")
        if token < 0 or (size is not None and token >= size):
            allowed = "a token id is not negative" if size is None else f"token ids are 0 to {size - 1}"
            raise InputError(f"prompt.{i}", token, allowed)
    return tuple(prompt)
