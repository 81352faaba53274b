"""Asks the samples of one run over HTTP, a number of them at a time, and records each answer token by token.

Owns: connections, threads, and that they end soon after `stop`. Does not own: what is asked, what is compared. Answers
are streamed, so that a retract shows as the silence that a client would see.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from cluster.http_client import ApiFailure, ChatDelta
from cluster.stress.answers import Answer, token_of
from cluster.stress.samples import StressSample

POLL_S = 0.2
"""Longest time that the main thread waits without noticing a signal."""

END_S = 5.0
"""Wait for a connection's thread to notice that the run was stopped."""


class Streamer(Protocol):
    """One connection to the router; used by one thread, except `interrupt`."""

    def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]: ...

    def interrupt(self) -> None: ...

    def close(self) -> None: ...


class Questions:
    """One run's samples in flight. Iterate over it for answers as they end; `stop` ends it early."""

    def __init__(
        self,
        samples: Sequence[StressSample],
        body: Callable[[StressSample], dict[str, Any]],
        connect: Callable[[], Streamer],
        concurrency: int,
    ) -> None:
        self._body, self._connect = body, connect
        self._todo: queue.SimpleQueue[StressSample] = queue.SimpleQueue()
        for sample in samples:
            self._todo.put(sample)
        self._left = len(samples)
        self._done: queue.SimpleQueue[Answer | BaseException] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._streamers: list[Streamer] = []
        self._threads = [
            threading.Thread(target=self._work, name=f"stress-{number}", daemon=True)
            for number in range(min(concurrency, len(samples)))
        ]

    def __iter__(self) -> Iterator[Answer]:
        """Answers in the order in which they end. Main thread."""
        for thread in self._threads:
            thread.start()
        try:
            while self._left:
                try:
                    item = self._done.get(timeout=POLL_S)
                except queue.Empty:
                    continue
                if isinstance(item, BaseException):
                    raise item
                self._left -= 1
                yield item
        finally:
            self.stop()

    def stop(self) -> None:
        """Cuts what is in flight (the router takes it as a disconnect) and waits for the threads."""
        self._stopped.set()
        for streamer in tuple(self._streamers):
            streamer.interrupt()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(END_S)

    def _work(self) -> None:
        try:
            with contextlib.closing(self._connect()) as streamer:
                self._streamers.append(streamer)
                self._ask_all(streamer)
        except Exception as exc:
            # Outermost frame of the thread: the main thread raises it.
            self._done.put(exc)

    def _ask_all(self, streamer: Streamer) -> None:
        while not self._stopped.is_set():
            try:
                sample = self._todo.get_nowait()
            except queue.Empty:
                return
            answer = self._ask(streamer, sample)
            if not self._stopped.is_set():
                self._done.put(answer)

    def _ask(self, streamer: Streamer, sample: StressSample) -> Answer:
        began = time.perf_counter()
        record = _Record()
        error, code = "", None
        try:
            for delta in streamer.stream_chat(self._body(sample)):
                record.add(delta)
                if self._stopped.is_set():
                    break
        except ApiFailure as exc:
            error, code = str(exc) or "failed", exc.code
        return record.answer(sample.index, time.perf_counter() - began, error, code)


class _Record:
    """An answer while it arrives."""

    def __init__(self) -> None:
        self._tokens: list[str] = []
        self._witnesses: list[str] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._finish: str | None = None
        self._usage: dict[str, Any] = {}

    def add(self, delta: ChatDelta) -> None:
        self._reasoning.append(delta.reasoning)
        self._content.append(delta.content)
        for entry in delta.logprobs:
            token, witness = token_of(entry)
            self._tokens.append(token)
            self._witnesses.append(witness)
        self._finish = delta.finish_reason or self._finish
        self._usage = delta.usage or self._usage

    def answer(self, index: int, total_s: float, error: str, code: str | None) -> Answer:
        return Answer(
            index=index,
            tokens=tuple(self._tokens),
            witnesses=tuple(self._witnesses),
            reasoning="".join(self._reasoning),
            content="".join(self._content),
            finish=self._finish,
            prompt_tokens=int(self._usage.get("prompt_tokens", 0)),
            completion_tokens=int(self._usage.get("completion_tokens", 0)),
            total_s=total_s,
            error=error,
            error_code=code,
        )
