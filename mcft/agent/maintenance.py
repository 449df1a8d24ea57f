"""`mcft maintenance on|off`: nothing protected depends on this host until it is over.

What leads here goes to its standby by a planned switch; what follows here is let go, and its primary goes on alone
without anybody's word. Nothing is protected from this host or to it meanwhile. Durable; at a shutdown only until the next boot.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from typing import TYPE_CHECKING

import msgspec

from mcft import api
from mcft.agent import model
from mcft.agent.hook import boot_id
from mcft.agent.jobs import JobHandle
from mcft.errors import Failed, McftError, NotFound, Refused

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.core import Core
    from mcft.agent.life import Life
    from mcft.agent.site import Site

log = logging.getLogger(__name__)
META = "maintenance"  # in the store: "on", "off", or "boot ID": on during that boot
GO_ALONE_S = 45.0
LET_GO_S = 20.0


async def load(site: Site) -> None:
    """What was last said, after a restart of the agent or the host."""
    said = await site.store.meta(META)
    site.maintenance = said in ("on", f"boot {boot_id()}")


def refuse(host: str) -> Refused:
    """Nothing is protected from this host or to it now."""
    return Refused(
        "maintenance", f"{host} is in maintenance", "nothing is protected from it or to it meanwhile",
        f"on {host}: mcft maintenance off",
    )  # fmt: skip


async def begin(core: Core, request: api.MaintenanceRequest) -> api.JobBody:
    """The job; its `domain` is this host's name. `off` cancels an `on` that is still at work."""
    name = core.site.config.name
    running = core.jobs.running(name)
    if running is not None and running.kind == "maintenance" and not request.on:
        await core.jobs.cancelled(running.id)

    async def work(job: JobHandle) -> str:
        return await (_on if request.on else _off)(core, job, request.for_shutdown)

    return core.jobs.start("maintenance", name, work, request.key)


async def _off(core: Core, _job: JobHandle, for_shutdown: bool) -> str:
    site = core.site
    if for_shutdown and await site.store.meta(META) == "on":
        return f"{site.config.name} stays in maintenance, as an operator said"
    await site.store.set_meta(META, "off")
    site.maintenance = False
    return f"{site.config.name} is not in maintenance; what can be is protected again by itself"


async def _on(core: Core, job: JobHandle, for_shutdown: bool) -> str:
    """Raises: Failed ("maintenance-left") naming each domain that still depends on this host; the others have gone."""
    site = core.site
    name = site.config.name
    if not for_shutdown or await site.store.meta(META) != "on":
        await site.store.set_meta(META, f"boot {boot_id()}" if for_shutdown else "on")
    site.maintenance = True
    done, left = [], []
    for life in sorted(core.lives.values(), key=lambda life: life.body.domain):
        try:
            if said := await _leave(core, life, job):
                done.append(said)
        except McftError as error:
            log.warning("maintenance: %s: %s", life.body.domain, error)
            left.append(f"{life.body.domain}: {error}")
    if left:
        raise Failed(
            "maintenance-left", f"{name} is in maintenance, but not free: " + " ".join(left),
            f"done: {', '.join(done)}" if done else "", "mend that, then again: mcft maintenance on (or: mcft maintenance off)",
        )  # fmt: skip
    return f"{name} is in maintenance: " + ("; ".join(done) or "nothing protected depended on it")


async def _leave(core: Core, life: Life, job: JobHandle) -> str:
    """One protection off this host; what was done, "" if nothing had to be. Raises what is in the way."""
    domain, uuid = life.body.domain, life.body.uuid
    while (busy := core.jobs.running(domain)) is not None:
        job.step(f"{domain}: wait for its {busy.kind} ({busy.step})")
        await core.jobs.wait(busy.id, 5.0)
    if (now := core.lives.get(uuid)) is None:
        return ""
    life, body = now, now.body
    if body.role == "standby":
        return await _let_go(core, life, job)
    if not life.qemu_alive():
        return ""  # down, or not here any more
    if body.state != "protected":
        raise Refused(
            "not-movable", f"it is {body.state} here and has no standby to go to", body.reason,
            f"shut it down, or first: mcft protect {domain} --to {body.peer}",
        )  # fmt: skip
    life.event("maintenance", f"{core.site.config.name} goes into maintenance: {domain} goes to {body.peer}")
    switch = await core.act(uuid, "failover", api.ActRequest())
    await core.jobs.ended(switch.id, lambda now: job.step(f"{domain}: {now.step}"))
    return f"{domain} runs on {body.peer}"


async def _let_go(core: Core, life: Life, job: JobHandle) -> str:
    """A copy here: its primary goes on without it, and only then it is gone."""
    body = life.body
    if body.state in model.VOID_STATES and not life.qemu_alive():
        return ""
    job.step(f"{body.domain}: {body.peer} goes on without the copy here")
    asked = msgspec.structs.replace(core.about(life), detail=secrets.token_hex(8))
    await core.site.ask(body.peer, "go-alone", asked, model.Answer, GO_ALONE_S)
    try:
        async with asyncio.timeout(LET_GO_S):
            # Its gate goes last: after that the end is written down as well, and this host may go down.
            while life.qemu_alive() or body.state not in model.VOID_STATES or os.path.exists(life.gate.state_path):
                if core.lives.get(body.uuid) is not life:
                    break
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise Failed("copy-stays", f"{body.peer} let go of its copy here, but that does not end", body.reason) from None
    return f"{body.domain} goes on alone on {body.peer}"


async def answer(core: Core, peer: str, body: bytes) -> model.Answer:
    """The standby's host goes into maintenance: go on without it. Protected again by itself once that is over.

    Raises: NotFound, Refused, TimedOut (muted then). A protecting that is still under way is cancelled.
    """
    about = msgspec.json.decode(body, type=model.About)
    life = core.lives.get(about.uuid)
    if life is None or life.body.pid != about.pid or life.body.peer != peer or life.body.role != "primary":
        raise NotFound("no-such-instance", f"{core.site.config.name} does not lead this instance of {about.domain}")
    why = f"{peer} goes into maintenance"
    running = core.jobs.running(life.body.domain)
    if running is not None and running.kind == "protect":
        life.event("maintenance", f"{why}: protecting is cancelled")
        await core.jobs.cancelled(running.id)
        return model.Answer("cancelled", about.g)

    async def work(_job: JobHandle) -> str:
        await core.as_primary(life).go_alone(why)
        return why

    job = core.jobs.start("solo", life.body.domain, work, f"go-alone-{about.pid}-{about.detail}")
    await core.jobs.ended(job.id)
    return model.Answer("gone-alone", about.g)
