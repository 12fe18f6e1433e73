"""A pipeline: in which order hooks are called."""

from __future__ import annotations

from torch import Tensor

from unspool.pipeline import Pipeline
from unspool.plugin import Plugin, hookimpl
from unspool.step import Step
from unspool_testing.driver import plugin
from unspool_testing.hosts import Bias, Likeliest


class Forbids(Plugin):
    """A constraint."""

    row_local = True
    constraint = True

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid nothing."""


class Prefers(Forbids):
    """No constraint, with the hook of one."""

    constraint = False


def order(*kinds: type[Plugin]) -> list[str]:
    pipeline = Pipeline(plugin(Likeliest), [plugin(kind) for kind in kinds])
    return [made.name for made, _ in pipeline.implementations("logits_transform")]


def test_constraints_act_first_and_who_inherits_from_one_does_not() -> None:
    for _ in range(2):  # building one pipeline changes nothing for the next
        assert order(Bias, Prefers) == ["bias", "prefers"]
        assert order(Bias, Forbids, Prefers) == ["forbids", "bias", "prefers"]
