"""/admin/retract: absent unless allowed, guarded by the keys, the same for every decode worker, or for none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from router.config import RouterConfig
from router.model_info import ModelInfo
from router.server import start_router
from tests.support.fake_backends import FakeDecode, FakePrefill
from workers.errors import NotAllowed
from workers.messages import RetractControl, RetractReport

PATH = "/admin/retract"


class Retractable:
    """A decode worker that remembers what it was told."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.controls: list[RetractControl] = []
        self.resets: list[bool] = []
        self.refuses = False

    async def control(self, control: RetractControl) -> None:
        if self.refuses and control != RetractControl():
            raise NotAllowed("not started for this")
        self.controls.append(control)

    async def retract_report(self, reset: bool) -> RetractReport:
        self.resets.append(reset)
        return RetractReport(events=3, phase_ms={"copy_out": (3, 0.5, 0.7)})


class Rig:
    """A router whose admin path leads to `workers`."""

    def __init__(self, url: str, session: aiohttp.ClientSession, workers: list[Retractable]) -> None:
        self.url, self.session, self.workers = url, session, workers

    async def call(self, method: str, query: str = "", **kwargs: Any) -> tuple[int, Any]:
        async with self.session.request(method, self.url + PATH + query, **kwargs) as response:
            return response.status, await response.json()


@pytest.fixture
async def make(model_dir: Path) -> AsyncIterator[Any]:
    started: list[Any] = []

    async def factory(num_workers: int = 2, **config: Any) -> Rig:
        workers = [Retractable(f"decode-{index}") for index in range(num_workers)]
        decode = [FakeDecode("decode-0", lambda request: None)]  # type: ignore[arg-type, return-value]
        prefill = [FakePrefill("prefill-0", {"decode-0": decode[0]})]
        settings = RouterConfig(**{"port": 0, "drain_s": 0.0, **config})
        info = ModelInfo.from_dir(model_dir, name="m")
        router = await start_router(settings, prefill, decode, model_dir, info, None, workers)
        session = aiohttp.ClientSession()
        started.append((router, session))
        return Rig(router.url, session, workers)

    yield factory
    for router, session in started:
        await session.close()
        await router.close()


async def test_the_path_is_unknown_unless_the_deployment_allows_it(make: Any) -> None:
    rig = await make(num_workers=0)
    for method in ("GET", "POST", "DELETE"):
        status, body = await rig.call(method)
        assert (status, body["error"]["code"]) == (404, "unknown_path")


async def test_a_control_reaches_every_worker_and_is_taken_back(make: Any) -> None:
    rig = await make()
    status, body = await rig.call("POST", json={"interval": 40, "victim": "named", "names": ["cmpl-1"], "seed": 7})
    assert status == 200
    wanted = RetractControl(interval=40, victim="named", names=("cmpl-1",), seed=7)
    assert [worker.controls for worker in rig.workers] == [[wanted], [wanted]]
    assert body["workers"] == ["decode-0", "decode-1"]
    status, _ = await rig.call("DELETE")
    assert status == 200
    assert all(worker.controls[-1] == RetractControl() for worker in rig.workers)


async def test_reports_come_by_worker_and_reset_only_when_asked(make: Any) -> None:
    rig = await make()
    status, body = await rig.call("GET")
    assert status == 200
    assert RetractReport.from_dict(body["workers"]["decode-1"]).phase_ms == {"copy_out": (3, 0.5, 0.7)}
    await rig.call("GET", "?reset=true")
    assert rig.workers[0].resets == [False, True]


async def test_keys_guard_the_path(make: Any) -> None:
    rig = await make(api_keys=("secret",))
    assert (await rig.call("POST", json={}))[0] == 401
    assert (await rig.call("GET"))[0] == 401
    assert rig.workers[0].controls == [] and rig.workers[0].resets == []
    assert (await rig.call("GET", headers={"Authorization": "Bearer secret"}))[0] == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"intervall": 40}, "intervall"),
        ({"interval": "40"}, "interval"),
        ({"interval": True}, "interval"),
        ({"interval": 0}, "interval"),
        ({"victim": "oldest"}, "victim"),
        ({"names": [1]}, "names"),
        ({"poison_freed": 1}, "poison_freed"),
        ([], None),
    ],
)
async def test_bad_controls_name_the_field_and_change_nothing(make: Any, body: Any, param: str | None) -> None:
    rig = await make()
    status, answer = await rig.call("POST", json=body)
    assert (status, answer["error"]["param"]) == (400, param)
    assert rig.workers[0].controls == []


async def test_a_refusal_by_one_worker_leaves_none_under_the_control(make: Any) -> None:
    rig = await make()
    rig.workers[1].refuses = True
    status, answer = await rig.call("POST", json={"interval": 5})
    assert (status, answer["error"]["code"]) == (403, "not_allowed")
    assert all(worker.controls[-1] == RetractControl() for worker in rig.workers)


async def test_a_bad_reset_is_refused(make: Any) -> None:
    rig = await make()
    status, answer = await rig.call("GET", "?reset=maybe")
    assert (status, answer["error"]["param"]) == (400, "reset")
