"""`mcft forget DOMAIN --local`: mcft is broken, I want my VM. Needs neither the peer nor the agent.

It asks nobody, so it is the operator's word that no other copy runs. Everything of mcft's that this host holds of the
domain goes: gate, filters, nodes, monitor, route, start ban, records; the guest, if it leads here, goes on. The
generation is kept, so that a later protection still counts on. A take-over's overlays are the guest's newest data: they
are committed first, and where that can't be, nothing is removed.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from mcft import config as configuration
from mcft import diskreplica, filterbuffer, sockbreak, streams
from mcft.agent import buffers, domainxml, model, network, overlays
from mcft.agent.gates import unit
from mcft.agent.hook import Markers
from mcft.agent.life import stored_ledger
from mcft.agent.process import run
from mcft.agent.store import Store
from mcft.diskreplica import Disk
from mcft.engines.colo import Colo
from mcft.engines.mc import Mc
from mcft.errors import Failed, McftError, NotFound, Refused
from mcft.gate import state as gate_state
from mcft.gate.state import process_start
from mcft.generations import Kind, Ledger
from mcft.libvirt_bridge import DomainInfo, LibvirtHost
from mcft.monitor import Monitor, MonitorGone
from mcft.qmp_passthrough import Qmp, remove_monitor

AGENT = "mcft-agent.service"
COMMIT_S = 60.0


def forget_local(domain: str) -> list[str]:
    """Do it; one line for each thing that was done or could not be. Raises: NotFound, Failed."""
    return asyncio.run(_forget(configuration.load(), domain))


class _Report:
    """Runs one removal after the other; a failing one is reported and holds up none of the others."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    async def do(self, what: str, work: Callable[[], Awaitable[Any]]) -> None:
        try:
            await work()
            self.lines.append(f"done: {what}")
        except (McftError, OSError) as error:
            self.lines.append(f"NOT done: {what}: {error}")


async def _forget(config: configuration.Config, domain: str) -> list[str]:
    report = _Report()
    await report.do("stop the agent for the moment", lambda: run("systemctl", "stop", AGENT))
    try:
        body, ledger = await _stored(config, domain)
        host = LibvirtHost(config.libvirt_uri)
        await host.start()
        info = await host.find(body.uuid if body else domain)
        if body is None and info is None:
            raise NotFound("no-such-domain", f"neither libvirt nor mcft knows '{domain}' on this host")
        uuid = body.uuid if body else info.uuid if info else ""
        if body is not None:
            _refuse_half_taken(body, ledger)
            if body.overlays_g and ledger.spoken:
                await _keep_overlays(host, body, info)
                report.lines.append("done: commit the overlays of the take-over")
        await _end_gate(config, uuid, report)
        if info is not None and info.running:
            await _clean_domain(config, host, info, body, report, leads=ledger.spoken)
        await _clean_host(config, uuid, body, report)
    finally:
        await report.do("start the agent again", lambda: run("systemctl", "start", AGENT))
    return report.lines


def _refuse_half_taken(body: model.Body, ledger: Ledger) -> None:
    """Raises: Refused ("taking-over"): won, not resumed yet. Its memory is in a QEMU that only the agent can let go on."""
    if ledger.newest is Kind.TAKEN and not ledger.spoken and not ledger.resigned_win:
        raise Refused(
            "taking-over", f"{body.domain} is being taken over here, and its newest state is in that copy alone",
            "only the agent can finish it", f"systemctl start {AGENT}, then mcft wait {body.domain} --for active",
        )  # fmt: skip


async def _keep_overlays(host: LibvirtHost, body: model.Body, info: DomainInfo | None) -> None:
    """Raises: Failed if a take-over's overlays can't be committed: without them the disk alone is an older one."""
    if info is not None and info.running:
        qmp = Qmp(host, info.uuid)
        await overlays.await_committed(qmp, body.disks, COMMIT_S)
        await diskreplica.drop_overlays(qmp, body.disks, body.overlays_g)
    else:
        await overlays.commit_files(body.disks, body.overlays_g)
    # The agent defines what it took over after the guest talks again; it may have been cut off before that.
    await host.define(domainxml.moved(body.xml, body.disk_paths))


async def _stored(config: configuration.Config, domain: str) -> tuple[model.Body | None, Ledger]:
    """What is written down of it; an unreadable store is as if there were nothing."""
    nothing = Ledger("", "primary", 0)
    try:
        store = await Store.open(os.path.join(config.state_dir, "mcft.db"))
    except McftError:
        return None, nothing
    try:
        for stored in await store.load():
            if domain in (stored.domain, stored.uuid):
                body = msgspec.json.decode(stored.body, type=model.Body)
                return body, await stored_ledger(store, body)
        return None, nothing
    finally:
        await store.close()


async def _end_gate(config: configuration.Config, uuid: str, report: _Report) -> None:
    await report.do("end the gate", lambda: run("systemctl", "stop", unit(uuid)))
    for path in gate_state.paths(str(config.run_dir), uuid):
        if os.path.exists(path):
            os.unlink(path)


def _monitor_path(config: configuration.Config, uuid: str) -> str:
    return os.path.join(config.run_dir, "monitor", f"{uuid}.sock")


