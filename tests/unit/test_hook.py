"""libvirt's hook, run by /bin/sh as libvirt runs it; the markers and tokens are the agent's own (`agent/hook.py`)."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mcft.agent.domainxml import machine
from mcft.agent.hook import Markers, _probe_xml, boot_id
from mcft.config import Config

UUID, OTHER = "0a1b2c3d-1111-2222-3333-444455556666", "ffffffff-1111-2222-3333-444455556666"
HOOK = Path(__file__).resolve().parents[2] / "mcft" / "hook.sh"
STARTS = ("prepare", "start", "restore", "migrate")
ALWAYS = ("reconnect", "stopped", "release", "started", "attach", "unknown-operation-of-2040")
XML = f"""<domain type='kvm' id='4'>
  <name>vm1</name>
  <uuid>{UUID}</uuid>
  <metadata><other uuid='{OTHER}'/></metadata>
  <sysinfo type='smbios'><system><entry name='uuid'>{OTHER}</entry></system></sysinfo>
</domain>
"""


class Host:
    def __init__(self, tmp: Path) -> None:
        self.state, self.run = tmp / "state", tmp / "run"
        self.state.mkdir()
        self.run.mkdir()
        self.markers = Markers(replace(Config(), state_dir=str(self.state), run_dir=str(self.run)))

    def hook(self, operation: str, xml: str = XML, name: str = "vm1") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["/bin/sh", str(HOOK), name, operation, "begin", "-"],
            input=xml, capture_output=True, text=True, timeout=20,
            env={"PATH": os.environ["PATH"], "MCFT_STATE_DIR": str(self.state), "MCFT_RUN_DIR": str(self.run)},
        )  # fmt: skip

    def refuses(self, operation: str = "start", xml: str = XML) -> bool:
        done = self.hook(operation, xml)
        assert done.stdout == "", "what a hook prints at restore and migrate becomes the domain's XML"
        assert done.returncode in (0, 1)
        assert (done.returncode == 1) == ("mcft: vm1 may not start here" in done.stderr), "a refusal says why"
        return done.returncode == 1

    @property
    def token(self) -> Path:
        return self.run / "token" / UUID

    def write_token(self, text: str) -> None:
        self.token.parent.mkdir(exist_ok=True)
        self.token.write_text(text)


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def later(seconds: int = 60) -> int:
    return int(time.clock_gettime(time.CLOCK_BOOTTIME)) + seconds


@pytest.mark.parametrize("operation", [*STARTS, *ALWAYS])
def test_no_state_no_marker_free(host: Host, operation: str) -> None:
    host.state.rmdir()
    assert not host.refuses(operation)
    (host.state / "start").mkdir(parents=True)
    assert not host.refuses(operation)
    host.markers.free(UUID)
    assert not host.refuses(operation)
    host.markers.ban(OTHER, "another domain")
    assert not host.refuses(operation)


@pytest.mark.parametrize("operation", STARTS)
def test_banned_needs_a_token_that_every_operation_of_one_attempt_accepts(host: Host, operation: str) -> None:
    host.markers.ban(UUID, "protected")
    assert host.markers.banned(UUID) and host.refuses(operation)
    host.markers.grant(UUID, "ab" * 16, 3, "start")
    assert not host.refuses(operation) and not host.refuses(operation) and not host.refuses("start")
    host.markers.revoke(UUID)
    assert host.refuses(operation)


@pytest.mark.parametrize("operation", ALWAYS)
def test_what_must_never_be_refused(host: Host, operation: str) -> None:
    """Non-zero on reconnect would kill a running QEMU."""
    host.markers.ban(UUID, "protected")
    assert not host.refuses(operation)
    assert not host.refuses(operation, "")


@pytest.mark.parametrize("operation", ["started", "release"])
def test_an_attempt_that_ended_takes_its_token_along(host: Host, operation: str) -> None:
    host.markers.ban(UUID, "protected")
    host.markers.grant(UUID, "ab" * 16, 3, "start")
    other = host.token.with_name(OTHER)
    other.write_text("x")
    assert not host.refuses(operation)
    assert not host.token.exists() and other.exists() and host.refuses()


def test_reconnect_and_stopped_leave_the_token(host: Host) -> None:
    host.markers.ban(UUID, "protected")
    host.markers.grant(UUID, "ab" * 16, 3, "start")
    host.refuses("reconnect")
    host.refuses("stopped")
    assert host.token.exists()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"{OTHER} p 3 {{boot}} start {{later}}\n", "another domain's"),
        (f"{UUID} p 3 00000000-0000-0000-0000-000000000000 start {{later}}\n", "earlier boot"),
        (f"{UUID} p 3 {{boot}} start {{past}}\n", "expired"),
        (f"{UUID} p 3 {{boot}} start\n", "expired"),
        (f"{UUID} p 3 {{boot}} start soon\n", "expired"),
        (f"{UUID}\n", "earlier boot"),
        ("\n", "another domain's"),
        ("", "another domain's"),
    ],
)
def test_wrong_tokens(host: Host, text: str, why: str) -> None:
    host.markers.ban(UUID, "protected")
    host.write_token(text.format(boot=boot_id(), later=later(), past=later(-1)))
    done = host.hook("start")
    assert done.returncode == 1 and why in done.stderr


def test_right_token_by_hand(host: Host) -> None:
    host.markers.ban(UUID, "protected")
    host.write_token(f"{UUID} p 3 {boot_id()} standby {later()}\n")
    assert not host.refuses()


@pytest.mark.parametrize("content", ["", "garbage\n", "freedom\n", "banned\n", "free"])
def test_a_marker_that_does_not_say_free_refuses(host: Host, content: str) -> None:
    """`free` without its newline was cut off while it was written: it does not count."""
    (host.state / "start").mkdir()
    (host.state / "start" / UUID).write_text(content)
    assert host.refuses()


def test_unreadable_marker_refuses_that_domain_only(host: Host) -> None:
    (host.state / "start" / UUID).mkdir(parents=True)
    assert host.refuses()
    assert not host.refuses("start", XML.replace(UUID, OTHER, 1).replace("vm1", "vm2"))


def test_xml_without_a_uuid_is_not_ours_to_refuse(host: Host) -> None:
    host.markers.ban(UUID, "protected")
    assert not host.refuses("start", "<domain/>")


def test_forget_is_as_if_never_known(host: Host) -> None:
    host.markers.ban(UUID, "protected")
    host.markers.grant(UUID, "p", 3, "start")
    host.markers.forget(UUID)
    assert not host.refuses() and not host.token.exists() and not host.markers.banned(UUID)


@pytest.mark.parametrize("arch, acpi", [("x86_64", True), ("i686", True), ("aarch64", False), ("s390x", False)])
def test_the_probe_starts_under_an_old_libvirt(arch: str, acpi: bool) -> None:
    """Fails if libvirt 7.0 would add -no-acpi to it, which ends QEMU 11.1 (then the hook's life can't be told), or if another
    machine gets what libvirt refuses there."""
    xml = _probe_xml(OTHER, machine(f"<domain><os><type arch='{arch}' machine='any'>hvm</type></os></domain>"))
    assert ("<acpi" in xml) == acpi


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
def test_shellcheck() -> None:
    subprocess.run(["shellcheck", "-s", "sh", str(HOOK)], check=True)
