"""The Nix binary cache that this machine's Nix sees, fed by the store, the swarm and upstream caches."""
