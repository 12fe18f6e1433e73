"""Law 10: config -> pipeline -> config is the identity, and a bad config names the field."""

from __future__ import annotations

import tomllib
from typing import Any

import yaml
from hypothesis import strategies as st
from pydantic import BaseModel

from unspool.config import Config, validate
from unspool.errors import ConfigError
from unspool.pipeline import Pipeline
from unspool.request import Request
from unspool.resolved import Defaults, describe, resolve_request
from unspool_testing.case import Case
from unspool_testing.compare import difference, with_pipeline
from unspool_testing.driver import alone
from unspool_testing.generators import models, requests
from unspool_testing.known import Known
from unspool_testing.law import Broken, Law, check_of, lawful_end
from unspool_testing.subject import Subject

BEYOND = {"ge": -1, "gt": 0, "le": 1, "lt": 0}
"""Bound -> what is added to it to be outside."""


@st.composite
def _cases(draw: st.DrawFn, subject: Subject) -> Case:
    model = draw(models())
    asked = draw(requests(subject, model, most_new=3))
    return Case(subject=subject.name, model=model, requests=(asked,))


@check_of
def check_config_round_trip(case: Case, known: Known) -> None:
    """Check that a pipeline written as a config and read again is the same, and that bad values are refused by name."""
    [request] = case.prepared(known)
    before = request.pipeline
    written = describe(before)
    for how, read in (("YAML", _from_yaml(written)), ("TOML", _from_toml(written))):
        config = validate(Config, read, known.registry)
        after = resolve_request(Defaults(config, known.registry), Request(prompt=[1])).pipeline
        if describe(after) != written:
            raise Broken(f"written as {how} and read again, {written} became {describe(after)}")
        if after.key != before.key:
            raise Broken(f"read again from {how}, the pipeline has another key: {before.key} became {after.key}")
    one, other = (
        alone(case.model.runner(), [with_pipeline(request, pipeline)], case.model.companions())[0]
        for pipeline in (before, after)
    )
    lawful_end(one)
    if parts := difference(one, other):
        raise Broken(f"the pipeline as it was and as it was read again: {parts}")
    _check_refusals(known, case.subject, before)


def _check_refusals(known: Known, name: str, pipeline: Pipeline) -> None:
    """Check that each parameter, one step outside its bounds, is refused with an error that names it."""
    params = pipeline.parameters[name]
    good = params.model_dump(mode="json")
    wrong: list[tuple[str, Any]] = [("no_such_parameter", 1)]
    wrong += [(field, value) for field, value in _outside(type(params))]
    for field, value in wrong:
        try:
            known.plugin({name: {**good, field: value}})
        except ConfigError as error:
            if not any(field in problem.field for problem in error.problems):
                raise Broken(f"{field} = {value!r} is refused with an error that does not name it: {error}") from None
        else:
            raise Broken(f"{field} = {value!r} is outside its bounds and was taken")


def _outside(params: type[BaseModel]) -> list[tuple[str, Any]]:
    found = []
    for name, field in params.model_fields.items():
        if field.annotation not in (int, float):
            continue
        for mark in field.metadata:
            for bound, step in BEYOND.items():
                if (limit := getattr(mark, bound, None)) is not None:
                    found.append((name, limit + step))
    return found


def _from_yaml(written: dict[str, Any]) -> Any:
    return yaml.safe_load(yaml.safe_dump(written))


def _from_toml(written: dict[str, Any]) -> Any:
    return tomllib.loads("\n".join(f"{name} = {_toml(value)}" for name, value in written.items()))


def _toml(value: Any) -> str:
    """Write a value inline. None is left out, as TOML has none: the default of such a field is None."""
    if isinstance(value, dict):
        pairs = [f"{_toml(str(key))} = {_toml(part)}" for key, part in value.items() if part is not None]
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return repr(value)


def _excuse(subject: Subject) -> str | None:
    if subject.name in subject.known.instances:
        return "it was given as an object: no config names it"
    return None


CONFIG_ROUND_TRIP = Law(
    "config_round_trip",
    "A pipeline that is written as a config and read again is the same and gives the same text; a parameter outside "
    "its bounds is refused by name.",
    "A result carries the config that made it, so that anybody can run it again. That works only where parameters "
    "survive being written. Usual causes: a field that pydantic writes in another form than it reads; a default that "
    "depends on another field; bounds that are checked in a hook instead of in `Params`.",
    check_config_round_trip,
    _cases,
    _excuse,
    examples=30,
)
