from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pnode.errors import ConfigError
from p2pnode.nix.nixconf import DEFAULT_PUBLIC_KEYS, MAX_FILE, load
from tests.nix.stores import NIX


def put(directory: Path, text: str, name: str = "nix.conf") -> dict[str, str]:
    """An environment in which `text` is the machine's configuration."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / name).write_text(text)
    return {"NIX_CONF_DIR": str(directory), "NIX_USER_CONF_FILES": "", "HOME": str(directory)}


def test_nothing_set(tmp_path):
    conf = load({"NIX_CONF_DIR": str(tmp_path), "HOME": str(tmp_path)})
    assert conf.trusted_public_keys == DEFAULT_PUBLIC_KEYS
    assert conf.words("substituters") == ("https://cache.nixos.org/",)
    assert conf.words("no-such-setting") == () and conf.values == {}


def test_includes(tmp_path):
    environ = put(tmp_path, "trusted-public-keys = a:1\ninclude more.conf\n!include missing.conf\n")
    put(tmp_path, "extra-trusted-public-keys = b:2 # comment\n!include deep/deeper.conf\n", "more.conf")
    put(tmp_path / "deep", f"extra-trusted-public-keys = c:3\ninclude {tmp_path}/deep/last.conf", "deeper.conf")
    put(tmp_path / "deep", "extra-trusted-public-keys\t=\td:4\r\n", "last.conf")
    assert load(environ).trusted_public_keys == ("a:1", "b:2", "c:3", "d:4")


def test_an_included_file_that_cannot_be_read_is_no_error(tmp_path):
    (tmp_path / "secret.conf").mkdir()  # root can read all files, but no directory
    assert load(put(tmp_path, "include secret.conf\ntrusted-public-keys = a:1")).trusted_public_keys == ("a:1",)
    (tmp_path / "nix.conf").unlink()
    (tmp_path / "nix.conf").mkdir()
    with pytest.raises(ConfigError, match="cannot be read"):
        load({"NIX_CONF_DIR": str(tmp_path)})


def test_the_order_of_files(tmp_path):
    environ = put(tmp_path / "etc", "trusted-public-keys = system:1\nsubstituters = https://a https://b")
    put(tmp_path / "one", "extra-trusted-public-keys = one:1")
    put(tmp_path / "two", "extra-trusted-public-keys = two:1\nsubstituters =")
    environ["NIX_USER_CONF_FILES"] = f"{tmp_path}/one/nix.conf:{tmp_path}/two/nix.conf"
    environ["NIX_CONFIG"] = "extra-trusted-public-keys = text:1\n"
    conf = load(environ)
    assert conf.trusted_public_keys == ("system:1", "two:1", "one:1", "text:1")  # the first file is the last word
    assert conf.words("substituters") == ()
    assert load(environ, user=False).trusted_public_keys == ("system:1",)
    del environ["NIX_USER_CONF_FILES"], environ["NIX_CONFIG"]
    put(tmp_path / "home" / "nix", "extra-trusted-public-keys = home:1")
    put(tmp_path / "xdg" / "nix", "extra-trusted-public-keys = xdg:1")
    environ |= {"XDG_CONFIG_HOME": f"{tmp_path}/home", "XDG_CONFIG_DIRS": f"{tmp_path}/xdg"}
    assert load(environ).trusted_public_keys == ("system:1", "xdg:1", "home:1")


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("substituters=x", r"nix.conf:1: 'substituters=x' is not a Nix setting"),
        ("\n\ntrusted-public-keys", r"nix.conf:3"),
        ("a == b", "is not a Nix setting"),
        ("include", "is not a Nix setting"),
        ("include a b", "is not a Nix setting"),
        ("include missing", r"nix.conf:1 includes .*missing"),
        ("include nix.conf", "include each other"),
        ("!include nix.conf", "include each other"),
        ("#" * (MAX_FILE + 1), "larger than"),
    ],
)
def test_refused(tmp_path, text, complaint):
    with pytest.raises(ConfigError, match=complaint):
        load(put(tmp_path, text))


WORDS = st.sampled_from(["a:AAAA", "b:BBBB", "c-1:CC+/=="])
LINES = st.builds(
    lambda name, between, words, end: f"{name}{between}= {' '.join(words)}{end}",
    st.sampled_from(["trusted-public-keys", "extra-trusted-public-keys", "binary-cache-public-keys", "max-jobs"]),
    st.sampled_from([" ", "\t", "  "]),
    st.lists(WORDS, max_size=3),
    st.sampled_from(["", " ", "# a b", " #", "\r"]),
) | st.sampled_from(
    ["", "# x = y", "   ", "!include other.conf", "include other.conf", "!include none.conf", "x=1", "y"]
)


@pytest.mark.nix
@settings(max_examples=25, deadline=None)
@given(st.lists(LINES, max_size=5), st.lists(LINES, max_size=3), st.lists(LINES, max_size=2))
def test_what_nix_makes_of_it(tmp_path_factory, main, other, variable):
    """Nix itself, given the same files, prints the same keys, or refuses what we refuse."""
    directory = tmp_path_factory.mktemp("conf")
    lines = [[line for line in part if not line.startswith("max-jobs")] for part in (main, other, variable)]
    environ = put(directory, "\n".join(lines[0]) + "\n")
    put(directory, "\n".join(line for line in lines[1] if "include" not in line) + "\n", "other.conf")
    environ["NIX_CONFIG"] = "\n".join(line for line in lines[2] if "include" not in line)
    done = subprocess.run(
        [*NIX, "show-config"], capture_output=True, text=True, check=False, env=os.environ | environ, cwd=directory
    )
    if done.returncode:
        assert "illegal configuration line" in done.stderr
        with pytest.raises(ConfigError):
            load(environ)
        return
    printed = next(line for line in done.stdout.splitlines() if line.startswith("trusted-public-keys = "))
    assert load(environ).trusted_public_keys == tuple(printed.removeprefix("trusted-public-keys = ").split())
