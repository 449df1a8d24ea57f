"""What engine `mc` refuses and chooses, and how the agent carries a gate's commands: each by a FAKE QEMU or libvirt."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from msgspec import structs

from mcft import api, config
from mcft.agent import mccheck, mcnet, relay
from mcft.agent.copy import Copy
from mcft.agent.model import Body
from mcft.agent.protecting import Protecting
from mcft.agent.statusview import protection
from mcft.config import Config
from mcft.engines import mc
from mcft.errors import Failed, Refused, Usage
from mcft.generations import Kind, Ledger
from mcft.netbuffer import Nic
from mcft.streams import Endpoint

ALL = ("xbzrle", "rdma-pin-all", "auto-converge", "mc", "mc-net-disable", "mc-disk-disable", "mc-rdma-copy", "rdma-keepalive")
QEMU = "xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
TAP = Nic("vnet0", "52:54:00:00:00:01", "hostnet0", "virtio", True, "bridge")


class FakeQmp:
    """That QEMU's answers to what it is asked about itself."""

    def __init__(self, *capabilities: str, **answers: Any) -> None:
        self.answers = {
            "query-migrate-capabilities": [{"capability": name, "state": False} for name in capabilities],
            "query-commands": [{"name": "migrate"}, {"name": "migrate-set-mc-delay"}], **answers,
        }  # fmt: skip
        self.sent: list[tuple[str, dict[str, Any]]] = []

    async def execute(self, command: str, **arguments: Any) -> Any:
        self.sent.append((command, arguments))
        answer = self.answers.get(command, {})
        if isinstance(answer, Exception):
            raise answer
        return answer


# ---- which engine, which capabilities ----


async def test_auto_asks_qemu() -> None:
    """Where neither the operator nor the configuration has said it."""
    assert await mccheck.choose_engine(FakeQmp(*ALL), "auto", Config()) == "mc"
    assert await mccheck.choose_engine(FakeQmp("x-colo"), "auto", Config()) == "colo"
    assert await mccheck.choose_engine(FakeQmp(*ALL), "colo", Config()) == "colo"
    assert await mccheck.choose_engine(FakeQmp(*ALL), "auto", Config(engine="colo")) == "colo"
    assert await mccheck.choose_engine(FakeQmp(*ALL), "mc", Config(engine="colo")) == "mc"


def test_what_is_switched_on() -> None:
    """mc-disk-disable is always on where it exists; an older series has none. Fails if one is left to QEMU's default."""
    rows = {row["capability"]: row["state"] for row in mc.wanted(api.McOptions(), ALL)}
    assert {name for name, on in rows.items() if on} == {"mc", "mc-net-disable", "mc-disk-disable"}
    assert rows["mc-rdma-copy"] is False and rows["rdma-pin-all"] is False
    older = {row["capability"] for row in mc.wanted(api.McOptions(), ("mc", "mc-net-disable")) if row["state"]}
    assert older == {"mc", "mc-net-disable"}
    assert not {row["capability"]: row["state"] for row in mc.wanted(api.McOptions(), ALL, qemu_buffers=True)}["mc-net-disable"]


def test_the_earlier_spelling() -> None:
    rows = mc.wanted(api.McOptions("rdma", rdma_pin_all=True), ("mc", "mc-net-disable", "x-rdma-pin-all"))
    assert {"capability": "x-rdma-pin-all", "state": True} in rows


@pytest.mark.parametrize(("option", "name"), [("rdma_copy", "mc-rdma-copy"), ("rdma_keepalive", "rdma-keepalive")])
async def test_a_lacking_capability_is_named(option: str, name: str) -> None:
    engine = mc.Mc(api.McOptions("rdma", **{option: True}))
    qmp = FakeQmp("mc", "mc-net-disable")
    assert name in await engine.unsupported(qmp)
    with pytest.raises(Refused, match=name):
        await engine.start(qmp, Endpoint("192.0.2.1", 1), 100, 1)
    assert "migrate-set-capabilities" not in [command for command, _ in qmp.sent]


async def test_a_refused_migrate_takes_the_capabilities_back() -> None:
    qmp = FakeQmp(*ALL, migrate=Failed("qmp", "Parameter 'uri' expects a valid migration protocol"))
    with pytest.raises(Failed):
        await mc.Mc().start(qmp, Endpoint("192.0.2.1", 1), 100, 1)
    last = [arguments for command, arguments in qmp.sent if command == "migrate-set-capabilities"][-1]
    assert {row["state"] for row in last["capabilities"]} == {False}


