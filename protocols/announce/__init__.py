"""`/p2pnode/announce/1`: batched provider records on a Kademlia key space (Maymounkov, Mazieres, IPTPS 2002).

messages.py frames and messages; records.py what a node stores for others; kbuckets.py whom a node knows;
lookup.py how the peers responsible for a key are found; plan.py when a node announces which of its keys. The wire
format in CDDL is protocols/announce.cddl.

Keys and peers live in one space of 256-bit numbers: a key's position is its SHA-256, a peer's is the SHA-256 of its
id's text. Distance is XOR. A key's records belong on the peers nearest to its position.
"""

PROTOCOL = "/p2pnode/announce/1"
