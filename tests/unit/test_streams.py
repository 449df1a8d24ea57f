"""TLS of the streams: what two hosts' policies come to, and which certificate is said to be missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from mcft import streams
from mcft.config import StreamTls
from mcft.errors import Refused
from mcft.streams import Endpoint, Side


def pki(folder: Path, *sides: Side) -> Path:
    folder.mkdir(exist_ok=True)
    for side in sides:
        for name in streams.FILES[side]:
            (folder / name).touch()
    return folder


def agreed(tmp_path: Path, primary: StreamTls, standby: StreamTls, *, certificates: tuple[bool, bool] = (True, True)) -> bool:
    here = pki(tmp_path / "a", *(["client"] if certificates[0] else []))  # type: ignore[list-item]
    there = pki(tmp_path / "b", *(["server"] if certificates[1] else []))  # type: ignore[list-item]
    return streams.settle(streams.offer(primary, here, "host1"), standby, there, "host2")


@pytest.mark.parametrize(
    ("primary", "standby", "tls"),
    [
        ("required", "required", True), ("required", "opportunistic", True), ("opportunistic", "required", True),
        ("opportunistic", "opportunistic", True), ("opportunistic", "off", False), ("off", "opportunistic", False),
        ("off", "off", False),
    ],
)  # fmt: skip
def test_what_two_policies_come_to(tmp_path: Path, primary: StreamTls, standby: StreamTls, tls: bool) -> None:
    assert agreed(tmp_path, primary, standby) is tls


@pytest.mark.parametrize(("primary", "standby"), [("required", "off"), ("off", "required")])
def test_required_against_off_is_refused(tmp_path: Path, primary: StreamTls, standby: StreamTls) -> None:
    with pytest.raises(Refused, match="host2"):
        agreed(tmp_path, primary, standby)


@pytest.mark.parametrize("certificates", [(False, True), (True, False), (False, False)])
def test_missing_certificates_are_named_where_tls_is_required_and_only_there(
    tmp_path: Path, certificates: tuple[bool, bool]
) -> None:
    """Fails if `required` ever goes on in clear words."""
    for primary, standby in (("required", "opportunistic"), ("opportunistic", "required")):
        with pytest.raises(Refused, match=r"ca-cert.pem|has TLS switched off|requires TLS"):
            agreed(tmp_path, primary, standby, certificates=certificates)  # type: ignore[arg-type]
    assert agreed(tmp_path, "opportunistic", "opportunistic", certificates=certificates) is False


def test_addresses_as_qemu_reads_them() -> None:
    assert Endpoint("10.0.0.1", 7).uri == "tcp:10.0.0.1:7"
    assert Endpoint("fd00::1", 7).uri == "tcp:[fd00::1]:7"
