"""The durable records: each at most once, generations that never fall, full disks, damage."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from mcft import api
from mcft.agent import storefile
from mcft.agent.store import Store
from mcft.errors import Failed, McftError, Refused


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = await Store.open(tmp_path / "store.db")
    yield store
    await store.close()


def event(number: int, domain: str = "vm1") -> api.EventBody:
    return api.EventBody(number, "2026-01-01T00:00:00Z", domain, "test", f"event {number}")


async def test_records_are_kept_once_and_in_order(store: Store) -> None:
    assert await store.append("u1", "p1", 1, "primary", ["preparing", "arming"], "why")
    assert not await store.append("u1", "p1", 1, "primary", ["arming"])
    assert await store.append("u1", "p1", 1, "primary", ["arming", "protected"])
    assert await store.append("u1", "p1", 1, "standby", ["armed"])
    assert await store.append("u1", "p2", 2, "primary", ["preparing"])
    kinds = [(r.pid, r.side, r.kind) for r in await store.records("u1")]
    assert kinds == [
        ("p1", "primary", "preparing"),
        ("p1", "primary", "arming"),
        ("p1", "primary", "protected"),
        ("p1", "standby", "armed"),
        ("p2", "primary", "preparing"),
    ]
    assert (await store.records("u1"))[0].detail == "why"
    assert [r.kind for r in await store.records("u1", "p2")] == ["preparing"]
    assert await store.records("u2") == []


async def test_generation_never_falls_and_outlives_its_protection(store: Store) -> None:
    assert await store.highest_generation("u1") == 0
    await store.save("u1", "vm1", b"{}")
    await store.append("u1", "p1", 7, "primary", ["preparing"])
    await store.append("u1", "p1", 3, "primary", ["preparing"])
    await store.delete("u1")
    assert await store.load() == []
    assert await store.highest_generation("u1") == 7
    assert len(await store.records("u1")) == 2


async def test_body_goes_with_its_records_or_not_at_all(store: Store) -> None:
    await store.save("u1", "vm1", b"old")
    await store.append("u1", "p1", 1, "primary", ["arming"], body=b"new")
    assert [(p.uuid, p.domain, p.body) for p in await store.load()] == [("u1", "vm1", b"new")]
    with pytest.raises(Failed, match="no protection u2"):
        await store.append("u2", "p2", 1, "primary", ["arming"], body=b"lost")
    assert await store.records("u2") == []
    assert await store.highest_generation("u2") == 0


async def test_what_is_over_or_replaced_is_not_written_any_more(store: Store) -> None:
    """An arbiter's answer may come long after `unprotect`, or after the domain was protected anew.

    Fails if the body of an older instance comes back: the next agent would go on with it, and take the living one's gate apart.
    """
    old, new = b'{"pid":"p1","state":"solo"}', b'{"pid":"p2","state":"protected"}'
    await store.save("u1", "vm1", old)
    assert await store.update("u1", old + b" ")
    await store.save("u1", "vm1", new)
    assert not await store.update("u1", old)
    assert await store.append("u1", "p1", 1, "primary", ["spoken"], body=old)
    assert [p.body for p in await store.load()] == [new] and len(await store.records("u1", "p1")) == 1
    await store.delete("u1")
    assert not await store.update("u1", new)
    assert await store.load() == []


async def test_all_is_there_after_a_clean_stop(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    for round_ in range(1, 4):
        store = await Store.open(path)
        await store.append("u1", "p1", round_, "primary", ["arming"])
        await store.set_meta("failures", str(round_))
        await store.close()
        await store.close()
    store = await Store.open(path)
    assert [r.g for r in await store.records("u1")] == [1, 2, 3]
    assert (await store.meta("failures"), await store.meta("nothing")) == ("3", None)
    assert not (tmp_path / "store.db.spare").exists()
    await store.close()


def test_all_is_there_after_kill_9(tmp_path: Path) -> None:
    script = """
        import asyncio, os, signal, sys
        from mcft.agent.store import Store
        async def main():
            store = await Store.open(sys.argv[1])
            for g in range(1, 301):
                await store.append("u1", "p1", g, "primary", ["arming"])
            os.kill(os.getpid(), signal.SIGKILL)
        asyncio.run(main())
    """
    path = tmp_path / "store.db"
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], check=False)
        assert run.returncode == -9

    async def read() -> int:
        store = await Store.open(path)
        highest = await store.highest_generation("u1")
        await store.close()
        return highest

    assert asyncio.run(read()) == 300


async def test_a_second_agent_is_refused(store: Store) -> None:
    with pytest.raises(Refused) as error:
        await Store.open(store.path)
    assert error.value.code == "store-locked"


async def test_a_newer_store_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    await (await Store.open(path)).close()
    with sqlite3.connect(path) as db:
        db.execute(f"PRAGMA user_version={storefile.SCHEMA_VERSION + 1}")
    db.close()
    with pytest.raises(Refused, match="newer mcft"):
        await Store.open(path)


@pytest.mark.parametrize("damage", ["empty", "garbage", "foreign", "torn", "missing"])
async def test_damage_is_said_and_never_replaced(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "store.db"
    store = await Store.open(path)
    await store.append("u1", "p1", 1, "primary", ["arming"])
    await store.close()
    whole = path.read_bytes()
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "garbage":
        path.write_bytes(os.urandom(8192))
    elif damage == "foreign":
        path.unlink()
        sqlite3.connect(path).executescript("CREATE TABLE t(x)").connection.close()
    elif damage == "torn":
        path.write_bytes(whole[:4096] + b"\xff" * 4096 * 8 + whole[4096 * 9 :])
    else:
        path.unlink()
        path.with_name("store.db-wal").write_bytes(b"x" * 100)
    before = path.read_bytes() if path.exists() else None
    with pytest.raises(McftError) as error:
        await Store.open(path)
    assert error.value.code == "store-damaged"
    assert str(path) in error.value.message
    assert (path.read_bytes() if path.exists() else None) == before


async def test_a_failed_write_of_the_disk_closes_the_store_for_good(store: Store) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC

    def fail() -> None:
        raise error

    with pytest.raises(Failed, match="damaged"):
        await store._run(fail)
    with pytest.raises(Failed, match="cannot be used"):
        await store.append("u1", "p1", 1, "primary", ["arming"])
    store.broken = ""


async def test_records_need_no_new_page_of_the_database(store: Store) -> None:
    """As on a full disk: the database may not grow, and hundreds of records still go in."""
    await store.save("u1", "vm1", b"x" * 4000)

    def freeze() -> int:
        pages = int(store._db.execute("PRAGMA page_count").fetchone()[0])
        store._db.execute(f"PRAGMA max_page_count={pages}")
        return pages

    pages = await store._run(freeze)
    for g in range(1, 1001):
        await store.append("u1", "p1", g, "primary", ["arming", "protected"], body=b"y" * 4000)
    assert await store._run(lambda: store._db.execute("PRAGMA page_count").fetchone()[0]) == pages


async def test_the_reserve_is_filled_again(store: Store) -> None:
    def free() -> int:
        return int(store._db.execute("PRAGMA freelist_count").fetchone()[0])

    assert await store._run(free) >= storefile.RESERVE_PAGES
    await store.save("u1", "vm1", b"x" * 4096 * (storefile.RESERVE_PAGES - 50))
    assert await store._run(free) >= storefile.RESERVE_PAGES


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "mcft-test", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path) -> None:
    with (disk / "filler").open("ab", buffering=0) as filler:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    filler.write(bytes(size))
            except OSError:
                continue


async def test_a_full_disk_blocks_no_record(small_disk: Path) -> None:
    store = await Store.open(small_disk / "store.db")
    await store.save("u1", "vm1", b"x" * 4000)
    fill(small_disk)
    for g in range(1, 501):
        assert await store.append("u1", "p1", g, "primary", ["arming", "protected"], body=b"y" * 4000)
    assert not await store.add_event(*(event(number) for number in range(1, 2000)))
    await store.close()
    fill(small_disk)
    # A restart in between gives nothing of the reserve away.
    store = await Store.open(small_disk / "store.db")
    for g in range(501, 1001):
        assert await store.append("u1", "p1", g, "primary", ["arming", "protected"], body=b"z" * 4000)
    assert await store.highest_generation("u1") == 1000
    await store.close()


async def test_events_are_bounded_and_paged(store: Store) -> None:
    await store.add_event(*(event(number, "vm1" if number % 2 else "vm2") for number in range(1, 5101)))
    kept = await store.events(limit=10_000)
    assert (len(kept), kept[0].id, kept[-1].id) == (5000, 101, 5100)
    assert [e.id for e in await store.events("vm2", after=5094)] == [5096, 5098, 5100]
    assert [e.id for e in await store.events(limit=2)] == [5099, 5100]


async def test_damaged_events_hurt_nobody(tmp_path: Path) -> None:
    (tmp_path / "store.db.events").write_bytes(os.urandom(8192))
    store = await Store.open(tmp_path / "store.db")
    assert await store.add_event(event(1))
    assert [e.id for e in await store.events()] == [1]
    await store.close()
    assert not await store.add_event(event(2))
    assert await store.events() == []
