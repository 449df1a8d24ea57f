"""The lab as tests see it: hosts with what may be done to them, the guest, and the state every test begins from.

The instance is the one that MCFT_LAB names. Times are seconds of CLOCK_BOOTTIME, the same in every namespace.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

REPO = Path(__file__).resolve().parents[2]
LAB = str(REPO / "lab" / "lab")
INSTANCE = os.environ.get("MCFT_LAB", "")
STATE = Path(f"/run/mcft-lab-{INSTANCE}" if INSTANCE else "/run/mcft-lab")
UUID = "11111111-2222-3333-4444-555555555555"
GATE = f"mcft-gate@{UUID}"
IMAGE = "/var/lib/libvirt/images/vm1.img"
CONFIG = "/etc/mcft/mcft.toml"
LIBVIRTD = "virtqemud" if os.environ.get("MCFT_LAB_MODULAR") else "libvirtd"  # the hosts' unit
SLOW = int(os.environ.get("MCFT_LAB_SLOW", "1"))  # how many times longer everything may take (lab/uml's one CPU)
POLL_S = 0.03 * SLOW
AGAIN = ("preparing", "syncing", "protected")
LET_GO = ("protected", "solo", "active", "unprotected", "stopped")  # states in which `unprotect` ends all


def now() -> float:
    """Seconds of CLOCK_BOOTTIME."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def until(condition: Callable[[], T], timeout: float, what: str | Callable[[], str]) -> T:
    """Poll until the condition is true; its value. The only way in which these tests wait for the product."""
    end = now() + timeout * SLOW
    while True:
        value = condition()
        if value:
            return value
        if now() > end:
            raise AssertionError(f"after {timeout * SLOW:g} s still not: {what() if callable(what) else what}")
        time.sleep(POLL_S)


def pause(seconds: float) -> None:
    """Let the world go on: until the random moment of a failure, or while it is watched. Never to wait for a thing."""
    time.sleep(seconds)


def lab(*words: str, check: bool = True, timeout: float = 90.0) -> subprocess.CompletedProcess[str]:
    """One command of lab/lab."""
    done = subprocess.run([LAB, *words], capture_output=True, text=True, timeout=timeout * SLOW, stdin=subprocess.DEVNULL)
    if check and done.returncode:
        said = f"{done.stdout[-2000:]}{done.stderr[-2000:]}"
        raise AssertionError(f"lab/lab {' '.join(words)}: exit {done.returncode}\n{said}")
    return done


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("agent", timeout=3 * SLOW)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(3 * SLOW)
        self.sock.connect(self._path)


