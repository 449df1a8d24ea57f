"""Durable records: SQLite, WAL, synchronous=FULL, one writer (`protocol.md`, "Records").

The connection lives in a thread of its own; every method is awaited, never blocks the event loop, and returns
only after its commit is on disk. Calls are served in the order in which they were made. A full disk cannot
block a record (`storefile.py`). Events are for people: they have a file and a thread of their own
(`events.py`), and are dropped rather than ever taking space or time from a record.

What an I/O error leaves on the disk is unknown: the store then refuses everything (`broken`) until the agent
has started again and read back what is really there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from mcft import api
from mcft.agent import storefile
from mcft.agent.events import EventFile, utc_now
from mcft.errors import Failed, McftError, Refused

T = TypeVar("T")

_INSERT = "INSERT OR IGNORE INTO record(uuid, pid, g, side, kind, time, detail) VALUES (?,?,?,?,?,?,?)"
_RAISE_GENERATION = (
    "INSERT INTO generation VALUES (?, ?) ON CONFLICT(uuid) DO UPDATE SET highest = max(highest, excluded.highest)"
)


@dataclass(frozen=True)
class StoredProtection:
    """A protection as it was saved; body: JSON whose meaning is `protection.py`'s."""

    uuid: str
    domain: str
    body: bytes


@dataclass(frozen=True)
class Record:
    """One record of the protocol. id rises in the order of writing; time: RFC 3339 UTC, for people only."""

    id: int
    uuid: str
    pid: str
    g: int
    side: str
    kind: str
    time: str
    detail: str


