"""Steps and their undo: order, half-done steps, cancellation, deadlines, what remains, fault injection."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap

import pytest

from mcft.agent import steps as steps_module
from mcft.agent.steps import Runner, Step
from mcft.errors import Failed, Refused

Log = list[str]


def step(name: str, fail: BaseException | None = None, undo_fail: BaseException | None = None) -> Step[Log]:
    async def do(log: Log) -> None:
        log.append(f"+{name}")
        if fail:
            raise fail

    async def undo(log: Log) -> None:
        log.append(f"-{name}")
        if undo_fail:
            raise undo_fail

    return Step(name, do, undo)


async def test_steps_run_in_order_and_say_so() -> None:
    log: Log = []
    said: list[tuple[str, float | None]] = []
    await Runner().run([step("a"), step("b")], log, lambda *words: said.append(words))
    assert log == ["+a", "+b"]
    assert said == [("a", 0.0), ("b", 0.5)]


async def test_an_error_undoes_the_half_done_step_and_those_before() -> None:
    log: Log = []
    error = Refused("unsafe", "no")
    with pytest.raises(Refused) as raised:
        await Runner().run([step("a"), step("b", error), step("c")], log)
    assert raised.value is error
    assert log == ["+a", "+b", "-b", "-a"]


async def test_what_remains_is_said_and_the_rest_is_undone() -> None:
    log: Log = []
    steps = [step("a"), step("b", undo_fail=OSError("stuck")), step("c", Refused("unsafe", "no", "why"))]
    with pytest.raises(Failed) as raised:
        await Runner().run(steps, log)
    assert log == ["+a", "+b", "+c", "-c", "-b", "-a"]
    assert (raised.value.code, raised.value.exit_code) == ("unsafe", 1)
    assert raised.value.reason == "why; what remains: b (OSError: stuck)"


async def test_cancellation_undoes_and_a_second_one_does_not_disturb() -> None:
    log: Log = []
    begun, undoing, go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def do(log: Log) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def undo(log: Log) -> None:
        undoing.set()
        await go.wait()
        log.append("-b")

    task = asyncio.create_task(Runner().run([step("a"), Step("b", do, undo)], log))
    await begun.wait()
    task.cancel()
    await undoing.wait()
    for _ in range(3):
        task.cancel()
        await asyncio.wait({task}, timeout=0)
    go.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert log == ["+a", "-b", "-a"]


async def test_cancelled_with_something_left_is_a_failure() -> None:
    with pytest.raises(Failed) as raised:
        await Runner().run([step("a", asyncio.CancelledError(), OSError("stuck"))], [])
    assert raised.value.code == "cancelled"
    assert "what remains: a" in raised.value.reason


@pytest.mark.parametrize("deaf", [False, True])
async def test_an_undo_has_a_deadline(deaf: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps_module, "_GRACE_S", 0.01)
    end = asyncio.Event()

    async def undo(log: Log) -> None:
        while True:
            try:
                await end.wait()
                return
            except asyncio.CancelledError:
                if not deaf:
                    raise

    slow = step("b")
    log: Log = []
    steps = [step("a"), Step("b", slow.do, undo, undo_timeout_s=0.01), step("c", ValueError("x"))]
    with pytest.raises(Failed, match='step "c"') as raised:
        await Runner().run(steps, log)
    assert "what remains: b (TimeoutError: no end after 0.01 s)" in raised.value.reason
    assert log == ["+a", "+b", "+c", "-c", "-a"]
    end.set()


async def test_taking_it_down_is_the_list_backwards() -> None:
    log: Log = []
    steps = [step("a"), step("b"), step("c")]
    await Runner().undo_all(steps, log)
    await Runner().undo_all(steps, log, done={"a", "c"})
    assert log == ["-c", "-b", "-a", "-c", "-a"]
    with pytest.raises(Failed, match="undone") as raised:
        await Runner().undo_all([step("a"), step("b", undo_fail=Refused("r", "held"))], log)
    assert raised.value.reason == "what remains: b (held)"
    assert log[-2:] == ["-b", "-a"]


@pytest.mark.parametrize(("moment", "expected"), [("before", ["+a", "-b", "-a"]), ("after", ["+a", "+b", "-b", "-a"])])
async def test_faults_can_be_injected(moment: str, expected: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MCFT_FAIL_STEP", f"b:{moment}")
    log: Log = []
    with pytest.raises(Failed) as raised:
        await Runner().run([step("a"), step("b"), step("c")], log)
    assert raised.value.code == "injected"
    assert log == expected


def test_the_process_can_be_killed_after_a_step() -> None:
    script = """
        import asyncio
        from mcft.agent.steps import Runner, Step
        async def say(text): print(text, flush=True)
        asyncio.run(Runner().run([Step("a: b", say), Step("c", say)], "done"))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={"MCFT_FAIL_STEP": "a: b:kill", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (-signal.SIGKILL, "done\n")
