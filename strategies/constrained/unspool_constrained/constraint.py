"""A constraint: at every place of a text, only what its language lets follow.

    out[t]  =  logits[t]  if some text of the language begins with path + t,   -inf  elsewhere

The place is folded along the path by a pure function, so beams, particles, drafts and preemption need no code: each
branch has its own. Where the text is complete its end tokens are allowed too, elsewhere they are not. Where nothing
but an end can follow, the text ends with `grammar_end`, and needs no end token. Where nothing at all can follow, the
row is a dead end. Special tokens never stand in a text.

Costs no forward pass. A mask takes some 50 microseconds a row, on other threads, while the model runs. Text that the
language forces is hung below each row as drafts, so it costs no pass of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from torch import Tensor

from unspool.errors import InputError
from unspool.masks import forbid
from unspool.plugin import Parameters, Plugin, hookimpl
from unspool_constrained.completion import Finder
from unspool_constrained.engine import GrammarError
from unspool_constrained.forced import hang_forced
from unspool_constrained.guidance import ENGINE
from unspool_constrained.languages import Language
from unspool_constrained.mask import allow_ends, long_enough
from unspool_constrained.place import Place
from unspool_constrained.vocabulary import Vocabulary, vocabulary_of
from unspool_constrained.within import keep_within

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from unspool.hooks import Growth
    from unspool.pipeline import Pipeline
    from unspool.request import Hypothesis, PreparedRequest
    from unspool.step import Step


class ConstraintParams(Parameters):
    """What all constraints have in common."""

    draft_forced: bool = Field(
        True, description="Hang text that leaves no choice below each row as drafts: it costs no pass, changes nothing."
    )
    complete_within: bool = Field(
        False, description="Leave room in max_new_tokens to bring the text to its end (see the README)."
    )


class Constraint(Plugin):
    """The base of all constraints: a subclass says which language its parameters mean."""

    row_local = True
    constraint = True
    said_by: ClassVar[str]
    """The parameter that says what the language is."""

    Params: type[ConstraintParams] = ConstraintParams  # type: ignore[assignment]

    @classmethod
    def language(cls, params: Any) -> Language:
        """Give the language that parameters mean.

        Raises:
            GrammarError: they mean none.
        """
        raise NotImplementedError

    def refuse(self, pipeline: Pipeline) -> str | None:
        """Refuse a language that no vocabulary could help."""
        try:
            ENGINE.check(self.language(self.params))
        except GrammarError as error:
            return str(InputError(self.said_by, getattr(self.params, self.said_by), str(error)))
        return None

    def vocabulary(self, request: PreparedRequest) -> Vocabulary:
        """Give the tokens of the request's model as bytes."""
        if request.tokenizer is None:
            raise InputError("tokenizer", None, f"a model with a tokenizer: {self.name} constrains text, not token ids")
        try:
            return vocabulary_of(request.tokenizer)
        except ValueError as error:
            raise InputError("tokenizer", type(request.tokenizer).__name__, str(error)) from error

    def initial(self, request: PreparedRequest) -> Place:
        """Give the place before any text."""
        params: Any = request.parameters[self.name]
        vocabulary = self.vocabulary(request)
        try:
            compiled = ENGINE.compile(self.language(params), vocabulary)
        except GrammarError as error:
            said = getattr(params, self.said_by)
            raise InputError(f"{self.name}.{self.said_by}", said, str(error)) from error
        ends = tuple(request.end_ids)
        if not params.complete_within:
            return Place(compiled.start(), ends)
        finder = Finder(ENGINE, vocabulary, bool(ends))
        way, most = finder.first(compiled), request.limits.max_new_tokens
        if way is not None and len(way) + 1 > most:
            shortest = f"at least {len(way) + 1}: {self.name} is to be complete, and no shorter text of it was found"
            raise InputError("max_new_tokens", most, shortest)
        return Place(compiled.start(), ends, finder, way=way)

    def advance(self, state: Place, token: int, logprob: float = 0.0) -> Place | None:
        """Give the place one token later."""
        return state.advance(token)

    @hookimpl
    def pre_forward(self, step: Step) -> None:
        """Begin to look for the masks of all rows, and hang what is forced below them."""
        positions = [place.position for place in step.states(self)]
        if self.params.draft_forced:
            hang_forced(step, positions)
        ENGINE.prefetch(positions)

    @hookimpl
    def logits_transform(self, step: Step, logits: Tensor) -> None:
        """Forbid what cannot follow."""
        places: list[Place] = step.states(self)
        size = logits.shape[1]
        masks = long_enough(ENGINE.masks([place.position for place in places]), size)
        ends = ((row, end, place) for row, place in enumerate(places) for end in place.ends if end < size)
        allow_ends(masks, [(row, end, place.position.may_stop) for row, end, place in ends])
        if self.params.complete_within:
            keep_within(step, places, logits, masks)
        forbid(logits, masks)

    @hookimpl
    def stop_check(self, step: Step, growth: Growth) -> None:
        """End texts after which nothing but an end can come."""
        for child, place in enumerate(growth.states(self)):
            if place is not None and place.position.has_stopped:
                growth.finish[child] = "grammar_end"

    def report(self, request: PreparedRequest, own: Any, hypotheses: Sequence[Hypothesis]) -> Mapping[str, Any]:
        """Say of each returned text whether it is complete."""
        return {"complete": [self._is_complete(request, each) for each in hypotheses[: request.n]]}

    def _is_complete(self, request: PreparedRequest, hypothesis: Hypothesis) -> bool:
        if hypothesis.finish_reason in ("eos", "grammar_end"):
            return True
        place: Place | None = self.initial(request)
        for token in hypothesis.token_ids:
            place = place.advance(token) if place is not None else None
        return place is not None and place.position.may_stop
