"""The standby's copy: built piece by piece as steps with their undo, from what the primary's agent asked."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from typing import Any

import msgspec

from mcft import diskreplica, streams
from mcft.agent import diskfiles, domainxml, hook, model, network, rdma
from mcft.agent.life import Life
from mcft.agent.overwriting import refuse_overwriting
from mcft.agent.process import run
from mcft.agent.site import log
from mcft.agent.steps import Step
from mcft.api import ArbiterKind
from mcft.diskreplica import Disk
from mcft.engines import mc, tcg
from mcft.errors import Failed, McftError, Refused
from mcft.gate.state import GateState, LinkSpec, process_start
from mcft.generations import Kind
from mcft.libvirt_bridge import DomainInfo
from mcft.qmp_passthrough import add_monitor
from mcft.streams import Endpoint

SELINUX = "security.selinux"
STOCK_ONLY = ("add its monitor", "credentials for the streams", "put replication over its disks")


class Copy(Life):
    """The steps. `request` is what the primary sent; kept only while the copy is built."""

    side = "standby"
    request: model.Prepare
    _creating: asyncio.Future[DomainInfo] | None = None

    def steps(self) -> list[Step[Copy]]:
        """The copy, piece by piece. Engine mc has neither a monitor to add nor TLS nor disks of the host's."""
        steps: list[Step[Copy]] = [
            Step("write down the intention", Copy._intend, Copy._forget),
            Step("let the copy start, and nothing else", Copy._ban, Copy._unban),
            Step("make room for the disks", Copy._make_files, Copy._remove_files),
            Step("start the copy, waiting", Copy._create, Copy._destroy),
            Step("silence its NICs", Copy._silence),
            Step("add its monitor", Copy._add_monitor, Copy._remove_monitor),
            Step("credentials for the streams", Copy._add_credentials),
            Step("put replication over its disks", Copy._replicate),
            Step("quick acknowledgements", Copy.set_quickack, Copy.clear_quickack),
            Step("start its gate", Copy._start_gate, Copy._end_gate),
            Step("listen for the stream", Copy._listen, Copy._remove_socket),
        ]
        return steps if self.body.engine != "mc" else [step for step in steps if step.name not in STOCK_ONLY]

    async def prepare(self) -> model.Prepared:
        """Build the copy. Raises what failed, everything undone."""
        await self.site.runner.run(self.steps(), self)
        self.to_state("syncing")
        await self.save()
        return model.Prepared(
            self.site.config.listen_addresses[0], self.body.mig_port, self.body.nbd_port, self.body.links[0].local_port,
            dict(self.site.versions), self.body.tls, self.body.rdma is not None, self.body.arbiter, self.body.stream_path,
        )  # fmt: skip

    async def _intend(self) -> None:
        self.to_state("preparing")
        await self.save(anew=True)
        await self.record(Kind.PREPARING)

    async def _forget(self) -> None:
        await self.site.store.delete(self.body.uuid)

    async def _ban(self) -> None:
        self.site.markers.ban(self.body.uuid, f"standby of {self.body.peer}")
        self.site.markers.grant(self.body.uuid, self.body.pid, self.body.g, "standby")

    async def _unban(self) -> None:
        self.site.markers.forget(self.body.uuid)

    async def _make_files(self) -> None:
        """An empty file per disk, and the firmware's variables; one that exists is only overwritten with a reason
        (`protocol.md`, "A receiver…")."""
        files, disks = diskfiles.paths(self.request), {disk.target: disk for disk in self.request.disks}
        for target, path in files.items():
            if os.path.exists(path):
                await self.may_overwrite(target, path)
            else:
                self.body.created_files.append(path)
            await self.save()
            if target in disks:
                known = self.request.files.get(target, model.DiskFile())
                await diskfiles.make(path, disks[target], known, self.site.config.reserve)
            elif self.request.nvram is not None:
                await asyncio.to_thread(diskfiles.make_nvram, self.request.nvram, path)
        await self._tell_pools(list(files.values()))

    async def _tell_pools(self, files: list[str]) -> None:
        """libvirt's pools learn of files that came or went in their folders. A protection does not hang on that."""
        for name in diskfiles.pools_of(await self.site.host.pools(), files):
            try:
                await self.site.host.refresh_pool(name)
            except McftError as error:
                log.warning("%s: the storage pool %s was not refreshed: %s", self.body.domain, name, error)

    async def may_overwrite(self, target: str, path: str) -> None:
        """In a thread: who has the file open is read from every process. Raises: Refused."""
        config = self.site.config
        label_file = os.path.join(config.state_dir, "labels", self.body.uuid, target)
        await asyncio.to_thread(refuse_overwriting, label_file, path, target, config.name, self.request.overwrite)

    async def _remove_files(self) -> None:
        diskreplica.remove_overlay_files(self.body.disks, self.body.g)
        for path in self.body.created_files:
            if os.path.exists(path):
                os.unlink(path)
        await self._tell_pools(self.body.created_files)
        folder = os.path.join(self.site.config.state_dir, "labels", self.body.uuid)
        if self.body.created_files and os.path.isdir(folder):
            shutil.rmtree(folder)

    async def _create(self) -> None:
        if self.body.engine == "mc":
            mc.refuse_transport(self.body.mc, self.site.config.name)
        xml = domainxml.standby(self.request.xml, self.body.disk_paths)
        # A cancelled wait does not call libvirt's thread back: its domain would appear after our undo.
        self._creating = asyncio.ensure_future(self.site.host.create_paused(xml))
        info = await asyncio.shield(self._creating)
        start = process_start(info.qemu_pid)
        if not info.qemu_pid or start is None:
            raise Failed("standby-qemu", f"the copy of {self.body.domain} started, but its QEMU can't be found")
        self.body.qemu_pid, self.body.qemu_start, self.body.boot_id = info.qemu_pid, start, hook.boot_id()
        if refusal := await self.engine.unsupported(self.qmp):
            raise Refused("engine", f"{self.site.config.name} can't follow {self.body.domain}", refusal)
        self.body.tcg = self.body.engine != "mc" and await tcg.translates(self.qmp)
        await self.save()

    async def _destroy(self) -> None:
        """Whatever runs under this uuid here is the copy, until it has taken over (and not given that back)."""
        if self.ledger.newest is Kind.TAKEN and not self.ledger.resigned_win:
            return
        while self._creating is not None and not self._creating.done():
            # libvirt kills the process even of a start that is under way, which ends that start.
            try:
                await self.site.host.destroy(self.body.uuid)
            except McftError as error:
                log.info("%s: its start can't be ended: %s", self.body.domain, error)
            await asyncio.wait({self._creating}, timeout=0.5)
        if self._creating is not None:
            await asyncio.gather(self._creating, return_exceptions=True)
        self.kill_qemu()
        info = await self.site.host.find(self.body.uuid)
        if info is not None and info.running:
            await self.qemu_gone(2.0 if self.body.qemu_pid else 0.0)

    async def _silence(self) -> None:
        xml = await self.site.host.xml(self.body.uuid)
        self.body.nics = domainxml.nics(xml, False)
        for nic in self.body.nics:
            await network.silence(nic.target)

    async def _add_monitor(self) -> None:
        await add_monitor(self.qmp, self.monitor_path())

    async def _add_credentials(self) -> None:
        if self.body.tls:
            await streams.add_credentials(self.qmp, self.site.config.qemu_pki_dir, "server")

    def _here(self, port: int) -> Endpoint:
        config = self.site.config
        if self.body.engine == "mc":
            return Endpoint(self.body.stream_path or config.listen_addresses[0], port, transport=self.body.mc.transport)
        return Endpoint(config.listen_addresses[0], port, config.name if self.body.tls else "")

    async def _remove_monitor(self) -> None:
        if os.path.lexists(self.monitor_path()):
            os.unlink(self.monitor_path())

    async def _replicate(self) -> None:
        found = []
        xml_disks = {d.target: d for d in domainxml.disks(await self.site.host.xml(self.body.uuid))}
        for disk in self.request.disks:
            here = xml_disks[disk.target]
            drive = await diskreplica.drive_of(self.qmp, here.alias)
            if drive is None:
                raise Failed("standby-disk", f"disk {disk.target} of the copy has no medium")
            qom, inserted = drive
            found.append(Disk(disk.target, qom, inserted["node-name"], disk.size_bytes, here.path, here.format, disk.direct))
        self.body.disks = found
        self.body.overlays_g = 0
        await self.save()
        owner = os.stat(f"/proc/{self.body.qemu_pid}")
        for disk in found:
            for layer in diskreplica.OVERLAYS:
                path = diskreplica.overlay_path(disk, layer, self.body.g)
                if os.path.exists(path):
                    os.unlink(path)
                await run("qemu-img", "create", "-q", "-f", "qcow2", path, str(disk.size_bytes))
                os.chown(path, owner.st_uid, owner.st_gid)
                _label_like(disk.path, path)
        address = self.site.config.listen_addresses[0]
        self.body.nbd_port = self.site.ports.take(address, udp=False)
        await diskreplica.prepare_secondary(self.qmp, found, self.body.g, self._here(self.body.nbd_port))
        self.label()

    async def _start_gate(self) -> None:
        self.body.rdma = await rdma.choose_here(self.request, self.site.config, self.body.links)
        if self.body.engine == "mc":
            await self.site.host.watch(self.body.uuid)
        await self.gate.create(self._gate_state())

    def _gate_state(self) -> GateState:
        return GateState(
            self.body.uuid, self.body.domain, self.body.pid, self.body.g, "standby", self.body.key,
            "" if self.body.engine == "mc" else self.monitor_path(),
            self.body.qemu_pid, self.body.qemu_start, self.body.links, record="preparing", mode="closed", buffer="none",
            nics=self.body.nics, silenced=[n.target for n in self.body.nics], loss_ms=self.site.config.loss_ms,
            delay_ms=self.body.delay_ms, lan_check=list(self.site.config.lan_check), tcg=self.body.tcg, rdma=self.body.rdma,
            engine=self.body.engine,
            overlays={disk.target: diskreplica.overlay_path(disk, "active", self.body.g) for disk in self.body.disks},
        )  # fmt: skip

    async def _end_gate(self) -> None:
        await self.gate.end()
        if self.body.engine == "mc":
            await self.site.host.unwatch(self.body.uuid)

    async def _listen(self) -> None:
        """Engine mc: the last thing that this QEMU is asked before it takes over."""
        self.body.mig_port = self.site.ports.take(self.site.config.listen_addresses[0], udp=False)
        if self.body.engine == "mc" and self.body.mc.transport == "unix":
            self.body.stream_path = os.path.join(self._stream_folder(), "sock")
            await self._remove_socket()
            os.makedirs(self._stream_folder())
            owner = os.stat(f"/proc/{self.body.qemu_pid}")
            os.chown(self._stream_folder(), owner.st_uid, owner.st_gid)
        await self.engine.listen(self.qmp, self._here(self.body.mig_port))
        if self.body.engine != "mc" or self.body.mc.transport == "tcp":
            await self.gate.ask("update", stream_port=self.body.mig_port)

    def _stream_folder(self) -> str:
        """Transport unix: QEMU's user makes its socket here, and has no right to in `run_dir` itself."""
        return os.path.join(self.site.config.run_dir, "streams", self.body.uuid)

    async def _remove_socket(self) -> None:
        if os.path.isdir(self._stream_folder()):
            shutil.rmtree(self._stream_folder())


