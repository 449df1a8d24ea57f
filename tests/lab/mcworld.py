"""vm1 as engine `mc` wants it: QEMU is the stand-in (`tests/mcqemu`: its first line says so), no disk of the host's, no TLS."""

from __future__ import annotations

import os
import re

from world import CONFIG, REPO, Host, until

EMULATOR = "/opt/mcft/tests/mcqemu/emulator"
OFFLOADS = "virtio-net-pci.ctrl_guest_offloads=off"
TRACES = "/run/mcqemu"
TLS_OFF = "printf '\\n[tls]\\nstreams = \"off\"\\n' >> $file"


def definition(*, offloads: str = OFFLOADS) -> str:
    """vm1 by the stand-in, without its disk."""
    xml = (REPO / "lab" / "vm1.xml").read_text(encoding="utf-8")
    xml = re.sub(r"<disk .*?</disk>", "", xml, flags=re.DOTALL)
    # libvirt asks for each feature of a CPU that it shall check, hundreds of commands: on a slow kernel over a minute.
    xml = xml.replace("<cpu mode='maximum'/>", "")
    xml = re.sub(r"<emulator>.*</emulator>", f"<emulator>{EMULATOR}</emulator>", xml)
    words = "".join(f"<qemu:arg value='{word}'/>" for word in ("-global", offloads)) if offloads else ""
    more = f"<qemu:commandline>{words}</qemu:commandline></domain>" if words else "</domain>"
    memory_mib = os.environ.get("MCFT_LAB_GUEST_MIB", "256")  # as `lab/vm.sh` has it
    xml = xml.replace("256</memory>", f"{memory_mib}</memory>")
    kind = "kvm" if os.environ.get("MCFT_LAB_KVM") else "qemu"
    xml = xml.replace("<domain type='qemu'>", f"<domain type='{kind}' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>")
    return xml.replace("</domain>", more)


def without_tls(host: Host) -> None:
    """This engine has no TLS. The lab writes a host's configuration anew at every power on, so again after each."""
    host.sh(f"file={CONFIG}; grep -q 'streams = .off' $file || {{ {TLS_OFF}; systemctl restart mcft-agent; }}")
    until(host.answers, 60, f"{host}: the agent answers")


def traced(host: Host) -> None:
    """From now on the stand-in writes down what its clients say and hear; a folder that QEMU's user may write to."""
    host.sh(f"install -d -m 777 {TRACES} && rm -f {TRACES}/*")


def hang_next(host: Host) -> None:
    """vm1's next checkpoint finds no dirty page, which hangs that QEMU."""
    host.sh(f"install -d -m 777 {TRACES} && touch {TRACES}/vm1.hang")
