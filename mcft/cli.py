"""The command `mcft`: each command parses, makes one client call and renders. No decisions are made here.

Exit codes are the contract of `man/mcft.1` (see `errors`). Click's own usage errors end with 2 as well.
Answers and progress go to stdout, errors to stderr in one or two sentences.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

import click
import msgspec

from mcft import __version__, acting, api, checktext, client, errors, options, render

WATCH_S = 1.0


class _Session:
    """The global options, and the client they lead to."""

    def __init__(self, host: str | None, config: Path | None) -> None:
        self.host, self.config = host, config

    def agent(self) -> client.Client:
        """The configuration is read only where it matters: operators may not be allowed to read it."""
        if self.host is None and self.config is None:
            return client.local()
        from mcft import config

        path = self.config or config.DEFAULT_PATH
        settings = config.load(path, must_exist=self.config is not None)
        if self.host is None or self.host == settings.name:
            return client.local(None if os.environ.get(client.SOCKET_VARIABLE) else settings.socket_path)
        return client.to_peer(settings, self.host)


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option("--host", metavar="NAME", help="Ask the agent of this configured peer instead of this host's.")
@click.option(
    "--config", type=click.Path(path_type=Path), metavar="FILE", help="Instead of /etc/mcft/mcft.toml."
)
@click.version_option(__version__, message="mcft %(version)s")
@click.pass_context
def cli(ctx: click.Context, host: str | None, config: Path | None) -> None:
    """Fault tolerance for running libvirt domains: a standby on a second host goes on when the first dies."""
    ctx.obj = _Session(host, config)
    _need_command(ctx)


# ---- acts ----


@cli.command()
@options.domain_argument()
@click.option("--to", "to", required=True, metavar="PEER", help="The host that holds the standby.")
@options.delay_option(show_default="as configured, 100ms")
@click.option("--engine", type=click.Choice(get_args(api.EngineChoice)), default="auto", show_default=True)
@click.option("--netbuffer", type=click.Choice(get_args(api.BufferChoice)), default="auto", show_default=True)
@click.option("--arbiter", type=click.Choice(get_args(api.ArbiterKind)), help="Who decides at a loss; default: as configured.")
@options.mc_options
@click.option(
    "--disk", "disks", multiple=True, metavar="TARGET=PATH", help="The disk's place on the standby."
)
@click.option("--overwrite", multiple=True, metavar="PATH", help="This file there may be overwritten.")
@click.option("--rdma-device", default="", metavar="NAME|auto|off", help="For keepalives by RDMA.")
@click.option("--no-wait", is_flag=True, help="Return when the set-up was accepted.")
@options.timeout_option("End waiting after this long (exit 6); the set-up goes on.")
@click.pass_obj
def protect(
    session: _Session,
    /,
    domain: str,
    to: str,
    delay: int | None,
    engine: api.EngineChoice,
    netbuffer: api.BufferChoice,
    arbiter: api.ArbiterKind | None,
    disks: tuple[str, ...],
    overwrite: tuple[str, ...],
    rdma_device: str,
    no_wait: bool,
    timeout: float | None,
    experimental: bool,
    **mc: Any,
) -> None:
    """Protect a running domain with a standby on PEER."""
    paths = options.disk_paths(disks)
    request = api.ProtectRequest(
        domain, to, delay, engine, netbuffer, paths, list(overwrite), acting.new_key(), rdma_device, arbiter,
        options.mc(mc), experimental,
    )
    agent = session.agent()
    with acting.detachable(f"protecting {domain} goes on; `mcft unprotect {domain}` cancels it"):
        job = agent.protect(request)
        if no_wait and job.state == "running":
            click.echo(f"{domain}: accepted, job {job.id}. To wait: mcft wait {domain} --for protected")
            return
        acting.finish(agent, job, timeout, f"{domain} is protected")
        # The act is done; that its state cannot be asked for just now does not undo it.
        with suppress(errors.McftError):
            status = agent.status(domain)
            hint = render.standby_arbiter_hint(status.host, status.protections[0])
            if hint:
                click.echo(f"Note: {hint}")


@cli.command()
@options.domain_argument()
@click.pass_obj
def unprotect(session: _Session, domain: str) -> None:
    """End a protection; the domain goes on as it was before."""
    agent = session.agent()
    acting.act(agent, domain, "unprotect", api.ActRequest(key=acting.new_key()), f"{domain} is not protected")


@cli.command()
@options.domain_argument()
@options.override_options
@click.pass_obj
def failover(session: _Session, domain: str, force: bool, peer_is_off: bool, yes: bool) -> None:
    """Move a protected domain to its standby: a planned switch, or a take-over with the primary gone."""
    acting.override(session.agent(), "failover", domain, force, peer_is_off, yes, f"{domain} was taken over")


@cli.command()
@options.domain_argument()
@options.override_options
@click.pass_obj
def solo(session: _Session, domain: str, force: bool, peer_is_off: bool, yes: bool) -> None:
    """Let a domain's primary go on without its standby."""
    acting.override(session.agent(), "solo", domain, force, peer_is_off, yes, f"{domain} goes on without a standby")


