"""`run`: the one compiled function that Python calls, for a whole step or for a piece of one stage.

`EVERY_STAGE` takes the step through all layers and the head on the calling thread (decode). A single stage runs one
layer's part for a range of tokens or entries (prefill on several threads, with a barrier between stages). Tokens do not
influence each other within a stage, so neither tiles nor threads change a bit. It is one function because each entry
point compiled and cached its own copy of everything below it.
"""

from __future__ import annotations

from workers.cpu import tables as t
from workers.cpu.attend import attend_tile
from workers.cpu.compile import jit
from workers.cpu.compress import compress_tokens, store_rings
from workers.cpu.experts import experts_tile
from workers.cpu.project import project_tile
from workers.cpu.rows import ZERO, copy_row, linear
from workers.cpu.simd import i64_at
from workers.cpu.streams import NUM_STREAMS, collapse_streams, spread_output

EVERY_STAGE, EMBED_STAGE, PROJECT_STAGE, COMPRESS_STAGE, RING_STAGE, FINISH_STAGE, HEAD_STAGE = range(7)


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
def head_rows(model, real, scratch, lo, hi):
    """Logits of output rows [lo, hi)."""
    tokens, hidden, x = i64_at(model[t.LOGIT_TOKENS]), model[t.HIDDEN], scratch[t.X]
    step = model[t.LOGITS_STEP]
    for first in range(lo, hi, t.TILE):
        count = min(hi, first + t.TILE) - first
        for r in range(count):
            stream = model[t.STREAM] + tokens[first + r] * NUM_STREAMS * hidden * 4
            collapse_streams(model, real, stream, x + r * hidden * 4, scratch[t.MIX])
        out = model[t.LOGITS_OUT] + first * step
        linear(x, hidden * 4, model[t.HEAD], model[t.HEAD_ELEMENT], out, step, count, hidden, model[t.VOCAB])


@jit
def run(model, real, layers, scratch, stage, first_layer, last_layer, lo, hi):
    """`stage` for layers [first_layer, last_layer) and tokens, entries or output rows [lo, hi).

    With `EVERY_STAGE` the range is that of the tokens (all of them); entries and output rows come from the table.
    """
    every = stage == EVERY_STAGE
    if every or stage == EMBED_STAGE:
        embed_tokens(model, lo, hi)
    for index in range(first_layer, last_layer):
        layer = layers[index]
        if every or stage == PROJECT_STAGE:
            for first in range(lo, hi, t.TILE):
                project_tile(model, real, layer, scratch, first, min(hi, first + t.TILE))
        if layer[t.RATIO] != 0 and (every or stage == COMPRESS_STAGE):
            finished = model[t.NUM_FINISHED_4] if layer[t.RATIO] == 4 else model[t.NUM_FINISHED_128]
            compress_tokens(model, real, layer, scratch, ZERO if every else lo, finished if every else hi)
        if layer[t.RATIO] != 0 and (every or stage == RING_STAGE):
            store_rings(model, layer)
        if every or stage == FINISH_STAGE:
            for first in range(lo, hi, t.TILE):
                finish_tile(model, real, layer, scratch, first, min(hi, first + t.TILE))
    if every:
        head_rows(model, real, scratch, ZERO, model[t.NUM_LOGITS])
    elif stage == HEAD_STAGE:
        head_rows(model, real, scratch, lo, hi)
