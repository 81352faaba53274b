"""Router of the mixture of experts: chosen experts, their weights, and the (token, choice) pairs grouped by expert.

Owns: `route`, which begins with the gate's products, for prefill and decode steps of very many tokens. Does not own:
the choice of one token's experts (`routing_choice.py`), the router of a usual decode step (`routing_gate.py`).

Uses of each expert are counted per tile of tokens, the counts added up, and pairs sorted inside tiles. Only integers
meet across tokens, so ids and weights cannot depend on the batch.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import pdl_options
from workers.kernels.routing_choice import choose, load_bias, load_logits, pairs_of, sort_pairs

TILE_TOKENS = 32
"""Tokens of one program."""

SCAN_TILES = 256
"""Tiles that one step of the scan over tiles reads."""

SCAN_EXPERTS = 16


class Groups(Protocol):
    """(token, choice) pairs by expert, int32 on the device: pair = token * k + choice."""

    num_active: Tensor
    """[1] experts with at least one pair."""
    active_experts: Tensor
    """[min(T * k, E)] their ids, ascending."""
    active_begin: Tensor
    """[min(T * k, E) + 1] first place of each expert in `pair_order`; the entry after the last is the pair count."""
    pair_order: Tensor
    """[T * k] pairs, ascending inside an expert. Padding tokens (negative token id) have none."""


def work_words(num_tokens: int, num_experts: int) -> int:
    """int32 elements of `work` for prefill steps of up to `num_tokens` tokens."""
    return (triton.cdiv(num_tokens, TILE_TOKENS) + 1) * num_experts


# -- kernels ------------------------------------------------------------------------------------------------------


PER_STEP, PER_TOKEN = tl.constexpr(1), tl.constexpr(2)
"""What `heat` counts of an expert: steps that need it, or tokens that choose it."""


@triton.jit
def _store_groups(num_active, active_experts, active_begin, expert, counts, begin):
    """The list of experts in use. `expert`, `counts`, `begin`: blocks `[experts]`."""
    active = counts > 0
    flags = active.to(tl.int32)
    slot = tl.cumsum(flags, 0) - flags
    tl.store(active_experts + slot, expert, mask=active)
    tl.store(active_begin + slot, begin, mask=active)
    total = tl.sum(flags, 0)
    tl.store(num_active, total)
    tl.store(active_begin + total, tl.sum(counts, 0))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["num_tokens", "vocab"])
def choose_kernel(
    logits,
    chooser,
    token_ids,
    ids,
    weights,
    tile_counts,
    num_tokens,
    vocab,
    scaling,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    TILE: tl.constexpr,
    HASH: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / TILE): ids and weights; each tile's uses of each expert into `tile_counts [tiles, E]`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < num_tokens
    z = load_logits(logits, token, inside, 0, E, 1)
    bias = load_bias(chooser, E, HASH)
    choose(z, bias, chooser, token_ids, ids, weights, token, inside, vocab, scaling, K, E, K, KP, HASH)
    tl.debug_barrier()
    experts, counted = pairs_of(ids, token_ids, tile * TILE, tl.minimum(num_tokens, (tile + 1) * TILE), K, TILE * KP)
    counts = tl.histogram(experts, EP, mask=counted)
    expert = tl.arange(0, EP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(tile_counts + tile * E + expert, counts, mask=expert < E)


@triton.jit(do_not_specialize=["num_tiles"])
def scan_tiles_kernel(
    tile_counts,
    totals,
    heat,
    num_tiles,
    E: tl.constexpr,
    TILES: tl.constexpr,
    EXPERTS: tl.constexpr,
    HEAT: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (E / EXPERTS): counts become sums over earlier tiles; `totals [E]`."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    real = expert < E
    total = tl.zeros((EXPERTS,), tl.int32)
    start = tl.zeros((), tl.int32)
    while start < num_tiles:
        tile = start + tl.arange(0, TILES)
        inside = (tile < num_tiles)[:, None] & real[None, :]
        cell = tile_counts + tile[:, None] * E + expert[None, :]
        counts = tl.load(cell, mask=inside, other=0)
        tl.store(cell, tl.cumsum(counts, 0) - counts + total[None, :], mask=inside)
        total += tl.sum(counts, 0)
        start += TILES
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(totals + expert, total, mask=real)
    if HEAT:
        uses = total if HEAT == PER_TOKEN else (total > 0).to(tl.int32)
        tl.store(heat + expert, tl.load(heat + expert, mask=real, other=0) + uses, mask=real)


@triton.jit(do_not_specialize=["num_tokens"])
def order_kernel(
    token_ids,
    ids,
    tile_counts,
    totals,
    num_active,
    active_experts,
    active_begin,
    pair_order,
    num_tokens,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    KP: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (T / TILE): scatters the pairs of its tokens; the first program also lists the experts in use."""
    if PDL:
        tl.extra.cuda.gdc_wait()
    tile = tl.program_id(0)
    expert = tl.arange(0, EP)
    counts = tl.load(totals + expert, mask=expert < E, other=0)
    begin = tl.cumsum(counts, 0) - counts
    if tile == 0:
        _store_groups(num_active, active_experts, active_begin, expert, counts, begin)
    start = begin + tl.load(tile_counts + tile * E + expert, mask=expert < E, other=0)
    PAIRS: tl.constexpr = TILE * KP
    experts, counted = pairs_of(ids, token_ids, tile * TILE, tl.minimum(num_tokens, (tile + 1) * TILE), K, PAIRS)
    chosen, local, real, first = sort_pairs(experts, counted, PAIRS)
    place = tl.arange(0, PAIRS)
    run = tl.associative_scan(tl.where(first, place, 0), 0, _larger)
    target = tl.gather(start, tl.where(real, chosen, 0), 0) + place - run
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tl.store(pair_order + target, tile * TILE * K + local, mask=real)