@cli.command()
@options.domain_argument()
@click.option("--accept-lost-data", is_flag=True, help="Your word where nobody can tell which host went on.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.pass_obj
def start(session: _Session, domain: str, accept_lost_data: bool, yes: bool) -> None:
    """Start a protected domain after both hosts were down, on the host where it belongs."""
    agent = session.agent()
    if accept_lost_data:
        answer = agent.status(domain) if sys.stdin.isatty() and not yes else None
        known = (answer.host, answer.protections[0]) if answer else None
        acting.confirm(render.lost_data_stake(domain, known), yes)
    request = api.ActRequest(key=acting.new_key(), accept_lost_data=accept_lost_data)
    acting.act(agent, domain, "start", request, f"{domain} runs")


@cli.command()
@click.argument("on", type=click.Choice(["on", "off"]))
@click.option("--for-shutdown", is_flag=True, help="Until the next boot only (mcft-shutdown.service).")
@options.timeout_option("End waiting after this long (exit 6); it goes on.")
@click.pass_obj
def maintenance(session: _Session, on: str, for_shutdown: bool, timeout: float | None) -> None:
    """Empty this host of everything protected, and keep it so; or end that."""
    agent = session.agent()
    with acting.detachable("it goes on; `mcft status` shows it, `mcft maintenance off` cancels it"):
        job = agent.maintenance(api.MaintenanceRequest(on == "on", for_shutdown, acting.new_key()))
        acting.finish(agent, job, timeout, f"maintenance is {on}")


@cli.command(name="set")
@options.domain_argument()
@options.delay_option(required=True)
@click.pass_obj
def set_(session: _Session, domain: str, delay: int) -> None:
    """Change a protection while it runs."""
    click.echo(render.delay_set(session.agent().set(domain, api.SetRequest(delay_ms=delay))))


# ---- looking ----


@cli.command()
@options.domain_argument()
@click.option("--to", "to", required=True, metavar="PEER", help="The host that would hold the standby.")
@options.delay_option(show_default="as configured, 100ms")
@click.option("--engine", type=click.Choice(get_args(api.EngineChoice)), default="auto", show_default=True)
@click.option("--netbuffer", type=click.Choice(get_args(api.BufferChoice)), default="auto", show_default=True)
@options.mc_options
@click.option(
    "--disk", "disks", multiple=True, metavar="TARGET=PATH", help="The disk's place on the standby."
)
@click.option("--overwrite", multiple=True, metavar="PATH", help="This file there may be overwritten.")
@click.option("--rdma-device", default="", metavar="NAME|auto|off", help="For keepalives by RDMA.")
@click.option("--json", "as_json", is_flag=True, help="The agent's own object (docs/api.md).")
@click.pass_obj
def check(
    session: _Session,
    /,
    domain: str,
    to: str,
    delay: int | None,
    engine: api.EngineChoice,
    netbuffer: api.BufferChoice,
    disks: tuple[str, ...],
    overwrite: tuple[str, ...],
    rdma_device: str,
    as_json: bool,
    experimental: bool,
    **mc: Any,
) -> None:
    """Say what protect would refuse, warn of and cost; nothing is touched."""
    paths = options.disk_paths(disks)
    request = api.ProtectRequest(
        domain, to, delay, engine, netbuffer, paths, list(overwrite), rdma_device=rdma_device, mc=options.mc(mc),
        experimental=experimental,
    )  # fmt: skip
    answer, raw = session.agent().check(request)
    click.echo(msgspec.json.format(raw, indent=2) if as_json else checktext.check_text(answer))
    if answer.exit_code:
        sys.exit(answer.exit_code)


@cli.command()
@options.domain_argument(required=False)
@click.option("--json", "as_json", is_flag=True, help="The agent's own object (docs/api.md).")
@click.option("--watch", is_flag=True, help="Show it anew every second, until Ctrl-C.")
@click.option(
    "--check", is_flag=True, help="Exit 1, with a line each, if one would not survive a host's loss."
)
@click.pass_obj
def status(session: _Session, domain: str | None, as_json: bool, watch: bool, check: bool) -> None:
    """Show all protections, or one."""
    if watch and (as_json or check):
        raise click.UsageError("--watch goes with neither --json nor --check")
    if watch and not sys.stdout.isatty():
        raise click.UsageError("--watch needs a terminal; `mcft events --follow` does not")
    agent = session.agent()
    if watch:
        render.live(_every_second(lambda: render.status_text(agent.status(domain))))
        return
    answer, raw = agent.status_with_json(domain)
    exposed = render.check_lines(answer)
    if as_json:
        click.echo(msgspec.json.format(raw, indent=2))
    elif check:
        click.echo(
            "\n".join(exposed) or f"{len(answer.protections)} protected, each survives the loss of a host"
        )
    else:
        click.echo(render.status_text(answer))
    if check and exposed:
        sys.exit(errors.FAILED)


@cli.command()
@options.domain_argument()
@click.option(
    "--for",
    "states",
    callback=options.quantity(options.states),
    metavar="STATE[,STATE…]",
    default="protected",
    show_default=True,
    help="Any of these states.",
)
@options.timeout_option("Give up after this long (exit 6). Without it: never.")
@click.pass_obj
def wait(session: _Session, domain: str, states: frozenset[str], timeout: float | None) -> None:
    """Wait until a protection is in one of the states."""
    reached = session.agent().wait_state(domain, states, timeout)
    click.echo(f"{reached.domain}: {reached.state}")


@cli.command()
@options.domain_argument(required=False)
@click.option("--follow", is_flag=True, help="Go on with new events as they come, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
@click.pass_obj
def events(session: _Session, domain: str | None, follow: bool, as_json: bool) -> None:
    """Show the journal of all protections, or of one."""
    agent = session.agent()
    for event in agent.follow_events(domain) if follow else agent.events(domain).events:
        click.echo(msgspec.json.encode(event).decode() if as_json else render.event_line(event))


@cli.group(invoke_without_command=True)
@click.pass_context
def peer(ctx: click.Context) -> None:
    """The other hosts."""
    _need_command(ctx)


@peer.command(name="list")
@click.pass_obj
def peer_list(session: _Session) -> None:
    """Show the configured peers and whether their agents answer."""
    click.echo(render.peers_text(session.agent().peers()))


# ---- without an agent ----


@cli.command()
@options.domain_argument()
@click.option("--local", is_flag=True, help="Required: only this host is touched, the other is not asked.")
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.pass_obj
def forget(session: _Session, domain: str, local: bool, yes: bool) -> None:
    """mcft is broken and you want your domain: remove on this host all that mcft did to it."""
    if not local or session.host is not None:
        raise click.UsageError("forget works on this host only: say `mcft forget DOMAIN --local`")
    question = (
        f"This host forgets the protection of {domain} and opens its network without asking the other host."
    )
    acting.confirm(question + f"\n{render.stake('forget', domain, False, False, None)}", yes)
    for line in importlib.import_module("mcft.agent.forget").forget_local(domain):
        click.echo(line)


@cli.command()
@click.pass_obj
def agent(session: _Session) -> None:
    """Run this host's agent in the foreground (systemd's mcft-agent.service does)."""
    from mcft.config import DEFAULT_PATH

    start = importlib.import_module("mcft.agent.main").main
    sys.exit(start(session.config or DEFAULT_PATH, must_exist=session.config is not None))


# ---- what several commands share ----


def _refuse_no_text(words: list[str]) -> None:
    """Nothing that is named here may hold bytes that are no text: they could not be sent, nor shown."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise click.UsageError(f"{word!a} is not UTF-8: a name that mcft can send is text") from None


def _need_command(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(errors.USAGE)


def _every_second(text: Callable[[], str]) -> Iterator[str]:
    while True:
        yield text()
        time.sleep(WATCH_S)


def main(args: list[str] | None = None) -> int:
    """Run the command line (args, or the process's own); the answer is the process's exit code."""
    try:
        _refuse_no_text(sys.argv[1:] if args is None else args)
        result = cli.main(args, prog_name="mcft", standalone_mode=False)
    except errors.McftError as error:
        click.echo(f"mcft: {error}", err=True)
        return error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "mcft"
        click.echo(f"mcft: {error.format_message().rstrip('.')}. See `{where} --help`.", err=True)
        return errors.USAGE
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return errors.DETACHED
    return result if isinstance(result, int) else errors.OK


if __name__ == "__main__":
    sys.exit(main())
