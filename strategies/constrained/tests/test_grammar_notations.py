"""GBNF is read as it is meant, character by character, and what cannot be read is refused with the line."""

from __future__ import annotations

import os
from itertools import product
from pathlib import Path

import pytest

from unspool_constrained.engine import GrammarError
from unspool_constrained.gbnf_as_lark import language_of_grammar
from unspool_constrained.guidance import ENGINE
from unspool_constrained.languages import Language
from unspool_constrained.vocabulary import Vocabulary, vocabulary_of
from unspool_testing.letters import tokenizer_of

DATA = Path(os.environ.get("UNSPOOL_TEST_DATA", Path(__file__).parents[4] / "shared" / "data"))
BYTES = Vocabulary([bytes([byte]) for byte in range(256)], lambda text: list(text.encode()))


def verdict(language: Language, text: str) -> str:
    """Say whether a text is in a language, could be the beginning of one, or neither."""
    position = ENGINE.compile(language, BYTES).start()
    for byte in text.encode():
        after = position.advance(byte)
        if after is None:
            return "no"
        position = after
    return "yes" if position.may_stop else "so far"


def gbnf(text: str) -> Language:
    return language_of_grammar(text)


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        ('root ::= "ab" | "a" "bc"', ["ab", "abc"], ["a", "abcc", "b"]),
        ("root ::= a a\na ::= [a-z]+", ["ab", "abc"], ["a", "A"]),
        ('root ::= "(" root ")" | "ab" | "a" "bc"', ["(abc)", "((ab))"], ["(ab", "()"]),
        ('root ::= root "a" | "b"', ["b", "baa"], ["a", ""]),
        ('root ::= [^^"\\\\] "\\""', ['a"'], ['^"', '\\"']),
        ('root ::= [-a] [a-] "\\x41\\u20ac\\n"', ["-aA€\n", "a-A€\n"], ["bbA€\n"]),
        ("root ::= [0-9]{2,3} [x]{2} .?", ["12xx", "123xx€"], ["1xx", "12x"]),
        ('root ::= "a" # note\n  | "b"  # note\n# note\nx ::= "c"', ["a", "b"], ["c"]),
        ('root ::= foo-Bar\nfoo-Bar ::= ("x" |\n "y")* "z"', ["z", "xyz"], ["x"]),
        ('root ::= ("(" root ")" | )+ "."', [".", "(.)."], ["()"]),
    ],
)
def test_gbnf_means_characters_not_terminals(grammar: str, yes: list[str], no: list[str]) -> None:
    language = gbnf(grammar)
    assert [verdict(language, text) for text in yes] == ["yes"] * len(yes)
    assert "yes" not in [verdict(language, text) for text in no]


def test_nothing_begins_what_never_ends() -> None:
    endless = gbnf('root ::= "a" x | "b" y? | z | "d" ("e" x)*\nx ::= "c" x\ny ::= x root\nz ::= "z" (x | "z")')
    assert [verdict(endless, text) for text in ("", "b", "d", "zz")] == ["so far", "yes", "yes", "yes"]
    assert [verdict(endless, text) for text in ("a", "bc", "de", "zc")] == ["no"] * 4
    with pytest.raises(GrammarError, match="comes to an end"):
        gbnf('root ::= "a" root | root "b"')


def test_a_recursive_grammar_allows_exactly_its_texts() -> None:
    language = gbnf('root ::= "a" root "b" | "ab" root? | "c"')

    def is_in(text: str) -> bool:
        return (
            text == "c"
            or text == "ab"
            or (text.startswith("ab") and is_in(text[2:]))
            or (text[:1] == "a" and text[-1:] == "b" and len(text) > 2 and is_in(text[1:-1]))
        )

    for length in range(8):
        for letters in product("abc", repeat=length):
            text = "".join(letters)
            assert (verdict(language, text) == "yes") == is_in(text), text


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ("root ::= y", "there is no 'y'"),
        ('x ::= "a"', "a rule `root`"),
        ('root ::= "abc', "in line 1"),
        ('root ::=\n ("a"', "in line 2"),
        ("root ::= [b-a]", "a range that ascends"),
        ("root ::= []", "a character in it"),
        ("root ::= " + "(" * 2000 + '"a"' + ")" * 2000, "brackets"),
        ("hello", "Expected"),
        ("start: y", "y"),
    ],
)
def test_what_is_no_grammar_is_refused_with_the_reason(grammar: str, why: str) -> None:
    with pytest.raises(GrammarError, match=why):
        ENGINE.check(gbnf(grammar))


def test_a_language_without_a_text_is_refused() -> None:
    letters = vocabulary_of(tokenizer_of(["<end>", "a"], ["<end>"]))
    for grammar in ("root ::= root", 'root ::= ""', 'root ::= "b"'):
        with pytest.raises(GrammarError, match="at least one text"):
            ENGINE.compile(gbnf(grammar), letters)


@pytest.mark.skipif(not DATA.is_dir(), reason="UNSPOOL_TEST_DATA names no folder")
def test_the_sample_grammars_of_llama_cpp_and_transformers_cfg_compile() -> None:
    files = [f for f in (DATA / "grammars").rglob("*") if f.suffix in (".gbnf", ".ebnf")]
    assert len(files) > 30
    for file in files:
        ENGINE.compile(gbnf(file.read_text(encoding="utf-8")), BYTES)


SAMPLES = {
    "gbnf/json.gbnf": ['{"a": [1, true, null], "b": {"c": "d\\n"}}', "{}"],
    "gbnf/arithmetic.gbnf": ["1 +2 *x =\n3\n"],
    "gbnf/list.gbnf": ["- apples\n- pears\n"],
    "gbnf/chess.gbnf": ["1. e4 e5\n2. Nf3 Nc6\n"],
    "ebnf/balanced_parentheses.ebnf": ["(())"],
}


@pytest.mark.skipif(not DATA.is_dir(), reason="UNSPOOL_TEST_DATA names no folder")
@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_sample_grammars_take_their_texts(name: str) -> None:
    language = gbnf((DATA / "grammars" / name).read_text(encoding="utf-8"))
    assert [verdict(language, text) for text in SAMPLES[name]] == ["yes"] * len(SAMPLES[name])
