"""The runner of steps with their undo.

A set-up is written once, as data in order: `[Step("attach the buffer", attach, detach), …]`. An error at
step k undoes k, k−1, … 1; taking it down later is the same list backwards. An undo looks at the real world
before it touches it: it is called for steps that are half done, done twice or never begun, and leaves alone
what others changed meanwhile.

For the tests: MCFT_FAIL_STEP="NAME:before", "NAME:after" or "NAME:kill" in the environment makes `Runner.run`
raise before or after the step of that name, or kills the process (SIGKILL) after it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mcft.errors import Failed, McftError, Remains

log = logging.getLogger(__name__)
C = TypeVar("C")

OnStep = Callable[[str, float | None], None]
FAIL_STEP = "MCFT_FAIL_STEP"
# An undo that ignores its cancellation for this long is left behind, and named as what remains.
_GRACE_S = 1.0


async def nothing_to_undo(_context: object) -> None:
    """The undo of a step that leaves nothing behind."""


@dataclass(frozen=True)
class Step(Generic[C]):
    """One step and its way back. name: what people read ("attach the buffer"), unique in its list.

    undo_timeout_s: the deadline of the undo in seconds.
    """

    name: str
    do: Callable[[C], Awaitable[None]]
    undo: Callable[[C], Awaitable[None]] = nothing_to_undo
    undo_timeout_s: float = 30.0


class Runner:
    """Runs lists of steps forwards and backwards. It keeps no state: one serves all."""

    async def run(self, steps: Sequence[Step[C]], context: C, on_step: OnStep | None = None) -> None:
        """Run the steps in order; `on_step(name, progress 0.0…1.0)` before each.

        If one raises (or the caller is cancelled), it and those before it are undone, newest first,
        undisturbed by further cancellation. Then the same error is raised; or, if an undo failed too,
        Remains(code of that error) whose reason ends with what remains.
        """
        for position, step in enumerate(steps):
            if on_step:
                on_step(step.name, position / len(steps))
            try:
                _inject(step.name, "before")
                await step.do(context)
                _inject(step.name, "after")
            except BaseException as error:
                log.info("step %r ended by %s: undoing", step.name, _words(error))
                remains = await _undisturbed(_undo(steps[: position + 1], context, on_step))
                if remains:
                    raise _with_remains(error, step.name, remains) from error
                raise

    async def undo_all(
        self,
        steps: Sequence[Step[C]],
        context: C,
        done: Collection[str] | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        """Run the undos backwards: all of them, or those of the steps named in `done`.

        Once begun it is carried through, also if the caller is cancelled. A failing undo stops none of the
        others. Raises Remains("undo-incomplete") with what remains.
        """
        chosen = [step for step in steps if done is None or step.name in done]
        if remains := await _undisturbed(_undo(chosen, context, on_step)):
            raise Remains("undo-incomplete", "not everything could be undone", _remains(remains), _SEE_LOG)


_SEE_LOG = "look at the agent's log, and repeat the command: what is undone already is passed over"


async def _undo(steps: Sequence[Step[C]], context: C, on_step: OnStep | None) -> list[str]:
    """Undo the steps, newest first; what remains, in words."""
    remains = []
    for position, step in enumerate(reversed(steps)):
        if on_step:
            on_step(f"undoing: {step.name}", position / len(steps))
        try:
            await _with_deadline(step, context)
        except (Exception, asyncio.CancelledError) as error:
            log.error("undoing step %r failed: %s", step.name, _words(error), exc_info=error)
            remains.append(f"{step.name} ({_words(error)})")
    return remains


async def _with_deadline(step: Step[C], context: C) -> None:
    """Await an undo; TimeoutError at its deadline, also if it does not heed its cancellation."""
    task = asyncio.ensure_future(step.undo(context))
    done, _ = await asyncio.wait({task}, timeout=step.undo_timeout_s)
    if not done:
        task.cancel()
        await asyncio.wait({task}, timeout=_GRACE_S)
        raise TimeoutError(f"no end after {step.undo_timeout_s:g} s")
    task.result()


async def _undisturbed(work: Coroutine[Any, Any, list[str]]) -> list[str]:
    """Await to the end, whatever cancellation comes meanwhile."""
    task = asyncio.create_task(work)
    while True:
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.done():
                return task.result()
            log.info("cancelled while undoing: going on")


def _with_remains(error: BaseException, step: str, remains: Sequence[str]) -> Remains:
    if isinstance(error, McftError):
        reason = "; ".join(part for part in (error.reason.rstrip("."), _remains(remains)) if part)
        return Remains(error.code, error.message, reason, error.next_step or _SEE_LOG)
    code = "cancelled" if isinstance(error, asyncio.CancelledError) else "internal"
    return Remains(code, f'step "{step}" ended by {_words(error)}', _remains(remains), _SEE_LOG)


def _remains(remains: Sequence[str]) -> str:
    return f"what remains: {'; '.join(remains)}"


def _words(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "cancellation"
    if isinstance(error, McftError):
        return str(error).rstrip(".")
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _inject(step: str, moment: str) -> None:
    name, _, wanted = os.environ.get(FAIL_STEP, "").rpartition(":")
    if name != step:
        return
    if wanted == moment:
        raise Failed("injected", f'{FAIL_STEP} made step "{step}" fail ({moment})')
    if wanted == "kill" and moment == "after":
        os.kill(os.getpid(), signal.SIGKILL)
