"""Faults in `unspool-sample`."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool_sample.eta import Eta
from unspool_sample.min_p import MinP
from unspool_sample.mirostat import Mirostat
from unspool_sample.sample import Sample, invert
from unspool_sample.temperature import Temperature
from unspool_sample.top_k import TopK
from unspool_sample.top_p import TopP
from unspool_sample.typical import Typical
from unspool_sample.xtc import Xtc

FAULTS: tuple[Fault, ...] = (
    fault(
        "sampling draws from torch's global generator",
        "sample",
        "statelessness",
        edit(
            Sample.select,
            'token = step.sample("sample", logits)',
            "token = logits.softmax(dim=-1).multinomial(1).squeeze(-1)",
        ),
    ),
    fault(
        "XTC tosses its coin with torch's global generator",
        "xtc",
        "statelessness",
        edit(Xtc.logits_transform, 'uniform = step.uniform("xtc")', "uniform = torch.rand(len(logits))"),
    ),
    fault(
        "noise is added to probabilities instead of logits",
        "sample",
        "distribution",
        edit(Sample.select, 'step.sample("sample", logits)', 'step.sample("sample", logits.softmax(dim=-1))'),
    ),
    fault(
        "the inverse of the distribution is read one token early",
        "sample",
        "distribution",
        edit(invert, "p.cumsum(dim=-1)", "(p.cumsum(dim=-1) - p)"),
        noise="uniform",
    ),
    fault(
        "top-p drops the token that reaches the mass",
        "top_p",
        "reference",
        edit(TopP.logits_transform, ("held(places)[:, :-1]", "held(places)"), ("ranked[:, 1:]", "ranked")),
    ),
    fault(
        "top-p counts a token's own mass as if it came before it",
        "top_p",
        "reference",
        edit(TopP.logits_transform, "held(places)[:, :-1]", "held(places)[:, 1:]"),
    ),
    fault(
        "top-k keeps one token more",
        "top_k",
        "reference",
        edit(
            TopK.logits_transform,
            ("max(p.k for p in params)", "max(p.k + 1 for p in params)"),
            ('step.values(self, "k")', '(step.values(self, "k") + 1)'),
        ),
    ),
    fault(
        "top-k keeps every token that ties with the last",
        "top_k",
        "reference",
        edit(
            TopK.logits_transform,
            "logits.fill_(-torch.inf).scatter_(-1, places, values.masked_fill_(beyond, -torch.inf))",
            "logits.masked_fill_(logits < values.masked_fill_(beyond, torch.inf).amin(-1, keepdim=True), -torch.inf)",
        ),
    ),
    fault(
        "top-k gives each request of a group the largest k among them",
        "top_k",
        "batch_invariance",
        edit(
            TopK.logits_transform,
            'k = step.values(self, "k").to(logits.device).unsqueeze(-1)',
            "k = torch.full((len(logits), 1), widest)",
        ),
    ),
    fault(
        "min-p takes a fraction of the largest logit instead of the largest probability",
        "min_p",
        "reference",
        edit(
            MinP.logits_transform,
            'logits.amax(dim=-1, keepdim=True) + step.values(self, "p").to(logits).log().unsqueeze(-1)',
            'logits.amax(dim=-1, keepdim=True) * step.values(self, "p").to(logits).unsqueeze(-1)',
        ),
    ),
    fault(
        "min-p compares with the best token of all rows",
        "min_p",
        "batch_invariance",
        edit(MinP.logits_transform, "logits.amax(dim=-1, keepdim=True)", "logits.amax()"),
    ),
    fault(
        "min-p reads a request's parameter from the plugin",
        "min_p",
        "batch_invariance",
        edit(
            MinP.logits_transform,
            'step.values(self, "p").to(logits).log().unsqueeze(-1)',
            "logits.new_tensor(self.params.p).log()",
        ),
    ),
    fault(
        "the entropy of eta sampling is summed over all rows",
        "eta",
        "path_purity",
        edit(Eta.logits_transform, ".sum(dim=-1, keepdim=True)", ".sum()"),
    ),
    fault(
        "typical sampling orders the row before it in the batch",
        "typical",
        "batch_invariance",
        edit(Typical.logits_transform, "ranked.gather(-1, last)", "ranked.roll(1, 0).gather(-1, last)"),
    ),
    fault(
        "temperature is applied twice",
        "temperature",
        "reference",
        edit(
            Temperature.logits_transform,
            'logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1))',
            'logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1).square())',
        ),
    ),
    fault(
        "temperature starts again from the model's logits, and undoes what came before it",
        "temperature",
        "reference",
        edit(
            Temperature.logits_transform,
            'logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1))',
            'logits.copy_(step.raw / step.values(self, "temperature").to(logits).unsqueeze(-1))',
        ),
    ),
    fault(
        "temperature writes to the model's own logits",
        "temperature",
        "cache_equals_recompute",
        edit(
            Temperature.logits_transform,
            'logits.div_(step.values(self, "temperature").to(logits).unsqueeze(-1))',
            'logits.copy_(step.raw.div_(step.values(self, "temperature").to(logits).unsqueeze(-1)))',
        ),
    ),
    fault(
        "mirostat changes its state in place",
        "mirostat",
        "path_purity",
        edit(
            Mirostat.advance,
            "return replace(state, mu=state.mu - state.eta * error)",
            'object.__setattr__(state, "mu", state.mu - state.eta * error)\n        return state',
        ),
    ),
    fault(
        "mirostat measures surprise in nats and its target in bits",
        "mirostat",
        "reference",
        edit(Mirostat.advance, "-logprob / math.log(2) - state.tau", "-logprob - state.tau"),
        tau=1.0,
    ),
)
