"""What people see of `mcft check`: what would be refused first, then warnings, what is fine, and the prediction."""

from __future__ import annotations

import textwrap

import click

from mcft import api
from mcft.render import WIDTH
from mcft.units import format_bytes, format_delay, format_duration_ms

_LABEL = 11
_SHOWN = {"refusal": ("REFUSED", "red"), "warning": ("warning", "yellow"), "ok": ("ok", "green")}


def check_text(check: api.Check) -> str:
    """The whole answer. Within a level findings stand as the agent has them."""
    lines = [_headline(check)]
    for level in _SHOWN:
        lines += [_finding(finding) for finding in check.findings if finding.level == level]
    if check.prediction is not None:
        lines += ["", *_prediction(check.prediction)]
    return "\n".join(lines)


def sentence(finding: api.Finding) -> str:
    """What, why, what to do, in one sentence."""
    what = ": ".join(part.rstrip(".") for part in (finding.message, finding.reason) if part)
    return f"{what}; {finding.next_step}" if finding.next_step else what


def _headline(check: api.Check) -> str:
    refusals = sum(finding.level == "refusal" for finding in check.findings)
    warnings = sum(finding.level == "warning" for finding in check.findings)
    if refusals:
        verdict = click.style("protect would be refused", fg="red", bold=True) + f" ({_count(refusals, 'reason')})"
    else:
        verdict = click.style("protect would go", fg="green", bold=True)
        verdict += f", with {_count(warnings, 'warning')}" if warnings else ""
    return f"{click.style(check.domain, bold=True)} to {check.peer}: {verdict}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _finding(finding: api.Finding) -> str:
    label, colour = _SHOWN[finding.level]
    return _labelled(label, sentence(finding), colour)


def _prediction(p: api.Prediction) -> list[str]:
    lines = ["With a delay of " + format_delay(p.delay_ms) + ", as the guest is now:"]
    if p.dirty_bytes_per_s is not None and p.bandwidth_bytes_per_s is not None and p.standing is not None:
        carries = f"{format_bytes(p.limit_bytes_per_s)}/s by {p.limit_is}"
        if p.limit_is == "assumed":
            carries = f"assumed {format_bytes(p.limit_bytes_per_s)}/s, as this host does not know its link's speed"
        lines += [
            _labelled("changes", f"{format_bytes(p.dirty_bytes_per_s)}/s of memory, measured over 1 s"),
            _labelled("bandwidth", f"{format_bytes(p.bandwidth_bytes_per_s)}/s of {carries}"),
            _labelled("pause", f"{format_duration_ms(p.pause_ms)} at each checkpoint, {p.standing:.0%} of the time"),
            _labelled(
                "latency",
                f"{format_duration_ms(p.added_latency_ms)} more on average, {format_duration_ms(p.worst_latency_ms)} at most",
            ),
        ]
    return [*lines, textwrap.fill(p.text, WIDTH, initial_indent="  ", subsequent_indent="  ")]


def _labelled(label: str, text: str, colour: str = "") -> str:
    # Nothing is broken inside a word: a path or a command must survive copy and paste.
    indent = " " * (_LABEL + 2)
    filled = textwrap.fill(
        text, WIDTH, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False
    )
    head = click.style(f"  {label}".ljust(_LABEL + 2), fg=colour or None, bold=label == "REFUSED")
    return head + filled[_LABEL + 2 :]
