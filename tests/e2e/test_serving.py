"""A chat request goes through router, prefill, KV hand-off and decode, for any OpenAI client."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest

from cluster.evaluation import held_out_samples, request_body
from cluster.metrics import parse
from cluster.processes import descendants
from cluster.tasks.sample import Task
from cluster.tasks.scoring import is_correct
from tests.e2e.deployment import LIMIT_S, Deployment, has_trained_model

pytestmark = pytest.mark.timeout(LIMIT_S)

QUESTION = [{"role": "user", "content": "Ann has 12 apples and buys 7 more. How many apples does Ann have?"}]


def wait_until(condition: Callable[[], bool], timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return met


def is_idle(deployment: Deployment) -> bool:
    """Nothing runs, nothing waits, nothing leaks, and every page and slot of every worker is free."""
    gauges = ("running", "waiting", "parked", "draining", "leaked_pages", "reserved_full_pages")
    gauges += ("full_pages_used", "window_pages_used", "slots_used")
    found = deployment.status()
    return len(found.workers) == 2 and all(not row[gauge] for row in found.workers for gauge in gauges)


@pytest.fixture(autouse=True)
def everything_is_free_afterwards(deployment: Deployment) -> object:
    yield
    assert wait_until(lambda: is_idle(deployment)), deployment.status().as_dict()


def greedy(client: openai.OpenAI, deployment: Deployment, **values: object) -> object:
    fields = {"messages": QUESTION, "max_tokens": 24, "temperature": 0, **values}
    return client.chat.completions.create(model=deployment.model, **fields)


def test_a_plain_answer_has_text_and_usage(openai_client: openai.OpenAI, deployment: Deployment) -> None:
    answer = greedy(openai_client, deployment)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert 0 < answer.usage.completion_tokens <= 24
    assert answer.usage.prompt_tokens > 5


def test_streamed_text_equals_the_plain_answer(openai_client: openai.OpenAI, deployment: Deployment) -> None:
    plain = greedy(openai_client, deployment).choices[0].message
    chunks = list(greedy(openai_client, deployment, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    content = "".join(delta.content or "" for delta in deltas)
    reasoning = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
    assert content == (plain.content or "")
    assert reasoning == (getattr(plain, "reasoning_content", None) or "")
    assert chunks[-1].usage.completion_tokens > 0


def test_requests_in_parallel_answer_as_alone(openai_client: openai.OpenAI, deployment: Deployment) -> None:
    questions = [f"What is {number} + {2 * number}?" for number in range(11, 17)]

    def ask(question: str) -> str:
        answer = greedy(openai_client, deployment, messages=[{"role": "user", "content": question}])
        message = answer.choices[0].message
        return f"{getattr(message, 'reasoning_content', None)}|{message.content}"

    alone = [ask(question) for question in questions]
    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(ask, questions)) == alone


def test_sampling_with_a_seed_repeats(openai_client: openai.OpenAI, deployment: Deployment) -> None:
    fields = {"temperature": 1.0, "seed": 7, "max_tokens": 16}
    first, second = (greedy(openai_client, deployment, **fields).choices[0].message for _ in range(2))
    assert (first.content, first.model_extra) == (second.content, second.model_extra)


def test_prefill_computes_and_decode_receives(openai_client: openai.OpenAI, deployment: Deployment) -> None:
    greedy(openai_client, deployment)
    with deployment.client() as client:
        samples = parse(client.get_text("/metrics"))
    values = {(sample.name, sample.labels.get("role")): sample.value for sample in samples}
    assert values["dsv4_kv_bytes_received_total", "decode"] > 0
    assert values["dsv4_kv_bytes_sent_total", "prefill"] > 0
    assert values["dsv4_prefill_tokens_computed_total", "prefill"] > 0
    assert values["dsv4_prefill_tokens_computed_total", "decode"] == 0
    assert values["dsv4_tokens_generated_total", "decode"] > 0
    assert values["dsv4_kv_bytes_received_total", "prefill"] == 0


def test_a_prompt_of_many_chunks_is_answered(openai_client: openai.OpenAI, deployment: Deployment) -> None:
    """More than a dozen chunks: pages of all kinds cross, the window slides, states hand over."""
    text = "The red box holds a key. " * 220
    answer = greedy(openai_client, deployment, messages=[{"role": "user", "content": text}], max_tokens=8)
    assert answer.usage.prompt_tokens > 1500
    assert answer.usage.completion_tokens > 0


def test_a_client_that_vanishes_frees_both_workers(deployment: Deployment) -> None:
    aborted = sum(int(str(row["requests_aborted"])) for row in deployment.status().workers)
    for after_events in (0, 3):
        client = deployment.client()
        body = {"model": deployment.model, "messages": QUESTION, "max_tokens": 3000, "ignore_eos": True}
        stream = client.stream_chat(body)
        for _ in range(after_events):
            next(stream)
        client.close()
    assert wait_until(lambda: is_idle(deployment))
    now = sum(int(str(row["requests_aborted"])) for row in deployment.status().workers)
    assert now > aborted


def test_a_prompt_that_cannot_fit_is_refused(openai_client: openai.OpenAI, deployment: Deployment) -> None:
    with pytest.raises(openai.BadRequestError) as failure:
        greedy(openai_client, deployment, messages=[{"role": "user", "content": "word " * 9000}])
    assert failure.value.code == "context_length_exceeded"


def test_an_unknown_model_is_404(openai_client: openai.OpenAI, deployment: Deployment) -> None:
    with pytest.raises(openai.NotFoundError):
        openai_client.chat.completions.create(model="gpt-4", messages=QUESTION)


GARBAGE = [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe\x00", b'{"messages": 5}', b'{"model": {}}', b"[" * 20000]
GARBAGE += [b'{"model": "dsv4-nano", "messages": [{"role": "wizard", "content": []}]}']
GARBAGE += [b'{"model": "dsv4-nano", "messages": [{"role": "user", "content": "x"}], "max_tokens": -1}']
GARBAGE += [b'{"model": "dsv4-nano", "messages": [{"role": "user", "content": "x"}], "temperature": "hot"}']
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/ready", "/metrics", "/", "/v1/nope")


@pytest.mark.parametrize("path", PATHS)
def test_garbage_gets_a_clear_answer(deployment: Deployment, path: str) -> None:
    host, _, port = deployment.url.removeprefix("http://").partition(":")
    for body in GARBAGE:
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        connection.request("POST", path, body=body, headers={"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        assert 400 <= response.status < 500, (path, body[:60], response.status, text)
        assert set(json.loads(text)["error"]) == {"message", "type", "param", "code"}


def test_bytes_that_are_not_http_do_not_hurt(deployment: Deployment) -> None:
    import socket

    host, _, port = deployment.url.removeprefix("http://").partition(":")
    for rubbish in (
        b"\x00" * 64,
        b"GET\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: 99\r\n\r\nshort",
    ):
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            connection.sendall(rubbish)
    with deployment.client() as client:
        assert client.model() == deployment.model


def test_nothing_listens_beyond_this_machine(deployment: Deployment) -> None:
    for ref in descendants(deployment.process.pid):
        for connection in psutil.Process(ref.pid).net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                address = connection.laddr.ip.removeprefix("::ffff:")
                assert address in ("127.0.0.1", "::1"), (ref.name, connection.laddr)


def test_chat_command_streams_an_answer(deployment: Deployment) -> None:
    done = deployment.dsv4("chat", "--max-tokens", "8", "--temperature", "0", text="hello\n/stats\n/quit\n")
    assert done.returncode == 0, done.stderr
    assert "last answer" in done.stdout


def test_status_command_shows_both_workers(deployment: Deployment) -> None:
    done = deployment.dsv4("status")
    assert done.returncode == 0, done.stderr
    assert "prefill-0" in done.stdout
    assert "decode-0" in done.stdout


def test_eval_command_scores_the_running_deployment(deployment: Deployment) -> None:
    done = deployment.dsv4("eval", "--samples", "2", "--task", "recall", "--context", "256", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)[0]
    assert (report["samples"], report["errors"]) == (2, 0)


@pytest.mark.skipif(not has_trained_model(), reason="the bundled checkpoint is not trained yet")
def test_the_bundled_model_answers_arithmetic_rightly(deployment: Deployment) -> None:
    samples = held_out_samples(Task.ARITHMETIC, 4, seed=1, context_tokens=None)
    with deployment.client() as client:
        answers = [client.chat(request_body(sample, deployment.model)) for sample in samples]
    right = [
        is_correct(sample, answer.reasoning, answer.content) for sample, answer in zip(samples, answers, strict=True)
    ]
    assert sum(right) == 4
