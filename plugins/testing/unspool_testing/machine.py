"""A rule-based machine that drives the engine: submit, step, cancel, preempt, finish, in any order.

After every rule each cache slot, node and state must belong to somebody who needs it; at the end everything is free,
and every request that was not cancelled has given what it gives alone.

    TestMyStrategy = engine_machine("my_strategy").TestCase
"""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from unspool.live import Live
from unspool.loop import Loop
from unspool.request import PreparedRequest
from unspool_testing.case import Asked, Model
from unspool_testing.compare import check_equal
from unspool_testing.driver import alone, check_conservation, check_holdings, least_slots
from unspool_testing.generators import NEIGHBOURS, requests
from unspool_testing.subject import Subject
from unspool_testing.table import TableModel

MOST_STEPS = 1000


def engine_machine(
    plugin: object, *, params: dict[str, Any] | None = None, examples: int = 20, steps: int = 30
) -> type[RuleBasedStateMachine]:
    """Make a machine that runs one plugin's requests among strangers'.

    Args:
        plugin: what `Subject.find` takes.
        params: parameters to keep.
        examples: how many runs.
        steps: rules in each.

    Returns:
        A state machine; its `TestCase` is what unittest and pytest collect.
    """
    subject = Subject.find(plugin, params=params)
    model = Model(vocab_size=3, memory=2)
    asked = st.one_of(
        requests(subject, model),
        st.sampled_from(NEIGHBOURS).flatmap(lambda pipeline: requests(subject, model, pipeline=pipeline)),
    )

    class EngineMachine(RuleBasedStateMachine):
        """Drives a loop on a small pool."""

        @initialize(spare=st.sampled_from([0, 3, 12, 100]), budget=st.sampled_from([512, 5, 2, 1]), first=asked)
        def begin(self, spare: int, budget: int, first: Asked) -> None:
            """Make a loop that has room for the first request and little more."""
            self.table = TableModel(model.vocab_size, memory=model.memory)
            self.companions = dict(model.companions())
            one = first.prepared(subject.known, "0")
            self.slots = least_slots(model.runner(), [one], model.companions()) + spare
            self.ended: list[Live] = []
            self.loop = Loop(
                self.table,
                self.slots,
                token_budget=budget,
                max_running=4,
                models=self.companions.__getitem__,
                finished=self.ended.append,
            )
            self.asked: dict[Live, PreparedRequest] = {self.loop.submit(one): one}
            self.cancelled: set[Live] = set()

        @rule(one=asked)
        def submit(self, one: Asked) -> None:
            """Send a request, if the pool is large enough for it."""
            request = one.prepared(subject.known, str(len(self.asked)))
            if least_slots(model.runner(), [request], model.companions()) <= self.slots:
                self.asked[self.loop.submit(request)] = request

        @precondition(lambda self: self.loop.busy)
        @rule()
        def step(self) -> None:
            """Take one step, and forget what free slots held."""
            self.loop.step()
            self.table.poison(np.flatnonzero(~self.loop.main.cache.pool._used))

        @rule(number=st.integers(0, 9))
        def cancel(self, number: int) -> None:
            """Cancel a request, be it ended or not."""
            live = list(self.asked)[number % len(self.asked)]
            self.cancelled |= {live} - set(self.ended)
            self.loop.cancel(live)

        @precondition(lambda self: self.loop.scheduler.running)
        @rule()
        def preempt(self) -> None:
            """Take the youngest request's slots away."""
            self.loop.scheduler.preempt(max(self.loop.scheduler.running, key=lambda live: live.order))

        @rule()
        def finish(self) -> None:
            """Let everybody come to an end."""
            for _ in range(MOST_STEPS):
                if not self.loop.busy:
                    return
                self.step()
            raise AssertionError(f"requests do not end within {MOST_STEPS} steps")

        @invariant()
        def every_slot_has_an_owner(self) -> None:
            """Check the books."""
            if hasattr(self, "loop"):
                check_holdings(self.loop)

        def teardown(self) -> None:
            """Finish, and compare."""
            if not hasattr(self, "loop"):
                return
            self.finish()
            check_conservation(self.loop)
            assert len(self.ended) == len(set(self.ended)) == len(self.asked), "each request ends once"
            for live, request in self.asked.items():
                if live not in self.cancelled:
                    assert live.result is not None
                    expected = alone(model.runner(), [request], model.companions())[0]
                    check_equal(expected, live.result, f"request {request.id} alone, and among the others")

    EngineMachine.TestCase.settings = settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    EngineMachine.__name__ = f"EngineMachine_{subject.name}"
    return EngineMachine
