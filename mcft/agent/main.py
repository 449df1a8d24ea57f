"""`mcft agent`: one process per host; puts the parts together, says ready, and feeds systemd's watchdog."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from mcft.agent import maintenance, sd
from mcft.agent.again import Again
from mcft.agent.core import Core
from mcft.agent.events import EventLog
from mcft.agent.hook import HookProof, Markers
from mcft.agent.jobs import Jobs
from mcft.agent.peers import PeerLink
from mcft.agent.ports import Ports
from mcft.agent.server import Server
from mcft.agent.site import Site
from mcft.agent.store import Store
from mcft.config import Config, load
from mcft.errors import Failed, McftError
from mcft.libvirt_bridge import LibvirtHost

JOBS_DEADLINE_S = 30.0
log = logging.getLogger("mcft.agent")


def main(path: Path, *, must_exist: bool = False) -> int:
    """Run until SIGTERM or SIGINT. 0, or 1 with a sentence on stderr if it can't start."""
    logging.basicConfig(level=os.environ.get("MCFT_LOG", "INFO"), format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        config = load(path, must_exist=must_exist)
        asyncio.run(_run(config))
    except McftError as error:
        print(f"mcft agent: {error}", file=sys.stderr)
        return 1
    return 0


async def _run(config: Config) -> None:
    os.makedirs(config.state_dir, mode=0o755, exist_ok=True)
    os.makedirs(config.run_dir, mode=0o755, exist_ok=True)
    store = await Store.open(os.path.join(config.state_dir, "mcft.db"))
    events = await EventLog.open(store)
    markers = Markers(config)
    host = LibvirtHost(config.libvirt_uri)
    site = Site(config, store, events, Jobs(), host, markers, HookProof(host, markers), Ports(*config.ports))
    core = Core(site)
    host._on_lifecycle = core.lifecycle
    host.on_disk_event = core.disk_event
    host.on_watched_event = core.watched_event
    await host.start()
    await _versions(site)
    for name, peer in config.peers.items():
        site.peers[name] = PeerLink(config, peer, core.hello)
        site.peers[name].start()
    await maintenance.load(site)
    await core.load()  # before anybody can ask: an unknown instance would be answered as if it were over
    server = Server(config, core)
    await server.start()
    site.spawn(host.keep_connected(), "keep libvirt connected")
    site.spawn(Again(core).run(), "protect again")
    site.spawn(_versions_later(site), "versions")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    sd.notify("READY=1", f"{config.name}: {len(core.lives)} protections")
    await _watchdog(site, stop)
    sd.notify("STOPPING=1")
    await _stop(site, core, server)


async def _versions(site: Site) -> None:
    try:
        site.versions.update(await site.host.versions())
    except Failed as error:
        log.warning("libvirt's versions are not known yet: %s", error)


async def _versions_later(site: Site) -> None:
    while "qemu" not in site.versions:
        await asyncio.sleep(2)
        await _versions(site)


async def _watchdog(site: Site, stop: asyncio.Event) -> None:
    """Feed the watchdog from the loop itself: a loop that hangs is restarted (gates go on meanwhile)."""
    interval_s = sd.watchdog_interval_s()
    while not stop.is_set():
        if site.store.broken:
            raise Failed("store-broken", "the agent's records can't be written any more", site.store.broken)
        sd.notify("WATCHDOG=1")
        try:
            await asyncio.wait_for(stop.wait(), interval_s or 10.0)
        except TimeoutError:
            continue


async def _stop(site: Site, core: Core, server: Server) -> None:
    """A protecting that is under way is undone; what is protected stays so, without us."""
    try:
        await asyncio.wait_for(site.jobs.close(), JOBS_DEADLINE_S)
    except TimeoutError:
        log.warning("a job did not end in time; the next start goes on from its records")
    await server.stop()
    for life in core.lives.values():
        await life.close()
    await site.stop_tasks()
    for peer in site.peers.values():
        await peer.close()
    await site.arbiters.close()
    await site.events.close()
    await site.store.close()
