"""Retracts that nothing but a `RetractControl` asks for: who is due, which copy fails. Apart from real shortage."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from collections.abc import Sequence as Seq

from workers.messages import RetractControl
from workers.sequence import Sequence


class ForcedRetracts:
    """The state of one control. Engine thread only."""

    def __init__(self, control: RetractControl | None = None) -> None:
        self.control = control or RetractControl()
        self._random = random.Random(self.control.seed)
        self._num_steps = 0
        self._num_copies = 0
        self._offsets: dict[tuple[str, int], int] = {}
        self._left_at: dict[tuple[str, int], int] = {}

    @property
    def active(self) -> bool:
        """Whether anybody may be due."""
        return self.control.interval is not None

    def due(self, running: Seq[Sequence], choose: Callable[[Seq[Sequence]], Sequence]) -> list[Sequence]:
        """Requests to take out before the next step; `choose` is the policy's choice among some."""
        if self.control.interval is None or not running:
            return []
        if self.control.victim in ("all", "named"):
            return [s for s in running if self._named(s) and self._at_interval(s)]
        self._num_steps += 1
        if self._num_steps % self.control.interval:
            return []
        ordered = sorted(running, key=lambda s: s.key)
        return [self._random.choice(ordered) if self.control.victim == "random" else choose(ordered)]

    def copy_fails(self) -> bool:
        """Counts one more copy out of the pools; whether it is the one that fails."""
        self._num_copies += 1
        return self._num_copies == self.control.fail_copy

    def forget(self, sequence: Sequence) -> None:
        """The request has ended."""
        self._offsets.pop(sequence.key, None)
        self._left_at.pop(sequence.key, None)

    def _named(self, sequence: Sequence) -> bool:
        request_id = sequence.request.request_id
        return self.control.victim == "all" or any(request_id.startswith(name) for name in self.control.names)

    def _at_interval(self, sequence: Sequence) -> bool:
        """Once at each count of output tokens that is `interval` apart, at the request's own offset."""
        interval, num_output = self.control.interval, len(sequence.output_ids)
        assert interval is not None
        if sequence.key not in self._offsets:
            self._offsets[sequence.key] = offset_of(sequence, self.control.seed, interval)
        if (num_output + self._offsets[sequence.key]) % interval or self._left_at.get(sequence.key) == num_output:
            return False
        self._left_at[sequence.key] = num_output
        return True


def offset_of(sequence: Sequence, seed: int, interval: int) -> int:
    """Where in the interval a request begins: by its prompt, not its id, so that another run with the seed repeats."""
    digest = hashlib.blake2b(repr((seed, sequence.request.prompt_ids)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % interval
