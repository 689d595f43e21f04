# What package.nix builds of what, with names in place of packages.
{ package, names }:
let
  lib = import ./lib.nix;
  named = builtins.listToAttrs (
    map (pname: {
      name = pname;
      value = { inherit pname; };
    }) names
  );
  build = fields: fields;
  result = import package {
    inherit lib;
    fetchPypi = fields: fields;
    python3Packages = named // {
      buildPythonPackage = build;
      buildPythonApplication = build;
    };
  };
  needs = built: map (each: each.pname) built.dependencies;
  found = pname: builtins.head (builtins.filter (each: each.pname == pname) result.dependencies);
in
{
  inherit (result) pname version;
  inherit (result.meta) mainProgram;
  files = map toString result.src.fileset;
  missing = builtins.filter (file: !builtins.pathExists file) result.src.fileset;
  dependencies = needs result;
  relaxed = result.pythonRelaxDeps;
  libp2p = {
    inherit (found "libp2p") version src;
    dependencies = needs (found "libp2p");
    removed = (found "libp2p").pythonRemoveDeps;
  };
  pyfastcdc = {
    inherit (found "pyfastcdc") version src;
  };
}
