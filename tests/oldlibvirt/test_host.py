"""What agents ask libvirtd 7.0 about its host: storage pools, what it can run, networks (`agent/checkpeer.py`)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import guests
import pytest

from mcft.agent import checkpeer
from mcft.errors import Failed, Refused


def scene(host: Any, xml: str) -> Any:
    """As `checkpeer.look` has it for a domain that would come here."""
    site = SimpleNamespace(host=host, config=SimpleNamespace(name="host1", libvirt_uri=host.uri))
    return checkpeer.Scene(SimpleNamespace(site=site), "host2", SimpleNamespace(xml=xml, engine="mc"))  # type: ignore[arg-type]


async def test_pools(host: Any) -> None:
    """Fails if 7.0's pools are not listed, a mounted one not told from a folder, or a new file in one not seen."""
    folder = guests.SHARED / "pool"
    folder.mkdir()
    pools = {
        "folder": f"<pool type='dir'><name>folder</name><target><path>{folder}</path></target></pool>",
        "mounted": "<pool type='netfs'><name>mounted</name><source><host name='127.0.0.1'/><dir path='/x'/></source>"
        "<target><path>/mnt</path></target></pool>",
    }
    assert await host.pools() == []
    for xml in pools.values():
        await host.call(lambda conn, xml=xml: conn.storagePoolDefineXML(xml, 0))
    found = {pool.name: (pool.target, pool.active, pool.mounted) for pool in await host.pools()}
    assert found == {"folder": (str(folder), False, False), "mounted": ("/mnt", False, True)}
    await host.call(lambda conn: conn.storagePoolLookupByName("folder").create(0))
    assert [pool.name for pool in await host.pools() if pool.active] == ["folder"]
    (folder / "new.img").write_bytes(bytes(4096))
    await host.refresh_pool("folder")
    assert await host.call(lambda conn: conn.storagePoolLookupByName("folder").listVolumes()) == ["new.img"]
    with pytest.raises(Failed):
        await host.refresh_pool("mounted")


async def test_what_it_can_run(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the domain capabilities of 7.0 are read wrongly: a machine type or CPU that is there is missed, or the reverse."""
    _, xml = guests.domain("old1")
    monkeypatch.setattr(checkpeer.os.path, "exists", lambda path: (guests.ROOT / path[1:]).is_file())  # QEMU is the daemon's
    here = scene(host, xml)
    assert (await checkpeer.way_to_libvirt(here)).level == "ok" and (await checkpeer.machine(here)).level == "ok"
    assert (await checkpeer.cpu(here)).level == "ok"
    with pytest.raises(Refused, match=r"can't run a machine pc-q35-11\.1"):
        await checkpeer.machine(scene(host, xml.replace(guests.MACHINE, "pc-q35-11.1")))
    for model, why in (("qemu64", ""), ("nosuch", "its QEMU does not know that model")):
        asked = xml.replace("</features>", f"</features><cpu mode='custom' match='exact'><model>{model}</model></cpu>")
        there = scene(host, asked)
        await checkpeer.machine(there)
        assert checkpeer.lacks_cpu(there.root.find("./cpu"), there.capabilities) == why
        there.kvm = True  # so that libvirt itself compares
        if why:
            with pytest.raises(Refused, match="CPU"):
                await checkpeer.cpu(there)
        else:
            assert (await checkpeer.cpu(there)).level == "ok"


async def test_networks(host: Any, bridge: str) -> None:
    """Fails if a network that is defined and off, or none at all, is taken for one that a NIC can be on."""
    network = f"<network><name>lan</name><forward mode='bridge'/><bridge name='{bridge}'/></network>"
    await host.call(lambda conn: conn.networkDefineXML(network))
    _, xml = guests.domain("old1", "<interface type='network'><source network='lan'/></interface>")
    with pytest.raises(Refused, match="lan"):
        await checkpeer.networks(scene(host, xml))
    await host.call(lambda conn: conn.networkLookupByName("lan").create())
    assert (await checkpeer.networks(scene(host, xml))).level == "ok"
    with pytest.raises(Refused, match="missing"):
        await checkpeer.networks(scene(host, xml.replace("'lan'", "'missing'")))
