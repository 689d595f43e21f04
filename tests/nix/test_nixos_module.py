"""scripts/nixos: the module evaluated by Nix, its units looked at by systemd, and what they would run, run.

There is no nixpkgs here, so the test brings as much of its lib as the module uses (nixos/lib.nix). With `<nixpkgs>` in
NIX_PATH the real one is used as well.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from p2pnode import config
from p2pnode.nix.narinfo import parse
from p2pnode.nix.signatures import SecretKey
from p2pnode.nix.trust import TrustedKeys, judge
from tests.nix.stores import ChrootStore

pytestmark = pytest.mark.nix

ROOT = Path(__file__).resolve().parents[2]
NIXOS = ROOT / "scripts" / "nixos"
HERE = Path(__file__).parent / "nixos"
HOME = "/var/lib/p2pnode"
NIXPKGS = re.search(r"(?:^|:)nixpkgs=([^:]+)", os.environ.get("NIX_PATH", ""))


class EvaluationFailed(Exception):
    """What Nix says."""


def evaluate(file: Path, **arguments: object) -> Any:
    """A function of a Nix file, applied: paths and what `nix()` made as they are, the rest as JSON."""
    command = ["nix-instantiate", "--eval", "--strict", "--json", str(file)]
    for name, value in arguments.items():
        command += ["--arg", name, str(value) if isinstance(value, Path) else nix(value)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise EvaluationFailed(done.stderr)
    return json.loads(done.stdout)


def nix(value: object) -> str:
    """A value as a Nix expression."""
    return f"(builtins.fromJSON {json.dumps(json.dumps(value)).replace('${', chr(92) + '${')})"


LIBRARIES = [HERE / "lib.nix"]
if NIXPKGS and (Path(NIXPKGS[1]) / "lib" / "modules.nix").is_file():
    LIBRARIES.append(Path(NIXPKGS[1]) / "lib")


class Module:
    """Evaluates configurations with one lib. `package`: where bin/p2pnode lies."""

    def __init__(self, library: Path, package: str = "/nix/store/11111111111111111111111111111111-p2pnode") -> None:
        self.library = library
        self.package = package

    def __call__(self, **options: Any) -> Any:
        """What services.p2pnode with these options makes of the system."""
        return self.of({"services": {"p2pnode": {"enable": True, **options}}})

    def of(self, configuration: object) -> Any:
        return evaluate(
            HERE / "eval.nix",
            module=NIXOS / "module.nix",
            configuration=configuration,
            package=self.package,
            library=self.library,
        )


@pytest.fixture(params=LIBRARIES, ids=["own-lib", "nixpkgs-lib"][: len(LIBRARIES)])
def module(request: pytest.FixtureRequest) -> Module:
    return Module(request.param)


@pytest.mark.parametrize("file", sorted(NIXOS.glob("*.nix")), ids=lambda path: path.name)
def test_syntax(file: Path) -> None:
    subprocess.run(["nix-instantiate", "--parse", str(file)], check=True, capture_output=True)


def test_disabled_it_does_nothing(module: Module) -> None:
    made = module.of({})
    assert made["services"] == made["users"] == made["nix"] == {} and made["packages"] == []


def test_the_plain_daemon(module: Module) -> None:
    made = module()
    assert made["failed"] == [] and list(made["services"]) == ["p2pnode"]
    unit = made["services"]["p2pnode"]
    service = unit["serviceConfig"]
    assert service["ExecStart"] == f"{module.package}/bin/p2pnode --home {HOME} run"
    assert f"/var/lib/{service['StateDirectory']}" == HOME == made["users"][service["User"]]["home"]
    assert service["ProtectSystem"] == "strict" and service["ReadOnlyPaths"] == ["/nix/store"]
    assert "AF_UNIX" in service["RestrictAddressFamilies"]  # of the Nix daemon
    assert "LoadCredential" not in service and unit["environment"] == {"NIX_REMOTE": "daemon"}
    assert made["settings"] == {"listen": list(config.DEFAULT_LISTEN)}
    assert made["firewall"] == {"allowedTCPPorts": [], "allowedUDPPorts": []}
    assert "substituters" not in made["nix"] and "trusted-public-keys" not in made["nix"]


def test_the_gateway_is_a_substituter(module: Module) -> None:
    keys = ["publisher-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY="]
    made = module(gateway={"enable": True, "upstreams": ["https://cache.example"]}, trustedPublicKeys=keys)
    assert made["settings"]["gateway"] == "127.0.0.1:5080"
    assert made["settings"]["gateway_upstreams"] == ["https://cache.example"]
    assert made["settings"]["trusted_public_keys"] == made["nix"]["trusted-public-keys"] == keys
    assert made["nix"]["substituters"] == ["http://127.0.0.1:5080"]
    assert made["nix"]["narinfo-cache-negative-ttl"] == 0
    quiet = module(gateway={"enable": True, "setSubstituter": False}, trustedPublicKeys=keys)
    assert "substituters" not in quiet["nix"] and "trusted-public-keys" not in quiet["nix"]
    assert quiet["settings"]["trusted_public_keys"] == keys


@pytest.mark.parametrize(
    ("address", "setting", "url"),
    [
        ("0.0.0.0", "0.0.0.0:81", "http://127.0.0.1:81"),
        ("::", "[::]:81", "http://[::1]:81"),
        ("192.0.2.7", "192.0.2.7:81", "http://192.0.2.7:81"),
    ],
)
def test_addresses_of_the_gateway(module: Module, address: str, setting: str, url: str) -> None:
    made = module(gateway={"enable": True, "address": address, "port": 81})
    assert made["settings"]["gateway"] == setting and made["nix"]["substituters"] == [url]


def test_the_firewall_follows_the_settings(module: Module) -> None:
    assert module(openFirewall=True)["firewall"] == {"allowedTCPPorts": [4747], "allowedUDPPorts": [5353]}
    listen = ["/ip4/0.0.0.0/tcp/9000", "/ip6/::/tcp/9001", "/ip4/127.0.0.1/tcp/0"]
    made = module(openFirewall=True, settings={"listen": listen, "mdns": False})
    assert made["firewall"] == {"allowedTCPPorts": [9000, 9001], "allowedUDPPorts": []}
    assert made["settings"]["listen"] == listen  # instead of the default


def test_keys_in_the_store_are_refused(module: Module) -> None:
    made = module(signKeyFile="/etc/keys/publisher-1")
    unit = made["services"]["p2pnode"]
    assert made["failed"] == [] and unit["serviceConfig"]["LoadCredential"] == ["sign-key:/etc/keys/publisher-1"]
    assert unit["environment"]["P2PNODE_SIGN_KEYS"] == "%d/sign-key"
    (message,) = module(signKeyFile="/nix/store/00000000000000000000000000000000-key")["failed"]
    assert "everybody can read" in message
    (message,) = module(signKeyFile="/etc/key", settings={"sign_keys": ["/etc/other"]})["failed"]
    assert "sign_keys" in message


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"gateway": {"enable": True, "port": 65536}}, "port"),
        ({"publish": ["not/absolute"]}, "publish"),
        ({"trustedPublicKeys": "k"}, "trustedPublicKeys"),
        ({"enabled": True}, "enabled"),
        ({"gateway": {"enable": True}, "settings": {"gateway": "127.0.0.1:1"}}, "gateway"),
    ],
)
def test_bad_options(module: Module, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(EvaluationFailed, match=complaint):
        module(**options)


def test_every_setting_is_one_that_the_node_has(module: Module, tmp_path: Path) -> None:
    """All that the module writes, and the example's, through the node's own reader of config.toml."""
    full = module(
        relay=True,
        trustedPublicKeys=[str(SecretKey.generate("k-1").public_key())],
        gateway={"enable": True, "address": "::1", "upstreams": ["https://cache.nixos.org"]},
        settings={"log_level": "info"},
    )
    example = module.of(NIXOS / "configuration.nix")
    assert example["failed"] == [] and example["nix"]["substituters"] == ["http://127.0.0.1:5080"]
    for number, made in enumerate((full, example)):
        write_settings(tmp_path / str(number), made["settings"])
        loaded = config.load(tmp_path / str(number), environ={})
        assert loaded.given == {"home", *made["settings"]}


def write_settings(home: Path, settings: dict[str, Any]) -> Path:
    """As pkgs.formats.toml would; for what is in here JSON and TOML are spelled alike."""
    home.mkdir(exist_ok=True)
    path = home / "config.toml"
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    return path


def unit_text(unit: dict[str, Any], script: Path) -> str:
    """A unit as NixOS writes it, of the parts that are in the module."""

    def lines(fields: dict[str, Any]) -> Iterator[str]:
        for name, value in fields.items():
            for each in value if isinstance(value, list) else [value]:
                yield f"{name}={str(each).lower() if isinstance(each, bool) else each}"

    names = {"description": "Description", "wants": "Wants", "after": "After", "bindsTo": "BindsTo"}
    head = {names[name]: value for name, value in unit.items() if name in names}
    environment = [f'"{name}={value}"' for name, value in unit.get("environment", {}).items()]
    service = unit["serviceConfig"] | {"Environment": environment, "ExecStartPre": str(script)}
    service.setdefault("ExecStart", str(script))
    sections = {"Unit": head, "Service": service, "Install": {"WantedBy": unit["wantedBy"]}}
    return "".join(f"[{name}]\n" + "\n".join(lines(fields)) + "\n" for name, fields in sections.items())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_understands_the_units(tmp_path: Path) -> None:
    program = executable(tmp_path / "package" / "bin" / "p2pnode", "exit 0")
    made = Module(LIBRARIES[0], str(program.parents[1]))(
        publish=["/srv/a file"], signKeyFile="/etc/key", writablePaths=["/srv/images"]
    )
    for name, unit in made["services"].items():
        path = tmp_path / f"{name}.service"
        path.write_text(unit_text(unit, program))
    for path in tmp_path.glob("*.service"):
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True)
        assert str(tmp_path) not in done.stderr and path.name not in done.stderr, done.stderr
        # 10 is no sandbox at all, and what most services have; the network is what a node cannot do without.
        marks = ["systemd-analyze", "security", "--offline=true", "--threshold=30", path]
        done = subprocess.run(marks, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def executable(path: Path, command: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
    return path


def test_what_the_units_run(tmp_path: Path) -> None:
    """With another directory in place of /var/lib/p2pnode, and without the sandbox."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith(("P2PNODE_", "NIX_"))}
    environ |= {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    program = executable(tmp_path / "package/bin/p2pnode", f'exec {shlex.quote(sys.executable)} -m p2pnode "$@"')
    key = SecretKey.generate("publisher-1")
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "sign-key").write_text(str(key))
    store = ChrootStore(tmp_path / "nix")
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_text("what the machine publishes")
    path = store.add(tmp_path / "tree")
    image = tmp_path / "an image; with a name"
    image.write_bytes(bytes(100_000))
    made = Module(LIBRARIES[0], str(program.parents[1]))(
        settings={"listen": ["/ip4/127.0.0.1/tcp/0"], "mdns": False, "nix_store": str(store.root)},
        gateway={"enable": True, "port": 0},
        trustedPublicKeys=[str(key.public_key())],
        signKeyFile="/etc/key",
        publish=[str(path), str(image)],
    )
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text("# mine")
    written = write_settings(tmp_path / "generated", made["settings"])

    def placed(text: str) -> str:
        text = text.replace(HOME, str(home)).replace("@p2pnode.toml@", str(written))
        return text.replace("%d", str(tmp_path / "credentials"))

    daemon, publish = made["services"]["p2pnode"], made["services"]["p2pnode-publish"]
    for _ in range(2):  # as at a second start
        subprocess.run(["bash", "-euc", placed(daemon["preStart"])], check=True)
    assert (home / "config.toml").resolve() == written and (home / "config.toml.before-nixos").read_text() == "# mine"
    environ |= {name: placed(value) for name, value in daemon["environment"].items()}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, (tmp_path / "log").open("w+") as log:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        command = shlex.split(placed(daemon["serviceConfig"]["ExecStart"]))
        process = subprocess.Popen(
            command, env=environ | {"NOTIFY_SOCKET": str(tmp_path / "notify")}, stdin=subprocess.DEVNULL, stderr=log
        )
        try:
            assert manager.recv(100) == b"READY=1"
            done = subprocess.run(["bash", "-euc", placed(publish["script"])], env=environ, capture_output=True)
            assert done.returncode == 0 and done.stdout.count(b"p2pnode:bafy") == 2, done
            asked = [*command[:-1], "--json", "status"]
            said = json.loads(subprocess.run(asked, env=environ, capture_output=True, check=True).stdout)
            assert said["store"]["complete_images"] == 2
            (url,) = said["gateway"]["urls"]
            narinfo = parse(httpx.get(f"{url}/{path.digest}.narinfo", trust_env=False).text, expect=path)
            assert judge(narinfo.info, narinfo.signatures, TrustedKeys([key.public_key()])).trusted
            process.send_signal(15)
            assert process.wait(30) == 0
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        assert log.read() == ""


