"""Every call that agents make of libvirt, on libvirtd 7.0: a domain from its definition to its end, its XML, its QEMU."""

from __future__ import annotations

import asyncio
import os
import socket
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import guests
import pytest
from conftest import Heard, comes

from mcft.agent import domainxml
from mcft.errors import Failed, NotFound
from mcft.monitor import Monitor
from mcft.qmp_passthrough import Qmp, add_monitor, remove_monitor


@pytest.mark.parametrize("uri", ["qemu:///system", f"qemu+unix:///system?socket={guests.SOCKET}", "qemu+tcp://127.0.0.1/system"])
async def test_each_way_to_it(uri: str) -> None:
    """Fails if a URI of docs/engines.md does not reach that daemon, or if this is another daemon."""
    from mcft.libvirt_bridge import LibvirtHost

    host = LibvirtHost(uri)
    await host.start()
    assert await host.answers()
    assert await host.versions() == {"libvirt": "7.0.0", "qemu": "5.2.0"}
    await host.call(lambda conn: conn.close())


async def test_a_persistent_domain(host: Any, heard: Heard) -> None:
    """Fails if 7.0 lacks a call between `define` and `undefine`, or tells another story of the domain by its events."""
    uuid, xml = guests.domain("old1")
    with pytest.raises(NotFound, match="no domain 'old1'"):
        await host.info("old1")
    assert await host.find(uuid) is None
    await host.define(xml)
    info = await host.info("old1")
    assert (info.uuid, info.running, info.persistent, info.autostart, info.qemu_pid) == (uuid, False, True, False, 0)
    await host.set_autostart(uuid, True)
    assert (await host.info(uuid)).autostart
    await host.set_autostart(uuid, False)
    await host.start_domain(uuid)
    await host.start_domain(uuid)  # it runs: fine
    info = await host.info(uuid)
    assert info.running and not info.paused and not info.autostart and uuid in Path(f"/proc/{info.qemu_pid}/cmdline").read_text()
    await host.undefine(uuid)
    info = await host.info(uuid)
    assert info.running and not info.persistent  # goes on, transient
    await host.define(xml)
    assert (await host.info(uuid)).persistent
    await host.destroy(uuid)
    await host.destroy(uuid)  # it has ended: fine
    assert not (await host.info(uuid)).running
    await host.undefine(uuid)
    await comes("the last event", lambda: heard.of(uuid).count("undefined") == 2)
    # (On `destroy` QEMU may say SHUTDOWN of its signal, or die before it can.)
    told = [event for event in heard.of(uuid) if event not in ("resumed", "shutdown")]
    assert told == ["defined", "started", "undefined", "defined", "stopped", "undefined"], heard.of(uuid)
    assert heard.details(uuid, "stopped") == [1]  # destroyed: an intended end (agent/ends.py)
    assert set(heard.details(uuid, "shutdown")) <= {2}, "not by the guest"


async def test_a_transient_domain_paused(host: Any, heard: Heard) -> None:
    """Fails if the standby's copy can't be started as it is: paused, transient, and gone at its end."""
    uuid, xml = guests.domain("copy")
    info = await host.create_paused(xml)
    assert info.running and info.paused and not info.persistent and info.qemu_pid
    assert (await host.qmp(uuid, {"execute": "query-status"}))["return"]["status"] == "prelaunch"
    await host.resume(uuid)
    assert not (await host.info(uuid)).paused
    await host.destroy(uuid)
    assert await host.find(uuid) is None
    with pytest.raises(NotFound):
        await host.qmp(uuid, {"execute": "query-status"})
    await host.create(xml)  # the same uuid once more: its monitor is asked by the handle of the first one
    assert (await host.qmp(uuid, {"execute": "query-status"}))["return"]["status"] == "running"
    os.kill((await host.info(uuid)).qemu_pid, 9)
    await comes("its end", lambda: len(heard.details(uuid, "stopped")) == 2)
    assert heard.details(uuid, "stopped") == [1, 5]  # destroyed; failed: a loss


