"""Garbage, too much, too slow, and those who may not: the agents refuse it and live on.

From `cl`, by the certificates in /etc/pki/test there; and on the unix socket. Throughout, vm1 is protected. Every test
fails if an agent dies or is restarted, stops answering, or if the protection ends, is muted or stands still.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from watching import Observer
from world import GATE, H1, H2, HOSTS, LAB, Host, pause, protect, until

PORT = 16520
ADDRESS = {"h1": "10.77.0.1", "h2": "10.77.0.2"}
HEAD_DEADLINE_S, HANDSHAKE_DEADLINE_S, BODY_DEADLINE_S = 30.0, 5.0, 10.0  # mcft/agent/listening.py

# On cl or a host: send (base64 in the arguments) and print what came back.
TALK = r"""
import base64, json, socket, ssl, sys, time
ask = json.loads(sys.argv[1])
data, began, said, how = base64.b64decode(ask["data"]), time.monotonic(), b"", "open"
try:
    if ask.get("unix"):
        s = socket.socket(socket.AF_UNIX); s.settimeout(ask["wait_s"]); s.connect(ask["unix"])
    else:
        s = socket.create_connection((ask["address"], ask["port"]), timeout=ask["wait_s"])
        if ask.get("tls", True):
            c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE
            if ask.get("cert"):
                c.load_cert_chain(f"/etc/pki/test/{ask['cert']}-cert.pem", f"/etc/pki/test/{ask['cert']}-key.pem")
            s = c.wrap_socket(s)
    if ask.get("slow_s"):
        for byte in data:
            s.sendall(bytes([byte])); time.sleep(ask["slow_s"])
            s.setblocking(False)
            try:
                got = s.recv(4096)
                if not got: raise ConnectionError("closed")
                said += got
            except (BlockingIOError, ssl.SSLWantReadError): pass
            s.settimeout(ask["wait_s"])
    else:
        s.sendall(data)
    while got := s.recv(65536):
        said += got
    how = "closed"
except (ConnectionError, ssl.SSLError, BrokenPipeError) as error:
    how = f"cut: {error}"
except TimeoutError:
    how = "open"
