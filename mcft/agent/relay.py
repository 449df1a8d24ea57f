"""The agent's part of a relayed monitor (`gate/relay.py`): a gate's commands to QEMU through libvirt, QEMU's events to the gate.

Three silences are told apart: QEMU's own (the gate's question stays open), libvirt's (answered with class `Away`), and that of
a standby which follows: its monitor is dead and a command would block libvirt and run at the take-over, so none is sent.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from mcft.errors import Failed, McftError
from mcft.gate.relay import AWAY
from mcft.generations import Kind

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.life import Life

PATIENCE_S, PROBE_EVERY_S = 1.5, 1.0
WORDS_S, WORDS_EVERY_S = 3.0, 0.1
WORDS_ANSWER_S = 1.5  # longer than an old client library lets a call lie (`libvirt_bridge.KEEPALIVE_S`)
CALL_S = 95.0  # longer than QEMU's own 70 s in a dead stream


def error(kind: str, desc: str) -> dict[str, Any]:
    return {"error": {"class": kind, "desc": desc}}


def closed_for(life: Life) -> str:
    """Empty, or why nothing may be asked of this domain's QEMU now."""
    if life.body.engine == "mc" and life.ledger.side == "standby" and life.ledger.newest is not Kind.TAKEN:
        return "this standby follows: its monitor is dead until its take-over"
    return ""


def carry(life: Life, fields: dict[str, Any]) -> None:
    """One command of the gate's."""
    execute, arguments = fields["execute"], fields.get("arguments") or {}
    life.site.spawn(_carry(life, fields["n"], execute, arguments), f"{execute} for the gate")


async def _carry(life: Life, n: int, execute: str, arguments: dict[str, Any]) -> None:
    reply = await answer(life, execute, arguments)
    life.gate.tell("reply", n=n, reply=reply)


async def answer(life: Life, execute: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """QEMU's reply, or an error in its place. A silent QEMU is waited for as long as libvirt itself answers."""
    if why := closed_for(life):
        return error("Refused", why)
    asked = asyncio.ensure_future(_ask(life, execute, arguments))
    done, _ = await asyncio.wait({asked}, timeout=PATIENCE_S)
    while not done:
        if not await life.site.host.answers():
            asked.cancel()
            return error(AWAY, "libvirt does not answer")
        done, _ = await asyncio.wait({asked}, timeout=PROBE_EVERY_S)
    try:
        return asked.result()
    except Failed as failed:
        if failed.code == "libvirt-timeout":
            return error("Silent", failed.message)
        return error(AWAY, failed.message)
    except McftError as refused:
        return error(AWAY, refused.message)


async def _ask(life: Life, execute: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A standby is resumed by libvirt's own call, so that its locks and its idea of the state go along."""
    if execute == "cont" and life.ledger.side == "standby":
        await life.site.host.resume(life.body.uuid)
        return {"return": {}}
    body: dict[str, Any] = {"execute": execute}
    if arguments:
        body["arguments"] = arguments
    reply: dict[str, Any] = await life.site.host.qmp(life.body.uuid, body, timeout_s=CALL_S)
    return reply


async def last_words(life: Life) -> None:
    """QEMU is dead. Why, comes with libvirt's event (`Core.lifecycle`): a destroyed domain's SHUTDOWN and `destroyed` come only
    when libvirt has buried it. Waited for as long as libvirt answers; one that does not has no more to say.
    """
    deadline_s = time.monotonic() + WORDS_S
    while time.monotonic() < deadline_s:
        if not await life.site.host.answers(WORDS_ANSWER_S):
            life.gate.tell("last-words")
            return
        await asyncio.sleep(WORDS_EVERY_S)
