"""The objects of an image as store paths: what Nix would register about them, and who vouches for that.

The image itself gives path, NAR hash, size, and of a closure all references; the rest are claims (store/claims.py).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import trio

from p2pnode.errors import NixError, VerificationFailed
from p2pnode.nix.cli import PathInfo
from p2pnode.nix.content_address import names_path
from p2pnode.nix.registered import registered, signed_with
from p2pnode.nix.signatures import SecretKey, Signature, SignedInfo
from p2pnode.nix.storepath import StorePath
from p2pnode.nix.trust import Proof, TrustedKeys, Verdict, judge
from p2pnode.store import claims as claims_table
from p2pnode.store.claims import PathClaims
from p2pnode.store.store import Store
from protocols.manifest import Image, Kind

STORE_KINDS = (Kind.CLOSURE, Kind.STORE_PATH)


class ImagePaths:
    """The store paths of one image, by object number.

    Raises VerificationFailed for an image of a kind that has none, or whose objects are not named like store paths.
    """

    def __init__(self, store: Store, image: Image) -> None:
        if image.kind not in STORE_KINDS:
            raise VerificationFailed(f"image {image.id} is of kind {image.kind}, which has no Nix store paths")
        self.image = image
        self._store = store
        try:
            self.paths = tuple(StorePath.from_base_name(obj.path) for obj in image.objects)
        except NixError as error:
            raise VerificationFailed(f"image {image.id} is not a valid image: {error}") from None
        self._generation = -1
        self._claims: dict[tuple[str, bytes], list[PathClaims]] = {}
        self._loading = threading.Lock()  # or what was read first may be kept as what came last
        self.reload_if_changed()

    async def refresh(self) -> None:
        """As `reload_if_changed`, without blocking."""
        if self._store.catalog.claims_generation != self._generation:
            await trio.to_thread.run_sync(self.reload_if_changed)

    def reload_if_changed(self) -> None:
        """Take in the claims that came since. Blocks."""
        with self._loading:
            generation = self._store.catalog.claims_generation
            if generation != self._generation:
                self._claims = claims_table.of_image(self._store.catalog, self.image.id)
                self._generation = generation

    @property
    def root(self) -> StorePath:
        """What the image is of: the path that was provided."""
        return self.paths[int(self.image.attributes.get("root", 0))]

    def references(self, number: int) -> tuple[StorePath, ...]:
        """The path's references within the image: of a closure that is all of them."""
        return tuple(sorted(self.paths[index] for index in self.image.objects[number].references))

    @property
    def complete(self) -> bool:
        """Whether the image itself tells all references."""
        return self.image.kind is Kind.CLOSURE

    def claims(self, number: int) -> list[PathClaims]:
        """What is said of one object; claims that contradict the image are left out."""
        obj = self.image.objects[number]
        found = self._claims.get((obj.path, obj.nar_hash or b""), [])
        if not self.complete:
            return found
        references = tuple(path.base_name for path in self.references(number))
        return [each for each in found if each.references == references]

    def info(self, number: int, claims: PathClaims | None = None) -> PathInfo:
        """The path as `claims` describe it, or as the image alone does. Raises NixError for malformed claims."""
        obj = self.image.objects[number]
        assert obj.nar_hash is not None
        references, deriver, ca = self.references(number), None, obj.ca
        if claims is not None:
            references = tuple(sorted(map(StorePath.from_base_name, claims.references)))
            deriver = None if claims.deriver is None else StorePath.from_base_name(claims.deriver)
            ca = obj.ca or claims.ca
        info = PathInfo(self.paths[number], obj.nar_hash, obj.size, references, deriver, ca)
        # A content address that does not give the path would only make Nix refuse what a signature proves.
        return info if ca is None or names_path(info) else replace(info, ca=None)

    def candidates(self, number: int) -> list[SignedInfo]:
        """What the path may be, one for each set of references that somebody claims."""
        found = []
        for claims in self.claims(number):
            try:
                signatures = tuple(map(Signature.parse, claims.signatures))
                found.append(SignedInfo(self.info(number, claims), signatures))
            except NixError:
                continue
        if not found:
            bare = self.info(number)
            if self.complete or bare.ca is not None:  # a content address covers the references
                found.append(SignedInfo(bare))
        return found

    def best(self, number: int, keys: TrustedKeys) -> tuple[SignedInfo, Verdict] | None:
        """The candidate for which most speaks, and what that is; None if its references are not known."""
        judged = [(each, judge(each.info, each.signatures, keys)) for each in self.candidates(number)]
        return max(judged, key=_weight, default=None)


def _weight(judged: tuple[SignedInfo, Verdict]) -> tuple[int, int]:
    signed, verdict = judged
    return {Proof.SIGNATURE: 2, Proof.CONTENT: 1, Proof.NONE: 0}[verdict.proof], len(signed.signatures)


def claims_of(signed: SignedInfo) -> PathClaims:
    """What a Nix store says of a path, as it is kept."""
    info = signed.info
    return PathClaims(
        info.path.base_name,
        info.nar_hash,
        tuple(path.base_name for path in sorted(set(info.references))),
        tuple(map(str, signed.signatures)),
        None if info.deriver is None else info.deriver.base_name,
        info.ca,
    )


async def keep_claims(store: Store, image: Image, store_root: Path | None, keys: Sequence[SecretKey] = ()) -> bool:
    """Keep what the Nix store, at `store_root` or the machine's, knows of the paths of an image that was just imported
    from it, signed with `keys`; whether any of it was new. Nothing for kinds without store paths. Raises NixError."""
    if image.kind not in STORE_KINDS:
        return False
    paths = await trio.to_thread.run_sync(ImagePaths, store, image)
    found = signed_with(keys, await registered(paths.paths, store_root))
    return await trio.to_thread.run_sync(keep_registered, store, image, found)


def keep_registered(store: Store, image: Image, known: Sequence[SignedInfo]) -> bool:
    """Keep what the Nix store says of an image's paths; whether any of it was new. What differs from the image is not
    of it and is left out."""
    hashes = {(obj.path, obj.nar_hash) for obj in image.objects}
    claims = [claims_of(each) for each in known]
    return bool(claims_table.merge(store.catalog, [each for each in claims if (each.path, each.nar_hash) in hashes]))
