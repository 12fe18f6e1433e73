"""How much of the cache a run takes: the most slots at once, where an engine shows only its end."""

from __future__ import annotations

from typing import Any

import unspool


class Taken:
    """Watches how many slots of the pool are taken at once."""

    def __init__(self, engine: unspool.Engine) -> None:
        self.most = 0
        loop = engine._loop
        pool, step = loop.main.cache.pool, loop._forward.run

        def run(*arguments: Any) -> None:
            step(*arguments)
            self.most = max(self.most, pool.size - pool.free)

        loop._forward.run = run  # type: ignore[method-assign]
