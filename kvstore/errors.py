"""Expected failures of the KV store, as one tree.

KVStoreError
+-- IntegrityError           our own bookkeeping is wrong: log the state and stop the worker
+-- SpecMismatch             bytes of another layout or model; carries both values
+-- CorruptImage             an image's header or payload does not check out
+-- TransferError            one transfer failed; the request may be retried elsewhere
    +-- TransferTimeout          a bounded wait ran out
    +-- TransferRefused          the receiver said no: no grant, old epoch, gap, overflow; `code` says which
    +-- TransferAborted          either side gave the request up
    +-- TransferUnavailable      the peer cannot be reached
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Root of the expected failures of this package."""


class IntegrityError(KVStoreError):
    """An invariant that only our own bug can break does not hold."""


class SpecMismatch(KVStoreError):
    """`what` (layout fingerprint, model hash, checksum name) differs: `ours` against `theirs`."""

    def __init__(self, what: str, ours: str, theirs: str) -> None:
        super().__init__(f"{what} differs: ours {ours}, theirs {theirs}")
        self.what, self.ours, self.theirs = what, ours, theirs


class CorruptImage(KVStoreError):
    """A KV image cannot be trusted: bad magic, truncated, wrong length, or a checksum that does not match."""


class TransferError(KVStoreError):
    """One request's KV transfer failed."""

    def __init__(self, message: str, *, request_id: str, epoch: int) -> None:
        super().__init__(f"request={request_id} epoch={epoch}: {message}")
        self.request_id, self.epoch = request_id, epoch


class TransferTimeout(TransferError):
    """A wait of the transfer reached its deadline."""


class TransferRefused(TransferError):
    """The receiver refused. `code` is one of the names of `Refusal` in the wire contract."""

    def __init__(self, message: str, *, request_id: str, epoch: int, code: str) -> None:
        super().__init__(f"{code}: {message}", request_id=request_id, epoch=epoch)
        self.code = code


class TransferAborted(TransferError):
    """Sender or receiver gave the request up before the commit."""


class TransferUnavailable(TransferError):
    """The peer is gone or the network failed."""
