# A NixOS module: `imports = [ ./path/to/scripts/nixos/module.nix ];`, then `services.p2pnode.enable = true;`.
# configuration.nix beside it is an example.
{
  config,
  lib,
  pkgs,
  ...
}:

let
  inherit (lib)
    concatMap
    escapeShellArgs
    getExe
    hasPrefix
    literalExpression
    mkDefault
    mkEnableOption
    mkIf
    mkMerge
    mkOption
    optional
    types
    ;

  cfg = config.services.p2pnode;
  format = pkgs.formats.toml { };

  # Where p2pnode looks by itself when root calls it, so that root's commands reach the daemon.
  home = "/var/lib/p2pnode";
  user = "p2pnode";
  command = "${getExe cfg.package} --home ${home}";

  # In the home rather than in the environment: commands read it too.
  configFile = format.generate "p2pnode.toml" cfg.settings;

  bracketed = host: if builtins.match ".*:.*" host == null then host else "[${host}]";
  # Where this machine's own Nix reaches the gateway.
  localHost =
    {
      "0.0.0.0" = "127.0.0.1";
      "::" = "::1";
    }
    .${cfg.gateway.address} or cfg.gateway.address;
  gatewayUrl = "http://${bracketed localHost}:${toString cfg.gateway.port}";

  # "/ip4/0.0.0.0/tcp/4747" -> [ 4747 ]; port 0 is any free one, which no firewall can be opened for.
  tcpPort =
    address:
    let
      found = builtins.match ".*/tcp/([1-9][0-9]{0,4})(/.*)?" address;
    in
    optional (found != null) (builtins.fromJSON (builtins.head found));

  sandbox = {
    User = user;
    Group = user;
    CapabilityBoundingSet = "";
    LockPersonality = true;
    NoNewPrivileges = true;
    PrivateDevices = true;
    PrivateTmp = true;
    ProtectClock = true;
    ProtectControlGroups = true;
    ProtectHome = true;
    ProtectHostname = true;
    ProtectKernelLogs = true;
    ProtectKernelModules = true;
    ProtectKernelTunables = true;
    ProtectProc = "invisible";
    ProtectSystem = "strict";
    RestrictNamespaces = true;
    RestrictRealtime = true;
    RestrictSUIDSGID = true;
    SystemCallArchitectures = "native";
    SystemCallErrorNumber = "EPERM"; # a call that is refused is an error that p2pnode reports, not its death
    SystemCallFilter = [
      "@system-service"
      "~@privileged"
    ];
  };
