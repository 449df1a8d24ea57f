"""The one place for subprocesses: run, wait with a deadline, say what it said."""

from __future__ import annotations

import asyncio

from mcft.errors import Failed


async def run(*argv: str, timeout_s: float = 30.0) -> str:
    """Standard output of a command that succeeded.

    Raises: Failed ("command") with its standard error, if it can't be started, fails or takes too long.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        raise Failed("command", f"can't run {argv[0]}: {error.strerror}") from None
    try:
        out, err = await asyncio.wait_for(process.communicate(), timeout_s)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Failed("command", f"{' '.join(argv)} did not end within {timeout_s:g} s") from None
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise Failed("command", f"{' '.join(argv)} failed: {err.decode(errors='replace').strip() or process.returncode}")
    return out.decode(errors="replace")


async def finished(*argv: str, stdin: str, timeout_s: float) -> tuple[int, str, str]:
    """Exit code, standard output and error of a command that gets `stdin`. Killed where it takes too long, or is not waited for.

    Raises: TimeoutError, OSError.
    """
    process = await asyncio.create_subprocess_exec(
        *argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(stdin.encode()), timeout_s)
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    return process.returncode or 0, out.decode(errors="replace"), err.decode(errors="replace")
