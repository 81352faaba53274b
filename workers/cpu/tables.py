"""Places in the integer tables that the CPU kernels take instead of dozens of arguments.

Each argument of a kernel call costs time and numba takes no nested objects, so there are four flat tables: `model`
(int64: sizes, pools, the step's batch and activations), `real` (fp32 constants), `layer` (int64, one row per layer:
weight addresses), `scratch` (int64, one per thread). All addresses are of memory owned by `CpuModel`.
"""

from __future__ import annotations

TILE = 64
"""Tokens that a thread takes through one stage together: weights are read once per tile."""

KEY_BLOCK = 64
"""Indexer keys dequantised and scored together."""

# fmt: off
(
    # sizes, from ModelConfig
    HIDDEN, STREAMS, HEADS, HEAD_DIM, ROPE_DIM, Q_LORA, O_GROUPS, O_LORA, WINDOW, INDEX_HEADS, INDEX_DIM, TOPK,
    EXPERTS, CHOSEN, INNER, SHARED_INNER, VOCAB, SINKHORN_ITERS, KV_FP8, ACT_FP8, LAYERS,
    # pools: bytes of a unit, rows of a unit, bytes of a data row, offset of the scale plane, bytes of a scale row
    WINDOW_UNIT, WINDOW_ROWS, ENTRY_DATA, WINDOW_SCALES, ENTRY_SCALE,
    C4_UNIT, C4_ROWS, C4_SCALES, C128_UNIT, C128_ROWS, C128_SCALES,
    INDEX_UNIT, INDEX_ROWS, INDEX_DATA, INDEX_SCALES, INDEX_SCALE,
    C4_RING_UNIT, INDEX_RING_UNIT, C128_RING_UNIT,
    # the step's batch (addresses of int64 tensors; page tables have NUM_PAGES columns)
    NUM_TOKENS, NUM_PAGES, TOKEN_IDS, POSITIONS, SEQUENCES, CU_STARTS, FULL_PAGES, WINDOW_PAGES, SLOTS, START,
    ENDS, LOGIT_TOKENS, NUM_LOGITS, LOGITS_OUT, LOGITS_STEP, FINISHED_4, NUM_FINISHED_4, FINISHED_128, NUM_FINISHED_128,
    # rotation tables [position, rope/2]: plain, then compressed layers
    COS, SIN, COS_COMPRESSED, SIN_COMPRESSED,
    # activations of the step, one row per token, and their row bytes
    STREAM, GATES, GATES_STEP, QUERY, QUERY_STEP, RAW, RAW_STEP,
    EMBED, HEAD, HEAD_ELEMENT, NORM, HC_HEAD, HC_HEAD_ELEMENT, HC_HEAD_BASE, HC_HEAD_SCALE,
    FETCH_EXPERT,                               # function that brings an absent expert; 0 when none is absent
    ROUTES,                                     # uint16 [tokens, layers, chosen] to record into; 0 when nobody asks
    MODEL_SIZE,
) = range(81)

(NORM_EPS, HC_EPS, ROUTED_SCALING, SWIGLU_LIMIT, ATTENTION_SCALE, INDEX_SCALE_FACTOR, REAL_SIZE) = range(7)

(
    RATIO, HC_ATTN, HC_ATTN_ELEMENT, HC_ATTN_BASE, HC_ATTN_SCALE, ATTN_NORM,
    DOWN, DOWN_ELEMENT, Q_NORM, KV_NORM,        # [wq_a | wkv]
    UP, UP_ELEMENT, UP_COLUMNS,                 # [wq_b | indexer.wq_b]
    EXTRA, EXTRA_ELEMENT, EXTRA_COLUMNS,        # [compressor wkv | wgate | indexer wkv | wgate | weights_proj]
    APE, ENTRY_NORM, INDEX_APE, INDEX_NORM, SINK,
    WO_A, WO_A_ELEMENT, WO_A_STEP, WO_B, WO_B_ELEMENT,
    HC_FFN, HC_FFN_ELEMENT, HC_FFN_BASE, HC_FFN_SCALE, FFN_NORM,
    GATE, GATE_ELEMENT, GATE_BIAS, HASH_TABLE,
    EXPERT_HOMES,                               # int64 [experts]: address of [w1 | w3] panels, 0 while absent
    W13_ELEMENT, W2_ELEMENT, W2_OFFSET,         # w2 panels follow at this distance
    FIRST_PAIR,                                 # number of the layer's first (layer, expert) pair
    SHARED_13, SHARED_13_ELEMENT, SHARED_2, SHARED_2_ELEMENT,
    WINDOW_POOL, ENTRY_POOL, INDEX_POOL, RING_POOL, INDEX_RING_POOL,
    LAYER_SIZE,
) = range(50)

(
    MIX, OLD_STREAMS, LANES_PRE, LANES_COMB, X, XQ, DOWN_OUT, LATENT, POOL_MAX, POOL_SUM, POOL_TOTAL,
    QUERY_PANELS, WINDOW_LOGITS, INDEX_PANELS, WEIGHT_PANELS, KEYS, DOTS, SCORES, ORDER, CHOSEN_ROWS, CHOSEN_COUNTS,
    ENTRIES, LOGITS, PEAK, TOTAL, HEADS_OUT, HEAD_ROWS, LOW_RANK, LOW_RANK_STEP, OUT, OUT_STEP,
    ROUTE_LOGITS, ROUTE_IDS, ROUTE_WEIGHTS, EXPERT_IN, EXPERT_HIDDEN, EXPERT_ACT, EXPERT_OUT, EXPERT_ROWS,
    EXPERT_USES,                                # int64 [pairs]: tiles of this thread's tokens that used each expert
    THREAD,                                     # number of the thread, for what FETCH_EXPERT brings
    SCRATCH_SIZE,
) = range(42)
# fmt: on
