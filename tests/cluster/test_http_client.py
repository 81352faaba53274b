"""The commands' client reads streams to their true end and turns every failure into one exception."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from cluster.http_client import ApiFailure, RouterClient
from tests.cluster.fake_router import FakeRouter

BODY = {"model": "fake-model", "messages": [{"role": "user", "content": "2 + 2?"}]}


@pytest.fixture
def client(router: FakeRouter) -> RouterClient:
    client = RouterClient(router.url + "/v1/")
    yield client
    client.close()


def test_a_stream_becomes_one_answer(client: RouterClient, router: FakeRouter) -> None:
    answer = client.chat(BODY)
    assert (answer.reasoning, answer.content, answer.finish_reason) == ("2 + 2 = 4.", "The answer is 4.", "stop")
    assert (answer.prompt_tokens, answer.completion_tokens) == (7, 9)
    assert 0 < answer.first_token_s <= answer.total_s
    assert router.bodies[0]["stream"] is True
    assert router.bodies[0]["stream_options"] == {"include_usage": True}


def test_one_client_serves_many_requests(client: RouterClient) -> None:
    assert client.model() == "fake-model"
    assert client.chat(BODY).content == client.chat(BODY).content
    assert client.get_text("/ready")


def test_an_error_answer_carries_status_and_code(client: RouterClient) -> None:
    with pytest.raises(ApiFailure, match="full") as failure:
        client.chat({**BODY, "messages": [{"role": "user", "content": "refuse"}]})
    assert (failure.value.status, failure.value.code) == (429, "rate_limit_exceeded")


def test_an_error_in_mid_stream_is_a_failure(client: RouterClient, router: FakeRouter) -> None:
    router.stream_error = {"message": "worker lost", "code": "worker_unavailable"}
    with pytest.raises(ApiFailure, match="worker lost"):
        client.chat(BODY)


def test_a_stream_without_its_end_is_a_failure(client: RouterClient, router: FakeRouter) -> None:
    router.truncate = True
    with pytest.raises(ApiFailure, match="broke off"):
        client.chat(BODY)


def test_plain_text_errors_and_missing_pages_are_failures(client: RouterClient) -> None:
    with pytest.raises(ApiFailure, match="nothing here"):
        client.get_json("/nope")


def test_the_key_is_sent(router: FakeRouter) -> None:
    router.required_key = "k1"
    with RouterClient(router.url, "k1") as client:
        assert client.chat(BODY).content
    with RouterClient(router.url, "k2") as client, pytest.raises(ApiFailure, match="wrong key"):
        client.chat(BODY)


def test_an_interrupted_request_is_not_asked_again(client: RouterClient, router: FakeRouter) -> None:
    """Not on another connection either, although the one that was shut had been idle before."""
    assert client.model() == "fake-model"
    router.gate = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(client.chat, BODY)
        while not router.bodies:
            time.sleep(0.01)
        client.interrupt()
        with pytest.raises(ApiFailure):
            asking.result(10.0)
    router.gate.set()
    with pytest.raises(ApiFailure, match="interrupted"):
        client.chat(BODY)
    assert len(router.bodies) == 1


def test_a_stream_after_which_the_server_closes_is_interrupted_too(client: RouterClient, router: FakeRouter) -> None:
    router.between = threading.Event()
    stream = client.stream_chat(BODY)
    next(stream)
    client.interrupt()
    with pytest.raises(ApiFailure, match="broke off"):
        next(stream)
    router.between.set()


@pytest.mark.parametrize("url", ["https://x", "ftp://x", "http://"])
def test_addresses_that_cannot_work_are_refused(url: str) -> None:
    with pytest.raises(ApiFailure, match="expected an address"):
        RouterClient(url)


def test_a_closed_port_says_who_does_not_answer(router: FakeRouter) -> None:
    url = router.url
    router.close()
    with RouterClient(url) as client, pytest.raises(ApiFailure, match="does not answer") as failure:
        client.model()
    assert failure.value.status == 0
    router._server.server_close = router._server.shutdown = lambda: None
