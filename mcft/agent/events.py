"""What happened, for people: the journal behind `mcft events`.

`EventLog.emit` never blocks and never fails; a task of its own carries events to the disk. Whatever the
disk does, the newest 1,000 are in memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import sqlite3
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from mcft import api
from mcft.agent.storefile import is_damage, transaction

if TYPE_CHECKING:
    from mcft.agent.store import Store

log = logging.getLogger(__name__)
T = TypeVar("T")

KEPT_ON_DISK = 5000
KEPT_IN_MEMORY = 1000

Level = Literal["info", "warning", "alarm"]
_LOG_LEVEL: dict[Level, int] = {"info": logging.INFO, "warning": logging.WARNING, "alarm": logging.ERROR}

_SCHEMA = """
CREATE TABLE IF NOT EXISTS event(id INTEGER PRIMARY KEY, time TEXT NOT NULL, domain TEXT NOT NULL,
                                 kind TEXT NOT NULL, text TEXT NOT NULL, level TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS event_domain ON event(domain, id);
"""


def utc_now() -> str:
    """Now as RFC 3339 UTC with milliseconds: for people, never for a decision."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class EventLog:
    """The agent's journal. Make one with `await EventLog.open(store)`; all methods belong to the loop.

    Ids rise by one from event to event and go on where they were after a restart.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._ring: deque[api.EventBody] = deque(maxlen=KEPT_IN_MEMORY)
        self._last: dict[str, api.EventBody] = {}
        self._next_id = 1
        self._unsaved: deque[api.EventBody] = deque(maxlen=KEPT_ON_DISK)
        self._news = asyncio.Event()
        self._to_save = asyncio.Event()
        self._saver: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, store: Store) -> EventLog:
        """Read what is on the disk and start the task that saves."""
        events = cls(store)
        for event in await store.events(limit=KEPT_ON_DISK):
            events._remember(event)
        events._saver = asyncio.create_task(events._save(), name="events")
        return events

    async def close(self) -> None:
        """Save what is left and stop."""
        if self._saver is not None:
            self._saver.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._saver
        await self._store.add_event(*self._unsaved)
        self._unsaved.clear()

    def emit(self, domain: str, kind: str, text: str, level: Level = "info") -> api.EventBody:
        """Write an event; also to Python's logging (alarm → ERROR). Never blocks, never raises."""
        event = api.EventBody(self._next_id, utc_now(), domain, kind, text, level)
        log.log(_LOG_LEVEL.get(level, logging.ERROR), "%s: %s: %s", domain or "agent", kind, text)
        self._remember(event)
        self._unsaved.append(event)
        self._to_save.set()
        self._news.set()
        # Whoever waits holds this Event; the next to wait gets a new one.
        self._news = asyncio.Event()
        return event

    def last(self, domain: str) -> api.EventBody | None:
        """The newest event of a domain, None if none is known."""
        return self._last.get(domain)

    async def wait(self, after: int = 0, domain: str | None = None, wait_s: float = 0.0) -> list[api.EventBody]:
        """The newest events (at most 1,000) with an id above `after` (of one domain), oldest first.

        With none yet it waits up to `wait_s` seconds for the first; [] when that time is over. An `after`
        from a journal that is lost (an id never given here) counts as "from now on".
        """
        after = min(after, self._next_id - 1)
        deadline = asyncio.get_running_loop().time() + wait_s
        while True:
            news = self._news
            if found := await self._above(after, domain):
                return found
            try:
                async with asyncio.timeout_at(deadline):
                    await news.wait()
            except TimeoutError:
                return []

    async def _above(self, after: int, domain: str | None) -> list[api.EventBody]:
        oldest = self._ring[0].id if self._ring else self._next_id
        found = [e for e in self._ring if e.id > after and (domain is None or e.domain == domain)]
        if after + 1 >= oldest or len(found) >= KEPT_IN_MEMORY:
            return found
        stored = await self._store.events(domain, after, KEPT_IN_MEMORY)
        return ([e for e in stored if e.id < oldest] + found)[-KEPT_IN_MEMORY:]

    def _remember(self, event: api.EventBody) -> None:
        self._ring.append(event)
        self._last[event.domain] = event
        self._next_id = event.id + 1

    async def _save(self) -> None:
        while True:
            await self._to_save.wait()
            self._to_save.clear()
            batch = tuple(self._unsaved)
            await self._store.add_event(*batch)
            # Saved or dropped by the disk: either way it has had its turn.
            while self._unsaved and self._unsaved[0].id <= batch[-1].id:
                self._unsaved.popleft()


class EventFile:
    """The events' own SQLite file and thread, under `Store`. No method raises: nothing depends on events."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="events")
        self._db: sqlite3.Connection | None = None
        self._trouble = ""

    async def open(self) -> None:
        """Open or make the file; a damaged one is set aside. Without a file all events are dropped."""

        def work() -> None:
            self._db = _open(self.path)

        await self._run(work, None)

    async def close(self) -> None:
        """Close the file; what comes later is dropped."""
        if self._db is not None:
            await self._run(self._db.close, None)
            self._db = None
        self._thread.shutdown(wait=False)

    async def add(self, events: Sequence[api.EventBody]) -> bool:
        """Keep the newest 5,000 of all events; False if these were dropped."""
        db = self._db
        if db is None or not events:
            return not events

        def work() -> bool:
            with transaction(db):
                db.executemany(
                    "INSERT OR REPLACE INTO event VALUES (?,?,?,?,?,?)",
                    [(e.id, e.time, e.domain, e.kind, e.text, e.level) for e in events],
                )
                db.execute("DELETE FROM event WHERE id <= (SELECT max(id) FROM event) - ?", (KEPT_ON_DISK,))
            return True

        return await self._run(work, False)

    async def read(self, domain: str | None, after: int, limit: int) -> list[api.EventBody]:
        """The newest `limit` events above `after`, oldest first."""
        db = self._db
        if db is None:
            return []
        sql = (
            "SELECT id, time, domain, kind, text, level FROM event"
            " WHERE id > ?1 AND (?2 IS NULL OR domain = ?2) ORDER BY id DESC LIMIT ?3"
        )

        def work() -> list[api.EventBody]:
            return [api.EventBody(*row) for row in reversed(db.execute(sql, (after, domain, limit)).fetchall())]

        return await self._run(work, [])

    async def _run(self, work: Callable[[], T], otherwise: T) -> T:
        try:
            result = await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except (sqlite3.Error, OSError, RuntimeError) as error:
            if not self._trouble:
                log.warning("events are not kept on disk for now: %s: %s", self.path, error)
            self._trouble = str(error)
            return otherwise
        self._trouble = ""
        return result


def _open(path: Path) -> sqlite3.Connection:
    for attempt in (1, 2):
        # Exclusive locking as in `storefile.py`. NORMAL: a power cut may take the last events, not the file.
        db = sqlite3.connect(path, isolation_level=None, timeout=0.5)
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
                db.execute(f"PRAGMA {pragma}").fetchall()
            db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            db.close()
            if attempt == 2 or not is_damage(error):
                raise
            log.warning("the events at %s are damaged (%s) and set aside", path, error)
            path.replace(path.with_name(path.name + ".damaged"))
        else:
            return db
    raise AssertionError("unreachable")
