"""A monitor by way of the agent: commands go to it as notes, replies and events come back as requests.

That QEMU (engine `mc`) can't add a monitor while it runs, so the agent asks it through libvirt. A gate whose agent is away knows
nothing of its QEMU: it is blind, not in front of a silent monitor, and decides nothing by that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mcft.gate.loop import boottime_ms
from mcft.monitor import Message, Monitor, MonitorGone, Reply

if TYPE_CHECKING:
    from mcft.gate.control import Control

AWAY = "Away"  # error class: not QEMU is silent, libvirt or the agent is


@dataclass
class Relay(Monitor):
    """In place of the added monitor; never has a socket of its own."""

    path: str = ""
    control: Control | None = None
    _asked: dict[int, tuple[float, Reply | None]] = field(default_factory=dict)

    @property
    def connected(self) -> bool:
        return self.control is not None and self.control.connected

    def send(
        self, command: str, arguments: Message | None = None, on_reply: Reply | None = None, *, oob: bool = False
    ) -> None:
        if self.control is None or not self.control.connected:
            raise MonitorGone("the agent is away")
        self._serial += 1
        self._asked[self._serial] = boottime_ms(), on_reply
        self.control.note("command", n=self._serial, execute=command, arguments=arguments or {})

    def answered(self, n: int, reply: Message, now_ms: float) -> None:
        """The agent's word; what was not asked on this connection is ignored."""
        _, on_reply = self._asked.pop(n, (0.0, None))
        if on_reply is not None:
            on_reply(reply)

    def agent_left(self) -> None:
        """Every waiting caller gets an error."""
        asked, self._asked = self._asked, {}
        for _, on_reply in asked.values():
            if on_reply is not None:
                on_reply({"error": {"class": AWAY, "desc": "the agent is away"}})

    def silent_ms(self, now_ms: float) -> float:
        """Since the oldest question that waits for its answer."""
        return now_ms - min((at for at, _ in self._asked.values()), default=now_ms)

    @property
    def unanswered(self) -> int:
        return len(self._asked)

    def close(self) -> None:
        self.agent_left()
