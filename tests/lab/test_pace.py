"""Checkpoints that take longer than the delay: QEMU begins the next one at once, and the guest would stand still, protected."""

from __future__ import annotations

from watching import Load
from world import H1, H2, protect, until


def test_a_busy_standby_does_not_hold_up_the_guest(load: Load) -> None:
    """The period grows until the guest runs half the time, both sides know it, and it comes back with the standby.

    Fails if it stays as it is, if a longer one counts as a missing checkpoint, or if it becomes the guest's delay.
    """
    protect(H1, "--delay", "50ms")
    load.flowing()
    generation = H1.status()["generation"]
    with H2.slow_qemu(0.005, 0.06):
        until(lambda: H1.status()["period_ms"] >= 200, 60, "checkpoints are put further apart")
        until(lambda: H2.status()["period_ms"] == H1.status()["period_ms"], 10, "the standby's watcher knows it")
        assert "delay 50ms stretched to " in H1.mcft("status", "vm1").stdout
        assert any(event["kind"] == "pace" and "the guest ran" in event["text"] for event in H1.events())
        for _ in range(5):
            load.goes_on()
    until(lambda: H1.status()["period_ms"] == H2.status()["period_ms"] <= 150, 60, "and closer again")
    status = H1.status()
    assert (status["state"], status["generation"], status["delay_ms"]) == ("protected", generation, 50), status
    load.finished()
