import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest


@pytest.fixture
def ticks_while() -> Callable[[Awaitable[Any]], Awaitable[int]]:
    """Await something and count how often the event loop ran another task meanwhile."""

    async def count(work: Awaitable[Any]) -> int:
        ticks = 0

        async def heartbeat() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        beating = asyncio.create_task(heartbeat())
        await asyncio.sleep(0)
        try:
            await work
        finally:
            beating.cancel()
        return ticks

    return count


@pytest.fixture
def slowly() -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function hold its thread for 0.1 s before it runs."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def slow(*args: Any, **kwargs: Any) -> Any:
            time.sleep(0.1)
            return function(*args, **kwargs)

        return slow

    return wrap
