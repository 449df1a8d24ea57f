"""`mcft check` without libvirt: what domains' XML tells, versions, CPUs, memory, the prediction, and what people see of it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import click
import pytest

from mcft import api, checktext, errors
from mcft.agent import check, checkpeer, diskfiles, domainxml, findings, prediction, qemuprobe
from mcft.errors import Failed, Refused
from mcft.gate.pace import MOST_MS

DOMAINS = Path(__file__).parent / "domains"
MIB = 1 << 20


def read(name: str) -> str:
    return (DOMAINS / f"{name}.xml").read_text()


# ---- what XML tells ----


def test_every_device_that_cannot_be_carried_is_named_once() -> None:
    said = [refusal.message for refusal in domainxml.unprotectable(read("accelerated"))]
    for what in ("(mdev)", "vDPA", "vhost-user NIC", "virtiofs", "shared memory", "TPM", "lock manager", "virgl"):
        assert len([message for message in said if what in message]) == 1, (what, said)
    assert len(said) == 8
    assert [r.message for r in domainxml.unprotectable(read("exotic"))] == [
        "the domain has a passed-through host device (VFIO)",
        "the domain has a passed-through NIC (VFIO)",
        "the domain has a vhost-user NIC",
    ]
    assert not domainxml.unprotectable(read("plain"))


@pytest.mark.parametrize(
    ("device", "what"),
    [
        ("<hostdev mode='subsystem' type='mdev'/>", "mdev"),
        ("<hostdev mode='subsystem' type='usb'/>", "USB"),
        ("<interface type='vdpa'/>", "vDPA"),
        ("<interface type='vhostuser'/>", "vhost-user"),
        ("<interface type='hostdev'/>", "VFIO"),
        ("<lease/>", "lock manager"),
        ("<video><driver name='vhostuser'/><model type='virtio'/></video>", "vhost-user GPU"),
    ],
)
def test_protect_refuses_them_too(device: str, what: str) -> None:
    with pytest.raises(Refused, match=what) as refused:
        domainxml.refuse_unprotectable(read("namespaced").replace("<devices>", f"<devices>{device}", 1))
    assert refused.value.code == "device-not-protectable" and refused.value.next_step


def test_an_encrypted_guest_is_refused() -> None:
    with pytest.raises(Refused, match="SEV"):
        domainxml.refuse_unprotectable(read("namespaced").replace("<devices>", "<launchSecurity type='sev'/><devices>", 1))


def test_every_disk_that_cannot_follow_is_refused_not_only_the_first() -> None:
    assert [r.message.split()[1] for r in domainxml.disk_refusals(read("accelerated"))] == ["vda", "vdb"]


def test_unbuffered_outputs() -> None:
    assert [code for code, _ in domainxml.outputs(read("accelerated"))] == [
        "serial", "console", "guest-agent", "channel", "vsock", "display", "usb-redirection", "nvram",
    ]  # fmt: skip
    assert [code for code, _ in domainxml.outputs(read("plain"))] == ["serial"]
    assert not domainxml.outputs("<domain><devices><serial type='null'/></devices></domain>")


def test_what_its_nics_need() -> None:
    assert checkpeer.nic_sources(ET.fromstring(read("accelerated"))) == [("bridge", "br7"), ("network", "lab")]
    assert checkpeer.nic_sources(ET.fromstring(read("plain"))) == [("network", "default"), ("bridge", "br0")]


def test_memory() -> None:
    assert checkpeer.ram_bytes(ET.fromstring(read("accelerated"))) == 4 << 30
    assert checkpeer.ram_bytes(ET.fromstring(read("plain"))) == 256 * MIB
    assert checkpeer.ram_bytes(ET.fromstring("<domain/>")) == 0
    info = checkpeer.meminfo("MemAvailable:   1024 kB\nHugePages_Free:       3\nHugepagesize:       2048 kB\n")
    assert info == {"MemAvailable": MIB, "HugePages_Free": 3, "Hugepagesize": 2 * MIB}


CAPABILITIES = ET.fromstring(
    "<domainCapabilities><cpu><mode name='host-passthrough' supported='no'/><mode name='maximum' supported='yes'/>"
    "<mode name='custom' supported='yes'><model usable='yes'>Nehalem</model><model usable='no'>Skylake-Server-IBRS</model></mode>"
    "</cpu></domainCapabilities>"
)


@pytest.mark.parametrize(
    ("cpu", "why"),
    [
        ("<cpu mode='custom'><model>Nehalem</model></cpu>", ""),
        ("<cpu mode='custom'><model>Skylake-Server-IBRS</model></cpu>", "lacks features"),
        ("<cpu mode='custom'><model>Nonesuch</model></cpu>", "does not know"),
        ("<cpu mode='maximum'/>", ""),
        ("<cpu mode='host-passthrough'/>", "does not offer"),
        ("<cpu><topology sockets='1'/></cpu>", ""),
    ],
)
def test_cpu_of_the_peer(cpu: str, why: str) -> None:
    said = checkpeer.lacks_cpu(ET.fromstring(cpu), CAPABILITIES)
    assert (why in said) if why else said == ""


def test_differing_cpus_matter_only_where_the_guest_sees_them() -> None:
    root = ET.fromstring("<domain type='kvm'><cpu mode='host-passthrough'/></domain>")
    ours, theirs = ("New", "avx2 avx512f sse"), ("Old", "avx2 sse")
    assert "lacks avx512f" in check.cpu_warning(root, ours, theirs)
    assert check.cpu_warning(root, ours, ours) == ""
    assert check.cpu_warning(ET.fromstring("<domain type='qemu'><cpu mode='maximum'/></domain>"), ours, theirs) == ""
    assert check.cpu_warning(ET.fromstring(read("accelerated")), ours, theirs) == ""


def test_the_nearest_folder(tmp_path: Path) -> None:
    assert checkpeer.existing(str(tmp_path / "a" / "b")) == str(tmp_path)
    assert checkpeer.existing("/nowhere/at/all") == "/"


def test_a_chain_takes_what_its_images_take() -> None:
    assert diskfiles.chain_bytes({"actual-size": 5, "backing-image": {"actual-size": 7, "backing-image": {}}}) == 12


# ---- versions, clocks, what is under way ----


@pytest.mark.parametrize(
    ("ours", "theirs", "refused"),
    [
        ("11.1.3", "11.1.0", False), ("11.1.3", "11.2.0", False), ("11.2.0", "11.1.9", True),
        ("12.0.0", "11.9.0", True), ("11.1.3", "", False), ("9.2.0", "10.0.0", False),
    ],
)  # fmt: skip
def test_a_guest_goes_to_newer_qemus_only(ours: str, theirs: str, refused: bool) -> None:
    if refused:
        with pytest.raises(Refused, match="older"):
            check.refuse_older(ours, theirs, "vm1", "host2")
    else:
        check.refuse_older(ours, theirs, "vm1", "host2")


def test_clock_skew_is_what_the_journey_does_not_explain() -> None:
    assert check.clock_skew(100.0, 101.0, 100.4) == 0
    assert check.clock_skew(100.0, 101.0, 111.0) == 10.0
    assert check.clock_skew(100.0, 101.0, 60.0) == -40.0


class Says:
    """An executor with canned answers; the last of each repeats. asked: in order."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {name.replace("_", "-"): list(value) for name, value in answers.items()}
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def execute(self, command: str, **arguments: Any) -> Any:
        self.asked.append((command, arguments))
        answers = self.answers[command]
        return answers.pop(0) if len(answers) > 1 else answers[0]


