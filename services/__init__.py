"""SLOs-Serve: the four services, their shared plumbing and the pure scheduling core."""

import os

# gRPC's fork handlers stop and replace its pollers whenever the process starts a child, and now and then abort it with
# "epoll_wait: Bad file descriptor". No process here uses gRPC on both sides of a fork. gRPC reads this when it is first
# imported, hence at the root of the package.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
