"""TLS of checkpoints and disk blocks: used by default, refused in words where it can't be had, off where both sides say so."""

from __future__ import annotations

from watching import Load
from world import H1, H2, NOT_AGAIN, Host, configured, protect, until

OFF = "printf \"\\n[tls]\\nstreams = 'off'\\n\" >> $file"


def encrypted(host: Host) -> bool:
    """Whether vm1's QEMU was given credentials for its stream."""
    return bool(host.qmp("query-migrate-parameters")["tls-creds"])


def test_checkpoints_and_disks_are_encrypted_by_default_and_a_take_over_goes_on(load: Load) -> None:
    with configured(H2, NOT_AGAIN):
        protect(H1)
        load.flowing()
        assert H1.status()["tls"] and H2.status()["tls"]
        assert encrypted(H1)
        H1.kill_qemu()
        H2.await_took_over()
        load.goes_on()
        H2.await_committed()
        assert not encrypted(H2), "nothing of mcft's is left in the QEMU that took over"
        load.finished()


def test_a_missing_certificate_is_named_and_nothing_changes() -> None:
    for host, name in ((H1, "client-cert.pem"), (H2, "server-cert.pem")):
        host.sh(f"mv /etc/pki/qemu/{name} /root/")
        try:
            done = H1.mcft("protect", "vm1", "--to", "host2", check=False, timeout=60)
        finally:
            host.sh(f"mv /root/{name} /etc/pki/qemu/")
        assert done.returncode == 4 and name in done.stderr and host.name in done.stderr, done
        until(lambda: not H1.status() and not H2.status(), 10, "nothing is left")


def test_off_on_both_sides_is_clear_and_off_on_one_is_refused() -> None:
    with configured(H2, OFF):
        done = H1.mcft("protect", "vm1", "--to", "host2", check=False, timeout=60)
        assert done.returncode == 4 and "TLS" in done.stderr, done
    with configured(H1, OFF), configured(H2, OFF):
        protect(H1)
        assert not H1.status()["tls"] and not encrypted(H1)
