# What the module makes of a configuration, as JSON. `library`: another lib than the test's, such as <nixpkgs/lib>.
{
  module,
  configuration,
  package,
  library ? ./lib.nix,
}:
let
  lib = import library;
  inherit (lib) mkOption types;
  free =
    default:
    mkOption {
      type = types.attrsOf types.anything;
      inherit default;
    };
  list = mkOption {
    type = types.listOf types.anything;
    default = [ ];
  };
  p2pnode = {
    type = "derivation";
    name = "p2pnode";
    outPath = package;
    meta.mainProgram = "p2pnode";
  };
  pkgs = {
    hello = "/nix/store/00000000000000000000000000000000-hello";
    callPackage = file: _: assert builtins.pathExists file; p2pnode;
    formats.toml = _: {
      type = types.attrsOf types.anything;
      generate = name: value: "@${name}@";
    };
  };
  nixos = {
    options = {
      assertions = list;
      environment.systemPackages = list;
      networking.firewall.allowedTCPPorts = list;
      networking.firewall.allowedUDPPorts = list;
      nix.package = mkOption {
        type = types.anything;
        default = "/nix/store/00000000000000000000000000000000-nix";
      };
      nix.settings = free { };
      users.users = free { };
      users.groups = free { };
      systemd.services = mkOption {
        type = types.attrsOf (
          types.submodule {
            freeformType = types.attrsOf types.anything;
            options.environment = mkOption { type = types.attrsOf types.str; };
            options.serviceConfig = mkOption { type = types.attrsOf types.anything; };
          }
        );
        default = { };
      };
    };
  };
  inherit
    (lib.evalModules {
      modules = [
        nixos
        module
        configuration
        { _module.args.pkgs = pkgs; }
      ];
    })
    config
    ;
in
{
  failed = map (each: each.message) (builtins.filter (each: !each.assertion) config.assertions);
  packages = map (each: each.outPath) config.environment.systemPackages;
  inherit (config.networking) firewall;
  nix = config.nix.settings;
  inherit (config.services.p2pnode) settings;
  inherit (config.systemd) services;
  inherit (config.users) users groups;
}
