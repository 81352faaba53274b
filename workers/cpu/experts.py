"""The MoE sublayer on a tile of tokens: routing, then each expert once over the tokens that chose it.

The shared expert comes first, routed experts follow in ascending id, so a token's sum has one order in any batch. An
expert that is absent from memory is fetched when its turn comes; the same product reads it from wherever it was put.
"""

from __future__ import annotations

from workers.cpu import tables as t
from workers.cpu.compile import jit
from workers.cpu.compress import LOWEST
from workers.cpu.rows import F0, F1, ONE, ZERO, copy_row, linear, round_activations, sqrt_softplus, swiglu
from workers.cpu.simd import LANES, f32_at, fetch, i32_at, i64_at, u16_at
from workers.cpu.streams import mix_streams


@jit
def choose_experts(scores, bias, ids, experts, chosen):
    """The `chosen` experts with the largest score + bias (ties to the lower id) to `ids` (int64)."""
    s, b, out = f32_at(scores), f32_at(bias), i64_at(ids)
    for k in range(chosen):
        best, top = 0, LOWEST
        for e in range(experts):
            taken = False
            for j in range(k):
                taken = taken or out[j] == e
            if not taken and s[e] + b[e] > top:
                best, top = e, s[e] + b[e]
        out[k] = best


@jit
def route_tile(model, real, layer, scratch, lo, hi):
    """Expert ids and weights of tokens [lo, hi) to scratch ROUTE_IDS and ROUTE_WEIGHTS."""
    experts, chosen, hidden = model[t.EXPERTS], model[t.CHOSEN], model[t.HIDDEN]
    step = (experts + LANES - 1) // LANES * LANES * 4
    logits, x = scratch[t.ROUTE_LOGITS], scratch[t.X]
    linear(x, hidden * 4, layer[t.GATE], layer[t.GATE_ELEMENT], logits, step, hi - lo, hidden, experts)
    for r in range(hi - lo):
        scores, ids = f32_at(logits + r * step), i64_at(scratch[t.ROUTE_IDS] + r * chosen * 8)
        for e in range(experts):
            scores[e] = sqrt_softplus(scores[e])
        if layer[t.HASH_TABLE] != 0:
            token_id = min(max(i64_at(model[t.TOKEN_IDS])[lo + r], 0), model[t.VOCAB] - 1)
            table = i32_at(layer[t.HASH_TABLE] + token_id * chosen * 4)
            for k in range(chosen):
                ids[k] = table[k]
        else:
            choose_experts(
                logits + r * step, layer[t.GATE_BIAS], scratch[t.ROUTE_IDS] + r * chosen * 8, experts, chosen
            )
        weights, total = f32_at(scratch[t.ROUTE_WEIGHTS] + r * chosen * 4), F0
        for k in range(chosen):
            total += scores[ids[k]]
        for k in range(chosen):
            weights[k] = scores[ids[k]] / total * real[t.ROUTED_SCALING]
        if model[t.ROUTES] != 0:
            place = (lo + r) * model[t.LAYERS] + layer[t.FIRST_PAIR] // experts
            routes = u16_at(model[t.ROUTES] + place * chosen * 2)
            for k in range(chosen):
                routes[k] = ids[k]


@jit
def run_expert(model, real, scratch, rows, w13, element13, w2, element2, inner, count, out, out_step, weighted):
    """SwiGLU expert on `count` contiguous rows; with `weighted`, row r takes the routing weight of pick r."""
    hidden, limit, quantise = model[t.HIDDEN], real[t.SWIGLU_LIMIT], model[t.ACT_FP8] != 0
    step = (2 * inner + LANES - 1) // LANES * LANES * 4
    both, act = scratch[t.EXPERT_HIDDEN], scratch[t.EXPERT_ACT]
    linear(rows, hidden * 4, w13, element13, both, step, count, hidden, 2 * inner)
    picks, weights = i64_at(scratch[t.EXPERT_ROWS]), f32_at(scratch[t.ROUTE_WEIGHTS])
    for r in range(count):
        gate, target = both + r * step, act + r * inner * 4
        weight = weights[picks[r]] if weighted != 0 else F1
        swiglu(gate, gate + inner * 4, target, inner, limit, weight)
        if quantise:
            round_activations(target, target, inner)
    linear(act, inner * 4, w2, element2, out, out_step, count, inner, hidden)


@jit
def add_row(x, out, size):
    """`out += x`."""
    source, target = f32_at(x), f32_at(out)
    for i in range(size):
        target[i] += source[i]


@jit
def run_routed(model, real, layer, scratch, count):
    """Add every chosen expert's output to scratch OUT, experts in ascending id."""
    hidden, chosen, inner = model[t.HIDDEN], model[t.CHOSEN], model[t.INNER]
    ids, picks = i64_at(scratch[t.ROUTE_IDS]), i64_at(scratch[t.EXPERT_ROWS])
    step, gathered, result = scratch[t.OUT_STEP], scratch[t.EXPERT_IN], scratch[t.EXPERT_OUT]
    homes, uses = i64_at(layer[t.EXPERT_HOMES]), i64_at(scratch[t.EXPERT_USES] + layer[t.FIRST_PAIR] * 8)
    for expert in range(model[t.EXPERTS]):
        n = ZERO
        for i in range(count * chosen):
            if ids[i] == expert:
                picks[n] = i
                copy_row(scratch[t.XQ] + (i // chosen) * hidden * 4, gathered + n * hidden * 4, hidden)
                n += 1
        if n == 0:
            continue
        uses[expert] += 1
        w13 = homes[expert]
        if w13 == 0:
            w13 = fetch(model[t.FETCH_EXPERT], layer[t.FIRST_PAIR] + expert, scratch[t.THREAD])
            if w13 == 0:  # it failed: whoever launched the step knows, and throws its result away
                continue
        w2, e13, e2 = w13 + layer[t.W2_OFFSET], layer[t.W13_ELEMENT], layer[t.W2_ELEMENT]
        run_expert(model, real, scratch, gathered, w13, e13, w2, e2, inner, n, result, step, ONE)
        for j in range(n):
            add_row(result + j * step, scratch[t.OUT] + (picks[j] // chosen) * step, hidden)


@jit
def experts_tile(model, real, layer, scratch, lo, hi):
    """MoE sublayer of tokens [lo, hi): mHC input, routing and experts; output to scratch OUT."""
    fn, element = layer[t.HC_FFN], layer[t.HC_FFN_ELEMENT]
    base, scale = layer[t.HC_FFN_BASE], layer[t.HC_FFN_SCALE]
    mix_streams(model, real, scratch, fn, element, base, scale, layer[t.FFN_NORM], lo, hi)
    route_tile(model, real, layer, scratch, lo, hi)
    hidden, x, xq = model[t.HIDDEN], scratch[t.X], scratch[t.XQ]
    for r in range(hi - lo):
        if model[t.ACT_FP8] != 0:
            round_activations(x + r * hidden * 4, xq + r * hidden * 4, hidden)
        else:
            copy_row(x + r * hidden * 4, xq + r * hidden * 4, hidden)
    w13, w2, inner = layer[t.SHARED_13], layer[t.SHARED_2], model[t.SHARED_INNER]
    e13, e2, count = layer[t.SHARED_13_ELEMENT], layer[t.SHARED_2_ELEMENT], hi - lo
    run_expert(model, real, scratch, xq, w13, e13, w2, e2, inner, count, scratch[t.OUT], scratch[t.OUT_STEP], ZERO)
    run_routed(model, real, layer, scratch, hi - lo)
