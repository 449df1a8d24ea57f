"""What libvirtd 7.0 tells of a domain, as `decisions.py` and `ends.py` read it; and that daemon away, silent, and back."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import guests
import pytest
from conftest import Heard, comes

from mcft.agent import domainxml
from mcft.agent.hook import HookProof, Markers
from mcft.config import Config
from mcft.errors import Failed, Refused


async def watched_from_its_start(host: Any, name: str, code: bytes) -> str:
    """A guest that runs this code instead of booting; its uuid."""
    uuid, xml = guests.domain(name, guests.disk_xml(guests.boot_disk(name, code)))
    await host.create_paused(xml)
    await host.watch(uuid)
    await host.resume(uuid)
    return uuid


async def test_a_guest_that_powers_itself_off(host: Any, heard: Heard) -> None:
    """Fails if the guest's own end can't be told from a loss: by QEMU's SHUTDOWN and by libvirt's."""
    uuid = await watched_from_its_start(host, "off", guests.POWERS_OFF)
    await comes("its end", lambda: heard.details(uuid, "stopped"), 60)
    assert heard.details(uuid, "shutdown") == [1] and heard.details(uuid, "stopped") == [0]  # by the guest; shut down
    said = next(message for _, message in heard.watched if message["event"] == "SHUTDOWN")  # then its signal's, by libvirt
    assert said["data"] == {"guest": True, "reason": "guest-shutdown"} and said["timestamp"]["seconds"] > 0
    assert await host.find(uuid) is None


async def test_a_guest_that_resets_itself(host: Any, heard: Heard) -> None:
    """Fails if a reboot is not heard of, or looks like an end."""
    uuid = await watched_from_its_start(host, "resets", guests.RESETS)
    await comes("RESET", lambda: "RESET" in heard.named(uuid), 60)
    assert (await host.info(uuid)).running and "shutdown" not in heard.of(uuid)


async def test_a_destroyed_domain(host: Any, heard: Heard) -> None:
    """Fails if `virsh destroy` looks like a loss, or its word comes later than it is waited for (`relay.WORDS_S`, 3 s)."""
    uuid, xml = guests.domain("old1")
    await host.create(xml)
    await host.watch(uuid)
    await host.destroy(uuid)
    await comes("its end", lambda: heard.details(uuid, "stopped"), 3)
    assert heard.details(uuid, "stopped") == [1]


async def test_watched_and_no_more(host: Any, heard: Heard) -> None:
    """Fails if `watch` brings other events or another domain's, brings one twice, or goes on after `unwatch`."""
    uuid, xml = guests.domain("old1")
    other, other_xml = guests.domain("old2")
    await host.create_paused(xml)
    await host.create_paused(other_xml)
    await host.watch(uuid)
    await host.watch(uuid)
    for command in ("cont", "stop"):
        for whose in (other, uuid):
            await host.qmp(whose, {"execute": command})
    await comes("STOP", lambda: "STOP" in heard.named(uuid))
    assert heard.named(uuid) == ["RESUME", "STOP"] and heard.named(other) == []
    await host.unwatch(uuid)
    await host.unwatch(uuid)
    for command in ("cont", "stop"):
        await host.qmp(uuid, {"execute": command})
    await host.watch(uuid)
    await host.qmp(uuid, {"execute": "cont"})
    await comes("RESUME once more", lambda: len(heard.named(uuid)) > 2)
    assert heard.named(uuid) == ["RESUME", "STOP", "RESUME"]


async def test_a_disk_that_fails(host: Any, heard: Heard) -> None:
    """Fails if BLOCK_IO_ERROR of a domain that nobody watches does not come: its event is registered by a pattern."""
    folder = guests.SHARED / "full"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k,mode=777", "full", folder], check=True)
    try:
        disk = guests.boot_disk("fails", guests.WRITES, folder)
        (folder / "filler").write_bytes(bytes(4096))
        device = guests.disk_xml(disk, " error_policy='stop'").replace("'none'", "'writeback'")
        uuid, xml = guests.domain("fails", device)
        await host.create(xml)
        await comes("the error", lambda: heard.disk, 60)
        whose, message = heard.disk[0]
        assert whose == uuid and message["event"] == "BLOCK_IO_ERROR"
        assert message["data"]["operation"] == "write" and message["data"]["action"] == "stop"
        assert (await host.info(uuid)).paused
        await host.destroy(uuid)
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


async def test_the_daemon_is_restarted(host: Any, heard: Heard) -> None:
    """Fails if a running domain is not found again, or its events end with the connection."""
    uuid, xml = guests.domain("old1")
    await host.create_paused(xml)
    await host.watch(uuid)
    before = await host.info(uuid)
    keeping = asyncio.create_task(host.keep_connected())
    try:
        guests.end_daemon()
        assert not await host.answers()
        with pytest.raises(Failed):
            await host.qmp(uuid, {"execute": "query-status"})
        guests.begin_daemon()
        await comes("the connection", lambda: host._watched[uuid] is not None and host._conn is not None and host._conn.isAlive())
        assert await host.info(uuid) == before
        await host.qmp(uuid, {"execute": "cont"})
        await comes("RESUME", lambda: heard.named(uuid) == ["RESUME"])
        await host.destroy(uuid)
        await comes("its end", lambda: heard.details(uuid, "stopped") == [1])
    finally:
        keeping.cancel()


