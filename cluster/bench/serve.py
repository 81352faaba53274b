"""`dsv4 bench serve`: chat clients in a closed loop against a deployment, and what they saw.

Owns: prompts of a wanted length, clients, the figures of one level. Does not own: the deployment, drawing
(`serve_results.py`). Every client asks its next question as soon as the last answer has ended, so a level's concurrency
is what decode runs at, and what arrives beyond its batch waits and shows in the time to the first token. Answers are
greedy and run to their full length (`ignore_eos`), so that a level is the same work whatever the model says. Clients
are threads of one process, which takes 80,000 tokens a second on one core (measured: a server that only sends).
"""

from __future__ import annotations

import contextlib
import random
import string
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.bench.serve_results import Level, Machine, Served, level_of
from cluster.errors import ClusterError
from cluster.http_client import ApiFailure, ChatDelta
from cluster.metrics import LABELLED, METRICS, kind_of, parse, worker_rows

PROBE_WORDS = (64, 256)
"""Lengths of the two prompts that tell how many tokens a word takes and how many the template adds."""

WORD_LETTERS = 3
"""Short words: one token each for `synthetic:` models, one to three for others."""

JOIN_S = 5.0
"""Wait for the clients' threads to notice that the run was stopped."""

IDLE_S = 10.0
"""Longest wait for workers to forget requests that were cut: a step or two, unless somebody else asks them, too."""

IDLE_POLL_S = 0.1

_COUNTERS = {metric.name: metric.stats_field for metric in METRICS if metric.kind == "counter"} | {
    name: field for name, field, labels, _ in LABELLED if kind_of(name) == "counter" and labels != ("layer",)
}
"""Series -> field of `WorkerStats`; of experts only totals, not each layer's."""


class CannotMeasure(ClusterError):
    """The deployment cannot be loaded as asked."""


