"""Whom this node believes about a store path: trusted keys, content addresses, and the policy that demands either.

Nix's rule: a path is good if its content address proves it, or if any one signature verifies under a trusted key of
that signature's name. A signature by an unknown key is worth nothing and does no harm.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from p2pnode.errors import ConfigError, SignatureError, Untrusted
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.content_address import names_path, proved_by_nar_hash
from p2pnode.nix.signatures import PublicKey, Signature
from p2pnode.nix.storepath import CAMethod, ContentAddress


class Policy(Enum):
    """`require-signatures`: when a path must be trusted before it is imported or exported."""

    OFF = "off"
    IF_KEYS = "if-keys"  # when there is at least one trusted key
    ALWAYS = "always"


class Proof(Enum):
    """Why a path is believed."""

    SIGNATURE = "signature"
    CONTENT = "content address"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one path's origin.

    `signed_by`: names of the trusted keys whose signatures verify. `seen`: names of all keys it claims to be signed
    by. `forged`: of these, trusted names under which nothing verifies. `needs_contents`: the content address gives
    the path, but that the contents are right only a `ContentCheck` can tell: true for CONTENT alone.
    """

    proof: Proof
    signed_by: tuple[str, ...]
    seen: tuple[str, ...]
    forged: tuple[str, ...]
    needs_contents: bool = False

    @property
    def trusted(self) -> bool:
        return self.proof is not Proof.NONE


class TrustedKeys:
    """The public keys that are believed, by name; of two with one name the first counts, as in Nix."""

    def __init__(self, keys: Iterable[PublicKey] = ()) -> None:
        self._keys: dict[str, PublicKey] = {}
        for key in keys:
            self._keys.setdefault(key.name, key)

    @classmethod
    def parse(cls, *sources: tuple[str, Iterable[str]]) -> TrustedKeys:
        """From `(where it stands, NAME:BASE64 texts)`, the most important first. Raises ConfigError naming the source.

        Sources are nix.conf (`NixConf.trusted_public_keys`) and our own configuration.
        """
        keys: list[PublicKey] = []
        for origin, texts in sources:
            for text in texts:
                try:
                    keys.append(PublicKey.parse(text))
                except SignatureError as error:
                    raise ConfigError(f"trusted-public-keys in {origin}: {error}") from None
        return cls(keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._keys))

    def verifying(self, info: PathInfo, signatures: Iterable[Signature]) -> list[Signature]:
        """Those of `signatures` that a trusted key made over `info`."""
        return [
            signature
            for signature in signatures
            if (key := self._keys.get(signature.key_name)) is not None and key.verifies(info, signature)
        ]


def judge(info: PathInfo, signatures: Sequence[Signature], keys: TrustedKeys) -> Verdict:
    """What speaks for a path. Raises nothing: what cannot be checked speaks for nothing.

    The NAR hash in `info` is taken as given; that the contents have it is for their reader to check.
    """
    good = {signature.key_name for signature in keys.verifying(info, signatures)}
    seen = {signature.key_name for signature in signatures}
    proof, needs_contents = Proof.NONE, False
    if good:
        proof = Proof.SIGNATURE
    elif proved_by_nar_hash(info):
        proof = Proof.CONTENT
    elif names_path(info) and not _is_refuted(info):
        proof, needs_contents = Proof.CONTENT, True
    return Verdict(
        proof,
        tuple(sorted(good)),
        tuple(sorted(seen)),
        tuple(sorted(seen & set(keys.names) - good)),
        needs_contents,
    )


def require(
    info: PathInfo, signatures: Sequence[Signature], keys: TrustedKeys, policy: Policy = Policy.IF_KEYS
) -> Verdict:
    """`judge`, and raise Untrusted if `policy` demands a proof and there is none."""
    verdict = judge(info, signatures, keys)
    demanded = policy is Policy.ALWAYS or (policy is Policy.IF_KEYS and bool(keys))
    if demanded and not verdict.trusted:
        raise Untrusted(_complaint(info, verdict, keys))
    return verdict


def _is_refuted(info: PathInfo) -> bool:
    """Whether `ca` is the hash of the NAR and `info` says that the NAR has another one."""
    address = ContentAddress.parse(info.ca or "")
    is_nar_hash = address.method is CAMethod.RECURSIVE and address.algorithm == "sha256"
    return is_nar_hash and info.path not in info.references and address.digest != info.nar_hash


def _complaint(info: PathInfo, verdict: Verdict, keys: TrustedKeys) -> str:
    if verdict.forged:
        said = f"its signature in the name of {_listed(verdict.forged)} is wrong"
    elif verdict.seen:
        said = f"it is signed by {_listed(verdict.seen)}"
    else:
        said = "it has no signature"
    if not keys:
        trusted = "no key is trusted here: add the publisher's to trusted-public-keys"
    else:
        trusted = f"trusted here: {_listed(keys.names)}"
    return f"{info.path} is not trusted: {said} ({trusted})"


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")
