"""Device code of routing: the experts of a block of tokens, and the (token, choice) pairs in expert order.

Owns: scores, choice and weights of tokens, and the order of pairs inside one program. Does not own: launches and the
lists over all tokens (`routing.py`). Definitions: `workers/reference/moe.py`. Ties go to the lower expert id.
"""

from __future__ import annotations

import triton
import triton.language as tl

TAKEN = tl.constexpr(-0x80000000)
"""Order key of an expert that is none, or was picked."""


@triton.jit
def router_score(z):
    """`sqrt(softplus(z))` in fp32; softplus(z) = z above 20, as in torch."""
    e = tl.exp(tl.minimum(z, 20.0))
    one_e = 1.0 + e
    # log1p: log(1 + e) times the relative error of the rounded sum (Higham, "Accuracy and Stability", problem 1.5).
    lost = one_e == 1.0
    log1p = tl.where(lost, e, tl.log(one_e) * (e / tl.where(lost, 1.0, one_e - 1.0)))
    return tl.sqrt_rn(tl.where(z > 20.0, z, log1p))


@triton.jit
def _order_key(x):
    """int32 in the order of fp32 `x` (no NaN, no -0); above `TAKEN` for all of them."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _chosen(logits, chooser, token_ids, token, inside, vocab, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, HASH):
    """K blocks `[tokens]` of expert ids."""
    chosen = ()
    if HASH:
        token_id = tl.load(token_ids + token, mask=inside, other=0)
        known = tl.minimum(tl.maximum(token_id, 0), vocab - 1).to(tl.int64)
        for c in tl.static_range(K):
            expert = tl.load(chooser + known * K + c, mask=inside, other=0)
            chosen = chosen + (tl.minimum(tl.maximum(expert, 0), E - 1),)
    else:
        # Blocks of 128 experts: a row then fits one warp, and a round of the search is two warp instructions.
        WIDTH: tl.constexpr = min(EP, 128)
        lane = tl.arange(0, WIDTH)[None, :]
        row = logits + token.to(tl.int64)[:, None] * E
        keys = ()
        for b in tl.static_range((E + WIDTH - 1) // WIDTH):
            expert = lane + b * WIDTH
            real = expert < E
            z = tl.load(row + expert, mask=inside[:, None] & real, other=0.0)
            biased = router_score(z) + tl.load(chooser + expert, mask=real, other=0.0)
            # NaN becomes a finite floor: every pick is a real expert.
            keys = keys + (tl.where(real, _order_key(tl.maximum(biased, -3.0e38)), TAKEN),)
        for _ in tl.static_range(K):
            best = keys[0]
            for b in tl.static_range(1, len(keys)):
                best = tl.maximum(best, keys[b])
            top = tl.max(best, 1)[:, None]
            expert = tl.where(keys[0] == top, lane, E)
            for b in tl.static_range(1, len(keys)):
                expert = tl.minimum(expert, tl.where(keys[b] == top, lane + b * WIDTH, E))
            pick = tl.min(expert, 1)
            left = ()
            for b in tl.static_range(len(keys)):
                left = left + (tl.where(lane + b * WIDTH == pick[:, None], TAKEN, keys[b]),)
            keys = left
            chosen = chosen + (pick,)
    return chosen


@triton.jit
def choose(
    logits,
    chooser,
    token_ids,
    ids,
    weights,
    token,
    num_tokens,
    vocab,
    scaling,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    HASH: tl.constexpr,
):
    """Writes ids and weights of a block of tokens."""
    inside = token < num_tokens
    chosen = _chosen(logits, chooser, token_ids, token, inside, vocab, E, EP, K, HASH)
    choice = tl.arange(0, KP)[None, :]
    experts = tl.broadcast_to(chosen[0][:, None], (token.shape[0], KP))
    for c in tl.static_range(1, K):
        experts = tl.where(choice == c, chosen[c][:, None], experts)
    wanted = inside[:, None] & (choice < K)
    pair = token[:, None] * K + choice
    score = router_score(tl.load(logits + token.to(tl.int64)[:, None] * E + experts, mask=wanted, other=0.0))
    # Column by column: the order of a reduction over a block depends on its layout, and so on its height.
    total = tl.sum(tl.where(choice == 0, score, 0.0), 1)
    for c in tl.static_range(1, K):
        total += tl.sum(tl.where(choice == c, score, 0.0), 1)
    tl.store(ids + pair, experts, mask=wanted)
    tl.store(weights + pair, score / total[:, None] * scaling, mask=wanted)


@triton.jit
def pairs_of(ids, token_ids, first_token, num_tokens, K: tl.constexpr, PAIRS: tl.constexpr):
    """Experts of the pairs from a token on, `[PAIRS]`, and which of them count.

    Read back from memory, where this program or an earlier launch wrote them. NOTE: flattening the block of choices
    would save the round trip, but leaves a layout with gaps between its lanes, over which Triton 3.6 adds up wrongly.
    """
    local = tl.arange(0, PAIRS)
    token = first_token + local // K
    inside = token < num_tokens
    expert = tl.load(ids + first_token.to(tl.int64) * K + local, mask=inside, other=0)
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
