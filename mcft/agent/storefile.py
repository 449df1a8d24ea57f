"""The file under `store.py`: making it, opening it, and the space it keeps for a full disk.

Three things can ask a disk for space when SQLite commits: the database (at a checkpoint), the WAL, and the
shared-memory file. The database therefore keeps free pages that were really written once, the WAL is kept at
its full size (also over a clean stop, in which SQLite unlinks it), and exclusive locking needs no third file.
On copy-on-write file systems nothing can be reserved this way: `state_dir` belongs on one that overwrites.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from mcft.errors import Failed, McftError, Refused

log = logging.getLogger(__name__)

SCHEMA_VERSION = 1
PAGE_BYTES = 4096
RESERVE_PAGES = 512
# The WAL starts over after this many pages; its file holds twice that, so no single transaction outgrows it.
CHECKPOINT_PAGES = 512
WAL_BYTES = 2 * CHECKPOINT_PAGES * (PAGE_BYTES + 24) + 32
# A reserve that was used up is filled again only with this much space to spare: a top-up that the disk
# cannot take would stay in the WAL and block the checkpoints that the records need.
TOP_UP_MARGIN_BYTES = 16 * RESERVE_PAGES * PAGE_BYTES

_SCHEMA = """
CREATE TABLE protection(uuid TEXT PRIMARY KEY, domain TEXT NOT NULL, body BLOB NOT NULL);
CREATE TABLE record(id INTEGER PRIMARY KEY, uuid TEXT NOT NULL, pid TEXT NOT NULL, g INTEGER NOT NULL,
                    side TEXT NOT NULL, kind TEXT NOT NULL, time TEXT NOT NULL, detail TEXT NOT NULL,
                    UNIQUE(pid, g, side, kind));
CREATE INDEX record_uuid ON record(uuid, id);
CREATE TABLE generation(uuid TEXT PRIMARY KEY, highest INTEGER NOT NULL);
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE ballast(page BLOB);
"""
_DAMAGE = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def is_damage(error: sqlite3.Error) -> bool:
    """True if this error means that the file (or the disk under it) can no longer be trusted."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE


def damaged(path: Path, reason: str) -> Failed:
    """The error for a file that cannot be trusted: mcft never replaces it by an empty one."""
    return Failed(
        "store-damaged",
        f"the records at {path} are damaged",
        reason,
        "restore the file from a backup, or move it away: this host then knows nothing of its protections",
    )


@contextlib.contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """One transaction: committed at the end, rolled back on any exception."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        # SQLite has rolled back by itself after some errors.
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def open_database(path: Path) -> sqlite3.Connection:
    """Open the database of records, or make it at the first start (its directory must exist).

    Raises Failed("store-damaged"), Refused("store-newer"), OSError and sqlite3.Error (busy, full, no access).
    """
    _give_wal_its_blocks(path)
    if not path.exists():
        if path.with_name(path.name + "-wal").exists():
            raise damaged(path, "its write-ahead log is there, but the file itself is not")
        _make(path)
    db = _connect(path)
    try:
        _check(db, path)
        top_up(db, path)
    except sqlite3.Error as error:
        db.close()
        if is_damage(error):
            raise damaged(path, f"SQLite: {error}") from error
        raise
    except McftError:
        db.close()
        raise
    return db


def close_database(db: sqlite3.Connection, path: Path) -> None:
    """Close it, and keep the blocks of its WAL for the next start."""
    spare = path.with_name(path.name + ".spare")
    try:
        spare.unlink(missing_ok=True)
        os.link(path.with_name(path.name + "-wal"), spare)
    except OSError as error:
        log.warning("the space of the write-ahead log of %s is not kept: %s", path, error)
    db.close()


def top_up(db: sqlite3.Connection, path: Path) -> None:
    """Give the database its free pages and the WAL its size again, if the disk has plenty of space."""
    try:
        short = db.execute("PRAGMA freelist_count").fetchone()[0] < RESERVE_PAGES
        disk = os.statvfs(path.parent)
        if short and disk.f_bavail * disk.f_frsize > TOP_UP_MARGIN_BYTES:
            _add_free_pages(db)
        _extend(path.with_name(path.name + "-wal"), WAL_BYTES)
    except (sqlite3.OperationalError, OSError) as error:
        if isinstance(error, sqlite3.Error) and error.sqlite_errorcode != sqlite3.SQLITE_FULL:
            raise
        log.warning("no space could be reserved for the records at %s: %s", path, error)


def _add_free_pages(db: sqlite3.Connection) -> None:
    # The whole reserve, whatever is free already: the ballast takes those pages first.
    # Written, carried into the database, and only then freed: pages that are freed in the transaction that
    # took them are never written, and the file would have holes for blocks.
    with transaction(db):
        db.execute("INSERT INTO ballast VALUES (randomblob(?))", (RESERVE_PAGES * (PAGE_BYTES - 4),))
    db.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()
    with transaction(db):
        db.execute("DELETE FROM ballast")


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=2.0)
    for pragma in (
        "locking_mode=EXCLUSIVE",
        "synchronous=FULL",
        "journal_size_limit=-1",
        f"wal_autocheckpoint={CHECKPOINT_PAGES}",
        "temp_store=MEMORY",
    ):
        db.execute(f"PRAGMA {pragma}").fetchall()
    return db


def _make(path: Path) -> None:
    """A new database gets its name only when it is whole: so a short file is damage and no beginning."""
    fresh = path.with_name(path.name + ".new")
    for leftover in (fresh, fresh.with_name(fresh.name + "-wal")):
        leftover.unlink(missing_ok=True)
    os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    db = _connect(fresh)
    try:
        db.execute(f"PRAGMA page_size={PAGE_BYTES}")
        db.execute("PRAGMA journal_mode=WAL").fetchall()
        db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")
        _add_free_pages(db)
    finally:
        db.close()
    fresh.rename(path)
    _sync_directory(path)
    log.info("made new records at %s", path)


def _check(db: sqlite3.Connection, path: Path) -> None:
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version > SCHEMA_VERSION:
        raise Refused(
            "store-newer",
            f"the records at {path} were written by a newer mcft",
            f"their form is {version}, this one knows {SCHEMA_VERSION}",
            "install that mcft again",
        )
    if version < 1:
        raise damaged(path, "it is no database of mcft's")
    verdict = db.execute("PRAGMA integrity_check(1)").fetchone()[0]
    if verdict != "ok":
        raise damaged(path, verdict)
    if db.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
        raise damaged(path, "it cannot be switched to write-ahead logging")


def _extend(path: Path, size: int) -> None:
    """Grow a file to `size` bytes of written blocks (no holes); what is in it stays."""
    with path.open("ab", buffering=0) as file:
        at = file.tell()
        if at >= size:
            return
        while at < size:
            at += file.write(bytes(min(1 << 20, size - at)))
        os.fsync(file.fileno())


def _give_wal_its_blocks(path: Path) -> None:
    """The other end of `close_database`: make the spare file the (empty) WAL again."""
    spare, wal = path.with_name(path.name + ".spare"), path.with_name(path.name + "-wal")
    if not spare.exists():
        return
    if wal.exists() or not path.exists():
        spare.unlink()
        return
    with spare.open("r+b", buffering=0) as file:
        # Without its header a WAL is empty: what it held was carried into the database at the close.
        file.write(bytes(32))
        os.fsync(file.fileno())
    spare.rename(wal)
    _sync_directory(path)


def _sync_directory(path: Path) -> None:
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
