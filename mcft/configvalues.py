"""Readers of one value of `mcft.toml`: each gives the value as `Config` has it, or raises ValueError with what to write.

(`units` raises `Usage` with a sentence of its own; `config` adds file and key to either.)
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mcft import units

MIN_BUFFER_LIMIT_BYTES = 64 * 1024  # a packet that the card segments (TSO) is up to 64 KiB
LOSS_MIN_MS, LOSS_MAX_MS = 50, 10_000
REPROTECT_MAX_MS = 24 * 3_600_000
FENCE_DELAY_MAX_MS = 60_000
PORTS_PER_PROTECTION = 3

# Host names end up in file names, in URLs and in certificates.
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,251}[A-Za-z0-9])?")
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_FENCE_AGENT = re.compile(r"fence_[a-z0-9_]+")


def word(raw: Any) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise ValueError("must be a text in quotes")
    return raw


def flag(raw: Any) -> bool:
    if not isinstance(raw, bool):
        raise ValueError("must be true or false, without quotes")
    return raw


def name(raw: Any) -> str:
    if not isinstance(raw, str) or not _NAME.fullmatch(raw):
        raise ValueError('must be a host\'s name of letters, digits, ".", "-" and "_", like "host1"')
    return raw


def names(raw: Any) -> tuple[str, ...]:
    return tuple(name(item) for item in _list(raw, '["host2"]'))


def directory(raw: Any) -> Path:
    if not isinstance(raw, str) or not raw.startswith("/"):
        raise ValueError("must be an absolute path in quotes")
    return Path(raw)


def port(raw: Any) -> int:
    if isinstance(raw, bool) or not isinstance(raw, int) or not 1 <= raw <= 65535:
        raise ValueError("must be a port, 1 to 65535, without quotes")
    return raw


def port_range(raw: Any) -> tuple[int, int]:
    match = re.fullmatch(r"\s*([0-9]{1,5})\s*-\s*([0-9]{1,5})\s*", raw) if isinstance(raw, str) else None
    if match is None:
        raise ValueError('must be two ports: write "16530-16629"')
    first, last = int(match[1]), int(match[2])
    if not 1024 <= first <= last <= 65535:
        raise ValueError('must rise and stay within 1024 to 65535: write "16530-16629"')
    if last - first + 1 < PORTS_PER_PROTECTION:
        raise ValueError(f"must hold {PORTS_PER_PROTECTION} ports per protection at least")
    return first, last


def loss(raw: Any) -> int:
    milliseconds = units.parse_duration_ms(_quantity(raw, "300ms"), what="time")
    if not LOSS_MIN_MS <= milliseconds <= LOSS_MAX_MS:
        raise ValueError('must be 50ms to 10s: write "300ms"')
    return round(milliseconds)


def delay(raw: Any) -> int:
    return units.parse_delay_ms(_quantity(raw, "100ms"))


def rdma_device(raw: Any) -> str:
    """A device's name, "auto" or "off". Raises: ValueError with what to write."""
    if not isinstance(raw, str) or not _DEVICE.fullmatch(raw):
        raise ValueError('must be "auto", "off", or the name of an RDMA device, like "mlx5_0"')
    return raw


def reprotect_after(raw: Any) -> int:
    milliseconds = units.parse_duration_ms(_quantity(raw, "60s"), what="time")
    if milliseconds > REPROTECT_MAX_MS:
        raise ValueError('must be 24h at most: write "60s"')
    return round(milliseconds)


def bandwidth(raw: Any) -> int:
    if raw == 0 and not isinstance(raw, bool):
        return 0
    return units.parse_rate_bytes(_quantity(raw, "10GiB"), what="bandwidth")


def fence_agent(raw: Any) -> str:
    if not isinstance(raw, str) or not _FENCE_AGENT.fullmatch(raw):
        raise ValueError('must be the name of a program of fence-agents, like "fence_ipmilan"')
    return raw


def fence_delay(raw: Any) -> int:
    milliseconds = units.parse_duration_ms(_quantity(raw, "5s"), what="time")
    if milliseconds > FENCE_DELAY_MAX_MS:
        raise ValueError('must be 60s at most: write "5s"')
    return round(milliseconds)


def options(raw: Any) -> tuple[tuple[str, str], ...]:
    """The agent's own options; `action` is mcft's."""
    if not isinstance(raw, dict) or not all(isinstance(v, (str, int)) for v in raw.values()):
        raise ValueError('must be a table: write options = { ip = "192.0.2.9", username = "mcft" }')
    texts = tuple((str(k), str(v).lower() if isinstance(v, bool) else str(v)) for k, v in raw.items())
    for name, text in texts:
        if name == "action" or "\n" in name + text or "=" in name:
            raise ValueError(f"{name!r} can't be given: mcft says the action, and an option is one line")
    return texts


def endpoints(raw: Any) -> tuple[str, ...]:
    urls = []
    for item in _list(raw, '["https://192.0.2.3:2379"]'):
        if not isinstance(item, str) or not re.fullmatch(r"https?://[^/\s]+", item.rstrip("/")):
            raise ValueError('must be URLs without a path: write ["https://192.0.2.3:2379"]')
        urls.append(item.rstrip("/"))
    return tuple(urls)


def buffer_limit(raw: Any) -> int:
    if raw == "auto":
        return 0
    size = units.parse_size_bytes(_quantity(raw, "64MiB"), what="buffer limit")
    if size < MIN_BUFFER_LIMIT_BYTES:
        raise ValueError('must hold at least one large packet: write "auto", or "64KiB" or more')
    return size


def _quantity(raw: Any, example: str) -> str:
    if not isinstance(raw, str):
        raise ValueError(f'must be a text with its unit: write "{example}"')
    return raw


def one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def read(raw: Any) -> str:
        if not isinstance(raw, str) or raw not in choices:
            known = ", ".join(f'"{choice}"' for choice in choices)
            raise ValueError(f"must be {'one of ' if len(choices) > 1 else ''}{known}")
        return raw

    return read


def listen_addresses(raw: Any) -> tuple[str, ...]:
    return tuple(str(_address(item)) for item in _list(raw, '["0.0.0.0"]'))


def peer_addresses(raw: Any) -> tuple[str, ...]:
    addresses = [_address(item) for item in _list(raw, '["192.0.2.2"]')]
    for address in addresses:
        if address.is_unspecified or address.is_multicast:
            raise ValueError(f"{address} is no address of one host")
    if len(set(addresses)) != len(addresses):
        raise ValueError("must not name an address twice: each is a link of its own")
    return tuple(str(address) for address in addresses)


def _list(raw: Any, example: str) -> list[Any]:
    if not isinstance(raw, list) or not raw:
        raise ValueError(f"must be a list in brackets: write {example}")
    return raw


def _address(raw: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    # Names are refused: they would be looked up at the moment of a failure, when DNS may be down as well.
    try:
        if not isinstance(raw, str):
            raise ValueError
        return ipaddress.ip_address(raw)
    except ValueError:
        raise ValueError(f"{raw!r} is no IP address: write the number, names depend on DNS") from None
