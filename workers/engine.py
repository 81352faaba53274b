"""`Engine`: one worker's model, pools and allocators, and how a plan becomes tokens.

Owns: step inputs (kept between decode steps), sampling states, moving KV between pages and host rows, step timing. Does
not own: who runs (`workers/scheduler`), threads (`workers/loop.py`), the model's maths. Engine thread only, except
`StepTimes`, which anyone may read.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from kvstore.allocator import KVAllocators
from kvstore.config import KVStoreConfig
from kvstore.pools.aggregate import KVPools
from kvstore.sequence_kv import SequenceKV
from kvstore.spec import KVSpec, RowRange
from workers.batch import ForwardBatch
from workers.errors import DeviceLost, RequestError
from workers.messages import GenerateRequest
from workers.pipeline import AheadModel, DecodePipeline
from workers.sampler import Sampled, SampleState, request_seed, sample
from workers.scheduler.plan import Chunk, DecodePlan, PrefillPlan
from workers.sequence import Sequence, StopRule

logger = logging.getLogger(__name__)


class StepModel(Protocol):
    """What an engine runs; `workers.model.transformer.Transformer` satisfies it.

    A model may have an attribute `ahead`, an `AheadModel` for decode steps that run beside the host (None: it has
    none), `batch_device`, where it wants its batches (default: the pools' device), and `experts`, an
    `ExpertStatistics`.
    """

    def forward(self, batch: ForwardBatch, logits_for: Literal["last", "all"] = "last") -> Tensor:
        """Logits fp32 [B, V] (or [T, V]); writes the new tokens' KV to the pools."""

    def decode(self, batch: ForwardBatch) -> Tensor:
        """Logits fp32 [B, V] of one new token of each sequence, valid until the next call; as `forward` else."""


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What workers must know of a model besides its weights."""

    name: str
    vocab_size: int
    eos_token_id: int


class ExpertStatistics(Protocol):
    """A cache of routed experts, as seen by whoever reports on a worker."""

    note: str
    """What an operator should know of its size; empty when there is nothing to say."""

    def stats_fields(self) -> dict[str, object]:
        """Its fields of `WorkerStats`. Any thread."""

    def prompt_uses(self) -> bytes:
        """What `encode_uses` makes of the steps since the last call. Engine thread, after a prefill step."""

    def note_prompt(self, uses: bytes) -> None:
        """Brings in what a prompt used whose decode steps are about to come. Engine thread, between steps."""


@runtime_checkable
class SharedExperts(Protocol):
    """Experts that the workers of a host read from each other's memory."""

    def start_sharing(self, call: Callable[[Callable[[], None]], Future[None]]) -> None:
        """From now on; `call` runs something on the engine thread between two steps."""

    def stop_sharing(self) -> None:
        """Ends it, while the engine thread still runs. Waits up to seconds. Safe to call again."""

    def close(self) -> None:
        """Gives memory and files back; no step may run any more. Safe to call again."""


class BrokenLogits(RequestError):
    """The model's output for one request is not finite."""

    code = "model_output_invalid"


SEGMENT_BYTES = KVStoreConfig().segment_bytes
"""Target size of one exported row range: the transfer sends ranges up to this size without another copy."""

RECENT_STEPS = 4096
"""Steps whose times are kept, to tell what ran while KV was on the wire."""


class StepTimes:
    """Counts and durations of steps. Written by the engine thread, readable from anywhere."""

    def __init__(self) -> None:
        self.count = 0
        self.total_s = 0.0
        self.last_s = 0.0
        self.mean_s = 0.0
        self.recent: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)
        """(began, ended) of the last steps, seconds of `time.monotonic`."""

    def add(self, began_s: float) -> None:
        """Records a step that ends now; the mean forgets with a time constant of 50 steps."""
        ended_s = time.monotonic()
        seconds = ended_s - began_s
        self.recent.append((began_s, ended_s))
        self.count += 1
        self.total_s += seconds
        self.last_s = seconds
        self.mean_s = seconds if self.count == 1 else self.mean_s + (seconds - self.mean_s) / 50


