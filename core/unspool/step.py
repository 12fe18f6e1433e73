"""What a plugin sees of a step: rows, their paths, noise, state, drafts, and what models say along the tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from unspool import noise
from unspool.live import Branch, Live
from unspool.plugin import Plugin
from unspool.request import PreparedRequest

if TYPE_CHECKING:
    from unspool.group import Group


class LookedAhead(Exception):
    """A hook asked for what is not known yet when all rounds are held at once; the step goes round by round."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a round, as parallel lists. Rows of one request are adjacent."""

    lives: Sequence[Live]
    request: Sequence[int]
    branch: Sequence[Branch]
    node: Sequence[int]

    @classmethod
    def of(cls, standing: Sequence[tuple[Live, Branch]]) -> Rows:
        """Put branches into rows, each at its own node."""
        return cls.at([(live, branch, branch.node) for live, branch in standing])

    @classmethod
    def at(cls, standing: Sequence[tuple[Live, Branch, int]]) -> Rows:
        """Put branches into rows, each at the node given with it. Those of one request stand together already."""
        lives: list[Live] = []
        request = []
        for live, _, _ in standing:
            if not lives or lives[-1] is not live:
                lives.append(live)
            request.append(len(lives) - 1)
        return cls(lives, request, [branch for _, branch, _ in standing], [node for _, _, node in standing])

    def __len__(self) -> int:
        return len(self.node)

    def only(self, keep: Sequence[int]) -> Rows:
        """Give some of the rows, in order."""
        return Rows.at([(self.lives[self.request[i]], self.branch[i], self.node[i]) for i in keep])

    def by_request(self) -> list[Rows]:
        """Split them by request."""
        parts: list[list[int]] = [[] for _ in self.lives]
        for row, request in enumerate(self.request):
            parts[request].append(row)
        return [self.only(part) for part in parts]


@dataclass(frozen=True, eq=False)
class Drafts:
    """Drafts just below the rows of a step.

    Args:
        row: `[d]` the row each hangs below.
        token: `[d]`.
        node: `[d]`.
        ran: `[d]` bool, whether it has run: in this pass, or in an earlier one if it was kept. A leaf never runs.
        q: for each, the distribution `[vocab]` that it was drawn from, if its drafter told.
    """

    row: Tensor
    token: Tensor
    node: Tensor
    ran: Tensor
    q: list[Tensor | None]

    def __len__(self) -> int:
        return len(self.q)


