"""The contenders: p2pnode, and what it is compared with."""

from __future__ import annotations

import datetime
import ipaddress
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from swarmlib.process import NODE, Command, Daemon, Finished, Home, SwarmError

from transferlib import installation
from transferlib.contender import Contender, Outcome, Place, Ready, first_line, last_line, started

PEERS = Path(__file__).parent / "peers"
STOCK = (sys.executable, str(PEERS / "stock.py"))
PORT = 4747  # where every node has an address of its own
MANY = 64
_UPLOAD_REPORTS = 0.25  # s; torrent.py tells every 0.1 s what it has uploaded


class P2PNode(Contender):
    """`p2pnode run` and `provide` at each provider; `p2pnode fetch` with a node of its own, or through a daemon."""

    name = "p2pnode"
    most_providers = MANY

    def __init__(self, *, daemon: bool = False) -> None:
        """`daemon`: the fetch goes through a daemon that is connected already, so it can be watched from outside."""
        self._daemon = daemon
        self.title = "p2pnode fetch" + (" through a daemon" if daemon else "") + ", BLAKE3 verified"

    def startup(self) -> Sequence[str]:
        load = "import p2pnode.cli.commands, p2pnode.cli.fetch, p2pnode.node, p2pnode.net.dht, p2pnode.net.network, os"
        return (sys.executable, "-c", f"{load}; os._exit(0)")  # as p2pnode ends too

    def provide(
        self, stack: ExitStack, directory: Path, original: Path, places: Sequence[Place], fetcher: Place
    ) -> Ready:
        providers = [self._node(stack, directory / f"provider{n}", place) for n, place in enumerate(places)]
        for provider in providers:
            provider.ready()
        imports = [provider.begin("provide", str(original)) for provider in providers]
        link, *_ = [command.wait().check().json["link"] for command in imports]
        addrs = [provider.addrs[0] for provider in providers]
        daemon = None
        if self._daemon:
            daemon = self._node(stack, directory / "fetcher", fetcher, bootstrap=addrs)
            daemon.ready()

        def fetch(out: Path) -> Command:
            peers = [word for addr in addrs for word in ("--peer", addr)]
            args = ["fetch", link, "-o", str(out / original.name), *peers]
            if daemon is not None:
                return daemon.begin(*args)
            home = Home(out.with_name(f"{out.name}-home"), listen=(listen(fetcher),))
            home.write()
            log = out.with_name(f"{out.name}-fetch")
            return Command([*NODE, "--home", str(home.path), "--json", *args], log, prefix=fetcher.prefix)

        def outcome(finished: Finished) -> Outcome:
            result = finished.json
            return Outcome(result["seconds"], tuple(result["from"].get(node.peer_id, 0) for node in providers))

        return Ready(
            [provider.pid for provider in providers],
            fetch,
            outcome,
            daemon=None if daemon is None else daemon.pid,
            home=None if daemon is None else daemon.home.path,
            addrs=addrs if daemon is None else [daemon.addrs[0], *addrs],
        )

    @staticmethod
    def _node(stack: ExitStack, home: Path, place: Place, bootstrap: Sequence[str] = ()) -> Daemon:
        daemon = Daemon(Home(home, listen=(listen(place),), bootstrap=bootstrap), prefix=place.prefix)
        stack.callback(daemon.stop)
        daemon.start()
        return daemon


class Stock(Contender):
    """The library p2pnode stands on, without what p2pnode replaces in it."""

    name = "stock"
    title = "py-libp2p, its own Noise and Yamux; one raw stream, no hashes"
    most_providers = 1

    def startup(self) -> Sequence[str]:
        return (*STOCK, "nothing")

    def provide(
        self, stack: ExitStack, directory: Path, original: Path, places: Sequence[Place], fetcher: Place
    ) -> Ready:
        (place,) = places
        server = started(stack, [*STOCK, "serve", str(original), place.address], directory / "server", place)
        addr = first_line(server)["addr"]
        args = (addr, fetcher.address)
        return Ready(
            [server.pid],
            fetching([*STOCK, "fetch"], args, original.name, fetcher),
            told,
            addrs=[first_line(server)["addr"]],
        )