class DecodeInputs:
    """The `ForwardBatch` of decode steps: rebuilt when the plan's composition changes, else moved on in place."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._composition: int | None = None
        self._starts: list[int] = []
        self._batch: ForwardBatch | None = None
        self.states: list[SampleState] = []

    def forget(self) -> None:
        """Makes the next step rebuild; call when a step did not complete."""
        self._composition = None

    def batch(self, plan: DecodePlan) -> ForwardBatch:
        """Inputs of this step; tensors are reused by the next one."""
        last_ids = [s.output_ids[-1] for s in plan.sequences]
        starts = [s.num_computed for s in plan.sequences]
        batch = self._batch
        if batch is not None and plan.composition == self._composition:
            moved_on = all(new == old + 1 for new, old in zip(starts, self._starts, strict=True))
            if moved_on:
                batch.token_ids.copy_(torch.tensor(last_ids))
                batch.positions.add_(1)
                batch.start.add_(1)
                self._starts = starts
                return batch
        items = []
        for sequence, token_id, start in zip(plan.sequences, last_ids, starts, strict=True):
            assert sequence.kv is not None
            items.append((sequence.kv.indices(start + 1), start, (token_id,)))
        self._batch = ForwardBatch.build(items, self._device)
        if self._batch.positions.data_ptr() == self._batch.start.data_ptr():
            raise AssertionError("positions and start must not share memory: both are moved on in place")
        self.states = [_state_of(s) for s in plan.sequences]
        self._composition, self._starts = plan.composition, starts
        return self._batch


def _state_of(sequence: Sequence) -> SampleState:
    state = sequence.sampling
    assert isinstance(state, SampleState), f"{sequence} has no sampling state"
    return state


class Engine:
    """One worker's model over its pools."""

    def __init__(self, model: StepModel, pools: KVPools, facts: ModelFacts) -> None:
        self.model = model
        self.pools = pools
        self.facts = facts
        sizes = pools.sizes
        self.allocators = KVAllocators.of_sizes(
            full_pages=sizes.full_pages, window_pages=sizes.window_pages, slots=sizes.slots
        )
        self.times = StepTimes()
        self.batch_device: torch.device = getattr(model, "batch_device", pools.device)
        self.experts: ExpertStatistics | None = getattr(model, "experts", None)
        """Where some of the model's experts are absent from fast memory."""
        self._inputs = DecodeInputs(self.batch_device)
        ahead: AheadModel | None = getattr(model, "ahead", None)
        self._pipeline = None if ahead is None else DecodePipeline(ahead)

    @property
    def spec(self) -> KVSpec:
        """Layout of the pools."""
        return self.pools.spec

    def new_sequence(self, request: GenerateRequest, *, arrival_s: float, deadline_s: float) -> Sequence:
        """A sequence with its sampling state. Raises `RequestError` when a prompt id is outside the vocabulary."""
        if max(request.prompt_ids) >= self.facts.vocab_size or min(request.prompt_ids) < 0:
            raise InvalidTokens(f"prompt ids must be in [0, {self.facts.vocab_size})")
        stop = StopRule.of(request, self.facts.eos_token_id)
        sequence = Sequence(request, stop=stop, arrival_s=arrival_s, deadline_s=deadline_s)
        sequence.sampling = SampleState(
            request.sampling,
            request_seed(request.sampling, request.request_id),
            stop.stop_ids,
            request.prompt_ids,
            (),
            self.facts.vocab_size,
        )
        return sequence

    def prefill(self, plan: PrefillPlan) -> list[Sampled | None]:
        """Computes the chunks; a sampled first token for each chunk that ends its prompt, else None."""
        began_s = time.monotonic()
        items = []
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert sequence.kv is not None
            items.append(
                (sequence.kv.indices(chunk.end), chunk.start, sequence.request.prompt_ids[chunk.start : chunk.end])
            )
        with torch.inference_mode():
            logits = self.model.forward(ForwardBatch.build(items, self.batch_device), "last")
            ends = [i for i, chunk in enumerate(plan.chunks) if chunk.is_last]
            states = [_state_of(plan.chunks[i].sequence) for i in ends]
            first = dict(zip(ends, sample(logits[ends], states), strict=True)) if ends else {}
        self.times.add(began_s)
        return [first.get(i) for i in range(len(plan.chunks))]

    def decode(self, plan: DecodePlan) -> list[Sampled | None]:
        """One more token for each sequence of the plan; raises whatever the model raises, with nothing sampled.

        None for a sequence that joined after the step had been launched (see `DecodePipeline`); never for all.
        """
        began_s = time.monotonic()
        try:
            with torch.inference_mode():
                sampled = self._sampled(plan) if self._pipeline is None else self._pipeline.step(plan)
        except BaseException:
            self._inputs.forget()
            if self._pipeline is not None:
                self._pipeline.forget()
            raise
        self.times.add(began_s)
        return sampled

    def _sampled(self, plan: DecodePlan) -> list[Sampled | None]:
        logits = self.model.decode(self._inputs.batch(plan))
        return [*sample(logits, self._inputs.states)]

    def warm_up(self, *, decode: bool) -> None:
        """Before the first request: compiles and captures what the model's steps of one kind need. Writes no KV."""
        began_s = time.monotonic()
        warm_up = getattr(self.model, "warm_up", None)
        if warm_up is not None:
            warm_up(decode=decode)
            logger.info("model=%s warm_up_s=%.1f", self.facts.name, time.monotonic() - began_s)

    def check_device(self) -> None:
        """After a step that failed: raises `DeviceLost` when no other can work either.

        An error inside a kernel (a bad address, a link or memory that broke) ends the whole CUDA context.
        """
        if self.pools.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.pools.device)
        except RuntimeError as error:
            raise DeviceLost(str(error).partition("\n")[0]) from error

    def open_slot(self, kv: SequenceKV) -> None:
        """Clears what the slot's previous owner left in its rings."""
        self.pools.reset_slot(kv.slot)

    def finished_rows(self, chunk: Chunk) -> list[tuple[RowRange, Tensor]]:
        """Rows that became final with this chunk, in host memory."""
        places = self.spec.chunk_ranges(chunk.start, chunk.end, chunk.sequence.num_prompt, SEGMENT_BYTES)
        return self._export(chunk, places)

    def tail_rows(self, chunk: Chunk) -> list[tuple[RowRange, Tensor]]:
        """The live rows that only the end of the prompt decides: window and compressor states."""
        return self._export(chunk, self.spec.tail_ranges(chunk.end, SEGMENT_BYTES))

    def _export(self, chunk: Chunk, places: Seq[RowRange]) -> list[tuple[RowRange, Tensor]]:
        assert chunk.sequence.kv is not None
        indices = chunk.sequence.kv.indices(chunk.end)
        return [(place, self.pools.export_rows(place, indices)) for place in places]


class InvalidTokens(RequestError):
    """The prompt holds ids that the model does not have."""

    status = 400
    code = "invalid_request"
