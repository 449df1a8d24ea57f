"""One protection's arbiter on one host: arming its key, claiming, watching. The rules are `mcft/arbiter`'s; this is their I/O.

Only the agent speaks to arbiters. A claim's intent is on disk before its first byte is sent, and stays there until the
claim is resolved, also over a restart of the agent (`protocol.md`, "The end of a generation").
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from mcft import api
from mcft.agent import fenceagent
from mcft.agent.etcdhttp import EtcdHttp, NoReply
from mcft.arbiter import standby as standby_rules
from mcft.arbiter.base import Ask, Claim, Intent, Side, Standing, Watch
from mcft.arbiter.etcd import Arming, EtcdClaim, EtcdWatch, Key, Read, Reply, Seen, key_name
from mcft.arbiter.fence import FenceClaim, FenceWatch
from mcft.arbiter.standby import StandbyClaim
from mcft.config import Config
from mcft.errors import Failed, Refused
from mcft.gate.loop import boottime_ms
from mcft.generations import Kind

if TYPE_CHECKING:  # so that it can be tested without libvirt
    from mcft.agent.life import Life

PROTECT_S = 5.0  # how long `protect` waits for the arbiter
KEEP_SEEN_EVERY_MS = 10_000.0
WATCHED = (Kind.ARMING, Kind.PROTECTED, Kind.ARMED)
LOOK_EVERY_S = 0.1


Silent = Callable[[], Awaitable[bool]]


class Arbiters:
    """One host's ways to its arbiters, shared by its protections."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._etcd: EtcdHttp | None = None

    @property
    def etcd(self) -> EtcdHttp:
        """Raises: Failed ("etcd-files"), Refused ("no-arbiter")."""
        if not self.config.etcd.endpoints:
            raise _not_configured(self.config.name, "etcd", "[etcd] endpoints")
        if self._etcd is None:
            self._etcd = EtcdHttp(self.config.etcd)
        return self._etcd

    async def ask(self, kind: str, peer: str, ask: Ask) -> Any:
        """One question. Raises: NoReply."""
        try:
            if kind == "etcd":
                return await self.etcd.ask(ask.what, ask.timeout_ms)
            device = self.config.fence.get(peer)
            if device is None:
                raise _not_configured(self.config.name, "fence", f"[fence.{peer}]")
            return await fenceagent.ask(device, ask.what, ask.timeout_ms)
        except (Failed, Refused) as error:
            raise NoReply(str(error), sent=False) from None

    async def refuse_unfit(self, kind: str, peer: str) -> None:
        """Before anything is made. Raises: Refused if this host can't ask that arbiter now."""
        name = self.config.name
        if kind == "standby":
            return
        # Below the prefix, as nothing else may be allowed there.
        probe = Key(key_name(self.config.etcd.prefix, "check", name))
        watch: Watch = EtcdWatch(probe, Seen()) if kind == "etcd" else FenceWatch()
        if kind == "etcd":
            _ = self.etcd
        elif peer not in self.config.fence:
            raise _not_configured(name, "fence", f"[fence.{peer}]")
        ask = watch.next(boottime_ms())
        assert ask is not None
        why = ""
        try:
            answer = await asyncio.wait_for(self.ask(kind, peer, ask), PROTECT_S)
            why = answer.text if kind == "fence" and answer.state == "unknown" else ""
        except NoReply as error:
            why = str(error)
        except TimeoutError:
            why = f"no answer within {PROTECT_S:g} s"
        if why:
            raise Refused(
                "arbiter-away", f"{name} does not reach the arbiter ({kind})", why,
                "without it no loss could be decided: mend it, or choose another with --arbiter",
            )  # fmt: skip

    async def close(self) -> None:
        if self._etcd is not None:
            await self._etcd.close()


def _not_configured(host: str, kind: str, where: str) -> Refused:
    why, so = f"{where} is not in its configuration", "add it there, and restart its agent"
    return Refused("no-arbiter", f"{host} has no arbiter {kind}", why, so)


