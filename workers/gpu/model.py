"""`GpuModel`: the trunk on a GPU through Triton kernels, over the pools of one worker.

Owns: the choice of step (decode in CUDA graphs, prefill in packed chunks), the state of the running decode batch on
the device, and the log of memory and of start-up times. Does not own: launches (`step.py`), layouts (`weights.py`), who
runs (`workers/engine.py`). Engine thread only; everything is enqueued on the current stream.

A decode step leaves what the next one needs on the device: token ids (the greedy choice) and positions. The host sends
metadata only when the composition of the batch or a page table has changed, and token ids only when it chose them.

Exactness: a step writes, for each sequence, rows at its own position and no other state that is still alive, so a step
whose result is not used (its sequence was taken out of the batch meanwhile) changes nothing that a copy would carry.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstore.pools.aggregate import KVPools
from workers.batch import ForwardBatch, check_batch
from workers.gpu.buffers import Activations, DecodeMeta, PrefillMeta, steps_inside_pages
from workers.gpu.graphs import DecodeGraphs
from workers.gpu.kernel_set import (
    Launch,
    MakeKernels,
    Recorder,
    StepSizes,
    decode_kernels,
    prefill_kernels,
    recorded,
)
from workers.gpu.rope_tables import RopeTables
from workers.gpu.step import LayerExperts, Step, StepParts
from workers.gpu.weights import GpuWeights, unsupported_shape
from workers.model.config import PAGE_TOKENS, LayerKind, ModelConfig
from workers.model.precision import Precision
from workers.ops import LogitsFor

logger = logging.getLogger(__name__)

ATTENTION_BLOCK = 16384
"""Prefill tokens that go through attention at a time: 40,960 bf16 columns of queries each at Flash's size, 1.3 GB."""

WALKED_PROMPTS = ((16, 1), (256, 1), (256, 2), (256, 16))
"""(tokens, sequences) of prefill steps whose kernels are compiled at start, as far as the buffers go. Triton has a form
of a kernel for an integer that is 1, for multiples of 16 and for others; routing has one for few tokens."""

WALKED_ENTRIES = (1, 8192, 32768)
"""C4 entries that a token of them may see: top-k has one form for each size of its chunks, and one for several."""

PREFILL_STEP = 16
"""A prefill step is padded to a multiple of this: one tile of the kernels, and few sizes reach the compiler."""


def unsupported_reason(config: ModelConfig, precision: Precision, pools: KVPools) -> str | None:
    """Why this path cannot run a model, or `None` when it can."""
    if precision != Precision.native() or pools.spec.fmt != "fp8":
        return f"the kernels compute native precision over fp8 pools, not {precision} over {pools.spec.fmt}"
    return unsupported_shape(config)


