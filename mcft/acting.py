"""A command that changes something: confirmed where a guest is at stake, sent once, followed to its end.

Ctrl-C ends the following, never the act (exit 130): the agent goes on.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from mcft import api, client, errors, render


def new_key() -> str:
    """An idempotency key: an agent that gets one request twice acts once."""
    return os.urandom(16).hex()


def override(
    agent: client.Client, verb: client.Verb, domain: str, force: bool, peer_is_off: bool, yes: bool, done: str
) -> None:
    if (force or peer_is_off) and not yes:
        answer = agent.status(domain) if sys.stdin.isatty() else None
        known = (answer.host, answer.protections[0]) if answer else None
        confirm(render.stake(verb, domain, force, peer_is_off, known), yes)
    act(agent, domain, verb, api.ActRequest(force, peer_is_off, new_key()), done)


def act(agent: client.Client, domain: str, verb: client.Verb, request: api.ActRequest, done: str) -> None:
    with detachable(f"{verb} of {domain} goes on; `mcft status {domain}` shows it"):
        job = agent.act(domain, verb, request)
        if verb == "unprotect" and job.kind == "protect":
            # That job is cancelled: once it has undone itself, whatever it had reached (nothing, mostly) is ended too.
            with render.progress(f"protect {domain}", sys.stdout) as show:
                for step in agent.follow_job(job, None):
                    job = step
                    show(job)
            if job.error is not None:
                api.raise_error(job.error)
            job = agent.act(domain, verb, api.ActRequest(key=new_key()))
        finish(agent, job, None, done)


def finish(agent: client.Client, job: api.JobBody, timeout_s: float | None, done: str) -> None:
    """Show a job to its end and say its result; a job that failed raises what it failed of."""
    with render.progress(f"{job.kind} {job.domain}", sys.stdout) as show:
        for step in agent.follow_job(job, timeout_s):
            job = step
            show(job)
    if job.state == "done":
        click.echo(job.result or done)
    elif job.error is not None:
        api.raise_error(job.error)
    else:
        raise errors.Failed(f"job-{job.state}", f"{job.kind} of {job.domain} was {job.state}", job.result)


@contextmanager
def detachable(notice: str) -> Iterator[None]:
    """Ctrl-C ends the waiting, not the act."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"\nmcft: detached; {notice}.", err=True)
        sys.exit(errors.DETACHED)


def confirm(stake: str, yes: bool) -> None:
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError("this needs a confirmation and there is no terminal: add --yes")
    click.echo(stake, err=True)
    if not click.confirm("Go on?", err=True):
        click.echo("mcft: nothing was changed.", err=True)
        sys.exit(errors.FAILED)
