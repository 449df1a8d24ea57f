"""The lab's third party: an etcd (one node, or three) on `arb`, and a fence agent that pulls a host's plug.

etcd listens on arb's two addresses, so that it is reached over either link. Whatever is done to it, `Etcd.stop` ends it and
takes its data away.
"""

from __future__ import annotations

import ctypes
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from world import CONFIG, HOSTS, INSTANCE, PLUGS, STATE, Host, configured, hosts_on, lab, other, until

LAN, REP = "10.77.0.200", "10.99.0.200"
DATA = "/var/lib/etcd-lab"
QUICK = "sed -i 's/after_restart = .*/after_restart = \"1s\"\\nafter = \"2s\"/' $file"


def on_arb(script: str, *, check: bool = True, timeout: float = 30.0) -> str:
    return lab("run", "arb", "--", "sh", "-c", script, check=check, timeout=timeout).stdout


def arb_root() -> Path:
    """arb's root directory, as seen from here."""
    return Path(f"/proc/{(STATE / 'arb' / 'init').read_text().split()[0]}/root")


class Etcd:
    """Node n (0 is the usual one) has the client ports 2379 + 10n, and its peers' 2380 + 10n."""

    def __init__(self, nodes: int = 1, flags: str = "") -> None:
        self.nodes, self.flags = nodes, flags
        self.scheme = "https" if "--cert-file" in flags else "http"
        self.user = ""

    @property
    def endpoints(self) -> list[str]:
        return [f"{self.scheme}://{address}:{2379 + 10 * n}" for n in range(self.nodes) for address in (LAN, REP)]

    def start(self, node: int | None = None) -> None:
        """Start all (or that one), with the data they have; until they answer."""
        cluster = ",".join(f"n{n}=http://127.0.0.1:{2380 + 10 * n}" for n in range(self.nodes))
        for n in range(self.nodes) if node is None else [node]:
            listen = ",".join(f"{self.scheme}://{a}:{2379 + 10 * n}" for a in (LAN, REP, "127.0.0.1"))
            peers = f"http://127.0.0.1:{2380 + 10 * n}"
            on_arb(
                f"mkdir -p {DATA}; setsid etcd --name n{n} --data-dir {DATA}/n{n} --log-level warn {self.flags} "
                f"--listen-client-urls {listen} --advertise-client-urls {self.scheme}://{LAN}:{2379 + 10 * n} "
                f"--listen-peer-urls {peers} --initial-advertise-peer-urls {peers} "
                f"--initial-cluster {cluster} >> {DATA}/n{n}.log 2>&1 < /dev/null & echo $! > {DATA}/n{n}.pid"
            )
        until(self.healthy, 20, lambda: f"etcd on arb answers: {on_arb(f'tail -3 {DATA}/*.log', check=False)}")

    def healthy(self) -> bool:
        return "revision" in self.ctl("endpoint status -w json", check=False)

    def ctl(self, words: str, *, check: bool = True) -> str:
        ends = ",".join(f"{self.scheme}://127.0.0.1:{2379 + 10 * n}" for n in range(self.nodes))
        ca = "--cacert=/root/ca.pem" if self.scheme == "https" else ""
        patience = "--dial-timeout=5s --command-timeout=10s" if check else "--dial-timeout=1s --command-timeout=2s"
        etcdctl = f"ETCDCTL_API=3 etcdctl {patience} --endpoints={ends} {ca} {self.user}"
        return on_arb(f"{etcdctl} {words}", check=check)

    def signal(self, name: str, node: int | None = None) -> None:
        for n in range(self.nodes) if node is None else [node]:
            on_arb(f"kill -{name} $(cat {DATA}/n{n}.pid)", check=False)

    def kill(self, node: int | None = None) -> None:
        """SIGKILL, and until it is gone."""
        for n in range(self.nodes) if node is None else [node]:
            on_arb(f"p=$(cat {DATA}/n{n}.pid); kill -KILL $p; while [ -e /proc/$p ]; do sleep 0.01; done", check=False)

    def wipe(self) -> None:
        """Nothing is left of what it knew."""
        self.kill()
        on_arb(f"rm -rf {DATA}/n*")

    def backup(self) -> None:
        """Its data as they are now (etcd stands still meanwhile)."""
        self.signal("STOP")
        on_arb(f"rm -rf {DATA}/backup && cp -a {DATA}/n0 {DATA}/backup")
        self.signal("CONT")

    def restore(self) -> None:
        """It runs on what it knew when `backup` was made."""
        self.kill()
        on_arb(f"rm -rf {DATA}/n0 && cp -a {DATA}/backup {DATA}/n0")
        self.start()

    def stop(self) -> None:
        on_arb(f"for p in $(cat {DATA}/*.pid 2>/dev/null); do kill -KILL $p; done; rm -rf {DATA}", check=False)


