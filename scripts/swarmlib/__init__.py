"""Real nodes as processes of their own: for scripts/swarm.py, the quick start, the benchmarks and end-to-end tests."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))  # p2pnode, in a checkout that was not installed
