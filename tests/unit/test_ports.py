"""Ports: none given twice, none lost."""

from __future__ import annotations

import socket

import pytest

from mcft.agent import ports
from mcft.agent.ports import Ports
from mcft.errors import Refused


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A FAKE CLOCK_BOOTTIME, in s."""
    now = [1000.0]
    monkeypatch.setattr(ports.time, "clock_gettime", lambda _which: now[0])
    monkeypatch.setattr(ports, "_free", lambda _address, port, *, udp: port != 12)
    return now


def test_a_port_that_is_not_listened_on_yet_is_not_given_twice(clock: list[float]) -> None:
    given = Ports(10, 14)
    assert [given.take("127.0.0.1", udp=False) for _ in range(4)] == [10, 11, 13, 14]
    with pytest.raises(Refused, match="no free port in 10-14"):
        given.take("127.0.0.1", udp=False)


def test_a_port_comes_back_when_nobody_holds_it(clock: list[float]) -> None:
    """Every protecting took three and gave one back: after 33 of them a host protected nothing more."""
    held: set[int] = set()
    given = Ports(10, 11, lambda: held)
    held |= {given.take("127.0.0.1", udp=True), given.take("127.0.0.1", udp=True)}
    clock[0] += ports.RESERVED_S + 1
    with pytest.raises(Refused):
        given.take("127.0.0.1", udp=True)
    held.remove(10)
    assert given.take("127.0.0.1", udp=True) == 10


def test_a_bound_port_is_not_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(Refused):
            Ports(port, port).take("127.0.0.1", udp=False)