in
{
  options.services.p2pnode = {
    enable = mkEnableOption "p2pnode, which swarms Nix-built images and store paths through a cluster";

    package = mkOption {
      type = types.package;
      default = pkgs.callPackage ./package.nix { };
      defaultText = literalExpression "pkgs.callPackage ./package.nix { }";
      description = "The p2pnode to run.";
    };

    settings = mkOption {
      type = format.type;
      default = { };
      example = literalExpression ''
        {
          bootstrap = [ "/ip4/192.0.2.7/tcp/4747/p2p/12D3KooW..." ];
          log_level = "info";
        }
      '';
      description = "Keys of config.toml, see Configuration in p2pnode's README.";
    };

    openFirewall = mkOption {
      type = types.bool;
      default = false;
      description = "Open the TCP ports that `settings.listen` names, and UDP 5353 where mDNS is on.";
    };

    relay = mkEnableOption "carrying connections of nodes that nobody can connect to; for machines with a public address";

    trustedPublicKeys = mkOption {
      type = types.listOf types.str;
      default = [ ];
      example = [ "publisher-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];
      description = ''
        Keys whose signatures p2pnode believes, beside those in nix.conf. With `gateway.setSubstituter`, Nix does too.
      '';
    };

    signKeyFile = mkOption {
      type = types.nullOr types.path;
      default = null;
      example = "/etc/nix/publisher-1.secret";
      description = ''
        Secret key, as `nix-store --generate-binary-cache-key` makes them, that signs the store paths provided here.
        Only root need be able to read it. Not a path of the Nix store, which everybody can read.
      '';
    };

    publish = mkOption {
      type = types.listOf types.path;
      default = [ ];
      example = literalExpression "[ pkgs.hello ]";
      description = ''
        Store paths, provided with all that they refer to, and files and directories that the user ${user} can read.
        What was published once stays so until `p2pnode rm`.
      '';
    };

    writablePaths = mkOption {
      type = types.listOf types.path;
      default = [ ];
      example = [ "/srv/images" ];
      description = ''
        Directories that `p2pnode fetch -o` may write to; it is the daemon that writes. They exist, and the user ${user}
        may write there.
      '';
    };

    gateway = {
      enable = mkEnableOption "a binary cache for Nix that is fed by the swarm";

      address = mkOption {
        type = types.str;
        default = "127.0.0.1";
        description = "Address to listen on. Whoever reaches it can have every path of this node.";
      };

      port = mkOption {
        type = types.port;
        default = 5080;
        description = "TCP port to listen on.";
      };

      upstreams = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "https://cache.nixos.org" ];
        description = "Binary caches to ask beside the swarm.";
      };

      setSubstituter = mkOption {
        type = types.bool;
        default = true;
        description = "Let the Nix of this machine use the gateway.";
      };
    };
  };

  config = mkIf cfg.enable {
    assertions = [
      {
        assertion = cfg.signKeyFile == null || !(hasPrefix "${builtins.storeDir}/" (toString cfg.signKeyFile));
        message = "services.p2pnode.signKeyFile lies in the Nix store, where everybody can read it; give a path outside.";
      }
      {
        assertion = cfg.signKeyFile == null || !(cfg.settings ? sign_keys);
        message = "services.p2pnode.signKeyFile would go before services.p2pnode.settings.sign_keys; set one of them.";
      }
    ];

    services.p2pnode.settings = mkMerge [
      { listen = mkDefault [ "/ip4/0.0.0.0/tcp/4747" ]; }
      (mkIf cfg.relay { relay = true; })
      (mkIf (cfg.trustedPublicKeys != [ ]) { trusted_public_keys = cfg.trustedPublicKeys; })
      (mkIf cfg.gateway.enable {
        gateway = "${bracketed cfg.gateway.address}:${toString cfg.gateway.port}";
        gateway_upstreams = cfg.gateway.upstreams;
      })
    ];

    nix.settings = mkMerge [
      { extra-allowed-users = [ user ]; } # where allowed-users says less than everybody
      (mkIf (cfg.gateway.enable && cfg.gateway.setSubstituter) {
        substituters = [ gatewayUrl ];
        trusted-public-keys = cfg.trustedPublicKeys;
        narinfo-cache-negative-ttl = mkDefault 0; # else Nix remembers for an hour that nobody had a path
      })
    ];

    networking.firewall = mkIf cfg.openFirewall {
      allowedTCPPorts = concatMap tcpPort cfg.settings.listen;
      allowedUDPPorts = optional (cfg.settings.mdns or true) 5353;
    };

    users.users.${user} = {
      isSystemUser = true;
      group = user;
      inherit home;
      description = "p2pnode";
    };
    users.groups.${user} = { };

    environment.systemPackages = [ cfg.package ];

    systemd.services.p2pnode = {
      description = "Peer-to-peer distribution of Nix-built images";
      wantedBy = [ "multi-user.target" ];
      wants = [ "network-online.target" ];
      after = [
        "network-online.target"
        "nix-daemon.socket"
      ];
      path = [ config.nix.package ];
      environment = {
        NIX_REMOTE = "daemon";
        P2PNODE_SIGN_KEYS = mkIf (cfg.signKeyFile != null) "%d/sign-key";
      };
      # A configuration that somebody wrote by hand before there was a module is kept aside.
      preStart = ''
        if [ -f ${home}/config.toml ] && [ ! -L ${home}/config.toml ]; then
          mv ${home}/config.toml ${home}/config.toml.before-nixos
        fi
        ln -sfn ${configFile} ${home}/config.toml
      '';
      restartTriggers = [ configFile ];
      serviceConfig = sandbox // {
        Type = "notify"; # ready means that it listens, and that commands reach it
        ExecStart = "${command} run";
        StateDirectory = "p2pnode";
        StateDirectoryMode = "0700";
        WorkingDirectory = home;
        ReadOnlyPaths = [ "/nix/store" ];
        ReadWritePaths = cfg.writablePaths;
        LoadCredential = mkIf (cfg.signKeyFile != null) [ "sign-key:${toString cfg.signKeyFile}" ];
        # Netlink tells when the machine's network changes.
        RestrictAddressFamilies = [
          "AF_UNIX"
          "AF_INET"
          "AF_INET6"
          "AF_NETLINK"
        ];
        LimitNOFILE = 65536; # a connection each, for some hundred peers, and the files that are being served
        Restart = "on-failure";
        RestartSec = 5;
        TimeoutStartSec = "5min"; # after a crash the store is looked through first
        KillMode = "mixed"; # nix-store processes of its own are its to end
        KillSignal = "SIGTERM";
        TimeoutStopSec = 30; # saying goodbye takes 3 s; then a kill loses no more than chunks in flight
      };
    };

    systemd.services.p2pnode-publish = mkIf (cfg.publish != [ ]) {
      description = "Publish store paths and files with p2pnode";
      wantedBy = [ "multi-user.target" ];
      # Bound: without the daemon, `provide` would be a node of its own, on the daemon's home.
      bindsTo = [ "p2pnode.service" ];
      after = [ "p2pnode.service" ];
      script = "exec ${command} provide ${escapeShellArgs cfg.publish}";
      serviceConfig = sandbox // {
        Type = "oneshot";
        RemainAfterExit = true;
        ReadWritePaths = [ home ]; # of its socket
        RestrictAddressFamilies = [ "AF_UNIX" ];
        PrivateNetwork = true;
      };
    };
  };
}
