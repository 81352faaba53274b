"""The HTTP face: routes, errors as JSON, streaming.

Owns: the aiohttp application and what one HTTP exchange does. A dialect endpoint is three calls: read and validate the
body, plan it, `_answer` it through a `Renderer`. Invariant: whatever happens to an exchange, its answer is closed, so
that no worker keeps a request whose client is gone.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any

from aiohttp import web

from router import sse
from router.admin import RetractAdmin
from router.answer import Answer, ChoiceEnd, Renderer
from router.body import read_json
from router.chat.parsing import Delta
from router.config import RouterConfig
from router.errors import ApiError, from_request_error
from router.fleet import Fleet
from router.lifecycle import Dispatcher, Silence
from router.metrics import RouterMetrics
from router.model_info import ModelInfo
from router.openai.render import ChatRenderer, TextRenderer
from router.openai.schema import parse_chat, parse_text
from router.plan import AnswerPlan, Planner
from workers.errors import RequestError

logger = logging.getLogger(__name__)

ExtraMetrics = Callable[[], Awaitable[str]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_IGNORED_HEADER = "X-Ignored-Fields"
_MAX_REQUEST_ID = 128
_REQUEST_ID: ContextVar[str] = ContextVar("request_id")
"""X-Request-ID of the exchange that the current task serves."""


class RouterApp:
    """One router's HTTP endpoints over a dispatcher."""

    def __init__(
        self,
        config: RouterConfig,
        model: ModelInfo,
        planner: Planner,
        dispatcher: Dispatcher,
        fleet: Fleet,
        metrics: RouterMetrics,
        extra_metrics: ExtraMetrics | None,
        admin: RetractAdmin | None = None,
    ) -> None:
        self.draining = False
        self.active = 0
        self._config = config
        self._model = model
        self._planner = planner
        self._dispatcher = dispatcher
        self._fleet = fleet
        self._metrics = metrics
        self._extra_metrics = extra_metrics
        self._admin = admin
        self._model_names = {model.name, *model.aliases}
        self._warned: set[str] = set()

    def build(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(client_max_size=self._config.max_body_bytes, middlewares=[self._frame])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._text)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._one_model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/metrics", self._metrics_text)
        if self._admin is not None:
            self._admin.add_routes(app.router)
        return app

    @web.middleware
    async def _frame(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Request id, authentication, errors as JSON, counting. Answers that already stream pass untouched."""
        request_id = _request_id(request)
        _REQUEST_ID.set(request_id)
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        response: web.StreamResponse
        try:
            self._authenticate(request)
            response = await handler(request)
        except ApiError as exc:
            response = self._error(exc)
        except RequestError as exc:
            response = self._error(from_request_error(exc))
        except web.HTTPException as exc:
            response = self._error(_http_error(request, exc))
            if allow := exc.headers.get("Allow"):
                response.headers["Allow"] = allow
        except (asyncio.CancelledError, ConnectionResetError):
            self._metrics.disconnects.inc()
            self._metrics.requests.labels(route, "499").inc()
            raise
        except Exception:
            logger.exception("request=%s failed", request_id)
            response = self._error(ApiError(500, "Internal error.", code="internal_error"))
        self._metrics.requests.labels(route, str(response.status)).inc()
        if not response.prepared:
            response.headers["X-Request-ID"] = request_id
        return response

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        call = parse_chat(await read_json(request), self._config)
        self._check_model(call.model)
        plan = await self._planner.plan_chat(call.request)
        answer_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        renderer = ChatRenderer(answer_id, created, self._model, call.delivery, len(plan.choices))
        return await self._answer(request, answer_id, plan, renderer, call.ignored, stream=call.delivery.stream)

    async def _text(self, request: web.Request) -> web.StreamResponse:
        call = parse_text(await read_json(request), self._config)
        self._check_model(call.model)
        plan = await self._planner.plan_text(call.request)
        answer_id, created = f"cmpl-{uuid.uuid4().hex}", int(time.time())
        echoes = [choice.echo for choice in plan.choices]
        renderer = TextRenderer(answer_id, created, self._model, call.delivery, echoes)
        return await self._answer(request, answer_id, plan, renderer, call.ignored, stream=call.delivery.stream)

    async def _answer(
        self,
        request: web.Request,
        answer_id: str,
        plan: AnswerPlan,
        renderer: Renderer,
        ignored: tuple[str, ...],
        *,
        stream: bool,
    ) -> web.StreamResponse:
        headers = self._answer_headers(ignored)
        if self.draining:
            raise ApiError(503, "The router is shutting down.", code="router_stopping")
        if self.active >= self._config.max_active_requests:
            raise ApiError(429, "Too many requests in flight; retry shortly.", code="rate_limit_exceeded")
        self.active += 1
        self._metrics.active.inc()
        answer = Answer(
            self._dispatcher, answer_id, plan.choices, priority=plan.priority, prompt_tokens=plan.prompt_tokens
        )
        try:
            if stream:
                return await _stream(request, answer, renderer, headers)
            return web.json_response(await _collect(answer, renderer, len(plan.choices)), headers=headers)
        finally:
            answer.close()
            self.active -= 1
            self._metrics.active.dec()
            logger.info(
                "request=%s answer=%s done=%s prompt_tokens=%d output_tokens=%d",
                _REQUEST_ID.get(),
                answer_id,
                answer.done,
                answer.usage.prompt_tokens,
                answer.usage.completion_tokens,
            )

    def _check_model(self, name: str) -> None:
        if name not in self._model_names:
            raise ApiError(404, f"The model {name[:200]!r} does not exist.", code="model_not_found", param="model")

    def _answer_headers(self, ignored: tuple[str, ...]) -> dict[str, str]:
        headers = {"X-Request-ID": _REQUEST_ID.get()}
        names = sorted(name for name in ignored if name.isidentifier() and name.isascii() and len(name) <= 64)[:32]
        if names:
            headers[_IGNORED_HEADER] = ", ".join(names)
            if not self._warned.issuperset(names) and len(self._warned) < 1000:
                self._warned.update(names)
                logger.warning("request=%s ignored fields: %s", _REQUEST_ID.get(), headers[_IGNORED_HEADER])
        return headers

    def _authenticate(self, request: web.Request) -> None:
        if not self._config.api_keys or not request.path.startswith(("/v1", "/admin")):
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        known = [hmac.compare_digest(given, key.encode()) for key in self._config.api_keys]
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(401, "Missing or wrong API key.", code="invalid_api_key")

    def _error(self, error: ApiError) -> web.Response:
        response = web.Response(body=error.json(), status=error.status, content_type="application/json")
        if error.retryable:
            response.headers["Retry-After"] = str(self._config.retry_after_s)
        if error.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        return response

    async def _models(self, request: web.Request) -> web.Response:
        names = (self._model.name, *self._model.aliases)
        return web.json_response({"object": "list", "data": [self._model_object(name) for name in names]})

    async def _one_model(self, request: web.Request) -> web.Response:
        name = request.match_info["model"]
        self._check_model(name)
        return web.json_response(self._model_object(name))

    def _model_object(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": self._model.created,
            "owned_by": "dsv4-cluster",
            "max_model_len": self._model.max_context,
        }

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        workers = self._fleet.reachable()
        ready = not self.draining and all(workers.values())
        body = {"ready": ready, "draining": self.draining, "workers": workers}
        if ready:
            return web.json_response(body)
        headers = {"Retry-After": str(self._config.retry_after_s)}
        error = ApiError(503, f"Not ready: {json.dumps(body)}", code="not_ready").body()
        return web.json_response({**body, **error}, status=503, headers=headers)

    async def _metrics_text(self, request: web.Request) -> web.Response:
        for role, count in self._fleet.reachable().items():
            self._metrics.workers.labels(role).set(count)
        text = self._metrics.render()
        if self._extra_metrics is not None:
            text += (await self._extra_metrics()).encode()
        return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def _stream(
    request: web.Request, answer: Answer, renderer: Renderer, headers: dict[str, str]
) -> web.StreamResponse:
    """Streams the answer. A failure before the first event is an ordinary error answer, with its status."""
    events = await answer.next()
    response = web.StreamResponse(headers={**sse.HEADERS, **headers})
    await response.prepare(request)
    pieces = [renderer.start()]
    render, end_choice, usage = renderer.delta, renderer.end_choice, answer.usage
    try:
        while True:
            for choice, event in events:
                if type(event) is Delta:
                    pieces.append(render(choice, event, usage))
                elif type(event) is ChoiceEnd:
                    pieces.append(end_choice(choice, event.reason, usage))
                elif type(event) is Silence:
                    pieces.append(sse.KEEPALIVE)
            if answer.done:
                pieces.append(renderer.end(usage))
            if pieces:
                await response.write(b"".join(pieces))
            if answer.done:
                break
            pieces = []
            events = await answer.next()
    except RequestError as exc:
        logger.warning("request=%s failed in mid-stream: %s", _REQUEST_ID.get(), exc)
        response.force_close()
        await response.write(renderer.error(from_request_error(exc)))
    await response.write_eof()
    return response


async def _collect(answer: Answer, renderer: Renderer, num_choices: int) -> dict[str, Any]:
    deltas: list[list[Delta]] = [[] for _ in range(num_choices)]
    reasons = [""] * num_choices
    while not answer.done:
        for choice, event in await answer.next():
            if isinstance(event, Delta):
                deltas[choice].append(event)
            elif isinstance(event, ChoiceEnd):
                reasons[choice] = event.reason
    return renderer.body(deltas, reasons, answer.usage)


def _request_id(request: web.Request) -> str:
    given: str = request.headers.get("X-Request-ID", "")
    fits = 0 < len(given) <= _MAX_REQUEST_ID and given.isascii() and given.isprintable()
    return given if fits else uuid.uuid4().hex


def _http_error(request: web.Request, error: web.HTTPException) -> ApiError:
    path = request.path[:200]
    if error.status == 404:
        return ApiError(404, f"Unknown path {path!r}.", code="unknown_path")
    if error.status == 405:
        return ApiError(405, f"Method {request.method} is not allowed for {path!r}.", code="method_not_allowed")
    return ApiError(error.status, error.reason)
