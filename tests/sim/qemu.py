"""Stands in for QEMU 11.1 with COLO, block replication, NBD, mirror jobs and redirector filters, as `facts.md` measured it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from tests.sim.disk import Image, Moment, Overlay
from tests.sim.world import Host, Proc, Violation, World

Reply = Callable[[dict[str, Any]], None]
STORAGE = "libvirt-1-storage"
QDEV = "/machine/peripheral/virtio-disk0/virtio-backend"
TICK_MS = 9.0


class Connection:
    """One TCP connection between two QEMUs: in order, whole messages; a cut cable keeps them waiting and tells nobody."""

    def __init__(self, world: World, number: int, ends: tuple[Qemu, Qemu]) -> None:
        self.world, self.number, self.ends = world, number, ends
        self.open = True
        self._queues: list[deque[Callable[[], None]]] = [deque(), deque()]
        self._last = [0.0, 0.0]
        self._ended: list[Callable[[], None] | None] = [None, None]
        self._fin: list[Callable[[], None] | None] = [None, None]  # the end, on its way to that side
        self._closed = [False, False]  # that side has closed it, or heard that the other has

    def _cut(self) -> bool:
        up = self.world.links[self.number].up
        return not (up[0] and up[1])

    @property
    def stuck(self) -> bool:
        return self.open and self._cut()

    def on_end(self, end: Qemu, call: Callable[[], None]) -> None:
        said = False

        def once() -> None:
            nonlocal said
            if not said:
                said = True
                call()

        self._ended[self.ends.index(end)] = once

    def send(self, sender: Qemu, call: Callable[[], None], delay_ms: float = 0.0) -> None:
        """call runs at the other end, unless that has ended by then."""
        side = self.ends.index(sender)
        at = max(self.world.now + delay_ms + 0.1 + self.world.rng.random() * 0.3, self._last[side])
        self._last[side] = at
        self._queues[side].append(call)
        self.world.at(at - self.world.now, self.ends[1 - side].host.machine.kernel, self._pump, side)

    def _pump(self, side: int) -> None:
        queue = self._queues[side]
        if not queue:
            return
        if self._cut():
            self.world.at(20.0, self.ends[1 - side].host.machine.kernel, self._pump, side)
            return
        receiver = self.ends[1 - side]
        call = queue.popleft()
        if call is self._fin[1 - side]:
            self._closed[1 - side] = True  # its kernel knows it, whatever its process does
        if receiver.proc.alive and not receiver.proc.halted:
            call()
        elif receiver.proc.alive:
            receiver.proc.deferred.append((call, ()))

    def close(self, by: Qemu, *, lost: bool = False) -> None:
        """`by` ends it. What it sent before still arrives, then the end; `lost`: a host without power says nothing."""
        if not self.open:
            return
        self.open = False
        side = self.ends.index(by)
        told = self._ended[1 - side]
        self._closed[side] = True
        if lost:
            self._queues[side].clear()
            if told is not None:
                self._resets_once_back(by, self.ends[1 - side], told)
            return
        if told is not None:
            self._fin[1 - side] = told
            self.send(by, told)

    def established(self, end: Qemu) -> bool:
        """As the kernel of that end knows it."""
        return not self._closed[self.ends.index(end)]

    def _resets_once_back(self, lost: Qemu, other: Qemu, told: Callable[[], None]) -> None:
        """A host that boots knows nothing of the connection, and says so to whoever still sends on it."""

        def look() -> None:
            if lost.host.up and not self._cut():
                self._closed[self.ends.index(other)] = True  # (by the RST, before its process hears of it)
                told()
            else:
                self.world.at(200.0, other.proc, look)

        self.world.at(200.0, other.proc, look)

    def reset(self, by: Qemu) -> None:
        """A yank: our end knows at once, also where the other host has lost its power; the other end when it hears of it."""
        side = self.ends.index(by)
        told = self._ended[side]
        self.close(by)
        self._closed[side] = True
        if told is not None:
            told()


class Filter:
    """A pair of redirector filters: `out` takes the guest's packets to the gate, `inn` brings the gate's to the tap."""

    def __init__(self) -> None:
        self.out: Any = None
        self.inn: Any = None


class Qemu:
    """One QEMU process of a domain."""

    def __init__(self, host: Host, uuid: str, name: str, *, incoming: bool, state: Moment, path: str) -> None:
        self.host, self.world, self.uuid, self.path = host, host.world, uuid, path
        self.proc = Proc(host, "qemu")
        self.proc.on_death.append(self._died)
        self.tap = f"vnet{host.number}"
        self.incoming = incoming
        self.ram = state
        self.unsent = False  # the newest write is done, its packet not sent yet
        self.runstate = "inmigrate" if incoming else "paused"
        self.pending: Moment | None = None  # a write that waits for the standby's answer
        self.drained: list[Callable[[], None]] = []
        self.migration = "none"
        self.delay_ms = 20000.0
        self.colo = ""  # "", primary, secondary
        self.colo_failed = False  # its thread waits for x-colo-lost-heartbeat
        self.busy = False  # in a checkpoint
        self.loading = False
        self.half = False
        self.stream: Connection | None = None
        self.nbd: Connection | None = None
        self.copy: Qemu | None = None  # of a primary: whose memory follows ours
        self.exporting = False
        self.listening = 0
        self.nbd_port = 0
        self._end_waits = False
        self.failover = False
        self.nodes: dict[str, dict[str, str]] = {STORAGE: {}}
        self.overlays: tuple[str, str] | None = None
        self.drive = STORAGE
        self.jobs: dict[str, dict[str, Any]] = {}
        self.objects: set[str] = set()
        self.chardevs: dict[str, Any] = {}
        self.fds: dict[str, Any] = {}
        self.filters: dict[str, tuple[str, str]] = {}  # filter → (chardev, kind)
        self.monitor: Any = None  # its client
        self.monitor_path = ""
        self._monitor_at = 0.0
        self._epoch = 0  # of the checkpoint timer
        self._waiting_commands: list[Callable[[], None]] = []
        self._bad_reported = False
        self.world.at(TICK_MS, self.proc, self._tick)

    # ---- life ----

    def _died(self) -> None:
        self.world.note(self.host.name, "QEMU is gone")
        lost = not self.host.up
        for connection in (self.stream, self.nbd):
            if connection is not None:
                connection.close(self, lost=lost)
        if self.monitor is not None:
            self.monitor.lost()
        for chardev in self.chardevs.values():
            if hasattr(chardev, "qemu_gone"):
                chardev.qemu_gone()
        self.host.machine.qemu_ended(self)

    def image(self) -> Image:
        found = self.host.files.held.get(self.path)
        assert isinstance(found, Image), self.path
        return found

    def start_running(self) -> None:
        if self.runstate == "running":
            return
        self.runstate = "running"
        if self.incoming:
            # A copy that runs is a history of its own from here on.
            if self.loading:
                raise Violation("torn memory", f"{self.host.name}: the copy runs while a checkpoint is loaded under it")
            if self.half:
                raise Violation("one instant", f"{self.host.name}: a half loaded checkpoint runs")
            if not self._own_branch:
                self._own_branch = True
                view = self._view()
                # (A write that failed here was told to the primary, perhaps later than this load: what counts is who takes over.)
                if view != self.ram and not (self.colo == "secondary" and self.image().missed is not None):
                    raise Violation("one instant", f"{self.host.name}: RAM {self.ram}, disk {view}")
                self.ram = Moment(self.world.history.fork(self.ram), self.ram.n)
            if self.colo != "secondary" and not self._leads:
                self._leads = True
                self.world.oracle.takes_over(self, self.image())
        self.event("RESUME")
        if self.unsent:
            self.unsent = False
            self._packet(self.ram)

    _own_branch = False  # since the last load
    _leads = False
    stops = 0  # commands, whoever's

    def _stop_running(self) -> None:
        if self.runstate == "running":
            self.event("STOP")
        self.runstate = "paused"

    # ---- the guest ----

    def _tick(self) -> None:
        self.world.at(TICK_MS * (0.7 + 0.6 * self.world.rng.random()), self.proc, self._tick)
        if self.runstate != "running" or self.pending is not None:
            return
        moment = Moment(self.ram.branch, self.ram.n + 1)
        replicates = self._replicates()
        if self.host.machine.disk_fails:
            if not replicates:
                return  # its own disk alone: the guest waits, as its error policy says
            self.image().failed(moment)
            self.event("QUORUM_REPORT_BAD", {"node-name": STORAGE, "error": "Input/output error", "type": "write"})
        else:
            self._write(moment)
        self.ram = moment
        if not replicates:
            self._mirror()
            self._packet(moment)
            return
        self.pending = moment
        nbd = self.nbd
        assert nbd is not None
        if nbd.open:
            nbd.send(self, lambda: nbd.ends[1].take(self, nbd, moment))
        else:
            self._remote_failed()

    def _replicates(self) -> bool:
        return self.colo == "primary" and "mcft-r-vda" in self.nodes and self.nbd is not None

    def copy_of_disk(self) -> Qemu:
        assert self.nbd is not None
        return self.nbd.ends[1]

    def take(self, primary: Qemu, nbd: Connection, moment: Moment) -> None:
        """The standby's NBD export writes its disk; what was there since the checkpoint goes to `hidden` first."""
        if not self.exporting:
            nbd.send(self, lambda: primary.answered(moment, "export is gone"))
            return
        if self.host.machine.disk_fails:
            self.image().failed(moment)
            nbd.send(self, lambda: primary.answered(moment, "Input/output error"))
            return
        image = self.image()
        hidden = self._overlay(1)
        if hidden is not None and hidden.content is None:
            hidden.content, hidden.flushed = image.content, False
        image.write(moment)
        nbd.send(self, lambda: primary.answered(moment, ""))

    def answered(self, moment: Moment, error: str) -> None:
        if self.pending != moment:
            return
        if error:
            self._remote_failed(error)
        else:
            self._done()

    def _remote_failed(self, error: str = "Input/output error") -> None:
        if self.pending is None:
            return
        data = {"node-name": "mcft-n-vda", "error": error, "type": "write"}
        self.event("QUORUM_REPORT_BAD", data)
        self.event("QUORUM_FAILURE", {"reference": "mcft-w-vda"})
        self._done()

    def _done(self) -> None:
        moment, self.pending = self.pending, None
        assert moment is not None
        if self.runstate == "running" and not self.drained:
            self._packet(moment)
        else:
            self.unsent = True
        drained, self.drained = self.drained, []
        for call in drained:
            call()

    def _write(self, moment: Moment) -> None:
        """Where the device's node leads."""
        node = self.drive
        if node.startswith("mcft-q"):
            node = self.nodes.get(node, {}).get("children.0", STORAGE)
        if node == "mcft-r-vda":
            node = self.nodes[node]["file"]
        if node == "mcft-a-vda":
            overlay = self._overlay(0)
            assert overlay is not None
            overlay.content = moment
        else:
            self.image().write(moment)

    def _overlay(self, which: int) -> Overlay | None:
        if self.overlays is None:
            return None
        found = self.host.machine.open_overlays.get(self.overlays[which])
        return found if isinstance(found, Overlay) else None

    def _view(self) -> Moment | None:
        """What the guest's disk shows: active over hidden over the file."""
        node = self.nodes.get("mcft-r-vda", {}).get("file", "") if self.drive.startswith("mcft-q") else ""
        if node == "mcft-a-vda":
            for which in (0, 1):
                overlay = self._overlay(which)
                if overlay is not None and overlay.content is not None:
                    return overlay.content
        return self.image().content

    def _packet(self, moment: Moment) -> None:
        """The guest's NIC: to the newest filter, or straight to the tap."""
        outs = [name for name, (_, kind) in self.filters.items() if kind == "out"]
        if outs:
            self.chardevs[self.filters[outs[-1]][0]].from_guest(moment)
        else:
            self.to_tap(moment, "")

    def from_gate(self, chardev: str, moment: Moment, mode: str) -> None:
        """What the gate wrote into its `in` filter; an older pair behind it, whose gate is dead, drops it."""
        mine = next((name for name, (dev, kind) in self.filters.items() if dev == chardev and kind == "in"), None)
        if mine is None or not self.proc.alive:
            return
        older = list(self.filters)[: list(self.filters).index(mine)]
        outs = [name for name in older if self.filters[name][1] == "out"]
        if outs:
            self.chardevs[self.filters[outs[-1]][0]].from_guest(moment)
        else:
            self.to_tap(moment, mode)

    def to_tap(self, moment: Moment, mode: str) -> None:
        machine = self.host.machine
        lease = machine.tap_leases.get(self.tap)
        if machine.taps.get(self.tap, True) and self.tap not in machine.silenced and (lease is None or lease.passes()):
            self.world.oracle.left(self, moment, mode)

    # ---- checkpoints: the primary ----

    def _timer(self) -> None:
        self._epoch += 1
        if self.delay_ms < 1e9:
            self.world.at(self.delay_ms, self.proc, self._checkpoint_due, self._epoch)

    def _checkpoint_due(self, epoch: int) -> None:
        if epoch == self._epoch:
            self._checkpoint()

    def _checkpoint(self) -> None:
        if self.colo != "primary" or self.busy or self.colo_failed:
            return
        self.busy = True
        if self.pending is not None:
            self.drained.append(self._captured)  # the stop drains the disks first: perhaps for ever
        else:
            self._captured()

    def _captured(self) -> None:
        if self.colo != "primary":
            return
        if self.runstate == "running":
            self.event("STOP")
        self.runstate = "colo"
        if self.stream is None or not self.stream.open:
            self._colo_exit("error")
            return
        state, unsent, stream = self.ram, self.unsent, self.stream
        size_ms = 1.0 + self.world.rng.random() * 6.0
        self.world.at(size_ms, self.proc, self._sent, stream, state, unsent)

    def _sent(self, stream: Connection, state: Moment, unsent: bool) -> None:
        if stream.open:
            stream.send(self, lambda: stream.ends[1].load(stream, state, unsent))

    def loaded(self, stream: Connection) -> None:
        if stream is self.stream and self.busy and self.colo == "primary":
            self.busy = False
            self.start_running()
            self._timer()
            self._unblock()

    def _stream_ended(self) -> None:
        """On the primary it shows with the next checkpoint, on the standby at once (after what came whole before it)."""
        if self.colo == "secondary":
            if self.loading:
                self._end_waits = True
            else:
                self._colo_exit("error")
        elif self.colo == "primary" and self.busy and self.runstate == "colo":
            self._colo_exit("error")
        elif self.migration in ("active", "setup", "device"):
            self.migration = "failed"
            self.event("MIGRATION", {"status": "failed"})
            if self.runstate in ("finish-migrate", "paused"):
                self.start_running()

    def _colo_exit(self, reason: str) -> None:
        if not self.colo_failed:
            self.colo_failed = True
            self.event("COLO_EXIT", {"mode": self.colo, "reason": reason})
            self._unblock()

    def _nbd_ended(self) -> None:
        self._remote_failed()
        for job in self.jobs.values():
            if job["status"] in ("running", "ready"):
                job.update(status="concluded", error="Input/output error")

    # ---- checkpoints: the standby ----

    def load(self, stream: Connection, state: Moment, unsent: bool) -> None:
        if self.colo != "secondary" or self.failover or stream is not self.stream:
            return
        if self.runstate == "running":
            self.event("STOP")
        self.runstate, self.loading = "colo", True
        self.world.at(1.0 + self.world.rng.random() * 4.0, self.proc, self._load_memory, stream, state, unsent)

    def _load_memory(self, stream: Connection, state: Moment, unsent: bool) -> None:
        self.ram, self.unsent, self.half = state, unsent, True
        self._own_branch = False
        self.world.at(0.2 + self.world.rng.random(), self.proc, self._load_disks, stream)

    def _load_disks(self, stream: Connection) -> None:
        machine = self.host.machine
        if machine.disk_fails:
            # (colo_process_incoming_thread: it waits for a failover, and keeps its socket until then.)
            self.loading = False
            self._colo_exit("error")
            return
        for which in (0, 1):
            overlay = self._overlay(which)
            if overlay is not None:
                overlay.content, overlay.flushed = None, True
        self.loading = self.half = False
        self.runstate = "paused"
        self.world.moment("acknowledged", self.host)
        if stream.open:
            stream.send(self, lambda: stream.ends[0].loaded(stream))
        self.start_running()
        if self._end_waits:
            self._colo_exit("error")

    # ---- what the monitors and libvirt ask ----

    def event(self, name: str, data: dict[str, Any] | None = None) -> None:
        wall = self.host.wall_ms + self.world.now
        message = {"event": name, "data": data or {},
                   "timestamp": {"seconds": int(wall // 1000), "microseconds": int(wall % 1000 * 1000)}}  # fmt: skip
        if name not in ("STOP", "RESUME"):
            self.world.note(self.host.name, f"QEMU says {name} {data or ''}")
        self._to_monitor(message)
        self.host.machine.heard_event(self, message)

    def _to_monitor(self, message: dict[str, Any]) -> None:
        if self.monitor is None:
            return
        rng = self.world.rng
        delay = 0.1 + rng.random() * 0.4
        if rng.random() < 0.02:
            delay += rng.random() * self.world.slow_monitor_ms
        at = max(self.world.now + delay, self._monitor_at)
        self._monitor_at = at
        self.monitor.flight.append(message)
        self.world.at(at - self.world.now, self.host.machine.kernel, self.monitor.arrive)

    def main_loop_hangs(self) -> bool:
        return self.host.machine.qemu_hangs or (
            self.busy and ((self.nbd is not None and self.nbd.stuck) or (self.stream is not None and self.stream.stuck))
        )

    def _unblock(self) -> None:
        waiting, self._waiting_commands = self._waiting_commands, []
        for call in waiting:
            self.world.at(0.1, self.proc, call)

    def command(self, name: str, arguments: dict[str, Any], reply: Reply, *, oob: bool = False) -> None:
        """One QMP command; its reply when it is done. In-band ones wait for the main loop."""
        if not oob and self.main_loop_hangs():
            self._waiting_commands.append(lambda: self.command(name, arguments, reply))
            self.world.at(50.0, self.proc, self._look_again)
            return
        handler = getattr(self, "_q_" + name.replace("-", "_"), None)
        if handler is None:
            reply({"error": {"class": "CommandNotFound", "desc": f"the model knows no {name}"}})
            raise Violation("the model", f"it knows no QMP command {name}")
        try:
            answer = handler(arguments, reply)
        except KeyError as error:
            reply({"error": {"class": "GenericError", "desc": f"{name}: no {error}"}})
            return
        except RuntimeError as error:
            reply({"error": {"class": "GenericError", "desc": str(error)}})
            return
        if answer is not NotImplemented:
            reply({"return": {} if answer is None else answer})

    def _look_again(self) -> None:
        if self._waiting_commands and not self.main_loop_hangs():
            self._unblock()
        elif self._waiting_commands:
            self.world.at(50.0, self.proc, self._look_again)

    # run state

    def _q_query_status(self, a: dict[str, Any], r: Reply) -> Any:
        return {"status": self.runstate, "running": self.runstate == "running"}

    def _q_stop(self, a: dict[str, Any], r: Reply) -> Any:
        self.stops += 1
        if self.busy:
            if self.runstate == "running":
                self.event("STOP")  # the drain of a checkpoint comes after it
                self.runstate = "paused"
            return None

        def stopped() -> None:
            self._stop_running()
            for which in (0, 1):
                overlay = self._overlay(which)
                if overlay is not None:
                    overlay.flushed = True
            r({"return": {}})

        if self.pending is not None:
            self.drained.append(stopped)
        else:
            stopped()
        return NotImplemented

    def _q_cont(self, a: dict[str, Any], r: Reply) -> Any:
        if self.runstate in ("colo", "finish-migrate", "inmigrate") and self.runstate != "paused" and not self.failover:
            if self.runstate == "colo" or self.busy:
                raise RuntimeError("inside a checkpoint")
            return None
        self.start_running()
        return None

    # migration

    def _q_migrate_set_capabilities(self, a: dict[str, Any], r: Reply) -> Any:
        if self.migration in ("active", "pre-switchover", "device", "colo") and self.colo:
            raise RuntimeError("There's a migration process in progress")

    def _q_query_migrate_capabilities(self, a: dict[str, Any], r: Reply) -> Any:
        return [{"capability": "x-colo", "state": False}]

    def _q_migrate_set_parameters(self, a: dict[str, Any], r: Reply) -> Any:
        if "x-checkpoint-delay" in a:
            self.delay_ms = float(a["x-checkpoint-delay"])
            if self.colo == "primary":
                self._epoch += 1
                self._checkpoint()

    def _q_query_migrate_parameters(self, a: dict[str, Any], r: Reply) -> Any:
        return {"x-checkpoint-delay": int(self.delay_ms)}

    def _q_migrate_incoming(self, a: dict[str, Any], r: Reply) -> Any:
        self.listening = int(a["uri"].rsplit(":", 1)[1])

    def _peer(self, port: int, *, nbd: bool) -> Qemu:
        other = self.host.other
        if not (self.world.links[0].up[0] and self.world.links[0].up[1]) or not other.up or other.frozen:
            raise RuntimeError("Failed to connect: No route to host")
        for qemu in other.machine.qemus():
            if (qemu.nbd_port if nbd else qemu.listening) == port:
                return qemu
        raise RuntimeError("Failed to connect: Connection refused")

    def _q_migrate(self, a: dict[str, Any], r: Reply) -> Any:
        peer = self._peer(int(a["uri"].rsplit(":", 1)[1]), nbd=False)
        self.stream = peer.stream = Connection(self.world, 0, (self, peer))
        self.stream.on_end(self, self._stream_ended)
        self.stream.on_end(peer, peer._stream_ended)
        self.migration, self.copy = "active", peer
        self.colo_failed = False
        self.world.at(60.0 + 100.0 * self.world.rng.random(), self.proc, self._precopied, self.stream)

    def _precopied(self, stream: Connection) -> None:
        if self.migration != "active" or stream is not self.stream or not stream.open:
            return

        def stopped() -> None:
            if self.migration == "active":
                if self.runstate == "running":
                    self.event("STOP")
                self.runstate = "finish-migrate"
                self.migration = "pre-switchover"
                self.event("MIGRATION", {"status": "pre-switchover"})

        if self.pending is not None:
            self.drained.append(stopped)
        else:
            stopped()

    def _q_migrate_continue(self, a: dict[str, Any], r: Reply) -> Any:
        if self.migration != "pre-switchover":
            raise RuntimeError("not in pre-switchover")
        self.migration = "device"
        stream, state, unsent = self.stream, self.ram, self.unsent
        assert stream is not None
        if stream.open:
            stream.send(self, lambda: stream.ends[1].first(stream, state, unsent), 2.0)
        else:
            self._stream_ended()

    def first(self, stream: Connection, state: Moment, unsent: bool) -> None:
        """The end of the first pass: from here on this copy is one, of this very moment."""
        if stream is not self.stream or self.runstate != "inmigrate":
            return
        self.ram, self.unsent, self.colo, self.runstate, self.migration = state, unsent, "secondary", "paused", "colo"
        self._own_branch = False
        stream.send(self, lambda: stream.ends[0].begun(stream))

    def begun(self, stream: Connection) -> None:
        if stream is self.stream and self.migration == "device":
            self.migration, self.colo = "colo", "primary"
            self.start_running()
            self._timer()

    def _q_migrate_cancel(self, a: dict[str, Any], r: Reply) -> Any:
        if self.migration in ("setup", "active", "pre-switchover", "device"):
            self.migration = "cancelled"
            self.event("MIGRATION", {"status": "cancelled"})
            if self.stream is not None:
                self.stream.close(self)
            if self.runstate == "finish-migrate":
                self.start_running()

    def _q_query_migrate(self, a: dict[str, Any], r: Reply) -> Any:
        return {} if self.migration == "none" else {"status": self.migration, "total-time": 1}

    def _q_query_colo_status(self, a: dict[str, Any], r: Reply) -> Any:
        return {"mode": "none" if not self.colo or (self.failover and not self.loading) else self.colo}

    def _q_x_colo_lost_heartbeat(self, a: dict[str, Any], r: Reply) -> Any:
        if self.colo == "primary":
            self.colo, self.migration, self.colo_failed = "", "completed", True
            self._epoch += 1
            if self.stream is not None:
                self.stream.close(self)
            if self.busy:
                self.busy = False
                self.drained = []
                if self.runstate == "colo":
                    self.start_running()
                self._unblock()
        elif self.colo == "secondary" and not self.failover:
            if self.loading:
                raise Violation("torn memory", f"{self.host.name}: failover while a checkpoint is loaded")
            self.failover, self.migration, self.colo = True, "completed", ""
            if self.stream is not None:
                self.stream.close(self)
            self.world.at((40.0 + 160.0 * self.world.rng.random()) * self.world.slow_commit, self.proc, self._commit)
            image = self.image()
            self.world.moment("commit", self.host)
            if self._overlay(0) is not None and self._overlay(1) is not None:
                image.torn = image.torn or "committing"
            self.world.at(0.5, self.proc, self._out_of_colo)
        else:
            raise RuntimeError("not in COLO")

    def _commit(self) -> None:
        """QEMU has written `active` (and what lies in `hidden`) into the disk, and uses the disk itself from now on."""
        if self.host.machine.disk_fails:
            self.world.at(100.0, self.proc, self._commit)
            return
        image = self.image()
        view = self._view()
        if self.nodes.get("mcft-r-vda", {}).get("file") == "mcft-a-vda":
            self.nodes["mcft-r-vda"]["file"] = STORAGE
            if view is not None:
                image.write(view)
            for which in (0, 1):
                overlay = self._overlay(which)
                if overlay is not None:
                    overlay.content = overlay.content if which == 0 else None
        if image.torn == "committing":
            image.torn = ""
        self.failover = False
        self.world.moment("committed", self.host)

    def _out_of_colo(self) -> None:
        """QEMU resumes a copy by itself after a failover (`process_incoming_migration_bh`)."""
        if self.runstate != "running":
            self.start_running()

    def _q_yank(self, a: dict[str, Any], r: Reply) -> Any:
        for instance in a["instances"]:
            if instance["type"] == "migration" and self.stream is not None:
                self.stream.reset(self)
            elif instance["type"] == "block-node" and self.nbd is not None:
                self.nbd.reset(self)
        self._unblock()

    # disks

    def _q_query_block(self, a: dict[str, Any], r: Reply) -> Any:
        return [{"qdev": QDEV, "inserted": {"node-name": self.drive, "image": {"virtual-size": 1 << 20, "actual-size": 4096},
                                            "cache": {"direct": False}}}]  # fmt: skip

    def _q_qom_list(self, a: dict[str, Any], r: Reply) -> Any:
        if a["path"] == "/objects":
            return [{"name": name} for name in [*self.objects, *self.filters]]
        return [{"name": "drive"}]

    def _q_qom_set(self, a: dict[str, Any], r: Reply) -> Any:
        if self.runstate == "running":
            raise Violation("the model", "a drive changed under a running guest")
        if a["value"] not in self.nodes:
            raise RuntimeError(f"no node {a['value']}")
        self.drive = a["value"]

    def _q_blockdev_add(self, a: dict[str, Any], r: Reply) -> Any:
        self._add_node(a)

    def _add_node(self, a: dict[str, Any]) -> str:
        driver = a["driver"]
        name = a.get("node-name") or f"#{len(self.nodes)}"
        if name in self.nodes:
            raise RuntimeError(f"Duplicate nodes with node-name='{name}'")
        children: dict[str, str] = {}
        if driver == "nbd":
            peer = self._peer(int(a["server"]["port"]), nbd=True)
            self.nbd = Connection(self.world, 0, (self, peer))
            self.nbd.on_end(self, self._nbd_ended)
        for key in ("file", "backing"):
            if key in a:
                children[key] = a[key] if isinstance(a[key], str) else self._add_node(a[key])
        for index, child in enumerate(a.get("children", [])):
            children[f"children.{index}"] = child if isinstance(child, str) else self._add_node(child)
        if driver == "file" and name == "mcft-af-vda":
            self.overlays = (a["filename"], a["filename"].removesuffix("active") + "hidden")
            for path in self.overlays:
                overlay = self.host.files.held[path]
                self.host.machine.open_overlays[path] = overlay
        for child in children.values():
            if child not in self.nodes:
                raise RuntimeError(f"no node {child}")
        self.nodes[name] = children
        return name

    def _q_blockdev_del(self, a: dict[str, Any], r: Reply) -> Any:
        name = a["node-name"]
        if name not in self.nodes:
            raise RuntimeError(f"Failed to find node with node-name='{name}'")
        used = [parent for parent, children in self.nodes.items() if name in children.values()]
        if used or self.drive == name:
            raise RuntimeError(f"Node {name} is in use")
        self._delete(name)

    def _delete(self, name: str) -> None:
        children = self.nodes.pop(name)
        for child in children.values():
            inline = child.startswith(("mcft-w", "mcft-n", "mcft-h", "mcft-af", "mcft-hf", "#"))
            if inline and child in self.nodes and not any(child in c.values() for c in self.nodes.values()):
                self._delete(child)
        if name in ("mcft-n-vda", "mcft-s-vda") and self.nbd is not None:
            self.nbd.close(self)
            self.nbd = None

    def _q_x_blockdev_change(self, a: dict[str, Any], r: Reply) -> Any:
        children = self.nodes[a["parent"]]
        if "node" in a:
            children[f"children.{len(children)}"] = a["node"]
        else:
            del children[a["child"]]
            if self.pending is not None:
                self._remote_failed()

    def _q_blockdev_mirror(self, a: dict[str, Any], r: Reply) -> Any:
        self.jobs[a["job-id"]] = {"id": a["job-id"], "status": "running", "type": "mirror", "error": "",
                                  "current-progress": 0, "total-progress": 1}  # fmt: skip
        peer = self.copy_of_disk()
        image = peer.host.files.held.get(peer.path)
        zero = isinstance(image, Image) and image.fresh
        if isinstance(image, Image):
            image.torn = "syncing" if zero else "not made empty before it was copied to"
            image.missed = None
        self.world.at(50.0 + 150.0 * self.world.rng.random(), self.proc, self._mirrored, a["job-id"])

    def _mirrored(self, job_id: str) -> None:
        job = self.jobs.get(job_id)
        if job is None or job["status"] != "running" or self.nbd is None or not self.nbd.open:
            return
        if self.nbd.stuck:
            self.world.at(50.0, self.proc, self._mirrored, job_id)
            return
        self._mirror(whole=True)
        job.update(status="ready")

    def _mirror(self, *, whole: bool = False) -> None:
        """A mirror that runs carries what the guest writes, a little later; here at once where the cable is there."""
        if not self.jobs or self.nbd is None or not self.nbd.open or self.nbd.stuck:
            return
        if whole or any(job["status"] == "ready" for job in self.jobs.values()):
            peer = self.copy_of_disk()
            if peer.proc.alive and peer.exporting:
                content = self.image().content
                peer_image = peer.image()
                if content is not None:
                    peer_image.write(content)
                if peer_image.torn == "syncing":
                    peer_image.torn = ""

    def _q_query_jobs(self, a: dict[str, Any], r: Reply) -> Any:
        return [dict(job) for job in self.jobs.values()]

    _q_query_block_jobs = _q_query_jobs

    def _q_block_job_cancel(self, a: dict[str, Any], r: Reply) -> Any:
        job = self.jobs[a["device"]]
        self.world.at(2.0, self.proc, self._cancelled, job, bool(a.get("force")))

    def _cancelled(self, job: dict[str, Any], force: bool) -> None:
        if job["status"] == "concluded":
            return
        if not force and self.nbd is not None and self.nbd.stuck:
            self.world.at(20.0, self.proc, self._cancelled, job, force)
            return
        if not force:
            self._mirror(whole=job["status"] == "ready")
        job.update(status="concluded")

    def _q_job_dismiss(self, a: dict[str, Any], r: Reply) -> Any:
        del self.jobs[a["id"]]

    def _q_nbd_server_start(self, a: dict[str, Any], r: Reply) -> Any:
        self.nbd_port = int(a["addr"]["data"]["port"])

    def _q_block_export_add(self, a: dict[str, Any], r: Reply) -> Any:
        self.exporting = True

    def _q_nbd_server_stop(self, a: dict[str, Any], r: Reply) -> Any:
        self.exporting, self.nbd_port = False, 0

    def _q_query_named_block_nodes(self, a: dict[str, Any], r: Reply) -> Any:
        return [{"node-name": name, "children": [{"child": c, "node-name": n} for c, n in children.items()]}
                for name, children in self.nodes.items()]  # fmt: skip

    # monitors, filters, what is asked once

    def _q_getfd(self, a: dict[str, Any], r: Reply) -> Any: ...

    def _q_chardev_add(self, a: dict[str, Any], r: Reply) -> Any:
        fd = a["backend"]["data"]["addr"]["data"]["str"]
        self.chardevs[a["id"]] = self.fds.pop(fd, None)
        held = self.chardevs[a["id"]]
        if held is not None and hasattr(held, "given_to"):
            held.given_to(self, a["id"])

    def _q_chardev_remove(self, a: dict[str, Any], r: Reply) -> Any:
        del self.chardevs[a["id"]]

    def _q_query_chardev(self, a: dict[str, Any], r: Reply) -> Any:
        return [{"label": name} for name in self.chardevs]

    def _q_object_add(self, a: dict[str, Any], r: Reply) -> Any:
        if a["qom-type"] == "filter-redirector":
            kind = "out" if "outdev" in a else "in"
            self.filters[a["id"]] = (a.get("outdev") or a["indev"], kind)
            return
        if a["qom-type"] == "monitor-qmp":
            self.monitor_path = self.host.machine.monitor_of(self)
        self.objects.add(a["id"])

    def _q_object_del(self, a: dict[str, Any], r: Reply) -> Any:
        name = a["id"]
        if name in self.filters:
            del self.filters[name]
            return
        self.objects.remove(name)
        if name == "mcft-qmp":
            self.monitor_path = ""
            if self.monitor is not None:
                self.monitor.lost()
                self.monitor = None

    def _q_query_version(self, a: dict[str, Any], r: Reply) -> Any:
        return {"qemu": {"major": 11, "minor": 1, "micro": 3}}

    def _q_query_kvm(self, a: dict[str, Any], r: Reply) -> Any:
        return {"enabled": True}

    def _q_qom_list_types(self, a: dict[str, Any], r: Reply) -> Any:
        return [{"name": "monitor-qmp"}]

    def _q_announce_self(self, a: dict[str, Any], r: Reply) -> Any: ...