def test_the_package_has_what_pyproject_demands() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_libp2p = {
        name_of(each)
        for each in importlib.metadata.requires("libp2p") or ()
        if "extra" not in each and 'python_version < "3.11"' not in each
    }
    ours = {name_of(each) for each in project["dependencies"]}
    tools = {"setuptools", "cython", "hatchling", "typing-extensions"}
    made = evaluate(HERE / "package.nix", package=NIXOS / "package.nix", names=sorted(ours | of_libp2p | tools))
    assert (made["pname"], made["version"]) == ("p2pnode", project["version"])
    assert made["mainProgram"] in project["scripts"] and made["missing"] == []
    assert set(made["dependencies"]) == ours and set(made["relaxed"]) <= ours
    for pinned in ("libp2p", "pyfastcdc"):
        assert made[pinned]["version"] == importlib.metadata.version(pinned)
        assert re.fullmatch(r"sha256-[A-Za-z0-9+/]{43}=", made[pinned]["src"]["hash"])
    kept, removed = set(made["libp2p"]["dependencies"]), set(made["libp2p"]["removed"])
    assert kept | removed == of_libp2p and not kept & removed
    # What is removed nobody imports.
    code = "import sys, p2pnode.node; p2pnode.node._import_network(); import p2pnode.net.upnp, p2pnode.net.mdns\n"
    code += "print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    assert not {"grpc", "lru", "mypy_protobuf", "rpcudp", "types_requests"} & set(loaded.split())


def name_of(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    return match[0].lower().replace("_", "-").replace(".", "-")
