"""What the command line's options are made of: values with their unit, and options that several commands share.

A value that is refused becomes Click's usage error (exit 2), which names the option.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

import click

from mcft import api, errors, units

_F = TypeVar("_F", bound=Callable[..., Any])


def quantity(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """An option's callback: the refusals of `units` become Click's usage errors, naming the option."""

    def read(_: click.Context, param: click.Parameter, value: Any) -> Any:
        try:
            return parse(value) if value is not None else None
        except errors.Usage as refusal:
            raise click.BadParameter(refusal.message, param=param) from refusal

    return read


def timeout_s(text: str) -> float:
    return units.parse_duration_ms(text, zero_ok=True, what="timeout", usual_unit="s") / 1000


def states(text: str) -> frozenset[str]:
    states = frozenset(word.strip() for word in text.split(","))
    unknown = ", ".join(sorted(states - set(get_args(api.State))))
    if unknown:
        raise errors.Usage("no-such-state", f"{unknown} is no state: say {', '.join(get_args(api.State))}")
    return states


def domain_argument(*, required: bool = True) -> Callable[[_F], _F]:
    """DOMAIN. An empty word is none: `mcft wait "$VM"` with VM not set would mean another domain, or all."""

    def named(_: click.Context, param: click.Parameter, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise click.BadParameter("the name is empty", param=param)
        return value

    return click.argument("domain", required=required, callback=named)


def delay_option(**more: Any) -> Callable[[_F], _F]:
    read = quantity(units.parse_delay_ms)
    return click.option(
        "--delay", callback=read, metavar="TIME", help="Between checkpoints, 10ms to 10s.", **more
    )


def mc_options(command: _F) -> _F:
    """Engine mc's; without any of them the configuration's [mc] counts."""
    texts = {
        "--mc-rdma-copy": "Engine mc: copy memory locally by RDMA.",
        "--rdma-keepalive": "Engine mc: QEMU's own keepalive on its RDMA link.",
        "--rdma-pin-all": "Engine mc: pin all of the guest's memory for RDMA.",
    }
    names = {"--mc-rdma-copy": "rdma_copy", "--rdma-keepalive": "rdma_keepalive", "--rdma-pin-all": "rdma_pin_all"}
    for flag, text in texts.items():
        command = click.option(flag, names[flag], is_flag=True, help=text)(command)
    transport = click.Choice(get_args(api.Transport))
    command = click.option("--transport", type=transport, help="Engine mc: how checkpoints travel.")(command)
    return click.option("--experimental", is_flag=True, help="Allow what was never seen at work.")(command)


def mc(given: dict[str, Any]) -> api.McOptions | None:
    if not any(given.values()):
        return None
    return api.McOptions(given["transport"] or "tcp", given["rdma_copy"], given["rdma_keepalive"], given["rdma_pin_all"])


def timeout_option(text: str) -> Callable[[_F], _F]:
    return click.option("--timeout", callback=quantity(timeout_s), metavar="TIME", help=text)


def override_options(command: Callable[..., None]) -> Callable[..., None]:
    force = click.option("--force", is_flag=True, help="Your word in place of the arbiter's.")
    peer_is_off = click.option(
        "--peer-is-off", is_flag=True, help="You state that the other host is powered off."
    )
    yes = click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
    return force(peer_is_off(yes(command)))


def disk_paths(disks: tuple[str, ...]) -> dict[str, str]:
    paths: dict[str, str] = {}
    for text in disks:
        target, equals, path = text.partition("=")
        if not (target and equals and path.startswith("/")):
            raise click.UsageError(f'"{text}" is no disk: say --disk vda=/var/lib/libvirt/images/vm1.qcow2')
        if target in paths:
            raise click.UsageError(f"the disk {target} is given twice")
        paths[target] = path
    return paths