class Store:
    """The agent's records. Make one with `await Store.open(path)`; `await close()` at the end.

    Every method for protections, records and meta raises `Failed("store-write" | "store-damaged")` if it
    cannot do its work. A caller that is cancelled while it waits does not take its write back.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken = ""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        self._events = EventFile(path.with_name(path.name + ".events"))
        self._db: sqlite3.Connection

    @classmethod
    async def open(cls, path: str | os.PathLike[str]) -> Store:
        """Open the store at `path`, or make it at the first start (its directory must exist).

        Raises Failed("store-damaged" | "store-write"), Refused("store-newer" | "store-locked").
        """
        store = cls(Path(path))

        def work() -> None:
            store._db = storefile.open_database(store.path)

        try:
            await store._run(work)
        except BaseException:
            store._thread.shutdown(wait=False)
            raise
        await store._events.open()
        return store

    async def close(self) -> None:
        """Close the files; afterwards another agent may open them. Twice is harmless."""
        if self.broken:
            return
        await self._run(lambda: storefile.close_database(self._db, self.path))
        self.broken = "it is closed"
        self._thread.shutdown(wait=False)
        await self._events.close()

    async def load(self) -> list[StoredProtection]:
        """Every saved protection."""
        rows = await self._query("SELECT uuid, domain, body FROM protection ORDER BY domain, uuid")
        return [StoredProtection(*row) for row in rows]

    async def save(self, uuid: str, domain: str, body: bytes) -> None:
        """Write or replace a protection."""
        await self._write("INSERT OR REPLACE INTO protection VALUES (?, ?, ?)", uuid, domain, body)

    async def update(self, uuid: str, body: bytes) -> bool:
        """Write the newer body of a protection. False, and nothing written, if it is over, or another instance's is saved."""

        def work() -> bool:
            with self._transaction() as db:
                mine = _is_saved(db, uuid, body)
                if mine:
                    db.execute("UPDATE protection SET body = ? WHERE uuid = ?", (body, uuid))
            return mine

        return await self._run(work)

    async def delete(self, uuid: str) -> None:
        """Forget a protection; its generation and its records stay for ever."""
        await self._write("DELETE FROM protection WHERE uuid = ?", uuid)

    async def append(
        self,
        uuid: str,
        pid: str,
        g: int,
        side: str,
        kinds: Sequence[str],
        detail: str = "",
        body: bytes | None = None,
    ) -> bool:
        """Write records, and the new `body` of the protection (saved before), in one transaction. Where another instance's
        is saved by now, that one stays.

        True if at least one was new. False, and nothing written (nor `body`), if all were there already.
        """

        def work() -> bool:
            with self._transaction() as db:
                new = 0
                for kind in kinds:
                    new += db.execute(_INSERT, (uuid, pid, g, side, kind, utc_now(), detail)).rowcount
                if new:
                    db.execute(_RAISE_GENERATION, (uuid, g))
                    if body is not None:
                        _update_body(db, uuid, body)
            return new > 0

        return await self._run(work)

    async def records(self, uuid: str, pid: str | None = None) -> list[Record]:
        """The records of a domain (of one instance, if `pid` is given), oldest first."""
        rows = await self._query(
            "SELECT id, uuid, pid, g, side, kind, time, detail FROM record"
            " WHERE uuid = ?1 AND (?2 IS NULL OR pid = ?2) ORDER BY id",
            uuid,
            pid,
        )
        return [Record(*row) for row in rows]

    async def highest_generation(self, uuid: str) -> int:
        """The highest generation that any record of this domain ever named here; 0 if none did."""
        rows = await self._query("SELECT highest FROM generation WHERE uuid = ?", uuid)
        return int(rows[0][0]) if rows else 0

    async def meta(self, key: str) -> str | None:
        """A durable value of the agent's own (a counter, say); None if it was never set."""
        rows = await self._query("SELECT value FROM meta WHERE key = ?", key)
        return str(rows[0][0]) if rows else None

    async def set_meta(self, key: str, value: str) -> None:
        """Write a durable value of the agent's own."""
        await self._write("INSERT OR REPLACE INTO meta VALUES (?, ?)", key, value)

    async def add_event(self, *events: api.EventBody) -> bool:
        """Keep events (the newest 5,000 of all). False if they had to be dropped; never raises."""
        return await self._events.add(events)

    async def events(self, domain: str | None = None, after: int = 0, limit: int = 1000) -> list[api.EventBody]:
        """The newest `limit` events with an id above `after` (of one domain), oldest first; never raises."""
        return await self._events.read(domain, after, limit)

    async def _write(self, sql: str, *values: str | bytes) -> None:
        def work() -> None:
            with self._transaction() as db:
                db.execute(sql, values)

        await self._run(work)

    async def _query(self, sql: str, *values: str | None) -> list[tuple[Any, ...]]:
        return await self._run(lambda: self._db.execute(sql, values).fetchall())

    async def _run(self, work: Callable[[], T]) -> T:
        if self.broken:
            raise Failed("store-damaged", f"the records at {self.path} cannot be used", self.broken)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except sqlite3.Error as error:
            raise self._said(error) from error
        except OSError as error:
            raise Failed("store-write", f"the records at {self.path} cannot be opened", str(error)) from error

    def _said(self, error: sqlite3.Error) -> McftError:
        reason = f"SQLite: {error}"
        if storefile.is_damage(error):
            self.broken = reason
            return storefile.damaged(self.path, reason)
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return Refused("store-locked", f"another mcft has {self.path} open", reason, "stop that one first")
        return Failed("store-write", f"no record could be written to {self.path}", reason, "make space on that disk")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with storefile.transaction(self._db) as db:
            yield db
        if db.execute("PRAGMA freelist_count").fetchone()[0] < storefile.RESERVE_PAGES // 2:
            storefile.top_up(db, self.path)


class _Whose(msgspec.Struct):
    """Of a body: whose it is."""

    pid: str


def instance_of(body: bytes) -> str:
    """The pid in a body; empty where there is none."""
    try:
        return msgspec.json.decode(body, type=_Whose).pid
    except msgspec.MsgspecError:
        return ""


def _is_saved(db: sqlite3.Connection, uuid: str, body: bytes) -> bool:
    """Whether the row of this domain is of the same instance as this body."""
    row = db.execute("SELECT body FROM protection WHERE uuid = ?", (uuid,)).fetchone()
    return row is not None and instance_of(row[0]) == instance_of(body)


def _update_body(db: sqlite3.Connection, uuid: str, body: bytes) -> None:
    if _is_saved(db, uuid, body):
        db.execute("UPDATE protection SET body = ? WHERE uuid = ?", (body, uuid))
    elif db.execute("SELECT 1 FROM protection WHERE uuid = ?", (uuid,)).fetchone() is None:
        raise Failed("store-write", f"no protection {uuid} is saved, so its records were not written either")
