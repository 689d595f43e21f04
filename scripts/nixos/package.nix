# p2pnode as a Nix package:  pkgs.callPackage ./package.nix { }
#
# All it needs is in nixpkgs but two Python packages. Both are pinned, for they are part of what p2pnode does: libp2p is
# patched at run time, and pyfastcdc's tables are part of the image format.
{
  lib,
  fetchPypi,
  python3Packages,
}:

let
  inherit (python3Packages) buildPythonPackage buildPythonApplication;

  pyfastcdc = buildPythonPackage rec {
    pname = "pyfastcdc";
    version = "0.3.1";
    pyproject = true;
    src = fetchPypi {
      inherit pname version;
      hash = "sha256-TUvMCwekjz8xIhtbhj4axa0n1stQiR9u1+ivL8ZmsJE=";
    };
    build-system = [
      python3Packages.setuptools
      python3Packages.cython
    ];
    dependencies = [ python3Packages.typing-extensions ];
    pythonImportsCheck = [ "pyfastcdc" ];
  };

  libp2p = buildPythonPackage rec {
    pname = "libp2p";
    version = "0.8.1";
    format = "wheel";
    src = fetchPypi {
      inherit pname version format;
      dist = "py3";
      python = "py3";
      hash = "sha256-PVPaogpqeJhMm07RZU13F1exhygvkDdtcVbCtngoswg=";
    };
    dependencies = with python3Packages; [
      aioquic
      anyio
      base58
      cbor2
      coincurve
      fastecdsa
      httpx
      miniupnpc
      multiaddr
      noiseprotocol
      prometheus-client
      protobuf
      py-cid
      py-multibase
      py-multicodec
      py-multihash
      pycryptodome
      pynacl
      requests
      trio
      trio-typing
      trio-websocket
      zeroconf
    ];
    pythonRelaxDeps = true; # it pins what it was released with
    # Of services that p2pnode does not start.
    pythonRemoveDeps = [
      "grpcio"
      "lru-dict"
      "mypy-protobuf"
      "rpcudp"
      "types-requests"
    ];
  };
in
buildPythonApplication {
  pname = "p2pnode";
  version = (lib.importTOML ../../pyproject.toml).project.version;
  pyproject = true;

  src = lib.fileset.toSource {
    root = ../..;
    fileset = lib.fileset.unions [
      ../../LICENSE
      ../../README.md
      ../../p2pnode
      ../../protocols
      ../../pyproject.toml
    ];
  };

  build-system = [ python3Packages.hatchling ];
  dependencies = with python3Packages; [
    base58
    blake3
    cbor2
    click
    cryptography
    h11
    httpx
    libp2p
    multiaddr
    psutil
    pyfastcdc
    rich
    trio
    zeroconf
    zstandard
  ];
  pythonRelaxDeps = [
    "rich"
    "trio"
    "zstandard"
  ];
  pythonImportsCheck = [
    "p2pnode.cli.main"
    "p2pnode.net.network"
  ];

  meta = {
    description = "Swarms Nix-built VM images through a cluster: chunked, verified, peer to peer";
    license = lib.licenses.asl20;
    mainProgram = "p2pnode";
    platforms = lib.platforms.linux;
  };
}
