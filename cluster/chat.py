"""`dsv4 chat`: a conversation in the terminal, streamed as it is generated.

Owns: the loop, its slash commands, what is shown. Does not own: HTTP (`cluster/http_client.py`). Reasoning is printed
dim and is not sent back with the history, as the official encoding drops it between turns anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from cluster.http_client import ApiFailure, ChatDelta

HELP = """/think       show reasoning before answers: turns it on or off
/stats       tokens, first-token time and speed of the last answer and of this conversation
/clear       forget the conversation
/help        this list
/quit        leave (so does Ctrl-D); Ctrl-C stops the answer that is being written"""


class ChatEndpoint(Protocol):
    """What the loop needs of the router."""

    def stream_chat(self, body: dict[str, Any]) -> Iterator[ChatDelta]: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class TurnStats:
    """What one answer took."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float = 0.0
    total_s: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Generation speed after the first token; 0 when nothing was measured."""
        spent = self.total_s - self.first_token_s
        return (self.completion_tokens - 1) / spent if spent > 0 and self.completion_tokens > 1 else 0.0


def thinking_field(enabled: bool) -> dict[str, Any]:
    """Request fields that turn reasoning on or off, as DeepSeek's own API spells them."""
    return {"thinking": {"type": "enabled" if enabled else "disabled"}}


class ChatLoop:
    """One conversation. `read` returns the next line or raises `EOFError`."""

    def __init__(
        self,
        endpoint: ChatEndpoint,
        model: str,
        console: Console,
        read: Callable[[str], str],
        *,
        thinking: bool = True,
        max_tokens: int = 1024,
        temperature: float | None = None,
    ) -> None:
        self._endpoint, self._model = endpoint, model
        self._console, self._read = console, read
        self._thinking, self._max_tokens, self._temperature = thinking, max_tokens, temperature
        self._messages: list[dict[str, str]] = []
        self._turns: list[TurnStats] = []

    def run(self) -> None:
        """Until /quit or the end of input."""
        self._console.print(f"[bold]{self._model}[/bold]  /help lists commands, /quit leaves", highlight=False)
        while True:
            try:
                line = self._read("> ").strip()
            except (EOFError, KeyboardInterrupt):
                self._console.print()
                return
            if line in ("/quit", "/exit"):
                return
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        if line == "/help":
            self._console.print(HELP, highlight=False)
        elif line == "/think":
            self._thinking = not self._thinking
            self._console.print(f"reasoning is {'on' if self._thinking else 'off'}")
        elif line == "/stats":
            self._console.print(self._stats_table())
        elif line == "/clear":
            self._messages.clear()
            self._console.print("forgotten")
        else:
            self._console.print(f"unknown command {line}; /help lists them", highlight=False)

    def _answer(self, question: str) -> None:
        messages = [*self._messages, {"role": "user", "content": question}]
        body: dict[str, Any] = {"model": self._model, "messages": messages, "max_tokens": self._max_tokens}
        body |= thinking_field(self._thinking)
        if self._temperature is not None:
            body["temperature"] = self._temperature
        stats, content = TurnStats(), ""
        try:
            for piece in self._stream(body, stats):
                content += piece
        except KeyboardInterrupt:
            self._endpoint.close()
            self._console.print("\n[dim](stopped)[/dim]")
        except ApiFailure as exc:
            self._console.print(f"\n[red]{exc}[/red]", highlight=False)
            return
        self._turns.append(stats)
        self._messages = [*messages, {"role": "assistant", "content": content}]

    def _stream(self, body: dict[str, Any], stats: TurnStats) -> Iterator[str]:
        """Prints every piece as it comes and yields the content ones."""
        start = time.perf_counter()
        in_reasoning = False
        for delta in self._endpoint.stream_chat(body):
            if not stats.first_token_s and (delta.reasoning or delta.content):
                stats.first_token_s = time.perf_counter() - start
            if delta.reasoning:
                in_reasoning = True
                self._console.print(delta.reasoning, end="", style="dim", highlight=False, markup=False, soft_wrap=True)
            if delta.content:
                if in_reasoning:
                    self._console.print("\n")
                    in_reasoning = False
                self._console.print(delta.content, end="", highlight=False, markup=False, soft_wrap=True)
                yield delta.content
            if delta.usage:
                stats.prompt_tokens = int(delta.usage.get("prompt_tokens", 0))
                stats.completion_tokens = int(delta.usage.get("completion_tokens", 0))
        stats.total_s = time.perf_counter() - start
        self._console.print()

    def _stats_table(self) -> Table:
        table = Table("", "prompt", "generated", "first token", "tokens/s")
        if self._turns:
            last = self._turns[-1]
            table.add_row("last answer", *_cells(last))
            spent = TurnStats(
                sum(turn.prompt_tokens for turn in self._turns),
                sum(turn.completion_tokens for turn in self._turns),
                sum(turn.first_token_s for turn in self._turns) / len(self._turns),
                0.0,
            )
            table.add_row("conversation", str(spent.prompt_tokens), str(spent.completion_tokens), _ms(spent), "")
        return table


def _cells(turn: TurnStats) -> tuple[str, str, str, str]:
    return str(turn.prompt_tokens), str(turn.completion_tokens), _ms(turn), f"{turn.tokens_per_s:.1f}"


def _ms(turn: TurnStats) -> str:
    return f"{turn.first_token_s * 1e3:.0f} ms"
