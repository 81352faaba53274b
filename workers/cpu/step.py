"""Whole steps of the CPU path: the only functions called from Python.

`run_step` takes a step through every layer on one thread. `run_stage` runs one stage of one layer on a range of tokens
or entries, for prefill on several threads with a barrier between stages. Tokens do not influence each other within a
stage, so neither the cut into tiles nor the number of threads changes a bit.
"""

from __future__ import annotations

from workers.cpu import tables as t
from workers.cpu.attend import attend_tile
from workers.cpu.compile import jit
from workers.cpu.compress import compress_tokens, store_rings
from workers.cpu.experts import experts_tile
from workers.cpu.project import project_tile
from workers.cpu.rows import copy_row, linear
from workers.cpu.simd import i64_at
from workers.cpu.streams import NUM_STREAMS, collapse_streams, spread_output

EMBED_STAGE, PROJECT_STAGE, COMPRESS_STAGE, RING_STAGE, FINISH_STAGE = range(5)


@jit
def embed_tokens(model, lo, hi):
    """Four copies of each token's embedding into its streams."""
    hidden, ids = model[t.HIDDEN], i64_at(model[t.TOKEN_IDS])
    for token in range(lo, hi):
        for k in range(NUM_STREAMS):
            out = model[t.STREAM] + (token * NUM_STREAMS + k) * hidden * 4
            copy_row(model[t.EMBED] + ids[token] * hidden * 4, out, hidden)


@jit
def finish_tile(model, real, layer, scratch, lo, hi):
    """Attention and MoE sublayers of tokens [lo, hi) into their streams."""
    attend_tile(model, real, layer, scratch, lo, hi)
    spread_output(model, scratch, lo, hi)
    experts_tile(model, real, layer, scratch, lo, hi)
    spread_output(model, scratch, lo, hi)


@jit
def run_stage(model, real, layer, scratch, stage, lo, hi):
    """One stage for tokens [lo, hi), or for finished entries [lo, hi) in COMPRESS_STAGE."""
    if stage == EMBED_STAGE:
        embed_tokens(model, lo, hi)
    elif stage == COMPRESS_STAGE:
        compress_tokens(model, real, layer, scratch, lo, hi)
    elif stage == RING_STAGE:
        store_rings(model, layer)
    else:
        for first in range(lo, hi, t.TILE):
            if stage == PROJECT_STAGE:
                project_tile(model, real, layer, scratch, first, min(hi, first + t.TILE))
            else:
                finish_tile(model, real, layer, scratch, first, min(hi, first + t.TILE))


@jit
def run_step(model, real, layers, scratch):
    """All layers for all tokens of the step, on the calling thread."""
    tokens = model[t.NUM_TOKENS]
    embed_tokens(model, 0, tokens)
    for index in range(layers.shape[0]):
        layer = layers[index]
        run_stage(model, real, layer, scratch, PROJECT_STAGE, 0, tokens)
        if layer[t.RATIO] == 4:
            compress_tokens(model, real, layer, scratch, 0, model[t.NUM_FINISHED_4])
        elif layer[t.RATIO] == 128:
            compress_tokens(model, real, layer, scratch, 0, model[t.NUM_FINISHED_128])
        store_rings(model, layer)
        run_stage(model, real, layer, scratch, FINISH_STAGE, 0, tokens)


@jit
def run_head(model, real, scratch, rows, num_rows, logits, logits_step):
    """Logits of the tokens listed in `rows` (int64 address), one row of `logits_step` bytes each."""
    tokens, hidden = i64_at(rows), model[t.HIDDEN]
    x = scratch[t.X]
    for first in range(0, num_rows, t.TILE):
        count = min(t.TILE, num_rows - first)
        for r in range(count):
            stream = model[t.STREAM] + tokens[first + r] * NUM_STREAMS * hidden * 4
            collapse_streams(model, real, stream, x + r * hidden * 4, scratch[t.MIX])
        out = logits + first * logits_step
        linear(x, hidden * 4, model[t.HEAD], model[t.HEAD_ELEMENT], out, logits_step, count, hidden, model[t.VOCAB])
