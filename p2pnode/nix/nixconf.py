"""nix.conf: the settings that this machine's Nix goes by, read as Nix reads them.

Source: libutil/config.cc and libstore/globals.cc of Nix 2.8 and 2.36, and the manual's nix.conf(5). In order, later
values winning: `nix.conf` in NIX_CONF_DIR (/etc/nix), the user's files from the least to the most important, the text
in NIX_CONFIG. Lines are `NAME = VALUE`, `include FILE` or `!include FILE` (may be missing); `#` begins a comment
anywhere; the prefix `extra-` adds to a list instead of replacing it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from p2pnode.errors import ConfigError

MAX_FILE = 1 << 20
"""Bytes of one file. The NixOS ones have 1 KB."""

MAX_DEPTH = 16
"""Files that include each other. Nix has no limit, and dies of a file that includes itself."""

MAX_FILES = 256

DEFAULT_PUBLIC_KEYS = ("cache.nixos.org-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=",)
"""What every Nix trusts until it is told otherwise."""

_ALIASES = {
    "binary-cache-public-keys": "trusted-public-keys",
    "binary-caches": "substituters",
    "trusted-binary-caches": "trusted-substituters",
}
_LIST_DEFAULTS = {"trusted-public-keys": DEFAULT_PUBLIC_KEYS, "substituters": ("https://cache.nixos.org/",)}


@dataclass(frozen=True, slots=True)
class NixConf:
    """Settings by name, aliases resolved; those that nobody set are not in it."""

    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def words(self, name: str) -> tuple[str, ...]:
        """The words of a list setting; Nix's default, or nothing, if nobody set it."""
        return self.values.get(name, _LIST_DEFAULTS.get(name, ()))

    @property
    def trusted_public_keys(self) -> tuple[str, ...]:
        """`NAME:BASE64` each, not checked yet, in the order that counts: of two with one name Nix takes the first."""
        return self.words("trusted-public-keys")


def load(environ: Mapping[str, str] | None = None, *, user: bool = True) -> NixConf:
    """The settings of this machine and, with `user`, of this user. `environ` is os.environ unless given.

    Without `user` it is what the Nix daemon goes by. Missing files are no settings. Raises ConfigError, naming file
    and line, for what Nix would refuse to start with.
    """
    environ = os.environ if environ is None else environ
    reader = _Reader()
    reader.read_file(Path(environ.get("NIX_CONF_DIR") or "/etc/nix") / "nix.conf", missing_ok=True)
    if user:
        for path in reversed(_user_files(environ)):
            reader.read_file(path, missing_ok=True)
        reader.read_text(environ.get("NIX_CONFIG", ""), "NIX_CONFIG", Path.cwd())
    return NixConf(reader.values)


def _user_files(environ: Mapping[str, str]) -> list[Path]:
    """The most important first."""
    listed = environ.get("NIX_USER_CONF_FILES")
    if listed is not None:
        return [Path(name) for name in listed.split(":") if name]
    home = environ.get("HOME", "")
    directories = [environ.get("XDG_CONFIG_HOME") or (home and f"{home}/.config")]
    directories += (environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
    return [Path(directory, "nix", "nix.conf") for directory in directories if directory]


class _Reader:
    def __init__(self) -> None:
        self.values: dict[str, tuple[str, ...]] = {}
        self._files = 0

    def read_file(self, path: Path, *, missing_ok: bool, depth: int = 0, origin: str = "") -> None:
        self._files += 1
        if depth >= MAX_DEPTH or self._files > MAX_FILES:
            raise ConfigError(f"{origin or path}: too many Nix configuration files include each other")
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE + 1)
        except (FileNotFoundError, NotADirectoryError):
            if missing_ok:
                return
            raise ConfigError(f"{origin} includes {path}, which does not exist") from None
        except OSError as error:
            # As in Nix: access tokens are included from files that not everybody can read.
            if depth:
                return
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) > MAX_FILE:
            raise ConfigError(f"{path} is larger than {MAX_FILE} bytes, which no Nix configuration needs")
        self.read_text(data.decode("utf-8", "surrogateescape"), str(path), path.parent, depth)

    def read_text(self, text: str, origin: str, directory: Path, depth: int = 0) -> None:
        for place, words in _lines(text, origin):
            match words:
                case ["include" | "!include" as verb, name]:
                    missing_ok = verb == "!include"
                    self.read_file(directory / name, missing_ok=missing_ok, depth=depth + 1, origin=place)
                case [name, "=", *value]:
                    self._set(name, tuple(value))
                case _:
                    raise ConfigError(f"{place}: {' '.join(words)[:200]!r} is not a Nix setting; 'NAME = VALUE' is")

    def _set(self, name: str, words: tuple[str, ...]) -> None:
        added = name.startswith("extra-")
        name = name.removeprefix("extra-")
        name = _ALIASES.get(name, name)
        if added:
            words = self.values.get(name, _LIST_DEFAULTS.get(name, ())) + words
        self.values[name] = words


def _lines(text: str, origin: str) -> Iterator[tuple[str, list[str]]]:
    """Place and words of every line that has words."""
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].replace("\r", " ").split(" ")
        words = [word for part in words for word in part.split("\t") if word]
        if words:
            yield f"{origin}:{number}", words
