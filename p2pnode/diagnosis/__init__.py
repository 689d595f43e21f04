"""Why is it slow, or not found? Looks at this node, at a peer or at an image, step by step, and names likely causes.

model.py    what was found: steps, causes, the report
scene.py    the parts of a running node that are looked at
lookup.py   a DHT look-up that is watched
self.py, peer.py, image.py   the steps
causes.py   from steps to causes, pure
"""

from __future__ import annotations

from p2pnode.diagnosis.examine import examine
from p2pnode.diagnosis.scene import Scene

__all__ = ["Scene", "examine"]
