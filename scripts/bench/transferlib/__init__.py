"""What scripts/bench/transfer.py is made of: the contenders, how they are measured, and what is printed of it."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # swarmlib
