"""`python -m mcft.gate UUID`: the timed process of one protection on this host (mcft-gate@.service)."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable

from mcft.agent.sd import notify
from mcft.gate.core import Gate, Side
from mcft.gate.state import GateState, load, paths


def _side(state: GateState) -> Callable[[Gate], Side]:
    """Its maker. Only that is imported: while a gate is dead every packet is held, and the others take half of its start."""
    if state.engine == "mc":
        from mcft.gate.mcprimary import McPrimary
        from mcft.gate.mcstandby import McStandby

        return McPrimary if state.role == "primary" else McStandby
    if state.role == "primary":
        from mcft.gate.primary import Primary

        return Primary
    from mcft.gate.standby import Standby

    return Standby


def main(argv: list[str]) -> int:
    """0 after `quit`, 2 for wrong words, 3 without a state file (nothing is protected: nothing to do)."""
    if len(argv) != 2:
        print("usage: python -m mcft.gate UUID", file=sys.stderr)
        return 2
    run_dir = os.environ.get("MCFT_RUN_DIR", "/run/mcft")
    state_path, _ = paths(run_dir, argv[1])
    try:
        state = load(state_path)
    except FileNotFoundError:
        print(f"no gate state {state_path}: this domain is not protected here", file=sys.stderr)
        return 3
    gate = Gate(state, run_dir, _side(state))
    # What is alive now stays alive: the collector need never look at it during a release.
    gc.collect()
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        gate.run(lambda: notify("READY=1"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
