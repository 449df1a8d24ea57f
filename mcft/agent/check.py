"""`mcft check`: everything that `protect` would refuse or warn of, and what it would cost; nothing is touched.

Where `protect` has a refusal, that very function is called and what it raises becomes a finding. What only the peer can
know, its agent answers (`checkpeer.py`). Findings stand in the order in which `protect` would meet them.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
import xml.etree.ElementTree as ET
from functools import partial
from typing import TYPE_CHECKING

from msgspec import structs

from mcft import __version__, api, netbuffer, streams
from mcft.agent import buffers, checkpeer, diskfiles, domainxml, mccheck, model, prediction, rdma
from mcft.agent.findings import Findings, exit_code
from mcft.engines import mc, tcg
from mcft.errors import Failed, McftError, NotFound, Refused
from mcft.qmp_passthrough import Executor

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.core import Core
    from mcft.agent.protection import Primary
    from mcft.libvirt_bridge import DomainInfo

PEER_S = 20.0
LINK_S, POLL_S = 2.5, 0.1  # a hello goes over each link every second
SKEW_S = 2.0
UNBUFFERED = "after a take-over somebody may have read there what the guest does not know it wrote"


# ---- refusals that `protect` shares ----


async def refuse_engine(life: Primary) -> None:
    """Raises: Refused ("engine", "libvirt-uri") if the domain's QEMU can't be checkpointed, or not by this way to it."""
    checkpeer.refuse_remote_libvirt(life.site.config.name, life.site.config.libvirt_uri, life.body.engine)
    if refusal := await life.engine.unsupported(life.qmp):
        raise Refused("engine", f"{life.body.domain} can't be protected", refusal)


async def running_qemu(qmp: Executor) -> str:
    """The version of the QEMU that runs the guest: it may be older than the installed one."""
    version = (await qmp.execute("query-version"))["qemu"]
    return f"{version['major']}.{version['minor']}.{version['micro']}"


def refuse_older(ours: str, theirs: str, domain: str, peer: str) -> None:
    """Raises: Refused ("older-qemu") if the peer's QEMU is older: what a newer one sends, it may not understand."""
    if ours and theirs and _number(theirs) < _number(ours):
        raise Refused(
            "older-qemu", f"{domain} runs on QEMU {ours}, and {peer} has the older {theirs}",
            "a guest goes from an older QEMU to a newer one, not the other way", f"bring QEMU on {peer} to {ours}",
        )  # fmt: skip


def _number(version: str) -> tuple[int, ...]:
    """Major and minor: within a minor version QEMU keeps its stream as it is."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


async def refuse_busy(qmp: Executor, domain: str) -> None:
    """Raises: Refused ("block-job", "migrating") while somebody else works on the domain's disks or moves it."""
    jobs = [f"{job.get('type', 'job')} on {job.get('device', '?')}" for job in await qmp.execute("query-block-jobs")]
    if jobs:
        raise Refused(
            "block-job", f"block jobs run on {domain}: {', '.join(jobs)}", "they and the replication would change one chain",
            f"wait until they end, or end them (virsh blockjob {domain} DISK --abort)",
        )  # fmt: skip
    status = (await qmp.execute("query-migrate")).get("status")
    # `colo` alone says nothing: it is what a stream that ended a moment ago still shows.
    if status in prediction.BUSY and status != "colo":
        raise Refused(
            "migrating", f"a migration of {domain} is under way ({status})", "QEMU does one at a time",
            # Somebody's `migrate_cancel` under checkpointing leaves QEMU 11.1 so for ever (seen in the lab); the guest runs on.
            f"if it stays so, QEMU can't leave it: shut {domain} down and start it"
            if status == "cancelling" else f"wait until it ends, or virsh domjobabort {domain}",
        )  # fmt: skip


# ---- the check ----


