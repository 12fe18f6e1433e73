"""Rotary positions in the graph of a pass, left to attention: it rotates queries and keys as it reads them.

Models rotate (Su et al. 2021, https://arxiv.org/abs/2104.09864) by operators on whole tensors: halves are taken apart,
negated, put together, multiplied and added. The compiler makes six loops of it in each layer, with results in memory
between them and threads that wait for each other after each, where the kernel needs a few registers.

Of a head only the first numbers may be rotated. What is rotated in another way (neighbours by pairs) stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

_ATEN = torch.ops.aten


class _Rotated(NamedTuple):
    """`x * cosines + crossed(x) * sines`, where `crossed` puts the second half, negated, before the first."""

    x: Node
    cosines: Node
    sines: Node


class _Part(NamedTuple):
    """Some numbers of each head."""

    x: Node
    start: int
    stop: int


def leave_to_attention(graph: Graph) -> int:
    """Have attention rotate its queries and keys, wherever a model does so just before; say in how many layers."""
    attend, count = torch.ops.unspool.attend.default, 0
    places = {argument.name: at for at, argument in enumerate(attend._schema.arguments)}
    for node in graph.find_nodes(op="call_function", target=attend):
        query, key = (_rotated_in_part(node.args[places[name]]) for name in ("query", "key"))
        if query is None or key is None or (query.cosines, query.sines) != (key.cosines, key.sines):
            continue
        given = {"query": query.x, "key": key.x, "cosines": query.cosines, "sines": query.sines}
        for name, value in given.items():
            node.update_arg(places[name], value)
        count += 1
    graph.eliminate_dead_code()
    return count


def _rotated_in_part(node: Any) -> _Rotated | None:
    """Recognize heads that are rotated: all of each, or its first numbers, with the rest of them behind."""
    if (parts := _put_together(node)) is None:
        return _rotated(node)
    rotated, rest = _rotated(parts[0]), _part(parts[1])
    first = _part(rotated.x) if rotated else None
    if rotated is None or first is None or rest is None or not _complete(first, rest):
        return None
    return rotated._replace(x=first.x)


def _rotated(node: Any) -> _Rotated | None:
    """Recognize a rotation of `[1, heads, n, width]` by `[1, 1, n, width]`, all of one dtype."""
    for straight, other in _either_way(node, _ATEN.add.Tensor):
        for crossed, sines in _either_way(other, _ATEN.mul.Tensor):
            x = _crossed(crossed)
            for own, cosines in _either_way(straight, _ATEN.mul.Tensor):
                if x is not None and own is x and _fit(x, cosines) and _fit(x, sines):
                    return _Rotated(x, cosines, sines)
    return None


def _crossed(node: Any) -> Node | None:
    """Recognize the second half of something, negated, before its first half; give that."""
    parts = _put_together(node)
    if parts is None or not _calls(parts[0], _ATEN.neg.default):
        return None
    second, first = _part(parts[0].args[0]), _part(parts[1])
    if first is None or second is None or not _complete(first, second) or 2 * first.stop != second.stop:
        return None
    return first.x


def _put_together(node: Any) -> tuple[Node, Node] | None:
    """Give the two parts of each head that are put one behind the other."""
    if not _calls(node, _ATEN.cat.default):
        return None
    parts, dimension = node.args
    return tuple(parts) if len(parts) == 2 and _is_last(dimension, node) else None


def _part(node: Any) -> _Part | None:
    """Recognize some numbers of each head of something, or all."""
    if _calls(node, _ATEN.alias.default):
        return _Part(node.args[0], 0, _width(node))
    if not _calls(node, _ATEN.slice.Tensor):
        return None
    x, dimension, start, stop = node.args
    return _Part(x, start, min(stop, _width(x))) if _is_last(dimension, x) else None


def _complete(first: _Part, second: _Part) -> bool:
    """Say whether two parts are all of one thing, in its order, however long each is."""
    return first.x is second.x and first.start == 0 and first.stop == second.start and second.stop == _width(first.x)


def _fit(x: Node, rotation: Any) -> bool:
    """Say whether there are cosines or sines for each token, in the dtype of what is rotated."""
    if not isinstance(rotation, Node):
        return False
    heads: Tensor = x.meta["val"]
    by: Tensor = rotation.meta["val"]
    return heads.dim() == 4 and by.shape == (1, 1, *heads.shape[2:]) and by.dtype == heads.dtype


def _either_way(node: Any, target: Any) -> Iterator[tuple[Any, Any]]:
    """Give the two operands of an operator in both orders; none if it is another operator."""
    if _calls(node, target):
        one, other = node.args
        yield one, other
        yield other, one


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, Node) and node.target is target and not node.kwargs


def _width(node: Node) -> int:
    width: int = node.meta["val"].shape[-1]
    return width


def _is_last(dimension: int, node: Node) -> bool:
    rank: int = node.meta["val"].dim()
    return dimension % rank == rank - 1
