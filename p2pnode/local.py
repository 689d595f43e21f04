"""What can be asked of a store without any network, as the plain dicts that the command line prints with --json.

Blocking: embedded commands call these directly, the node calls them in worker threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2pnode import link
from p2pnode.errors import NotFound, UsageError, VerificationFailed
from p2pnode.progress import Progress, Report

if TYPE_CHECKING:
    from p2pnode.config import Config
    from p2pnode.images.importer import Imported
    from p2pnode.images.publish import Outcome, Settings
    from p2pnode.store import Store
    from p2pnode.store.mirrors import Mirror, Mirrored
    from p2pnode.store.records import ImageRecord, Problem, StoreStatistics

MAX_BAD_NAMED = 3  # damaged objects that an error message names
PROBABLY_AN_ID = 50  # characters of [a-z2-7] that are meant as an id, not as a name

Result = dict[str, Any]


def images(store: Store) -> list[Result]:
    """Every image in the catalog, newest first; the fields are those of `show` without the objects."""
    return [_record(record) for record in sorted(store.images(), key=lambda each: each.added, reverse=True)]


def show(store: Store, spec: str) -> Result:
    """One image by id, unambiguous id prefix (8 characters or more), link or name. Sizes in bytes, times since 1970.

    {"image", "name", "kind", "bytes", "chunks", "chunk_bytes", "held_chunks", "held_bytes", "complete", "origin",
    "path", "added", "last_used", "pinned", "attributes", "objects": [{"path", "bytes", "chunks", "nar_hash" or
    "file_hash", "references"}]}. Raises `NotFound`, `UsageError`.
    """
    record = find(store, spec)
    image = store.image(record.id)
    if image is None:
        raise NotFound(f"the manifest of image {record.id} is not here yet; fetch it again to complete it")
    objects = []
    for each in image.objects:
        row: Result = {"path": each.path, "bytes": each.size, "chunks": len(each.layout.digests)}
        if each.nar_hash is not None:
            row["nar_hash"] = f"sha256:{each.nar_hash.hex()}"
        if each.file_hash is not None:
            row["file_hash"] = f"blake3:{each.file_hash.hex()}"
        row["references"] = [image.objects[index].path for index in each.references]
        objects.append(row)
    return _record(record) | {"attributes": _plain(image.attributes), "objects": objects}


def verify(store: Store, spec: str, report: Report) -> Result:
    """Read an image again, every byte: {"image", "name", "ok": true, "chunks", "bytes", "seconds"}.

    Raises `VerificationFailed` naming what is damaged, `NotFound`, `UsageError`.
    """
    record = find(store, spec)
    began = time.monotonic()
    outcome = store.verify(record.id, lambda done, total: report(Progress("verifying", done, total)))
    if not outcome.ok:
        named = "; ".join(f"{bad.path}: {bad.reason}" for bad in outcome.bad[:MAX_BAD_NAMED])
        more = f"; and {len(outcome.bad) - MAX_BAD_NAMED} more" if len(outcome.bad) > MAX_BAD_NAMED else ""
        raise VerificationFailed(
            f"image {record.name or record.id} is damaged ({named}{more}); fetch it again to repair it, "
            "or provide the original again"
        )
    return {
        "image": str(record.id),
        "name": record.name,
        "ok": True,
        "chunks": outcome.chunks,
        "bytes": outcome.bytes,
        "seconds": round(time.monotonic() - began, 3),
    }


def remove(store: Store, spec: str) -> tuple[Result, list[bytes]]:
    """Forget an image; the user's own files stay.

    Returns {"image", "name", "chunks" (no longer held), "freed_bytes"} and those chunks' digests, to be withdrawn.
    Raises `UsageError` for one that is pinned.
    """
    record = find(store, spec)
    if record.pinned:
        _refuse_mirrored(store, record)
        raise UsageError(f"image {record.name or record.id} is pinned; `p2pnode unpin {record.id}` lets it go")
    before = store.stats().owned_bytes
    gone = store.remove_image(record.id)
    freed = max(0, before - store.stats().owned_bytes)
    return {"image": str(record.id), "name": record.name, "chunks": len(gone), "freed_bytes": freed}, gone


def pin(store: Store, spec: str, *, pinned: bool) -> Result:
    """Let an image be kept until it is unpinned: {"image", "name", "pinned"}.

    What is mirrored cannot be unpinned while it is; UsageError says how to end that.
    """
    from p2pnode.store.mirrors import Mirrors
    from p2pnode.store.records import Pin

    record = find(store, spec)
    if not pinned:
        _refuse_mirrored(store, record)
        Mirrors(store).release(record.id)
    store.pin(record.id, Pin.USER, pinned)
    return {"image": str(record.id), "name": record.name, "pinned": pinned}


def _refuse_mirrored(store: Store, record: ImageRecord) -> None:
    from p2pnode.store.mirrors import Mirrors

    things = Mirrors(store).wanted_by(record.id, listed=True)
    if things:
        raise UsageError(
            f"image {record.name or record.id} is pinned because it is mirrored; `p2pnode mirror --stop {things[0]}` "
            "ends that"
        )


def mirrors(store: Store) -> list[Result]:
    """What is mirrored: {"mirror" (image id or peer id), "kind": "image" or "publisher", "name", "complete", "bytes",
    "held_bytes", "added", "looked" (end of the last look, or null), "problem", "images": [{"image", "name", "bytes",
    "held_bytes", "complete", "pinned", "listed", "problem"}]}. Times since 1970."""
    from p2pnode.store.mirrors import Mirrors

    listed = Mirrors(store)
    return [_mirror(each, listed.images(each.thing)) for each in listed.all()]


def mirror_states(store: Store) -> list[Result]:
    """What is mirrored, in short: {"mirror", "kind", "name", "images" and "complete_images" (how many), "looked",
    "problem"}, as in `mirrors`."""
    from p2pnode.store.mirrors import Mirrors

    return [
        {
            "mirror": each.mirror.thing,
            "kind": _mirror_kind(each.mirror),
            "name": each.name,
            "images": each.images,
            "complete_images": each.complete,
            "looked": each.mirror.looked,
            "problem": each.mirror.problem,
        }
        for each in Mirrors(store).summaries()
    ]


def _mirror_kind(mirror: Mirror) -> str:
    return "publisher" if mirror.image is None else "image"


def stop_mirror(store: Store, text: str) -> Result:
    """Mirror a thing no longer; its images stay, and can be removed: the row it had in `mirrors`. Raises `NotFound`."""
    from p2pnode.store.mirrors import Mirrors

    listed = Mirrors(store)
    mirror = find_mirror(store, text)
    row = _mirror(mirror, listed.images(mirror.thing))
    listed.stop(mirror.thing)
    return row


def find_mirror(store: Store, text: str) -> Mirror:
    """The one thing that is mirrored and meant by `text`: as it was given, by id, by part of that, or by name."""
    from p2pnode.store.mirrors import Mirrors

    text = text.strip()
    if text.startswith((link.SCHEME, "/")):
        thing = link.parse_thing(text)
        text = str(thing.image) if isinstance(thing, link.Link) else thing.peer
    found = Mirrors(store).find(text)
    if found is None:
        raise NotFound(f"{text!r} is not mirrored; `p2pnode mirror` lists what is")
    return found


def _mirror(mirror: Mirror, images: list[Mirrored]) -> Result:
    held = [(each, each.record.held_bytes if each.record is not None else 0) for each in images]
    looked_well = mirror.looked is not None and mirror.problem is None
    return {
        "mirror": mirror.thing,
        "kind": _mirror_kind(mirror),
        "name": mirror.name or (images[0].record.name if mirror.image and images and images[0].record else None),
        "complete": all(each.complete for each in images) and (looked_well or bool(images)),
        "bytes": sum(each.size for each in images),
        "held_bytes": sum(size for _, size in held),
        "added": mirror.added,
        "looked": mirror.looked,
        "problem": mirror.problem,
        "images": [
            {
                "image": str(each.image),
                "name": each.name or (each.record.name if each.record is not None else None),
                "bytes": each.size,
                "held_bytes": size,
                "complete": each.complete,
                "pinned": each.record is not None and each.record.pinned,
                "listed": each.listed,
                "problem": each.problem,
            }
            for each, size in held
        ],
    }


def find(store: Store, spec: str) -> ImageRecord:
    """The one image meant by `spec`. Raises `NotFound`, or `UsageError` when it is malformed or ambiguous."""
    text = spec.strip()
    if text.startswith(link.SCHEME):
        text = str(link.parse(text).image)
    found = store.find(text)
    if len(found) > 1:
        ids = ", ".join(str(record.id)[:20] + "..." for record in found[:5])
        raise UsageError(f"{spec!r} names {len(found)} images ({ids}); give the id of one of them")
    if found:
        return found[0]
    if len(text) >= PROBABLY_AN_ID and text.startswith("b") and text.isalnum():
        link.parse_image_id(text)  # a mistyped id is told as such
    raise NotFound(f"no image {spec!r} is here; `p2pnode images` lists those that are")


def provide(
    store: Store,
    config: Config,
    path: str,
    *,
    kind: str | None,
    name: str | None,
    report: Report,
    sign_keys: Sequence[str] = (),
) -> Result:
    """Import `path` without serving it: the result of `provide`, its link naming no peers."""
    import trio

    from p2pnode.images.importer import import_path
    from p2pnode.images.paths import keep_claims
    from p2pnode.nix.registered import read_secret_keys
    from protocols.manifest import FASTCDC, Chunking, Kind

    began = time.monotonic()
    keys = read_secret_keys([*config.sign_keys, *sign_keys])
    imported = import_path(
        store,
        Path(path),
        kind=None if kind is None else Kind(kind),
        name=name,
        chunking=Chunking.fixed(config.chunk_size) if config.chunk_size else FASTCDC,
        nix_store=config.nix_store,
        progress=report,
    )
    trio.run(keep_claims, store, imported.image, config.nix_store, keys)
    return provided(imported, link.format(imported.image.id, (), imported.name), time.monotonic() - began)


def publish(
    store: Store,
    config: Config,
    cache: str,
    *,
    paths: Sequence[str],
    name: str | None,
    report: Report,
    tell: Callable[[Result], None],
    sign_keys: Sequence[str] = (),
    require_signatures: str | None = None,
    trusted_keys: Sequence[str] = (),
) -> None:
    """Import what a binary cache holds without serving it; `tell` gets the results of `Node.publish` as they come."""
    import trio

    from p2pnode.images import publish as publishing

    async def told(outcome: publishing.Outcome) -> None:
        result = published(outcome, ())
        if result is not None:
            tell(result)

    async def run() -> None:
        settings = publish_settings(config, name, sign_keys, require_signatures, trusted_keys)
        roots = [publishing.parse_root(path) for path in paths]
        async with publishing.parse_cache(cache, roots, name) as opened:
            await publishing.publish(store, opened, roots, settings, told, report)

    trio.run(run)


def publish_settings(
    config: Config,
    name: str | None,
    sign_keys: Sequence[str],
    require_signatures: str | None = None,
    trusted_keys: Sequence[str] = (),
) -> Settings:
    """How a cache is published. Raises ConfigError for keys that cannot be read."""
    from p2pnode.images.publish import Settings
    from p2pnode.nix import trust_policy
    from p2pnode.nix.registered import read_secret_keys
    from protocols.manifest import FASTCDC, Chunking

    chunking = Chunking.fixed(config.chunk_size) if config.chunk_size else FASTCDC
    keys = read_secret_keys([*config.sign_keys, *sign_keys])
    policy = require_signatures or config.require_signatures
    trust = trust_policy.of_fetch(policy, config.trusted_public_keys, trusted_keys, into_store=False)
    return Settings(chunking, config.home / "store" / "spool", keys, trust, name)


def published(outcome: Outcome, addrs: Sequence[str]) -> Result | None:
    """A result of `cache publish`: an image as `provided` has it, or {"path", "error", "message", "exit_code"}, or
    {"path", "warning"}; None for an image that only helps to make another one."""
    from p2pnode.failures import describe
    from p2pnode.images.publish import Failed, Warned

    if isinstance(outcome, Failed):
        return {"path": outcome.path, **describe(outcome.error).to_dict()}
    if isinstance(outcome, Warned):
        return {"path": str(outcome.path), "warning": outcome.message}
    imported = outcome.imported
    if not outcome.asked:
        return None
    return provided(imported, link.format(imported.image.id, addrs, imported.name), outcome.seconds)


def provided(imported: Imported, link_text: str, seconds: float) -> Result:
    """The result of `provide` (DESIGN 6)."""
    return {
        "image": str(imported.image.id),
        "link": link_text,
        "kind": str(imported.image.kind),
        "name": imported.name,
        "bytes": imported.bytes,
        "new_bytes": imported.new_bytes,
        "chunks": imported.chunks,
        "seconds": round(seconds, 3),
    }


def statistics(stats: StoreStatistics) -> Result:
    return asdict(stats)


def problem(each: Problem) -> Result:
    return asdict(each)


def _record(record: ImageRecord) -> Result:
    return {
        "image": str(record.id),
        "name": record.name,
        "kind": str(record.kind),
        "bytes": record.size,
        "chunks": record.chunks,
        "chunk_bytes": record.chunk_bytes,
        "held_chunks": record.held_chunks,
        "held_bytes": record.held_bytes,
        "complete": record.complete,
        "origin": str(record.origin),
        "path": record.path,
        "added": record.added,
        "last_used": record.last_used,
        "pinned": record.pinned,
    }


def _plain(value: Any) -> Any:
    """A manifest's attributes as JSON has them: bytes in hexadecimal, links as text."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
