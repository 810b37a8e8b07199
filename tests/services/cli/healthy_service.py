"""A process with nothing but the health of a real service; how it behaves comes from its environment."""

import asyncio
import os
import signal
import sys

from services.common.rpc import RpcServer


async def main() -> None:
    if os.environ.get("FAIL_AT_START"):
        print("no configuration for me", flush=True)
        sys.exit(2)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    if os.environ.get("IGNORE_SIGTERM"):
        loop.add_signal_handler(signal.SIGTERM, lambda: None)
    else:
        loop.add_signal_handler(signal.SIGTERM, stop.set)
    server = RpcServer(os.environ["ADDRESS"])
    await server.start([])
    if os.environ.get("NEVER_SERVING"):
        await server.set_serving(False)
    await stop.wait()
    await server.stop(0)


asyncio.run(main())
