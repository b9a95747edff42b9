"""What each service sets in its interpreter: the event loop and the garbage collector."""

import asyncio
import gc


def new_loop() -> asyncio.AbstractEventLoop:
    """An event loop: uvloop's if it is installed, or asyncio's, which is slower."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def freeze_memory() -> None:
    """Keep the garbage collector from visiting again what exists now, because it lives as long as
    the process. To visit it at each full collection takes 7 % of a worker's CPU."""
    gc.collect()
    gc.freeze()