class Client(Protocol):
    """One connection to the router; used by one thread, except `interrupt`."""

    def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]: ...

    def get_text(self, path: str) -> str: ...

    def interrupt(self) -> None:
        """Ends the request under way and every later one with `ApiFailure`."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Load:
    """What the clients do."""

    model: str
    input_tokens: int
    output_tokens: int
    rounds: int
    """Requests of each client at a level, on average."""
    seed: int = 0
    limit_s: float | None = None
    """Longest time of a level; what is in flight then is cut, and counts as far as it had come."""


class Prompts:
    """Random text of a wanted number of tokens, template included. No two prompts begin alike."""

    def __init__(self, per_word: float, fixed: float, load: Load) -> None:
        self._num_words = max(1, round((load.input_tokens - fixed) / per_word))

    @classmethod
    def measured(cls, client: Client, load: Load) -> Prompts:
        """Asks two short questions to learn what a word costs. Raises `CannotMeasure`, `ApiFailure`."""
        counts = []
        for words in PROBE_WORDS:
            usage: dict[str, Any] = {}
            for delta in client.stream_chat(body_of(load, _text(random.Random(f"probe:{words}"), words), 1)):
                usage = delta.usage or usage
            counts.append(int(usage.get("prompt_tokens", 0)))
        per_word = (counts[1] - counts[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0])
        if per_word <= 0:
            raise CannotMeasure(f"prompts of {PROBE_WORDS} words count as {counts} tokens")
        return cls(per_word, counts[0] - per_word * PROBE_WORDS[0], load)

    def text(self, seed: int, level: int, index: int) -> str:
        """The prompt of one request of a level."""
        return _text(random.Random(f"{seed}:{level}:{index}"), self._num_words)


def _text(draw: random.Random, num_words: int) -> str:
    return " ".join("".join(draw.choices(string.ascii_lowercase, k=WORD_LETTERS)) for _ in range(num_words))


def body_of(load: Load, prompt: str, max_tokens: int) -> dict[str, Any]:
    """A chat request that answers with exactly `max_tokens` tokens."""
    return {
        "model": load.model,
        "messages": [{"role": "user", "content": prompt}],
        "temperature": 0,
        "max_tokens": max_tokens,
        "ignore_eos": True,
    }


class Clients:
    """The clients of one level. Iterate for finished requests; `stop` ends it early."""

    def __init__(self, prompts: Prompts, load: Load, concurrency: int, connect: Callable[[], Client]) -> None:
        self._prompts, self._load, self._connect = prompts, load, connect
        self.concurrency = concurrency
        self._total = concurrency * load.rounds
        self._lock = threading.Lock()
        self._taken = 0
        self._done: list[Served] = []
        self._failure: BaseException | None = None
        self._changed = threading.Condition(self._lock)
        self._stopped = False
        self._open: list[Client] = []
        self._threads = [
            threading.Thread(target=self._work, name=f"client-{number}", daemon=True) for number in range(concurrency)
        ]

    def __iter__(self) -> Iterator[Served]:
        """Requests in the order in which they end. Raises what a client raised."""
        for thread in self._threads:
            thread.start()
        seen, began = 0, time.monotonic()
        try:
            while seen < self._total:
                with self._changed:
                    # Short waits: a signal reaches the main thread only between them.
                    while len(self._done) == seen and self._failure is None and not self._is_over(began):
                        self._changed.wait(0.2)
                    if self._failure is not None:
                        raise self._failure
                    ready = self._done[seen:]
                if not ready:
                    if not self.stop():
                        raise CannotMeasure(f"requests of {self.concurrency} clients ran on for {JOIN_S:g} s when cut")
                    yield from self._done[seen:]
                    return
                for served in ready:
                    seen += 1
                    yield served
        finally:
            self.stop()

    def stop(self) -> bool:
        """Cuts what is in flight and waits for the threads; whether all have ended."""
        with self._lock:
            self._stopped = True
            clients = tuple(self._open)
        if len(self._done) < self._total:
            for client in clients:
                client.interrupt()
        until = time.monotonic() + JOIN_S
        started = [thread for thread in self._threads if thread.ident is not None]
        for thread in started:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in started)

    def _is_over(self, began_s: float) -> bool:
        return self._load.limit_s is not None and time.monotonic() - began_s > self._load.limit_s

    def _next(self) -> int | None:
        with self._lock:
            if self._stopped or self._taken == self._total:
                return None
            self._taken += 1
            return self._taken - 1

    def _work(self) -> None:
        try:
            with contextlib.closing(self._connect()) as client:
                with self._lock:
                    self._open.append(client)
                while (index := self._next()) is not None:
                    served = self._ask(client, index)
                    with self._changed:
                        self._done.append(served)
                        self._changed.notify()
        except Exception as exc:
            # Outermost frame of the thread: the main thread raises it.
            with self._changed:
                self._failure = exc
                self._changed.notify()

    def _ask(self, client: Client, index: int) -> Served:
        prompt = self._prompts.text(self._load.seed, self.concurrency, index)
        body = body_of(self._load, prompt, self._load.output_tokens)
        began = time.perf_counter()
        arrivals: list[float] = []
        usage: dict[str, Any] = {}
        error = ""
        try:
            for delta in client.stream_chat(body):
                if delta.reasoning or delta.content:
                    arrivals.append(time.perf_counter())
                usage = delta.usage or usage
        except ApiFailure as exc:
            error = str(exc) or "failed"
        is_cut = bool(error) and self._stopped
        if is_cut:
            # The prompt was computed if anything came; a piece of text is a token.
            known = {"prompt_tokens": self._load.input_tokens if arrivals else 0, "completion_tokens": len(arrivals)}
            usage, error = known, ""
        return Served(
            began_s=began,
            ended_s=time.perf_counter(),
            arrivals_s=tuple(arrivals),
            prompt_tokens=int(usage.get("prompt_tokens", 0)),
            completion_tokens=int(usage.get("completion_tokens", 0)),
            error=error,
            is_cut=is_cut,
        )


def measure_level(
    client: Client,
    prompts: Prompts,
    load: Load,
    machine: Machine,
    concurrency: int,
    connect: Callable[[], Client],
    on_served: Callable[[Served], None],
) -> Level:
    """One level: its figures from the clients' side, and what the workers' counters say they did for it.

    Begins once the workers are idle, so that nothing of a level that was cut runs into this one.
    """
    _wait_idle(client)
    before = counters_of(client.get_text("/metrics"))
    served: list[Served] = []
    for item in Clients(prompts, load, concurrency, connect):
        served.append(item)
        on_served(item)
    after = counters_of(client.get_text("/metrics"))
    return level_of(concurrency, served, machine, counted(before, after))


def _wait_idle(client: Client) -> None:
    until = time.monotonic() + IDLE_S
    while _num_requests(client.get_text("/metrics")) and time.monotonic() < until:
        time.sleep(IDLE_POLL_S)


def _num_requests(metrics: str) -> int:
    """Requests that workers compute or keep waiting."""
    rows = worker_rows(metrics).values()
    return sum(int(str(row.get(key, 0))) for row in rows for key in ("running", "waiting"))


def counters_of(metrics: str) -> dict[str, dict[str, float]]:
    """Each worker's counters, those by cause or path as `field/cause`."""
    found: dict[str, dict[str, float]] = {}
    for sample in parse(metrics):
        labels = {key: value for key, value in sample.labels.items() if key not in ("worker", "role")}
        if (field := _COUNTERS.get(sample.name)) and "worker" in sample.labels:
            found.setdefault(sample.labels["worker"], {})["/".join((field, *labels.values()))] = sample.value
    return found


def counted(before: dict[str, dict[str, float]], after: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """What each worker's counters grew by; those that did not are left out."""
    grown = {
        worker: {key: round(value - before.get(worker, {}).get(key, 0.0), 6) for key, value in row.items()}
        for worker, row in after.items()
    }
    return {worker: {key: growth for key, growth in row.items() if growth} for worker, row in grown.items()}


def warm_up(prompts: Prompts, load: Load, concurrency: int, connect: Callable[[], Client]) -> float:
    """One short round at a level, so that nothing is compiled while a level is timed; seconds.

    Its prompts are not those of the level: a prefix that the server knows already would shorten the level's prefill.
    """
    short = Load(load.model, load.input_tokens, 2, 1, load.seed + 1)
    began = time.perf_counter()
    failed = [served.error for served in Clients(prompts, short, concurrency, connect) if served.error]
    if failed:
        raise CannotMeasure(f"{len(failed)} of {concurrency} requests failed: {failed[0]}")
    return time.perf_counter() - began
