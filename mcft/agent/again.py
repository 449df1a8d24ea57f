"""Protecting again by itself what has lost its standby (`protocol.md`, "Protecting again")."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from mcft import api
from mcft.agent import model
from mcft.agent.jobs import JobHandle
from mcft.errors import McftError, Unreachable, unforeseen
from mcft.gate.loop import boottime_ms

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.core import Core
    from mcft.agent.life import Life

log = logging.getLogger(__name__)

EVERY_S = 1.0
MAX_FAILURES = 5
FIRST_WAIT_MS, LONGEST_WAIT_MS = 60_000, 3_600_000


class Again:
    """Looks at every protection once a second."""

    def __init__(self, core: Core) -> None:
        self.core, self.site = core, core.site

    async def run(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(EVERY_S)
            for life in list(self.core.lives.values()):
                try:
                    if not self._not_yet(life) and await self._peer_is_free(life):
                        self._start(life)
                except Exception as error:
                    log.info("%s: not protected again yet: %r", life.body.domain, error)

    def _not_yet(self, life: Life) -> str:
        """Why it is not protected again now; empty if nothing on this host is in the way."""
        body, config = life.body, self.site.config
        if body.role != "primary" or body.state not in ("solo", "active", "unprotected"):
            return "it does not run here without a standby"
        if body.manual:
            return f"an operator must look first: {body.manual}"
        if body.overlays_g:
            return "the overlays of its take-over are not committed yet"
        if body.dismantling:
            return "what was set up for its last standby is not taken away yet"
        if not config.auto_protect or self.site.maintenance:
            return "protecting by itself is switched off"
        if self.site.jobs.running(body.domain):
            return "a job is under way"
        if body.state != "unprotected" and not life.ledger.spoken:
            return "it has not spoken yet"
        wait_ms = config.reprotect_after_restart_ms if body.quick_return else config.reprotect_after_ms
        if body.state == "unprotected":
            wait_ms = 0
        since_s = self.site.peer(body.peer).carries_since
        if since_s is None:
            return f"{body.peer} does not answer on the replication link"
        if boottime_ms() < max(since_s * 1000, body.next_try_boottime_ms) + wait_ms:
            return "not long enough since it answers, or since the last try"
        return ""

    async def _peer_is_free(self, life: Life) -> bool:
        theirs = await self.site.ask(life.body.peer, "records", self.core.about(life), model.Records, 3.0)
        runs_there = theirs.running or theirs.qemu_alive
        return not (runs_there or theirs.maintenance) and theirs.state in model.VOID_STATES

    def _start(self, life: Life) -> None:
        body = life.body
        paths = body.paths_back if life.ledger.side == "standby" else body.disk_paths
        request = api.ProtectRequest(
            body.domain, body.peer, body.delay_ms, body.engine_asked, body.buffer_asked, paths, body.overwrite,
            rdma_device=body.rdma_asked, arbiter=body.arbiter_asked, mc=body.mc, experimental=body.experimental,
        )  # fmt: skip

        async def work(job: JobHandle) -> str:
            try:
                return await self.core.protecting.now(request, job)
            except (Exception, asyncio.CancelledError) as error:
                task = asyncio.current_task()
                if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                    raise  # an operator's, or the agent's own end
                # An error of mcft's own making too is a failure that waits for its next try, and that people are told of.
                # (Not awaited: an undo that has to be repeated may take as long as libvirtd is away.)
                self.site.spawn(self._failed_once_back(body, unforeseen(error)), f"protecting {body.domain} again failed")
                raise

        life.event("again", f"protecting again to {body.peer}")
        self.site.jobs.start("protect", body.domain, work)

    async def _failed_once_back(self, body: model.Body, error: McftError) -> None:
        """What was to be replaced comes back when the undo is over; not at all if an operator protected it anew meanwhile."""
        until_ms = boottime_ms() + LONGEST_WAIT_MS
        while (life := self.core.lives.get(body.uuid)) is None or life.body.pid != body.pid:
            if boottime_ms() > until_ms:
                return
            await asyncio.sleep(0.1)
        await self._failed(life, error)

    async def _failed(self, life: Life, error: McftError) -> None:
        """Wait longer each time. A peer that went away, or into maintenance, is no failure: it is waited for as it was before."""
        body = life.body
        body.failures += not (isinstance(error, Unreachable) or error.code == "maintenance")
        body.next_try_boottime_ms = boottime_ms() + min(FIRST_WAIT_MS * 2 ** max(body.failures - 1, 0), LONGEST_WAIT_MS)
        if body.failures >= MAX_FAILURES:
            body.manual = f"protecting again failed {body.failures} times: {error}"
            life.to_state("failed", body.manual)
        await life.save()
        life.event("again", f"protecting again failed: {error}", "warning")
