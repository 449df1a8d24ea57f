"""Durations and sizes as people write them ("100ms", "512MiB"), both directions.

A number without a unit is refused on purpose: `--delay 100` meant seconds to one half of the people
and milliseconds to the other. Every refusal is one sentence that can be shown as it stands.
"""

from __future__ import annotations

import re

from mcft.errors import Usage

DELAY_MIN_MS, DELAY_MAX_MS = 10, 10_000

_DURATION_MS = {"us": 0.001, "ms": 1.0, "s": 1000.0, "m": 60_000.0, "min": 60_000.0, "h": 3_600_000.0}
_SIZE_BYTES = {
    "B": 1,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
}  # fmt: skip
_SIZE_OF_LOWER = {unit.lower(): factor for unit, factor in _SIZE_BYTES.items()}

# No exponents, no underscores, ASCII digits only: what float() takes beyond that is a typing error here.
# At most 15 digits, so that no product overflows to infinity.
_QUANTITY = re.compile(r"(-?)([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([a-zA-Z]*)")


def parse_duration_ms(
    text: str, *, zero_ok: bool = False, what: str = "duration", usual_unit: str = "ms"
) -> float:
    """Read "100ms", "1.5s", "2m" as milliseconds.

    what: the word for the value in refusals; usual_unit: the unit that they suggest. Raises `Usage` for
    a missing or unknown unit, a negative number, zero unless zero_ok (a bare 0 needs no unit), and what is no number.
    """
    number, unit = _split(text, what, example="100ms")
    if not unit and number:
        raise _bad(f'the {what} "{text}" has no unit: say {text.strip()}{usual_unit}')
    if unit and unit not in _DURATION_MS:
        raise _bad(f'the {what} "{text}" has an unknown unit: say 100ms, 1.5s or 2m')
    milliseconds = number * _DURATION_MS[unit] if unit else 0.0
    if milliseconds == 0 and not zero_ok:
        raise _bad(f"the {what} must be more than zero, for example 100{usual_unit}")
    return milliseconds


def parse_delay_ms(text: str) -> int:
    """Read the longest time between two checkpoints: 10 ms to 10 s, in whole milliseconds."""
    milliseconds = parse_duration_ms(text, what="delay")
    if not DELAY_MIN_MS <= milliseconds <= DELAY_MAX_MS:
        raise _bad(f'the delay "{text}" is outside 10ms to 10s')
    # Decimal fractions of a second are not exact in binary: 0.07s is 70.00000000000001 ms.
    whole = round(milliseconds)
    if abs(milliseconds - whole) > 1e-6:
        raise _bad(f'the delay "{text}" is not a whole number of milliseconds')
    return whole


def parse_size_bytes(text: str, *, zero_ok: bool = False, what: str = "size") -> int:
    """Read "512MiB" or "10GB" as bytes. Refusals as in `parse_duration_ms`; a bare 0 needs no unit."""
    number, unit = _split(text, what, example="512MiB")
    if not unit and number != 0:
        raise _bad(f'the {what} "{text}" has no unit: say {text.strip()}MiB')
    if unit and unit.lower() not in _SIZE_OF_LOWER:
        raise _bad(f'the {what} "{text}" has an unknown unit: say 512MiB or 10GiB')
    size = round(number * _SIZE_OF_LOWER[unit.lower()]) if unit else 0
    if size == 0 and not zero_ok:
        raise _bad(f"the {what} must be more than zero")
    return size


def parse_rate_bytes(text: str, *, what: str = "rate") -> int:
    """Read "10GiB" or "10GiB/s" as bytes per second; 0 is allowed and means no limit."""
    return parse_size_bytes(text.strip().removesuffix("/s"), zero_ok=True, what=what)


def format_duration_ms(milliseconds: float | None) -> str:
    """Print milliseconds for people, at two or three figures: "4.1 ms", "1.5 s", "2 min", "3 h 5 min"."""
    if milliseconds is None:
        return "never"
    if milliseconds < 9.95:
        return f"{_one_decimal(milliseconds)} ms"
    if milliseconds < 999.5:
        return f"{milliseconds:.0f} ms"
    seconds = milliseconds / 1000
    if seconds < 59.95:
        return f"{_one_decimal(seconds)} s"
    minutes = round(seconds / 60)
    if seconds < 600 and round(seconds) % 60:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    return f"{minutes // 1440} d"


def format_delay(milliseconds: int) -> str:
    """Print a delay the way `parse_delay_ms` reads it, so that it can be pasted back: "100ms", "2s"."""
    return f"{milliseconds // 1000}s" if milliseconds % 1000 == 0 else f"{milliseconds}ms"


def format_bytes(size: int) -> str:
    """Print a size for people, in binary units: "412 B", "1.5 MiB"."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1023.95:
            return f"{_one_decimal(value)} {unit}"
        value /= 1024
    return f"{_one_decimal(value)} TiB"


def format_rate(bytes_per_s: int) -> str:
    """Print a limit of bandwidth for people; 0 is "unlimited"."""
    return f"{format_bytes(bytes_per_s)}/s" if bytes_per_s else "unlimited"


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    match = _QUANTITY.fullmatch(text.strip())
    if match is None:
        raise _bad(f'"{text}" is not a {what}: say {example}')
    if match[1]:
        raise _bad(f'the {what} "{text}" is negative: say {example}')
    return float(match[2]), match[3]


def _one_decimal(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _bad(sentence: str) -> Usage:
    return Usage("bad-quantity", sentence)
