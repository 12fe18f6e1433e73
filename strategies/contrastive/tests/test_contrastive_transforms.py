"""Contrastive decoding, DoLa and guidance are what their papers say, computed anew for every text by plain models.

The reference runs plain models on whole texts, without a cache, and reads all layers' hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor

from unspool.errors import ConfigError, InputError
from unspool.huggingface.runner import HuggingFaceRunner
from unspool.pipeline import Pipeline, PluginSpec, build_plugin
from unspool.plugin import Plugin, hookimpl
from unspool.registry import Registry
from unspool.request import PreparedRequest, Result
from unspool_beam.log_softmax import LogSoftmax
from unspool_contrastive.decoding import ContrastiveDecoding
from unspool_contrastive.dola import Dola
from unspool_contrastive.guidance import Guidance
from unspool_contrastive.search import ContrastiveSearch
from unspool_testing import hosts
from unspool_testing.compare import check_batch, check_speculation
from unspool_testing.drafters import GuessChains, GuessTrees
from unspool_testing.driver import Circumstances, alone, drive, plugin, request
from unspool_testing.networks import tiny_model
from unspool_testing.table import TableModel

ARCHITECTURES = ["llama", "gpt2", "gemma2", "qwen3"]
PROMPTS = [(2, 9, 5), (2,), (2, 33, 4, 8, 61, 17)]
ENDS, NEW, LEAST = (1, 7), 8, 5
NEGATIVE = (2, 40, 11)
INF = float("inf")
NEAR = {"gemma2": 1e-5}
"""How far numbers may lie apart, where it is more than 1e-9: gemma's own attention takes its softmax in float32."""
Path = tuple[int, ...]

KINDS: dict[str, type[Plugin]] = {
    "contrastive_decoding": ContrastiveDecoding,
    "dola": Dola,
    "guidance": Guidance,
}


def build(name: str, **params: Any) -> Plugin:
    return build_plugin(PluginSpec(name, params), Registry([]).with_plugins(KINDS))


# ---- the reference ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """A plain model that is asked for whole texts."""

    model: PreTrainedModel

    @torch.inference_mode()
    def layers(self, path: Path) -> list[Tensor]:
        """Give the log-probabilities `[vocab]` after a path, by each layer: its hidden state, final norm and head."""
        out = self.model(torch.tensor([path]), use_cache=False, output_hidden_states=True)
        network: Any = self.model
        base = network.base_model
        norm = base.ln_f if hasattr(base, "ln_f") else base.norm
        head = network.get_output_embeddings()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        rows = [head(norm(hidden[0, -1])) for hidden in out.hidden_states[:-1]]
        rows = [cap * torch.tanh(row / cap) if cap else row for row in rows]
        return [row.log_softmax(-1) for row in [*rows, out.logits[0, -1]]]

    def logprobs(self, path: Path) -> Tensor:
        return self.layers(path)[-1]


@cache
def plain(arch: str, seed: int = 0) -> Network:
    return Network(tiny_model(arch, seed=seed))


@cache
def ours(arch: str, seed: int = 0) -> HuggingFaceRunner:
    return HuggingFaceRunner(tiny_model(arch, seed=seed))


By = Callable[[str, Path, Path, Tensor], Tensor]
"""(architecture, prompt, new tokens, logits before) -> logits after."""


def beyond(row: Tensor, log_q: Tensor, alpha: float, gain: float = 1.0, weight: float = 1.0) -> Tensor:
    """Contrast token by token, among those with a fraction alpha of the largest probability."""
    p = row.softmax(-1)
    return torch.tensor(
        [
            gain * math.log(p[t]) - weight * float(log_q[t]) if p[t] >= alpha * p.max() else -INF
            for t in range(len(row))
        ],
        dtype=row.dtype,
    )


def li(arch: str, prompt: Path, text: Path, row: Tensor) -> Tensor:
    log_q = (plain(arch, 1).logprobs((*prompt, *text)) / 0.5).log_softmax(-1)
    return beyond(row, log_q, 0.05)


