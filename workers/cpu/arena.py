"""Memory of the CPU path between and within stages: activations of a step, scratch of a thread."""

from __future__ import annotations

import numpy as np

from workers.cpu import tables as t
from workers.cpu.block_product import PANEL
from workers.cpu.panels import padded
from workers.cpu.simd import LANES
from workers.cpu.streams import NUM_STREAMS, TOKENS
from workers.model.config import LayerKind, ModelConfig


def aligned_zeros(num_bytes: int) -> np.ndarray:
    """uint8 zeros at a 64-byte boundary."""
    memory = np.zeros(num_bytes + 64, dtype=np.uint8)
    shift = -memory.ctypes.data % 64
    return memory[shift : shift + num_bytes]


class Activations:
    """Rows per token that outlive a stage: streams, gates, queries and raw compressor rows."""

    def __init__(self, config: ModelConfig) -> None:
        index_columns = config.index_n_heads * config.index_head_dim
        raw_columns = 4 * config.head_dim + 4 * config.index_head_dim + config.index_n_heads
        self._row_bytes = {
            t.STREAM: 4 * NUM_STREAMS * config.hidden_size,
            t.GATES: 4 * padded(NUM_STREAMS + NUM_STREAMS**2),
            t.QUERY: 4 * padded(config.num_attention_heads * config.head_dim + index_columns),
            t.RAW: 4 * padded(raw_columns),
        }
        self._capacity = 0
        self._memory: list[np.ndarray] = []

    def grow(self, num_tokens: int, table: np.ndarray) -> None:
        """Make room for a step of `num_tokens` and write the addresses into the model table."""
        if num_tokens <= self._capacity:
            return
        self._capacity = max(num_tokens, TOKENS)
        self._memory = []
        for place, row_bytes in self._row_bytes.items():
            self._memory.append(aligned_zeros(self._capacity * row_bytes))
            table[place] = self._memory[-1].ctypes.data
        table[t.GATES_STEP], table[t.QUERY_STEP] = self._row_bytes[t.GATES], self._row_bytes[t.QUERY]
        table[t.RAW_STEP] = self._row_bytes[t.RAW]


def make_scratch(config: ModelConfig, num_positions: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """One thread's scratch table for sequences up to `num_positions`, and the memory it points to."""
    c, tile = config, t.TILE
    queries = max(1, min(LANES, PANEL // c.index_n_heads)) * c.index_n_heads
    group = max(1, PANEL // c.num_attention_heads)
    head_columns = padded(group * c.num_attention_heads)
    num_entries = num_positions // LayerKind.C4.value + t.KEY_BLOCK
    most_rows = c.sliding_window + group + max(c.index_topk, num_positions // LayerKind.C128.value)
    inner = max(c.moe_intermediate_size, c.moe_intermediate_size * c.n_shared_experts)
    out_step = 4 * padded(c.hidden_size)
    low_step = 4 * (padded(c.o_groups * c.o_lora_rank) + LANES)
    pooled = 4 * padded(max(c.head_dim, c.index_head_dim))
    picks = tile * c.num_experts_per_tok
    sizes = {
        t.MIX: 4 * TOKENS * padded(NUM_STREAMS * (2 + NUM_STREAMS)),
        t.OLD_STREAMS: 4 * NUM_STREAMS * c.hidden_size,
        t.LANES_PRE: 4 * TOKENS * NUM_STREAMS,
        t.LANES_COMB: 4 * TOKENS * NUM_STREAMS**2,
        t.X: 4 * tile * c.hidden_size,
        t.XQ: 4 * tile * c.hidden_size,
        t.DOWN_OUT: 4 * tile * padded(c.q_lora_rank + c.head_dim),
        t.LATENT: 4 * tile * c.q_lora_rank,
        t.POOL_MAX: pooled,
        t.POOL_SUM: pooled,
        t.POOL_TOTAL: pooled,
        t.QUERY_PANELS: 4 * (head_columns * c.head_dim + padded(c.num_attention_heads)),
        t.WINDOW_LOGITS: 4 * (head_columns * (c.sliding_window + group) + padded(c.num_attention_heads)),
        t.INDEX_PANELS: 4 * padded(queries) * c.index_head_dim,
        t.WEIGHT_PANELS: 4 * queries * LANES,
        t.KEYS: 4 * t.KEY_BLOCK * c.index_head_dim,
        t.DOTS: 4 * t.KEY_BLOCK * padded(queries),
        t.SCORES: 4 * num_entries * LANES,
        t.ORDER: 4 * num_entries,
        t.CHOSEN_ROWS: 8 * tile * c.index_topk,
        t.CHOSEN_COUNTS: 8 * tile,
        t.ENTRIES: 4 * most_rows * padded(c.head_dim),
        t.LOGITS: 4 * most_rows * padded(c.num_attention_heads),
        t.PEAK: 4 * padded(c.num_attention_heads),
        t.TOTAL: 4 * padded(c.num_attention_heads),
        t.HEADS_OUT: 4 * tile * c.num_attention_heads * c.head_dim,
        t.HEAD_ROWS: 4 * c.num_attention_heads * padded(c.head_dim),
        t.LOW_RANK: tile * low_step,
        t.OUT: tile * out_step,
        t.ROUTE_LOGITS: 4 * tile * padded(c.n_routed_experts),
        t.ROUTE_IDS: 8 * picks,
        t.ROUTE_WEIGHTS: 4 * picks,
        t.EXPERT_IN: 4 * picks * c.hidden_size,
        t.EXPERT_HIDDEN: 4 * picks * padded(2 * inner),
        t.EXPERT_ACT: 4 * picks * inner,
        t.EXPERT_OUT: picks * out_step,
        t.EXPERT_ROWS: 8 * picks,
    }
    table = np.zeros(t.SCRATCH_SIZE, dtype=np.int64)
    owned = []
    for place, num_bytes in sizes.items():
        owned.append(aligned_zeros(num_bytes + 64))
        table[place] = owned[-1].ctypes.data
    table[t.LOW_RANK_STEP], table[t.OUT_STEP] = low_step, out_step
    return table, owned
