"""How two processes that share a key find out over a network that both do, before either believes the other a word.

Knows nothing of what they say afterwards. The key itself never travels, and nothing is unpickled before.
"""

import contextlib
import hmac
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

KEY_BYTES = 32
_NONCE_BYTES = 32
_MOST_BYTES = 256  # of a message by somebody who has proved nothing yet


class NotAuthenticError(Exception):
    """The other end does not know the key, or says nothing."""


def admit(end: socket.socket, key: bytes, timeout_s: float) -> None:
    """The side that was called: returns once the caller has proved itself. Raises NotAuthenticError."""
    with _talking(end, timeout_s) as connection:
        ours = secrets.token_bytes(_NONCE_BYTES)
        connection.send_bytes(ours)
        answer = connection.recv_bytes(_MOST_BYTES)
        theirs, proof = answer[:_NONCE_BYTES], answer[_NONCE_BYTES:]
        _verify(proof, _proof(key, b"caller", ours, theirs))
        connection.send_bytes(_proof(key, b"called", ours, theirs))


def introduce(end: socket.socket, key: bytes, timeout_s: float) -> None:
    """The side that calls; the counterpart of `admit`."""
    with _talking(end, timeout_s) as connection:
        theirs = connection.recv_bytes(_MOST_BYTES)
        ours = secrets.token_bytes(_NONCE_BYTES)
        connection.send_bytes(ours + _proof(key, b"caller", theirs, ours))
        _verify(connection.recv_bytes(_MOST_BYTES), _proof(key, b"called", theirs, ours))


def keep_watched(end: socket.socket) -> None:
    """A machine that vanishes without a word is noticed within 5 s, as far as the system lets us say so."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 2), ("TCP_KEEPINTVL", 1), ("TCP_KEEPCNT", 3), ("TCP_USER_TIMEOUT", 5000)):
        if hasattr(socket, name):
            end.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


@contextlib.contextmanager
def _talking(end: socket.socket, timeout_s: float) -> Iterator["Connection[Any, Any]"]:
    """Inside, no read or write on the socket waits longer than that. The socket stays open."""
    end.settimeout(None)  # of Python's making; the system's own holds for the bare file too
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        end.setsockopt(socket.SOL_SOCKET, option, _timeval(timeout_s))
    try:
        with Connection(os.dup(end.fileno())) as connection:
            yield connection
    except (EOFError, OSError) as error:
        raise NotAuthenticError("the other end did not answer as it should") from error
    finally:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            end.setsockopt(socket.SOL_SOCKET, option, _timeval(0.0))


def _timeval(seconds: float) -> bytes:
    whole = int(seconds)
    return struct.pack("ll", whole, int((seconds - whole) * 1e6))


def _proof(key: bytes, role: bytes, first: bytes, second: bytes) -> bytes:
    return hmac.digest(key, role + first + second, "sha256")


def _verify(given: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(given, expected):
        raise NotAuthenticError("the other end does not know the key")
