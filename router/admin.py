"""`/admin/retract`: an operator forces retracts on live decode workers and reads what they did.

Owns: the three methods of that path. Does not own: when and whom to retract (the workers). The routes exist only in a
router that was given workers for them; everywhere else the path is unknown (404). API keys guard it like /v1.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from typing import Any

from aiohttp import web

from router.backend import RetractBackend
from router.body import read_json
from router.errors import bad_request
from workers.messages import RetractControl

PATH = "/admin/retract"


class RetractAdmin:
    """Forces the same on every decode worker."""

    def __init__(self, workers: Sequence[RetractBackend]) -> None:
        self._workers = tuple(workers)

    def add_routes(self, routes: web.UrlDispatcher) -> None:
        """POST sets a control, DELETE takes it back, GET reads the reports (`?reset=true` starts them anew)."""
        routes.add_post(PATH, self._set)
        routes.add_delete(PATH, self._clear)
        routes.add_get(PATH, self._reports)

    async def _set(self, request: web.Request) -> web.Response:
        control = _control_of(await read_json(request))
        try:
            await self._apply(control)
        except BaseException:
            # Half of the workers under a control that the operator believes refused would be the worst of both.
            await asyncio.gather(
                *(worker.control(RetractControl()) for worker in self._workers), return_exceptions=True
            )
            raise
        return self._state(control)

    async def _clear(self, request: web.Request) -> web.Response:
        control = RetractControl()
        await self._apply(control)
        return self._state(control)

    async def _reports(self, request: web.Request) -> web.Response:
        reset = request.query.get("reset", "false").lower()
        if reset not in ("true", "false", "1", "0"):
            raise bad_request("reset", f"reset: found {reset[:40]!r}, expected true or false.")
        reports = await asyncio.gather(*(worker.retract_report(reset in ("true", "1")) for worker in self._workers))
        named = zip(self._workers, reports, strict=True)
        return web.json_response({"workers": {worker.name: report.as_dict() for worker, report in named}})

    async def _apply(self, control: RetractControl) -> None:
        await asyncio.gather(*(worker.control(control) for worker in self._workers))

    def _state(self, control: RetractControl) -> web.Response:
        return web.json_response({"control": control.as_dict(), "workers": [worker.name for worker in self._workers]})


def _control_of(body: Any) -> RetractControl:
    """Raises `ApiError` 400 naming the field."""
    if not isinstance(body, dict):
        raise bad_request(None, "Expected a JSON object with the fields of a retract control.")
    known = {item.name: item for item in dataclasses.fields(RetractControl)}
    for name, value in body.items():
        if name not in known:
            raise bad_request(name, f"Unknown field {name[:40]!r}; known are {', '.join(known)}.")
        if not _has_type(value, str(known[name].type)):
            raise bad_request(name, f"{name}: found {value!r:.40}, expected {known[name].type}.")
    try:
        return RetractControl.from_dict(body)
    except ValueError as exc:
        raise bad_request(str(exc).partition(":")[0], str(exc)) from exc


def _has_type(value: object, declared: str) -> bool:
    """Whether a JSON value fits a field declared as `declared`; booleans are not integers here."""
    if declared.startswith("tuple"):
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    kinds = {"int": int, "str": str, "bool": bool}
    options = [option.strip() for option in declared.split("|")]
    if value is None:
        return "None" in options
    return any(type(value) is kinds.get(option) for option in options)
