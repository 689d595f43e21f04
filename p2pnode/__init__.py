"""A peer-to-peer node that moves Nix-built VM images through a cluster."""

__version__ = "0.1.0"