def obrien(arch: str, prompt: Path, text: Path, row: Tensor) -> Tensor:
    return beyond(row, plain(arch).layers((*prompt, *text))[2], 0.2, gain=1.5, weight=0.5)


def kl(p: Tensor, q: Tensor) -> float:
    return math.fsum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))


def premature(arch: str, path: Path, layers: tuple[int, ...]) -> int:
    """Find the layer whose distribution lies farthest from the final one, as section 2 of the paper has it."""
    rows = plain(arch).layers(path)
    final, distance = rows[-1].exp(), {}
    for layer in layers:
        early = rows[layer].exp()
        mean = (final + early) / 2
        distance[layer] = (kl(final, mean) + kl(early, mean)) / 2
    return max(layers, key=lambda layer: distance[layer])


def dola(arch: str, prompt: Path, text: Path, row: Tensor) -> Tensor:
    path = (*prompt, *text)
    return beyond(row, plain(arch).layers(path)[premature(arch, path, (0, 1, 2))], 0.1)


def guidance(arch: str, prompt: Path, text: Path, row: Tensor) -> Tensor:
    said, other = (plain(arch).logprobs((*before, *text)) for before in (prompt, NEGATIVE))
    return row + (2.5 - 1) * (said - other)


def last_token(arch: str, prompt: Path, text: Path, row: Tensor) -> Tensor:
    said, other = (plain(arch).logprobs((*before, *text)) for before in (prompt, prompt[-1:]))
    return row + (0.3 - 1) * (said - other)


CASES: dict[str, tuple[Callable[[], Plugin], By]] = {
    "li": (lambda: build("contrastive_decoding", amateur="small", alpha=0.05, temperature=0.5), li),
    "obrien": (lambda: build("contrastive_decoding", layers=2, form="obrien", beta=0.5, alpha=0.2), obrien),
    "dola": (lambda: build("dola", layers=[0, 1, 2]), dola),
    "guidance": (lambda: build("guidance", scale=2.5, negative_prompt=list(NEGATIVE)), guidance),
    "last token": (lambda: build("guidance", scale=0.3), last_token),
}
cases = pytest.mark.parametrize("case", CASES)


def run(arch: str, asked: list[PreparedRequest]) -> list[Result]:
    results = alone(ours(arch), asked, {"small": ours(arch, 1)})
    assert [result.error for result in results] == [None] * len(asked)
    return results


def row_by_hand(by: By, arch: str, prompt: Path, text: Path, *, grammar: bool = False) -> Tensor:
    """Give the log-probabilities after a text: ends banned, maybe no token twice, then the transform."""
    row = plain(arch).logprobs((*prompt, *text)).clone()
    if len(text) < LEAST:
        row[list(ENDS)] = -INF
    if grammar:
        row[(*prompt, *text)[-1]] = -INF
    return by(arch, prompt, text, row).log_softmax(-1)


# ---- the papers ------------------------------------------------------------------------------------------------------


@cases
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_text_and_logprobs_are_those_of_the_paper(arch: str, case: str) -> None:
    make, by = CASES[case]
    for prompt, grammar in zip(PROMPTS, (False, True, True), strict=True):
        beside = [plugin(hosts.NoDoubles, most=99)] if grammar else []
        pipeline = Pipeline(plugin(hosts.Likeliest), [make(), *beside])
        limits: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": LEAST, "end_ids": ENDS}
        [result] = run(arch, [request(pipeline, prompt, logprobs="pipeline", **limits)])
        [hypothesis] = result.hypotheses
        logprobs = []
        for place, token in enumerate(hypothesis.token_ids):
            row = row_by_hand(by, arch, prompt, hypothesis.token_ids[:place], grammar=grammar)
            assert token == int(row.argmax())
            logprobs.append(float(row[token]))
        assert len(logprobs) >= LEAST
        assert hypothesis.logprobs == pytest.approx(logprobs, abs=NEAR.get(arch, 1e-9))


