"""`python -m mcft.gate UUID`: the timed process of one protection on this host (mcft-gate@.service)."""

from __future__ import annotations

import contextlib
import gc
import os
import sys

from mcft.agent.sd import notify
from mcft.gate.core import Gate
from mcft.gate.mcprimary import McPrimary
from mcft.gate.mcstandby import McStandby
from mcft.gate.primary import Primary
from mcft.gate.standby import Standby
from mcft.gate.state import load, paths


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
    sides = (McPrimary, McStandby) if state.engine == "mc" else (Primary, Standby)
    gate = Gate(state, run_dir, sides[0] if state.role == "primary" else sides[1])
    # What is alive now stays alive: the collector need never look at it during a release.
    gc.collect()
    gc.freeze()
    with contextlib.suppress(KeyboardInterrupt):
        gate.run(lambda: notify("READY=1"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
