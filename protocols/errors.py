"""Errors of the sans-IO protocols. All of them are the fault of whoever made the bytes."""


class ProtocolError(Exception):
    """Bytes or messages that break a protocol. `str()` is one sentence saying what was wrong."""


class CIDError(ProtocolError):
    """A content identifier that is malformed, or of a kind this format does not use."""


class DecodeError(ProtocolError):
    """CBOR that is malformed, not canonical, or past a limit."""


class ManifestError(ProtocolError):
    """A manifest block whose contents break the format."""


class FrameError(ProtocolError):
    """A frame or message of a stream protocol that breaks it. Ends the session."""
