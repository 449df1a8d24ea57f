"""The configuration: the packaged file is the defaults; mistakes are refused by file, key and remedy."""

from __future__ import annotations

import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcft import config
from mcft.errors import NotFound, Usage

PACKAGED = Path(__file__).parents[2] / "packaging" / "mcft.toml"


def test_the_packaged_file_says_the_defaults() -> None:
    assert config.load(PACKAGED, must_exist=True) == config.Config()


def test_the_packaged_file_shows_every_key() -> None:
    """An unknown key makes its table list those that it knows; the file must show each of them."""
    text = PACKAGED.read_text()
    for table in ("", "listen", "ports", "keepalive", "protect", "reprotect", "disks", "arbiter", "agent", "tls"):
        with pytest.raises(Usage) as refusal:
            config.parse(f"[{table}]\nbogus = 1" if table else "bogus = 1")
        for key in refusal.value.message.split("here it knows ")[1].split(", "):
            assert re.search(rf"^(#: )?(\[{key}[\].]|{key} =)", text, re.M), key


def test_its_examples_are_valid_when_uncommented() -> None:
    loaded = config.parse(re.sub(r"^#: ", "", PACKAGED.read_text(), flags=re.M))
    assert loaded.name == "host1"
    assert loaded.peers == {"host2": config.Peer("host2", ("10.99.0.2", "192.0.2.2"), 16520)}
    assert loaded.operators == ("host2",)


def test_an_absent_file_is_a_valid_configuration(tmp_path: Path) -> None:
    loaded = config.load(tmp_path / "none.toml")
    assert loaded == config.Config()
    assert loaded.name == socket.gethostname()
    with pytest.raises(Usage, match="does not exist"):
        config.load(tmp_path / "none.toml", must_exist=True)


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.toml").write_bytes(b'name = "\xff"')
    with pytest.raises(Usage, match="cannot be read"):
        config.load(tmp_path / "latin.toml")
    with pytest.raises(Usage, match="cannot be read"):
        config.load(tmp_path)


def test_everything_can_be_set() -> None:
    loaded = config.parse("""
        name = "a"
        listen = { addresses = ["192.0.2.1", "::1"], port = 1 }
        ports = { range = "2000-2002" }
        keepalive = { loss = "1.5s" }
        protect = { auto = false, delay = "200ms", engine = "colo", netbuffer = "filter", max_bandwidth = "0" }
        reprotect = { after = "5s", after_restart = "1m" }
        arbiter = { kind = "standby" }
        agent.operators = ["c"]
        agent.libvirt_uri = "test:///default"
        agent.state_dir = "/s"
        agent.run_dir = "/r"
        agent.socket_group = "g"
        tls = { pki_dir = "/p", streams = "required" }
        [peers.b]
        addresses = ["192.0.2.2"]
        port = 5
        """)
    assert loaded == config.Config(
        name="a", listen_addresses=("192.0.2.1", "::1"), listen_port=1, ports=(2000, 2002), loss_ms=1500,
        auto_protect=False, delay_ms=200, engine="colo", netbuffer="filter", max_bandwidth_bytes=0, reprotect_after_ms=5000,
        reprotect_after_restart_ms=60_000, libvirt_uri="test:///default", state_dir=Path("/s"),
        run_dir=Path("/r"), socket_group="g", operators=("c",), pki_dir=Path("/p"), tls="required",
        peers={"b": config.Peer("b", ("192.0.2.2",), 5)},
    )  # fmt: skip
    assert loaded.socket_path == Path("/r/agent.sock")
    assert loaded.client_key == Path("/p/libvirt/private/clientkey.pem")


def test_peers_are_the_operators_unless_named() -> None:
    assert config.parse('[peers.b]\naddresses = ["192.0.2.2"]').operators == ("b",)