class Checker:
    """One check of one domain towards one peer."""

    def __init__(self, core: Core, request: api.ProtectRequest) -> None:
        self.core, self.site, self.request = core, core.site, request
        self.config, self.peer = core.site.config, request.to
        self.findings = Findings()
        self.life: Primary | None = None  # None: it can't be protected because of a device
        self.qemu = ""

    async def run(self, info: DomainInfo) -> api.Check:
        """Look at both hosts. Raises what no finding can say: libvirt's silence."""
        predicted = None
        if await self._may_begin(info):
            predicted = await self._look(info)
        found = self.findings.found
        return api.Check(self.config.name, info.name, info.uuid, self.peer, exit_code(found), found, predicted)

    async def _may_begin(self, info: DomainInfo) -> bool:
        """Whether there is anything to look at: it is not protected yet, by nobody, and it runs."""
        life = self.core.lives.get(info.uuid)
        try:
            if life is not None and self.core.protecting.already(life, self.request):
                self.findings.ok("already", f"{info.name} is protected to {self.peer} already: `protect` would do nothing")
                return False
            self.life = await self.core.protecting.candidate(self.request, 1)
        except Refused as refusal:
            if refusal.code != "device-not-protectable":
                self.findings.refuse(refusal)
                return False
        return True

    async def _look(self, info: DomainInfo) -> api.Prediction | None:
        live = await self.site.host.xml(info.uuid)
        for refusal in domainxml.unprotectable(live):
            self.findings.refuse(refusal)
        if self.life is None:
            # The device has to go first; what else there is to say is said all the same, as far as it needs no QEMU.
            self._see_disks(live)
            await self._see_nics(domainxml.nics(live, domainxml.uses_vhost(info.qemu_pid)))
            self._see_outputs(live)
            return None
        measuring = asyncio.create_task(self._predict(self.life))
        try:
            await self._see_domain(self.life, live)
            await self._see_rdma(self.life)
            await self._see_peer(self.life)
            await self._see_links()
            self._see_outputs(live)
            await self._see_rest(self.life, live)
            return await measuring
        finally:
            measuring.cancel()

    # ---- this host ----

    async def _see_domain(self, life: Primary, live: str) -> None:
        findings, name = self.findings, life.body.domain
        self.qemu = await running_qemu(life.qmp)
        life.body.engine = engine = await mccheck.choose_engine(life.qmp, self.request.engine, self.config)
        says = f"{name} runs on QEMU {self.qemu}, which can checkpoint it ({engine})"
        await findings.tried(refuse_engine(life), "engine", says)
        await findings.tried(refuse_busy(life.qmp, name), "idle", "no block job and no migration is under way")
        await self._see_nics(life.body.nics)
        if life.body.engine == "mc":
            await self._see_mc(life, live)
        else:
            self._see_disks(live)
        if life.body.engine != "mc" and not domainxml.disk_refusals(live):
            disks = await findings.tried(self.core.protecting.disks_of(life))
            if disks is not None:
                life.body.disks = disks
                findings.ok("disks", f"disks that follow: {', '.join(d.target for d in disks) or 'none'}")
        proof = self.site.hook.prove(self.config.name, domainxml.machine(life.body.xml))
        await findings.tried(proof, "hook", f"libvirt calls mcft's hook on {self.config.name}")

    async def _see_mc(self, life: Primary, live: str) -> None:
        """What engine mc needs besides; `mccheck.refuse` raises the first of these."""
        refusals = [*mccheck.disk_refusals(live), *await mccheck.nic_refusals(live, life.qmp)]
        for refusal in refusals:
            self.findings.refuse(refusal)
        for look in (partial(mccheck.refuse_tls, self.config), partial(mc.refuse_transport, life.body.mc, self.config.name)):
            try:
                look()
            except Refused as refusal:
                self.findings.refuse(refusal)
        if not refusals:
            self.findings.ok("mc", "no disk of the host's is written, and its NICs can follow")
        if (finding := await asyncio.to_thread(mccheck.kernel_finding)) is not None:
            self.findings.warn("sock-destroy", *finding)
        if life.body.mc.transport == "rdma":
            why = "an RDMA stream has no socket that could be broken on this side"
            says = "a take-over after a silent loss waits until QEMU gives up, 70 s or more"
            self.findings.warn("mc-rdma", says, why, "--transport tcp")
        if not mccheck.second_monitor(live):
            why = "this QEMU can't add a monitor while it runs"
            so = "start the domain with a second monitor (docs/engines.md), and they pass without the agent too"
            self.findings.warn("mc-monitor", "packets wait while the agent is down: QEMU is asked through libvirt", why, so)

    def _see_disks(self, live: str) -> None:
        for refusal in domainxml.disk_refusals(live):
            self.findings.refuse(refusal)

    async def _see_nics(self, nics: list[netbuffer.Nic]) -> None:
        asked = self.core.protecting.buffer_asked(self.request)
        body = self.life.body if self.life is not None else None
        ways: set[netbuffer.Way] = set()
        nics = [nic for nic in nics if nic.kind not in ("hostdev", "vhostuser", "vdpa")]  # refused as a device already
        for these in [nics] if asked == "qemu" and nics else [[nic] for nic in nics]:
            try:
                if body is not None and body.engine == "mc":
                    ways.add(await mccheck.choose_buffer(asked, structs.replace(body, nics=these)))
                else:
                    ways.add(await buffers.choose(asked, these))
            except Refused as refusal:
                self.findings.refuse(refusal)
        if ways == {"none"}:
            why = "a take-over goes back behind what was sent"
            self.findings.warn("unsafe", "nothing is buffered (netbuffer none)", why, "--netbuffer filter")
        elif ways:
            names = ", ".join(nic.target for nic in nics)
            self.findings.ok("nics", f"its NICs can be buffered by {' and '.join(sorted(ways))}: {names}")

    def _see_outputs(self, live: str) -> None:
        for code, what in domainxml.outputs(live):
            says, why, so = f"the domain has {what}, which is not buffered", UNBUFFERED, "fine if nobody acts on what it says"
            if code == "nvram":
                # QEMU (hw/block/pflash_cfi01.c) keeps them in memory, and writes the whole file when a loaded guest runs.
                says = f"the domain has {what}, copied when it is protected"
                why = "changes follow with the memory; the file is written after each checkpoint, not with it"
                so = "fine if its firmware is not updated under protection"
            self.findings.warn(f"unbuffered-{code}", says, why, so)

    # ---- the peer ----

    async def _see_peer(self, life: Primary) -> None:
        request = await self.findings.tried(self._prepare(life))
        if request is None:
            return
        ask = checkpeer.Ask(secrets.token_hex(8), request)
        before_s = time.time()
        try:
            theirs = await self.site.ask(self.peer, "check", ask, checkpeer.Found, PEER_S)
        except NotFound as error:
            if error.code != "no-such-verb":
                raise
            says = f"the mcft on {self.peer} can't be asked what it has"
            self.findings.warn("old-peer", says, "it is older", f"bring it to {__version__}")
            return
        except McftError as error:
            self.findings.refuse(error)
            return
        self.findings.found.extend(theirs.findings)
        self._compare(life, theirs, before_s, time.time())

    async def _see_rdma(self, life: Primary) -> None:
        await self.findings.tried(life.choose_rdma())
        if life.body.rdma:
            self.findings.ok("rdma-here", f"this host has an RDMA device with the address {life.body.rdma.local}")

    async def _prepare(self, life: Primary) -> model.Prepare:
        """What `protect` would send, without keys and ports. Raises: Refused ("tls-missing"), Unreachable."""
        body, config = life.body, self.config
        about = model.About(body.uuid, domain=body.domain)
        theirs = await self.site.ask(self.peer, "records", about, model.Records, 5.0)
        highest = await self.site.store.highest_generation(body.uuid)
        return model.Prepare(
            body.uuid, body.domain, "", max(highest, theirs.highest_g) + 1, "", body.delay_ms, body.engine, config.loss_ms,
            await self.site.host.xml(body.uuid, migratable=True), body.xml, body.autostart, body.disks, [],
            body.disk_paths, body.overwrite, qemu=self.qemu,
            tls="off" if body.engine == "mc" else streams.offer(config.tls, config.qemu_pki_dir, config.name),
            mc=body.mc, files=await diskfiles.of_domain(life),
            nvram=diskfiles.read_nvram(body.nvram) if body.nvram else None,
            rdma_address=body.rdma.peer if body.rdma else "", rdma_required=rdma.required(life.rdma_wish()), arbiter=body.arbiter,
        )  # fmt: skip

    def _compare(self, life: Primary, theirs: checkpeer.Found, before_s: float, after_s: float) -> None:
        findings, domain = self.findings, life.body.domain
        qemu = theirs.versions.get("qemu", "")
        try:
            refuse_older(self.qemu, qemu, domain, self.peer)
        except Refused as refusal:
            findings.refuse(refusal)
        else:
            if _number(qemu) > _number(self.qemu):
                why = "a guest goes from an older QEMU to a newer one, not the other way"
                findings.warn("newer-qemu", f"{self.peer} has the newer QEMU {qemu}: no way back until this host has it too", why)
            else:
                findings.ok("qemu", f"QEMU {self.qemu} here and {qemu} on {self.peer}")
        if theirs.versions.get("mcft") != __version__:
            says = f"mcft is {__version__} here and {theirs.versions.get('mcft')} on {self.peer}"
            findings.warn("mcft-versions", says, "", "bring both to one")
        if warning := cpu_warning(ET.fromstring(life.body.xml), checkpeer.host_cpu(), (theirs.cpu, theirs.cpu_flags)):
            so = "name a CPU model that both have"
            findings.warn("cpu-differs", f"the CPUs differ: {warning}", "the domain's CPU is the host's own", so)
        self._see_clock(clock_skew(before_s, after_s, theirs.time_s))
        if not theirs.lan_check:
            why = "cut off from the LAN it might take over although nobody can reach it"
            says = f"{self.peer} has nothing to tell by whether its LAN works"
            findings.warn("lan-check", says, why, "set [lan] check there")

    def _see_clock(self, skew_s: float) -> None:
        if abs(skew_s) > SKEW_S:
            why = "mcft itself goes by CLOCK_BOOTTIME only, but journals and certificates go by the wall clock"
            says = f"the clocks of both hosts are {abs(skew_s):.0f} s apart"
            self.findings.warn("clock", says, why, "set them (NTP)")
        else:
            self.findings.ok("clock", "the clocks of both hosts agree")

    # ---- links ----

    async def _see_links(self) -> None:
        link, peer = self.site.peer(self.peer), self.config.peers[self.peer]
        first = peer.addresses[0]
        deadline = time.monotonic() + LINK_S
        while link.carries_since is None and link.reachable and time.monotonic() < deadline:
            await asyncio.sleep(POLL_S)
        if link.carries_since is not None:
            self.findings.ok("replication-link", f"{self.peer} answers on the replication link ({first})")
        elif link.reachable:
            says = f"{self.peer} does not answer on the replication link ({first})"
            why = "checkpoints go over the first address of [peers]"
            self.findings.refuse(Refused("replication-link", says, why, "mend that link"))
        silent = [a for a, at_s in link.last_ok.items() if at_s is None and a != first]
        if silent:
            says = f"{self.peer} does not answer on {', '.join(silent)}"
            self.findings.warn("link", says, "keepalives go over it", "mend that link")
        if min(len(self.config.listen_addresses), len(peer.addresses)) < 2:
            why = "when it is cut, nobody can tell a dead host from a dead link"
            self.findings.warn("one-link", "keepalives have one link only", why, "name a second address in both files")
        if {"0.0.0.0", "::"} & set(self.config.listen_addresses):
            why = "QEMU would listen for checkpoints everywhere"
            self.findings.warn("listen", "[listen] addresses names no address", why, "name the replication link's first")

    # ---- what is known beforehand ----

    async def _see_rest(self, life: Primary, live: str) -> None:
        domain, root = life.body.domain, ET.fromstring(live)
        if await tcg.translates(life.qmp):
            self.findings.warn(
                "no-kvm", f"{domain} runs without KVM", "what a standby executed just before a loss may be stale",
                "use KVM for what matters",
            )  # fmt: skip
        self._see_confinement(life, root)
        arbiter = life.body.arbiter
        reached = self.site.arbiters.refuse_unfit(arbiter, self.peer)
        answers = ", which answers" if arbiter != "standby" else ""
        await self.findings.tried(reached, "arbiter-answers", f"the arbiter is {arbiter}{answers}")
        if arbiter == "standby":
            self.findings.warn(
                "arbiter", f"if {self.peer} dies, {domain} is unreachable until `mcft solo {domain}`",
                "the arbiter is 'standby': the primary can't tell a dead standby from a cut",
            )  # fmt: skip

    def _see_confinement(self, life: Primary, root: ET.Element) -> None:
        paths = [life.body.disk_paths.get(disk.target, disk.path) for disk in life.body.disks]
        for says, why, so in confinement(root, paths, self.peer):
            self.findings.warn("confinement", says, why, so)

    async def _predict(self, life: Primary) -> api.Prediction:
        address = self.config.peers[self.peer].addresses[0]
        interface = await asyncio.to_thread(prediction.interface_to, address)
        carries, why = prediction.limit(self.config.max_bandwidth_bytes, interface, prediction.link_speed(interface))
        try:
            rate, why_not = await prediction.dirty_rate(life.qmp), ""
        except Failed as error:
            rate, why_not = None, ": ".join(part for part in (error.message, error.reason) if part)
        return prediction.predict(rate, self.core.protecting.delay_asked_ms(self.request), carries, why, why_not)