class GpuModel:
    """One model over one set of pools."""

    def __init__(
        self,
        config: ModelConfig,
        weights: GpuWeights,
        pools: KVPools,
        *,
        max_running: int | None = None,
        max_context: int | None = None,
        kernels: tuple[MakeKernels, MakeKernels] = (decode_kernels, prefill_kernels),
        use_graphs: bool | None = None,
        before_decode: Callable[[], None] | None = None,
        expert_stream: LayerExperts | None = None,
        decode_experts: LayerExperts | None = None,
    ) -> None:
        """Allocates decode buffers; kernels are compiled and graphs captured at `warm_up` or at first use.

        Args:
            max_running: sequences of the largest decode step, by default the pools' slots.
            max_context: tokens of the longest sequence, by default what the model and the pools can hold.
            kernels: what makes the ops of decode and of prefill.
            use_graphs: capture decode steps; by default on CUDA.
            before_decode: called on the engine thread right before each decode step is enqueued.
            expert_stream: where prefill steps find their experts, instead of the weights' own slabs.
            decode_experts: the same for decode; what it enqueues is captured in the graphs.
        """
        self.config, self.weights, self.pools, self.device = config, weights, pools, pools.device
        self.max_running = max_running or pools.sizes.slots
        longest = min(max_context or config.max_position_embeddings, pools.sizes.full_pages * PAGE_TOKENS)
        self.num_pages = -(-longest // PAGE_TOKENS)
        self._make_decode, self._make_prefill = kernels
        self._use_graphs = use_graphs
        self._before_decode = before_decode
        self._expert_stream, self._decode_experts = expert_stream, decode_experts
        ropes = RopeTables.build(config, self.num_pages * PAGE_TOKENS, self.device)
        self._parts = StepParts.of(config, weights, ropes, pools)
        self._lazy_decode: _Decode | None = None
        self._prefill: Step | None = None
        self._prefill_sizes: tuple[int, ...] = (0, 0, 0, 0)
        """Tokens, rows of logits, sequences and entries that the buffers of prefill hold."""
        self._walked: list[Callable[[], object]] = []
        """What has been compiled side by side; once is enough."""
        logger.info(
            "model on %s: weights_bytes=%d pool_bytes=%d max_running=%d max_context=%d",
            self.device,
            weights.nbytes,
            pools.nbytes,
            self.max_running,
            self.num_pages * PAGE_TOKENS,
        )

    # -- decode -------------------------------------------------------------------------------------------------------

    def reserve_decode(self) -> None:
        """Allocate now what decode steps need, so that none of them takes device memory later, but for graphs."""
        self._decode.meta.clear()

    def warm_up(self) -> None:
        """Compile the decode kernels and capture every bucket. Writes no KV."""
        decode = self._decode
        decode.meta.clear()
        with self._compilation("decode", self._walk_decode):
            decode.graphs.capture_all()

    def decode(self, batch: ForwardBatch) -> Tensor:
        """One token of each sequence: fp32 logits [B, V] on the device, valid until the next step."""
        self.start(batch)
        return self.logits()

    def start(self, batch: ForwardBatch) -> None:
        """Enqueue a decode step of any composition. Raises ValueError for ids, pages or slots that do not exist."""
        batch, decode = _on_cpu(batch), self._decode
        if int(batch.num_new.max()) != 1 or batch.num_sequences > self.max_running:
            raise ValueError(f"decode takes one token of each of at most {self.max_running} sequences")
        check_batch(batch, self.config, self.pools.sizes, self.num_pages)
        decode.meta.load(batch)
        decode.running = batch.num_sequences
        decode.steps_left = steps_inside_pages(batch)
        decode.replay()

    def start_next(self, token_ids: np.ndarray | None = None) -> None:
        """Enqueue the step after the last one, same sequences and pages.

        Raises ValueError where a sequence has reached the end of its pages: `start` again, with more of them.

        Args:
            token_ids: int [B], the tokens to run; None takes the last step's greedy choice, which is on the device.
        """
        decode = self._decode
        if decode.steps_left < 1:
            raise ValueError("a sequence has no page for its next token")
        if token_ids is not None:
            if len(token_ids) != decode.running or token_ids.min() < 0 or token_ids.max() >= self.config.vocab_size:
                raise ValueError(f"{len(token_ids)} token ids of a batch of {decode.running}, in [0, vocabulary)")
            decode.meta.load_tokens(token_ids)
        decode.steps_left -= 1
        decode.replay()

    def logits(self) -> Tensor:
        """fp32 [B, V] of the last step, valid until the next one is started."""
        decode = self._decode
        return decode.step.buffers.view("logits", decode.running, self.config.vocab_size)

    def greedy(self) -> tuple[list[int], list[bool]]:
        """The best id of each row of the last step, lowest among equals, and whether its logits are finite. Waits."""
        return self._decode.greedy()

    def launches(self, batch: ForwardBatch) -> list[Launch]:
        """Every launch of the decode step of `batch`, in order, to be called one by one (for benchmarks)."""
        batch, recorder, decode = _on_cpu(batch), Recorder(), self._decode
        check_batch(batch, self.config, self.pools.sizes, self.num_pages)
        decode.meta.load(batch)
        decode.running = batch.num_sequences
        step = Step(self._parts, recorded(decode.step.kernels, recorder), decode.step.buffers, recorder)
        step.run(decode.meta.bucket(decode.graphs.bucket_of(decode.running)))
        return recorder.launches

    @property
    def _decode(self) -> _Decode:
        """Buffers and graphs of decode, made at first use: a prefill worker needs none."""
        if self._lazy_decode is None:
            with torch.inference_mode(False):
                sizes = StepSizes(self.max_running, self.max_running, self.num_pages, self.device)
                made = self._make_step(self._make_decode, sizes, self.max_running, "decode")
                step = replace(made, stream=self._decode_experts)
                self._lazy_decode = _Decode(step, sizes, use_graphs=self._use_graphs, before=self._before_decode)
        return self._lazy_decode

    def _make_step(self, make: MakeKernels, sizes: StepSizes, num_rows: int, name: str) -> Step:
        """Buffers and scratch for steps of these sizes; logged, because they are device memory."""
        began, before = time.perf_counter(), _allocated_bytes(self.device)
        buffers = Activations(
            self.config, num_tokens=sizes.num_tokens, block=sizes.block, num_rows=num_rows, device=self.device
        )
        step = Step(self._parts, make(self.config, sizes), buffers)
        logger.info(
            "%s buffers: tokens=%d rows=%d bytes=%d with_scratch_MiB=%.1f seconds=%.2f",
            name,
            sizes.num_tokens,
            num_rows,
            buffers.nbytes,
            (_allocated_bytes(self.device) - before) / 2**20,
            time.perf_counter() - began,
        )
        return step

    # -- prefill ------------------------------------------------------------------------------------------------------

    def forward(self, batch: ForwardBatch, logits_for: LogitsFor = "last") -> Tensor:
        """As `Transformer.forward`. Raises ValueError for ids and pages that kernels would follow out of memory."""
        batch = _on_cpu(batch)
        every = logits_for == "all"
        step, meta, arguments = self._prefill_inputs(batch, every=every)
        logits = step.run(meta.step, **arguments)
        return logits[: batch.num_tokens].clone() if every else logits.clone()

    def prefill_launches(self, batch: ForwardBatch) -> list[Launch]:
        """Every launch of `forward(batch, "last")`, in order; they own the step's metadata (for benchmarks)."""
        recorder = Recorder()
        step, meta, arguments = self._prefill_inputs(_on_cpu(batch), every=False)
        Step(self._parts, recorded(step.kernels, recorder), step.buffers, recorder).run(meta.step, **arguments)
        return recorder.launches

    def _prefill_inputs(self, batch: ForwardBatch, *, every: bool) -> tuple[Step, PrefillMeta, dict[str, Any]]:
        """The step that runs `batch`, its metadata on the device, and the arguments of `Step.run`."""
        check_batch(batch, self.config, self.pools.sizes, self.num_pages)
        padded = -(-batch.num_tokens // PREFILL_STEP) * PREFILL_STEP
        entries = (batch.start + batch.num_new) // LayerKind.C4.value
        num_rows = padded if every else batch.num_sequences
        # Tensors made in inference mode could not be written outside it later.
        with torch.inference_mode(False):
            step = self._prefill_step(padded, num_rows, batch.num_sequences, int(entries.sum()))
            meta = PrefillMeta(batch, padded, self.device)
        return step, meta, {"rows": None if every else meta.rows, "max_entries": int(entries.max())}

    def reserve_prefill(self, num_tokens: int, *, num_sequences: int = 1, num_entries: int = 0) -> None:
        """Allocate now what steps up to this size need, so that none of them takes device memory later.

        Args:
            num_tokens: of all prompts of a step together.
            num_sequences: prompts packed into a step; each gets one row of logits.
            num_entries: C4 entries (4 tokens each) of all of them together at the end of a step.
        """
        padded = -(-num_tokens // PREFILL_STEP) * PREFILL_STEP
        with torch.inference_mode(False):
            self._prefill_step(padded, num_sequences, num_sequences, num_entries)

    def compile(self, *, decode: bool, prefill: bool) -> None:
        """Run steps of padding of every size without capturing them: kernels are compiled then. Writes no KV."""
        if decode:
            self._decode.meta.clear()
            with self._compilation("decode, before graphs", self._walk_decode):
                self._decode.graphs.run_all()
        if prefill:
            self.warm_up_prefill()

    def warm_up_prefill(self) -> None:
        """Compile the prefill kernels with a step of padding alone. Writes no KV."""
        with torch.inference_mode(False):
            if self._prefill is None:
                tokens, sequences = WALKED_PROMPTS[-1]
                self._prefill_step(tokens, sequences, sequences, 0)
            with self._compilation("prefill", self._walk_prefill):
                meta = PrefillMeta.padding(PREFILL_STEP, self.device)
                self._prefill_step(PREFILL_STEP, 1, 1, 0).run(meta.step, rows=meta.rows, max_entries=1)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)

    def _walk_decode(self) -> None:
        """Launch a decode step of every size over few layers."""
        decode = self._decode
        step = replace(decode.step, parts=self._parts.representatives())
        for bucket in decode.graphs.buckets:
            decode.launch(bucket, step)

    def _walk_prefill(self) -> None:
        """Launch prefill steps of the kinds that real prompts make, of padding and over few layers."""
        assert self._prefill is not None
        step = replace(self._prefill, parts=self._parts.representatives())
        per_page = PAGE_TOKENS // LayerKind.C4.value
        for tokens, sequences in WALKED_PROMPTS:
            if any(n > had for n, had in zip((tokens, sequences, sequences), self._prefill_sizes[:3], strict=True)):
                continue
            for entries in (n for n in WALKED_ENTRIES if n <= self.num_pages * per_page):
                meta = PrefillMeta.padding(tokens, self.device, sequences, -(-entries // per_page))
                step.run(meta.step, rows=meta.rows, max_entries=entries)

    @contextmanager
    def _compilation(self, name: str, walk: Callable[[], object]) -> Iterator[None]:
        """Compiles what `walk` launches, then runs the block; logs how long that took, and Triton's part of it."""
        began = time.perf_counter()
        if self.device.type != "cuda":
            yield
            return
        from workers.kernels.compile_ahead import compile_ahead
        from workers.kernels.compile_clock import CompileClock

        with CompileClock() as clock:
            if walk not in self._walked:
                self._walked.append(walk)
                with compile_ahead():
                    walk()
            yield
        logger.info(
            "%s kernels=%d compiled=%d compiler_s=%.1f ready_s=%.1f",
            name,
            clock.kernels,
            clock.compiled,
            clock.seconds,
            time.perf_counter() - began,
        )

    def _prefill_step(self, num_tokens: int, num_rows: int, num_sequences: int, num_entries: int) -> Step:
        """Buffers for a step of this size; they grow and stay."""
        needed = (num_tokens, num_rows, num_sequences, num_entries)
        if self._prefill is not None and all(n <= had for n, had in zip(needed, self._prefill_sizes, strict=True)):
            return self._prefill
        # Entries grow with every chunk of a long prompt: by doubling, buffers are made anew only a few times.
        needed = (*needed[:3], 1 << max(10, (num_entries - 1).bit_length()))
        self._prefill_sizes = tuple(max(pair) for pair in zip(needed, self._prefill_sizes, strict=True))
        num_tokens, num_rows, num_sequences, num_entries = self._prefill_sizes
        # The old buffers go before the new ones come.
        self._prefill = None
        block = min(num_tokens, ATTENTION_BLOCK)
        sizes = StepSizes(num_tokens, block, self.num_pages, self.device, num_sequences, num_entries)
        made = self._make_step(self._make_prefill, sizes, num_rows, "prefill")
        self._prefill = replace(made, stream=self._expert_stream)
        return self._prefill


class _Decode:
    """Decode on the device: metadata, step, graphs, and the results on their way to the host."""

    def __init__(
        self, step: Step, sizes: StepSizes, *, use_graphs: bool | None, before: Callable[[], None] | None
    ) -> None:
        self.step = step
        self._before = before
        self.meta = DecodeMeta(sizes.num_tokens, sizes.num_pages, sizes.device)
        self.graphs = DecodeGraphs(self.launch, sizes.num_tokens, sizes.device, enabled=use_graphs)
        self.running = 0
        """Sequences of the last step."""
        self.steps_left = 0
        """Steps after the last one whose tokens lie in pages that the device's tables name."""
        pinned = sizes.device.type == "cuda"
        self._results = torch.empty(sizes.num_tokens, 2, dtype=torch.int32, pin_memory=pinned)
        self._ready = torch.cuda.Event() if pinned else None

    def launch(self, bucket: int, step: Step | None = None) -> None:
        """What a graph holds: the step, the greedy ids as the next step's tokens, the positions moved on.

        `step`: another one than the whole, to compile kernels.
        """
        meta, results = self.meta.bucket(bucket), self.step.buffers.view("results", bucket, 2)
        logits = (step or self.step).run(meta)
        self.step.kernels.sample_greedy(logits, meta.token_ids, results, positions=meta.positions)

    def replay(self) -> None:
        """Enqueue the step that the metadata describes, and its results' way to the host."""
        count = self.running
        bucket = self.graphs.bucket_of(count)
        if self._before is not None:
            self._before()
        self.graphs.replay(bucket)
        self._results[:count].copy_(self.step.buffers.view("results", count, 2), non_blocking=True)
        if self._ready is not None:
            self._ready.record()

    def greedy(self) -> tuple[list[int], list[bool]]:
        """As `GpuModel.greedy`."""
        if self._ready is not None:
            self._ready.synchronize()
        ids, finite = self._results[: self.running].T.tolist()
        return ids, [bool(flag) for flag in finite]


def _allocated_bytes(device: torch.device) -> int:
    """Device memory of live tensors; 0 on the CPU, where nobody counts."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _on_cpu(batch: ForwardBatch) -> ForwardBatch:
    """The batch in host memory, where ids and pages are checked and packed."""
    if batch.token_ids.device.type == "cpu":
        return batch
    fields = (getattr(batch, name) for name in ForwardBatch.__slots__)
    return ForwardBatch(*(tensor.cpu() for tensor in fields))
