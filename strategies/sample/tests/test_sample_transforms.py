"""Each transform equals transformers' processor of the same name, except where the README says that it departs."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation import logits_process as hf

from unspool.errors import ConfigError
from unspool.pipeline import PluginSpec, build_plugin
from unspool.plugin import Plugin
from unspool.registry import Registry
from unspool_sample.epsilon import Epsilon
from unspool_sample.eta import Eta
from unspool_sample.min_p import MinP
from unspool_sample.mirostat import Mirostat
from unspool_sample.temperature import Temperature
from unspool_sample.top_h import TopH
from unspool_sample.top_k import TopK
from unspool_sample.top_n_sigma import TopNSigma
from unspool_sample.top_p import TopP
from unspool_sample.typical import Typical
from unspool_sample.xtc import Xtc

INF = float("inf")
PLUGINS: dict[str, type[Plugin]] = {
    "temperature": Temperature,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
    "typical": Typical,
    "epsilon": Epsilon,
    "eta": Eta,
    "top_n_sigma": TopNSigma,
    "top_h": TopH,
    "xtc": Xtc,
    "mirostat": Mirostat,
}


def build(name: str, **params: Any) -> Plugin:
    return build_plugin(PluginSpec(name, params), Registry([]).with_plugins(PLUGINS))


class FakeStep:
    """Rows of one request each, with parameters of their own."""

    def __init__(self, plugin: Plugin, rows: int, params: list[Any] | None = None, uniform: float = 0.0) -> None:
        self.params = params or [plugin.params] * rows
        self.requests = [SimpleNamespace(parameters={plugin.name: p}) for p in self.params]
        self._uniform = torch.full((rows,), uniform, dtype=torch.float64)

    def values(self, plugin: Plugin, field: str) -> Tensor:
        return torch.tensor([getattr(p, field) for p in self.params])

    def uniform(self, purpose: str) -> Tensor:
        return self._uniform

    def states(self, plugin: Plugin) -> list[Any]:
        return [plugin.initial(cast(Any, r)) for r in self.requests]


def entropy(logits: Tensor) -> float:
    return float(torch.special.entr(logits.softmax(-1)).sum())


def apply(plugin: Plugin, logits: Tensor, uniform: float = 0.0) -> Tensor:
    out = logits.clone()
    cast(Any, plugin).logits_transform(FakeStep(plugin, len(logits), uniform=uniform), out)
    return out


def kept(plugin: Plugin, row: list[float], uniform: float = 0.0) -> list[int]:
    out = apply(plugin, torch.tensor([row]), uniform)[0]
    return [t for t, value in enumerate(out.tolist()) if value > -INF]


@st.composite
def random_logits(draw: st.DrawFn) -> Tensor:
    """Rows without ties, some tokens forbidden, one allowed; float64, so that borders are not hit by chance."""
    rows, vocab = draw(st.integers(1, 3)), draw(st.integers(1, 130) | st.sampled_from([700, 3000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logits = torch.randn(rows, vocab, dtype=torch.float64, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    banned = torch.rand(rows, vocab, generator=generator) < draw(st.sampled_from([0.0, 0.5, 0.95]))
    banned[:, draw(st.integers(0, vocab - 1))] = False
    return logits.masked_fill(banned, -INF)


unit = st.floats(0.01, 0.99)
PARITY: list[tuple[str, str, st.SearchStrategy[Any], Callable[[Any], Any], dict[str, Any]]] = [
    ("temperature", "temperature", st.floats(0.05, 20), hf.TemperatureLogitsWarper, {}),
    ("top_k", "k", st.integers(1, 140), hf.TopKLogitsWarper, {}),
    ("top_p", "p", unit, hf.TopPLogitsWarper, {}),
    ("min_p", "p", unit, hf.MinPLogitsWarper, {}),
    ("typical", "p", unit, hf.TypicalLogitsWarper, {}),
    ("epsilon", "epsilon", unit, hf.EpsilonLogitsWarper, {}),
    ("epsilon", "epsilon", st.floats(1e-5, 1e-2), hf.EpsilonLogitsWarper, {}),
    ("eta", "epsilon", unit, hf.EtaLogitsWarper, {}),
    ("eta", "epsilon", st.floats(1e-5, 1e-2), hf.EtaLogitsWarper, {}),
    ("top_h", "alpha", unit, hf.TopHLogitsWarper, {"rule": "transformers"}),
]


@pytest.mark.parametrize(("name", "field", "values", "reference", "rest"), PARITY)
def test_it_equals_the_processor_of_transformers(
    name: str, field: str, values: st.SearchStrategy[Any], reference: Callable[[Any], Any], rest: dict[str, Any]
) -> None:
    @settings(max_examples=60, deadline=None)
    @given(random_logits(), values)
    def check(logits: Tensor, value: Any) -> None:
        # transformers makes a float32 tensor of eta: give both the same number.
        value = torch.tensor(value).item()
        expected = reference(value)(torch.zeros(len(logits), 1, dtype=torch.int64), logits.clone())
        assert torch.equal(apply(build(name, **{field: value}, **rest), logits), expected)

    check()


def build_all() -> list[Plugin]:
    """Every transform with parameters at which it acts."""
    strong: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": 0.5},
        "top_k": {"k": 2},
        "mirostat": {"tau": 0.1},
    }
    return [build(name, **strong.get(name, {})) for name in PLUGINS]


everything = pytest.mark.parametrize("plugin", build_all(), ids=lambda p: cast(Plugin, p).name)


@everything
@settings(max_examples=30, deadline=None)
@given(random_logits(), st.sampled_from([torch.float32, torch.float64]))
def test_some_token_survives_and_no_nan_is_made(plugin: Plugin, logits: Tensor, dtype: torch.dtype) -> None:
    logits = logits.to(dtype)
    out = apply(plugin, logits)
    assert out.dtype == dtype
    assert not out.isnan().any() and not (out == INF).any()
    assert (out > -INF).any(dim=-1).all()
    assert (out[logits == -INF] == -INF).all(), "what is forbidden stays forbidden"
    if plugin.name not in {"temperature", "xtc", "typical"}:
        best = logits.argmax(-1, keepdim=True)
        assert (out.gather(-1, best) > -INF).all(), "the most probable token survives"
    if plugin.name != "temperature":
        assert torch.equal(out[out > -INF], logits[out > -INF]), "what survives is not changed"


@everything
def test_a_dead_row_stays_dead(plugin: Plugin) -> None:
    out = apply(plugin, torch.tensor([[-INF, -INF, -INF], [1.0, 2.0, -INF]]))
    assert (out[0] == -INF).all()
    assert not out.isnan().any() and (out[1] > -INF).any()


@everything
def test_a_vocabulary_of_one_token_is_left_alone(plugin: Plugin) -> None:
    assert kept(plugin, [-2.5]) == [0]


@everything
def test_one_allowed_token_is_left_alone(plugin: Plugin) -> None:
    assert kept(plugin, [-INF, -INF, 3.0, -INF]) == [2]


@everything
@settings(max_examples=15, deadline=None)
@given(random_logits())
def test_a_row_does_not_depend_on_its_neighbours(plugin: Plugin, logits: Tensor) -> None:
    together = apply(plugin, logits)
    for row in range(len(logits)):
        assert torch.equal(together[row : row + 1], apply(plugin, logits[row : row + 1]))


PER_REQUEST: list[tuple[str, str, list[Any]]] = [
    ("temperature", "temperature", [0.5, 1.0, 2.0]),
    ("top_k", "k", [1, 4, 500]),
    ("top_p", "p", [0.2, 0.7, 1.0]),
    ("min_p", "p", [0.0, 0.1, 1.0]),
    ("typical", "p", [0.1, 0.5, 0.9]),
    ("epsilon", "epsilon", [1e-3, 0.1, 0.5]),
    ("eta", "epsilon", [1e-3, 0.1, 0.5]),
    ("top_n_sigma", "n", [0.1, 1.0, 2.0]),
    ("top_h", "alpha", [0.1, 0.5, 1.0]),
    ("xtc", "threshold", [0.01, 0.1, 0.5]),
    ("mirostat", "tau", [0.1, 1.0, 5.0]),
]


@pytest.mark.parametrize(("name", "field", "values"), PER_REQUEST)
def test_requests_with_different_parameters_share_a_call(name: str, field: str, values: list[Any]) -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 20)
    plugins = [build(name, **{field: value}) for value in values]
    together = logits.clone()
    cast(Any, plugins[0]).logits_transform(FakeStep(plugins[0], 3, [p.params for p in plugins]), together)
    for row, plugin in enumerate(plugins):
        assert torch.equal(together[row], apply(plugin, logits[row : row + 1])[0])


def test_temperature_zero_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match="use `strategy: greedy`"):
        build("temperature", temperature=0)


@pytest.mark.parametrize("value", [-1.0, 1e-9, 1e9, float("nan"), INF])
def test_a_temperature_out_of_bounds_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="temperature"):
        build("temperature", temperature=value)


def test_top_k_keeps_exactly_k_of_equal_tokens_the_lowest_ids() -> None:
    row = [1.0, 2.0, 2.0, 0.0, 2.0, 2.0]
    assert kept(build("top_k", k=3), row) == [1, 2, 4]
    everyone = hf.TopKLogitsWarper(3)(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([row]))
    assert (everyone > -INF).sum() == 4  # transformers keeps all that are equal to the third


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -INF]), min_size=1, max_size=12), st.integers(1, 14))
def test_top_k_is_a_stable_ranking(row: list[float], k: int) -> None:
    ranking = sorted(range(len(row)), key=lambda t: (-row[t], t))[:k]
    assert kept(build("top_k", k=k), row) == sorted(t for t in ranking if row[t] > -INF)


def test_top_p_of_one_changes_nothing_not_even_tokens_that_underflow() -> None:
    row = [0.0, -200.0, -INF, -1.0]
    assert kept(build("top_p", p=1.0), row) == [0, 1, 3]
    reference = hf.TopPLogitsWarper(1.0)(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([row]))
    assert reference[0, 1] == -INF


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mass_that_float32_rounds_to_one_cuts_no_wide_row_short(dtype: torch.dtype) -> None:
    row = torch.zeros(1, 700, dtype=dtype)
    assert apply(build("top_p", p=1 - 1e-9), row.clone()).isfinite().all()


def test_top_p_takes_equal_tokens_lowest_id_first_and_keeps_at_least_one() -> None:
    assert kept(build("top_p", p=0.5), [0.0, 0.0, 0.0, 0.0]) == [0, 1]
    assert kept(build("top_p", p=1e-6), [0.0, 3.0, 3.0]) == [1]


@given(st.integers(0, 9), st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]), st.sampled_from([2, 12, 500]))
def test_top_p_takes_the_same_of_a_wide_vocabulary(seed: int, p: float, kinds: int) -> None:
    logits = torch.randint(kinds, (2, 2000), generator=torch.Generator().manual_seed(seed)).double() * 4 / kinds
    right = []
    for row in logits.softmax(-1).tolist():
        mass, taken = 0.0, set()
        for token in sorted(range(2000), key=lambda t: (-row[t], t)):
            if mass >= p and p < 1:
                break
            mass += row[token]
            taken.add(token)
        right.append(sorted(taken))
    out = apply(build("top_p", p=p), logits)
    assert [(row > -INF).nonzero().flatten().tolist() for row in out] == right


def test_min_p_needs_a_fraction_of_the_best() -> None:
    row = [math.log(p) for p in (0.5, 0.26, 0.2, 0.04)]
    assert kept(build("min_p", p=0.5), row) == [0, 1]
    assert kept(build("min_p", p=0.0), [0.0, -200.0, -INF]) == [0, 1]
    assert kept(build("min_p", p=1.0), [2.0, 1.0, 2.0]) == [0, 2]


@pytest.mark.parametrize("name", ["epsilon", "eta"])
def test_the_best_token_stays_where_nothing_passes(name: str) -> None:
    flat = [1e-3 * t for t in range(50)]
    assert kept(build(name, epsilon=0.9), flat)[-1] == 49
    assert kept(build("epsilon", epsilon=0.9), flat) == [49]


def test_top_n_sigma_measures_the_spread_of_allowed_tokens() -> None:
    row = [4.0, 2.0, 0.0]  # sigma = sqrt(8 / 3) = 1.63
    assert kept(build("top_n_sigma", n=1.0), row) == [0]
    assert kept(build("top_n_sigma", n=1.3), row) == [0, 1]
    assert kept(build("top_n_sigma", n=1.3), [*row, -INF, -INF]) == [0, 1]


@settings(max_examples=30, deadline=None)
@given(random_logits(), st.sampled_from([0.37, 1.03, 1.71]), st.floats(0.2, 5))
def test_top_n_sigma_keeps_the_same_tokens_at_any_temperature(logits: Tensor, n: float, temperature: float) -> None:
    plugin = build("top_n_sigma", n=n)
    assert torch.equal(apply(plugin, logits) > -INF, apply(plugin, logits / temperature) > -INF)


@settings(max_examples=60, deadline=None)
@given(random_logits(), unit)
def test_top_h_keeps_the_longest_head_within_the_entropy_bound(logits: Tensor, alpha: float) -> None:
    out = apply(build("top_h", alpha=alpha), logits)
    fraction = torch.tensor(alpha, dtype=torch.float32).item()
    for row, result in zip(logits, out, strict=True):
        bound = fraction * entropy(row)
        ranking = row.argsort(descending=True)[: int((row > -INF).sum())]
        entropies = [entropy(row[ranking[: size + 1]]) for size in range(len(ranking))]
        size = max([1, *(s + 1 for s, value in enumerate(entropies) if value <= bound)])
        assert sorted(ranking[:size].tolist()) == (result > -INF).nonzero().squeeze(-1).tolist()


def test_top_h_by_the_papers_rule_keeps_fewer_on_a_flat_distribution() -> None:
    flat = [0.0] * 100
    assert len(kept(build("top_h", alpha=0.505), flat)) == 10  # log 10 = 0.5 log 100
    assert len(kept(build("top_h", alpha=0.505, rule="transformers"), flat)) == 50
    assert len(kept(build("top_h", alpha=1.0), flat)) == 100


def test_xtc_leaves_the_least_probable_viable_token() -> None:
    row = [math.log(p) for p in (0.4, 0.05, 0.3, 0.2, 0.05)]
    always, never = build("xtc", threshold=0.1, probability=1.0), build("xtc", threshold=0.1, probability=0.0)
    assert kept(always, row) == [1, 3, 4]
    assert kept(never, row) == [0, 1, 2, 3, 4]
    assert kept(build("xtc", threshold=0.1, probability=0.5), row, uniform=0.4999) == [1, 3, 4]
    assert kept(build("xtc", threshold=0.1, probability=0.5), row, uniform=0.5001) == [0, 1, 2, 3, 4]


def test_xtc_needs_two_viable_tokens_and_keeps_the_lowest_id_of_equal_ones() -> None:
    assert kept(build("xtc", threshold=0.5, probability=1.0), [math.log(p) for p in (0.7, 0.3)]) == [0, 1]
    assert kept(build("xtc", threshold=0.2, probability=1.0), [0.0, 0.0, 0.0, -9.0]) == [0, 3]


def test_mirostat_cuts_by_surprise_and_keeps_the_best() -> None:
    row = [math.log(p) for p in (0.5, 0.26, 0.125, 0.115)]  # 1, 1.94, 3, 3.12 bits
    assert kept(build("mirostat", tau=1.0), row) == [0, 1]
    assert kept(build("mirostat", tau=1.55), row) == [0, 1, 2]
    assert kept(build("mirostat", tau=0.1), row) == [0]


def test_mirostat_moves_its_bound_by_the_surprise_of_the_drawn_token() -> None:
    plugin = build("mirostat", tau=3.0, eta=0.1)
    state = plugin.initial(cast(Any, SimpleNamespace(parameters={"mirostat": plugin.params})))
    assert state.mu == 6.0
    after = plugin.advance(state, 7, math.log(0.25))
    assert after.mu == pytest.approx(6.0 - 0.1 * (2.0 - 3.0))
    assert state.mu == 6.0, "advance is pure"


def test_mirostat_brings_the_surprise_to_its_target() -> None:
    plugin = build("mirostat", tau=2.0, eta=0.1)
    state = plugin.initial(cast(Any, SimpleNamespace(parameters={"mirostat": plugin.params})))
    logits = -torch.arange(1, 2001).log()
    generator = torch.Generator().manual_seed(0)
    surprises = []
    for _ in range(400):
        step = SimpleNamespace(states=lambda p, s=state: [s])
        row = logits.clone().unsqueeze(0)
        cast(Any, plugin).logits_transform(step, row)
        logprobs = row[0].log_softmax(-1)
        token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
        surprises.append(-logprobs[token].item() / math.log(2))
        state = plugin.advance(state, token, logprobs[token].item())
    assert sum(surprises[100:]) / 300 == pytest.approx(2.0, abs=0.15)
