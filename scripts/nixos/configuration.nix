# An example: a machine of a cluster that takes store paths from its neighbours first, and serves them on.
{ ... }:

{
  imports = [ ./module.nix ];

  services.p2pnode = {
    enable = true;
    openFirewall = true;

    # Somebody who is always there. Nodes on one local network find each other without.
    settings.bootstrap = [ "/ip4/192.0.2.7/tcp/4747/p2p/12D3KooWSMTjKMnLmfEDoZhQH2RniDbw9jce1aNK6SnAkHVEPGaR" ];

    # Nix on this machine asks here first: http://127.0.0.1:5080 becomes a substituter.
    gateway.enable = true;
    gateway.upstreams = [ "https://cache.nixos.org" ];
    trustedPublicKeys = [ "publisher-1:6NCHdD59X431o0gWypbMrAURkbJ16ZPMQFGspcDShjY=" ];

    # What only this machine has, signed so that the others take it:
    #   nix-store --generate-binary-cache-key publisher-1 /etc/nix/publisher-1.secret /etc/nix/publisher-1.public
    # publish = [ pkgs.hello ];
    # signKeyFile = "/etc/nix/publisher-1.secret";
  };
}
