"""Which planner keeps the ledger of a replica: highest random weight, so that every process agrees without talking.

Adding or removing a planner moves only the replicas that it gains or held.
"""

import hashlib
from collections.abc import Sequence

__all__ = ["planner_for"]


def planner_for(replica_id: str, addresses: Sequence[str]) -> str:
    """The address, out of the configured planners, that plans `replica_id`. Order and repetition do not matter.

    Raises ValueError where no planner is configured.
    """
    if not addresses:
        raise ValueError("no planner address is configured")
    return max(addresses, key=lambda address: (_weight(address, replica_id), address))


def _weight(address: str, replica_id: str) -> int:
    # hashlib, not hash(): the weight must be the same in every process.
    digest = hashlib.blake2b(f"{address}\n{replica_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