class HTTPS(Contender):
    """nginx and curl with TLS; curl trusts the certificate, and checks nothing else."""

    name = "https"
    title = "curl from nginx over TLS 1.3, no hashes"
    most_providers = 1

    def missing(self) -> str | None:
        absent = [name for name in ("nginx", "curl") if installation.program(name) is None]
        return f"no {' and no '.join(absent)}" if absent else None

    def startup(self) -> Sequence[str]:
        return ("curl", "--version")

    def provide(
        self, stack: ExitStack, directory: Path, original: Path, places: Sequence[Place], fetcher: Place
    ) -> Ready:
        (place,) = places
        nginx = installation.program("nginx")
        assert nginx is not None
        # nginx cannot tell a port that the kernel chose. Every host of a link has port 443 for itself.
        port = 443 if place.prefix else _free_port(place.address)
        certificate = self_signed(directory, place.address)
        configuration = directory / "nginx.conf"
        configuration.write_text(
            _NGINX.format(
                user="user root;" if os.geteuid() == 0 else "",  # others may not enter the directory of the run
                directory=directory,
                address=place.address,
                port=port,
                root=original.parent,
            )
        )
        args = [nginx, "-p", str(directory), "-c", str(configuration), "-e", str(directory / "error.log")]
        server = started(stack, args, directory / "server", place)
        _listening(server, directory / "nginx.pid")
        url = f"https://{place.address}:{port}/{original.name}"
        curl = ["curl", "--silent", "--show-error", "--fail", "--cacert", str(certificate), "--noproxy", "*"]
        curl += ["--write-out", '{"seconds": %{time_total}}\\n', "--output"]
        return Ready([server.pid], fetching(curl, (url,), original.name, fetcher), told)


_NGINX = """\
# One process: a connection never uses more than one, and none can be left behind.
daemon off;
master_process off;
{user}
pid {directory}/nginx.pid;
events {{ }}
http {{
    access_log off;
    sendfile on;
    tcp_nopush on;
    client_body_temp_path {directory}/nginx-body;
    proxy_temp_path {directory}/nginx-proxy;
    fastcgi_temp_path {directory}/nginx-fastcgi;
    uwsgi_temp_path {directory}/nginx-uwsgi;
    scgi_temp_path {directory}/nginx-scgi;
    server {{
        listen {address}:{port} ssl;
        ssl_certificate {directory}/certificate.pem;
        ssl_certificate_key {directory}/key.pem;
        ssl_protocols TLSv1.3;
        root {root};
    }}
}}
"""


class LibTorrent(Contender):
    """BitTorrent: every piece is hashed (SHA-1), nothing is encrypted."""

    name = "libtorrent"
    title = "libtorrent over TCP, not encrypted, SHA-1 verified"
    most_providers = MANY
    _script = str(PEERS / "torrent.py")

    def missing(self) -> str | None:
        return None if installation.has_libtorrent() else "no libtorrent"

    def startup(self) -> Sequence[str]:
        return (str(installation.python()), self._script, "nothing")

    def provide(
        self, stack: ExitStack, directory: Path, original: Path, places: Sequence[Place], fetcher: Place
    ) -> Ready:
        script = [str(installation.python()), self._script]
        torrent = directory / "image.torrent"
        started(stack, [*script, "make", str(original), str(torrent)], directory / "make", fetcher).wait().check()
        seeders: list[Command] = []
        addresses = []
        for number, place in enumerate(places):
            # It takes one connection per address, so on loopback each seeder has one.
            address = place.address if place.prefix else f"127.0.0.{number + 2}"
            args = [*script, "serve", str(torrent), str(original.parent), address]
            seeders.append(started(stack, args, directory / f"seeder{number}", place))
            addresses.append(address)
        peers = [f"{address}:{first_line(s)['port']}" for address, s in zip(addresses, seeders, strict=True)]

        def fetch(out: Path) -> Command:
            args = [*script, "fetch", str(torrent), str(out), fetcher.address, *peers]
            return Command(args, out.with_name(f"{out.name}-fetch"), prefix=fetcher.prefix, cwd=out)

        def outcome(finished: Finished) -> Outcome:
            time.sleep(_UPLOAD_REPORTS)
            return Outcome(finished.json["seconds"], tuple(last_line(seeder)["uploaded"] for seeder in seeders))

        return Ready([seeder.pid for seeder in seeders], fetch, outcome)