@cases
def test_it_changes_the_text(case: str) -> None:
    texts = set()
    for plugins in ([], [CASES[case][0]()]):
        pipeline = Pipeline(plugin(hosts.Likeliest), plugins)
        texts.add(tuple(r.token_ids for r in run("llama", [request(pipeline, p, max_new_tokens=12) for p in PROMPTS])))
    assert len(texts) == 2


@cases
def test_a_search_goes_by_what_it_makes_of_each_path(case: str) -> None:
    make, by = CASES[case]
    width, prompt = 3, PROMPTS[0]
    search = plugin(hosts.NarrowSearch, children=width, width=width)
    limits: dict[str, Any] = {"max_new_tokens": NEW, "min_new_tokens": LEAST, "end_ids": ENDS}
    [result] = run("llama", [request(Pipeline(search, [make()]), prompt, n=2, **limits)])

    beams: list[tuple[float, Path]] = [(0.0, ())]
    finished: list[tuple[float, Path]] = []
    while beams:
        children = []
        for score, text in beams:
            row = row_by_hand(by, "llama", prompt, text)
            best = sorted(range(len(row)), key=lambda token: -float(row[token]))[:width]
            children += [(score + float(row[token]), (*text, token)) for token in best if row[token] > -INF]
        children.sort(key=lambda child: -child[0])
        ended = [c for c in children if c[1][-1] in ENDS or len(c[1]) == NEW]
        finished += ended
        beams = [child for child in children if child not in ended][:width]
    finished.sort(key=lambda found: -found[0])
    assert [h.token_ids for h in result.hypotheses] == [text for _, text in finished[:2]]
    assert [h.score for h in result.hypotheses] == pytest.approx([score for score, _ in finished[:2]], abs=1e-9)


# ---- circumstances ---------------------------------------------------------------------------------------------------


@cases
def test_in_a_mixed_batch_everybody_gets_what_he_gets_alone(case: str) -> None:
    make = CASES[case][0]
    pipelines = [
        Pipeline(plugin(hosts.Likeliest), [make()]),
        Pipeline(plugin(hosts.Drawn), [plugin(hosts.NoDoubles, most=20), make()]),
        Pipeline(plugin(hosts.NarrowSearch), [make(), plugin(hosts.Tired)]),
        Pipeline(plugin(ContrastiveSearch), [make()]),
        Pipeline(plugin(hosts.Drawn)),
    ]
    asked = [
        request(pipeline, prompt, max_new_tokens=5, min_new_tokens=2, end_ids=(1,), seed=seed, logprobs="pipeline")
        for seed, (pipeline, prompt) in enumerate((pipeline, prompt) for pipeline in pipelines for prompt in PROMPTS)
    ]
    models = {"small": ours("llama", 1)}
    circumstances = Circumstances(slots=160, token_budget=24, preempts=frozenset({3, 4, 9}))
    for result in check_batch(ours("llama"), asked, circumstances, models):
        assert result.error is None
        assert all(math.isfinite(value) for h in result.hypotheses for value in h.logprobs or [INF])


@cases
@pytest.mark.parametrize("strategy", [hosts.Drawn, hosts.NarrowSearch, ContrastiveSearch])
def test_drafters_change_nothing(strategy: type[Plugin], case: str) -> None:
    models = {"small": TableModel(64, seed=2)}
    for drafter in (GuessChains, GuessTrees):
        bare = Pipeline(plugin(strategy), [CASES[case][0]()])
        drafting = Pipeline(plugin(strategy), [plugin(drafter, vocab_size=64), CASES[case][0]()])
        asked = request(bare, (1, 2), max_new_tokens=8, end_ids=(), logprobs="pipeline")
        check_speculation(TableModel(64, seed=1, memory=2), asked, bare, drafting, models=models)


# ---- DoLa ------------------------------------------------------------------------------------------------------------


