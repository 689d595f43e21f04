"""Every error a user can see: one class per situation, its docstring the general sentence, with an exit code.

Families (DESIGN 7): `LocalError` (we or the caller misused something), `RemoteError` (a peer's fault or the
network's), `StoreError` (disk, quota, corruption), `TrustError` (hash, signature, policy). The message given at
the raise is one sentence that names the thing, says what is wrong and, where it can, what to do next.
"""

from __future__ import annotations

EXIT_USAGE = 2
EXIT_NOT_FOUND = 3
EXIT_VERIFY = 4
EXIT_STORE = 5
EXIT_NETWORK = 6
EXIT_TRUST = 7
EXIT_INTERRUPTED = 130


class NodeError(Exception):
    """Something failed."""

    exit_code = 1


class LocalError(NodeError):
    """A command, argument or setting was wrong."""

    exit_code = EXIT_USAGE


class UsageError(LocalError):
    """An argument is not of the form it must have."""


class PathError(LocalError):
    """A path does not exist, cannot be read, or cannot be an image."""


class OutputExists(LocalError):
    """The output path exists already and --force was not given."""


class ConfigError(LocalError):
    """A configuration key is unknown or has a bad value."""


class HomeLocked(LocalError):
    """Another node is running on this home."""


class NixMissing(LocalError):
    """The image kind needs Nix, and no nix-store command is on this machine."""


class NixError(LocalError):
    """A Nix command failed or a Nix format was not obeyed."""


class NarError(NixError):
    """A byte stream is not a NAR that Nix would accept (strict reading)."""


class NotFound(NodeError):
    """Nothing by that id or name is known here or to any peer."""

    exit_code = EXIT_NOT_FOUND


class NotPublishing(NotFound):
    """A peer does not tell which images it publishes."""


class StoreError(NodeError):
    """The store on disk failed."""

    exit_code = EXIT_STORE


class DiskFull(StoreError):
    """There is not enough free space on the disk."""


class OutputUnwritable(StoreError):
    """The output path cannot be written (read-only disk or missing permission)."""


class CatalogCorrupt(StoreError):
    """The catalog database is damaged."""


class ChunkUnavailable(StoreError):
    """A chunk's bytes are gone, unreadable, or no longer match its hash."""


class RemoteError(NodeError):
    """A peer failed us."""

    exit_code = EXIT_NETWORK


class PeerUnreachable(RemoteError):
    """No address of a peer could be reached."""


class StreamClosed(RemoteError):
    """The peer reset the stream or the connection to it was lost."""


class NotListening(RemoteError):
    """None of the listen addresses could be bound."""


class NetworkTimeout(RemoteError):
    """Nothing was heard from the network in time."""


class TrustError(NodeError):
    """Content or a signature did not check out."""

    exit_code = EXIT_TRUST


class VerificationFailed(TrustError):
    """The content is complete but its hash is not the one its manifest promises."""

    exit_code = EXIT_VERIFY


class Cancelled(LocalError):
    """The user interrupted the operation."""

    exit_code = EXIT_INTERRUPTED


class Untrusted(TrustError):
    """A store path carries no signature by a trusted key and is not proved by its contents either."""


class SignatureError(NixError):
    """A signature or a signing key is not of the form NAME:BASE64."""


class NarInfoError(NixError):
    """A narinfo is not one that Nix would accept (strict reading), or describes another path."""


class DaemonUnavailable(NixError):
    """No Nix daemon answers on this machine, and its store cannot be opened without one."""


class DaemonError(NixError):
    """The Nix daemon refused a request, broke off, or did not speak its protocol."""


class CacheError(RemoteError):
    """A binary cache could not be reached, or did not answer as one must."""


class RelayRefused(RemoteError):
    """A relay refused a reservation or a circuit. `status` is its code (protocols.relay.Status)."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