@pytest.mark.parametrize("delay", [0, -1, 9, 10_001, 1.5, True])
def test_a_delay_that_would_crash(delay: Any) -> None:
    with pytest.raises(Usage):
        mc.delay_arguments(delay)


def test_transports(tmp_path: Path) -> None:
    assert Endpoint("::1", 7, transport="rdma").uri == "rdma:[::1]:7"
    assert Endpoint("/run/s", 0, transport="unix").uri == "unix:/run/s"
    with pytest.raises(Refused, match="no RDMA device"):
        mc.refuse_transport(api.McOptions("rdma"), "host1", str(tmp_path))
    (tmp_path / "mlx5_0").mkdir()
    mc.refuse_transport(api.McOptions("rdma", rdma_copy=True), "host1", str(tmp_path))
    with pytest.raises(Refused, match="--rdma-keepalive"):
        mc.refuse_transport(api.McOptions("tcp", rdma_keepalive=True), "host1", str(tmp_path))


def test_the_configuration() -> None:
    read = config.parse("[mc]\ntransport = \"rdma\"\nrdma_copy = true\n")
    assert read.mc == api.McOptions("rdma", rdma_copy=True)
    with pytest.raises(Usage):
        config.parse("[mc]\ntransport = \"exec\"\n")


# ---- the domain ----


def domain(devices: str, more: str = "") -> str:
    return f"<domain type='kvm' {QEMU}><devices>{devices}</devices>{more}</domain>"


def commandline(*words: str) -> str:
    return "<qemu:commandline>" + "".join(f"<qemu:arg value='{word}'/>" for word in words) + "</qemu:commandline>"


def test_a_disk_that_the_guest_writes_is_refused() -> None:
    disk = "<disk type='file' device='disk'><source file='/a'/><target dev='vda' bus='virtio'/>{}</disk>"
    (refusal,) = mccheck.disk_refusals(domain(disk.format("")))
    assert refusal.exit_code == 4 and "vda" in refusal.message
    shared = disk.format("<shareable/>")
    assert mccheck.disk_refusals(domain(shared))
    assert mccheck.disk_refusals(domain(disk.format("<readonly/>"))) == []
    assert mccheck.disk_refusals(domain(disk.replace("'disk'", "'cdrom'", 1).format(""))) == []


async def test_a_virtio_nic_needs_its_offloads_off() -> None:
    nic = "<interface type='bridge'><model type='{}'/><alias name='net0'/></interface>"
    (refusal,) = await mccheck.nic_refusals(domain(nic.format("virtio")), FakeQmp(**{"qom-get": True}))
    assert refusal.exit_code == 4 and "ctrl_guest_offloads" in refusal.message + refusal.next_step
    assert await mccheck.nic_refusals(domain(nic.format("virtio")), FakeQmp(**{"qom-get": False})) == []
    assert await mccheck.nic_refusals(domain(nic.format("e1000")), None) == []
    cured = domain(nic.format("virtio"), commandline("-global", "virtio-net-pci.ctrl_guest_offloads=off"))
    assert await mccheck.nic_refusals(cured, None) == []


def test_the_second_monitor(tmp_path: Path) -> None:
    """Found in both spellings, if its socket is there; another chardev is not taken for it."""
    path = tmp_path / "mon"
    by_qmp = domain("", commandline("-qmp", f"unix:{path},server,nowait"))
    assert mccheck.second_monitor(by_qmp) == ""
    path.touch()
    assert mccheck.second_monitor(by_qmp) == str(path)
    words = ("-chardev", f"socket,id=mcft-mon,path={path},server,nowait", "-mon", "chardev=mcft-mon,mode=control")
    assert mccheck.second_monitor(domain("", commandline(*words))) == str(path)
    assert mccheck.second_monitor(domain("", commandline("-chardev", f"socket,id=other,path={path}"))) == ""


def test_tls_is_refused() -> None:
    with pytest.raises(Refused, match="required"):
        mccheck.refuse_tls(Config(tls="required"))
    mccheck.refuse_tls(Config(tls="opportunistic"))


async def test_the_buffer() -> None:
    """No filter, and no word of it where the plug is not possible; its own only with one NIC and the arbiter fence."""
    body = Body("u", "vm1", "p", 3, "primary", "host2", nics=[TAP])
    with pytest.raises(Refused, match="redirector"):
        await mccheck.choose_buffer("filter", body)
    assert await mccheck.choose_buffer("none", body) == "none"
    with pytest.raises(Refused) as told:
        await mccheck.choose_buffer("auto", structs.replace(body, nics=[dataclasses.replace(TAP, target="no-such-tap")]))
    assert "filter" not in str(told.value)
    with pytest.raises(Refused, match="fence"):
        await mccheck.choose_buffer("qemu", body)
    with pytest.raises(Refused, match="one NIC"):
        await mccheck.choose_buffer("qemu", structs.replace(body, nics=[TAP, TAP], arbiter="fence"))


