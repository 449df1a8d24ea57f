"""Arbiter `etcd` as it is meant to be run: three nodes, TLS, user and password."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest
from arbiters import LAN, REP, Etcd, arb_root, etcd_arbiter
from watching import Load
from world import H1, H2, REPO, protect, until

CERT, KEY = "/root/etcd-cert.pem", "/root/etcd-key.pem"


@pytest.fixture(scope="module")
def secured(the_lab: None) -> Iterator[Etcd]:
    """Three nodes, TLS, user and password."""
    make_certificate()
    etcd = Etcd(3, f"--cert-file {CERT} --key-file {KEY}")
    more = 'ca = "/etc/pki/CA/cacert.pem"\nuser = "mcft"\npassword_file = "/etc/mcft/etcd-password"'
    with etcd_arbiter(etcd, more, auth) as made:
        yield made


def auth(etcd: Etcd) -> None:
    for words in (
        "role add mcft", "role grant-permission mcft --prefix=true readwrite /mcft", "user add mcft:secret",
        "user grant-role mcft mcft", "user add root:root", "user grant-role root root", "auth enable",
    ):  # fmt: skip
        etcd.ctl(words)
    etcd.user = "--user=root:root"
    for host in (H1, H2):
        host.sh("echo secret > /etc/mcft/etcd-password")



def make_certificate() -> None:
    """For arb's addresses, of the lab's CA."""
    pki, root = REPO / "lab/.cache/pki", arb_root()
    names = f"subjectAltName=IP:{LAN},IP:{REP},IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth"
    script = f"""openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=arb -keyout '{root}{KEY}' |
        openssl x509 -req -CA '{pki}/ca-cert.pem' -CAkey '{pki}/ca-key.pem' -set_serial 77 -days 30 -out '{root}{CERT}' \\
        -extfile <(printf '{names}\\n') && cp '{pki}/ca-cert.pem' '{root}/root/ca.pem'"""
    subprocess.run(["bash", "-euc", script], check=True, stderr=subprocess.DEVNULL)


def test_three_nodes_with_tls_and_password(secured: Etcd, load: Load, fresh_world: None) -> None:
    """A node may die. Without a quorum nothing is decided; with it again, it is, also by a token that had to be renewed.

    Fails if a token that a restarted etcd does not know is not renewed, or if an endpoint that is down ends the asking.
    """
    protect(H1)
    load.flowing()
    secured.kill(0)
    secured.kill(1)
    until(lambda: not H1.status()["arbiter"]["reachable"], 10, "h1 says that etcd can't decide")
    H2.power_off()
    H1.await_state("muted", timeout=10)
    secured.start(1)
    H1.await_state("solo", timeout=30)
    load.goes_on()
    load.finished()