@pytest.mark.parametrize(
    ("text", "key", "remedy"),
    [
        ("[keepalive]\nlos = '1s'", "keepalive.los", "knows loss"),
        ("nmae = 'x'", "nmae", "knows name"),
        ("name = 5", "name", "host1"),
        ("name = '../x'", "name", "host1"),
        ("listen = 5", "listen", "[listen]"),
        ("[listen]\naddress = 'x'", "listen.address", "knows addresses, port"),
        ("[listen]\naddresses = '10.0.0.1'", "listen.addresses", "list"),
        ("[listen]\nport = 0", "listen.port", "1 to 65535"),
        ("[listen]\nport = true", "listen.port", "1 to 65535"),
        ("[ports]\nrange = '20-10'", "ports.range", "16530-16629"),
        ("[ports]\nrange = 16530", "ports.range", "16530-16629"),
        ("[ports]\nrange = '16530-16531'", "ports.range", "3 ports"),
        ("[ports]\nrange = '16500-16600'", "ports.range", "16520"),
        ("[keepalive]\nloss = 300", "keepalive.loss", '"300ms"'),
        ("[keepalive]\nloss = '300'", "keepalive.loss", "300ms"),
        ("[keepalive]\nloss = '49ms'", "keepalive.loss", "50ms to 10s"),
        ("[protect]\nauto = 'yes'", "protect.auto", "true or false"),
        ("[protect]\ndelay = '5ms'", "protect.delay", "10ms to 10s"),
        ("[protect]\nnetbuffer = 'plugs'", "protect.netbuffer", '"plug"'),
        ("[protect]\nbuffer_limit = 0", "protect.buffer_limit", '"64MiB"'),
        ("[protect]\nbuffer_limit = '0'", "protect.buffer_limit", "more than zero"),
        ("[protect]\nbuffer_limit = '1KiB'", "protect.buffer_limit", "64KiB"),
        ("[protect]\nbuffer_limit = '-1MiB'", "protect.buffer_limit", "negative"),
        ("[protect]\nmax_bandwidth = 10", "protect.max_bandwidth", "10GiB"),
        ("[reprotect]\nafter = '0s'", "reprotect.after", "more than zero"),
        ("[reprotect]\nafter = '48h'", "reprotect.after", "24h"),
        ("[arbiter]\nkind = 'quorum'", "arbiter.kind", '"standby"'),
        ("[arbiter]\nkind = 'etcd'", "arbiter.kind", "endpoints ="),
        ("[etcd]\nendpoints = ['192.0.2.3:2379']", "etcd.endpoints", "https://192.0.2.3:2379"),
        ("[etcd]\nuser = 'mcft'", "etcd.user", "password_file"),
        ("[etcd]\ncert = '/c'", "etcd.cert", "both files"),
        ("[arbiter]\nkind = 'fence'\n[peers.b]\naddresses = ['192.0.2.2']", "arbiter.kind", "[fence.b]"),
        ("[fence.b]\nagent = 'fence_apc'", "fence.b", "[peers.b]"),
        ("[peers.b]\naddresses = ['192.0.2.2']\n[fence.b]", "fence.b", "fence_ipmilan"),
        ("[peers.b]\naddresses = ['192.0.2.2']\n[fence.b]\nagent = '/bin/sh'", "fence.b.agent", "fence_ipmilan"),
        (
            "[peers.b]\naddresses = ['192.0.2.2']\n[fence.b]\nagent = 'fence_apc'\noptions = { action = 'on' }",
            "fence.b.options", "mcft says the action",
        ),
        ("[agent]\nstate_dir = 'var'", "agent.state_dir", "absolute"),
        ("[agent]\noperators = []", "agent.operators", "list"),
        ("[tls]\nstreams = 'on'", "tls.streams", '"required"'),
        ("[peers.b]", "peers.b", "addresses ="),
        ("[peers.b]\naddresses = []", "peers.b.addresses", "list"),
        ("[peers.b]\naddresses = ['host2']", "peers.b.addresses", "IP address"),
        ("[peers.b]\naddresses = ['0.0.0.0']", "peers.b.addresses", "one host"),
        ("[peers.b]\naddresses = ['192.0.2.2', '192.0.2.2']", "peers.b.addresses", "twice"),
        ("[peers.b]\naddresses = ['192.0.2.2']\nprot = 1", "peers.b.prot", "knows addresses, port"),
        ("[peers.'b/c']\naddresses = ['192.0.2.2']", "peers.b/c", "letters"),
        ("name = 'b'\n[peers.b]\naddresses = ['192.0.2.2']", "peers.b", "itself"),
        (
            "[peers.b]\naddresses = ['192.0.2.2']\n[peers.c]\naddresses = ['192.0.2.2']",
            "peers.c.addresses",
            "peer b",
        ),
        ("name = ", "x.toml", "TOML"),
    ],
)
def test_mistakes_are_refused_by_file_key_and_remedy(text: str, key: str, remedy: str) -> None:
    with pytest.raises(Usage) as refusal:
        config.parse(text, "x.toml")
    assert "x.toml" in refusal.value.message
    assert key in refusal.value.message
    assert remedy in refusal.value.message


@given(st.dictionaries(
    st.sampled_from(["name", "listen", "peers", "ports", "keepalive", "protect", "agent", "tls", "other"]),
    st.sampled_from(["1", "true", "'x'", "[]", "[1]", "{}", "{ port = 'x' }", "1979-05-27", "{ x = {} }"]),
))  # fmt: skip
def test_no_document_raises_anything_but_usage(document: dict[str, str]) -> None:
    try:
        config.parse("\n".join(f"{key} = {value}" for key, value in document.items()))
    except Usage as refusal:
        assert refusal.message


def test_an_unknown_peer_is_named_beside_the_known_ones() -> None:
    with pytest.raises(NotFound, match="configured peers: b"):
        config.parse('[peers.b]\naddresses = ["192.0.2.2"]').peer("c")