class Step:
    """One step of one group, or one round of it. `[n]` is a shape; integers are int64."""

    def __init__(
        self,
        group: Group,
        rows: Rows,
        *,
        round_: int = 0,
        raw: Tensor | None = None,
        looks_ahead: bool = False,
    ) -> None:
        self.group, self._rows, self._round, self._raw = group, rows, round_, raw
        self.looks_ahead = looks_ahead
        self._caller: Plugin | None = None
        self._may_draft = False

    def calls_for(self, plugin: Plugin | None) -> None:
        """Note whose hook is called: drafts that it hangs are its own. None: nobody may hang any."""
        self._caller, self._may_draft = plugin, plugin is not None

    # ---- which rows -------------------------------------------------------------------------------------------------

    @cached_property
    def requests(self) -> list[PreparedRequest]:
        """List the requests that have rows."""
        return [live.request for live in self._rows.lives]

    @property
    def vocab_size(self) -> int:
        """Say how many token ids the model knows."""
        return self.group.vocab_size

    @cached_property
    def request(self) -> Tensor:
        """Give each row's index into `requests`: `[rows]`."""
        return self._ints(self._rows.request)

    @cached_property
    def node(self) -> Tensor:
        """Give each row's node: `[rows]`."""
        return self._ints(self._rows.node)

    @cached_property
    def stream(self) -> Tensor:
        """Give each row's noise stream: `[rows]`."""
        return self._ints([branch.stream for branch in self._rows.branch])

    @cached_property
    def length(self) -> Tensor:
        """Count the new tokens on each row's path: `[rows]`. The child is number `length + 1`."""
        length = self.group.tree.length
        return self._ints([length[node] for node in self._rows.node])

    @cached_property
    def grid(self) -> Tensor:
        """Give the rows of each request: `[requests, widest]` row numbers, -1 where there is none."""
        rows: list[list[int]] = [[] for _ in self._rows.lives]
        for row, request in enumerate(self._rows.request):
            rows[request].append(row)
        widest = max(map(len, rows), default=0)
        return self._ints([r + [-1] * (widest - len(r)) for r in rows])

    @property
    def round(self) -> int:
        """Count the rounds of this step, from 0."""
        if self.looks_ahead:
            raise LookedAhead
        return self._round

    @cached_property
    def _scores(self) -> Tensor:
        columns = self.group.pipeline.strategy.score_columns
        scores = [branch.score + (0.0,) * (columns - len(branch.score)) for branch in self._rows.branch]
        return torch.tensor(scores, dtype=torch.float64, device=self.group.device).to(self.group.dtype)

    @property
    def score(self) -> Tensor:
        """Give what the strategy has scored each row's branch: `[rows, c]`, zeros at the prompt."""
        if self.looks_ahead:
            raise LookedAhead
        return self._scores

    @property
    def raw(self) -> Tensor:
        """Give what the model said: `[rows, vocab]` in the model's dtype. Read only."""
        assert self._raw is not None, "there are no logits before the pass"
        return self._raw

    @cached_property
    def budget(self) -> Tensor:
        """Count the drafts that may be added below each row: `[rows]` (in pre_forward)."""
        return self._ints([self.group.budget] * len(self._rows))

    @cached_property
    def accepted(self) -> Tensor:
        """Count the drafts that were accepted in each request's last step: `[requests]` (in pre_forward)."""
        return self._ints([live.accepted for live in self._rows.lives])

    def paths(self) -> tuple[Tensor, Tensor]:
        """Give each row's path, prompt included: ids `[rows, longest]` padded on the right with 0; lengths `[rows]`."""
        return self._paths

    @cached_property
    def _paths(self) -> tuple[Tensor, Tensor]:
        return padded([self.group.tree.path(node) for node in self._rows.node], self.group.device)

    # ---- state and parameters ---------------------------------------------------------------------------------------

    def states(self, plugin: Plugin) -> list[Any]:
        """List the path state of `plugin` at each row."""
        index, of_node = self.group.state_index(plugin), self.group.tree.states
        rows = zip(self._rows.branch, self._rows.node, strict=True)
        return [(branch.states if branch.node == node else of_node[node])[index] for branch, node in rows]

    def own(self, plugin: Plugin) -> list[Any]:
        """List the object of `plugin` for each request."""
        return [live.own[plugin.name] for live in self._rows.lives]

    def values(self, plugin: Plugin, field: str) -> Tensor:
        """Give a parameter that was declared `per_request`, for each row: `[rows]`."""
        cache = self._values
        if (plugin.name, field) not in cache:
            each = [getattr(live.request.parameters[plugin.name], field) for live in self._rows.lives]
            rows = [each[request] for request in self._rows.request]
            dtype = self.group.dtype if isinstance(each[0], float) else None
            cache[plugin.name, field] = torch.tensor(rows, dtype=dtype, device=self.group.device)
        return cache[plugin.name, field]

    @cached_property
    def _values(self) -> dict[tuple[str, str], Tensor]:
        return {}

    # ---- noise ------------------------------------------------------------------------------------------------------

    def uniform(self, purpose: str) -> Tensor:
        """Draw one uniform for each row's child: `[rows]` float64 in (0, 1)."""
        return noise.uniform(self._keys(purpose))

    def gumbel(self, purpose: str) -> Tensor:
        """Draw standard Gumbel noise for each row's child and token: `[rows, vocab]`, in the working dtype."""
        return noise.gumbel(self._keys(purpose), self.group.vocab_size, self.group.dtype)

    def sample(self, purpose: str, logits: Tensor) -> Tensor:
        """Draw a token from each row of logits, the argmax with `gumbel(purpose)` added: `[rows]`."""
        return noise.draw(logits, self._keys(purpose))

    def _keys(self, purpose: str) -> Tensor:
        seeds = [live.request.seed for live in self._rows.lives]
        seed = self._ints([seeds[request] for request in self._rows.request])
        return noise.key(seed, self.stream, self.length + 1, noise.purpose_key(purpose))

    # ---- drafts -----------------------------------------------------------------------------------------------------

    def draft(
        self,
        parents: Tensor | Sequence[int],
        tokens: Tensor | Sequence[int],
        q: Tensor | None = None,
        confidence: Tensor | Sequence[float] | None = None,
    ) -> Tensor:
        """Hang drafts: one token below each parent (a row's node, or a draft).

        Args:
            parents: `[d]` nodes; -1, or a leaf, takes none.
            tokens: `[d]`.
            q: `[d, vocab]`, the distributions that they were drawn from.
            confidence: `[d]` in [0, 1], how sure it is that the parent goes on so. With it the core runs those drafts
                alone that are worth their rows (see `worth.py`: it learns what your confidence means); without it, all.

        Returns:
            `[d]` nodes. The same token twice under one parent is one node; -1 where the parent takes none, or where a
            draft is far too unlikely to be worth its row.
        """
        if self.looks_ahead:
            raise LookedAhead
        if not self._may_draft:
            raise RuntimeError("drafts are hung in pre_forward and in select")
        sure = None if confidence is None else [float(value) for value in confidence]
        if sure is not None and not all(0 <= value <= 1 for value in sure):
            raise ValueError(f"confidence must lie in [0, 1], not {min(sure)} to {max(sure)}")
        nodes = self.group.hang(self._caller, _list(parents), _list(tokens), q, sure)
        return self._ints(nodes)

    def takes(self, confidence: Sequence[float]) -> list[bool]:
        """Tell for each row whether a draft of such confidence just below it would be taken (in pre_forward).

        What is taken may still be deleted for likelier ones. Where the answer is no, there is no need to look for any:
        it would not be worth its row, or drafts rest, since they have lately cost more time than they saved.

        Args:
            confidence: `[rows]`.
        """
        worth, caller = self.group.worth, self._caller
        lives = (self._rows.lives[request] for request in self._rows.request)
        return [worth.takes(live, caller, sure) for live, sure in zip(lives, confidence, strict=True)]

    @property
    def least_chance(self) -> float:
        """Tell the chance below which no draft is worth its row in this step (in pre_forward).

        It is meant for who can guess much at once: a guess that is far less likely need not be made.
        """
        return self.group.worth.least

    def pays(
        self, parents: Tensor | Sequence[int], confidence: Tensor | Sequence[float], companion: str | None = None
    ) -> bool:
        """Tell whether one more draft below each parent is likely to save more time than it takes (in pre_forward).

        Args:
            parents: `[d]` nodes; -1 takes none.
            confidence: `[d]`, how sure you expect to be of each draft.
            companion: the one that must run the parents before you can hang it.
        """
        assert self._caller is not None
        sure = [float(value) for value in confidence]
        lane = None if companion is None else self.group.lanes[companion]
        return self.group.worth.pays(self.group, self._caller, _list(parents), sure, lane)

    def drafts(self, plugin: Plugin | None = None) -> Drafts:
        """List the drafts just below the rows: all of them, or those that `plugin` hung."""
        found = self.group.drafts_below(self._rows.node, plugin)
        tree = self.group.tree
        nodes = [node for _, node in found]
        return Drafts(
            row=self._ints([row for row, _ in found]),
            token=self._ints([tree.token[node] for node in nodes]),
            node=self._ints(nodes),
            ran=torch.tensor([self.group.ran(node) for node in nodes], dtype=torch.bool),
            q=[self.group.drafts[node].q for node in nodes],
        )

    @property
    def proposes(self) -> bool:
        """Tell whether `propose` can answer: the strategy says of each row by itself what it chooses, and at once."""
        strategy = self.group.pipeline.strategy
        return strategy.row_local and not strategy.holds

    def propose(self, rows: Tensor | Sequence[int], nodes: Tensor | Sequence[int], logits: Tensor) -> Tensor:
        """Say what this pipeline would choose at `nodes` below `rows`, were these the logits.

        The transforms and `select` are applied with the rows' own noise, so a draft model samples as the target will.
        Transforms that need companions, hidden states or log-probabilities are left out.

        Args:
            rows: `[n]` row numbers.
            nodes: `[n]` nodes at or below those rows (-1: none, and -1 comes back).
            logits: `[n, vocab]`.

        Returns:
            `[n]` tokens, -1 at leaves and where nothing would be chosen.
        """
        return self._ints(self.group.propose(self._rows, _list(rows), _list(nodes), logits))

    def transformed(self, rows: Tensor | Sequence[int], nodes: Tensor | Sequence[int], logits: Tensor) -> Tensor:
        """Say what `select` would see at `nodes` below `rows`, were these the logits: the drafter's q beside its p.

        The same transforms are applied as in `propose`.

        Args:
            rows: `[n]` row numbers.
            nodes: `[n]` nodes at or below those rows.
            logits: `[n, vocab]`.

        Returns:
            `[n, vocab]` in the working dtype; all -inf at -1 and at leaves.
        """
        return self.group.transformed(self._rows, _list(rows), _list(nodes), logits)

    # ---- what models say --------------------------------------------------------------------------------------------

    def logits_of(self, nodes: Tensor | Sequence[int]) -> Tensor:
        """Give the raw logits `[n, vocab]` of any nodes that this pass has run, drafts included."""
        return self.group.logits_of(_list(nodes))

    def hidden(self, layer: int, nodes: Tensor | Sequence[int] | None = None) -> Tensor:
        """Give the hidden states of `layer` at the rows or at `nodes`: `[n, width]`. The layer must be declared."""
        return self.group.hidden_of(layer, list(self._rows.node) if nodes is None else _list(nodes))

    def path_hidden(self, layer: int) -> tuple[Tensor, Tensor]:
        """Give the hidden states of all tokens of each row's path: `[rows, longest, width]`, mask `[rows, longest]`."""
        return self.group.path_hidden(layer, self._rows)

    def head(self, hidden: Tensor) -> Tensor:
        """Apply the final norm and the output matrix to an earlier layer: `[n, width]` -> `[n, vocab]`."""
        return self.group.main.cache.runner.head(hidden)

    def companion(self, name: str, nodes: Tensor | Sequence[int] | None = None) -> Tensor:
        """Give a companion's logits at the rows or at `nodes`: `[n, vocab]`; zeros at -1 and at leaves."""
        return self.group.companion(name, list(self._rows.node) if nodes is None else _list(nodes))

    def _ints(self, values: Sequence[Any]) -> Tensor:
        return _ints(values, self.group.device)


def _ints(values: Sequence[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.int64)).to(device)  # sooner than by torch alone


def padded(paths: Sequence[np.ndarray[Any, Any]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Put paths of token ids side by side: ids `[n, longest]` padded on the right with 0; lengths `[n]`."""
    lengths = [len(path) for path in paths]
    ids = np.zeros((len(paths), max(lengths, default=0)), dtype=np.int64)
    for row, path, length in zip(ids, paths, lengths, strict=True):
        row[:length] = path
    return torch.from_numpy(ids).to(device), _ints(lengths, device)


def _list(values: Tensor | Sequence[int]) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)