async def test_others_work_on_the_domain_is_refused() -> None:
    await check.refuse_busy(Says(query_block_jobs=[[]], query_migrate=[{}]), "vm1")
    await check.refuse_busy(Says(query_block_jobs=[[]], query_migrate=[{"status": "completed"}]), "vm1")
    with pytest.raises(Refused, match="backup on vda"):
        jobs = [{"type": "backup", "device": "vda"}]
        await check.refuse_busy(Says(query_block_jobs=[jobs], query_migrate=[{}]), "vm1")
    with pytest.raises(Refused, match="migration of vm1"):
        await check.refuse_busy(Says(query_block_jobs=[[]], query_migrate=[{"status": "active"}]), "vm1")
    with pytest.raises(Refused) as refused:
        await check.refuse_busy(Says(query_block_jobs=[[]], query_migrate=[{"status": "cancelling"}]), "vm1")
    assert "shut vm1 down" in refused.value.next_step


# ---- the prediction ----


async def test_the_rate_is_measured_by_sampling_which_disturbs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prediction, "POLL_S", 0.001)
    rates = [{"status": "unstarted"}, {"status": "measuring"}, {"status": "measured", "dirty-rate": 12}]
    qemu = Says(query_migrate=[{}], query_dirty_rate=rates, calc_dirty_rate=[{}])
    assert await prediction.dirty_rate(qemu) == 12 * MIB
    assert ("calc-dirty-rate", {"calc-time": 1, "mode": "page-sampling"}) in qemu.asked


@pytest.mark.parametrize(
    "busy",
    [{"query_migrate": [{"status": "active"}]}, {"query_migrate": [{}], "query_dirty_rate": [{"status": "measuring"}]}],
)
async def test_nothing_is_measured_beside_something_else(busy: dict[str, Any]) -> None:
    qemu = Says(calc_dirty_rate=[{}], **busy)
    with pytest.raises(Failed, match="not measured"):
        await prediction.dirty_rate(qemu)
    assert "calc-dirty-rate" not in [command for command, _ in qemu.asked]


def test_an_idle_guest_is_a_good_idea() -> None:
    p = prediction.predict(MIB, 100, 1 << 30, "rep0")
    assert p.verdict == "good" and p.text.startswith("A good idea")
    assert p.pause_ms == pytest.approx(25.1, abs=0.1)
    assert p.added_latency_ms == pytest.approx(62.5, abs=0.1) and p.worst_latency_ms == pytest.approx(100, abs=0.1)
    assert p.bandwidth_bytes_per_s is not None and p.bandwidth_bytes_per_s < MIB