class Kubo(Contender):
    """IPFS: each provider has added the file; the fetcher gets it by Bitswap and writes it out of its repository."""

    name = "kubo"
    title = "kubo add and get, Bitswap over Noise or TLS, SHA-256 verified"
    most_providers = MANY

    def missing(self) -> str | None:
        return None if installation.kubo_library() is not None else "no kubo-python"

    def _script(self) -> list[str]:
        return [sys.executable, str(PEERS / "kubo.py"), str(installation.kubo_library())]

    def startup(self) -> Sequence[str]:
        return (*self._script(), "nothing")

    def provide(
        self, stack: ExitStack, directory: Path, original: Path, places: Sequence[Place], fetcher: Place
    ) -> Ready:
        nodes = []
        for number, place in enumerate(places):
            args = [*self._script(), "serve", str(directory / f"repo{number}"), str(original), place.address]
            nodes.append(started(stack, args, directory / f"node{number}", place))
        said = [first_line(node) for node in nodes]
        addrs = [answer["addr"] for answer in said]
        sent = [written(node.pid) for node in nodes]

        def fetch(out: Path) -> Command:
            repo = out.with_name(f"{out.name}-repo")
            args = [*self._script(), "fetch", str(repo), said[0]["cid"], str(out / original.name)]
            log = out.with_name(f"{out.name}-fetch")
            return Command([*args, fetcher.address, *addrs], log, prefix=fetcher.prefix, cwd=out)

        def outcome(finished: Finished) -> Outcome:
            # The library has no way to ask for its ledgers. A node that only serves writes little but to its sockets.
            shares = tuple(written(node.pid) - before for node, before in zip(nodes, sent, strict=True))
            return Outcome(finished.json["seconds"], shares)

        return Ready([node.pid for node in nodes], fetch, outcome)


CONTENDERS: tuple[type[Contender], ...] = (P2PNode, Stock, HTTPS, LibTorrent, Kubo)


def listen(place: Place) -> str:
    return f"/ip4/{place.address}/tcp/{PORT if place.prefix else 0}"


def fetching(program: Sequence[str], args: Sequence[str], name: str, place: Place) -> Callable[[Path], Command]:
    """A fetch command that takes the file to write before its other arguments."""

    def fetch(out: Path) -> Command:
        log = out.with_name(f"{out.name}-fetch")
        return Command([*program, str(out / name), *args], log, prefix=place.prefix, cwd=out)

    return fetch


def told(finished: Finished) -> Outcome:
    return Outcome(finished.json["seconds"])


def written(pid: int) -> int:
    """Bytes that a process gave to write(2), to files and sockets."""
    for line in Path(f"/proc/{pid}/io").read_text().splitlines():
        if line.startswith("wchar:"):
            return int(line.split()[1])
    raise SwarmError(f"/proc/{pid}/io has no wchar")


def self_signed(directory: Path, address: str) -> Path:
    """A key and a certificate for an IP address in `directory`, valid for a day. Returns the certificate's path."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "p2pnode benchmark")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (directory / "key.pem").write_bytes(private)
    path = directory / "certificate.pem"
    path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return path


def _free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port


def _listening(server: Command, pid_file: Path) -> None:
    """Wait for nginx to write its pid file, which it does after it has bound its ports."""
    deadline = time.monotonic() + 10.0
    while not (pid_file.exists() and pid_file.read_text().strip()):
        if server.poll() is not None or time.monotonic() > deadline:
            raise SwarmError(f"nginx did not start: {server.stderr.strip()[-1000:]}")
        time.sleep(0.02)
    time.sleep(0.05)
