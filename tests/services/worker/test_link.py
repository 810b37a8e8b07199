"""The socket between engine process and worker process."""

import asyncio
import stat
from pathlib import Path

from services.worker.hook_mirror import HookMirror
from services.worker.link import HookEnd, LinkPath, Promote, ReportMessage, RequestEntry, SetCap, WorkerEnd

EMPTY = (b"", b"", b"", b"", b"")


def message(seq: int, entries: tuple[RequestEntry, ...] = (), removed: tuple[int, ...] = ()) -> ReportMessage:
    return ReportMessage(
        seq, seq, 1.0, entries, removed, EMPTY, 90, 100, 16, 8, 1.5, 1, 0, 0, 0, 0, 64,
        ((10, 5, 2, 0, 30.0, 0.02),), 80.0, None, (),
    )  # fmt: skip


def entry(number: int) -> RequestEntry:
    return RequestEntry(
        number, f"r{number}", 1, "app", "loose", True, False, 10, 0, 0, 20, 30, 2.0, 2.0, 0.1, None, 1.5
    )


async def test_directives_arrive_in_order_without_waiting() -> None:
    path = LinkPath()
    worker, hook = WorkerEnd(path.address), HookEnd(path.address)
    assert hook.directives() == []
    worker.send(Promote("r", "tight"))
    worker.send(SetCap(0.05))
    got = []
    async with asyncio.timeout(10):
        while len(got) < 2:
            got += hook.directives()
            await asyncio.sleep(0)
    assert got == [Promote("r", "tight"), SetCap(0.05)]
    hook.close()
    worker.close()
    path.close()


async def test_reports_arrive_in_order() -> None:
    path = LinkPath()
    worker, hook = WorkerEnd(path.address), HookEnd(path.address)
    for seq in range(3):
        hook.report(message(seq, (entry(seq),)))
    async with asyncio.timeout(10):
        assert [await worker.receive() for _ in range(3)] == [message(seq, (entry(seq),)) for seq in range(3)]
    hook.close()
    worker.close()
    path.close()


def test_nobody_else_can_enter_the_sockets_directory() -> None:
    path = LinkPath()
    directory = Path(path.address.removeprefix("ipc://")).parent
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    path.close()
    assert not directory.exists()


def test_the_mirror_says_what_changed_and_can_say_everything() -> None:
    mirror = HookMirror()
    assert mirror.snapshot() is None
    mirror.apply(message(1, (entry(1), entry(2))))
    report = mirror.apply(message(2, (entry(3),), removed=(1,)))
    assert [p.request_id for p in report.requests] == ["r3"]
    assert report.removed_ids == ("r1",)
    assert not report.full
    snapshot = mirror.snapshot()
    assert snapshot is not None
    assert snapshot.full
    assert [p.request_id for p in snapshot.requests] == ["r2", "r3"]
    assert snapshot.batches == ()
