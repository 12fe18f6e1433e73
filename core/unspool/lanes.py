"""All lanes of an engine: the target's own, and those of the companions that plugins declare."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from unspool.errors import ConfigError, Problem
from unspool.lane import Cache, Lane
from unspool.request import PreparedRequest
from unspool.runner import ModelRunner
from unspool.slots import SlotPool
from unspool.tree import Tree


class Lanes:
    """The lanes of one token tree, which it makes as they are asked for.

    Args:
        runner: the target.
        slots: size of its pool, and of each companion model's.
        models: loads a companion's model by name.
        prefix_cache: keep prompts that have run, for others that begin alike.
    """

    def __init__(
        self,
        runner: ModelRunner,
        slots: int,
        models: Callable[[str], ModelRunner] | None = None,
        *,
        prefix_cache: bool = True,
    ) -> None:
        self.tree = Tree(self.free)
        self.main = Lane(self.tree, self._cache(runner, slots), keeps=prefix_cache)
        self.companions: dict[tuple[str, str | None, int | None], Lane] = {}
        self._caches: dict[str | None, Cache] = {None: self.main.cache}
        self._models, self._slots, self._keeps = models, slots, prefix_cache

    def of(self, request: PreparedRequest) -> Mapping[str, Lane]:
        """Give the lanes of a request's companions, by name, making those that are new."""
        lanes = {}
        for name, companion in request.pipeline.companions.items():
            key = name, companion.model, companion.layers
            if key not in self.companions:
                cache = self._companion_cache(companion.model)
                layers = cache.runner.layers
                if companion.layers is not None and not 0 < companion.layers <= layers:
                    reason = f"{companion.layers} layers: 1 to {layers} are there"
                    raise ConfigError([Problem(f"companion {name}", reason)])
                self.companions[key] = Lane(self.tree, cache, companion.layers, keeps=self._keeps)
            lanes[name] = self.companions[key]
        return lanes

    def _companion_cache(self, model: str | None) -> Cache:
        if model not in self._caches:
            assert model is not None  # the target's own cache is there from the start
            if self._models is None:
                raise ConfigError([Problem("companion", f"no model {model!r} is at hand")])
            runner, target = self._models(model), self.main.cache.runner
            if runner.vocab_size != target.vocab_size:
                reason = f"{model}: its vocabulary has {runner.vocab_size} tokens, the target's {target.vocab_size}"
                raise ConfigError([Problem("companion", reason)])
            same = runner is target  # whose pool must not be made anew
            self._caches[model] = self.main.cache if same else self._cache(runner, self._slots)
        return self._caches[model]

    @staticmethod
    def _cache(runner: ModelRunner, slots: int) -> Cache:
        runner.allocate(slots)
        return Cache(runner, SlotPool(slots))

    def free(self, node: int) -> None:
        """Free a node's slots in every lane."""
        self.main.free(node)
        for lane in self.companions.values():
            lane.free(node)
