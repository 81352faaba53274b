"""HTTP request bodies to JSON values; everything that is not one becomes an `ApiError`."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from router.errors import ApiError, bad_request

_READ_TIMEOUT_S = 60.0
"""A client that trickles its body slower than this holds a connection for nothing."""


async def read_json(request: web.Request) -> Any:
    """The body as a JSON value. Lone surrogates become U+FFFD: clients cut emoji in half.

    Raises `ApiError` 400 (not JSON), 408, 413 (too large) or 415 (another content type).
    """
    content_type = request.headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
    if content_type != "application/json" and not content_type.endswith("+json"):
        raise ApiError(
            415, f"Unsupported content type {content_type[:80]!r}: send JSON with Content-Type: application/json."
        )
    try:
        async with asyncio.timeout(_READ_TIMEOUT_S):
            raw = await request.read()
    except TimeoutError:
        raise ApiError(408, "The request body did not arrive in time.") from None
    except web.RequestPayloadError as exc:
        raise bad_request(None, f"The request body cannot be read: {exc}", "invalid_body") from exc
    except web.HTTPRequestEntityTooLarge as exc:
        raise ApiError(413, "The request body is too large.", code="request_too_large") from exc
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
        return _repaired(value) if b"\\ud" in raw.lower() else value
    except (ValueError, RecursionError) as exc:
        reason = "nested too deeply" if isinstance(exc, RecursionError) else str(exc)
        raise bad_request(None, f"The request body is not valid JSON: {reason}", "invalid_json") from exc


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _repaired(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_repaired(item) for item in value]
    if isinstance(value, dict):
        return {_repaired(name): _repaired(item) for name, item in value.items()}
    return value
