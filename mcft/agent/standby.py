"""The standby's side of a protection: build the copy, arm, give up, take over, clean up."""

from __future__ import annotations

import asyncio
import os
import shutil
from typing import Any

from mcft import diskreplica, generations
from mcft.agent import domainxml, hook, model, network
from mcft.agent.process import run
from mcft.agent.site import Life, log
from mcft.agent.steps import Step
from mcft.diskreplica import Disk
from mcft.errors import Failed, McftError, Refused
from mcft.gate.state import GateState, LinkSpec, process_start
from mcft.generations import Kind
from mcft.qmp_passthrough import add_monitor


class Standby(Life):
    """Follows. `request` is what the primary sent; kept only while the copy is built."""

    side = "standby"
    request: model.Prepare
    _taking: asyncio.Task[Any] | None = None
    on_active: Any = None  # called with self once this side is the active one

    # ---- build ----

    def steps(self) -> list[Step[Standby]]:
        """The copy, piece by piece."""
        return [
            Step("write down the intention", Standby._intend, Standby._forget),
            Step("let the copy start, and nothing else", Standby._ban, Standby._unban),
            Step("make room for the disks", Standby._make_files, Standby._remove_files),
            Step("start the copy, waiting", Standby._create, Standby._destroy),
            Step("silence its NICs", Standby._silence),
            Step("add its monitor", Standby._add_monitor, Standby._remove_monitor),
            Step("put replication over its disks", Standby._replicate),
            Step("quick acknowledgements", Standby.set_quickack, Standby.clear_quickack),
            Step("start its gate", Standby._start_gate, Standby._end_gate),
            Step("listen for the stream", Standby._listen),
        ]

    async def prepare(self) -> model.Prepared:
        """Build the copy. Raises what failed, everything undone."""
        await self.site.runner.run(self.steps(), self)
        self.to_state("syncing")
        await self.save()
        return model.Prepared(
            self.site.config.listen_addresses[0], self.body.mig_port, self.body.nbd_port, self.body.links[0].local_port,
            dict(self.site.versions),
        )  # fmt: skip

    async def _intend(self) -> None:
        self.to_state("preparing")
        await self.save()
        await self.record(Kind.PREPARING)

    async def _forget(self) -> None:
        await self.site.store.delete(self.body.uuid)

    async def _ban(self) -> None:
        self.site.markers.ban(self.body.uuid, f"standby of {self.body.peer}")
        self.site.markers.grant(self.body.uuid, self.body.pid, self.body.g, "standby")

    async def _unban(self) -> None:
        self.site.markers.forget(self.body.uuid)

    async def _make_files(self) -> None:
        """An empty file per disk; one that exists is only overwritten with a reason (`protocol.md`, "A receiver…")."""
        for disk in self.request.disks:
            path = self.body.disk_paths.get(disk.target, disk.path)
            if os.path.exists(path):
                self._may_overwrite(disk, path)
            else:
                os.makedirs(os.path.dirname(path), exist_ok=True)
                self.body.created_files.append(path)
            await self.save()
            temporary = f"{path}.mcft-new"
            await run("qemu-img", "create", "-q", "-f", disk.format, temporary, str(disk.size_bytes))
            self._reserve(disk, temporary)
            if os.path.exists(path):
                stat = os.stat(path)
                os.chown(temporary, stat.st_uid, stat.st_gid)
                os.chmod(temporary, stat.st_mode & 0o7777)
            os.replace(temporary, path)

    def _reserve(self, disk: Disk, path: str) -> None:
        free = shutil.disk_usage(os.path.dirname(path)).free
        if free < disk.size_bytes // 20 and free < 64 << 20:
            os.unlink(path)
            raise Refused("no-room", f"no room for disk {disk.target} in {os.path.dirname(path)}", f"{free >> 20} MiB are free")

    def _may_overwrite(self, disk: Disk, path: str) -> None:
        label_path = os.path.join(self.site.config.state_dir, "labels", self.body.uuid, disk.target)
        label = ""
        if os.path.exists(label_path):
            with open(label_path, encoding="utf-8") as file:
                label = file.read()
        ours = label.rstrip().endswith(f" {path}") and label.split()[0].split("(")[0] in ("stale", "syncing", "bad", "following")
        if ours or path in self.request.overwrite:
            return
        raise Refused(
            "file-exists",
            f"{path} exists on {self.site.config.name}, and mcft does not know it as an old copy of disk {disk.target}",
            "protecting would overwrite it",
            f"if it may be lost: --overwrite {path}",
        )

    async def _remove_files(self) -> None:
        diskreplica.remove_overlay_files(self.body.disks, self.body.g)
        for path in self.body.created_files:
            if os.path.exists(path):
                os.unlink(path)
        folder = os.path.join(self.site.config.state_dir, "labels", self.body.uuid)
        if self.body.created_files and os.path.isdir(folder):
            shutil.rmtree(folder)

    async def _create(self) -> None:
        xml = domainxml.standby(self.request.xml, self.body.disk_paths)
        info = await self.site.host.create_paused(xml)
        start = process_start(info.qemu_pid)
        if not info.qemu_pid or start is None:
            raise Failed("standby-qemu", f"the copy of {self.body.domain} started, but its QEMU can't be found")
        self.body.qemu_pid, self.body.qemu_start, self.body.boot_id = info.qemu_pid, start, hook.boot_id()
        if refusal := await self.engine.unsupported(self.qmp):
            raise Refused("engine", f"{self.site.config.name} can't follow {self.body.domain}", refusal)
        await self.save()

    async def _destroy(self) -> None:
        info = await self.site.host.find(self.body.uuid)
        if info is not None and info.running and info.qemu_pid == self.body.qemu_pid:
            self.kill_qemu()
            await self.qemu_gone()

    async def _silence(self) -> None:
        xml = await self.site.host.xml(self.body.uuid)
        self.body.nics = domainxml.nics(xml, False)
        for nic in self.body.nics:
            await network.silence(nic.target)

    async def _add_monitor(self) -> None:
        await add_monitor(self.qmp, self.monitor_path())

    async def _remove_monitor(self) -> None:
        if os.path.exists(self.monitor_path()):
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
        address = self.site.config.listen_addresses[0]
        self.body.nbd_port = self.site.take_port(address, udp=False)
        await diskreplica.prepare_secondary(self.qmp, found, self.body.g, address, self.body.nbd_port)
        self._label()

    async def _start_gate(self) -> None:
        await self.gate.create(self._gate_state())

    def _gate_state(self) -> GateState:
        return GateState(
            self.body.uuid, self.body.domain, self.body.pid, self.body.g, "standby", self.body.key, self.monitor_path(),
            self.body.qemu_pid, self.body.qemu_start, self.body.links, record="preparing", mode="closed", buffer="none",
            nics=self.body.nics, silenced=[n.target for n in self.body.nics], loss_ms=self.site.config.loss_ms,
            delay_ms=self.body.delay_ms, lan_check=list(self.site.config.lan_check),
        )  # fmt: skip

    async def _end_gate(self) -> None:
        await self.gate.end()

    async def _listen(self) -> None:
        address = self.site.config.listen_addresses[0]
        self.body.mig_port = self.site.take_port(address, udp=False)
        await self.engine.listen(self.qmp, address, self.body.mig_port)

    # ---- answers to the primary ----

    async def arm(self) -> model.Answer:
        """armed(g), durable; or why not."""
        if refusal := generations.may_arm(self.ledger):
            return self._stands(refusal)
        if not self.qemu_alive():
            return self._stands("the copy's QEMU is gone")
        status = await self.gate.ask("status", 2.0)
        if status["stream_dead"] or status["disk_error"]:
            return self._stands(status["stream_dead"] or status["disk_error"])
        try:
            await self.record(Kind.ARMED)
        except generations.IllegalRecord as error:
            return self._stands(str(error))
        await self.gate.ask("update", 2.0, record="armed")
        self.to_state("protected")
        await self.save()
        return self._stands()

    def _stands(self, detail: str = "") -> model.Answer:
        newest = self.ledger.newest
        return model.Answer(newest.value if newest else "", self.ledger.g, detail)

    async def give_up(self) -> None:
        """Only ever in answer to the primary, which has closed its gate: given-up(g) on disk, the copy ended."""
        if self.ledger.newest in (Kind.TAKEN, Kind.GIVEN_UP, Kind.LOST, Kind.ENDED):
            return
        if self.gate.connected:
            await self.gate.ask("break", 1.0)
        else:
            # Its gate is away for the moment: the stream is dead for good once the copy's QEMU is.
            self.kill_qemu()
        claiming = self._taking is not None and not self._taking.done()
        if refusal := generations.may_give_up(
            self.ledger, own_qemu_gone=not self.qemu_alive(), stream_dead=True, claim_under_way=claiming
        ):
            log.info("%s: not given up: %s", self.body.domain, refusal)
            return
        try:
            await self.record(Kind.GIVEN_UP)
        except generations.IllegalRecord as error:
            log.info("%s: not given up: %s", self.body.domain, error)
            return
        self.kill_qemu()
        self.to_state("lost", f"gave up: {self.body.peer} goes on without this copy")
        self.site.spawn(self._clean_up(), f"clean up {self.body.domain}")

    async def ended(self, why: str) -> model.Answer:
        """The primary's guest was ended on purpose, or unprotected: no take-over, the copy goes."""
        if self.ledger.newest not in (Kind.TAKEN, Kind.GIVEN_UP, Kind.LOST, Kind.ENDED):
            await self.record(Kind.ENDED, detail=why)
        self.kill_qemu()
        self.to_state("stopped", why)
        await self._clean_up()
        return self._stands()

    async def _clean_up(self) -> None:
        """The copy is void: its QEMU, gate and overlays go, its disk stays, labelled stale."""
        for work in (self._destroy, self._end_gate, self.clear_quickack):
            try:
                await work()
            except McftError as error:
                log.warning("cleaning up %s: %s", self.body.domain, error)
        await self._remove_monitor()
        diskreplica.remove_overlay_files(self.body.disks, self.body.g)
        self.site.markers.revoke(self.body.uuid)
        await self.save()

    async def discard(self) -> None:
        """The protection is undone or over: nothing of it is left here but its generation."""
        if self.ledger.newest is Kind.TAKEN:
            raise Refused("taken", f"{self.site.config.name} has taken {self.body.domain} over")
        await self.site.runner.undo_all(self.steps(), self)

    # ---- take-over ----

    def on_note(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "connected":
            verdict = fields.get("verdict")
            if verdict and verdict["act"] == "claim" and not fields.get("took"):
                self._begin_take(verdict["reason"])
        elif kind == "verdict" and fields["act"] == "claim":
            self._begin_take(fields["reason"])
        elif kind == "not-whole":
            self.site.spawn(self._not_whole(fields["reason"]), f"{self.body.domain} is not whole")
        elif kind == "alarm":
            self.event("alarm", fields["reason"], "alarm")
            if not self.qemu_alive() and self.ledger.newest is Kind.ARMED:
                self.to_state("lost", f"the copy's QEMU is gone; {self.body.peer} goes on without it")
        elif kind == "stalled":
            self.event("stalled", "this host's watcher was itself stalled; the silence it saw does not count", "warning")
        elif kind == "qemu" and fields["event"] == "COLO_EXIT":
            self.event("stream", f"the checkpoint stream ended ({fields['data'].get('reason')})", "warning")

    async def _not_whole(self, reason: str) -> None:
        """A disk error of this copy, however small: sticky and durable, it never takes over."""
        if self.ledger.newest in (Kind.PREPARING, Kind.ARMED):
            await self.record(Kind.NOT_WHOLE, detail=reason)
            await self.gate.insist("update", record="not-whole")
            self.to_state("failed", f"this copy saw a disk error: {reason}")
            await self.save()

    def _begin_take(self, reason: str) -> None:
        if self._taking is None or self._taking.done():
            self._taking = self.site.spawn(self.take(reason), f"take {self.body.domain} over")

    def _begin_take_planned(self) -> None:
        if self._taking is None or self._taking.done():
            self._taking = self.site.spawn(self.take("planned switch", peer_closed=True), f"take {self.body.domain} over")

    async def take(self, reason: str, *, peer_closed: bool = False) -> None:
        """taken(g) → resume → spoken(g+1) → NICs open → persistent. Each record is on disk before its act."""
        if refusal := generations.may_take(self.ledger):
            raise Refused("may-not-take", f"{self.body.domain} can't be taken over here", refusal)
        if self.ledger.newest is Kind.ARMED:
            self.body.overlays_g = self.body.g
            try:
                await self.record(Kind.TAKEN, detail=reason)
            except generations.IllegalRecord as error:
                self.body.overlays_g = 0
                raise Refused("may-not-take", f"{self.body.domain} can't be taken over here", str(error)) from None
        await self.gate.insist("update", record="taken")
        self.to_state("taking-over", reason)
        try:
            await self.gate.insist("take", 20.0, peer_closed=peer_closed)
        except Failed as error:
            if not self.qemu_alive() and not self.ledger.spoken:
                self.body.overlays_g = 0  # never spoken: this chain is nobody's truth
                await self.record(Kind.RESIGNED, self.body.g + 1, str(error))
                self.to_state("lost", "took over, but the copy does not run; given back")
                await self._clean_up()
                return
            raise
        await self.record(Kind.SPOKEN, self.body.g + 1)
        spoken = await self.gate.insist("speak")
        self.event("take-over", f"{self.body.domain} runs here now: {reason} ({_timing(spoken['timing_ms'])})", "alarm")
        for problem in spoken["errors"]:
            self.event("alarm", f"opening the NICs: {problem}", "alarm")
        self.to_state("active", reason)
        await self.save()
        await self._settle()

    async def _settle(self) -> None:
        """After the guest talks again: persistent here, startable here, overlays committed, libvirt's graph as it was."""
        xml = domainxml.moved(self.body.xml, self.body.disk_paths)
        await self.site.host.define(xml)
        if self.body.autostart:
            await self.site.host.set_autostart(self.body.uuid, True)
        self._label()
        await self.save()
        if self.on_active is not None:
            await self.on_active(self)
        await self.commit_online()

    # ---- the agent was restarted ----

    async def adopt(self) -> None:
        """Go on from the records: follow, take over further, or clean up what no longer stands."""
        if self.ledger.newest is None:
            await self.site.runner.undo_all(self.steps(), self)
            return
        if self.ledger.newest is Kind.TAKEN:
            if self.qemu_alive():
                await self.gate.adopt()
                if not self.ledger.spoken:
                    self._begin_take(self.body.reason or "going on after the agent's restart")
                else:
                    await self.gate.ask("speak")
                    await self._settle()
            return
        if not self.qemu_alive():
            # armed(g) is void with its QEMU; what becomes of it is the primary's to ask.
            if self.body.state != "stopped":
                self.to_state("lost", "the copy here is gone (this host or its QEMU was restarted)")
            await self._clean_up()
            return
        if self.ledger.newest in (Kind.PREPARING, Kind.ARMED):
            await self.gate.adopt()


def make_body(request: model.Prepare, config: Any, peer: str) -> model.Body:
    """A standby's body from what the primary asked; links from our addresses to the peer's, in the same order."""
    addresses = config.peers[peer].addresses
    links = [
        LinkSpec(local, 0, remote, port)
        for local, remote, port in zip(config.listen_addresses, addresses, request.primary_ports, strict=False)
    ]
    return model.Body(
        request.uuid, request.domain, request.pid, request.g, "standby", peer, engine="colo", delay_ms=request.delay_ms,
        key=request.key, xml=request.persistent_xml, autostart=request.autostart, disk_paths=dict(request.disk_paths),
        links=links, buffer="none",
    )  # fmt: skip


def _timing(timing_ms: dict[str, float]) -> str:
    return ", ".join(f"{name} +{at:.1f} ms" for name, at in timing_ms.items())