status = int(said.split()[1]) if said.startswith(b"HTTP/1.") else 0
body = said.partition(b"\r\n\r\n")[2].decode(errors="replace")
json.dump({"status": status, "body": body, "how": how, "seconds": time.monotonic() - began}, sys.stdout)
"""


def talk(place: str, data: bytes, **more: Any) -> dict[str, Any]:
    """Send it from there; status (0: no HTTP answer), body, how it ended (open, closed, cut: …), seconds."""
    ask = {"data": base64.b64encode(data).decode(), "wait_s": 10.0, "port": PORT, **more}
    command = [LAB, "run", place, "--", "python3", "-ISc", TALK, json.dumps(ask)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done
    return dict(json.loads(done.stdout))


def request(method: str, path: str, body: bytes = b"", more: str = "") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\nContent-Length: {len(body)}\r\n{more}\r\n"
    return head.encode() + body


def to(host: Host, data: bytes, cert: str = "", **more: Any) -> dict[str, Any]:
    return talk("cl", data, address=ADDRESS[host.key], cert=cert, **more)


def is_an_error(answer: dict[str, Any], *statuses: int) -> None:
    """An ErrorBody with one of these statuses: code, message, reason, next_step."""
    assert answer["status"] in statuses, answer
    error = json.loads(answer["body"])
    assert error["code"] and error["message"] and {"reason", "next_step"} <= error.keys(), answer


@contextmanager
def unharmed() -> Iterator[None]:
    """vm1 is protected; afterwards it is still, by the same processes, and checkpoints go on."""
    if H1.state() != "protected":
        protect(H1)
    pids = {(host.key, unit): host.main_pid(unit) for host in HOSTS for unit in ("mcft-agent", GATE)}
    instance = H1.status()["instance"]
    heard = {host.key: {e["id"] for e in host.events()} for host in HOSTS}
    yield
    for (key, unit), pid in pids.items():
        host = H1 if key == "h1" else H2
        assert host.main_pid(unit) == pid, f"{unit} on {key} is another process now"
    for host in HOSTS:
        assert host.answers(), f"{host}: the agent answers"
    status = H1.status()
    assert (status["state"], status["instance"]) == ("protected", instance), status
    for host in HOSTS:
        new = [e for e in host.events() if e["id"] not in heard[host.key]]
        assert not [e for e in new if e["kind"] in ("verdict", "alarm")], (host.key, new)
    seen = status["checkpoints"]["acknowledged"]
    until(lambda: H1.status()["checkpoints"]["acknowledged"] > seen + 3, 10, "checkpoints go on")


GARBAGE = [
    b"\x00" * 512,
    os.urandom(4096),
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00" + os.urandom(200),
    b"POST /v1/protections HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/protections HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
]
BODIES = [b"", b"{", b"\xff\xfe", b"[]", b'{"domain": 1}', b'{"domain": "vm1", "to": {}}', b"[" * 5000]


def test_garbage() -> None:
    """What is no HTTP, and HTTP that says nothing sensible: an error or a closed connection, whoever sends it."""
    with unharmed(), ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda data: to(H1, data, "host2", wait_s=3.0), GARBAGE))
        answers += pool.map(lambda data: talk("h1", data, unix="/run/mcft/agent.sock", wait_s=3.0), GARBAGE)
        answers += pool.map(lambda data: to(H2, data, tls=False, wait_s=6.0), GARBAGE[:3])
        assert not [a for a in answers if a["status"] not in (0, 400)], answers
        bodies = [("POST", "/v1/peer/prepare", b) for b in BODIES]
        bodies += [("POST", f"/v1/peer/{verb}", b"{]") for verb in ("arm", "give-up", "take", "ended", "discard", "switch")]
        answers = list(pool.map(lambda ask: to(H2, request(*ask), "host1"), bodies))
        for answer in answers:
            is_an_error(answer, 400)
        unix = [("POST", "/v1/protections", b) for b in BODIES if b]
        for answer in pool.map(lambda ask: talk("h1", request(*ask), unix="/run/mcft/agent.sock"), unix):
            is_an_error(answer, 400)


def test_what_does_not_exist() -> None:
    """Unknown routes, methods, verbs, jobs: an error that says so."""
    with unharmed():
        for method, path, status in (
            ("GET", "/", 404), ("GET", "/v1/peer/hello", 405), ("POST", "/v1/peer/destroy", 404),
            ("DELETE", "/v1/status", 405), ("GET", "/v1/jobs/../../etc/passwd", 404), ("GET", "/v1/jobs/none", 404),
            ("GET", "/v1/events?after=x", 400), ("GET", "/v1/status?domain=%00", 404),
            ("POST", "/v1/protections/nobody/solo", 404),
        ):  # fmt: skip
            is_an_error(to(H2, request(method, path), "host1"), status)
        # Peers' routes are not on the operators' socket at all.
        is_an_error(talk("h1", request("POST", "/v1/peer/hello", b"{}"), unix="/run/mcft/agent.sock"), 404)


def test_too_much() -> None:
    """A body, a head and a line that are too long, and many connections at once."""
    with unharmed():
        huge = b'{"x": "' + b"a" * (3 << 20) + b'"}'
        # Sent through a file's worth of zeros on the other side: arguments are too short for it.
        for place, more in (
            ("cl", {"address": "10.77.0.2", "cert": "host1"}),
            ("h1", {"unix": "/run/mcft/agent.sock"}),
        ):
            path = "/v1/peer/prepare" if place == "cl" else "/v1/protections"
            answer = talk_huge(place, path, len(huge), **more)
            assert answer["status"] in (413, 400) or answer["how"].startswith("cut"), answer
        for head in (
            request("GET", "/v1/status", more="X-Long: " + "a" * 60000 + "\r\n"),
            request("GET", "/" + "a" * 60000),
        ):
            answer = to(H2, head, "host1")
            if not answer["how"].startswith("cut"):  # while it still sends, it may see the end before the answer
                is_an_error(answer, 400)
        script = "import socket,time\ns=[socket.create_connection(('10.77.0.2',16520),5) for _ in range(300)]\ntime.sleep(2)"
        flood = subprocess.Popen([LAB, "run", "cl", "--", "python3", "-ISc", script], stderr=subprocess.PIPE)
        pause(1.0)
        assert H2.answers(), "h2: the agent answers while 300 connections say nothing"
        assert to(H2, request("GET", "/v1/status"), "host1")["status"] == 200
        flood.wait(30)


def talk_huge(place: str, path: str, length: int, **more: Any) -> dict[str, Any]:
    """A POST with a body of that many bytes, made on the other side."""
    head = base64.b64encode(request("POST", path).replace(b"Content-Length: 0", f"Content-Length: {length}".encode()))
    script = TALK.replace('base64.b64decode(ask["data"])', f'base64.b64decode("{head.decode()}") + b"a" * {length}')
    ask = {"data": "", "wait_s": 15.0, "port": PORT, **more}
    command = [LAB, "run", place, "--", "python3", "-ISc", script, json.dumps(ask)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done
    return dict(json.loads(done.stdout))


def test_too_slow() -> None:
    """A byte at a time: in the handshake, the head, the body. Each ends at its deadline; others are served meanwhile.

    Fails if a deadline begins anew with every byte.
    """
    slow_head = request("GET", "/v1/status", more="X: " + "a" * 200 + "\r\n")
    body = b'{"x": "' + b"a" * 200 + b'"}'
    head = request("POST", "/v1/protections", body)[: -len(body)]
    slow_body = to_slowly(head, body)
    asks = [
        (HEAD_DEADLINE_S, lambda: to(H1, slow_head, "host2", slow_s=0.5)),
        (HEAD_DEADLINE_S, lambda: talk("h1", slow_head, unix="/run/mcft/agent.sock", slow_s=0.5)),
        (HANDSHAKE_DEADLINE_S, lambda: to(H1, b"\x16\x03\x01\x02\x00\x01\x00" + b"a" * 300, tls=False, slow_s=0.5)),
        (BODY_DEADLINE_S, lambda: slow_body("h1", unix="/run/mcft/agent.sock")),
        (BODY_DEADLINE_S, lambda: slow_body("cl", address="10.77.0.1", cert="host2")),
    ]
    with unharmed(), ThreadPoolExecutor(len(asks)) as pool:
        running = [(deadline, pool.submit(ask)) for deadline, ask in asks]
        while not all(future.done() for _, future in running):
            at = time.monotonic()
            assert H1.answers(), "h1: the agent answers while others are slow"
            assert time.monotonic() - at < 3
            pause(0.5)
        for deadline, future in running:
            answer = future.result()
            assert answer["how"] != "open", answer
            assert answer["status"] in (0, 408), answer
            assert deadline - 2 < answer["seconds"] < deadline + 8, (deadline, answer)


def to_slowly(head: bytes, body: bytes) -> Any:
    """The head at once, the body a byte at a time."""
    script = TALK.replace("for byte in data:", f"s.sendall({head!r})\n        for byte in data:")

    def send(place: str, **more: Any) -> dict[str, Any]:
        ask = {"data": base64.b64encode(body).decode(), "wait_s": 10.0, "port": PORT, "slow_s": 0.5, **more}
        command = [LAB, "run", place, "--", "python3", "-ISc", script, json.dumps(ask)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done
        return dict(json.loads(done.stdout))

    return send


ACTS = [
    ("GET", "/v1/status", b""),
    ("GET", "/v1/events", b""),
    ("POST", "/v1/protections", b'{"domain": "vm1", "to": "host1"}'),
    ("POST", "/v1/protections/vm1/unprotect", b"{}"),
    ("POST", "/v1/protections/vm1/solo", b'{"force": true, "peer_is_off": true}'),
    ("POST", "/v1/protections/vm1/failover", b'{"force": true, "peer_is_off": true}'),
    ("POST", "/v1/protections/vm1/start", b'{"accept_lost_data": true}'),
    ("POST", "/v1/protections/vm1/set", b'{"delay_ms": 5000}'),
    ("POST", "/v1/maintenance", b'{"on": true}'),
]
VERBS = ("hello", "records", "take", "give-up", "discard", "ended", "start", "go-alone")


def test_who_may_not() -> None:
    """A stranger of the same CA is told 403; another CA's certificate, none, and no TLS get no answer at all.

    Fails if a certificate of the CA were enough, or if peers' routes were open to any that is not a peer.
    """
    with unharmed(), ThreadPoolExecutor(4) as pool:
        peers = [("POST", f"/v1/peer/{v}", about()) for v in VERBS]
        for host in HOSTS:
            answers = list(pool.map(lambda ask, host=host: to(host, request(*ask), "stranger"), ACTS + peers))
            for answer in answers:
                is_an_error(answer, 403)
                assert "11111111-2222" not in answer["body"], answer
            for more in ({"cert": "foreign"}, {"cert": ""}, {"tls": False}):
                ask = request("POST", "/v1/peer/give-up", about())
                answer = to(host, ask, wait_s=6.0, **more)
                assert answer["status"] in (0, 400) and "protections" not in answer["body"], (more, answer)
        # And the one whose certificate it is may.
        assert to(H2, request("POST", "/v1/peer/hello", b"{}"), "host1")["status"] == 200


def test_a_host_may_not_speak_as_the_other() -> None:
    """host2's certificate at host2's own agent is no peer's there. Fails if a name is a peer everywhere."""
    with unharmed():
        is_an_error(to(H2, request("POST", "/v1/peer/give-up", about()), "host2"), 403)
        is_an_error(to(H1, request("POST", "/v1/peer/give-up", about()), "host1"), 403)