async def _clean_domain(
    config: configuration.Config, host: LibvirtHost, info: DomainInfo, body: model.Body | None, report: _Report, *, leads: bool
) -> None:
    """A leading guest goes on without anything of mcft's; a following copy is ended. leads: it has taken over."""
    qmp, path = Qmp(host, info.uuid), _monitor_path(config, info.uuid)
    if body is not None and body.engine == "mc":
        await _clean_mc(host, body, report, follows=body.role == "standby" and not leads)
        return
    # QEMU's main loop may hang in a dead stream: libvirt's monitor would not answer, ours does out of band.
    await report.do("break the streams", lambda: asyncio.to_thread(_yank, path))
    graph = await diskreplica.nodes(qmp)
    if body is not None:
        follows = body.role == "standby" and not leads
    else:  # nothing is written down: a copy has overlays, and waits; one that took over runs
        runs = (await qmp.execute("query-status"))["status"] == "running"
        follows = any(name.startswith("mcft-a-") for name in graph) and not runs
    if follows:
        await report.do("end the standby's copy", lambda: host.destroy(info.uuid))
        return
    disks = body.disks if body else []
    await report.do("end checkpointing", lambda: Colo().abort(qmp))
    await report.do("take replication away", lambda: diskreplica.dismantle_copy(qmp, disks))
    await report.do("give the disks back", lambda: _restore(qmp, disks))
    taps = [nic.target for nic in body.nics] if body else []
    await report.do("open the network", lambda: _open_network(qmp, taps))
    await report.do("remove the monitor", lambda: remove_monitor(qmp, path))
    if body is not None and body.autostart:
        await report.do("restore autostart", lambda: host.set_autostart(info.uuid, True))


async def _clean_mc(host: LibvirtHost, body: model.Body, report: _Report, *, follows: bool) -> None:
    """A copy that follows is deaf: nothing is asked of it, and only SIGKILL ends it. A leader's stream ends with its socket."""
    qmp, alive = Qmp(host, body.uuid), process_start(body.qemu_pid) == body.qemu_start

    async def end() -> None:
        if alive:
            os.kill(body.qemu_pid, 9)

    async def break_stream() -> None:
        if alive and body.mig_port:
            await asyncio.to_thread(sockbreak.break_stream, body.qemu_pid, body.mig_port)

    async def open_network() -> None:
        await buffers.remove_plugs([nic.target for nic in body.nics])
        for nic in body.nics:
            await run("ip", "link", "set", nic.target, "up")

    if follows:
        await report.do("end the standby's copy", end)
        return
    await report.do("break the stream", break_stream)
    await report.do("end checkpointing", lambda: Mc(body.mc).abort(qmp))
    await report.do("open the network", open_network)
    if body.autostart:
        await report.do("restore autostart", lambda: host.set_autostart(body.uuid, True))


async def _restore(qmp: Qmp, disks: list[Disk]) -> None:
    await diskreplica.restore(qmp, disks)
    left = [name for name in await diskreplica.nodes(qmp) if name.startswith("mcft-")]
    if left:
        raise Failed("nodes-left", f"nodes of mcft's are still there: {', '.join(left)}")
    await streams.drop_credentials(qmp)


def _yank(path: str) -> None:
    monitor = Monitor(path)
    try:
        monitor.connect()
    except MonitorGone:
        return
    assert monitor.sock is not None
    monitor.sock.setblocking(True)
    monitor.sock.settimeout(2.0)
    answers: list[dict[str, Any]] = []
    monitor.send("query-yank", on_reply=answers.append)
    while not answers:
        for message in monitor.receive():
            monitor.dispatch(message, 0.0)
    instances = answers[0].get("return", [])
    ours = [i for i in instances if i["type"] == "migration" or i.get("node-name", "").startswith("mcft-")]
    if ours:
        monitor.send("yank", {"instances": ours}, lambda _reply: None, oob=True)
    monitor.close()


async def _open_network(qmp: Qmp, taps: list[str]) -> None:
    await buffers.remove_plugs(taps)
    for tap in taps:
        await run("ip", "link", "set", tap, "up")
    objects = [row["name"] for row in await qmp.execute("qom-list", path="/objects")]
    chardevs = [row["label"] for row in await qmp.execute("query-chardev")]
    for command, arguments in filterbuffer.detach_commands(objects, chardevs):
        await qmp.execute(command, **arguments)


async def _clean_host(config: configuration.Config, uuid: str, body: model.Body | None, report: _Report) -> None:
    markers = Markers(config)

    async def forget_marker() -> None:
        markers.forget(uuid)

    async def forget_records() -> None:
        store = await Store.open(os.path.join(config.state_dir, "mcft.db"))
        try:
            await store.delete(uuid)
        finally:
            await store.close()

    await report.do("lift the start ban", forget_marker)
    if body is not None and body.route_changed and body.links:
        address = body.links[0].peer
        await report.do("restore the route", lambda: network.set_quickack(address, False))
    shutil.rmtree(os.path.join(config.state_dir, "labels", uuid), ignore_errors=True)
    await report.do("forget the records", forget_records)
