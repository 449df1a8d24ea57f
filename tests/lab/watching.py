"""What tests watch the guest with from outside: `observer.py`, `connection.py`, `redis_writer.py`, all on `cl`.

And what must hold of what they saw.
"""

from __future__ import annotations

import json
import select
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from world import LAB, SLOW, guest_answers, now, until

TCP_S = 120.0 / SLOW  # RTO_MAX, after which TCP has sent again whatever was lost (tcp(7), RFC 6298); its clock is the world's


class Client:
    """One of the programs, running on cl (or `where`) until it is closed."""

    def __init__(self, program: str, where: str = "cl") -> None:
        self.program = program
        self._process = subprocess.Popen(
            [LAB, "run", where, "--", "python3", "-SE", f"/opt/mcft/tests/lab/{program}.py"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, word: str, timeout: float = 15.0) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(word + "\n")
        self._process.stdin.flush()
        ready, _, _ = select.select([self._process.stdout], [], [], timeout * SLOW)
        text = self._process.stdout.readline() if ready else ""
        assert text, f"{self.program} on cl gave no answer to '{word}'"
        return json.loads(text)

    def close(self) -> None:
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Observer(Client):
    """The beacon's listener."""

    def __init__(self) -> None:
        super().__init__("observer")

    def report(self) -> dict[str, Any]:
        return dict(self.ask("report"))

    def clean(self) -> dict[str, Any]:
        """The report; fails if the guest ever took back what the world had heard."""
        report = self.report()
        assert report["count"] > 0, "no beacon was heard at all"
        assert not report["violation_count"], f"the guest took back what it had said: {report['violations'][:5]}"
        return report

    def hears(self, timeout: float = 10.0, after_s: float | None = None) -> float:
        """Until a beacon is heard that came after that time (default: now); when it came."""
        since = now() if after_s is None else after_s

        def heard() -> float:
            at_s = float(self.ask("last")["at_s"])
            return at_s if at_s > since else 0.0

        return until(heard, timeout, "the guest's beacon is heard")

    def release_begins(self, timeout: float = 5.0) -> None:
        """Until an epoch's first datagram is heard, as soon as that can be known: no pause between the questions."""
        since = now()
        while float(self.ask("last")["release_s"]) <= since:
            assert now() < since + timeout * SLOW, f"no release within {timeout * SLOW:g} s"

    def gap(self, at_s: float, span_s: float = 10.0) -> float:
        """The longest silence of the beacon that touches [at, at + span], in seconds; 0 if none exceeded 20 ms."""
        report = self.report()
        touching = [end - begin for begin, end in report["gaps"] if end > at_s and begin < at_s + span_s]
        return max(touching, default=0.0)


class Load:
    """All three at once, as a client's view of a guest whose host is about to fail."""

    def __init__(self) -> None:
        self.observer, self.connection, self.writer = Observer(), Client("connection"), Client("redis_writer")

    def flowing(self) -> Load:
        """Until each of them has got an answer."""
        self.observer.hears()
        until(lambda: self.connection.ask("report")["echoed"], 10, "a line is echoed")
        until(lambda: self.writer.ask("report")["acknowledged"], 10, "redis acknowledges a write")
        return self

    def unhurt(self) -> None:
        """As far as it can be said while they go on: nothing taken back, no error, no reset."""
        self.observer.clean()
        assert not self.connection.ask("report")["error"], self.connection.ask("report")
        assert not self.writer.ask("report")["error"], self.writer.ask("report")

    def goes_on(self, timeout: float = 20.0) -> None:
        """Until each gets further than it is now.

        The beacon within the timeout. A connection has TCP's: what was held for ten seconds is to TCP a round trip of ten
        seconds, and the next packet that is lost, as one is in the burst of a release, is sent again half a minute later.
        """
        lines, writes = self.connection.ask("report")["echoed"], self.writer.ask("report")["acknowledged"]
        self.observer.hears(timeout)
        until(
            lambda: self.connection.ask("report")["echoed"] > lines, max(timeout, TCP_S),
            lambda: f"the open connection goes on\n{self.said()}",
        )  # fmt: skip
        until(
            lambda: self.writer.ask("report")["acknowledged"] > writes, max(timeout, TCP_S),
            lambda: f"redis acknowledges further writes\n{self.said()}",
        )  # fmt: skip

    def said(self) -> str:
        """All that the observers know, and whether the guest is reached at all: a stall has several causes."""
        beacon = self.observer.report()
        return (
            f"connection {self.connection.ask('report')}\nredis {self.writer.ask('report')}\n"
            f"beacon: {beacon['count']} heard, {beacon['violation_count']} taken back {beacon['violations'][:3]}\n"
            f"the guest {'answers' if guest_answers() else 'does NOT answer'} on its control port"
        )

    def finished(self) -> dict[str, Any]:
        """End them: every line came back once and in order, every acknowledged write is there."""
        self.connection.ask("finish"), self.writer.ask("finish")
        settled(self.connection)
        settled(self.writer)
        verified(self.writer)
        return self.observer.clean()

    def close(self) -> None:
        for client in (self.observer, self.connection, self.writer):
            client.close()


def settled(client: Client) -> dict[str, Any]:
    """Until nothing that was sent is unanswered; the report, which has no error."""
    report = until(
        lambda: (r := client.ask("report")) and (r["error"] or not r["open"]) and r,
        TCP_S,
        lambda: f"all of {client.program} is answered: {client.ask('report')}",
    )
    assert not report["error"], f"{client.program}: {report}"
    return dict(report)


def verified(writer: Client) -> int:
    """Every acknowledged write is there; how many."""
    answer = until(lambda: (a := writer.ask("verify", 60)) and not a["error"] and a, 30, "redis can be read")
    missing = answer["missing"]
    assert not missing, f"{len(missing)} of {answer['checked']} acknowledged writes are lost: {missing[:10]}…"
    return int(answer["checked"])


@contextmanager
def watching() -> Iterator[Load]:
    """A load that flows, closed at the end."""
    load = Load()
    try:
        yield load.flowing()
    finally:
        load.close()
