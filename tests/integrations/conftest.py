import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def beside_the_loop(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Make methods fail unless the event loop runs something else before they begin.

    Returns a list that receives the name of each method as it is called.
    """

    def patch(owner: type, *names: str) -> list[str]:
        loop, calls = asyncio.get_running_loop(), []

        def waits(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                calls.append(name)
                turn = threading.Event()
                loop.call_soon_threadsafe(turn.set)
                assert turn.wait(30), f"{name} blocks the event loop"
                return method(*args, **kwargs)

            return call

        for name in names:
            monkeypatch.setattr(owner, name, waits(name, getattr(owner, name)))
        return calls

    return patch
