"""`CpuModel`: the numba path of the paged transformer, same inputs and outputs as the reference.

Floor and prediction (written before the first measurement, dsv4-nano, one core with AVX-512): a token multiplies 8.5 M
weights; at the 100+ GFMA/s of the product loop that is 0.08 ms, and reading 17 MB of bf16 weights from L3 at 50-80 GB/s
is 0.3 ms, shared by a batch. Attention over 192 rows in 8 layers is 0.1 ms a token, mHC and norms 0.05 ms. Prediction:
1.0 ms a step at batch 1, 2.5 ms at batch 8; prefill 5,000 tokens/s a core, where eager torch pays about 5 us for each
of some 4,000 operations a step.

# measured: AMD EPYC (Zen 5, AVX-512), 2026-11-21, one thread, context 600, best of 400 steps, cores shared with other
work: 0.38-0.43 ms a step at batch 1, 1.85-2.4 ms at batch 8; prefill of 1,024 tokens 168 ms (6,090 tokens/s), and 4,200
tokens/s at position 7,000. Eight lanes (AVX2 code, same machine): 4.0 ms at batch 8, prefill 3,030 tokens/s. What
missed the prediction at first: experts in bf16 (19 MB) fell out of the caches, they are e2m1 codes now; products with
one vector of outputs waited for their own sums, they take 8 rows at a time now.

Memory: packed weights (half a byte or 2 bytes a weight where exact), activations of the largest step seen, one scratch
per thread.
"""

from __future__ import annotations

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from kvstore.pools.aggregate import KVPools
from kvstore.spec import PoolName
from workers.batch import ForwardBatch, check_batch
from workers.cpu import step as steps
from workers.cpu import tables as t
from workers.cpu.arena import Activations, make_scratch
from workers.cpu.expert_cache import CpuExperts
from workers.cpu.packing import PackedWeights
from workers.cpu.panels import padded
from workers.experts.supply import ExpertSupply
from workers.model.config import LayerKind, ModelConfig
from workers.model.precision import Precision
from workers.model.weights import ModelWeights
from workers.ops import LogitsFor
from workers.reference.norm_rope import rope_cos_sin

FIRST_POSITIONS = 4096
"""Rows of the first rotation tables; they double when a longer position comes."""


def unsupported_reason(config: ModelConfig, precision: Precision, pools: KVPools) -> str | None:
    """Why this path cannot run a model, or `None` when it can."""
    if config.hc_mult != 4:
        return f"hc_mult {config.hc_mult} is not 4"
    formats = (precision.kv_fp8, precision.indexer, pools.spec.fmt)
    if formats not in ((True, "fp8", "fp8"), (False, "fp32", "fp32")):
        return f"no CPU kernels for {precision} over {pools.spec.fmt} pools"
    if pools.device.type != "cpu":
        return f"pools are on {pools.device}"
    return None


