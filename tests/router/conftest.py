"""A router with scripted workers behind it, and clients for it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from router.chat.tokenizer import ChatTokenizer
from router.config import RouterConfig
from router.model_info import ModelInfo
from router.server import RunningRouter, start_router
from tests.support.chat_tokenizer import tokenizer_json, write_model_dir
from tests.support.fake_backends import FakeDecode, FakePrefill, Script
from workers.messages import FinishReason, GenerateRequest

MODEL = "dsv4-nano"


@dataclass
class Rig:
    """One router, its fakes and an HTTP session."""

    router: RunningRouter
    prefill: list[FakePrefill]
    decode: list[FakeDecode]
    session: aiohttp.ClientSession
    tokenizer: ChatTokenizer

    @property
    def url(self) -> str:
        return self.router.url

    def post(self, path: str, **kwargs: Any) -> Any:
        return self.session.post(self.url + path, **kwargs)

    async def chat(self, **fields: Any) -> dict[str, Any]:
        """A chat request that must succeed, as parsed JSON."""
        async with self.post("/v1/chat/completions", json=chat_body(**fields)) as response:
            body: dict[str, Any] = await response.json()
            assert response.status == 200, body
            return body

    async def refused(self, status: int, path: str = "/v1/chat/completions", **kwargs: Any) -> dict[str, Any]:
        """A request that must be answered with `status` and a complete OpenAI error object, which is returned."""
        async with self.post(path, **kwargs) as response:
            body = await response.json()
            assert response.status == status, body
            error: dict[str, Any] = body["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert isinstance(error["message"], str) and isinstance(error["type"], str)
            return error

    async def stream(self, path: str = "/v1/chat/completions", **fields: Any) -> list[str]:
        """The data lines of a streamed answer."""
        async with self.post(path, json=chat_body(stream=True, **fields)) as response:
            assert response.status == 200, await response.text()
            text = await response.text()
        return [line[len("data: ") :] for line in text.split("\n") if line.startswith("data: ")]

    def leaks(self) -> dict[str, list[str]]:
        """Requests that a worker still holds."""
        return {worker.name: list(worker.held) for worker in [*self.prefill, *self.decode] if worker.held}


def chat_body(**fields: Any) -> dict[str, Any]:
    """A minimal chat body, with `fields` on top."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hello"}], **fields}


@pytest.fixture(scope="session")
def tokenizer() -> ChatTokenizer:
    return ChatTokenizer(tokenizer_json())


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_dir(tmp_path_factory.mktemp("model"))


@pytest.fixture
def say(tokenizer: ChatTokenizer) -> Callable[..., Callable[[GenerateRequest], Script]]:
    """`say(text)` is a script that utters `text`; its markers become marker tokens."""

    def script(
        text: str, finish: FinishReason = FinishReason.STOP, **kwargs: Any
    ) -> Callable[[GenerateRequest], Script]:
        ids = tuple(tokenizer.encode_raw(text, add_bos=False))
        return lambda request: Script(ids, finish, **kwargs)

    return script


RigFactory = Callable[..., Any]


@pytest.fixture
async def make_rig(model_dir: Path, tokenizer: ChatTokenizer) -> AsyncIterator[RigFactory]:
    """Starts routers; every one is closed at the end, and no fake may hold a request then."""
    rigs: list[Rig] = []

    async def make(
        script: Callable[[GenerateRequest], Script],
        *,
        num_prefill: int = 1,
        num_decode: int = 1,
        manual: bool = False,
        extra_metrics: Any = None,
        **config: Any,
    ) -> Rig:
        decode = [FakeDecode(f"decode-{index}", script, manual=manual) for index in range(num_decode)]
        prefill = [FakePrefill(f"prefill-{index}", {d.name: d for d in decode}) for index in range(num_prefill)]
        settings = RouterConfig(**{"port": 0, "drain_s": 0.0, "reconnect_s": 0.01, "stats_interval_s": 0.02, **config})
        info = ModelInfo.from_dir(model_dir, name=MODEL)
        router = await start_router(settings, prefill, decode, model_dir, info, extra_metrics)
        rig = Rig(router, prefill, decode, aiohttp.ClientSession(), tokenizer)
        rigs.append(rig)
        return rig

    yield make
    for rig in rigs:
        await rig.session.close()
        await rig.router.close()
        assert not {worker.name for worker in [*rig.prefill, *rig.decode] if worker.held and not worker.down}