@dataclass(frozen=True)
class Host:
    """One of the two hosts. key: the lab's name (h1), name: mcft's (host1)."""

    key: str
    name: str

    def __str__(self) -> str:
        return self.key

    # ---- doing ----

    def run(self, *words: str, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        return lab("run", self.key, "--", *words, check=check, timeout=timeout)

    def sh(self, script: str, *, check: bool = True, timeout: float = 60.0) -> str:
        return self.run("sh", "-c", script, check=check, timeout=timeout).stdout

    def mcft(self, *words: str, check: bool = True, timeout: float = 60.0) -> subprocess.CompletedProcess[str]:
        return self.run("mcft", *words, check=check, timeout=timeout)

    def kill_qemu(self, aim: Callable[[], None] = lambda: None) -> float:
        """SIGKILL to vm1's QEMU, the moment that `aim` returns; when. From outside: no process to wait for."""
        inside = self.qemu_pid()
        assert inside, f"no QEMU of vm1 on {self}"
        pid = self._pid_outside(inside)
        aim()
        at_s = now()
        os.kill(pid, signal.SIGKILL)
        return at_s

    @contextmanager
    def slow_qemu(self, runs_s: float, stands_s: float) -> Iterator[None]:
        """vm1's QEMU here has the processor for so long, then not, again and again: a host that is busy with others."""
        pid, over = self._pid_outside(self.qemu_pid() or 0), threading.Event()

        def hold_up() -> None:
            while not over.wait(runs_s):
                os.kill(pid, signal.SIGSTOP)
                over.wait(stands_s)
                os.kill(pid, signal.SIGCONT)

        thread = threading.Thread(target=hold_up)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _pid_outside(self, inside: int) -> int:
        """The machine's number of a process of this host."""
        namespace = os.readlink(f"/proc/{(STATE / self.key / 'init').read_text().split()[0]}/ns/pid")
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                numbers = re.search(r"^NSpid:\t(.*)$", status.read_text(), re.MULTILINE)
                here = os.readlink(status.parent / "ns/pid") == namespace
                if here and numbers and int(numbers.group(1).split()[-1]) == inside:
                    return int(status.parent.name)
            except OSError:
                continue
        raise AssertionError(f"process {inside} of {self} is gone")

    def kill_unit(self, unit: str) -> float:
        """SIGKILL to a unit's main process (never to what else is in its cgroup: QEMU may be in libvirtd's); when."""
        at_s = now()
        self.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", unit)
        return at_s

    def main_pid(self, unit: str) -> int:
        return int(self.run("systemctl", "show", "--property=MainPID", "--value", unit).stdout)

    def power_off(self) -> float:
        """Pull the plug; when (as the lab measured it)."""
        with PLUGS[self.key]:
            found = re.search(r"cut_begin=([0-9.]+)", lab("power", self.key, "off").stdout)
        assert found
        return float(found.group(1))

    def power_on(self) -> None:
        lab("power", self.key, "on")

    # ---- looking, without a process where tests poll ----

    @property
    def root(self) -> Path | None:
        """The host's root as seen from here, or None if it is off."""
        try:
            pid, start = (STATE / self.key / "init").read_text().split()
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return None
        return Path(f"/proc/{pid}/root") if stat.rsplit(")", 1)[1].split()[19] == start else None

    @property
    def on(self) -> bool:
        return self.root is not None

    def qemu_pid(self, domain: str = "vm1") -> int | None:
        """The pid of the domain's QEMU inside the host, if it lives. libvirtd need not."""
        root = self.root
        try:
            pid = int((root / f"run/libvirt/qemu/{domain}.pid").read_text()) if root else None
            return pid if pid and f"guest={domain},".encode() in (root / f"proc/{pid}/cmdline").read_bytes() else None  # type: ignore[operator]
        except (OSError, ValueError):
            return None

    def api(self, path: str) -> Any:
        """GET from the agent's socket; None if there is no agent to answer."""
        root = self.root
        if root is None:
            return None
        connection = _UnixConnection(f"{root}/run/mcft/agent.sock")
        try:
            connection.request("GET", path)
            return json.loads(connection.getresponse().read())
        except (OSError, http.client.HTTPException, ValueError):
            return None
        finally:
            connection.close()

    def freeze(self, on: bool) -> None:
        """Every process of the host stands still at once, as in a hypervisor's or firmware's pause: cgroup v2's freezer."""
        name = f"mcft-lab{'-' + INSTANCE if INSTANCE else ''}/{self.key}/cgroup.freeze"
        for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
            if (root / name).exists():
                (root / name).write_text("1" if on else "0")
                return

    def answers(self) -> bool:
        return self.api("/v1/status") is not None

    def status(self, domain: str = "vm1") -> dict[str, Any]:
        """The domain's protection as this agent has it, or {} (none here, or no agent)."""
        answer = self.api("/v1/status") or {"protections": []}
        return next((p for p in answer.get("protections", []) if p["domain"] == domain), {})

    def state(self, domain: str = "vm1") -> str:
        return self.status(domain).get("state", "")

    def events(self) -> list[dict[str, Any]]:
        return list((self.api("/v1/events?domain=vm1") or {}).get("events", []))

    def await_state(self, *states: str, timeout: float = 20.0, domain: str = "vm1") -> dict[str, Any]:
        """Until the domain is in one of the states here; the status then."""

        def reached() -> dict[str, Any]:
            status = self.status(domain)
            return status if status.get("state") in states else {}

        def what() -> str:
            status = self.status(domain)
            return f"{self}: {domain} {' or '.join(states)}; it is '{status.get('state', '')}' ({status.get('reason')})"

        return until(reached, timeout, what)

    def await_took_over(self, timeout: float = 20.0, domain: str = "vm1") -> dict[str, Any]:
        """Until the domain runs here, as this side's own; the status then.

        Not just until `active`: where the other agent was there all the time, that state lasts less than a second, then it is
        protected again by itself.
        """

        def reached() -> dict[str, Any]:
            status = self.status(domain)
            again = status.get("role") == "primary" and status["guest_running"] and status["state"] in AGAIN
            return status if again or status.get("state") == "active" else {}

        return until(reached, timeout, lambda: f"{self} runs {domain}; it is {self.status(domain)}")

    def follows(self) -> bool:
        """It lost; or, as the other protects again within a second where this agent was there all the time, it is the standby."""
        status = self.status()
        return status.get("state") == "lost" or status.get("role") == "standby"

    def await_lost(self, timeout: float = 30.0) -> None:
        until(self.follows, timeout, lambda: f"{self}: vm1 lost; it is {self.state()}")

    def await_committed(self) -> None:
        """After a take-over here: its overlays (not those of an earlier one) are committed."""

        def committed() -> bool:
            said = (e["text"] for e in reversed(self.events()))
            return "are committed" in next((t for t in said if "are committed" in t or "runs here now" in t), "")

        until(committed, 30, f"{self}: the overlays are committed")

    def qmp(self, command: str) -> Any:
        """One QMP command without arguments to vm1; its `return`."""
        return json.loads(self.run("virsh", "qemu-monitor-command", "vm1", json.dumps({"execute": command})).stdout)["return"]


H1, H2 = Host("h1", "host1"), Host("h2", "host2")
HOSTS = (H1, H2)
PLUGS = {host.key: threading.Lock() for host in HOSTS}  # of two that pull one, the second finds it pulled
SPARE = Host("h3", "host3")  # off but for a test that powers it on; it is made anew then


def other(host: Host) -> Host:
    return H2 if host is H1 else H1


def guest(*words: str, timeout: float = 20.0) -> str:
    """One command to the guest's control port."""
    return lab("guest", "say", *words, timeout=timeout).stdout.strip()


def guest_answers() -> bool:
    """A guest that goes down may take the connection and never answer."""
    try:
        return lab("guest", "say", "ping", check=False, timeout=10).stdout.strip() == "pong"
    except subprocess.TimeoutExpired:
        return False


def redis(domain: str, *words: str, wait_s: int = 3) -> str:
    """One command to a domain's redis, from a client on the LAN; its answer, empty where there is none."""
    return lab("run", "cl", "--", "redis-cli", "-e", "-t", str(wait_s), "-h", domain, *words, check=False).stdout.strip()


def redis_answers() -> bool:
    """vm1's: some time after its guest does."""
    return redis("vm1", "ping", wait_s=1) == "PONG"


def redefined(xml: str, boot_s: float = 60) -> None:
    """vm1 is started anew on h1 by this definition; its guest and redis answer."""
    H1.sh(f"cat > /root/vm1.xml << 'EOF'\n{xml}\nEOF\nvirsh -q destroy vm1; virsh -q define /root/vm1.xml && virsh -q start vm1")
    until(guest_answers, boot_s, "the guest answers")
    until(redis_answers, 30, "its redis answers")


def link(name: str, to: str) -> float:
    """lab/lab link; when it began."""
    at_s = now()
    lab("link", name, to)
    return at_s


def apart() -> None:
    """The hosts don't reach each other any more, but either reaches the third party: h1 over `rep`, h2 over the LAN."""
    link("lan:h1", "down")
    link("rep:h2", "down")


def together() -> None:
    """The end of `apart`."""
    link("rep:h2", "up")
    link("lan:h1", "up")


def protect(primary: Host, *more: str, timeout: float = 40.0) -> None:
    """Protect vm1 from where it runs. Where the agent does so by itself already, wait for that instead."""
    done = primary.mcft("protect", "vm1", "--to", other(primary).name, *more, check=False, timeout=timeout)
    if done.returncode:
        by_itself = primary.state() in AGAIN or "is busy: protect (" in done.stderr
        assert by_itself, f"mcft protect on {primary}: exit {done.returncode}\n{done.stdout[-1000:]}{done.stderr}"
    primary.await_state("protected", timeout=timeout)
    if "none" not in more:
        until(lambda: primary.status().get("survives_host_loss"), 10, f"{primary}: vm1 survives a host's loss")


_kept = count(1)


@contextmanager
def configured(host: Host, change: str) -> Iterator[None]:
    """The host's configuration, changed by a shell command on `$file`; as it was afterwards. (Also within another.)"""
    kept = f"/etc/mcft/kept-{next(_kept)}"
    try:
        host.sh(f"cp {CONFIG} {kept} && file={CONFIG} && {change} && systemctl restart mcft-agent")
        until(host.answers, 20, f"{host}: the agent answers with its changed configuration")
        yield
    finally:
        host.sh(f"mv {kept} {CONFIG}; systemctl reset-failed mcft-agent; systemctl restart mcft-agent")
        until(host.answers, 20, f"{host}: the agent answers")


# For `configured`: a host that took over does not protect again by itself, so what it was left with can be looked at.
NOT_AGAIN = "printf '\\n[protect]\\nauto = false\\n' >> $file"


# ---- the state every test begins from ----


def up() -> None:
    """The lab, if it is not up; it stays. (Where it is up but a host is off, `restore` sees to that.)"""
    if not (STATE / "up").exists():
        lab("up", timeout=900)


def restore(*, thorough: bool) -> None:
    """vm1 runs on h1, unprotected; links up, both hosts on, no protections.

    thorough: something failed before, so nothing of mcft's or of the guest's state is trusted or asked: it all goes.
    """
    hosts_on()
    if thorough or not _unprotected():
        wipe()
        _fresh_guest()
        return
    if H1.qemu_pid() is None or H2.qemu_pid() is not None or not _as_new():
        _fresh_guest()
    _no_old_copies()
    if any(host.status() for host in HOSTS):  # an undo that was under way has put back what was before it
        wipe()
        _fresh_guest()


def hosts_on() -> None:
    """Links up, both hosts on, their agents answer."""
    for path in list((STATE / "links").glob("*")):
        lab("link", path.name, "up")
    with ThreadPoolExecutor() as pool:
        list(pool.map(_host_on, HOSTS))


def _host_on(host: Host) -> None:
    if not host.on:
        host.power_on()
    # Faults that an interrupted test was injecting end here.
    host.sh(
        """cd /run/systemd/system
        if [ -d mcft-agent.service.d ] || [ -d mcft-gate@.service.d ]; then
          rm -rf mcft-agent.service.d mcft-gate@.service.d; systemctl daemon-reload; systemctl stop mcft-agent
        fi
        systemctl reset-failed; systemctl start mcft-agent """
        + LIBVIRTD
    )
    until(host.answers, 20, f"{host}: the agent answers")


def _unprotected() -> bool:
    """The polite way: the leader of whatever is protected lets go of it."""
    for host in HOSTS:
        status = host.status()
        if status.get("role") == "primary" and status["state"] in LET_GO:
            host.mcft("unprotect", "vm1", check=False, timeout=45)
    try:
        until(lambda: not any(host.status() for host in HOSTS), 3, "no protections")
    except AssertionError:
        return False
    return True


def wipe() -> None:
    """No guest, and nothing of mcft's, on either host."""
    with ThreadPoolExecutor() as pool:
        list(pool.map(_wipe, HOSTS))


def _wipe(host: Host) -> None:
    host.sh(
        """systemctl stop --no-block mcft-agent; systemctl kill --signal=KILL mcft-agent 'mcft-gate@*'
        systemctl stop mcft-agent 'mcft-gate@*'
        for d in vm1 vm2; do virsh -q destroy $d; virsh -q undefine $d --nvram; rm -f /var/lib/libvirt/images/$d.img*; done
        cd /var/lib/mcft && rm -rf mcft.db* start labels definitions /run/mcft/*
        systemctl reset-failed; systemctl start mcft-agent""",
        check=False,
    )
    until(host.answers, 20, f"{host}: the agent answers after everything of it was wiped")


def _fresh_guest() -> None:
    lab("vm", "start", "h1")


def _no_old_copies() -> None:
    """An earlier test's copy of the disk, and what the labels say of it: a later one would have to name it (`--overwrite`)."""
    H1.sh("rm -rf /var/lib/mcft/labels/*")
    H2.sh("rm -rf /var/lib/mcft/labels/* /var/lib/libvirt/images/vm1.img*")


def _as_new() -> bool:
    """The running guest can be used again: it answers, and what an earlier test set going has ended."""
    if not guest_answers():
        return False
    until(redis_answers, 30, "redis answers: a guest that an earlier test started may still be booting")
    return "run=0" in guest("writer", "stop") and guest("dirty", "0") == "ok" and guest("beacon", "on") == "ok"
