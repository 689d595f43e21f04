"""File trees as values: made on disk, written as a NAR by a second, naive writer, and drawn by hypothesis."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import strategies as st

VECTORS = Path(__file__).parent.parent / "vectors" / "nar"


@dataclass(frozen=True)
class File:
    data: bytes
    executable: bool = False


@dataclass(frozen=True)
class Link:
    target: bytes


Node = File | Link | dict  # a directory maps names (bytes) to nodes


def vectors(expect: str) -> list:
    index = json.loads((VECTORS / "index.json").read_text())
    return [pytest.param(v, id=v["name"]) for v in index["vectors"] if v["expect"] == expect]


def vector_bytes(vector: dict) -> bytes:
    return (VECTORS / vector["file"]).read_bytes()


def naive_nar(node: Node) -> bytes:
    """The grammar, literally."""

    def string(value: bytes) -> bytes:
        return len(value).to_bytes(8, "little") + value + bytes(-len(value) % 8)

    def write(node: Node) -> bytes:
        if isinstance(node, File):
            parts = [b"type", b"regular", *([b"executable", b""] if node.executable else []), b"contents", node.data]
            body = b"".join(map(string, parts))
        elif isinstance(node, Link):
            body = b"".join(map(string, [b"type", b"symlink", b"target", node.target]))
        else:
            body = string(b"type") + string(b"directory")
            for name in sorted(node):
                body += string(b"entry") + string(b"(") + string(b"name") + string(name)
                body += string(b"node") + write(node[name]) + string(b")")
        return string(b"(") + body + string(b")")

    return string(b"nix-archive-1") + write(node)


def make(node: Node, path: bytes | str | Path) -> None:
    path = os.fsencode(path)
    if isinstance(node, File):
        with open(path, "xb") as file:
            file.write(node.data)
        os.chmod(path, 0o755 if node.executable else 0o644)
    elif isinstance(node, Link):
        os.symlink(node.target, path)
    else:
        os.mkdir(path)
        for name, child in node.items():
            make(child, os.path.join(path, name))


def snapshot(path: bytes | str | Path) -> Node:
    """What lies at `path`, read naively."""
    path = os.fsencode(path)
    if os.path.islink(path):
        return Link(os.readlink(path))
    if os.path.isdir(path):
        return {name: snapshot(os.path.join(path, name)) for name in os.listdir(path)}
    with open(path, "rb") as file:
        return File(file.read(), bool(os.stat(path).st_mode & 0o100))


names = st.one_of(
    st.binary(min_size=1, max_size=12),
    st.sampled_from([b"a", b"B", b"a-b", b"a.b", b"ab", b"~", b"\xff", b"...", b".a", b"x" * 255, "é".encode(), b"\n"]),
).filter(lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b".."))
leaves = st.one_of(
    st.builds(File, st.binary(max_size=40), st.booleans()),
    st.builds(File, st.integers(0, 5000).map(lambda n: bytes(i * 7 & 255 for i in range(n)))),
    st.builds(Link, st.binary(min_size=1, max_size=30).filter(lambda target: b"\0" not in target)),
)
trees = st.recursive(leaves, lambda children: st.dictionaries(names, children, max_size=5), max_leaves=20)


def nasty_tree() -> dict:
    """Every oddity that a NAR keeps, in one tree."""
    deep: Node = File(b"the deepest place that is allowed")
    for _ in range(61):  # the tree's root and `deep` itself make 63
        deep = {b"d": deep}
    return {
        b"empty": {},
        b"deep": {b"d": deep},
        b"sizes": {b"f%02d" % n: File(bytes(range(n))) for n in range(18)},
        b"exec": File(b"#!/bin/sh\n", executable=True),
        b"links": {
            b"abs": Link(b"/etc/passwd"),
            b"up": Link(b"../.."),
            b"long": Link(b"t" * 4095),
            b"raw": Link(b"\xff\xfe"),
        },
        b"names": {
            name: File(name)
            for name in (
                b"B",
                b"a",
                b"a-b",
                b"a.b",
                b"ab",
                b"~",
                b"\xc3\xa9",
                b"e\xcc\x81",
                b"\xff\xfe",
                b"...",
                b"new\nline",
            )
        },
        b"n" * 255: File(b"longest name"),
        b"case": {b"File": File(b"1"), b"file": File(b"2")},
    }


def make_nasty(path: Path) -> None:
    make(nasty_tree(), path)
    with open(path / "sparse", "xb") as file:
        file.truncate((3 << 20) + 5)
    for mode in (0o654, 0o100, 0o4755, 0o444, 0o611):
        (path / f"mode-{mode:o}").write_bytes(b"mode")
        os.chmod(path / f"mode-{mode:o}", mode)
    os.link(path / "exec", path / "hardlink")


@contextlib.contextmanager
def unprivileged(owned: Path | None = None) -> Iterator[None]:
    """Root may read and write everything, so become nobody for a moment, who is made the owner of `owned`."""
    if os.geteuid() != 0:
        yield
        return
    if owned is not None:
        subprocess.run(["chown", "-Rh", "65534", owned], check=True)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
