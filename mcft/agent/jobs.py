"""Long acts: they run in the agent, outlive the connection that asked for them, and can be waited for.

One at a time per domain. Undoing is the act's own business: a cancelled job's coroutine gets CancelledError
and goes back by itself (`steps.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Awaitable, Callable

import msgspec

from mcft import api
from mcft.agent.events import utc_now
from mcft.errors import McftError, NotFound, Refused

log = logging.getLogger(__name__)

KEPT_S = 3600.0
KEPT = 1000


class JobHandle:
    """What a running act says about itself."""

    def __init__(self, job: _Job) -> None:
        self._job = job

    @property
    def id(self) -> str:
        return self._job.body.id

    def step(self, text: str, progress: float | None = None) -> None:
        """Say what is being done now; progress: 0.0 to 1.0 of this step, None where unknown."""
        self._job.change(step=text, progress=progress)


Work = Callable[[JobHandle], Awaitable[str | None]]


class _Job:
    def __init__(self, body: api.JobBody, key: str) -> None:
        self.body = body
        self.key = key
        self.task: asyncio.Task[None] | None = None
        self.cancel_asked = False
        self.finished_at = 0.0
        self.changed = asyncio.Event()

    @property
    def running(self) -> bool:
        return self.body.state == "running"

    def change(self, **fields: object) -> None:
        self.body = msgspec.structs.replace(self.body, **fields)
        self.changed.set()
        # Whoever waits holds this Event; the next to wait gets a new one.
        self.changed = asyncio.Event()


class Jobs:
    """The agent's jobs. All methods belong to the loop; finished jobs are kept for an hour, 1,000 at most."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._by_key: dict[str, _Job] = {}

    def start(self, kind: str, domain: str, work: Work, key: str = "") -> api.JobBody:
        """Run `work(handle)` as a job; what it returns becomes the job's `result`.

        The same non-empty key again gives the same job, whatever became of it. Raises Refused("busy") while
        another job of this domain runs, Refused("key-reused") for a key that was given to another act.
        """
        self._forget_old()
        if key and (known := self._by_key.get(key)):
            if (known.body.kind, known.body.domain) != (kind, domain):
                raise Refused(
                    "key-reused",
                    f"the idempotency key {key} belongs to {known.body.kind} of {known.body.domain}",
                    next_step="use a new key for each act",
                )
            return known.body
        if busy := self.running(domain):
            raise Refused(
                "busy",
                f"{domain} is busy: {busy.kind} (job {busy.id}) is at work",
                busy.step,
                "wait for it, or cancel it",
            )
        job = _Job(api.JobBody(uuid.uuid4().hex, kind, domain, "running", started=utc_now()), key)
        self._jobs[job.body.id] = job
        if key:
            self._by_key[key] = job
        job.task = asyncio.create_task(self._run(job, work), name=f"job {kind} {domain}")
        job.task.add_done_callback(lambda _: self._never_began(job))
        return job.body

    def answer(self, kind: str, domain: str, result: str, key: str = "") -> api.JobBody:
        """A job that is done already: for what needs no doing, whatever else is at work on this domain."""
        body = api.JobBody(uuid.uuid4().hex, kind, domain, "done", started=utc_now(), finished=utc_now(), result=result)
        job = _Job(body, key)
        job.finished_at = time.monotonic()
        self._jobs[body.id] = job
        return body

    async def ended(self, job_id: str, on_change: Callable[[api.JobBody], None] = lambda _job: None) -> api.JobBody:
        """A job once it has ended; on_change is told of its steps. Raises what it failed of."""
        while (job := self._job(job_id).body).state == "running":
            on_change(await self.wait(job_id, 5.0))
        if job.error is not None:
            api.raise_error(job.error)
        return job

    def get(self, job_id: str) -> api.JobBody:
        """A job as it is now. Raises NotFound("no-such-job")."""
        return self._job(job_id).body

    def running(self, domain: str, kind: str = "") -> api.JobBody | None:
        """The running job of a domain, if there is one (of that kind)."""
        found = (j.body for j in self._jobs.values() if j.running and j.body.domain == domain)
        return next((body for body in found if kind in ("", body.kind)), None)

    async def wait(self, job_id: str, wait_s: float = 0.0) -> api.JobBody:
        """Wait up to `wait_s` seconds for the job's next change; a finished job is answered at once.

        Raises NotFound("no-such-job").
        """
        job = self._job(job_id)
        if job.running and wait_s > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await job.changed.wait()
        return job.body

    def cancel(self, job_id: str) -> api.JobBody:
        """Ask a job to go back. It stays `running` until it has undone what it did; then `cancelled`
        (`failed`, if something remains). A finished job stays as it is. Raises NotFound("no-such-job").
        """
        job = self._job(job_id)
        if job.running and job.task is not None and not job.cancel_asked:
            # Only once: a second CancelledError would interrupt the undoing.
            job.cancel_asked = True
            job.task.cancel()
            job.change(step=f"cancelling: {job.body.step}")
        return job.body

    async def cancelled(self, job_id: str) -> None:
        """Cancel a job, and wait until it has undone what it did."""
        self.cancel(job_id)
        while (await self.wait(job_id, 5.0)).state == "running":
            pass

    async def close(self) -> None:
        """Cancel what runs and wait until all of it has undone itself."""
        tasks = [job.task for job in self._jobs.values() if job.running and job.task is not None]
        for job in list(self._jobs.values()):
            self.cancel(job.body.id)
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: _Job, work: Work) -> None:
        try:
            result = await work(JobHandle(job))
        except asyncio.CancelledError:
            self._finish(job, state="cancelled")
        except McftError as error:
            self._finish(job, state="failed", error=api.error_body(error))
        except Exception as error:
            log.exception("job %s (%s of %s) failed inside", job.body.id, job.body.kind, job.body.domain)
            self._finish(job, state="failed", error=api.error_body(error))
        else:
            self._finish(job, state="done", progress=1.0, result=result or "")

    def _never_began(self, job: _Job) -> None:
        # A task that is cancelled before its first step does not get as far as `_run`.
        if job.running:
            self._finish(job, state="cancelled")

    def _finish(self, job: _Job, **fields: object) -> None:
        job.finished_at = time.monotonic()
        job.change(finished=utc_now(), **fields)

    def _job(self, job_id: str) -> _Job:
        try:
            return self._jobs[job_id]
        except KeyError:
            raise NotFound(
                "no-such-job",
                f"no job {job_id} is known",
                "jobs are kept for an hour after their end, and not over a restart of the agent",
                "look at `mcft status`",
            ) from None

    def _forget_old(self) -> None:
        finished = [job for job in self._jobs.values() if not job.running]
        too_many = max(0, len(finished) - KEPT)
        horizon = time.monotonic() - KEPT_S
        for position, job in enumerate(sorted(finished, key=lambda job: job.finished_at)):
            if position < too_many or job.finished_at < horizon:
                del self._jobs[job.body.id]
                if self._by_key.get(job.key) is job:
                    del self._by_key[job.key]


def done(text: str) -> Callable[[JobHandle], Awaitable[str]]:
    """A job that has nothing to do but to say so."""

    async def work(_job: JobHandle) -> str:
        return text

    return work
