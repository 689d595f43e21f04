"""The chunk store: a catalog of images and of where on this machine's disks their chunks are."""

from p2pnode.store.store import Store

__all__ = ["Store"]
