"""Router of a decode step in one launch: logits, chosen experts, their weights, and the pairs grouped by expert.

Owns: the launch for several tokens. Does not own: products with the gate (`routing_product.py`), the choice of a
token's experts (`routing_choice.py`), routing of logits that are there (`routing.py`), of one token (`routing_one.py`).

The gate is small (2 MB at V4-Flash) and its product is over in less time than a launch takes, so one launch does all:
a program multiplies 16 experts by 512 columns for a few tokens, the last program of those tokens to arrive (a counter)
adds up the partial products and chooses, and the last of these groups the pairs of all tokens. Partial products are cut
at fixed columns and added in order, so a token's bits do not depend on its batch.

All programs let the next launch start as soon as they have waited for the one before: what that one wrote may be read
by the next launch ahead of its own wait, which is how the shared expert's weights stream while experts are chosen.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels import routing_one
from workers.kernels.launch import pdl_options
from workers.kernels.mhc import HyperConnection
from workers.kernels.mhc_gates import COMB_TOKENS, finish_comb, finish_comb_kernel
from workers.kernels.routing import PER_STEP, PER_TOKEN, Groups, route
from workers.kernels.routing_choice import choose, load_bias, load_logits, pairs_of, sort_pairs
from workers.kernels.routing_one import empty_parts, route_one
from workers.kernels.routing_product import BLOCK, EXPERTS, TOKENS, blocks_of_program, gate_product, gate_rows, splits

DECODE_TOKENS = 64
"""Most tokens whose pairs one program groups; beyond, `route` does it from the logits, in launches of its own."""

TILES = ((8, 2, 8), (DECODE_TOKENS, 8, DECODE_TOKENS))
"""(most tokens of the step, tokens of a program, tokens whose pairs are grouped): the first that holds the step.
Changes no result.
# measured (H200, 2026-11-21): 8 tokens 12.6 us by programs of 8, 9.2 of 4, 9.0 of 2; 64 tokens 18.9, 20.4, 24.7."""


class GateWork(NamedTuple):
    """Scratch of `gate_route`, shared by all layers."""

    parts: Tensor  # fp32, flat [columns / 512, T, E]: partial products
    arrived: Tensor  # int32 [1 + tiles of tokens], zero before and after
    one: Tensor  # of `routing_one.empty_parts`

    @classmethod
    def allocate(cls, tokens: int, num_experts: int, hidden: int, device: torch.device | str) -> GateWork:
        """For steps of up to `tokens` tokens."""
        parts = tokens * num_experts * splits(hidden)
        counters = torch.zeros(1 + tokens, dtype=torch.int32, device=device)
        one = empty_parts(num_experts, splits(hidden), device)
        return cls(torch.empty(parts, dtype=torch.float32, device=device), counters, one)


@triton.jit
def _group(ids, token_ids, groups, heat, num_tokens, K: tl.constexpr, PAIRS: tl.constexpr, HEAT: tl.constexpr):
    """The pairs of all tokens by expert. groups: num_active, active_experts, active_begin, pair_order."""
    num_active, active_experts, active_begin, pair_order = groups
    experts, counted = pairs_of(ids, token_ids, tl.zeros((), tl.int32), num_tokens, K, PAIRS)
    expert, local, real, first = sort_pairs(experts, counted, PAIRS)
    place = tl.arange(0, PAIRS)
    flags = first.to(tl.int32)
    slot = tl.cumsum(flags, 0) - 1
    tl.store(pair_order + place, local, mask=real)
    tl.store(active_experts + slot, expert, mask=first)
    tl.store(active_begin + slot, place, mask=first)
    total = tl.sum(flags, 0)
    tl.store(num_active, total)
    tl.store(active_begin + total, tl.sum(real.to(tl.int32), 0))
    if HEAT:
        tl.atomic_add(heat + expert, 1, mask=real if HEAT == PER_TOKEN else first, sem="relaxed")


