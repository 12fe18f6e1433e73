"""A small model, or the first layers, guess as the pipeline would choose; the target judges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unspool.errors import ConfigError
from unspool.pipeline import Pipeline
from unspool.plugin import Plugin
from unspool_sample.sample import Sample
from unspool_sample.temperature import Temperature
from unspool_sample.top_k import TopK
from unspool_speculative.draft_model import DraftModel
from unspool_speculative.layer_skip import LayerSkip
from unspool_testing.compare import check_batch, check_speculation, with_plugin
from unspool_testing.driver import Circumstances, alone, plugin, request
from unspool_testing.hosts import Likeliest, NarrowSearch, NoDoubles, Particles
from unspool_testing.table import TableModel

VOCAB = 5
TARGET = TableModel(VOCAB, seed=4)
MODELS = {"same": TARGET, "other": TableModel(VOCAB, seed=9, memory=1)}


def draft_model(model: str = "same", **params: Any) -> Plugin:
    return plugin(DraftModel, model=model, **{"adapt": False, **params})


@pytest.mark.parametrize("transforms", [(), (Temperature, TopK), (NoDoubles,)])
def test_a_model_that_agrees_is_right_with_every_draft_of_a_sampled_text(transforms: tuple[type[Plugin], ...]) -> None:
    values: dict[type[Plugin], dict[str, Any]] = {Temperature: {"temperature": 1.7}, TopK: {"k": 3}}
    made = [plugin(kind, **values.get(kind, {"most": 30})) for kind in transforms]
    plain = Pipeline(plugin(Sample), made)
    for seed in range(5):
        asked = request(plain, (1, 2), max_new_tokens=25, end_ids=(), seed=seed)
        drafting = with_plugin(plain, draft_model(length=4))
        stats = check_speculation(TARGET, asked, plain, drafting, models=MODELS).stats
        assert (stats.accepted, stats.forward_passes) == (stats.drafted, 5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 99), st.sampled_from(["same", "other"]), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_trees_of_any_width_change_nothing(seed: int, model: str, length: int, width: int, adapt: bool) -> None:
    for plain in (
        Pipeline(plugin(Likeliest)),
        Pipeline(plugin(Sample), [plugin(NoDoubles, most=9)]),
        Pipeline(plugin(NarrowSearch, children=3, width=2)),
        Pipeline(plugin(Particles)),
    ):
        asked = request(plain, (1, 2), max_new_tokens=7, seed=seed, n=2 if plain.strategy.row_local else 1)
        drafter = draft_model(model, length=length, width=width, adapt=adapt)
        check_speculation(TARGET, asked, plain, with_plugin(plain, drafter), models=MODELS)


def test_a_wider_tree_holds_what_a_chain_misses() -> None:
    plain, accepted = Pipeline(plugin(Likeliest)), []
    for width in (1, 3):
        drafting = with_plugin(plain, draft_model("other", length=3, width=width))
        results = [
            check_speculation(
                TARGET, request(plain, (1, i), max_new_tokens=20, end_ids=()), plain, drafting, models=MODELS
            )
            for i in range(VOCAB)
        ]
        accepted.append(sum(result.stats.accepted for result in results))
    assert accepted[1] > accepted[0]


def test_a_tree_has_as_many_nodes_at_each_depth_as_it_is_wide_and_drafts_below_each() -> None:
    plain = Pipeline(plugin(Likeliest))
    drafting = with_plugin(plain, draft_model("other", length=3, width=2))
    result = alone(TARGET, [request(drafting, (1, 2), max_new_tokens=4, end_ids=())], MODELS)[0]
    first = result.stats.drafters["draftmodel"].run
    assert first[0] % 2 == 0 and all(n % 4 == 0 for n in first[1:2])


def test_beams_and_particles_are_drafted_for_too() -> None:
    for strategy in (plugin(NarrowSearch, children=2, width=1), plugin(Particles)):
        plain = Pipeline(strategy)
        asked = request(plain, (1, 2), max_new_tokens=12, end_ids=())
        stats = check_speculation(TARGET, asked, plain, with_plugin(plain, draft_model(length=3)), models=MODELS).stats
        assert stats.drafted > 0 and stats.accepted > 0


def test_in_a_batch_each_request_accepts_what_is_its_own() -> None:
    plain = Pipeline(plugin(Sample))
    drafting = with_plugin(plain, draft_model("other", length=3, width=2))
    asked = [request(drafting, (1, i), max_new_tokens=9, seed=i) for i in range(4)]
    check_batch(TARGET, asked, Circumstances(slots=90, token_budget=12, preempts=frozenset({2, 5})), MODELS)


def test_layers_guess_for_their_own_model_and_all_layers_are_always_right() -> None:
    plain = Pipeline(plugin(Sample))
    asked = request(plain, (1, 2), max_new_tokens=13, end_ids=())
    for layers in range(1, TARGET.layers + 1):
        drafting = with_plugin(plain, plugin(LayerSkip, layers=layers, length=3, adapt=False))
        stats = check_speculation(TARGET, asked, plain, drafting).stats
        if layers == TARGET.layers:
            assert stats.accepted == stats.drafted > 0


def test_a_small_model_and_the_first_layers_guess_side_by_side() -> None:
    plain = Pipeline(plugin(Sample))
    both = with_plugin(with_plugin(plain, draft_model("other", length=2)), plugin(LayerSkip, layers=1, adapt=False))
    stats = check_speculation(
        TARGET, request(plain, (1, 2), max_new_tokens=9, end_ids=()), plain, both, models=MODELS
    ).stats
    assert stats.drafters.keys() == {"draftmodel", "layerskip"}


def test_more_layers_than_there_are_and_another_vocabulary_are_refused() -> None:
    plain = Pipeline(plugin(Likeliest))
    with pytest.raises(ConfigError, match=r"99 layers: 1 to \d are there"):
        alone(TARGET, [request(with_plugin(plain, plugin(LayerSkip, layers=99)))])
    with pytest.raises(ConfigError, match="its vocabulary has 3 tokens, the target's 5"):
        alone(TARGET, [request(with_plugin(plain, draft_model("small")))], {"small": TableModel(3)})


def test_alternatives_stand_beside_what_would_be_chosen_and_never_twice() -> None:
    drafter = draft_model(width=3)

    class Asked:
        proposes = True

        def propose(self, rows: torch.Tensor, nodes: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            return torch.tensor([2, 0])

    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 1.0, 2.0, 3.0]])
    chosen = drafter._choose(Asked(), torch.tensor([0, 1]), torch.tensor([7, 8]), logits)  # type: ignore[attr-defined]
    assert chosen.tolist() == [[2, 1, 3], [0, 3, 2]]