class Arbitration:
    """The arbiter of one `Life`."""

    def __init__(self, life: Life) -> None:
        self.life = life
        self.current: Claim | None = None
        self.watch: Watch | None = None
        self._kept_ms = float("-inf")

    @property
    def kind(self) -> str:
        return self.life.body.arbiter

    @property
    def side(self) -> Side:
        return self.life.ledger.side

    # ---- arming ----

    async def arm(self) -> None:
        """On the primary: make the key and read it back. Raises: Failed ("arbiter")."""
        body = self.life.body
        if self.kind != "etcd":
            return
        name = key_name(self.life.site.config.etcd.prefix, body.uuid, body.pid)
        arming = Arming(name, body.g, secrets.token_hex(8), Seen())
        deadline_ms = boottime_ms() + PROTECT_S * 1000
        while not arming.key.name and not arming.failed:
            ask = arming.next(boottime_ms())
            assert ask is not None
            try:
                arming.answered(ask, await self._ask(ask), boottime_ms())
            except NoReply as error:
                if boottime_ms() > deadline_ms:
                    raise Failed("arbiter", "etcd did not take the key of this protection", str(error)) from None
                await asyncio.sleep(LOOK_EVERY_S)
        if arming.failed:
            raise Failed("arbiter", "etcd did not take the key of this protection", arming.failed)
        body.arbiter_key, body.arbiter_seen = arming.key, arming.seen
        await self.life.save()

    async def follow(self, key: Key, seen: Seen) -> str:
        """On the standby: see the key that the primary made with own eyes, and keep it. Empty, or why not."""
        if self.kind != "etcd":
            return ""
        try:
            reply: Reply = await self._ask(Ask(0, Read(key.name), PROTECT_S * 1000))
        except NoReply as error:
            return f"etcd does not answer here: {error}"
        if doubt := seen.doubt(reply):
            return doubt
        if (reply.value, reply.mod_revision) != (key.value, key.mod_revision):
            return f"etcd has another key {key.name} here: {reply.value}"
        self.life.body.arbiter_key, self.life.body.arbiter_seen = key, seen.after(reply)
        await self.life.save()
        return ""

    # ---- claiming ----

    def may_claim(self) -> str:
        """Empty, or why this side can't claim by this arbiter now."""
        body = self.life.body
        if self.kind == "standby":
            return standby_rules.may_claim(self.side)
        if self.kind == "etcd" and not body.arbiter_key.name:
            return "no key was made yet"
        return body.arbiter_trouble if body.claim is None else ""

    async def forget_if_void(self) -> None:
        """At the agent's start. A host that was off itself may have been switched off *by a winner*: that the other is off by
        then tells nothing. So a fencing that was begun is void once this side's QEMU is gone."""
        if self.kind == "fence" and self.pending and not self.life.qemu_alive():
            await self._forget_claim()

    @property
    def pending(self) -> bool:
        """A claim may have been sent, and is not resolved."""
        return self.life.body.claim is not None

    async def withdraw(self) -> bool:
        """Give the claim up, if nothing of it can win any more. True if none stands now."""
        if not self.pending:
            return True
        if self.current is None or not self.current.withdraw():
            return False
        await self._forget_claim()
        return True

    async def claim(
        self, *, let_go: str = "", on_wait: Callable[[str], None] = lambda _why: None, silent: Silent | None = None
    ) -> Standing | None:
        """Claim g, or go on with a claim that was begun. None: it was withdrawn meanwhile. Raises what the store raises.

        let_go: the other side's word that it never claims. on_wait: told why it takes long, whenever that changes.
        silent: whether the other side still is; asked before each `off` that would be sent.
        """
        body = self.life.body
        if begun := body.claim is not None:
            intent = body.claim
        else:
            intent = Intent(secrets.token_hex(16), self.side, body.g)
            if self.kind != "standby":
                body.claim = intent
                await self.life.save()
        assert intent is not None
        claim = self.current = self._make(intent, let_go, begun)
        claim.made_durable()
        told = ""
        while claim.standing is Standing.OPEN:
            if self.current is not claim:
                return None
            if isinstance(claim, FenceClaim) and silent is not None and not await silent() and claim.withdraw():
                await self._forget_claim()
                return None
            ask = claim.next(boottime_ms())
            if ask is None:
                await asyncio.sleep(min(max((claim.wake_ms - boottime_ms()) / 1000, 0.001), LOOK_EVERY_S))
                continue
            try:
                claim.answered(ask, await self._ask(ask), boottime_ms())
            except NoReply as error:
                claim.no_answer(ask, sent=error.sent, now_ms=boottime_ms())
                if claim.reason and claim.reason != told:
                    told = claim.reason
                    on_wait(f"{claim.reason} ({error})")
        await self._resolved(claim)
        return claim.standing

    def _make(self, intent: Intent, let_go: str, begun: bool) -> Claim:
        body = self.life.body
        if self.kind == "etcd":
            return EtcdClaim(intent, body.arbiter_key, body.arbiter_seen, sent_before=begun)
        if self.kind == "fence":
            device = self.life.site.config.fence.get(body.peer)
            delay_ms = float(device.delay_ms) if device else 0.0
            return FenceClaim(intent, now_ms=boottime_ms(), delay_ms=delay_ms, let_go=let_go, sent_before=begun)
        return StandbyClaim(intent)

    async def _resolved(self, claim: Claim) -> None:
        """WON and LOST are recorded by the caller; the intent stays until then (`forget_resolved`)."""
        body = self.life.body
        if isinstance(claim, EtcdClaim):
            body.arbiter_seen = claim.seen
            if claim.standing is Standing.UNKNOWN:
                body.arbiter_trouble = body.arbiter_trouble or claim.reason
                if claim.void:
                    body.claim = None
            await self.life.save()

    async def _forget_claim(self) -> None:
        self.current = None
        self.life.body.claim = None
        await self.life.save()

    def forget_resolved(self) -> None:
        """What the claim decided is about to be a record: the body that is written with it holds no claim any more."""
        self.current, self.life.body.claim = None, None

    async def _ask(self, ask: Ask) -> Any:
        return await self.life.site.arbiters.ask(self.kind, self.life.body.peer, ask)

    # ---- watching ----

    def start_watch(self) -> None:
        """From arming on, while a generation may have to be decided."""
        if self.kind == "standby" or self.watch is not None:
            return
        body = self.life.body
        if self.kind == "etcd":
            self.watch = EtcdWatch(body.arbiter_key, body.arbiter_seen, body.arbiter_trouble)
        else:
            self.watch = FenceWatch()
        self.life.site.spawn(self._watch(self.watch), f"watch the arbiter of {body.domain}")

    async def _watch(self, watch: Watch) -> None:
        try:
            while self.life.ledger.newest in WATCHED:
                ask = watch.next(boottime_ms())
                if ask is None:
                    await asyncio.sleep(LOOK_EVERY_S)
                    continue
                try:
                    watch.answered(ask, await self._ask(ask), boottime_ms())
                except NoReply as error:
                    watch.no_answer(ask, sent=error.sent, now_ms=boottime_ms())
                await self._keep(watch)
        finally:
            if self.watch is watch:
                self.watch = None

    async def _keep(self, watch: Watch) -> None:
        """What was seen is durable within 10 s, trouble at once."""
        body = self.life.body
        if not isinstance(watch, EtcdWatch):
            return
        trouble = watch.trouble and not body.arbiter_trouble
        if trouble:
            body.arbiter_trouble = watch.trouble
            self.life.event(
                "arbiter", f"{watch.trouble}: it can't decide any more; mcft unprotect and protect {body.domain} anew", "alarm"
            )  # fmt: skip
        newer = watch.seen.revision > body.arbiter_seen.revision and boottime_ms() - self._kept_ms > KEEP_SEEN_EVERY_MS
        if trouble or newer:
            body.arbiter_seen, self._kept_ms = watch.seen, boottime_ms()
            await self.life.save()

    def health(self) -> str:
        """Empty, or why the arbiter could not decide now, as this host sees it."""
        if self.kind == "standby" or self.watch is None:
            return ""
        if self.watch.reachable(boottime_ms()):
            return ""
        return self.watch.trouble or self.watch.said or "no answer"

    def status(self, peer_ok: bool | None) -> api.ArbiterStatus:
        """For `mcft status`. peer_ok: what the other host says of its own way to the arbiter."""
        if self.kind == "standby":
            return api.ArbiterStatus()
        last = self.watch.last_ok_ms if self.watch is not None else None
        age = None if last is None else round(boottime_ms() - last, 1)
        trouble = self.health()
        return api.ArbiterStatus(self.kind, not trouble, age, trouble or None, peer_ok)

    async def delete_key(self, key: Key) -> None:
        """Best effort: nobody will ask for it any more."""
        if self.kind == "etcd" and key.name:
            await self.life.site.arbiters.etcd.delete(key.name)
