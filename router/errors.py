"""One table from failures to HTTP status and OpenAI error object.

Owns: `ApiError`, the only exception that handlers turn into an answer, and its mapping from the workers' tree.
"""

from __future__ import annotations

import json
from http import HTTPStatus

from workers.errors import RequestError

_TYPE_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "request_aborted",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}
_RETRYABLE = frozenset({429, 503})


class ApiError(Exception):
    """A failure as the client sees it. `param` names the offending field by its JSON path."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param

    @property
    def retryable(self) -> bool:
        """True when the answer carries Retry-After."""
        return self.status in _RETRYABLE

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI error object; always all four keys."""
        kind = _TYPE_BY_STATUS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def json(self) -> bytes:
        """`body` as JSON, ASCII only."""
        return json.dumps(self.body()).encode()


def bad_request(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400 for one field."""
    return ApiError(400, message, code=code, param=param)


def from_request_error(error: RequestError) -> ApiError:
    """A worker's failure. The status that stands for a vanished client (499) reaches only other people: as 503."""
    status = 503 if error.status == 499 else error.status
    message = str(error) or HTTPStatus(status).phrase
    return ApiError(status, message, code=error.code, param="messages" if status == 400 else None)


def context_too_long(prompt_tokens: int, output_tokens: int | None, max_context: int, param: str) -> ApiError:
    """400 for a prompt, or prompt and output budget together, beyond the model's context."""
    wanted = (
        f"{prompt_tokens} tokens in the prompt"
        if output_tokens is None
        else f"{prompt_tokens + output_tokens} tokens ({prompt_tokens} in the prompt, {output_tokens} for the output)"
    )
    return ApiError(
        400,
        f"This model's maximum context length is {max_context} tokens. However, you requested {wanted}. "
        "Please reduce the length of the prompt or of the output.",
        code="context_length_exceeded",
        param=param,
    )