# -- launchers ----------------------------------------------------------------------------------------------------


def route(
    logits: Tensor,
    chooser: Tensor,
    token_ids: Tensor,
    scaling: float,
    ids: Tensor,
    weights: Tensor,
    groups: Groups,
    *,
    heat: Tensor | None = None,
    per_token: bool = False,
    work: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """Chosen experts of T tokens and the groups of their pairs, in three launches.

    Args:
        logits: fp32 [T, E], the gate's products.
        chooser: fp32 [E] bias that only steers the choice, or int32 [V, k] experts by token id (hash layers).
        token_ids: int32 [T]; negative marks padding: routed, but in no group and in no `heat`.
        ids, weights: written; int32 and fp32 [T, k]. Weights sum to `scaling`.
        groups: written.
        heat: int32 [E], grows by one for each expert that the step needs; `per_token`: for each token that chose it.
        work: int32 [`work_words`]; allocated when None (not inside a graph).
    """
    num_tokens, num_experts = logits.shape
    if num_tokens == 0:
        groups.num_active.zero_()
        groups.active_begin.zero_()
        return
    if work is None:
        work = torch.empty(work_words(num_tokens, num_experts), dtype=torch.int32, device=logits.device)
    num_tiles = triton.cdiv(num_tokens, TILE_TOKENS)
    totals, tile_counts = work[:num_experts], work[num_experts:]
    hashed = not chooser.dtype.is_floating_point
    pow2, num_chosen = triton.next_power_of_2, ids.shape[1]
    shape: dict[str, Any] = {"E": num_experts, "EP": pow2(num_experts), "K": num_chosen, "KP": pow2(num_chosen)}
    shape |= {"TILE": TILE_TOKENS, "num_warps": _warps(8, TILE_TOKENS * shape["KP"]), **pdl_options(logits, pdl)}
    tokens = (num_tokens, chooser.shape[0] if hashed else 0, scaling)
    choose_kernel[(num_tiles,)](logits, chooser, token_ids, ids, weights, tile_counts, *tokens, HASH=hashed, **shape)
    scan_tiles_kernel[(triton.cdiv(num_experts, SCAN_EXPERTS),)](
        *(tile_counts, totals, ids if heat is None else heat, num_tiles),
        E=num_experts,
        TILES=SCAN_TILES,
        EXPERTS=SCAN_EXPERTS,
        HEAT=0 if heat is None else (PER_TOKEN if per_token else PER_STEP).value,
        num_warps=8,
        **pdl_options(logits, pdl),
    )
    lists = (groups.num_active, groups.active_experts, groups.active_begin, groups.pair_order)
    order_kernel[(num_tiles,)](token_ids, ids, tile_counts, totals, *lists, num_tokens, **shape)


def _warps(most: int, pairs: int) -> int:
    """No more threads than pairs: copies of a pair in several threads would be counted twice by a histogram."""
    return max(1, min(most, pairs // 32))


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash, for the check that every architecture compiles."""
    shape = {"E": 256, "EP": 256, "K": 6, "KP": 8, "PDL": arch >= 90}
    ints = ("chooser", "token_ids", "ids", "num_active", "active_experts", "active_begin", "pair_order", "heat")
    types = dict.fromkeys((*ints, "tile_counts", "totals"), "*i32")
    types |= {"logits": "*fp32", "weights": "*fp32", "scaling": "fp32"}
    types |= {"num_tokens": "i32", "num_tiles": "i32", "vocab": "i32"}

    def case(name: str, kernel: Any, warps: int, *, hashed: bool = False, **constexprs: Any) -> Any:
        names = [name for name in kernel.arg_names if name in types]
        signature = {name: types[name] for name in names}
        if "chooser" in signature and not hashed:
            signature["chooser"] = "*fp32"
        constants = {k: v for k, v in {**shape, "HASH": hashed, **constexprs}.items() if k in kernel.arg_names}
        return name, kernel, signature, constants, {"num_warps": warps}

    scan = {"TILES": SCAN_TILES, "EXPERTS": SCAN_EXPERTS}
    return [
        case("choose", choose_kernel, 8, TILE=TILE_TOKENS),
        case("choose hash", choose_kernel, 8, hashed=True, TILE=TILE_TOKENS),
        case("scan_tiles", scan_tiles_kernel, 8, HEAT=PER_STEP.value, **scan),
        case("order", order_kernel, 8, TILE=TILE_TOKENS),
    ]