class CpuModel:
    """One model over one set of pools. Not thread-safe; `num_threads` threads share each prefill step."""

    def __init__(
        self,
        config: ModelConfig,
        weights: ModelWeights,
        precision: Precision,
        pools: KVPools,
        num_threads: int | None = None,
        *,
        supply: ExpertSupply | None = None,
    ) -> None:
        """`supply`: where routed experts come from when `weights` do not hold them (theirs are meta tensors then).

        Raises ValueError for a model without kernels, and what `CpuExperts` raises.
        """
        reason = unsupported_reason(config, precision, pools)
        if reason is not None:
            raise ValueError(reason)
        self.config, self.pools = config, pools
        self.packed = PackedWeights(config, weights)
        self.num_threads = num_threads or torch.get_num_threads()
        self._table = np.zeros(t.MODEL_SIZE, dtype=np.int64)
        pairs = config.num_hidden_layers * config.n_routed_experts
        self._uses = np.zeros((self.num_threads, pairs), dtype=np.int64)
        self.experts = None if supply is None else CpuExperts(config, supply, num_threads=self.num_threads)
        if self.experts is not None:
            self.experts.attach(self._table, self.packed.layers)
        self._real = np.array(
            [
                config.rms_norm_eps,
                config.hc_eps,
                config.routed_scaling_factor,
                config.swiglu_limit,
                config.head_dim**-0.5,
                config.index_head_dim**-0.5 * config.index_n_heads**-0.5,
            ],
            dtype=np.float32,
        )
        self._fill_sizes(precision)
        self._fill_pools()
        self._activations = Activations(config)
        self._positions = 0
        self._scratch: list[np.ndarray] = []
        self._routes: np.ndarray | None = None
        self._owned: list[list[np.ndarray]] = []
        self._threads = ThreadPoolExecutor(self.num_threads) if self.num_threads > 1 else None

    def _fill_sizes(self, precision: Precision) -> None:
        c, table = self.config, self._table
        sizes = {
            t.HIDDEN: c.hidden_size,
            t.STREAMS: c.hc_mult,
            t.HEADS: c.num_attention_heads,
            t.HEAD_DIM: c.head_dim,
            t.ROPE_DIM: c.qk_rope_head_dim,
            t.Q_LORA: c.q_lora_rank,
            t.O_GROUPS: c.o_groups,
            t.O_LORA: c.o_lora_rank,
            t.WINDOW: c.sliding_window,
            t.INDEX_HEADS: c.index_n_heads,
            t.INDEX_DIM: c.index_head_dim,
            t.TOPK: c.index_topk,
            t.EXPERTS: c.n_routed_experts,
            t.CHOSEN: c.num_experts_per_tok,
            t.INNER: c.moe_intermediate_size,
            t.SHARED_INNER: c.moe_intermediate_size * c.n_shared_experts,
            t.VOCAB: c.vocab_size,
            t.SINKHORN_ITERS: c.hc_sinkhorn_iters,
            t.KV_FP8: int(precision.kv_fp8),
            t.ACT_FP8: int(precision.act_fp8),
            t.LAYERS: c.num_hidden_layers,
        }
        for place, value in (sizes | self.packed.top).items():
            table[place] = value

    def _fill_pools(self) -> None:
        """Geometry of the pools, and where each layer's part of them begins."""
        places = {
            PoolName.WINDOW: (t.WINDOW_UNIT, t.WINDOW_ROWS, t.WINDOW_SCALES, t.WINDOW_POOL),
            PoolName.C4: (t.C4_UNIT, t.C4_ROWS, t.C4_SCALES, t.ENTRY_POOL),
            PoolName.C128: (t.C128_UNIT, t.C128_ROWS, t.C128_SCALES, t.ENTRY_POOL),
            PoolName.C4_INDEXER: (t.INDEX_UNIT, t.INDEX_ROWS, t.INDEX_SCALES, t.INDEX_POOL),
            PoolName.C4_STATE: (t.C4_RING_UNIT, None, None, t.RING_POOL),
            PoolName.C4_INDEXER_STATE: (t.INDEX_RING_UNIT, None, None, t.INDEX_RING_POOL),
            PoolName.C128_STATE: (t.C128_RING_UNIT, None, None, t.RING_POOL),
        }
        for name, (unit, rows, scales, base) in places.items():
            spec, pool = self.pools.spec.pool(name), self.pools.pool(name)
            self._table[unit] = spec.unit_stride_bytes
            if rows is not None and scales is not None:
                self._table[rows], self._table[scales] = spec.rows_per_unit, spec.plane_offset(1)
            for layer in spec.layers:
                self.packed.layers[layer, base] = pool.data[pool.layer_index(layer)].data_ptr()
        entry, index = self.pools.spec.pool(PoolName.WINDOW), self.pools.spec.pool(PoolName.C4_INDEXER)
        self._table[t.ENTRY_DATA], self._table[t.INDEX_DATA] = entry.planes[0].row_bytes, index.planes[0].row_bytes
        self._table[t.ENTRY_SCALE] = sum(plane.row_bytes for plane in entry.planes[1:])
        self._table[t.INDEX_SCALE] = sum(plane.row_bytes for plane in index.planes[1:])

    def _grow(self, num_tokens: int, num_positions: int) -> None:
        """Activations, rotation tables and scratch for a step of this size."""
        self._activations.grow(num_tokens, self._table)
        if num_positions <= self._positions:
            return
        size = max(self._positions, FIRST_POSITIONS)
        while size < num_positions:
            size *= 2
        kinds = ((LayerKind.SLIDING, t.COS, t.SIN), (LayerKind.C4, t.COS_COMPRESSED, t.SIN_COMPRESSED))
        self._rope = []
        for kind, cos_place, sin_place in kinds:
            for place, tensor in zip(
                (cos_place, sin_place), rope_cos_sin(self.config, kind, torch.arange(size)), strict=True
            ):
                kept = tensor.contiguous()
                self._rope.append(kept)
                self._table[place] = kept.data_ptr()
        pairs = [make_scratch(self.config, size) for _ in range(self.num_threads)]
        for thread, (table, _) in enumerate(pairs):
            table[t.THREAD], table[t.EXPERT_USES] = thread, self._uses[thread].ctypes.data
        self._scratch, self._owned = [table for table, _ in pairs], [owned for _, owned in pairs]
        self._positions = size

    def _bind(self, batch: ForwardBatch, rows: torch.Tensor, logits: torch.Tensor) -> list[object]:
        """Point the table at this step's batch and outputs; returns what must stay alive during the step."""
        table = self._table
        ends = batch.start + batch.num_new
        positions = batch.positions.numpy()
        places = {
            t.TOKEN_IDS: batch.token_ids,
            t.POSITIONS: batch.positions,
            t.SEQUENCES: batch.sequence_of_token,
            t.CU_STARTS: batch.cu_starts,
            t.FULL_PAGES: batch.full_pages,
            t.WINDOW_PAGES: batch.window_pages,
            t.SLOTS: batch.slots,
            t.START: batch.start,
            t.ENDS: ends,
            t.LOGIT_TOKENS: rows,
            t.LOGITS_OUT: logits,
        }
        for place, tensor in places.items():
            table[place] = tensor.data_ptr()
        table[t.NUM_TOKENS], table[t.NUM_PAGES] = batch.num_tokens, batch.full_pages.shape[1]
        table[t.NUM_LOGITS], table[t.LOGITS_STEP] = len(rows), logits.stride(0) * 4
        finished = [np.flatnonzero((positions + 1) % ratio == 0) for ratio in (4, 128)]
        table[t.FINISHED_4], table[t.NUM_FINISHED_4] = finished[0].ctypes.data, len(finished[0])
        table[t.FINISHED_128], table[t.NUM_FINISHED_128] = finished[1].ctypes.data, len(finished[1])
        return [ends, *finished]

    def forward(self, batch: ForwardBatch, logits_for: LogitsFor = "last") -> torch.Tensor:
        """As `Transformer.forward`. Raises ValueError for ids and pages that kernels would follow out of memory.

        Raises `ExpertUnavailable` when an expert could not be read: the step's KV is worthless then, too.
        """
        check_batch(batch, self.config, self.pools.sizes)
        tokens = batch.num_tokens
        self._grow(tokens, int(batch.positions.max()) + 1)
        if self._routes is not None and len(self._routes) < tokens:
            raise ValueError(f"a step of {tokens} tokens, room for the routes of {len(self._routes)}")
        rows = torch.arange(tokens) if logits_for == "all" else batch.last_token_rows.contiguous()
        logits = torch.empty(len(rows), padded(self.config.vocab_size))
        kept = self._bind(batch, rows, logits)
        began = time.perf_counter()
        if self._threads is not None and tokens >= 2 * t.TILE:
            self._run_threads(tokens, len(rows))
        else:
            self._run(self._scratch[0], steps.EVERY_STAGE, 0, self.config.num_hidden_layers, 0, tokens)
        del kept
        if self.experts is not None:
            prefills = tokens > batch.num_sequences
            self.experts.end_step(self._uses, time.perf_counter() - began, prefills=prefills)
        return logits[:, : self.config.vocab_size]

    def decode(self, batch: ForwardBatch) -> torch.Tensor:
        """As `Transformer.decode`."""
        return self.forward(batch)

    def record_routes(self, routes: np.ndarray | None) -> None:
        """Steps from now on write each token's choices to the first rows of `routes` uint16 [>= T, L, k]; None ends it.

        Raises ValueError for another form, as do steps of more tokens than there are rows.
        """
        shape = (self.config.num_hidden_layers, self.config.num_experts_per_tok)
        if routes is not None and (routes.dtype != np.uint16 or routes.shape[1:] != shape):
            raise ValueError(f"routes must be uint16 [tokens, {shape[0]}, {shape[1]}]")
        self._routes = routes
        self._table[t.ROUTES] = 0 if routes is None else routes.ctypes.data

    def _run(self, scratch: np.ndarray, stage: int, first: int, last: int, lo: int, hi: int) -> None:
        steps.run(self._table, self._real, self.packed.layers, scratch, stage, first, last, lo, hi)

    def _run_threads(self, num_tokens: int, num_rows: int) -> None:
        """All layers, each stage cut into pieces that the threads take as they become free."""
        self._stage(0, steps.EMBED_STAGE, num_tokens, t.TILE)
        for index, layer in enumerate(self.packed.layers):
            self._stage(index, steps.PROJECT_STAGE, num_tokens, t.TILE)
            if layer[t.RATIO]:
                four = layer[t.RATIO] == 4
                count = int(self._table[t.NUM_FINISHED_4 if four else t.NUM_FINISHED_128])
                self._stage(index, steps.COMPRESS_STAGE, count, t.TILE if four else 2)
                self._stage(index, steps.RING_STAGE, 1, 1)
            self._stage(index, steps.FINISH_STAGE, num_tokens, t.TILE)
        self._stage(0, steps.HEAD_STAGE, num_rows, t.TILE)

    def _stage(self, index: int, stage: int, count: int, piece: int) -> None:
        """Run pieces of [0, count) on all threads; returns when all are done. Raises what a thread raised."""
        starts = itertools.count(0, piece)

        def work(scratch: np.ndarray) -> None:
            while (lo := next(starts)) < count:
                self._run(scratch, stage, index, index + 1, lo, min(count, lo + piece))

        if count <= piece or self._threads is None:
            work(self._scratch[0])
            return
        for future in [self._threads.submit(work, scratch) for scratch in self._scratch]:
            future.result()
