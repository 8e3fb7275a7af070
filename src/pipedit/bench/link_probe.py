"""The rate that a link delivers, from a plain TCP stream: every rank sends to the next one while it receives."""

import socket
import threading
import time
from collections.abc import Sequence

_PORT = 29401
_PIECE_BYTES = 1 << 16


def ring_rate(addresses: Sequence[str], rank: int, payload_bytes: int, timeout_s: float) -> float:
    """Bits per second at which this rank received `payload_bytes`, 1 MiB at least, from the one before it. All ranks
    call this at about the same time. Raises OSError, TimeoutError among them."""
    assert payload_bytes >= 1 << 20, payload_bytes
    following = addresses[(rank + 1) % len(addresses)]
    with socket.create_server((addresses[rank], _PORT)) as server:
        server.settimeout(timeout_s)
        sender = threading.Thread(target=_send, args=(following, payload_bytes, timeout_s), daemon=True)
        sender.start()
        connection, _ = server.accept()
        with connection:
            connection.settimeout(timeout_s)
            rate = _receive(connection, payload_bytes)
        sender.join(timeout_s)
    return rate


def _send(address: str, payload_bytes: int, timeout_s: float) -> None:
    piece = bytes(_PIECE_BYTES)
    with _connect(address, timeout_s) as connection:
        left = payload_bytes
        while left:
            left -= connection.send(piece[: min(left, _PIECE_BYTES)])
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)  # until the receiver hangs up: nothing is cut off


def _connect(address: str, timeout_s: float) -> socket.socket:
    """The other rank may not listen yet."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return socket.create_connection((address, _PORT), timeout=timeout_s)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _receive(connection: socket.socket, payload_bytes: int) -> float:
    """Bits per second. The first quarter is not counted: it may have waited in the kernel for us to look."""
    buffer = bytearray(_PIECE_BYTES)
    received, counted_from = 0, 0
    start = time.monotonic()
    while received < payload_bytes:
        count = connection.recv_into(buffer)
        if not count:
            raise ConnectionError("the other rank stopped sending")
        received += count
        if not counted_from and received >= payload_bytes // 4:
            start, counted_from = time.monotonic(), received
    return (received - counted_from) * 8 / (time.monotonic() - start)
