"""The terminal conversation streams, keeps history, and survives errors."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from cluster.chat import ChatLoop
from cluster.http_client import ApiFailure, ChatDelta


class ScriptedEndpoint:
    """Streams the given deltas; an exception in the list is raised there."""

    def __init__(self, *deltas: ChatDelta | BaseException) -> None:
        self.deltas = deltas
        self.bodies: list[dict[str, Any]] = []
        self.closed = 0

    def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]:
        self.bodies.append(body)
        for delta in self.deltas:
            if isinstance(delta, BaseException):
                raise delta
            yield delta

    def close(self) -> None:
        self.closed += 1


ANSWER = (
    ChatDelta(reasoning="thinking "),
    ChatDelta(content="It is [4]."),
    ChatDelta(finish_reason="stop"),
    ChatDelta(usage={"prompt_tokens": 5, "completion_tokens": 11}),
)


def lines(*given: str) -> Callable[[str], str]:
    rest = iter(given)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read


def talk(endpoint: ScriptedEndpoint, *given: str) -> str:
    page = io.StringIO()
    ChatLoop(endpoint, "m", Console(file=page, width=120), lines(*given)).run()
    return page.getvalue()


def test_reasoning_and_answer_are_shown_as_they_are() -> None:
    page = talk(ScriptedEndpoint(*ANSWER), "2 + 2?")
    assert "thinking" in page
    assert "It is [4]." in page


def test_history_is_sent_without_reasoning() -> None:
    endpoint = ScriptedEndpoint(*ANSWER)
    talk(endpoint, "2 + 2?", "again")
    assert endpoint.bodies[1]["messages"] == [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "It is [4]."},
        {"role": "user", "content": "again"},
    ]


def test_commands_change_and_show_state() -> None:
    endpoint = ScriptedEndpoint(*ANSWER)
    page = talk(endpoint, "hi", "/stats", "/think", "/clear", "hi", "/help", "/nope", "/quit", "never read")
    assert "11" in page
    assert "reasoning is off" in page
    assert "unknown command /nope" in page
    assert [body["thinking"] for body in endpoint.bodies] == [{"type": "enabled"}, {"type": "disabled"}]
    assert len(endpoint.bodies[1]["messages"]) == 1


def test_a_failed_answer_leaves_the_history_unchanged() -> None:
    endpoint = ScriptedEndpoint(ApiFailure(503, "no worker"))
    page = talk(endpoint, "hi", "hi again")
    assert page.count("no worker") == 2
    assert len(endpoint.bodies[1]["messages"]) == 1


def test_ctrl_c_stops_the_answer_and_keeps_what_was_said() -> None:
    endpoint = ScriptedEndpoint(ChatDelta(content="It "), KeyboardInterrupt())
    page = talk(endpoint, "hi", "more")
    assert "stopped" in page
    assert endpoint.closed == 2
    assert endpoint.bodies[1]["messages"][1]["content"] == "It "
