"""The four hooks, as pluggy specifications. This file is the contract; `docs/hooks.md` is generated from it.

In a step the model runs once (the pass); then rounds move branches by one token each:

    pre_forward       plugins hang drafts below branches
    (the pass)        every node not yet run, of all requests, in one packed forward
    each round:
      logits_transform  plugins edit the rows' logits in place
      select            the strategy answers with children
      stop_check        limits, plugins and the strategy finish or drop children

The children that are left become branches. One that coincides with a draft that the pass has run is *accepted*, and
the next round shows its row at once; any other waits for the next step, and so does one that is told to. A child must
never be chosen because a draft exists.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from unspool.plugin import Plugin
    from unspool.step import Step

hookspec = pluggy.HookspecMarker("unspool")


@dataclass(eq=False)
class Growth:
    """The children that `select` grows, best first where the order matters.

    A child whose logit or score is -inf is ignored, so `topk` needs no filter. The same `(row, token, stream)` twice is
    an error; the same `(row, token)` in two streams is two branches on one node.

    Args:
        row: `[children]` int64, the row each child grows from.
        token: `[children]` int64.
        score: `[children]` or `[children, c]`, what hypotheses are ranked by in column 0; further columns are carried
            for the strategy and come back as `step.score`. None: the parent's score plus the log-probability, if
            anyone reads it.
        stream: `[children]` int64, the stream that keys the child's noise; None: the parent's.
        waits: `[children]` bool, True where the child waits for the next step even if the pass has run its node; None:
            none does. For a strategy whose choice at a row depends on the drafts that were hung for that very branch:
            elsewhere another branch may have been there before, and those drafts are not.
        request: `[children]` int64, index into `step.requests`. Added by the core for `stop_check`, like all below.
        finish: why each child ends (`eos`, `length`, `stop_string`, `deadline`, or a plugin's own word), or None.
        drop: `[children]` bool, True where the child is not grown at all.
    """

    row: Tensor
    token: Tensor
    score: Tensor | None = None
    stream: Tensor | None = None
    waits: Tensor | None = None
    request: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    finish: list[str | None] = field(default_factory=list)
    drop: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    _states: Callable[[Plugin], list[Any]] | None = field(default=None, repr=False)
    _paths: Callable[[], tuple[Tensor, Tensor]] | None = field(default=None, repr=False)

    def states(self, plugin: Plugin) -> list[Any]:
        """List the path state of `plugin` after each child's token (None where the token is an end id)."""
        assert self._states is not None, "states are there in stop_check only"
        return self._states(plugin)

    def paths(self) -> tuple[Tensor, Tensor]:
        """Give each child's path, the child itself and the prompt included: ids `[children, longest]`, lengths."""
        assert self._paths is not None, "paths are there in stop_check only"
        return self._paths()


class Hooks:
    """The four hooks."""

    @hookspec
    def pre_forward(self, step: Step) -> None:
        """Hang drafts below branches, with `step.draft(parents, tokens)`.

        Called once a step and group, before the pass. Rows are all branches of the group; there are no logits yet.
        `step.budget` says how many drafts may be added below each row; what goes over it is deleted, deepest first. A
        drafter may guess anything: what the strategy does not choose is never seen.
        """

    @hookspec
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Edit `logits` `[rows, vocab]` in place, in the working dtype. -inf forbids a token.

        Called once a round, in the config's order: constraints first, the strategy's own last. End ids are banned
        below `min_new_tokens` already. What it does to a row must be a function of the request, the row's path and
        what models say along it, never of other rows. `step.raw` stays what the model said.
        """

    @hookspec(firstresult=True)
    def select(self, step: Step, logits: Tensor) -> Growth | None:
        """Choose the children of all rows of the group. Exactly one plugin implements it: the strategy.

        Never write to `logits` here. No child at all is a lawful answer: a row without a child dies. A row under which
        drafts were hung in this call is held, with or without children: it stays where it is, and is shown again in
        the next step together with them.
        """

    @hookspec
    def stop_check(self, step: Step, growth: Growth) -> None:
        """Finish or drop children, by writing to `growth.finish`, `growth.drop` and `growth.score`.

        Called once a round: the core's own limits have spoken, then plugins in the config's order, then the strategy.
        The first finish reason stands. Cutting to a width belongs into the strategy's own `stop_check`, where it is
        known which candidates ended. To end a request, drop all its unfinished children. Tensors are on the host.
        """
