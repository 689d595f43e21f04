"""Which keys count for one fetch, and whether a path that none of them proves is refused.

What Nix would believe, a fetch into its store must believe: there nix.conf's keys count as ours do. Everywhere else a
key is a demand only if somebody put it there on purpose: the key of cache.nixos.org is in every Nix, and must not keep
anybody from fetching what he built himself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from p2pnode.errors import ConfigError
from p2pnode.nix import nixconf
from p2pnode.nix.nixconf import DEFAULT_PUBLIC_KEYS, NixConf
from p2pnode.nix.trust import Policy, TrustedKeys

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trust:
    """The keys of one fetch, and whether every store path must be proved. `off`: somebody said that none need be."""

    keys: TrustedKeys
    demanded: bool
    off: bool = False


def known_keys(ours: Iterable[str]) -> TrustedKeys:
    """All keys that mean anything here, ours first; those of a nix.conf that cannot be read do not."""
    return TrustedKeys.parse(("the configuration of p2pnode", ours), ("nix.conf", _conf().trusted_public_keys))


def _conf() -> NixConf:
    try:
        conf = nixconf.load()
        TrustedKeys.parse(("nix.conf", conf.trusted_public_keys))
    except ConfigError as error:
        log.warning("the keys of nix.conf do not count: %s", error)
        return NixConf({"trusted-public-keys": ()})
    return conf


def of_fetch(policy: str | None, ours: Iterable[str], said: Iterable[str], *, into_store: bool) -> Trust:
    """`decide` by the nix.conf of this machine. Raises ConfigError, for nix.conf only where Nix itself goes by it."""
    conf = nixconf.load() if into_store else _conf()
    return decide(None if policy is None else Policy(policy), ours, said, conf, into_store=into_store)


NO_TRUST = Trust(TrustedKeys(), False)


def decide(
    policy: Policy | None, ours: Iterable[str], said: Iterable[str], conf: NixConf, *, into_store: bool
) -> Trust:
    """`policy`: what was configured, None if nothing; `ours`: keys of our configuration, `said`: of the command line.

    ========  ==================================================  =========================================
    policy    outside of a Nix store                              into a Nix store
    ========  ==================================================  =========================================
    none      if our configuration or the command names a key     if Nix demands it (require-sigs)
    off       never                                               never, and a daemon that trusts us neither
    if-keys   if a key is named that not every Nix has            if there is any key, nix.conf's included
    always    always                                              always
    ========  ==================================================  =========================================

    Raises ConfigError for a key that is malformed.
    """
    own = [*said, *ours]
    keys = TrustedKeys.parse(("the configuration of p2pnode", own), ("nix.conf", conf.trusted_public_keys))
    if policy is Policy.OFF:
        return Trust(keys, False, off=True)
    if policy is Policy.ALWAYS:
        return Trust(keys, True)
    if policy is None and into_store:
        lax = conf.words("require-sigs") == ("false",)
        return Trust(keys, not lax or bool(own))
    if policy is None:
        return Trust(keys, bool(own))
    if into_store:
        return Trust(keys, bool(keys))
    return Trust(keys, bool(own) or not set(conf.trusted_public_keys) <= set(DEFAULT_PUBLIC_KEYS))
