"""Expected failures of the worker package, as one tree.

WorkerError
+-- BadConfig            config.json has an unknown, missing or contradictory key
+-- BadCheckpoint        a tensor or file of the checkpoint is not what the config implies
+-- InexactWeights       a tensor would have to be rounded to become an operand of the GPU kernels
+-- DeviceLost           the GPU answers no more: everything in its memory is gone, and so must the process be
+-- RequestError         one request cannot be served; carries the HTTP status the router should give
|   +-- RequestTooLong       can never fit (400)
|   +-- WorkerFull           come back later (429)
|   +-- DeadlineExceeded     a wait ran out (504)
|   +-- RequestAborted       the client went away
|   +-- WorkerStopping       the worker drains and takes nothing new (503)
|   +-- WorkerUnavailable    the worker cannot be reached (503)
|   +-- KVLost               its KV is gone and cannot be recomputed (503)
|   +-- NotAllowed           the worker was not started with this allowed (403)
"""

from __future__ import annotations


class WorkerError(Exception):
    """Root of the expected failures of this package."""


class BadConfig(WorkerError):
    """A model config value is unusable. `key`, `found` and `expected` name it."""

    def __init__(self, key: str, found: object, expected: object, source: str = "config.json") -> None:
        super().__init__(f"{source}: key {key!r}: found {found!r}, expected {expected}")
        self.key, self.found, self.expected, self.source = key, found, expected, source


class BadCheckpoint(WorkerError):
    """A checkpoint tensor or file is unusable. Carries file, tensor, expected and found."""

    def __init__(self, file: str, tensor: str | None, expected: object, found: object) -> None:
        where = f"{file}: tensor {tensor!r}" if tensor else file
        super().__init__(f"{where}: expected {expected}, found {found}")
        self.file, self.tensor, self.expected, self.found = file, tensor, expected, found


class InexactWeights(WorkerError):
    """A tensor holds values that the kernels' operand cannot hold without rounding."""


class DeviceLost(WorkerError):
    """The device answers no more. Only a new process gets it back."""


class RequestError(WorkerError):
    """One request fails; `status` is the HTTP status and `code` the OpenAI error code the router reports."""

    status = 500
    code = "internal_error"


class RequestTooLong(RequestError):
    """The request can never fit this model or these pools."""

    status = 400
    code = "context_length_exceeded"


class WorkerFull(RequestError):
    """No room now; retry later."""

    status = 429
    code = "rate_limit_exceeded"


class DeadlineExceeded(RequestError):
    """A bounded wait ran out."""

    status = 504
    code = "deadline_exceeded"


class RequestAborted(RequestError):
    """The client or an operator ended the request."""

    status = 499
    code = "aborted"


class WorkerStopping(RequestError):
    """The worker is shutting down."""

    status = 503
    code = "worker_stopping"


class WorkerUnavailable(RequestError):
    """The worker cannot be reached: it died, restarts, or the network failed. Retry on another one."""

    status = 503
    code = "worker_unavailable"


class NotAllowed(RequestError):
    """An operator's call that this worker was not started to take."""

    status = 403
    code = "not_allowed"


class KVLost(RequestError):
    """The request's KV is gone and nobody can compute it again."""

    status = 503
    code = "kv_lost"