def about() -> bytes:
    """What the primary would ask the standby with, the right instance included."""
    status = H1.status()
    fields = {
        "uuid": status["uuid"],
        "pid": status["instance"],
        "g": status["generation"],
        "domain": "vm1",
        "detail": "",
    }
    return json.dumps(fields).encode()


def test_an_ordinary_user() -> None:
    """Only root and the group libvirt may open the socket, or read the gate's and the database's."""
    with unharmed():
        nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        tried = H1.run(*nobody, "curl", "-sS", "--unix-socket", "/run/mcft/agent.sock", "http://a/v1/status", check=False)
        assert tried.returncode != 0, tried
        said = H1.run(*nobody, "mcft", "status", check=False)
        assert said.returncode in (4, 5) and "Traceback" not in said.stderr and said.stderr, said
        for path in ("/run/mcft/gate", "/run/mcft/monitor", "/var/lib/mcft/mcft.db"):
            read = H1.run(*nobody, "cat" if path.endswith("db") else "ls", path, check=False)
            assert read.returncode != 0, f"{path} can be read by anybody"


SPRAY = r"""
import json, os, random, socket, struct, sys
ask = json.loads(sys.argv[1])
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for number in range(ask["count"]):
    size = random.choice([0, 1, 16, 91, 92, 93, 96, 120, 1400])
    data = random.choice([b"", b"MCF1"]) + os.urandom(size)
    data = data[:ask["length"]] if number % 2 else data
    for source, sport, target, port in ask["ways"]:
        udp.sendto(data, (target, port))
        head = struct.pack("!HHHH", sport, port, 8 + len(data), 0)
        ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 28 + len(data), 0, 0, 64, 17, 0,
                         socket.inet_aton(source), socket.inet_aton(target))
        raw.sendto(ip + head + data, (target, port))
"""


