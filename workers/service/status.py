"""Errors between our exception tree and gRPC, both ways. The one place of this package that maps foreign exceptions."""

from __future__ import annotations

import grpc

from kvstore.errors import (
    IntegrityError,
    KVStoreError,
    SpecMismatch,
    TransferAborted,
    TransferRefused,
    TransferTimeout,
    TransferUnavailable,
)
from workers.errors import DeadlineExceeded, RequestAborted, RequestError, WorkerStopping, WorkerUnavailable
from workers.messages import ErrorInfo
from workers.service import codec
from workers.service.stubs import worker_pb2 as pb

ERROR_KEY = "dsv4-error-bin"
"""Trailing metadata that holds the ErrorInfo of a failed call."""

_GRPC_CODE = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ALREADY_EXISTS,
    413: grpc.StatusCode.INVALID_ARGUMENT,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    499: grpc.StatusCode.CANCELLED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

_ABORTED_BY_DECODE = frozenset({"STALE_EPOCH", "REVOKED", "NO_GRANT"})
"""Refusals of a KV receiver that mean: this attempt is over at the decode worker."""


async def abort_with(context: grpc.aio.ServicerContext, error: RequestError) -> None:
    """Ends the call with `error`; raises, as `context.abort` does."""
    wire = codec.error_to_wire(ErrorInfo.from_error(error))
    code = _GRPC_CODE.get(error.status, grpc.StatusCode.INTERNAL)
    await context.abort(code, str(error), ((ERROR_KEY, wire.SerializeToString()),))


def error_of(exc: grpc.aio.AioRpcError, worker: str) -> RequestError:
    """The `RequestError` behind a failed call; anything that is not ours is `WorkerUnavailable`."""
    for key, value in exc.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            return codec.error_from_wire(pb.ErrorInfo.FromString(value)).to_error()
    detail = exc.details() or exc.code().name
    if exc.code() is grpc.StatusCode.INVALID_ARGUMENT:
        return codec.BadRequest(f"worker {worker}: {detail}")
    return WorkerUnavailable(f"worker {worker}: {exc.code().name}: {detail}")


def request_error_of(exc: Exception) -> RequestError:
    """What a router is told when serving one request raised `exc`."""
    match exc:
        case RequestError():
            return exc
        case TransferRefused() if exc.code in _ABORTED_BY_DECODE:
            return RequestAborted(f"the decode worker ended the request: {exc}")
        case TransferRefused() if exc.code == "LEASE_EXPIRED":
            return DeadlineExceeded(f"KV hand-off: {exc}")
        case TransferTimeout() | TimeoutError():
            return DeadlineExceeded(f"KV hand-off: {exc}" if str(exc) else "the worker's time limit ran out")
        case TransferUnavailable():
            return WorkerUnavailable(f"KV hand-off: {exc}")
        case TransferAborted():
            return RequestAborted(f"KV hand-off: {exc}")
        case SpecMismatch() | TransferRefused():
            return RequestError(f"KV hand-off: {exc}")
        case IntegrityError():
            return WorkerStopping(f"integrity: {exc}")
        case KVStoreError():
            return RequestError(str(exc))
        case _:
            return RequestError(f"{type(exc).__name__}: {exc}")