def test_what_its_own_buffer_would_die_of(tmp_path: Path) -> None:
    """That QEMU exits where it may not, or where libnl has no plug, and the guest with it."""
    (tmp_path / "proc/7").mkdir(parents=True)
    status = tmp_path / "proc/7/status"
    assert "can't be read" in mcnet.why_not_by_itself(7, str(tmp_path))
    status.write_text("Name:\tqemu\nCapEff:\t0000000000000000\n")
    assert "CAP_NET_ADMIN" in mcnet.why_not_by_itself(7, str(tmp_path))
    status.write_text("Name:\tqemu\nCapEff:\t0000000000001000\n")
    assert "plug.so" in mcnet.why_not_by_itself(7, str(tmp_path))
    module = tmp_path / "usr/lib/x86_64-linux-gnu/libnl/cli/qdisc/plug.so"
    module.parent.mkdir(parents=True)
    module.touch()
    assert mcnet.why_not_by_itself(7, str(tmp_path)) == ""


def test_rdma_by_its_earlier_name() -> None:
    """Capability and URI were renamed together. Fails if a QEMU of before is told `rdma:`."""
    there = Endpoint("192.0.2.2", 16531, transport="rdma")
    assert mc.uri_of(there, ALL) == "rdma:192.0.2.2:16531"
    assert mc.uri_of(there, ("mc", "x-rdma-pin-all")) == "x-rdma:192.0.2.2:16531"
    assert mc.uri_of(Endpoint("192.0.2.2", 16531), ("mc", "x-rdma-pin-all")) == "tcp:192.0.2.2:16531"


ASKED = api.ProtectRequest("vm1", "host2")


@pytest.mark.parametrize(
    ("request_", "other"),
    [
        (ASKED, ""), (structs.replace(ASKED, delay_ms=100, engine="mc", netbuffer="plug", arbiter="standby"), ""),
        (structs.replace(ASKED, delay_ms=200), "mcft set vm1 --delay 200ms"), (structs.replace(ASKED, engine="colo"), "engine"),
        (structs.replace(ASKED, netbuffer="none"), "buffer"), (structs.replace(ASKED, arbiter="etcd"), "arbiter"),
        (structs.replace(ASKED, mc=api.McOptions("rdma", True)), "--transport tcp"),
        (structs.replace(ASKED, rdma_device="off"), "RDMA device"),
    ],
)  # fmt: skip
async def test_protected_with_other_settings(request_: api.ProtectRequest, other: str) -> None:
    """What was not asked for is as it is. Fails if another engine, or other options of it, are taken for "already"."""
    body = Body("u", "vm1", "p", 3, "primary", "host2", state="protected", engine="mc", buffer="plug")
    life = cast(Any, SimpleNamespace(body=body))
    asked = Protecting(cast(Any, SimpleNamespace(site=SimpleNamespace(config=Config()), core=None)))
    if not other:
        assert asked.already(life, request_) == "already"
        return
    with pytest.raises(Refused, match=other) as told:
        asked.already(life, request_)
    assert told.value.code == "other-settings"


async def test_its_own_buffer_is_experimental_by_configuration_too() -> None:
    site = SimpleNamespace(config=Config(netbuffer="qemu"))
    with pytest.raises(Refused, match="never seen at work"):
        await Protecting(cast(Any, SimpleNamespace(site=site))).named(ASKED)


@pytest.mark.parametrize(("tap", "name"), [("tap0", "ifb0"), ("vnet12", "ifb12"), ("a1b2", "ifb1b2")])
def test_the_name_of_its_ifb(tap: str, name: str) -> None:
    assert mcnet.ifb_name(tap) == name


@pytest.mark.parametrize("tap", ["tap", "x1234567890123"])
def test_a_tap_that_would_abort_it(tap: str) -> None:
    with pytest.raises(Refused):
        mcnet.ifb_name(tap)


# ---- the agent's part of a relayed monitor ----


