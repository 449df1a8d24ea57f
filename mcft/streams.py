"""TLS for what QEMU sends: checkpoints and disk blocks. Who wants it, which certificates it takes, QEMU's object for it.

QEMU: `object-add tls-creds-x509` (`docs/system/tls.rst`), `tls-creds` and `tls-hostname` of `migrate-set-parameters`,
`blockdev-add` (nbd) and `nbd-server-start`. The certificates are libvirt's for QEMU: by default in `/etc/pki/qemu`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mcft.api import Transport
from mcft.config import StreamTls
from mcft.errors import Refused
from mcft.qmp_passthrough import Qmp

Side = Literal["client", "server"]  # the primary's QEMU connects, the standby's listens
CREDENTIALS = "mcft-tls"
FILES: dict[Side, tuple[str, ...]] = {
    "client": ("ca-cert.pem", "client-cert.pem", "client-key.pem"),
    "server": ("ca-cert.pem", "server-cert.pem", "server-key.pem"),
}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the standby's QEMU listens for one stream. hostname: what its certificate must be made for; empty: no TLS.

    transport: `unix` has a path as its address.
    """

    address: str
    port: int
    hostname: str = ""
    transport: Transport = "tcp"

    @property
    def uri(self) -> str:
        if self.transport == "unix":
            return f"unix:{self.address}"
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{self.transport}:{host}:{self.port}"


def lacking(folder: Path, side: Side) -> str:
    """Empty, or which certificate this host lacks for its side of the streams."""
    return next((str(folder / name) for name in FILES[side] if not os.path.exists(folder / name)), "")


def offer(policy: StreamTls, folder: Path, host: str) -> StreamTls:
    """What a primary asks its standby for. Raises: Refused ("tls-missing") if its own policy can't be kept."""
    if policy == "off" or not (missing := lacking(folder, "client")):
        return policy
    if policy == "required":
        raise _missing(missing, host)
    return "off"


def settle(asked: StreamTls, policy: StreamTls, folder: Path, host: str) -> bool:
    """The standby's answer: whether the streams are encrypted. Raises: Refused where one side's policy can't be kept."""
    if "required" in (asked, policy) and "off" in (asked, policy):
        who = f"{host} requires TLS for checkpoints and disks" if policy == "required" else f"{host} has TLS switched off"
        raise Refused("tls-policy", who, "the other side says the opposite", "make [tls] streams the same on both hosts")
    if "off" in (asked, policy):
        return False
    if missing := lacking(folder, "server"):
        if "required" in (asked, policy):
            raise _missing(missing, host)
        return False
    return True


def _missing(path: str, host: str) -> Refused:
    return Refused(
        "tls-missing", f"{host} has no {path}", "TLS for checkpoints and disks is required",
        "make QEMU's certificates (https://libvirt.org/kbase/tlscerts.html), or, on a private link: [tls] streams = \"off\"",
    )  # fmt: skip


async def add_credentials(qmp: Qmp, folder: Path, side: Side) -> None:
    """Raises: QmpError (unreadable for QEMU's user, expired, not a certificate…)."""
    await drop_credentials(qmp)
    await qmp.execute(
        "object-add", qom_type="tls-creds-x509", id=CREDENTIALS, dir=str(folder), endpoint=side, verify_peer=True
    )


async def drop_credentials(qmp: Qmp) -> None:
    """Idempotent; what still uses them keeps them."""
    if any(row["name"] == CREDENTIALS for row in await qmp.execute("qom-list", path="/objects")):
        await qmp.attempt("object-del", id=CREDENTIALS)