@triton.jit(do_not_specialize=["num_tokens", "vocab"])
def gate_route_kernel(
    x, gate, logits, parts, arrived, chooser, token_ids, ids, weights,
    num_active, active_experts, active_begin, pair_order, heat, comb, num_tokens, vocab, scaling,
    X_STRIDE: tl.constexpr, D: tl.constexpr, KW: tl.constexpr, BE: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr, R: tl.constexpr, TILE: tl.constexpr,
    HASH: tl.constexpr, HEAT: tl.constexpr, ITERS: tl.constexpr, EPS: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (experts / BE * splits of D, T / R): R tokens of a program, `T <= TILE`; TILE 0: logits alone.

    With ITERS, the first dimension has one more program: it finishes COMB_TOKENS tokens of mHC.
    """
    SPLITS: tl.constexpr = D // (KW * 128)
    PROGRAMS: tl.constexpr = (E + BE - 1) // BE * SPLITS
    pid = tl.program_id(0)
    tile = tl.program_id(1)
    split, expert, rows, column = gate_rows(gate, pid, D, KW, BE, E)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if pid >= PROGRAMS:
        if ITERS > 0:  # noqa: SIM102 - decided by the compiler
            if tile * COMB_TOKENS < num_tokens:
                finish_comb(comb, tile * COMB_TOKENS, num_tokens, COMB_TOKENS, ITERS, EPS)
        return
    wide = tile * R + tl.arange(0, BT)
    live = (wide < num_tokens) & (wide < tile * R + R)
    value = tl.load(x + wide[None, :, None] * X_STRIDE + column, mask=live[None, :, None], other=0.0)
    part_stride = num_tokens * E
    to = parts + split * part_stride + wide[None, :] * E + expert[:, None]
    tl.store(to, gate_product(rows, value, BT, WIDEN), mask=(expert < E)[:, None] & live[None, :])
    token = tile * R + tl.arange(0, R)
    inside = token < num_tokens
    tl.debug_barrier()  # every thread's stores come before the counter's release
    if tl.atomic_add(arrived + 1 + tile, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1:
        tl.store(arrived + 1 + tile, 0)
        z = load_logits(parts, token, inside, part_stride, E, SPLITS)
        lane = tl.arange(0, 128)[None, :]
        for b in tl.static_range(len(z)):
            whole = logits + token[:, None] * E + (b * 128 + lane)
            tl.store(whole, z[b], mask=inside[:, None] & (lane < E - b * 128))
        if TILE > 0:
            groups = (num_active, active_experts, active_begin, pair_order)
            bias = load_bias(chooser, E, HASH)
            choose(z, bias, chooser, token_ids, ids, weights, token, inside, vocab, scaling, K, E, K, KP, HASH)
            tl.debug_barrier()
            if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(1) - 1:
                tl.store(arrived, 0)
                _group(ids, token_ids, groups, heat, num_tokens, K, TILE * KP, HEAT)


def gate_route(
    x: Tensor,
    gate: Tensor,
    logits: Tensor,
    chooser: Tensor,
    token_ids: Tensor,
    scaling: float,
    ids: Tensor,
    weights: Tensor,
    groups: Groups,
    *,
    work: GateWork,
    route_work: Tensor | None = None,
    heat: Tensor | None = None,
    per_token: bool = False,
    comb: tuple[Tensor, HyperConnection] | None = None,
    pdl: bool | None = None,
) -> None:
    """Router logits of T tokens and all that follows from them.

    Args:
        x: bf16 [T, D], rows of any stride.
        gate: bf16 [E, D].
        logits: fp32 [T, E], written.
        chooser, token_ids, scaling, ids, weights, groups, heat, per_token: as in `routing.route`.
        work: counters and partial products.
        route_work: `routing.route`'s `work`, for more than `DECODE_TOKENS` tokens.
        comb: fp32 [T, 16] of `mhc.hc_post_pre(finish=False)`, and its weights: finished by the way.
    """
    num_tokens, hidden = x.shape
    if x.stride(1) != 1 or hidden % BLOCK:
        raise ValueError(f"no router kernel for {hidden} columns of stride {x.stride(1)}")
    few = num_tokens <= DECODE_TOKENS
    if num_tokens == 1:
        operands = (x, gate, logits, work.one, chooser, token_ids, ids, weights)
        route_one(operands, groups, heat, per_token, scaling, comb, pdl)
    elif num_tokens:
        operands = (x, gate, logits, work.parts, work.arrived, chooser, token_ids, ids, weights)
        counter = (ids, 0) if heat is None else (heat, (PER_TOKEN if per_token else PER_STEP).value)
        _launch(operands, groups, counter, scaling, comb if few else None, few, pdl)
    if not few or not num_tokens:
        route(
            logits, chooser, token_ids, scaling, ids, weights, groups, heat=heat, per_token=per_token, work=route_work
        )
    if not few and comb is not None:
        matrices, hc = comb
        programs = triton.cdiv(num_tokens, COMB_TOKENS.value)
        constants = {"ITERS": hc.iters, "EPS": hc.eps, "num_warps": 1}
        finish_comb_kernel[(programs,)](matrices, num_tokens, **constants, **pdl_options(x, pdl))


def _launch(
    operands: tuple[Tensor, ...],
    groups: Groups,
    counter: tuple[Tensor, int],
    scaling: float,
    comb: tuple[Tensor, HyperConnection] | None,
    few: bool,
    pdl: bool | None,
) -> None:
    """operands: the kernel's first nine; counter: where uses are counted, and which (0: none); few: with the choice."""
    x, gate, chooser, ids = operands[0], operands[1], operands[5], operands[7]
    (num_tokens, hidden), num_experts, num_chosen = x.shape, gate.shape[0], ids.shape[1]
    blocks = blocks_of_program(hidden)
    _, rows, grouped = next(tile for tile in TILES if num_tokens <= tile[0] or tile is TILES[-1])
    programs = triton.cdiv(num_experts, EXPERTS) * splits(hidden)
    matrices, iters, eps = (ids, 0, 0.0) if comb is None else (comb[0], comb[1].iters, comb[1].eps)
    hashed = not chooser.dtype.is_floating_point
    lists = (groups.num_active, groups.active_experts, groups.active_begin, groups.pair_order)
    gate_route_kernel[(programs + (comb is not None), triton.cdiv(num_tokens, rows))](
        *(*operands, *lists, counter[0], matrices),
        *(num_tokens, chooser.shape[0] if hashed else 0, scaling),
        X_STRIDE=x.stride(0),
        D=hidden,
        KW=blocks,
        BE=EXPERTS,
        E=num_experts,
        K=num_chosen,
        KP=triton.next_power_of_2(num_chosen),
        BT=TOKENS,
        R=rows,
        TILE=grouped if few else 0,
        HASH=hashed,
        HEAT=counter[1],
        ITERS=iters,
        EPS=eps,
        WIDEN=not x.is_cuda,
        **_options(blocks),
        **pdl_options(x, pdl),
    )


def _options(blocks: int) -> dict[str, int]:
    """A warp a block of columns; 128 registers leave room for four programs a multiprocessor."""
    return {"num_warps": blocks, "maxnreg": 128}


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash, for the check that every architecture compiles."""
    ints = ("arrived", "token_ids", "ids", "num_active", "active_experts", "active_begin", "pair_order", "heat")
    types = {"x": "*bf16", "gate": "*bf16", **dict.fromkeys(("logits", "parts", "weights", "comb"), "*fp32")}
    types |= {**dict.fromkeys(ints, "*i32"), "num_tokens": "i32", "vocab": "i32", "scaling": "fp32"}
    sizes: dict[str, Any] = {
        "X_STRIDE": 4096,
        "D": 4096,
        "KW": 4,
        "BE": EXPERTS,
        "E": 256,
        "K": 6,
        "KP": 8,
        "BT": TOKENS,
    }
    sizes |= {"HEAT": PER_STEP.value, "ITERS": 20, "EPS": 1e-6, "WIDEN": False, "PDL": arch >= 90}
    launch = {"launch_pdl": True} if arch >= 90 else {}
    cases = []
    for hashed in (False, True):
        for name, rows, grouped in (("few", *TILES[0][1:]), ("many", *TILES[1][1:])):
            constants = sizes | {"R": rows, "TILE": grouped, "HASH": hashed}
            signature = types | {"chooser": "*i32" if hashed else "*fp32"}
            signature = {
                argument: signature[argument] for argument in gate_route_kernel.arg_names if argument in signature
            }
            name += " hash" * hashed
            cases.append((name, gate_route_kernel, signature, constants, _options(4) | launch))
    return cases + routing_one.compile_cases(arch)
