"""`Share`: how the workers of one deployment on one host find each other's memory. Torch-free, Linux only.

Owns: a folder that only this user can enter, one socket in it for each worker, what a worker offers there (an open file
descriptor with facts about it), small notes. Does not own: what the descriptors mean (`shared_bank.py`,
`workers/gpu/peer_slab.py`). A worker that takes an offer keeps the connection: it ends when the owner does, however it
dies, so nobody has to poll for the living. A restarted worker offers under its old name again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import struct
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

ANSWER_S = 2.0
"""Longest wait for a worker of this host to answer; its serving thread does nothing else."""

POLL_S = 0.05
"""Time between two looks at what another worker has not offered yet."""

MAX_NAME_BYTES = 200
"""A request is one name, shorter than this."""

_LENGTH = struct.Struct("!I")


class Offer:
    """A descriptor of another worker with its facts. The taker closes `fd` when it has used it."""

    def __init__(self, owner: str, fd: int, facts: dict[str, Any], connection: socket.socket) -> None:
        self.owner, self.fd, self.facts, self._connection = owner, fd, facts, connection

    def is_gone(self, wait_s: float) -> bool:
        """Whether the owner has ended or taken the offer back; waits up to `wait_s` for that."""
        self._connection.settimeout(max(wait_s, 1e-3))
        try:
            return self._connection.recv(1) == b""
        except TimeoutError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """Ends the connection, and the descriptor if it is still open. Safe to call again."""
        self._connection.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Share:
    """One worker's end. `offer` and `withdraw` from any thread; serving has a thread of its own."""

    def __init__(self, folder: Path, name: str) -> None:
        """Opens the folder, made if need be, and serves in it as `name`. Raises `OSError`."""
        self.folder, self.name = folder, name
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{folder} belongs to another user")
        self._offers: dict[str, tuple[int, bytes]] = {}
        self._clients: dict[socket.socket, str] = {}
        self._lock = threading.Lock()
        self._path = folder / f"{name}.sock"
        self._path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self._path))
        self._listener.listen()
        self._listener.setblocking(False)
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name=f"share-{name}", daemon=True)
        self._thread.start()

    @classmethod
    def open(cls, folder: str, name: str) -> Share | None:
        """The share that a worker was told of, None for a worker that is told of none."""
        return cls(Path(folder), name) if folder else None

    # -- what this worker gives ---------------------------------------------------------------------------------------

    def offer(self, what: str, fd: int, facts: Mapping[str, Any]) -> None:
        """Offers a descriptor (a copy is kept) with JSON facts, in place of an earlier one of the same name."""
        with self._lock:
            old = self._offers.get(what)
            self._offers[what] = (os.dup(fd), json.dumps(dict(facts)).encode())
        if old is not None:
            os.close(old[0])

    def withdraw(self, what: str) -> None:
        """Ends an offer and the connections of those who took it: they must stop using it."""
        with self._lock:
            old = self._offers.pop(what, None)
            takers = [client for client, taken in self._clients.items() if taken == what]
        if old is not None:
            os.close(old[0])
        for client in takers:
            # Its end is what the serving thread sees next.
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)

    def post(self, what: str, value: object) -> None:
        """Leaves a note (JSON) that outlives this process."""
        target = self.folder / f"{self.name}.{what}"
        partial = target.with_name(f"{target.name}.{os.getpid()}")
        partial.write_text(json.dumps(value))
        partial.replace(target)

    # -- what others give ---------------------------------------------------------------------------------------------

    def wait(self, owner: str, what: str, deadline_s: float) -> Any:
        """Another worker's note; None when there is none within `deadline_s`."""
        until = time.monotonic() + deadline_s
        while True:
            with contextlib.suppress(OSError, ValueError):
                return json.loads((self.folder / f"{owner}.{what}").read_text())
            if time.monotonic() >= until:
                return None
            time.sleep(POLL_S)

    def take(self, owner: str, what: str) -> Offer | None:
        """What a living worker offers now; None when it offers no such thing, or is not there."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(ANSWER_S)
        fds: list[int] = []
        try:
            connection.connect(str(self.folder / f"{owner}.sock"))
            connection.sendall(f"{what}\n".encode())
            head, fds, _, _ = socket.recv_fds(connection, _LENGTH.size, 1)
            if len(head) == _LENGTH.size and fds:
                facts = json.loads(_exactly(connection, _LENGTH.unpack(head)[0]))
                os.set_inheritable(fds[0], False)
                return Offer(owner, fds[0], facts, connection)
        except (OSError, ValueError) as exc:
            logger.debug("share owner=%s what=%s: %s", owner, what, exc)
        for fd in fds:
            os.close(fd)
        connection.close()
        return None

    def find(self, what: str) -> Offer | None:
        """The same from any other worker of the folder that offers it."""
        for path in sorted(self.folder.glob("*.sock")):
            if path != self._path and (offer := self.take(path.stem, what)) is not None:
                return offer
        return None

    # -- serving ------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._woken:
                        return self._hang_up(selector)
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    else:
                        self._hear(selector, key.fileobj)  # type: ignore[arg-type]

    def _hang_up(self, selector: selectors.BaseSelector) -> None:
        """Ends every connection."""
        for key in tuple(selector.get_map().values()):
            if key.fileobj not in (self._listener, self._woken):
                key.fileobj.close()  # type: ignore[union-attr]

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with contextlib.suppress(OSError):
            client, _ = self._listener.accept()
            client.settimeout(ANSWER_S)
            selector.register(client, selectors.EVENT_READ)

    def _hear(self, selector: selectors.BaseSelector, client: socket.socket) -> None:
        """A request, or a connection's end."""
        is_over = True
        with contextlib.suppress(OSError, UnicodeDecodeError):
            request = client.recv(MAX_NAME_BYTES)
            is_over = not request or not self._answer(client, request.decode().strip())
        if is_over:
            selector.unregister(client)
            with self._lock:
                self._clients.pop(client, None)
            client.close()

    def _answer(self, client: socket.socket, what: str) -> bool:
        """Sends what is offered; False when nothing is."""
        with self._lock:
            if what not in self._offers:
                return False
            fd, facts = self._offers[what]
            self._clients[client] = what
            socket.send_fds(client, [_LENGTH.pack(len(facts))], [fd])
        client.sendall(facts)
        return True

    def close(self) -> None:
        """Takes every offer back and ends the serving thread. Safe to call again."""
        for what in tuple(self._offers):
            self.withdraw(what)
        if self._thread.is_alive():
            self._wake.send(b"x")
            self._thread.join()
        for end in (self._listener, self._wake, self._woken):
            end.close()
        self._path.unlink(missing_ok=True)


def _exactly(connection: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = connection.recv(size - len(found))
        if not part:
            raise ConnectionError(f"{len(found)} of {size} bytes")
        found += part
    return bytes(found)
