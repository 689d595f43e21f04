"""Telling systemd that the daemon is ready (sd_notify(3)), so that what needs it is started after that."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger(__name__)


def tell_ready() -> None:
    """Under `Type=notify`: the node listens, and commands can reach it. Without a service manager: nothing.

    Once only: the variable goes, so that no process started from here speaks for us.
    """
    place = os.environ.pop("NOTIFY_SOCKET", "")
    if not place.startswith(("/", "@")):  # vsock and such are for whole machines
        return
    address = "\0" + place[1:] if place.startswith("@") else place
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
            notify.connect(address)
            notify.sendall(b"READY=1")
    except OSError as error:  # it will think that we hang; that we run is worth more
        log.warning("systemd cannot be told at %s that the node is ready: %s", place, error.strerror or error)
