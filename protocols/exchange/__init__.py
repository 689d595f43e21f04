"""The bitswap-like exchange protocol `/p2pnode/exchange/1`, sans-IO. README.md has it in words.

messages.py   frames <-> messages
session.py    one peer's stream: what may come when
uploads.py    what to send to whom next
window.py     how much to have in flight
picker.py     which chunk next
swarm.py      all downloads over all peers: events in, actions out
"""

PROTOCOL_ID = "/p2pnode/exchange/1"