class FakeHost:
    """libvirt: `reply` is what QEMU says, an exception, or None for silence; `alive`: the daemon itself."""

    def __init__(self, reply: Any, alive: bool = True) -> None:
        self.reply, self.alive = reply, alive
        self.asked: list[str] = []

    async def qmp(self, _uuid: str, body: dict[str, Any], timeout_s: float = 0) -> Any:
        self.asked.append(body["execute"])
        if self.reply is None:
            await asyncio.Event().wait()
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    async def resume(self, _uuid: str) -> None:
        self.asked.append("virDomainResume")

    async def answers(self) -> bool:
        return self.alive


def life(host: FakeHost, side: str = "primary", *kinds: Kind) -> Any:
    ledger = Ledger("p", cast(Any, side), 3)
    for kind in kinds:
        ledger.append(kind)
    return SimpleNamespace(body=SimpleNamespace(engine="mc", uuid="u"), ledger=ledger, site=SimpleNamespace(host=host))


async def test_replies_are_carried_as_they_are() -> None:
    refused = {"error": {"class": "GenericError", "desc": "no"}}
    assert await relay.answer(life(FakeHost(refused)), "query-migrate", {}) == refused


async def test_libvirts_silence_is_not_qemus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a daemon that is away would look like a QEMU that hangs: that one is killed."""
    monkeypatch.setattr(relay, "PATIENCE_S", 0.01)
    away = await relay.answer(life(FakeHost(None, alive=False)), "query-migrate", {})
    assert away["error"]["class"] == relay.AWAY
    broken = await relay.answer(life(FakeHost(Failed("libvirt", "connection reset"))), "query-migrate", {})
    assert broken["error"]["class"] == relay.AWAY
    monkeypatch.setattr(relay, "PROBE_EVERY_S", 0.01)
    waiting = asyncio.create_task(relay.answer(life(FakeHost(None)), "query-migrate", {}))
    done, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not done  # QEMU's own silence stays a question without an answer
    waiting.cancel()


async def test_a_standby_that_follows_is_never_asked() -> None:
    host = FakeHost({"return": {}})
    for kinds in ((Kind.PREPARING,), (Kind.PREPARING, Kind.ARMED)):
        assert "error" in await relay.answer(life(host, "standby", *kinds), "query-status", {})
    assert host.asked == []
    taken = life(host, "standby", Kind.PREPARING, Kind.ARMED, Kind.TAKEN)
    assert await relay.answer(taken, "cont", {}) == {"return": {}}
    assert host.asked == ["virDomainResume"]


# ---- status ----


def test_its_statistics_are_shown() -> None:
    body = Body("u", "vm1", "p", 3, "primary", "host2", state="protected", engine="mc", buffer="none", capabilities=["mc", "x"])
    gate = {
        "role": "primary", "acknowledged": 5, "rate_hz": 9.9, "last_ack_age_ms": 1.0, "pause_ms": {"p50": None, "p99": None},
        "mc": {"status": "checkpointing", "checkpoints": 4, "polls": 9, "xmit-time": 3.0, "mbps": 800.5, "downtime": 2.0},
    }  # fmt: skip
    shown = protection(body, Ledger("p", "primary", 3), gate, None, None, {}, True, "host1")
    assert shown.mc is not None
    assert shown.mc.statistics == {"xmit-time": 3.0, "mbps": 800.5, "downtime": 2.0} and shown.mc.checkpoints == 4
    assert shown.mc.capabilities == ["mc", "x"] and shown.mc.monitor == "libvirt"


async def test_the_streams_socket_lies_where_qemus_user_may_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the folder stays root's: QEMU does not run as root, and could not listen."""
    owners = []
    monkeypatch.setattr("os.chown", lambda path, uid, gid: owners.append((path, uid, gid)))
    qmp = FakeQmp()
    copy = object.__new__(Copy)
    here = SimpleNamespace(run_dir=tmp_path, listen_addresses=["192.0.2.1"])
    copy.site = SimpleNamespace(ports=SimpleNamespace(take=lambda address, udp: 7), config=here)  # type: ignore[assignment]
    copy.body = Body("u1", "vm1", "p", 1, "standby", "host2", engine="mc", mc=api.McOptions("unix"), qemu_pid=os.getpid())
    copy.qmp = qmp  # type: ignore[assignment]
    await copy._listen()
    qemu = os.stat(f"/proc/{os.getpid()}")
    assert owners == [(f"{tmp_path}/streams/u1", qemu.st_uid, qemu.st_gid)]
    assert qmp.sent[-1] == ("migrate-incoming", {"uri": f"unix:{tmp_path}/streams/u1/sock"})
    await copy._remove_socket()
    assert os.listdir(tmp_path / "streams") == []