def test_garbage_at_the_keepalives(observer: Observer) -> None:
    """Datagrams of no sense, from cl and as if from the peer's own address, some of the right length and magic.

    Fails if one is believed (a verdict, or the state changes), or if they keep the gate from its work.
    """
    with unharmed():
        observer.hears()
        ports = {host.key: keepalive_port(host) for host in HOSTS}
        ways = [
            ("10.77.0.2", ports["h2"], "10.77.0.1", ports["h1"]),
            ("10.77.0.1", ports["h1"], "10.77.0.2", ports["h2"]),
        ]
        ask = json.dumps({"ways": ways, "count": 2000, "length": 96})
        done = subprocess.run([LAB, "run", "cl", "--", "python3", "-ISc", SPRAY, ask], capture_output=True, timeout=60)
        assert done.returncode == 0, done
        for host in HOSTS:
            until(lambda host=host: heard(host), 2, lambda host=host: f"{host} hears its peer: {host.status()['keepalive']}")
        observer.hears()
        observer.clean()


def heard(host: Host) -> bool:
    """By both links, within T."""
    ages = [link["age_ms"] for link in host.status()["keepalive"]]
    return len(ages) == 2 and all(age is not None and age < 300 for age in ages)


def keepalive_port(host: Host) -> int:
    """The gate's UDP port on the LAN's link."""
    lines = host.sh("ss -Hlnu; ss -Hnu").splitlines()
    found = {int(w.rpartition(":")[2]) for line in lines for w in line.split() if w.startswith(ADDRESS[host.key] + ":")}
    assert len(found) == 1, f"keepalive ports of {host}: {lines}"
    return found.pop()
