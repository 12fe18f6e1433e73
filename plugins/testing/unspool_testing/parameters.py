"""Parameters drawn from what a plugin's pydantic model allows: types, bounds, choices, examples.

A field is drawn from its `examples` where it has any (a text that must mean something can be drawn no other way), else
from its type and bounds. Fields with a default are left out now and then, always where a case is shrunk.
"""

from __future__ import annotations

import enum
import types
import typing
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Annotated, Any, Literal, TypeVar

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from unspool.errors import ConfigError, Problem
from unspool.plugin import Plugin

Number = TypeVar("Number", int, float)

REACH = 8
"""How far a number is drawn from its bound, or from 0, where nothing bounds it."""
NEAR = 2
"""Half of the numbers are drawn so near to 0, or to the bound next to it: with small models things happen there."""
LONGEST = 3
"""Most entries of a list that nothing bounds."""


class Underivable(Exception):
    """A type of which the kit cannot draw values."""


def parameters(
    kind: type[Plugin], vocab_size: int, given: Mapping[str, Any] | None = None
) -> SearchStrategy[dict[str, Any]]:
    """Draw parameters of a plugin, as a config has them.

    Args:
        kind: the plugin's class.
        vocab_size: token ids (fields of `unspool.TokenId`) lie below it.
        given: parameters to keep.

    Raises:
        ConfigError: a required field has a type that cannot be drawn, and no examples.
    """
    given = dict(given or {})
    needed: dict[str, SearchStrategy[Any]] = {name: st.just(value) for name, value in given.items()}
    free: dict[str, SearchStrategy[Any]] = {}
    for name, field in kind.Params.model_fields.items():
        if name in given:
            continue
        try:
            (needed if field.is_required() else free)[name] = _field(field, vocab_size)
        except Underivable as error:
            if field.is_required():
                what = f"values of {error} cannot be drawn: give the field `examples=[...]`, or fix the parameter"
                raise ConfigError([Problem(f"{kind.__name__}.{name}", what)]) from error

    def valid(drawn: dict[str, Any]) -> bool:
        try:
            kind.Params.model_validate(drawn)
        except ValidationError:
            return False
        return True

    return st.fixed_dictionaries(needed, optional=free).filter(valid)


def _field(field: FieldInfo, vocab_size: int) -> SearchStrategy[Any]:
    if field.examples:
        return st.sampled_from(list(field.examples))
    return _values(field.annotation, _Bounds.of(field, _Bounds()), vocab_size)


class _Bounds:
    """What the metadata of a field says about its values."""

    def __init__(self) -> None:
        self.low: float | None = None
        self.high: float | None = None
        self.open_low = self.open_high = False
        self.shortest, self.longest = 0, LONGEST
        self.multiple: float | None = None
        self.token_id = False

    @classmethod
    def of(cls, field: FieldInfo, bounds: _Bounds) -> _Bounds:
        bounds.token_id |= isinstance(field.json_schema_extra, dict) and bool(field.json_schema_extra.get("token_id"))
        for mark in field.metadata:
            bounds.add(mark)
        return bounds

    def add(self, mark: Any) -> None:
        if isinstance(mark, FieldInfo):
            _Bounds.of(mark, self)
        for name, value in ((name, getattr(mark, name, None)) for name in ("ge", "gt", "le", "lt")):
            if value is not None and name[0] == "g":
                self.low, self.open_low = value, name == "gt"
            elif value is not None:
                self.high, self.open_high = value, name == "lt"
        self.shortest = getattr(mark, "min_length", None) or self.shortest
        longest = getattr(mark, "max_length", None)
        self.longest = max(self.shortest, min(longest, LONGEST) if longest is not None else LONGEST)
        self.multiple = getattr(mark, "multiple_of", None) or self.multiple


def _values(annotation: Any, bounds: _Bounds, vocab_size: int) -> SearchStrategy[Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        for mark in arguments[1:]:
            bounds.add(mark)
        return _values(arguments[0], bounds, vocab_size)
    if origin is Literal:
        return st.sampled_from(list(arguments))
    if origin in (typing.Union, types.UnionType):
        parts = []
        for part in sorted(arguments, key=lambda part: part is not type(None)):
            try:
                parts.append(_values(part, bounds, vocab_size))
            except Underivable:
                continue
        if not parts:
            raise Underivable(annotation)
        return st.one_of(parts)
    if annotation is type(None):
        return st.none()
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return st.sampled_from([member.value for member in annotation])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        fields = {name: _field(field, vocab_size) for name, field in annotation.model_fields.items()}
        return st.fixed_dictionaries(fields)
    if origin is not None:
        return _collection(origin, arguments, bounds, vocab_size)
    return _scalar(annotation, bounds, vocab_size)


def _scalar(annotation: Any, bounds: _Bounds, vocab_size: int) -> SearchStrategy[Any]:
    if annotation is bool:
        return st.booleans()
    if annotation is int:
        if bounds.token_id:
            return st.integers(0, vocab_size - 1)
        low, high = _range(bounds)
        step = int(bounds.multiple or 1)
        first, last = -(-int(low) // step), int(high) // step
        first += int(bounds.open_low and first * step == low)
        last -= int(bounds.open_high and last * step == high)
        return st.one_of([st.integers(*scale) for scale in _scales(first, last)]).map(lambda count: count * step)
    if annotation is float:
        floats = [
            st.floats(*scale, exclude_min=bounds.open_low, exclude_max=bounds.open_high, allow_subnormal=False)
            for scale in _scales(*_range(bounds))
        ]
        return st.one_of(floats).filter(lambda value: value == 0 or abs(value) > 1e-6)
    raise Underivable(getattr(annotation, "__name__", annotation))


def _scales(low: Number, high: Number) -> list[tuple[Number, Number]]:
    """Give the ranges to draw from: what is near 0 first, then all, if that is more."""
    centre = min(max(low, 0), high)
    near = max(low, centre - NEAR), min(high, centre + NEAR)
    return list(dict.fromkeys([near, (low, high)]))


def _range(bounds: _Bounds) -> tuple[float, float]:
    """Give both bounds, near each other where only one is given."""
    low = bounds.low if bounds.low is not None else min(-REACH, (bounds.high or 0) - REACH)
    high = bounds.high if bounds.high is not None else max(REACH, low + REACH)
    return (low if low > -1e3 else -REACH), (high if high < 1e3 else max(REACH, low + REACH))


def _collection(origin: Any, arguments: tuple[Any, ...], bounds: _Bounds, vocab_size: int) -> SearchStrategy[Any]:
    if not (isinstance(origin, type) and arguments):
        raise Underivable(origin)
    if issubclass(origin, Mapping):
        key, value = (_values(part, _Bounds(), vocab_size) for part in arguments)
        return st.dictionaries(key, value, min_size=bounds.shortest, max_size=bounds.longest)
    if issubclass(origin, tuple) and arguments[-1] is not Ellipsis:
        return st.tuples(*(_values(part, _Bounds(), vocab_size) for part in arguments)).map(list)
    if issubclass(origin, str | bytes):
        raise Underivable(origin)
    entries = _values(arguments[0], _Bounds(), vocab_size)
    return st.lists(entries, min_size=bounds.shortest, max_size=bounds.longest, unique=issubclass(origin, AbstractSet))
