"""Faults in small plugins and the kit's own strategies."""

from __future__ import annotations

from power.fault import Fault, fault
from power.plugins import ClaimsOfSearch, ClaimsOfTwice, Dimmed, Said, Twice
from power.slips import Declaration, edit
from unspool_testing import hosts

SMALL = (
    fault(
        "a path state is a list that advance appends to",
        Said,
        "path_purity",
        edit(Said.initial, "return ()", "return []"),
        edit(Said.advance, "return (*state, token)", "state.append(token)\n        return state"),
    ),
    fault(
        "a plugin remembers what it computed by the number of the node",
        "kit_tired",
        "statelessness",
        edit(
            hosts.Tired.logits_transform,
            "step.states(self)",
            '[self.__dict__.setdefault("_seen", {}).setdefault(*pair)'
            " for pair in zip(step.node.tolist(), step.states(self), strict=True)]",
        ),
    ),
    fault(
        "a parameter is scaled each time that it is read",
        Dimmed,
        "config_round_trip",
        edit(Dimmed.Params._as_given, "return value", "return value / 100"),
        edit(Dimmed.logits_transform, "self.params.percent / 100", "self.params.percent"),
    ),
    fault(
        "a stopping rule looks at the prompt as well",
        Twice,
        "reference",
        edit(Twice.stop_check, "ids[child, len(step.requests[request].prompt_ids) :", "ids[child, :"),
        claims=ClaimsOfTwice,
    ),
    fault(
        "a grammar's mask allows what its advance refuses",
        "kit_grammar",
        "constraint",
        edit(
            hosts.NoDoubles.logits_transform,
            "100.0 if self.params.lies and step.length[row] > 1 else -torch.inf",
            "logits[row, last]",
        ),
        lies=False,
    ),
    fault(
        "a grammar masks every row as the first one",
        "kit_grammar",
        "constraint",
        edit(
            hosts.NoDoubles.logits_transform,
            "enumerate(step.states(self))",
            "enumerate(step.states(self)[:1] * len(logits))",
        ),
        lies=False,
    ),
    fault(
        "guidance compares with what was said after the first row",
        "kit_guidance",
        "reference",
        edit(hosts.Guidance.logits_transform, 'step.companion("without")', 'step.companion("without")[:1]'),
    ),
)

STRATEGIES = (
    fault(
        "a strategy prefers tokens that are drafted",
        "kit_greedy",
        "speculation_is_invisible",
        edit(
            hosts.Likeliest.select,
            "return Growth(row=torch.arange(len(logits)), token=logits.argmax(-1))",
            "token, drafts = logits.argmax(-1), step.drafts()\n"
            "        token[drafts.row] = drafts.token\n"
            "        return Growth(row=torch.arange(len(logits)), token=token)",
        ),
    ),
    fault(
        "a search is declared row_local",
        "kit_search",
        "speculation_is_invisible",
        Declaration(hosts.NarrowSearch, "row_local", True),
    ),
    fault(
        "a search adds no score of the parent",
        "kit_search",
        "scores_add_up",
        edit(hosts.NarrowSearch.select, "score = (step.score[:, :1] + best).flatten()", "score = best.flatten()"),
    ),
    fault(
        "a search cuts to its width before it is known which candidates ended",
        "kit_search",
        "reference",
        edit(
            hosts.NarrowSearch.select,
            "order = score.argsort(descending=True, stable=True)",
            "order = score.argsort(descending=True, stable=True)[: self.params.width]",
        ),
        claims=ClaimsOfSearch,
    ),
    fault(
        "a search forgets a finished text that is not among the best",
        "kit_search",
        "reference",
        edit(
            hosts.NarrowSearch.stop_check,
            "ended[request] += 1",
            "ended[request] += 1\n                growth.drop[child] = kept[request] >= self.params.width",
        ),
        claims=ClaimsOfSearch,
    ),
    fault(
        "a search that has enough ends all of its group",
        "kit_search",
        "batch_invariance",
        edit(
            hosts.NarrowSearch.stop_check,
            "growth.drop |= (growth.request == request) & torch.tensor",
            "growth.drop |= torch.tensor",
        ),
    ),
    fault(
        "particles keep their parents' streams when they are drawn anew",
        "kit_particles",
        "batch_invariance",
        edit(hosts.Particles.select, "streams.append(torch.arange(len(rows)))", "streams.append(step.stream[rows])"),
    ),
    fault(
        "particles of all requests are drawn anew with the first one's noise",
        "kit_particles",
        "batch_invariance",
        edit(hosts.Particles.select, "uniform[rows[0]]", "uniform[0]"),
    ),
    fault(
        "particles add what was drawn instead of what the model said",
        "kit_particles",
        "scores_add_up",
        edit(
            hosts.Particles.select, "step.score[:, :1] + gain, step", "step.score[:, :1] + flat.gather(1, token), step"
        ),
    ),
)

FAULTS: tuple[Fault, ...] = (*SMALL, *STRATEGIES)