def test_a_delay_that_checkpoints_would_fill_is_stretched() -> None:
    """As the gate does it. Fails if a guest that stands still for good is called a good idea."""
    p = prediction.predict(MIB, 20, 1 << 30, "rep0")
    assert p.standing == pytest.approx(0.5, abs=0.01) and p.worst_latency_ms == pytest.approx(50, abs=0.5)
    assert prediction.predict(500 * MIB, 100, 100 * MIB, "x").worst_latency_ms == MOST_MS


def test_more_dirt_is_never_better() -> None:
    order = ("good", "costly", "bad")
    said = [order.index(prediction.predict(rate * MIB, 100, 100 * MIB, "x").verdict) for rate in range(200)]
    assert said == sorted(said) and set(said) == {0, 1, 2}
    too_much = prediction.predict(200 * MIB, 100, 100 * MIB, "x")
    assert "A bad idea" in too_much.text and "200 MiB/s" in too_much.text and "100 MiB/s" in too_much.text


def test_without_a_rate_there_is_no_word() -> None:
    p = prediction.predict(None, 100, 1, "x", "a migration is under way")
    assert (p.verdict, p.pause_ms) == ("unknown", None) and "a migration is under way" in p.text


def test_the_limit_is_the_narrower(tmp_path: Path) -> None:
    assert prediction.limit(10, "rep0", 100) == (10, "max_bandwidth")
    assert prediction.limit(1000, "rep0", 100) == (100, "rep0")
    assert prediction.limit(0, "rep0", 100) == (100, "rep0")
    assert prediction.limit(0, "", 0) == (prediction.ASSUMED_LINK_BYTES_PER_S, "assumed")
    (tmp_path / "e0").mkdir()
    for text, speed in (("10000\n", 1_250_000_000), ("-1\n", 0)):
        (tmp_path / "e0" / "speed").write_text(text)
        assert prediction.link_speed("e0", tmp_path) == speed
    assert prediction.link_speed("e1", tmp_path) == 0


# ---- exit code and words ----


async def test_what_is_raised_becomes_a_finding_and_the_exit_code() -> None:
    seen = findings.Findings()

    async def fine() -> int:
        return 1

    async def raises(error: errors.McftError) -> None:
        raise error

    assert await seen.tried(fine(), "hook", "live") == 1
    seen.warn("clock", "apart")
    assert findings.exit_code(seen.found) == 0
    await seen.tried(raises(Failed("hook-probe", "can't find out")))
    assert findings.exit_code(seen.found) == 1
    await seen.tried(raises(Refused("engine", "no", "why", "what to do")))
    assert findings.exit_code(seen.found) == 4
    await seen.tried(raises(errors.Unreachable("peer-unreachable", "host2 did not answer")))
    assert findings.exit_code(seen.found) == 5
    assert [f.level for f in seen.found] == ["ok", "warning", "refusal", "refusal", "refusal"]


def test_text() -> None:
    found = [
        api.Finding("ok", "hook", "libvirt calls mcft's hook on host1"),
        api.Finding("warning", "arbiter", "if host2 dies", "why"),
        api.Finding("refusal", "engine", "vm1 can't be protected", "its QEMU is old", "bring it to 11.1", 4),
    ]
    predicted = prediction.predict(MIB, 100, 1 << 30, "rep0")
    text = click.unstyle(checktext.check_text(api.Check("host1", "vm1", "u", "host2", 4, found, predicted)))
    assert "vm1 to host2: protect would be refused (1 reason)" in text
    assert "REFUSED    vm1 can't be protected: its QEMU is old; bring it to 11.1" in text
    assert text.index("REFUSED") < text.index("warning") < text.index("  ok")
    assert "100 ms at most" in text and "1 MiB/s of memory" in text and "1 GiB/s by rep0" in text
    assert max(map(len, text.splitlines())) <= 80
    fine = click.unstyle(checktext.check_text(api.Check("host1", "vm1", "u", "host2", 0, found[:2])))
    assert fine.startswith("vm1 to host2: protect would go, with 1 warning\n")


def test_only_roots_own_qemu_is_started_to_be_asked(tmp_path: Path) -> None:
    mine = tmp_path / "qemu"
    mine.write_text("")
    mine.chmod(0o777)
    assert not qemuprobe.trustworthy(str(mine)) and not qemuprobe.trustworthy("relative") and not qemuprobe.trustworthy("")
    assert qemuprobe.trustworthy("/bin/sh")


@pytest.mark.parametrize(("model", "says"), [("apparmor", "/d/*.mcft-* rwk,"), ("selinux", "audit log"), ("dac", "")])
def test_what_a_policy_would_deny_is_named(model: str, says: str) -> None:
    """Fails if an operator with AppArmor or SELinux learns of the overlays by a denied `protect` only."""
    root = ET.fromstring(f"<domain><seclabel type='dynamic' model='{model}'/></domain>")
    found = check.confinement(root, ["/d/vm1.img", "/d/vm1.data"], "host2")
    assert [says in " ".join(finding) and "host2" in finding[0] for finding in found] == ([True] if says else [])
