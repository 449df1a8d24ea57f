"""Durations and sizes: what is read, what is refused and in which words, and that both directions agree."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mcft import units
from mcft.errors import Usage


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("100ms", 100),
        ("1.5s", 1500),
        ("2m", 120_000),
        ("2min", 120_000),
        ("1h", 3_600_000),
        (" 7 ms ", 7),
        ("500us", 0.5),
    ],
)
def test_durations_are_read_as_milliseconds(text: str, expected: float) -> None:
    assert units.parse_duration_ms(text) == pytest.approx(expected)


def test_a_number_without_unit_says_what_to_type() -> None:
    with pytest.raises(Usage, match="say 100ms"):
        units.parse_duration_ms("100")


@pytest.mark.parametrize(
    "text", ["-5ms", "", "ms", "1e3ms", "1_000ms", "nan s", "inf", "5 parsecs", "1.s", ".5s", "٣ms"]
)
def test_other_texts_are_refused_in_one_sentence(text: str) -> None:
    with pytest.raises(Usage) as refusal:
        units.parse_duration_ms(text)
    assert refusal.value.message
    assert not refusal.value.reason


def test_zero_only_where_it_means_something() -> None:
    assert units.parse_duration_ms("0s", zero_ok=True) == 0
    with pytest.raises(Usage, match="more than zero"):
        units.parse_duration_ms("0s")


@given(st.integers(units.DELAY_MIN_MS, units.DELAY_MAX_MS))
def test_every_delay_is_printed_as_it_is_read(delay_ms: int) -> None:
    assert units.parse_delay_ms(units.format_delay(delay_ms)) == delay_ms
    assert units.parse_delay_ms(f"{delay_ms / 1000:.3f}s") == delay_ms


@pytest.mark.parametrize("text", ["9ms", "9.999ms", "10001ms", "10.001s", "1m", "0ms"])
def test_delays_outside_the_range_are_refused(text: str) -> None:
    with pytest.raises(Usage):
        units.parse_delay_ms(text)


def test_a_delay_is_whole_milliseconds() -> None:
    with pytest.raises(Usage, match="whole number"):
        units.parse_delay_ms("10.5ms")


@given(st.text(max_size=20))
def test_no_text_raises_anything_but_usage(text: str) -> None:
    for parse in (
        units.parse_duration_ms,
        units.parse_delay_ms,
        units.parse_size_bytes,
        units.parse_rate_bytes,
    ):
        try:
            assert parse(text) >= 0
        except Usage as refusal:
            assert refusal.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512MiB", 512 * 2**20), ("1.5 GiB", 3 * 2**29), ("10GB", 10**10), ("7B", 7), ("512mib", 512 * 2**20)],
)
def test_sizes_are_read_as_bytes(text: str, expected: int) -> None:
    assert units.parse_size_bytes(text) == expected


@pytest.mark.parametrize("text", ["512", "-1MiB", "0", "12 apples", "MiB"])
def test_bad_sizes_are_refused(text: str) -> None:
    with pytest.raises(Usage):
        units.parse_size_bytes(text)


@pytest.mark.parametrize(
    ("text", "expected"), [("10GiB/s", 10 * 2**30), ("10GiB", 10 * 2**30), ("0", 0), ("0B/s", 0)]
)
def test_rates_may_say_per_second_and_zero(text: str, expected: int) -> None:
    assert units.parse_rate_bytes(text) == expected


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [
        (None, "never"), (0, "0 ms"), (4.12, "4.1 ms"), (43, "43 ms"), (999.4, "999 ms"), (999.6, "1 s"),
        (1500, "1.5 s"),
        (59_990, "1 min"), (60_000, "1 min"), (90_000, "1 min 30 s"), (599_900, "10 min"), (3_600_000, "1 h"),
        (3_900_000, "1 h 5 min"), (72 * 3_600_000, "3 d"),
    ],
)  # fmt: skip
def test_durations_are_printed_for_people(milliseconds: float | None, text: str) -> None:
    assert units.format_duration_ms(milliseconds) == text


@given(st.floats(0, 1e13))
def test_printed_durations_stay_short(milliseconds: float) -> None:
    assert len(units.format_duration_ms(milliseconds)) <= 12


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (412, "412 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2**20 - 1, "1 MiB"),
        (5 * 2**40, "5 TiB"),
    ],
)
def test_sizes_are_printed_for_people(size: int, text: str) -> None:
    assert units.format_bytes(size) == text


def test_no_limit_is_printed_as_such() -> None:
    assert units.format_rate(0) == "unlimited"
    assert units.format_rate(10 * 2**30) == "10 GiB/s"
