"""Device code of routing: the experts of a block of tokens, and the (token, choice) pairs in expert order.

Owns: scores, choice and weights of tokens, and the order of pairs inside one program. Does not own: launches and the
lists over all tokens (`routing.py`, `routing_gate.py`). Definitions: `workers/reference/moe.py`. Ties go to the lower
expert id.
"""

from __future__ import annotations

import triton
import triton.language as tl

TAKEN = tl.constexpr(-0x80000000)
"""Order key of an expert that is none, or was picked."""

WIDTH = tl.constexpr(128)
"""Experts of a block: a row then fits one warp, and a round of the search is two warp instructions."""


@triton.jit
def router_score(z):
    """`sqrt(softplus(z))` in fp32; softplus(z) = z above 20, as in torch."""
    e = tl.exp(tl.minimum(z, 20.0))
    one_e = 1.0 + e
    # log1p: log(1 + e) times the relative error of the rounded sum (Higham, "Accuracy and Stability", problem 1.5).
    lost = one_e == 1.0
    log1p = tl.where(lost, e, tl.log(one_e) * (e / tl.where(lost, 1.0, one_e - 1.0)))
    return tl.sqrt(tl.where(z > 20.0, z, log1p))


@triton.jit
def _order_key(x):
    """int32 in the order of fp32 `x` (no NaN, no -0); above `TAKEN` for all of them."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(blocks):
    """Largest number of each row of several blocks, `[tokens]`."""
    best = blocks[0]
    for b in tl.static_range(1, len(blocks)):
        best = tl.maximum(best, blocks[b])
    return tl.max(best, 1)


@triton.jit
def load_logits(logits, token, inside, part_stride, E: tl.constexpr, PARTS: tl.constexpr):
    """Logits of a block of tokens, a tuple of blocks `[tokens, WIDTH]`: the sum of PARTS rows, `part_stride` apart, in
    order. Read past L1: other programs of the launch may have written them."""
    lane = tl.arange(0, WIDTH)[None, :]
    row = logits + token.to(tl.int64)[:, None] * E
    blocks = ()
    for b in tl.static_range((E + WIDTH - 1) // WIDTH):
        real = inside[:, None] & (lane < E - b * WIDTH)
        at = row + (b * WIDTH + lane)
        z = tl.load(at, mask=real, other=0.0, cache_modifier=".cg")
        for part in tl.static_range(1, PARTS):
            z += tl.load(at + part * part_stride, mask=real, other=0.0, cache_modifier=".cg")
        blocks = blocks + (z,)
    return blocks


@triton.jit
def load_bias(chooser, E: tl.constexpr, HASH: tl.constexpr):
    """The bias that steers the choice, a tuple of blocks `[1, WIDTH]`; nothing where a table chooses."""
    lane = tl.arange(0, WIDTH)[None, :]
    blocks = ()
    if not HASH:
        for b in tl.static_range((E + WIDTH - 1) // WIDTH):
            blocks = blocks + (tl.load(chooser + b * WIDTH + lane, mask=lane < E - b * WIDTH, other=0.0),)
    return blocks


@triton.jit
def _order_keys(scores, bias, E: tl.constexpr):
    """Order keys of score plus bias, blocks `[tokens, WIDTH]`. scores: int32 bits of fp32."""
    lane = tl.arange(0, WIDTH)[None, :]
    keys = ()
    for b in tl.static_range(len(scores)):
        real = lane < E - b * WIDTH
        biased = scores[b].to(tl.float32, bitcast=True) + bias[b]
        # NaN becomes a finite floor: every pick is a real expert.
        keys = keys + (tl.where(real, _order_key(tl.maximum(biased, -3.0e38)), TAKEN),)
    return keys


@triton.jit
def _best(keys, E: tl.constexpr):
    """Expert with the largest key, the lowest of equals, `[tokens]`; and the keys without it."""
    lane = tl.arange(0, WIDTH)[None, :]
    top = _largest(keys)[:, None]
    expert = tl.where(keys[0] == top, lane, E)
    for b in tl.static_range(1, len(keys)):
        expert = tl.minimum(expert, tl.where(keys[b] == top, lane + b * WIDTH, E))
    pick = tl.min(expert, 1)
    left = ()
    for b in tl.static_range(len(keys)):
        left = left + (tl.where(lane + b * WIDTH == pick[:, None], TAKEN, keys[b]),)
    return pick, left


@triton.jit
def choose(
    logits,
    bias,
    chooser,
    token_ids,
    ids,
    weights,
    token,
    inside,
    vocab,
    scaling,
    rounds,
    E: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    HASH: tl.constexpr,
):
    """Writes ids and weights of a block of tokens; also returns the experts, `[tokens, KP]`.

    logits: of `load_logits`; bias: of `load_bias`. rounds: K; as an argument of the kernel it keeps the compiler from a
    copy of the loop for each choice: code that runs once a launch has to be fetched first.
    """
    lane = tl.arange(0, WIDTH)[None, :]
    choice = tl.arange(0, KP)[None, :]
    scores = ()
    for b in tl.static_range(len(logits)):  # never negative, so that their bits have their order; NaN above all
        scores = scores + (router_score(logits[b]).to(tl.int32, bitcast=True) & 0x7FFFFFFF,)
    experts = tl.zeros((token.shape[0], KP), tl.int32)
    if HASH:
        token_id = tl.load(token_ids + token, mask=inside, other=0)
        known = tl.minimum(tl.maximum(token_id, 0), vocab - 1).to(tl.int64)
        experts = tl.load(chooser + known[:, None] * K + choice, mask=inside[:, None] & (choice < K), other=0)
        experts = tl.minimum(tl.maximum(experts, 0), E - 1)
        keys = scores
    else:
        keys = _order_keys(scores, bias, E)
    factors = tl.zeros((token.shape[0], KP), tl.float32)
    total = tl.zeros((token.shape[0],), tl.float32)
    for c in range(rounds):
        if HASH:
            pick = tl.max(tl.where(choice == c, experts, 0), 1)
        else:
            pick, keys = _best(keys, E)
            experts = tl.where(choice == c, pick[:, None], experts)
        mine = ()
        for b in tl.static_range(len(scores)):
            mine = mine + (tl.where(lane + b * WIDTH == pick[:, None], scores[b], 0),)
        score = _largest(mine).to(tl.float32, bitcast=True)
        # Choice by choice: the order of a reduction over a block depends on its layout, and so on its height.
        total += score
        factors = tl.where(choice == c, score[:, None], factors)
    wanted = inside[:, None] & (choice < K)
    pair = token[:, None] * K + choice
    tl.store(ids + pair, experts, mask=wanted)
    tl.store(weights + pair, factors / total[:, None] * scaling, mask=wanted)
    return experts


@triton.jit
def pairs_of(ids, token_ids, first_token, num_tokens, K: tl.constexpr, PAIRS: tl.constexpr):
    """Experts of the pairs from a token on, `[PAIRS]`, and which of them count.

    Read back from memory, past L1: this launch or an earlier one wrote them. NOTE: flattening the block of choices
    would save the round trip, but leaves a layout with gaps between its lanes, over which Triton 3.6 adds up wrongly.
    """
    local = tl.arange(0, PAIRS)
    token = first_token + local // K
    inside = token < num_tokens
    expert = tl.load(ids + first_token.to(tl.int64) * K + local, mask=inside, other=0, cache_modifier=".cg")
    return expert, inside & (tl.load(token_ids + token, mask=inside, other=-1) >= 0)


@triton.jit
def sort_pairs(experts, counted, PAIRS: tl.constexpr):
    """Pairs by (expert, pair), those that do not count last: expert and pair of each place, whether it is one, whether
    its expert begins there."""
    place = tl.arange(0, PAIRS)
    key = tl.sort(tl.where(counted, experts * PAIRS + place, 0x7FFFFFFF))
    real = key != 0x7FFFFFFF
    expert = key // PAIRS
    before = tl.gather(expert, tl.maximum(place - 1, 0), 0)
    return expert, key % PAIRS, real, real & ((place == 0) | (expert != before))
