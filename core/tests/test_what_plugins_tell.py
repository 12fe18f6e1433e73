"""What plugins tell the core besides the hooks: reports of results, prompts of companions, how wide they grow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models
from torch import Tensor

from unspool.engine import Engine
from unspool.errors import ConfigError, InputError, PluginError
from unspool.hooks import Growth
from unspool.huggingface.runner import HuggingFaceRunner
from unspool.loop import Loop
from unspool.pipeline import Pipeline
from unspool.plugin import Companion, Parameters, Plugin, hookimpl
from unspool.prompt import encode_like, encode_phrase
from unspool.registry import Registry
from unspool.request import Hypothesis, PreparedRequest, Request, Result
from unspool.step import Step
from unspool_sample.sample import Sample
from unspool_testing.driver import alone, plugin, request
from unspool_testing.networks import tiny_model
from unspool_testing.table import TableModel

VOCAB = 6


class LongestFirst(Sample):
    """Draw three samples, and return the longest text first."""

    name = "longest_first"

    def start(self, request: PreparedRequest) -> int:
        return 3

    def open(self, request: PreparedRequest) -> list[str]:
        return ["opened"]

    def rank(self, request: PreparedRequest, hypotheses: Sequence[Hypothesis]) -> Sequence[Hypothesis]:
        return sorted(hypotheses, key=lambda h: -len(h.text))

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        return {"own": own, "lengths": [len(h.text) for h in hypotheses]}


class Says(Plugin):
    """Report whatever it is given."""

    row_local = True

    class Params(Parameters):
        what: Any = None

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        if self.params.what == "raise":
            raise RuntimeError("no idea")
        what: Mapping[str, Any] = self.params.what
        return what


def letters() -> Any:
    """Make a tokenizer of six letters, each a token."""
    made = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abcdef")}, []))
    make: Any = transformers.PreTrainedTokenizerFast
    return make(tokenizer_object=made)


def test_a_rank_and_a_report_see_the_texts_of_all_hypotheses() -> None:
    registry = Registry([]).with_plugins({"longest_first": LongestFirst})
    with Engine(TableModel(VOCAB), letters(), registry=registry) as engine:
        (result,) = engine.run([Request(prompt="abc", strategy="longest_first", max_new_tokens=8, stop="d", seed=3)])
    lengths = result.reports["longest_first"]["lengths"]
    assert lengths == sorted(lengths, reverse=True) and len(lengths) == 3 and len(set(lengths)) > 1
    assert len(result.hypotheses) == 1 and len(result.text) == lengths[0]
    assert result.reports["longest_first"]["own"] == ["opened"]
    assert json.loads(json.dumps(result.to_dict()))["reports"]["longest_first"]["lengths"] == lengths


def say(what: Any) -> Result:
    pipeline = Pipeline(plugin(Sample), [plugin(Says, what=what)])
    return alone(TableModel(VOCAB), [request(pipeline, (1,), max_new_tokens=2)])[0]


def test_who_says_nothing_has_no_report() -> None:
    assert say({}).reports == {} and "reports" not in say({}).to_dict()


def test_what_a_plugin_parsed_of_a_text_is_the_result_s() -> None:
    assert say({"parsed": {"a": [1]}}).parsed == {"a": [1]}
    assert say({"complete": [False]}).parsed is None and say({}).parsed is None


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("raise", "Says.*report.*no idea"),
        ([1], "must return a mapping, not list"),
        ({"at": float("nan")}, "JSON cannot carry it"),
        ({"at": 1j}, "JSON cannot carry it"),
    ],
)
def test_a_report_that_fails_names_its_plugin(what: Any, message: str) -> None:
    error = say(what).error
    assert isinstance(error, PluginError)
    with pytest.raises(PluginError, match=f"(?is){message}"):
        raise error


class Echo(Plugin):
    """Choose what the model would say after the prompt turned round."""

    row_local = True

    def companions(self) -> Mapping[str, Companion]:
        return {"turned": Companion(prompt=self._turned, every_row=True)}

    def _turned(self, request: PreparedRequest) -> Sequence[int]:
        if request.prompt_ids[0] == 5:
            raise ValueError("five")
        return [] if request.prompt_ids[0] == 4 else request.prompt_ids[::-1]

    @hookimpl
    def select(self, step: Step, logits: Tensor) -> Growth:
        return Growth(row=torch.arange(len(logits)), token=step.companion("turned").argmax(-1))


def test_a_companion_may_read_a_prompt_made_for_each_request() -> None:
    model = TableModel(VOCAB, memory=6)
    prompts = [(1, 2, 3), (3, 2, 1), (0, 2, 2)]
    made = [request(Pipeline(plugin(Echo)), prompt, max_new_tokens=3) for prompt in prompts]
    for prompt, result in zip(prompts, alone(model, made), strict=True):
        path = list(prompt[::-1])
        for token in result.token_ids:
            assert token == int(model.logits_after(tuple(path)).argmax())
            path.append(token)


@pytest.mark.parametrize(("prompt", "message"), [((5, 1), "turned.*five"), ((4, 1), "turned.*no token")])
def test_a_companion_prompt_that_fails_names_its_plugin(prompt: tuple[int, ...], message: str) -> None:
    loop = Loop(TableModel(VOCAB), 40)
    with pytest.raises(PluginError, match=f"(?i)echo.*{message}"):
        loop.submit(request(Pipeline(plugin(Echo)), prompt, max_new_tokens=3))
    assert not len(loop.tree)


class Choosy(Sample):
    """Refuse long requests when they are opened, and grow as wide as it is told."""

    class Params(Parameters):
        wide: Any = 1

    def open(self, request: PreparedRequest) -> None:
        if request.limits.max_new_tokens > 4:
            raise InputError("max_new_tokens", request.limits.max_new_tokens, "at most 4")

    def widest(self, request: PreparedRequest) -> int:
        wide: int = self.params.wide
        return wide


def test_an_input_refused_on_opening_leaves_nothing_behind() -> None:
    loop = Loop(TableModel(VOCAB), 40)
    with pytest.raises(InputError, match="at most 4"):
        loop.submit(request(Pipeline(plugin(Choosy)), (1,), max_new_tokens=5))
    assert not len(loop.tree) and not loop.busy


@pytest.mark.parametrize("wide", [0, "3"])
def test_a_width_must_be_a_number_of_branches(wide: Any) -> None:
    loop = Loop(TableModel(VOCAB), 40)
    with pytest.raises(PluginError, match="widest"):
        loop.submit(request(Pipeline(plugin(Choosy, wide=wide)), (1,), max_new_tokens=3))
    assert not len(loop.tree)


class Looks(Plugin):
    """Look at a layer."""

    row_local = True

    class Params(Parameters):
        layer: int

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.hidden = (params.layer,)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        assert len(step.hidden(self.params.layer)) == len(logits)


@pytest.mark.parametrize(("layer", "there"), [(0, True), (3, True), (4, False), (-4, True), (-5, False)])
def test_a_layer_that_the_model_has_not_is_refused_before_it_can_hurt_others(layer: int, there: bool) -> None:
    loop = Loop(HuggingFaceRunner(tiny_model("llama")), 40)
    made = request(Pipeline(plugin(Sample), [plugin(Looks, layer=layer)]), (2, 3), max_new_tokens=3)
    if not there:
        with pytest.raises(ConfigError, match=f"looks: there is no layer {layer}: .* last is 3"):
            loop.submit(made)
        assert not len(loop.tree)
        return
    live = loop.submit(made)
    while loop.busy:
        loop.step()
    assert live.result is not None and live.result.error is None


def test_phrases_and_prompts_are_encoded_with_the_tokenizer_of_the_request() -> None:
    made = request(Pipeline(plugin(Sample)), (1,), max_new_tokens=3)
    assert encode_phrase(made, (3, 2)) == (3, 2)
    with pytest.raises(InputError, match="no tokenizer"):
        encode_phrase(made, "ab")
    with pytest.raises(InputError, match="at least one token"):
        encode_phrase(made, ())
    assert encode_like(made, [4, 2]) == (4, 2)