@contextmanager
def _configured_for_good(host: Host, text: str) -> Iterator[None]:
    """The agent with that in its configuration, also after a power cut; as it was afterwards."""
    with configured(host, f"{{ {QUICK}; cat >> $file << 'EOF'\n{text}\nEOF\n}}"):
        keep = STATE / host.key / "mcft.toml"
        keep.write_text(host.sh(f"cat {CONFIG}"))
        try:
            yield
        finally:
            keep.unlink()


@contextmanager
def etcd_arbiter(etcd: Etcd | None = None, more: str = "", prepare: Callable[[Etcd], None] = lambda _: None) -> Iterator[Etcd]:
    """An etcd runs on arb and both hosts go by it."""
    etcd = etcd or Etcd()
    etcd.stop()
    etcd.start()
    prepare(etcd)
    try:
        quoted = ", ".join(f'"{endpoint}"' for endpoint in etcd.endpoints)
        with ExitStack() as stack:
            hosts_on()
            for host in HOSTS:
                text = f'[arbiter]\nkind = "etcd"\n[etcd]\nendpoints = [{quoted}]\n{more}'
                stack.enter_context(_configured_for_good(host, text))
            stack.callback(hosts_on)
            yield etcd
    finally:
        etcd.stop()


class Bmc:
    """Power control of both hosts, on arb's addresses: what `fence_lab` talks to. log: what it was asked, in order.

    mode: "good"; "lies": `off` says ok and does nothing; "vague": `status` can't tell; "deaf": no answer.
    """

    PORT = 6230

    def __init__(self) -> None:
        self.mode: Literal["good", "lies", "vague", "deaf"] = "good"
        self.log: list[str] = []
        self._ready = threading.Event()
        self._server: socket.socket | None = None
        threading.Thread(target=self._serve, daemon=True).start()
        assert self._ready.wait(5)

    def close(self) -> None:
        assert self._server
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()

    def offs(self) -> list[str]:
        return [line for line in self.log if line.startswith("off")]

    def _serve(self) -> None:
        """The socket is made in arb's network namespace; what is started to serve it runs in the machine's own."""
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        away = os.open(f"/run/netns/mcft{'-' + INSTANCE if INSTANCE else ''}-arb", os.O_RDONLY)
        assert libc.setns(away, 0x40000000) == 0
        server = self._server = socket.create_server(("0.0.0.0", self.PORT))
        assert libc.setns(home, 0x40000000) == 0
        os.close(home), os.close(away)
        self._ready.set()
        while True:
            try:
                client, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client: socket.socket) -> None:
        with client:
            line = client.makefile().readline().strip()
            action, _, key = line.partition(" ")
            self.log.append(line)
            if self.mode == "deaf":
                until(lambda: self.mode != "deaf", 60, "the BMC is to hear again")
                return
            host = next((h for h in HOSTS if h.key == key), None)
            if action == "off" and self.mode == "good" and host is not None:
                with PLUGS[key]:  # a test may be pulling it just now
                    if host.on:
                        lab("power", key, "off", check=False)
            if action == "status":
                said = "" if self.mode == "vague" or host is None else "on" if host.on else "off"
            else:
                said = "ok"
            client.sendall(f"{said}\n".encode())


@contextmanager
def fence_arbiter(delay: str = "2s") -> Iterator[Bmc]:
    """Both hosts can switch each other off."""
    bmc = Bmc()
    keys = {host.name: host.key for host in HOSTS}
    try:
        with ExitStack() as stack:
            hosts_on()
            for host in HOSTS:
                peer = other(host).name
                text = (
                    f'[arbiter]\nkind = "fence"\n[fence.{peer}]\nagent = "fence_lab"\ndelay = "{delay}"\n'
                    f'options = {{ ip = "{LAN},{REP}", plug = "{keys[peer]}" }}'
                )
                stack.enter_context(_configured_for_good(host, text))
            stack.callback(hosts_on)
            yield bmc
    finally:
        bmc.close()


@contextmanager
def all_arbiters(delay: str = "2s") -> Iterator[tuple[Etcd, Bmc]]:
    """Both hosts can go by each arbiter: `protect --arbiter` chooses."""
    etcd, bmc = Etcd(), Bmc()
    etcd.stop()
    etcd.start()
    keys = {host.name: host.key for host in HOSTS}
    quoted = ", ".join(f'"{endpoint}"' for endpoint in etcd.endpoints)
    try:
        with ExitStack() as stack:
            hosts_on()
            for host in HOSTS:
                peer = other(host).name
                text = (
                    f'[etcd]\nendpoints = [{quoted}]\n[fence.{peer}]\nagent = "fence_lab"\ndelay = "{delay}"\n'
                    f'options = {{ ip = "{LAN},{REP}", plug = "{keys[peer]}" }}'
                )
                stack.enter_context(_configured_for_good(host, text))
            stack.callback(hosts_on)
            yield etcd, bmc
    finally:
        bmc.close()
        etcd.stop()
