"""Rotary positions in the graph of a pass, left to attention: it rotates queries and keys as it reads them.

Models rotate (Su et al. 2021, https://arxiv.org/abs/2104.09864) by operators on whole tensors: halves are taken apart,
negated, put together, multiplied and added. The compiler makes six loops of it in each layer, with intermediate results in
memory and threads that wait for each other after each, where the kernel needs a few registers.

Of a head only the first numbers may be rotated. What is rotated in another way (neighbours by pairs) stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, Node

_ATEN = torch.ops.aten
_QUERY, _KEY, _COSINES, _SINES = "query", "key", "cosines", "sines"


class _Rotated(NamedTuple):
    """What `x * cosines + halves(x) * sines` is made of, where `halves` puts the second half, negated, before the first."""

    x: Node
    cosines: Node
    sines: Node


def leave_to_attention(graph: Graph) -> int:
    """Have attention rotate its queries and keys, wherever a model does so just before; say in how many layers."""
    attend, count = torch.ops.unspool.attend.default, 0
    places = {argument.name: at for at, argument in enumerate(attend._schema.arguments)}
    for node in graph.find_nodes(op="call_function", target=attend):
        query, key = (_rotated_in_part(node.args[places[name]]) for name in (_QUERY, _KEY))
        if query is None or key is None or query[1:] != key[1:]:
            continue
        given = {_QUERY: query.x, _KEY: key.x, _COSINES: query.cosines, _SINES: query.sines}
        for name, value in given.items():
            node.update_arg(places[name], value)
        count += 1
    graph.eliminate_dead_code()
    return count


def _rotated_in_part(node: Any) -> _Rotated | None:
    """Recognize heads that are rotated, or their first numbers, with the rest of them behind."""
    if not _calls(node, _ATEN.cat.default):
        return _rotated(node)
    parts, dimension = node.args
    if len(parts) == 2 and (rotated := _rotated(parts[0])):
        first, second = _part(rotated.x), _part(parts[1])
        if first and second and first.x is second.x and _last(dimension, node) and first.stop == second.start:
            return rotated._replace(x=first.x) if first.start == 0 and second.stop == _width(first.x) else None
    return None


def _rotated(node: Any) -> _Rotated | None:
    """Recognize a rotation of heads `[1, heads, n, width]` by `[1, 1, n, width]`, all of one dtype."""
    for straight, crossed in _either_way(node, _ATEN.add.Tensor):
        for halves, sines in _either_way(crossed, _ATEN.mul.Tensor):
            x = _halved(halves)
            for own, cosines in _either_way(straight, _ATEN.mul.Tensor):
                if own is x and x is not None and _fit(x, cosines) and _fit(x, sines):
                    return _Rotated(x, cosines, sines)
    return None


class _Part(NamedTuple):
    """A part of the last dimension."""

    x: Node
    start: int
    stop: int


def _part(node: Any) -> _Part | None:
    if _calls(node, _ATEN.alias.default):  # all of it
        return _Part(node.args[0], 0, _width(node))
    if not _calls(node, _ATEN.slice.Tensor):
        return None
    x, dimension, start, stop = node.args
    return _Part(x, start, min(stop, _width(x))) if _last(dimension, x) else None


def _halved(node: Any) -> Node | None:
    """Recognize the second half of something, negated, before its first half; give that."""
    if not _calls(node, _ATEN.cat.default):
        return None
    parts, dimension = node.args
    if len(parts) != 2 or not _calls(parts[0], _ATEN.neg.default) or not _last(dimension, node):
        return None
    second, first = _part(parts[0].args[0]), _part(parts[1])
    if first is None or second is None or first.x is not second.x:
        return None
    half, width = _width(first.x) // 2, _width(first.x)
    return first.x if (first[1:], second[1:]) == ((0, half), (half, width)) and width % 2 == 0 else None


def _width(node: Node) -> int:
    width: int = node.meta["val"].shape[-1]
    return width


def _last(dimension: int, node: Node) -> bool:
    rank = node.meta["val"].dim()
    return bool(dimension % rank == rank - 1)


def _fit(x: Node, rotation: Any) -> bool:
    """Say whether cosines or sines are there for each token, in the dtype of what is rotated."""
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