def test_each_row_of_a_batch_has_a_premature_layer_of_its_own() -> None:
    prompts = [(2, first, second) for first in range(10, 16) for second in (20, 30)]
    chosen = {prompt: premature("llama", prompt, (0, 1, 2)) for prompt in prompts}
    assert len(set(chosen.values())) > 1, "this test needs rows that choose differently"
    pipeline = Pipeline(plugin(hosts.Likeliest), [build("dola", layers=[0, 1, 2])])
    asked = [request(pipeline, prompt, max_new_tokens=4, logprobs="pipeline") for prompt in prompts]
    check_batch(ours("llama"), asked, Circumstances())
    for result, prompt in zip(run("llama", asked), prompts, strict=True):
        row = dola("llama", prompt, (), plain("llama").logprobs(prompt)).log_softmax(-1)
        assert result.hypotheses[0].logprobs is not None
        assert result.hypotheses[0].logprobs[0] == pytest.approx(float(row.max()), abs=1e-9)


def test_one_layer_needs_no_choice() -> None:
    pipeline = Pipeline(plugin(hosts.Likeliest), [build("dola", layers=[1], alpha=0.01)])
    [result] = run("qwen3", [request(pipeline, PROMPTS[0], max_new_tokens=1, logprobs="pipeline")])
    rows = plain("qwen3").layers(PROMPTS[0])
    row = beyond(rows[-1], rows[1], 0.01).log_softmax(-1)
    assert result.hypotheses[0].logprobs == pytest.approx([float(row.max())], abs=1e-9)


def test_dola_costs_no_pass_and_no_row() -> None:
    counts = []
    for plugins in ([], [build("dola", layers=[0, 1])]):
        model = TableModel(6, seed=2)
        alone(model, [request(Pipeline(plugin(hosts.Likeliest), plugins), max_new_tokens=9, end_ids=())])
        counts.append((model.passes, model.tokens))
    assert counts[0] == counts[1]


