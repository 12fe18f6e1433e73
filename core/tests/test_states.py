"""Path states: whose they are when two branches stand on one node."""

from __future__ import annotations

import pytest

from unspool.pipeline import Pipeline
from unspool_sample.mirostat import Mirostat
from unspool_sample.sample import Sample
from unspool_sample.xtc import Xtc
from unspool_testing.driver import alone, plugin, request
from unspool_testing.table import TableModel


@pytest.mark.parametrize("seed", [3, 43])
def test_streams_on_one_node_keep_states_of_their_own_where_these_read_logprobs(seed: int) -> None:
    """Noise in a transform gives the same token another log-probability in each stream."""
    made = [plugin(Xtc, threshold=0.1, probability=0.5), plugin(Mirostat, tau=1.0, eta=1.0)]
    pipeline, model = Pipeline(plugin(Sample), made), TableModel(4, seed=3)
    one, many = (alone(model, [request(pipeline, (1,), max_new_tokens=6, seed=seed, n=n)])[0] for n in (1, 4))
    assert many.hypotheses[0].token_ids == one.token_ids
