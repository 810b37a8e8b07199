"""Loads the Lua scripts of services/common/lua.

Each script is one atomic step of a request's life or of a replica's lease. Clients send it by its digest and repeat
it in full where the server has forgotten it.
"""

from importlib import resources
from typing import TYPE_CHECKING

from redis.asyncio import Redis

if TYPE_CHECKING:
    from redis.commands.core import AsyncScript

__all__ = ["load_script"]


def load_script(redis: Redis, name: str, *needs: str) -> "AsyncScript":
    """The script services/common/lua/`name`.lua, ready to be awaited with keys and args.

    `needs` names the files with local functions that go in front of it.
    """
    folder = resources.files("services.common").joinpath("lua")
    source = "".join(folder.joinpath(f"{part}.lua").read_text(encoding="utf-8") for part in (*needs, name))
    return redis.register_script(source)