async def test_its_xml(host: Any, bridge: str) -> None:
    """Fails if what `domainxml` reads or makes is not as 7.0 writes or takes it: disks, NICs, outputs, the copy's XML."""
    disk = guests.boot_disk("xml", guests.IDLE)
    devices = guests.disk_xml(disk) + (
        f"<interface type='bridge'><mac address='52:54:00:00:00:10'/><source bridge='{bridge}'/><model type='virtio'/>"
        "</interface>"
        "<serial type='null'/><channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
    )
    uuid, xml = guests.domain("old1", devices, arguments=("-global", "virtio-net-pci.ctrl_guest_offloads=off"))
    await host.define(xml)
    await host.start_domain(uuid)
    live = await host.xml(uuid)
    [found] = domainxml.disks(live)
    assert (found.target, found.alias, found.path, found.format, found.bus) == ("hda", "ide0-0-0", str(disk), "raw", "ide")
    [nic] = domainxml.nics(live, domainxml.uses_vhost((await host.info(uuid)).qemu_pid))
    assert (nic.target, nic.mac, nic.netdev, nic.model) == ("vnet0", "52:54:00:00:00:10", "hostnet0", "virtio")
    assert Path("/sys/class/net/vnet0").exists()
    assert domainxml.unprotectable(live) == [] and domainxml.outputs(live) == [("guest-agent", "the guest agent")]
    inactive = await host.xml(uuid, inactive=True)
    assert ET.fromstring(inactive).get("id") is None and "vnet0" not in inactive and "qemu:commandline" in inactive
    migratable = await host.xml(uuid, migratable=True)
    await host.destroy(uuid)
    await host.undefine(uuid)
    other = guests.boot_disk("copy", b"")
    info = await host.create_paused(domainxml.standby(migratable, {"hda": str(other)}))
    assert info.uuid == uuid and info.paused
    assert (await host.qmp(uuid, {"execute": "query-status"}))["return"]["status"] == "inmigrate"
    assert domainxml.disks(await host.xml(uuid))[0].path == str(other)
    await host.destroy(uuid)
    await host.define(domainxml.moved(inactive, {"hda": str(other)}))
    assert domainxml.disks(await host.xml(uuid, inactive=True))[0].path == str(other)


async def test_its_qemu(host: Any) -> None:
    """Fails if the passthrough hands on less than QEMU's whole answer, or an error of QEMU becomes one of libvirt's."""
    uuid, xml = guests.domain("old1")
    await host.create_paused(xml)
    said = await host.qmp(uuid, {"execute": "query-status"})
    assert said["return"]["status"] == "prelaunch" and said["id"].startswith("libvirt-"), said
    assert (await host.qmp(uuid, {"execute": "no-such-thing"}))["error"]["class"] == "CommandNotFound"
    long = await host.qmp(uuid, {"execute": "qom-list-types"})
    assert len(long["return"]) > 100


async def test_descriptors_are_refused_in_words(host: Any) -> None:
    """Fails if `getfd` on a daemon older than 8.2 is anything but a plain refusal, or ends the connection or the guest."""
    uuid, xml = guests.domain("old1")
    await host.create_paused(xml)
    reading, writing = os.pipe()
    try:
        with pytest.raises(Failed) as failed:
            await host.qmp(uuid, {"execute": "getfd", "arguments": {"fdname": "mcft"}}, [reading])
    finally:
        os.close(reading)
        os.close(writing)
    assert failed.value.code == "old-libvirt", (failed.value.code, str(failed.value))
    assert "libvirtd is 7.0.0" in str(failed.value), str(failed.value)
    assert (await host.info(uuid)).running and (await host.qmp(uuid, {"execute": "query-status"}))["return"]


async def test_the_added_monitor(host: Any, tmp_path: Path) -> None:
    """Fails if 7.0 does not run engine colo's QEMU, or it gets no monitor through which descriptors go, or keeps it."""
    uuid, xml = guests.domain("old1")
    await host.create_paused(xml.replace(guests.EMULATOR, guests.NEWER).replace(guests.MACHINE, "pc-i440fx-11.1"))
    qmp, path = Qmp(host, uuid), str(tmp_path / "monitor/old1.sock")
    for _ in range(2):
        await add_monitor(qmp, path)
        monitor = Monitor(path)
        await asyncio.to_thread(monitor.connect, 10.0)
        assert monitor.sock is not None
        reading, writing = os.pipe()
        socket.send_fds(monitor.sock, [b'{"execute": "getfd", "arguments": {"fdname": "mcft"}, "id": 1}\n'], [reading])
        os.close(reading)
        os.close(writing)
        said: list[dict[str, Any]] = []
        while not any("id" in message for message in said):
            said += await asyncio.to_thread(monitor.receive)
        assert [message for message in said if message.get("id") == 1] == [{"return": {}, "id": 1}]
        monitor.close()
        await remove_monitor(qmp, path)
        assert not os.path.lexists(path) and not list(Path("/var/lib/libvirt/qemu").glob("*/mcft.sock"))


async def test_firmware_with_variables(host: Any) -> None:
    """Fails if `undefine` loses the variables' file, or `managedsave`'s image keeps a domain from being undefined."""
    nvram = guests.SHARED / "old1_VARS.fd"
    boot = (
        "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader>"
        f"<nvram template='/usr/share/OVMF/OVMF_VARS.fd'>{nvram}</nvram>"
    )
    uuid, xml = guests.domain("old1", boot=boot)
    await host.define(xml)
    await host.start_domain(uuid)
    assert domainxml.nvram(await host.xml(uuid)) == str(nvram) and nvram.stat().st_size > 100_000
    await host.call(lambda conn: conn.lookupByUUIDString(uuid).managedSave(0), 60.0)
    assert await host.call(lambda conn: conn.lookupByUUIDString(uuid).hasManagedSaveImage(0))
    await host.undefine(uuid)
    assert await host.find(uuid) is None and nvram.exists()
