"""What people see: status blocks, events, peers, the stake of a dangerous act, progress, the live view.

Texts are plain strings of at most 80 columns, coloured by click (which drops colours where no terminal
is), so that `mcft status` needs no rich; progress bars and the live view import rich when they are used.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TextIO

import click

from mcft import api
from mcft.units import format_bytes, format_delay, format_duration_ms

WIDTH = 80
_LABEL = 15

_COLOURS = {
    "protected": "green", "active": "yellow", "solo": "yellow", "preparing": "cyan", "syncing": "cyan",
    "resyncing": "cyan", "taking-over": "cyan", "muted": "red", "failed": "red", "lost": "red",
}  # fmt: skip

# What to type in each state, where the agent knows nothing better. {d}: domain, {p}: peer,
# {override}: the operator's word on this side.
_NEXT = {
    "preparing": "mcft wait {d} --for protected; mcft unprotect {d} cancels",
    "syncing": "mcft wait {d} --for protected; mcft unprotect {d} cancels",
    "protected": "nothing; mcft failover {d} switches to the other host",
    "muted": "mcft events {d}; if {p} is gone for good: mcft {override} {d}",
    "solo": "mcft protect {d} --to {p}",
    "resyncing": "mcft wait {d} --for protected",
    "taking-over": "mcft wait {d} --for active,protected",
    "active": "mcft protect {d} --to {p}, once {p} is back",
    "lost": "mcft --host {p} status {d}",
    "stopped": "mcft start {d} protects it again; mcft unprotect {d} ends it",
    "unprotected": "mcft protect {d} --to {p}",
    "failed": "mcft events {d} tells why; then mcft protect {d} --to {p}",
}
_DEPENDS_ON_STANDBY = {"preparing", "syncing", "protected", "muted", "resyncing"}


# ---- status ----


def status_text(status: api.Status) -> str:
    """Everything an agent protects, a block per protection."""
    parts = [_maintenance(status.host)] if status.maintenance else []
    if not status.protections and not parts:
        return f"{status.host} protects nothing. To begin: mcft protect DOMAIN --to PEER"
    return "\n\n".join([*parts, *(protection_text(status.host, protection) for protection in status.protections)])


def _maintenance(host: str) -> str:
    text = f"{host} is in MAINTENANCE: nothing is protected from it or to it.\nTo end it: mcft maintenance off"
    return click.style(text, fg="yellow", bold=True)


def protection_text(host: str, p: api.Protection) -> str:
    """One protection's block; host is the answering agent's name."""
    lines = [_headline(host, p)]
    if p.state == "muted":
        lines.append(
            _alarm(f"MUTED: no packet of {p.domain} leaves, its network is cut off until this ends.")
        )
    if p.unsafe:
        lines.append(_labelled("UNSAFE", "; ".join(p.unsafe), colour="red"))
    if p.reason:
        lines.append(_labelled("reason", p.reason))
    lines += [_labelled(label, text) for label, text in _facts(p) if text]
    lines.append(_labelled("next", p.next_step or _next_step(p), colour="bold"))
    hint = standby_arbiter_hint(host, p)
    if hint:
        lines.append(_labelled("note", hint))
    return "\n".join(lines)


def standby_arbiter_hint(host: str, p: api.Protection) -> str:
    """What it means to have no arbiter but the standby; empty where it means nothing (any more)."""
    if p.arbiter.kind != "standby" or p.state not in _DEPENDS_ON_STANDBY:
        return ""
    standby = p.peer if p.role == "primary" else host
    return f"if {standby} dies, {p.domain} is unreachable until `mcft solo {p.domain}`"


def check_summary(status: api.Status) -> str:
    """What `status --check` says when it has nothing to complain about."""
    count = len(status.protections)
    return (
        f"{count} protected, each survives the loss of a host" if count else f"{status.host} protects nothing"
    )


def check_lines(status: api.Status) -> list[str]:
    """A line for each protection that would not survive the loss of a host."""
    return [
        f"{p.domain}: does not survive the loss of a host: {p.state}"
        + (f", {p.reason}" if p.reason else "")
        + (f", unsafe: {'; '.join(p.unsafe)}" if p.unsafe else "")
        + _no_arbiter(p)
        for p in status.protections
        if not p.survives_host_loss
    ]


def _no_arbiter(p: api.Protection) -> str:
    """Empty, or that its arbiter could not decide a loss now: nothing else shows it until a host is lost."""
    if not p.arbiter.reachable:
        return f", its arbiter ({p.arbiter.kind}) can't decide: {p.arbiter.reason or 'no answer'}"
    if p.arbiter.peer_reachable is False:
        return f", its arbiter ({p.arbiter.kind}) can't decide for {p.peer}: see `mcft --host {p.peer} status`"
    return ""


def _headline(host: str, p: api.Protection) -> str:
    guest = "" if p.guest_running or p.role == "standby" else ", guest not running"
    if p.state in ("solo", "active", "unprotected", "stopped"):
        other = f"peer {p.peer}"
    elif p.state == "lost":
        other = f"{p.peer} has it"
    else:
        other = f"{'standby' if p.role == 'primary' else 'primary'} on {p.peer}"
    where = f"{p.role} here on {host}, {other}{guest}"
    gap = "  " if len(p.domain) + len(p.state) + len(where) + 4 <= WIDTH else "\n  "
    state = click.style(p.state.upper(), fg=_COLOURS.get(p.state), bold=True)
    return f"{click.style(p.domain, bold=True)}  {state}{gap}{where}"


def _next_step(p: api.Protection) -> str:
    override = "solo" if p.role == "primary" else "failover"
    return _NEXT[p.state].format(d=p.domain, p=p.peer, override=override)


def _facts(p: api.Protection) -> Iterator[tuple[str, str]]:
    period = "" if p.engine == "mc" else f", {p.mode}"
    stretched = f" stretched to {format_delay(p.period_ms)}" if p.period_ms > p.delay_ms else ""
    delay = f"delay {format_delay(p.delay_ms)}{stretched}"
    yield "engine", f"{p.engine}{period}, {delay}, generation {p.generation}, {_arbiter(p.arbiter)}"
    yield "since", p.since
    if p.job is not None and p.job.state == "running":
        yield "job", f"{p.job.kind}: {job_line(p.job)}"
    yield "checkpoints", _checkpoints(p.checkpoints)
    if p.mc is not None:
        yield "mc", _mc(p.mc)
    yield "network", _network(p)
    yield "disks", ", ".join(_disk(disk) for disk in p.disks)
    yield "keepalives", ", ".join(_link(link) for link in p.keepalive)
    if p.last_event is not None:
        yield "last event", f"{p.last_event.time} {p.last_event.text}"


def _mc(mc: api.McStatus) -> str:
    """The last checkpoint as QEMU tells it: ms and Mbit/s."""
    names = {"xmit-time": "sent in", "log-dirty-time": "log", "migration-bitmap-time": "bitmap", "ram-copy-time": "copy"}
    said = [f"{names[name]} {mc.statistics[name]:g}ms" for name in names if name in mc.statistics]
    said += [f"{mc.statistics[name]:.0f} {name}" for name in ("mbps", "copy-mbps") if name in mc.statistics]
    if "downtime" in mc.statistics:
        said.append(f"downtime {mc.statistics['downtime']:g}ms")
    return ", ".join([mc.transport, *said, *[name for name in mc.capabilities if name != "mc"]])


def _checkpoints(c: api.Checkpoints) -> str:
    if not c.acknowledged:
        return ""
    pause = _quantiles(", pause", c.pause_ms)
    age = format_duration_ms(c.last_ack_age_ms)
    last = f"last ack {age} ago" if c.last_ack_age_ms is not None else "no ack lately"
    return f"{c.rate_hz:.1f}/s, {last}{pause}, {c.acknowledged} so far"


def _network(p: api.Protection) -> str:
    if p.network.buffer == "none" and not p.network.nics:
        return ""
    # A standby is silent by design; saying so there would read like an alarm.
    flow = "" if p.role == "standby" else "flowing, " if p.output_flowing else "NOT flowing, "
    packets = sum(nic.held_packets for nic in p.network.nics)
    size = format_bytes(sum(nic.held_bytes for nic in p.network.nics))
    dropped = sum(nic.dropped for nic in p.network.nics)
    where = ", ".join(f"{nic.target} in {nic.ifb}" for nic in p.network.nics if nic.ifb)
    buffer = f"{p.network.buffer} ({where})" if where else p.network.buffer
    return (
        f"{flow}{buffer}, {packets} packets ({size}) held"
        + _quantiles(", holds", p.network.hold_ms)
        + (f", {dropped} dropped" if dropped else "")
    )


def _arbiter(arbiter: api.ArbiterStatus) -> str:
    if arbiter.kind == "standby":
        return "arbiter standby"
    if not arbiter.reachable:
        return f"arbiter {arbiter.kind} CAN'T DECIDE ({arbiter.reason or 'no answer'})"
    if arbiter.peer_reachable is False:
        return f"arbiter {arbiter.kind} CAN'T DECIDE for the other host"
    if arbiter.last_ok_age_ms is None:
        return f"arbiter {arbiter.kind}"
    return f"arbiter {arbiter.kind} ({format_duration_ms(arbiter.last_ok_age_ms)} ago)"


def _disk(disk: api.DiskStatus) -> str:
    progress = f" {disk.progress:.0%}" if disk.progress < 1 else ""
    return f"{disk.target} {disk.state}{progress}"


def _link(link: api.LinkStatus) -> str:
    age = "never heard" if link.age_ms is None else f"{format_duration_ms(link.age_ms)} ago"
    if link.detail:
        return f"{link.kind} {link.link} NOT CONNECTED ({link.detail}), {age}"
    return f"{link.kind} {link.link} {age}" + (f" ({link.missed} missed)" if link.missed else "")


def _quantiles(what: str, q: api.Quantiles) -> str:
    if q.p50 is None:
        return ""
    return f"{what} {format_duration_ms(q.p50)}" + (
        f" (p99 {format_duration_ms(q.p99)})" if q.p99 is not None else ""
    )


def _labelled(label: str, text: str, colour: str = "") -> str:
    # Nothing is broken inside a word: a path or a command must survive copy and paste.
    indent = " " * _LABEL
    wrapped = textwrap.fill(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )
    head = f"  {label}".ljust(_LABEL)
    if colour == "bold":
        head = click.style(head, bold=True)
    elif colour:
        head = click.style(head, fg=colour, bold=True)
    return head + wrapped[_LABEL:]


def _alarm(text: str) -> str:
    filled = textwrap.wrap(text, WIDTH - 8)
    return "\n".join(
        click.style(f"  !! {line.ljust(WIDTH - 8)} !!", fg="white", bg="red", bold=True) for line in filled
    )


# ---- events, peers, answers ----


def event_line(event: api.EventBody) -> str:
    """One line of the journal; long texts are left long, for grep."""
    colour = {"warning": "yellow", "alarm": "red"}.get(event.level)
    level = "" if event.level == "info" else f"{event.level.upper()}: "
    return f"{event.time}  {event.domain}  {event.kind}  " + click.style(f"{level}{event.text}", fg=colour)


def peers_text(peers: api.Peers) -> str:
    """A table of the configured peers."""
    if not peers.peers:
        return f"{peers.host} has no peer. Add [peers.NAME] to /etc/mcft/mcft.toml"
    rows = [("PEER", "AGENT", "MCFT", "ADDRESSES")]
    for peer in peers.peers:
        answers = ("maintenance" if peer.maintenance else "answers") if peer.reachable else "SILENT"
        addresses = ", ".join(peer.addresses)
        rows.append(
            (
                peer.name,
                answers,
                peer.mcft or "-",
                f"{addresses} ({peer.detail})" if peer.detail else addresses,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def job_line(job: api.JobBody) -> str:
    """How far a job is."""
    progress = "" if job.progress is None else f" {job.progress:.0%}"
    return f"{job.step or job.state}{progress}"


def delay_set(p: api.Protection) -> str:
    return f"{p.domain}: a checkpoint every {format_delay(p.delay_ms)}"


def stake(
    verb: str, domain: str, force: bool, peer_is_off: bool, known: tuple[str, api.Protection] | None
) -> str:
    """What an override puts at stake. known: the answering host and its protection, if it answered."""
    sentences = []
    if known is not None:
        host, p = known
        age = format_duration_ms(p.checkpoints.last_ack_age_ms)
        sentences.append(
            f"{domain} is {p.state} on {host} (generation {p.generation}, {p.role}, peer {p.peer})."
        )
        if verb == "failover" and p.role == "standby":
            sentences.append(
                f"It goes on from the last checkpoint, acknowledged {age} ago; what came later is lost."
            )
    peer = known[1].peer if known else "the other host"
    if peer_is_off:
        sentences.append(f"You state that {peer} is powered off and stays so.")
    if force:
        sentences.append("You decide in the arbiter's place.")
    sentences.append(
        f"If {domain} still runs on {peer}, two of it will answer for one address, "
        "their disks part, and one of both histories is lost."
    )
    return textwrap.fill(" ".join(sentences), WIDTH)


def lost_data_stake(domain: str, known: tuple[str, api.Protection] | None) -> str:
    """What `start --accept-lost-data` puts at stake. known: the answering host and its protection, if it answered."""
    sentences = []
    peer = "the other host"
    if known is not None:
        host, p = known
        peer = p.peer
        why = f": {p.reason}" if p.reason else ""
        sentences.append(f"{domain} is {p.state} on {host} (generation {p.generation}, {p.role}, peer {peer}){why}.")
    sentences.append(
        f"It would be started from this host's disks. If {peer} went on with it in the meantime, all that it has done there "
        f"since is lost; if it still runs there, two of it will answer for one address."
    )
    return textwrap.fill(" ".join(sentences), WIDTH)


# ---- progress and the live view ----


@contextmanager
def progress(title: str, out: TextIO) -> Iterator[Callable[[api.JobBody], None]]:
    """Show a job as it goes: a bar on a terminal, else a line for each new step or tenth."""
    if out.isatty():
        with _progress_bar(title, out) as show:
            yield show
    else:
        yield _progress_lines(title, out)


def _progress_lines(title: str, out: TextIO) -> Callable[[api.JobBody], None]:
    shown: tuple[str, int | None] | None = None

    def show(job: api.JobBody) -> None:
        nonlocal shown
        now = (job.step, None if job.progress is None else int(job.progress * 10))
        if job.state == "running" and now != shown:
            shown = now
            click.echo(f"{title}: {job_line(job)}", file=out)

    return show


@contextmanager
def _progress_bar(title: str, out: TextIO) -> Iterator[Callable[[api.JobBody], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=out), transient=True) as bar:
        task = bar.add_task(title, total=None)

        def show(job: api.JobBody) -> None:
            # Domain names and steps are texts, not markup.
            description = f"{title}: {job.step}".replace("[", "\\[")
            bar.update(
                task,
                description=description,
                total=None if job.progress is None else 1.0,
                completed=job.progress or 0,
            )

        yield show


def live(texts: Iterable[str]) -> None:
    """Show each text in the place of the one before, until the texts or the reader end it."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False, screen=True, vertical_overflow="crop") as view:
        for text in texts:
            view.update(Text.from_ansi(text), refresh=True)
