"""Faults in `unspool-penalties`."""

from __future__ import annotations

from power.fault import Fault, fault
from power.slips import edit
from unspool_penalties import history
from unspool_penalties.bias import Endings
from unspool_penalties.dry import Dry
from unspool_penalties.forced import ForcedEos
from unspool_penalties.frequency import FrequencyPenalty
from unspool_penalties.length import ExponentialDecayLengthPenalty
from unspool_penalties.no_repeat_ngram import NoRepeatNgram
from unspool_penalties.repetition import RepetitionPenalty

FAULTS: tuple[Fault, ...] = (
    fault(
        "the repetition penalty misses the prompt",
        "repetition_penalty",
        "reference",
        edit(RepetitionPenalty.logits_transform, "self.params.include_prompt", "False"),
    ),
    fault(
        "penalties count the padding of shorter paths as token 0",
        "repetition_penalty",
        "batch_invariance",
        edit(
            history.counted_ids,
            "counts = position < lengths.unsqueeze(-1)",
            "counts = torch.ones_like(ids, dtype=torch.bool)",
        ),
    ),
    fault(
        "penalties take the prompt to be as long as the longest",
        "presence_penalty",
        "batch_invariance",
        edit(history.counted_ids, "(lengths - step.length).unsqueeze(-1)", "(lengths - step.length).max()"),
    ),
    fault(
        "the frequency penalty counts a token once",
        "frequency_penalty",
        "reference",
        edit(
            history.counts,
            "found.scatter_add_(-1, ids, found.new_ones(()).expand(ids.shape))",
            "found.scatter_(-1, ids, 1.0)",
        ),
    ),
    fault(
        "the frequency penalty counts the drafts below a row as said",
        "frequency_penalty",
        "speculation_is_invisible",
        edit(
            FrequencyPenalty.logits_transform,
            "logits.sub_(counts(step, logits, self.params.include_prompt) * penalty)",
            "logits.sub_(counts(step, logits, self.params.include_prompt) * penalty)\n"
            "        drafts = step.drafts()\n"
            "        logits[drafts.row, drafts.token] -= penalty[drafts.row, 0]",
        ),
    ),
    fault(
        "the frequency penalty keeps the first request's penalty on itself",
        "frequency_penalty",
        "statelessness",
        edit(
            FrequencyPenalty.logits_transform,
            'penalty = step.values(self, "penalty").to(logits).unsqueeze(-1)',
            'penalty = self.__dict__.setdefault("_kept", step.values(self, "penalty").to(logits)[:1])',
        ),
    ),
    fault(
        "no-repeat n-gram misses the n-gram that was completed last",
        "no_repeat_ngram",
        "constraint",
        edit(
            NoRepeatNgram.logits_transform,
            "start + n <= lengths.unsqueeze(-1)",
            "start + n < lengths.unsqueeze(-1)",
        ),
    ),
    fault(
        "no-repeat n-gram compares one token too few",
        "no_repeat_ngram",
        "reference",
        edit(NoRepeatNgram.logits_transform, "for offset in range(n - 1):", "for offset in range(n - 2):"),
    ),
    fault(
        "bad words are looked for at the padded end of the paths",
        "bad_words",
        "constraint",
        edit(Endings._begun, "lengths.unsqueeze(-1) - length", "ids.shape[-1] - length"),
    ),
    fault(
        "bad words are looked for at the end of the first row's path",
        "bad_words",
        "path_purity",
        edit(
            Endings._begun,
            "tail = ids.gather(-1, at.clamp(min=0))",
            "tail = ids[:1].expand_as(ids).gather(-1, at.clamp(min=0))",
        ),
    ),
    fault(
        "DRY looks at the token of the match instead of the one that followed it",
        "dry",
        "reference",
        edit(Dry._matches, "token = back[row, shift - 1]", "token = back[row, shift]"),
    ),
    fault(
        "the forced end comes one token late",
        "forced_eos",
        "reference",
        edit(ForcedEos.logits_transform, "step.length + 1 == limit", "step.length == limit"),
    ),
    fault(
        "the length penalty raises the first request's end tokens in every row",
        "exponential_decay_length_penalty",
        "batch_invariance",
        edit(ExponentialDecayLengthPenalty.logits_transform, ")[step.request]", ")[step.request * 0]"),
    ),
)
