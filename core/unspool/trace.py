"""The trace: on demand, a step leaves a record of what every plugin did. At no cost otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unspool.decide import Decision
    from unspool.group import Group
    from unspool.step import Step

TOP = 5
"""How many candidates a record shows before and after a transform."""


class Recorder:
    """Writes one record a step, one a round and group, and one for the drafts that a step prunes.

    Args:
        write: takes each record, a JSON-ready dict with `event`: `step`, `round` or `prune`.
    """

    def __init__(self, write: Callable[[dict[str, Any]], None]) -> None:
        self._write, self._step = write, 0
        self._before: Tensor | None = None
        self._changes: list[dict[int, dict[str, Any]]] = []

    def step(self, number: int, groups: Sequence[Group]) -> None:
        """Record who has rows in a step."""
        self._step = number
        shown = [{"pipeline": _names(g), "requests": [live.request.id for live in g.lives]} for g in groups]
        self._write({"event": "step", "step": number, "groups": shown})

    def begin(self, logits: Tensor) -> None:
        """Remember the logits before the first transform of a round."""
        self._before, self._changes = logits.clone(), []

    def transformed(self, plugin: str, logits: Tensor) -> None:
        """Record what one transform changed in each row."""
        before = self._before
        assert before is not None
        changed = (before != logits).any(dim=1).tolist()
        banned = ((logits == -torch.inf) & (before != -torch.inf)).sum(dim=1).tolist()
        tops = _top(before), _top(logits)
        self._changes.append(
            {
                row: {"plugin": plugin, "banned": banned[row], "top_before": tops[0][row], "top_after": tops[1][row]}
                for row, moved in enumerate(changed)
                if moved
            }
        )
        self._before = logits.clone()

    def end(self, step: Step, decision: Decision) -> None:
        """Record a round: each row with its path, what was changed, and what grew."""
        group, rows, children = step.group, decision.rows, decision.children
        tree, readings = group.tree, group.readings
        shown = []
        for row, (request, node, branch) in enumerate(zip(rows.request, rows.node, rows.branch, strict=True)):
            grown = []
            for child in children.below.get(row, ()):
                draft = tree.child(node, children.token[child])
                ran = draft is not None and readings is not None and draft in readings
                grown.append(
                    {
                        "token": children.token[child],
                        "score": children.score[child][0] if children.score else None,
                        "stream": children.stream[child],
                        "finish": children.finish[child],
                        "dropped": children.drop[child],
                        "accepted": ran and children.may_go_on(child),
                    }
                )
            shown.append(
                {
                    "request": rows.lives[request].request.id,
                    "new_token_ids": list(tree.new_tokens(node)),
                    "stream": branch.stream,
                    "transforms": [change[row] for change in self._changes if row in change],
                    "dead": row in decision.dead,
                    "held": [tree.token[draft] for draft in decision.held.get(node, ())],
                    "children": grown,
                }
            )
        self._write({"event": "round", "step": self._step, "pipeline": _names(group), "rows": shown})

    def prune(self, group: Group) -> None:
        """Record what became of the drafts of a step."""
        tree = group.tree
        standing = {branch.node for live in group.lives for branch in live.branches}
        shown = []
        for live in group.lives:
            taken, ended = set(standing), [hypothesis.token_ids for hypothesis in live.hypotheses]
            for end in standing:
                node = end
                while node != live.root and node >= 0:
                    taken.add(node)
                    node = tree.parent[node]
            for node in live.drafts:
                draft, tokens = group.drafts[node], tree.new_tokens(node)
                shown.append(
                    {
                        "request": live.request.id,
                        "plugin": draft.plugin.name if draft.plugin else None,
                        "new_token_ids": list(tokens),
                        "leaf": draft.leaf,
                        "accepted": node in taken or any(text[: len(tokens)] == tokens for text in ended),
                    }
                )
        if shown:
            self._write({"event": "prune", "step": self._step, "drafts": shown})


def _names(group: Group) -> list[str]:
    return [plugin.name for plugin in group.pipeline.plugins]


def _top(logits: Tensor) -> list[list[tuple[int, float | None]]]:
    values, tokens = logits.topk(min(TOP, logits.shape[1]), dim=1)
    rows = zip(tokens.tolist(), values.tolist(), strict=True)
    return [[(t, v) for t, v in zip(ts, vs, strict=True) if v != float("-inf")] for ts, vs in rows]