# ---- pure ----


def clock_skew(before_s: float, after_s: float, theirs_s: float) -> float:
    """How far the peer's wall clock is ahead of ours, at least: it was read at some moment between before and after."""
    if before_s <= theirs_s <= after_s:
        return 0.0
    return theirs_s - after_s if theirs_s > after_s else theirs_s - before_s


def confinement(root: ET.Element, disks: list[str], peer: str) -> list[tuple[str, str, str]]:
    """(what, why, what to do) for what a policy may deny QEMU there: libvirt's profile of a domain names its disks only."""
    models = {label.get("model", "") for label in root.iterfind("./seclabel")}
    paths = sorted({f"{os.path.dirname(disk)}/*.mcft-*" for disk in disks})
    found = []
    if "apparmor" in models:
        says = f"AppArmor would deny QEMU on {peer} what mcft makes beside the disks: {', '.join(paths)}"
        so = f"there, in /etc/apparmor.d/local/abstractions/libvirt-qemu: {' '.join(f'{path} rwk,' for path in paths)}"
        found.append((says, "libvirt's profile of a domain names its disks only", so))
    if "selinux" in models:
        says = f"SELinux confines QEMU, with which mcft was not tried: on {peer} it opens {', '.join(paths)}"
        found.append((says, "they get the label of their disk", "if protect fails there, look at the audit log"))
    return found


def cpu_warning(root: ET.Element, ours: tuple[str, str], theirs: tuple[str, str]) -> str:
    """Empty, or how the CPUs differ where the guest sees the host's own. (model name, flags) of each."""
    element = root.find("./cpu")
    if root.get("type") != "kvm" or element is None or element.get("mode") not in ("host-passthrough", "maximum"):
        return ""
    if ours == theirs or not theirs[0]:
        return ""
    lacking = sorted(set(ours[1].split()) - set(theirs[1].split()))
    return f"{ours[0]} here, {theirs[0]} there" + (f", which lacks {', '.join(lacking[:8])}" if lacking else "")