# ---- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 1.7, 4.0])
def test_guidance_equals_generate_of_transformers(arch: str, scale: float) -> None:
    model: Any = plain(arch).model
    for prompt, negative in zip(PROMPTS, (None, NEGATIVE, (5,)), strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            guidance_scale=scale,
            negative_prompt_ids=None if negative is None else torch.tensor([negative]),
            do_sample=False,
            max_new_tokens=12,
            eos_token_id=1,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
        scores = [row[0].log_softmax(-1) for row in out.scores]
        texts = [out.sequences[0, len(prompt) :].tolist()]
        guide = build("guidance", scale=scale, negative_prompt=None if negative is None else list(negative))
        pipeline = Pipeline(plugin(hosts.Likeliest), [guide])
        [result] = run(arch, [request(pipeline, prompt, max_new_tokens=12, end_ids=(1,), logprobs="pipeline")])
        assert [list(result.token_ids)] == texts
        best = [float(row.max()) for row in scores]
        # generate's own scores are float32
        assert result.hypotheses[0].logprobs == pytest.approx(best, abs=1e-4)


def test_after_log_softmax_the_logits_themselves_are_those_of_transformers() -> None:
    seen: list[Tensor] = []

    class Look(Plugin):
        row_local = True

        @hookimpl
        def logits_transform(self, step: Any, logits: Tensor) -> None:
            seen.append(logits.clone())

    prompt = PROMPTS[2]
    negative: Any = torch.tensor([NEGATIVE])
    processor = UnbatchedClassifierFreeGuidanceLogitsProcessor(3.0, plain("llama").model, negative)
    with torch.inference_mode():
        raw = plain("llama").model(torch.tensor([prompt])).logits[:, -1]
        theirs = processor(torch.tensor([prompt]), raw)
    guide = build("guidance", scale=3.0, negative_prompt=list(NEGATIVE))
    pipeline = Pipeline(plugin(hosts.Likeliest), [plugin(LogSoftmax), guide, plugin(Look)])
    run("llama", [request(pipeline, prompt, max_new_tokens=1)])
    torch.testing.assert_close(seen[0], theirs, atol=1e-9, rtol=0)


def test_a_scale_of_one_changes_nothing() -> None:
    plain, guided = (
        Pipeline(plugin(hosts.Drawn), plugins)
        for plugins in ([], [build("guidance", scale=1.0, negative_prompt=list(NEGATIVE))])
    )
    settings: dict[str, Any] = {"max_new_tokens": 12, "end_ids": (), "logprobs": "pipeline"}
    # Both passes have the same shape: beside the plain request one runs from the negative prompt.
    result, _ = drive(ours("gpt2"), [request(plain, prompt, **settings) for prompt in (PROMPTS[0], NEGATIVE)])
    (same,) = run("gpt2", [request(guided, PROMPTS[0], **settings)])
    assert result.hypotheses == same.hypotheses


def test_guidance_costs_a_second_row_beside_every_row() -> None:
    counts = []
    for plugins in ([], [build("guidance", negative_prompt=[1, 2, 3])]):
        model = TableModel(6, seed=2)
        alone(model, [request(Pipeline(plugin(hosts.Likeliest), plugins), (4, 5), max_new_tokens=9, end_ids=())])
        counts.append((model.passes, model.tokens))
    assert counts == [(9, 2 + 8), (9, (2 + 8) + (3 + 8))]


def test_every_request_of_a_group_has_its_own_scale_and_negative_prompt() -> None:
    asked = []
    for scale, negative in ((2.5, list(NEGATIVE)), (0.3, None)):
        pipeline = Pipeline(plugin(hosts.Likeliest), [build("guidance", scale=scale, negative_prompt=negative)])
        asked.append(request(pipeline, PROMPTS[0], max_new_tokens=6, end_ids=(), logprobs="pipeline"))
    assert asked[0].pipeline.key == asked[1].pipeline.key
    for result, by in zip(check_batch(ours("llama"), asked, Circumstances()), (guidance, last_token), strict=True):
        for place, token in enumerate(result.token_ids):
            text = result.token_ids[:place]
            assert token == int(by("llama", PROMPTS[0], text, plain("llama").logprobs((*PROMPTS[0], *text))).argmax())


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("contrastive_decoding", {}, "name an amateur"),
        ("contrastive_decoding", {"layers": 0}, "layers: .*greater than or equal to 1"),
        ("contrastive_decoding", {"layers": 1, "alpha": 0}, "alpha: .*greater than 0"),
        ("contrastive_decoding", {"layers": 1, "beta": -1}, "beta: .*greater than or equal to 0"),
        ("contrastive_decoding", {"layers": 1, "form": "else"}, "form: .*'li' or 'obrien'"),
        ("dola", {}, "layers: Field required"),
        ("dola", {"layers": []}, "layers: .*at least 1"),
        ("dola", {"layers": [-1]}, "layers.0: .*greater than or equal to 0"),
        ("guidance", {"scale": -1}, "scale: .*greater than or equal to 0"),
        ("guidance", {"scale": INF}, "scale: .*finite"),
        ("guidance", {"negative_prompt": ""}, "negative_prompt"),
    ],
)
def test_parameters_out_of_bounds_are_refused_by_name(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(name, **params)


def test_a_negative_prompt_that_cannot_be_encoded_is_refused_by_name() -> None:
    for negative in ("text", [{"role": "user", "content": "text"}]):
        pipeline = Pipeline(plugin(hosts.Likeliest), [build("guidance", negative_prompt=negative)])
        with pytest.raises(InputError, match=r"guidance\.negative_prompt = "):
            alone(TableModel(5), [request(pipeline)])


def test_more_layers_than_the_amateur_has_are_refused() -> None:
    pipeline = Pipeline(plugin(hosts.Likeliest), [build("contrastive_decoding", layers=9)])
    with pytest.raises(ConfigError, match="9 layers: 1 to 3 are there"):
        alone(TableModel(5), [request(pipeline)])