async def test_a_daemon_that_is_silent(host: Any) -> None:
    """Fails if a stopped daemon is waited for, or is not talked to again once it goes on."""
    uuid, xml = guests.domain("old1")
    await host.create_paused(xml)
    os.kill(guests.daemon_pid(), signal.SIGSTOP)
    try:
        assert not await host.answers(0.5)
        with pytest.raises(Failed) as failed:
            await host.qmp(uuid, {"execute": "query-status"}, timeout_s=0.5)
        assert failed.value.code == "libvirt-timeout"
    finally:
        os.kill(guests.daemon_pid(), signal.SIGCONT)
    assert await host.answers(10.0)
    assert (await host.qmp(uuid, {"execute": "query-status"}))["return"]["status"] == "prelaunch"


async def test_a_deaf_qemu(host: Any) -> None:
    """Fails if a standby of engine `mc`, whose monitor answers nothing between checkpoints, makes the daemon seem away, keeps
    it from saying whether the domain runs, or can't be ended."""
    uuid, xml = guests.domain("old1")
    pid = (await host.create_paused(xml)).qemu_pid
    os.kill(pid, signal.SIGSTOP)
    slowest_s = 0.0
    with pytest.raises(Failed) as failed:
        await host.qmp(uuid, {"execute": "query-status"}, timeout_s=1.0)
    assert failed.value.code == "libvirt-timeout" and await host.answers()
    for _ in range(3):
        for ask in (host.answers, lambda: host.info(uuid), lambda: host.xml(uuid)):
            began_s = time.monotonic()
            assert await ask()
            slowest_s = max(slowest_s, time.monotonic() - began_s)
    # `info` is four calls, each of which an old client library may let lie for a second (`libvirt_bridge.KEEPALIVE_S`).
    assert slowest_s < 4.5, slowest_s
    os.kill(pid, signal.SIGKILL)
    await asyncio.to_thread(guests.until, "QEMU's end", lambda: not Path(f"/proc/{pid}").exists())
    end_s = asyncio.get_running_loop().time() + 20
    while await host.find(uuid) is not None:
        assert asyncio.get_running_loop().time() < end_s, "libvirt keeps it"
        await asyncio.sleep(0.05)


async def test_a_stream_from_one_to_the_other(host: Any, heard: Heard) -> None:
    """Fails if a copy that mcft let wait for a stream (`-incoming defer`) can't be given one and resumed by libvirt: what the
    standby of engine `mc` does at a take-over."""
    uuid, xml = guests.domain("source", guests.disk_xml(guests.boot_disk("source", guests.IDLE)))
    await host.create(xml)
    there, there_xml = guests.domain("there", guests.disk_xml(guests.boot_disk("there", guests.IDLE)))
    await host.create_paused(domainxml.standby(there_xml, {}))
    await host.watch(uuid)
    await host.watch(there)
    await host.call(lambda conn: conn.lookupByUUIDString(there).info())
    uri = "tcp:127.0.0.1:5901"
    assert "return" in await host.qmp(there, {"execute": "migrate-incoming", "arguments": {"uri": uri}})
    assert "return" in await host.qmp(uuid, {"execute": "migrate", "arguments": {"uri": uri}})
    end_s = asyncio.get_running_loop().time() + 30
    while (said := (await host.qmp(uuid, {"execute": "query-migrate"}))["return"].get("status")) != "completed":
        assert said not in ("failed", "cancelled") and asyncio.get_running_loop().time() < end_s, said
        await asyncio.sleep(0.05)
    status = (await host.qmp(there, {"execute": "query-status"}))["return"]["status"]
    assert status == "paused", json.dumps(status)
    await host.resume(there)
    await comes("RESUME", lambda: "RESUME" in heard.named(there))
    info = await host.info(there)
    assert info.running and not info.paused
    await host.destroy(uuid)


async def test_the_hook(host: Any) -> None:
    """Fails if 7.0 does not call mcft's hook from `qemu.d`, or its refusal is not known as one."""
    root, folder = guests.ROOT, guests.ROOT / "etc/libvirt/hooks/qemu.d"
    markers = Markers(Config(name="host1", state_dir=root / "var/lib/mcft"))
    proof = HookProof(host, markers)
    machine = domainxml.machine(guests.domain("any")[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mcft.agent.hook.HOOK_PATHS", (str(folder / "mcft"),))
        with pytest.raises(Refused, match="not installed"):
            await proof.prove("host1", machine)
        folder.mkdir(parents=True, exist_ok=True)
        hook = folder / "mcft"
        hook.write_bytes((Path(__file__).parents[2] / "mcft/hook.sh").read_bytes())
        hook.chmod(0o755)
        guests.end_daemon()
        guests.begin_daemon()
        await proof.prove("host1", machine)
    uuid, xml = guests.domain("banned")
    markers.ban(uuid, "test")
    with pytest.raises(Refused) as refused:
        await host.create_paused(xml)
    assert refused.value.code == "hook-refused"
    await host.define(xml)
    with pytest.raises(Refused) as refused:
        await host.start_domain(uuid)
    assert refused.value.code == "hook-refused" and not (await host.info(uuid)).running
    markers.grant(uuid, "pid", 1, "start")
    await host.start_domain(uuid)
    assert (await host.info(uuid)).running
    hook.unlink()
