"""The client against a fake agent: routes, bodies, errors, patience with a restarting agent, TLS by name."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_agent
import msgspec
import pytest
import trustme
from fake_agent import BREAK, PROTECTED, FakeAgent, changed, job, status

from mcft import api, client, errors
from mcft.config import Config, Peer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[FakeAgent]:
    with fake_agent.on_socket(tmp_path / "s") as fake:
        yield fake


@pytest.fixture
def here(tmp_path: Path, agent: FakeAgent) -> client.Client:
    return client.local(tmp_path / "s")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "RETRY_S", 0.0)


def test_every_route(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/status", status(PROTECTED)).say("POST /v1/protections", job())
    agent.say("POST /v1/protections/a%2Fb/failover", job()).say("POST /v1/protections/vm1/set", PROTECTED)
    agent.say("GET /v1/jobs/j1", job()).say("POST /v1/jobs/j1/cancel", job("cancelled"))
    agent.say("GET /v1/events", api.Events("host1")).say("GET /v1/peers", api.Peers("host1"))
    assert here.status("vm1").protections == [PROTECTED]
    assert here.protect(api.ProtectRequest("vm1", "host2", key="k")) == job()
    said = msgspec.json.decode(msgspec.json.encode(api.ProtectRequest("vm1", "host2")))
    assert said == {"domain": "vm1", "to": "host2"}, "an older agent takes no null for what was not said"
    assert here.act("a/b", "failover", api.ActRequest(force=True)) == job()
    assert here.set("vm1", api.SetRequest(delay_ms=50)) == PROTECTED
    assert here.job("j1", 1.5) == job()
    assert here.cancel("j1") == job("cancelled")
    assert here.events("vm1", 7, 2.0) == api.Events("host1")
    assert here.peers() == api.Peers("host1")
    queries = [query for _, query, _ in agent.asked]
    assert queries[0] == {"domain": "vm1"}
    assert queries[4] == {"wait_s": "1.5"}
    assert queries[6] == {"domain": "vm1", "after": "7", "wait_s": "2.0"}
    bodies = [body for _, _, body in agent.asked]
    assert bodies[1]["domain"] == "vm1"
    assert bodies[1]["key"] == "k"
    assert bodies[3] == {"delay_ms": 50}


def test_no_socket_says_how_to_look(tmp_path: Path) -> None:
    with pytest.raises(errors.Unreachable, match="systemctl status mcft-agent"):
        client.local(tmp_path / "none").status()


def test_the_environment_names_the_socket(
    agent: FakeAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent.say("GET /v1/status", status())
    monkeypatch.setenv("MCFT_SOCKET", str(tmp_path / "s"))
    assert client.local().status() == status()


@pytest.mark.parametrize("kind", list(errors.BY_EXIT_CODE.values()))
def test_errors_arrive_as_they_were_raised(
    agent: FakeAgent, here: client.Client, kind: type[errors.McftError]
) -> None:
    sent = kind("slug", "what", "why", "next")
    agent.refuse("GET /v1/peers", sent, sent.http_status)
    with pytest.raises(kind) as raised:
        here.peers()
    assert str(raised.value) == str(sent)
    assert raised.value.code == "slug"


def test_an_error_that_is_no_json_still_is_an_error(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/peers", b"<html>", code=500)
    with pytest.raises(errors.Failed, match="500"):
        here.peers()


def test_an_answer_of_another_shape_is_refused(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/peers", b'{"peers": 5}')
    with pytest.raises(errors.Failed, match="not understood"):
        here.peers()


def test_fields_of_a_newer_agent_are_kept_in_its_json(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/status", b'{"host": "host1", "protections": [], "moon": "full"}')
    answer, raw = here.status_with_json()
    assert answer == status()
    assert b"moon" in raw


def test_a_domain_without_protection_is_not_found(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/status", status())
    with pytest.raises(errors.NotFound, match="vm9"):
        here.status("vm9")


def test_a_broken_post_says_that_it_may_have_arrived(agent: FakeAgent, here: client.Client) -> None:
    agent.say("POST /v1/protections", BREAK)
    with pytest.raises(errors.Unreachable, match="may have arrived"):
        here.protect(api.ProtectRequest("vm1", "host2"))


def test_a_job_is_followed_through_a_restart_of_the_agent(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/jobs/j1", job(step="copy"), BREAK, BREAK, job("done"))
    assert [step.state for step in here.follow_job(job())] == ["running", "running", "done"]


def test_patience_ends(agent: FakeAgent, here: client.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE_S", 0.0)
    agent.say("GET /v1/jobs/j1", BREAK)
    with pytest.raises(errors.Unreachable):
        list(here.follow_job(job()))


def test_a_job_that_outlives_the_timeout_goes_on(agent: FakeAgent, here: client.Client) -> None:
    with pytest.raises(errors.TimedOut, match="still goes on"):
        list(here.follow_job(job(), timeout_s=0))


def test_waiting_for_a_state(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/status", *(status(changed(state=state)) for state in ("preparing", "syncing", "solo")))
    agent.say("GET /v1/events", api.Events("host1"))
    assert here.wait_state("vm1", frozenset({"protected", "solo"})).state == "solo"
    assert agent.asked[1][1]["after"] == "7"


def test_waiting_for_a_protect_that_still_looks(agent: FakeAgent, here: client.Client) -> None:
    """As `protect --no-wait` tells one to. Fails if that is taken for a domain that nobody protects."""
    agent.refuse("GET /v1/status", errors.NotFound("not-yet", "'vm1' is not protected yet"), 404)
    with pytest.raises(errors.TimedOut, match="not protected yet"):
        here.wait_state("vm1", frozenset({"protected"}), 0.0)
    agent.say("GET /v1/status", status(changed(state="protected")))
    assert here.wait_state("vm1", frozenset({"protected"})).state == "protected"


def test_waiting_ends_with_a_failed_protection(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/status", status(changed(state="failed", reason="the disk is full")))
    with pytest.raises(errors.Failed, match="the disk is full"):
        here.wait_state("vm1", frozenset({"protected"}))
    assert here.wait_state("vm1", frozenset({"failed"})).state == "failed"


def test_waiting_times_out(agent: FakeAgent, here: client.Client) -> None:
    agent.say("GET /v1/status", status(changed(state="syncing")))
    with pytest.raises(errors.TimedOut, match="vm1 is syncing"):
        here.wait_state("vm1", frozenset({"protected"}), timeout_s=0)


def test_events_are_followed_from_the_newest(agent: FakeAgent, here: client.Client) -> None:
    first, second = (api.EventBody(n, "t", "vm1", "k", "x") for n in (3, 9))
    agent.say("GET /v1/events", api.Events("host1", [first]), BREAK, api.Events("host1", [second]))
    follow = here.follow_events()
    assert [next(follow), next(follow)] == [first, second]
    assert [query["after"] for _, query, _ in agent.asked] == ["0", "3", "3"]


# ---- TLS ----


@pytest.fixture(scope="module")
def ca() -> trustme.CA:
    return trustme.CA()


def _config(pki: Path, ca: trustme.CA, port: int, *addresses: str) -> Config:
    config = Config(pki_dir=pki, peers={"host2": Peer("host2", addresses, port)})
    for path in (config.ca_cert, config.client_key):
        path.parent.mkdir(parents=True)
    own = ca.issue_cert("host1")
    ca.cert_pem.write_to_path(config.ca_cert)
    own.private_key_pem.write_to_path(config.client_key)
    config.client_cert.write_bytes(b"".join(blob.bytes() for blob in own.cert_chain_pems))
    return config


def _server_context(ca: trustme.CA, name: str) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.verify_mode = ssl.CERT_REQUIRED
    ca.issue_cert(name).configure_cert(context)
    ca.configure_trust(context)
    return context


def test_a_peer_is_asked_over_tls_at_the_address_that_answers(tmp_path: Path, ca: trustme.CA) -> None:
    with fake_agent.on_tls(_server_context(ca, "host2")) as (agent, port):
        agent.say("GET /v1/status", status(PROTECTED))
        config = _config(tmp_path, ca, port, "127.255.255.254", "127.0.0.1")
        assert client.to_peer(config, "host2").status().protections == [PROTECTED]


def test_a_server_with_another_name_is_not_the_peer(tmp_path: Path, ca: trustme.CA) -> None:
    with fake_agent.on_tls(_server_context(ca, "host3")) as (agent, port):
        with pytest.raises(errors.Unreachable, match="host2"):
            client.to_peer(_config(tmp_path, ca, port, "127.0.0.1"), "host2").status()
        assert agent.asked == []


def test_a_server_of_another_ca_is_not_the_peer(tmp_path: Path, ca: trustme.CA) -> None:
    with (
        fake_agent.on_tls(_server_context(trustme.CA(), "host2")) as (_, port),
        pytest.raises(errors.Unreachable),
    ):
        client.to_peer(_config(tmp_path, ca, port, "127.0.0.1"), "host2").status()


def test_a_missing_certificate_is_named(tmp_path: Path, ca: trustme.CA) -> None:
    config = _config(tmp_path, ca, 1, "127.0.0.1")
    config.client_key.unlink()
    with pytest.raises(errors.Usage, match=str(config.client_key)):
        client.to_peer(config, "host2")


# ---- what is written down about the API ----


def test_the_schema_of_the_status_is_current() -> None:
    written = json.loads((ROOT / "docs" / "status.schema.json").read_text())
    assert _unordered(written) == _unordered(msgspec.json.schema(api.Status)), (
        "docs/api.md says how to write it"
    )


def _unordered(schema: Any) -> Any:
    """msgspec's versions order alternatives differently, which means the same."""
    if isinstance(schema, dict):
        return {key: _unordered(value) for key, value in schema.items()}
    if isinstance(schema, list):
        return sorted((_unordered(item) for item in schema), key=repr)
    return schema


@pytest.mark.parametrize(
    "kind",
    [
        api.Status, api.Protection, api.Checkpoints, api.Quantiles, api.Network, api.NicStatus,
        api.DiskStatus, api.LinkStatus, api.ArbiterStatus, api.Versions, api.JobBody, api.EventBody,
        api.ErrorBody, api.Events, api.PeerBody, api.Peers, api.ProtectRequest, api.ActRequest,
        api.SetRequest, api.MaintenanceRequest,
    ],
)  # fmt: skip
def test_every_field_is_documented(kind: type[msgspec.Struct]) -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    missing = [f.encode_name for f in msgspec.structs.fields(kind) if f"`{f.encode_name}`" not in text]
    assert not missing