def _label_like(disk: str, overlay: str) -> None:
    """SELinux: libvirt labels a domain's disks for its QEMU alone, and does not know the overlay beside them."""
    with contextlib.suppress(OSError):  # no SELinux, or a file system without labels
        os.setxattr(overlay, SELINUX, os.getxattr(disk, SELINUX))


def make_body(request: model.Prepare, config: Any, peer: str) -> model.Body:
    """A standby's body from what the primary asked; links from our addresses to the peer's, in the same order.

    Raises: Refused if the two sides' [tls] streams can't both be kept.
    """
    addresses, asked = config.peers[peer].addresses, request.asked
    links = [
        LinkSpec(local, 0, remote, port)
        for local, remote, port in zip(config.listen_addresses, addresses, request.primary_ports, strict=False)
    ]
    return model.Body(
        request.uuid, request.domain, request.pid, request.g, "standby", peer, engine="mc" if request.engine == "mc" else "colo",
        mc=request.mc, delay_ms=request.delay_ms,
        key=request.key, xml=request.persistent_xml, autostart=request.autostart, disk_paths=dict(request.disk_paths),
        nvram=request.nvram.path if request.nvram else "", links=links, buffer="none",
        tls=streams.settle(request.tls, config.tls, config.qemu_pki_dir, config.name),
        arbiter=msgspec.convert(request.arbiter, ArbiterKind), arbiter_asked=asked.arbiter, engine_asked=asked.engine,
        buffer_asked=asked.netbuffer, experimental=asked.experimental,
        # A device's name is one host's own.
        rdma_asked=asked.rdma_device if asked.rdma_device in ("auto", "off") else "",
        paths_back={d.target: d.path for d in request.disks if request.disk_paths.get(d.target, d.path) != d.path},
    )  # fmt: skip
