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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvstore.pools.aggregate import KVPools
from workers.batch import ForwardBatch
from workers.gpu.buffers import Activations, DecodeMeta, PrefillMeta, check_batch
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
from workers.gpu.step import Step, StepParts
from workers.gpu.weights import GpuWeights, unsupported_shape
from workers.model.config import PAGE_TOKENS, LayerKind, ModelConfig
from workers.model.precision import Precision
from workers.ops import LogitsFor

logger = logging.getLogger(__name__)

ATTENTION_BLOCK = 4096
"""Prefill tokens that go through attention at a time: 40,960 bf16 columns of queries each at Flash's size, 335 MB."""

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
    ) -> None:
        """Allocates decode buffers; kernels are compiled and graphs captured at `warm_up` or at first use.

        Args:
            max_running: sequences of the largest decode step, by default the pools' slots.
            max_context: tokens of the longest sequence, by default what the model and the pools can hold.
            kernels: what makes the ops of decode and of prefill.
            use_graphs: capture decode steps; by default on CUDA.
        """
        self.config, self.weights, self.pools, self.device = config, weights, pools, pools.device
        self.max_running = max_running or pools.sizes.slots
        longest = min(max_context or config.max_position_embeddings, pools.sizes.full_pages * PAGE_TOKENS)
        self.num_pages = -(-longest // PAGE_TOKENS)
        make_decode, self._make_prefill = kernels
        ropes = RopeTables.build(config, self.num_pages * PAGE_TOKENS, self.device)
        self._parts = StepParts.of(config, weights, ropes, pools)
        self._meta = DecodeMeta(self.max_running, self.num_pages, self.device)
        buffers = Activations(
            config,
            num_tokens=self.max_running,
            block=self.max_running,
            num_rows=self.max_running,
            device=self.device,
        )
        sizes = StepSizes(self.max_running, self.max_running, self.num_pages, self.device)
        self._decode = Step(self._parts, make_decode(config, sizes), buffers)
        self._graphs = DecodeGraphs(self._launch_bucket, self.max_running, self.device, enabled=use_graphs)
        self._prefill: Step | None = None
        self._running = 0
        pinned = self.device.type == "cuda"
        self._results = torch.empty(2, self.max_running, dtype=torch.int32, pin_memory=pinned)
        self._ready = torch.cuda.Event() if pinned else None
        logger.info(
            "model on %s: weights_bytes=%d decode_buffers_bytes=%d pool_bytes=%d max_running=%d max_context=%d",
            self.device,
            weights.nbytes,
            buffers.nbytes,
            pools.nbytes,
            self.max_running,
            self.num_pages * PAGE_TOKENS,
        )

    # -- decode -------------------------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compile the decode kernels and capture every bucket. Writes no KV."""
        self._meta.clear()
        self._graphs.capture_all()

    def decode(self, batch: ForwardBatch) -> Tensor:
        """One token of each sequence: fp32 logits [B, V] on the device, valid until the next step."""
        self.start(batch)
        return self.logits()

    def start(self, batch: ForwardBatch) -> None:
        """Enqueue a decode step of any composition. Raises ValueError for ids, pages or slots that do not exist."""
        batch = _on_cpu(batch)
        if int(batch.num_new.max()) != 1 or batch.num_sequences > self.max_running:
            raise ValueError(f"decode takes one token of each of at most {self.max_running} sequences")
        check_batch(batch, self.config, self.pools.sizes, self.num_pages)
        self._meta.load(batch)
        self._running = batch.num_sequences
        self._replay()

    def start_next(self, token_ids: np.ndarray | None = None) -> None:
        """Enqueue the step after the last one, same sequences and pages.

        `token_ids` int [B]: the tokens to run; None takes the last step's greedy choice, which is on the device.
        """
        if token_ids is not None:
            if len(token_ids) != self._running or token_ids.min() < 0 or token_ids.max() >= self.config.vocab_size:
                raise ValueError(f"{len(token_ids)} token ids of a batch of {self._running}, in [0, vocabulary)")
            self._meta.load_tokens(token_ids)
        self._replay()

    def logits(self) -> Tensor:
        """fp32 [B, V] of the last step, valid until the next one is started."""
        return self._decode.buffers.view("logits", self._running, self.config.vocab_size)

    def greedy(self) -> tuple[list[int], list[bool]]:
        """The best id of each row of the last step, lowest among equals, and whether its logits are finite. Waits."""
        if self._ready is not None:
            self._ready.synchronize()
        ids, finite = self._results[:, : self._running].tolist()
        return ids, [bool(flag) for flag in finite]

    def _replay(self) -> None:
        bucket = self._graphs.bucket_of(self._running)
        self._graphs.replay(bucket)
        count = self._running
        self._results[0, :count].copy_(self._meta.bucket(bucket).token_ids[:count], non_blocking=True)
        self._results[1, :count].copy_(self._decode.buffers.view("finite", count), non_blocking=True)
        if self._ready is not None:
            self._ready.record()

    def _launch_bucket(self, bucket: int) -> None:
        """What a graph holds: the step, the greedy ids as the next step's tokens, the positions moved on."""
        meta = self._meta.bucket(bucket)
        logits = self._decode.run(meta)
        finite = self._decode.buffers.view("finite", bucket)
        self._decode.kernels.sample_greedy(logits, meta.token_ids, finite, positions=meta.positions)

    def launches(self, batch: ForwardBatch) -> list[Launch]:
        """Every launch of the decode step of `batch`, in order, to be called one by one (for benchmarks)."""
        batch, recorder = _on_cpu(batch), Recorder()
        check_batch(batch, self.config, self.pools.sizes, self.num_pages)
        self._meta.load(batch)
        step = Step(self._parts, recorded(self._decode.kernels, recorder), self._decode.buffers, recorder)
        step.run(self._meta.bucket(self._graphs.bucket_of(batch.num_sequences)))
        return recorder.launches

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
        # Tensors made in inference mode could not be written outside it later.
        with torch.inference_mode(False):
            step = self._prefill_step(padded, padded if every else batch.num_sequences)
            meta = PrefillMeta(batch, padded, self.device)
        entries = int((batch.start + batch.num_new).max()) // LayerKind.C4.value
        return step, meta, {"rows": None if every else meta.rows, "max_entries": entries}

    def _prefill_step(self, num_tokens: int, num_rows: int) -> Step:
        """Buffers for a step of this size; they grow and stay."""
        step = self._prefill
        if step is not None and step.buffers.num_tokens >= num_tokens and step.buffers.num_rows >= num_rows:
            return step
        if step is not None:
            num_tokens = max(num_tokens, step.buffers.num_tokens)
            num_rows = max(num_rows, step.buffers.num_rows)
        self._prefill = step = None
        began = time.perf_counter()
        block = min(num_tokens, ATTENTION_BLOCK)
        buffers = Activations(self.config, num_tokens=num_tokens, block=block, num_rows=num_rows, device=self.device)
        kernels = self._make_prefill(self.config, StepSizes(num_tokens, block, self.num_pages, self.device))
        step = Step(self._parts, kernels, buffers)
        logger.info(
            "prefill buffers: tokens=%d rows=%d bytes=%d seconds=%.2f",
            num_tokens,
            num_rows,
            buffers.nbytes,
            time.perf_counter() - began,
        )
        self._prefill = step
        return step


def _on_cpu(batch: ForwardBatch) -> ForwardBatch:
    """The batch in host memory, where ids and pages are checked and packed."""
    if batch.token_ids.device.type == "cpu":
        return batch
    fields = (getattr(batch, name) for name in ForwardBatch.__slots__)
    return ForwardBatch(*(tensor.cpu() for tensor in fields))
