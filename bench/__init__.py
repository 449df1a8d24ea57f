"""What can be shown and measured in the lab: `python -m bench.demo`, `python -m bench.figures`. Both need root.

They see the lab through the same eyes as its tests (`tests/lab/world.py`, `watching.py`).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "lab"))
