"""What both sides of one protection have in common: body, ledger, gate and QMP; records before acts, one decision at a time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Callable, Coroutine
from typing import Any

from mcft import diskreplica, generations, streams
from mcft.agent import diskfiles, model, network, overlays, relay
from mcft.agent.arbitration import Arbitration
from mcft.agent.events import utc_now
from mcft.agent.gates import GateLink
from mcft.agent.site import Site, log
from mcft.agent.store import Store
from mcft.arbiter.base import Standing
from mcft.engines.base import Engine
from mcft.engines.colo import Colo
from mcft.engines.mc import Mc
from mcft.errors import Failed, Refused
from mcft.faults import die_at
from mcft.gate.state import process_start
from mcft.generations import Kind, Ledger, Side
from mcft.qmp_passthrough import Qmp, remove_monitor

COMMIT_DEADLINE_S = 600.0
AT_REST_WITHIN_S = 10.0  # how long what takes the place of an instance waits for its last decision
UNDO_AGAIN_S = 1.0


class Life:
    """Body, ledger, gate and QMP of one protection on this host; `Primary` and `Standby` live it."""

    side: Side

    def __init__(self, site: Site, body: model.Body, ledger: Ledger) -> None:
        self.site, self.body, self.ledger = site, body, ledger
        self.qmp = Qmp(site.host, body.uuid)
        self.gate = GateLink(str(site.config.run_dir), body.uuid, body.pid, self._note)
        self._colo = Colo()
        self.arbiter = Arbitration(self)
        self.gate_status: dict[str, Any] = {}
        self.peer_known: model.Records | None = None
        self._recording = asyncio.Lock()
        self.deciding: asyncio.Task[Any] | None = None
        self.tidying = asyncio.Lock()  # held while a copy that is void is cleaned up

    @property
    def engine(self) -> Engine:
        """Of the body, which is settled when `protect` has asked QEMU."""
        if self.body.engine == "mc":
            return Mc(self.body.mc, qemu_buffers=self.body.buffer == "qemu")
        return self._colo

    def _note(self, kind: str, fields: dict[str, Any]) -> None:
        if kind == "command":
            relay.carry(self, fields)
        elif kind == "qemu-ended":
            self.site.spawn(self.last_words(), f"last words of {self.body.domain}")
        else:
            self.on_note(kind, fields)

    async def last_words(self) -> None:
        """Its gate asks why QEMU ended."""
        await relay.last_words(self)

    # ---- durable ----

    async def save(self, *, anew: bool = False) -> None:
        """Make the body durable. anew: this instance takes the place of what was saved; else, once it is over or replaced,
        what it still had to say is not kept (an arbiter's late answer would bring it back, over the one that is protected)."""
        if anew:
            await self.site.store.save(self.body.uuid, self.body.domain, model.encode(self.body))
        elif not await self.site.store.update(self.body.uuid, model.encode(self.body)):
            log.info("%s: instance %s is over, its body is not kept", self.body.domain, self.body.pid)

    async def record(self, kind: Kind, g: int | None = None, detail: str = "") -> None:
        """Write a record; when it returns it is on disk and in the ledger. One at a time: each is checked against all
        before it, so that of two that exclude each other only the first is written.

        Raises: IllegalRecord, Failed ("store-write").
        """
        writing = asyncio.ensure_future(self._write_record(kind, g, detail))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # A record half way to the disk can't be called back: memory must not fall behind it.
            await asyncio.gather(writing, return_exceptions=True)
            raise

    async def _write_record(self, kind: Kind, g: int | None, detail: str) -> None:
        async with self._recording:
            record = self.ledger.check(kind, g)
            die_at(f"before record {kind.value}")
            await self.site.store.append(
                self.body.uuid, self.body.pid, record.g, self.ledger.side, [kind.value], detail, model.encode(self.body)
            )
            die_at(f"after record {kind.value}")
            self.ledger.append(kind, g)
            self.recompute_labels()

    def recompute_labels(self) -> None:
        """From the records, never the reverse; also at the agent's start. A full disk must not stop a decision."""
        try:
            self.label()
        except OSError as error:
            log.error("%s: the disks' labels could not be written: %s", self.body.domain, error)

    def label(self) -> None:
        """The disks' labels, recomputed from the records: small files, readable without the agent."""
        primary = self.ledger if self.ledger.side == "primary" else None
        standby = self.ledger if self.ledger.side == "standby" else None
        text = generations.disk_labels(primary, standby, committed=not self.body.overlays_g)
        folder = os.path.join(self.site.config.state_dir, "labels", self.body.uuid)
        os.makedirs(folder, exist_ok=True)
        files = {disk.target: disk.path for disk in self.body.disks}
        files |= {diskfiles.NVRAM: self.body.nvram} if self.body.nvram else {}
        for target, path in files.items():
            fresh = os.path.join(folder, f"{target}.new")
            with open(fresh, "w", encoding="utf-8") as file:
                file.write(f"{text} {self.body.pid} {path}\n")
            os.replace(fresh, os.path.join(folder, target))

    def forget_labels(self) -> None:
        """Not mcft's disks any more: without a label no later protection overwrites them."""
        shutil.rmtree(os.path.join(self.site.config.state_dir, "labels", self.body.uuid), ignore_errors=True)

    def to_state(self, state: Any, reason: str = "") -> None:
        """The state people see; every change is an event."""
        if (self.body.state, self.body.reason) != (state, reason):
            self.body.state, self.body.reason, self.body.since = state, reason, utc_now()
            level = "alarm" if state in ("muted", "failed") else "info"
            self.event("state", f"{state}{': ' + reason if reason else ''}", level)

    def event(self, kind: str, text: str, level: Any = "info") -> None:
        """One line of the journal."""
        self.site.events.emit(self.body.domain, kind, text, level)

    # ---- decisions ----

    def carry_through(self, work: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """One decision at a time, and each ends only when it is done: whatever fails in between is told and gone on
        with from the records (`go_on`). While one is under way, another call is that one."""
        if self.deciding is not None and not self.deciding.done():
            return

        async def until_done() -> None:
            step = work
            while True:
                try:
                    await step()
                    return
                except Exception as error:
                    log.exception("%s failed", name)
                    self.event("alarm", f"{name}: {error}; going on from the records", "alarm")
                    await asyncio.sleep(1.0)
                    step = self.go_on

        self.deciding = self.site.spawn(until_done(), name)

    def repeat_undo(self, undo: Callable[[], Coroutine[Any, Any, None]], name: str) -> None:
        """What of an undo failed (libvirtd was away, say) is undone again, each second, until nothing remains. Until then this
        instance is not at rest."""

        async def until_done() -> None:
            while True:
                await asyncio.sleep(UNDO_AGAIN_S)
                try:
                    await undo()
                    return
                except Exception as error:
                    log.warning("%s: undoing again failed: %s", self.body.domain, error)

        self.deciding = self.site.spawn(until_done(), name)

    async def at_rest(self, within_s: float) -> bool:
        """Whether nothing of this instance is at work any more, waited for at most within_s.

        Before that no other may take its place: gate, QEMU, start marker and stored body are found by the domain alone.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                if self.deciding is not None:
                    await asyncio.wait({self.deciding})
                async with self.tidying:
                    return True
        return False

    def not_settled(self) -> Refused:
        """What is raised where something else was to take this instance's place, and it is not at rest."""
        return Refused(
            "not-settled", f"what came before is not over yet for {self.body.domain}: it is {self.body.state}",
            self.body.reason, f"mcft events {self.body.domain}; then try again",
        )  # fmt: skip

    async def stop_deciding(self) -> None:
        """An operator's override takes the place of what was being decided."""
        if self.deciding is not None:
            self.deciding.cancel()
            await asyncio.gather(self.deciding, return_exceptions=True)

    async def go_on(self) -> None:
        """The next step by the newest record alone."""
        raise AssertionError("lived by Primary and Standby")

    # ---- QEMU and gate ----

    def monitor_path(self) -> str:
        return os.path.join(self.site.config.run_dir, "monitor", f"{self.body.uuid}.sock")

    def gate_monitor(self) -> str:
        """What the gate is told: the added monitor; with engine mc the domain's second one, or empty (by way of the agent)."""
        return self.body.second_monitor if self.body.engine == "mc" else self.monitor_path()

    def qemu_alive(self) -> bool:
        """Whether the QEMU of this instance, by pid and start time, still runs."""
        return bool(self.body.qemu_pid) and process_start(self.body.qemu_pid) == self.body.qemu_start

    def kill_qemu(self) -> None:
        """End it at once, by pid and start time; libvirt notices by itself."""
        if self.qemu_alive():
            os.kill(self.body.qemu_pid, 9)

    async def qemu_gone(self, timeout_s: float = 15.0) -> None:
        """Wait until libvirt too has seen that the domain does not run."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            info = await self.site.host.find(self.body.uuid)
            if info is None or not info.running:
                return
            await asyncio.sleep(0.05)
        await self.site.host.destroy(self.body.uuid)

    async def set_quickack(self) -> None:
        """`quickack` on the route to the peer; whoever set it first remembers that it was not there before."""
        address = self.body.links[0].peer
        users = self.site.route_users.setdefault(address, set())
        if await network.set_quickack(address, True):
            self.site.routes_changed.add(address)
        self.body.route_changed = address in self.site.routes_changed
        await self.save()
        users.add(self.body.uuid)

    async def clear_quickack(self) -> None:
        """The route as it was, once no other protection uses it."""
        if not self.body.links:
            return
        address = self.body.links[0].peer
        users = self.site.route_users.setdefault(address, set())
        users.discard(self.body.uuid)
        if users:
            return
        if self.body.route_changed or address in self.site.routes_changed:
            await network.set_quickack(address, False)
            self.site.routes_changed.discard(address)
        self.body.route_changed = False

    def on_note(self, kind: str, fields: dict[str, Any]) -> None:
        """A note of the gate; runs on the loop."""
        raise AssertionError("lived by Primary and Standby")

    async def look(self) -> None:
        """This side owns the newest generation and no stream: does its guest run? Started again it waits for protection."""
        info = await self.site.host.find(self.body.uuid)
        if info is not None and info.running:
            self.body.qemu_pid, self.body.qemu_start = info.qemu_pid, process_start(info.qemu_pid) or 0
            if self.body.state == "stopped":
                self.body.next_try_boottime_ms = 0.0
                self.to_state("unprotected", "started again")
        else:
            self.body.qemu_pid = self.body.qemu_start = 0
            self.body.dismantling = False  # it went with its QEMU
            if self.body.state != "stopped":
                self.to_state("stopped", "the guest was ended")
            if self.body.overlays_g:
                await self.commit_offline()
        await self.save()

    async def commit_online(self) -> None:
        """Wait until QEMU has committed the overlays, then take away all that mcft put in."""
        if not self.qemu_alive():
            await self.look()
            return
        if self.body.engine == "mc":
            await self._leave_mc()
            return
        try:
            await overlays.await_committed(self.qmp, self.body.disks, COMMIT_DEADLINE_S)
        except Failed as error:
            if error.code != "not-committed":
                raise  # libvirtd is away, say: tried again by whoever carries this through
            self.event("alarm", str(error), "alarm")
            return
        await diskreplica.drop_overlays(self.qmp, self.body.disks, self.body.g)
        await self.gate.end()
        await remove_monitor(self.qmp, self.monitor_path())
        await self.clear_quickack()
        await self.engine.reset(self.qmp)
        await streams.drop_credentials(self.qmp)
        # Only now: before, a guest that is started on the disk alone would see an older one, and protecting again by
        # itself would meet this cleaning.
        await self._without_overlays()
        self.event("take-over", "the overlays are committed; nothing of the take-over is left in the domain")

    async def _without_overlays(self) -> None:
        """From now on the disk alone is the truth, and may be started."""
        self.body.overlays_g = 0
        self.label()
        self.site.markers.free(self.body.uuid)
        await self.save()

    async def _leave_mc(self) -> None:
        """After a take-over: nothing of mcft's is in that QEMU but its capabilities, which are off already."""
        await self.gate.end()
        await self.clear_quickack()
        await self.site.host.unwatch(self.body.uuid)
        await self._without_overlays()

    async def commit_offline(self) -> None:
        """The guest ended before QEMU had committed its overlays: the disk alone is wrong. Asked twice, it is done once."""
        async with self.site.committing.setdefault(self.body.uuid, asyncio.Lock()):
            if self.body.overlays_g:
                await self._commit_offline()

    async def _commit_offline(self) -> None:
        await overlays.commit_files(self.body.disks, self.body.overlays_g)
        await self._without_overlays()
        self.event("disk", "the overlays of the take-over were committed offline; the disk alone is the truth now")

    async def peer_silent(self) -> bool:
        """Whether its gate hears nothing of the other side on any link for T. False where nobody knows."""
        try:
            links = (await self.gate.ask("status", 1.0))["links"]
        except Failed:
            return False
        return all(link["age_ms"] is None or link["age_ms"] > self.site.config.loss_ms for link in links)

    def tell_arbiter(self) -> None:
        """An operator's override is recorded as a claim: the arbiter hears of it as soon as it answers."""
        if self.body.arbiter == "etcd" and (self.arbiter.pending or not self.arbiter.may_claim()):
            self.site.spawn(self._tell_arbiter(), f"tell the arbiter of {self.body.domain}")

    async def _tell_arbiter(self) -> None:
        standing = await self.arbiter.claim()
        self.arbiter.forget_resolved()
        await self.save()
        if standing is Standing.LOST:
            why = "by your word it goes on here, and by the arbiter's there: two histories. Nothing is synchronised by itself"
            self.event("alarm", f"{self.body.domain}: the arbiter had decided for {self.body.peer}: {why}", "alarm")

    async def refresh(self) -> None:
        """Ask the gate how it is; what it does not answer stays empty."""
        self.gate_status = await self.gate.ask("status", 1.0) if self.gate.connected else {}

    def known(self, *, host_running: bool) -> model.Records:
        """This side's records of this instance, for the peer."""
        return model.Records(
            self.site.config.name, self.body.uuid, 0, self.body.pid, self.body.g, self.ledger.side, self.body.state,
            [(self.ledger.side, r.g, r.kind.value) for r in self.ledger.records], host_running, qemu_alive=self.qemu_alive(),
            copy_lost=self.body.copy_lost,
        )  # fmt: skip

    async def tell_gate_of(self, event: dict[str, Any]) -> None:
        """A QMP event that its gate may have missed; a gate that does not come back within 30 s is systemd's trouble."""
        async with asyncio.timeout(30):
            await self.gate.insist("event", event=event)

    async def close(self) -> None:
        """The agent stops; gates go on."""
        await self.gate.let_go()


async def stored_ledger(store: Store, body: model.Body) -> Ledger:
    """What this host has written down of that instance. A standby that took over keeps its side's ledger."""
    rows = await store.records(body.uuid, body.pid)
    side: Side = "standby" if any(row.side == "standby" for row in rows) else "primary"
    if not rows:
        side = body.role
    return Ledger.load(body.pid, side, body.g, [(row.g, row.kind) for row in rows if row.side == side])
