"""Router of one token: programs leave partial products where one program waits for them, which chooses the experts.

Owns: the kernel and its launch. Does not own: the products (`routing_product.py`), the choice (`routing_choice.py`),
steps of more tokens (`routing_gate.py`).

Nothing here counts arrivals: a place of `parts` that holds `EMPTY` has not been written, and the choosing program reads
all places until none does, then empties them for the next layer. So a partial product is seen one trip through memory
after it is stored, and no store has to be waited for before another says so. The choosing program is the launch's last:
by then all others have their places on the GPU, hence it waits for nobody who waits for room.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels.launch import pdl_options
from workers.kernels.mhc import HyperConnection
from workers.kernels.mhc_gates import COMB_TOKENS, finish_comb
from workers.kernels.routing import PER_STEP, PER_TOKEN, Groups
from workers.kernels.routing_choice import WIDTH, choose, load_bias
from workers.kernels.routing_product import EXPERTS, TOKENS, blocks_of_program, gate_product, gate_rows, splits

TURNS = 2
"""Times that the choosing program runs its code: first on zeros while it would wait for partial products, storing
nothing, so that what code it needs has been fetched.
# measured (H200, 2026-11-22, in a step of V4-Flash): lists are stored 6.8 us after the wait, 7.9 us with one turn."""

EMPTY = tl.constexpr(-1)
"""int32 of a place nobody has written: a NaN that no sum gives (theirs is 0x7fffffff)."""


def empty_parts(num_experts: int, num_splits: int, device: torch.device | str) -> Tensor:
    """`parts`: int32 [splits, E], the bits of fp32 partial products; `EMPTY` before and after a launch."""
    return torch.full((num_splits, num_experts), EMPTY.value, dtype=torch.int32, device=device)


@triton.jit
def _read(parts, E: tl.constexpr, SPLITS: tl.constexpr):
    """Blocks `[1, WIDTH]`, those of the first part first; past all caches that are not everybody's. And whether one of
    their places is empty."""
    lane = tl.arange(0, WIDTH)[None, :]
    found = ()
    most = tl.zeros((1, WIDTH), tl.uint32)  # nothing is above `EMPTY` without a sign
    for split in tl.static_range(SPLITS):
        for b in tl.static_range((E + WIDTH - 1) // WIDTH):
            at = parts + split * E + b * WIDTH + lane
            bits = tl.load(at, mask=lane < E - b * WIDTH, other=0, volatile=True)
            most = tl.maximum(most, bits.to(tl.uint32, bitcast=True))
            found = found + (bits,)
    return found, tl.max(tl.max(most, 1), 0).to(tl.int32, bitcast=True) == EMPTY


@triton.jit
def _unread(E: tl.constexpr, SPLITS: tl.constexpr):
    """What `_read` finds before the first time."""
    found = ()
    for _ in tl.static_range((E + WIDTH - 1) // WIDTH * SPLITS):
        found = found + (tl.zeros((1, WIDTH), tl.int32),)
    return found


@triton.jit
def _group_one(experts, token_ids, groups, heat, wanted, K: tl.constexpr, KP: tl.constexpr, HEAT: tl.constexpr):
    """The token's pairs by expert, by counting; stored if `wanted`. experts: `[KP]`; groups: num_active,
    active_experts, active_begin, pair_order."""
    num_active, active_experts, active_begin, pair_order = groups
    choice = tl.arange(0, KP)
    real = (choice < K) & (tl.load(token_ids) >= 0)
    keys = tl.where(real, experts, 0x7FFFFFFF)
    before = (keys[None, :] == keys[:, None]) & (choice[None, :] < choice[:, None])
    first = real & (tl.sum(before.to(tl.int32), 1) == 0)
    smaller = keys[None, :] < keys[:, None]
    place = tl.sum((smaller | before).to(tl.int32), 1)
    # Among distinct experts: where no earlier choice is the same.
    firsts = tl.where(first, keys, 0x7FFFFFFF)
    slot = tl.sum((firsts[None, :] < keys[:, None]).to(tl.int32), 1)
    tl.store(pair_order + place, choice, mask=real & wanted)
    tl.store(active_experts + slot, experts, mask=first & wanted)
    tl.store(active_begin + slot, place, mask=first & wanted)
    if HEAT:
        counted = real if HEAT == PER_TOKEN else first
        tl.atomic_add(heat + experts, 1, mask=counted & wanted, sem="relaxed")
    total = tl.sum(first.to(tl.int32), 0)
    tl.store(num_active, total, mask=wanted)
    tl.store(active_begin + total, tl.sum(real.to(tl.int32), 0), mask=wanted)


@triton.jit(do_not_specialize=["vocab", "rounds", "turns"])
def route_one_kernel(
    x, gate, logits, parts, chooser, token_ids, ids, weights,
    num_active, active_experts, active_begin, pair_order, heat, comb, vocab, scaling, rounds, turns,
    D: tl.constexpr, KW: tl.constexpr, BE: tl.constexpr, E: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    BT: tl.constexpr, HASH: tl.constexpr, HEAT: tl.constexpr, ITERS: tl.constexpr, EPS: tl.constexpr,
    WIDEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (experts / BE * splits of D, one that finishes mHC's matrix (if ITERS), one that chooses). The
    launch behind may start when one program has waited for the launch before: the last but one."""
    SPLITS: tl.constexpr = D // (KW * 128)
    PROGRAMS: tl.constexpr = (E + BE - 1) // BE * SPLITS
    pid = tl.program_id(0)
    if pid == PROGRAMS:
        if PDL:
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        if ITERS > 0:
            finish_comb(comb, 0, 1, COMB_TOKENS, ITERS, EPS)
        return
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    if pid < PROGRAMS:
        split, expert, rows, column = gate_rows(gate, pid, D, KW, BE, E)
        if PDL:
            tl.extra.cuda.gdc_wait()
        bits = gate_product(rows, tl.load(x + column), BT, WIDEN).to(tl.int32, bitcast=True)
        bits = tl.where(bits == EMPTY, 0x7FFFFFFF, bits)
        tl.store(parts + split * E + expert[:, None], bits, mask=(expert < E)[:, None])
    else:
        token = tl.zeros((1,), tl.int32)
        lane = tl.arange(0, WIDTH)[None, :]
        groups = (num_active, active_experts, active_begin, pair_order)
        bias = load_bias(chooser, E, HASH)
        for turn in range(turns):
            last = turn == turns - 1
            if PDL:  # noqa: SIM102 - decided by the compiler
                if last:
                    tl.extra.cuda.gdc_wait()
            found, empty = _unread(E, SPLITS), last
            while empty:
                found, empty = _read(parts, E, SPLITS)
            z = ()
            for b in tl.static_range((E + WIDTH - 1) // WIDTH):
                real = (lane < E - b * WIDTH) & last
                total = tl.zeros((1, WIDTH), tl.float32)
                for split in tl.static_range(SPLITS):
                    part = found[split * ((E + WIDTH - 1) // WIDTH) + b].to(tl.float32, bitcast=True)
                    total = part if split == 0 else total + part
                    tl.store(parts + split * E + b * WIDTH + lane, EMPTY, mask=real)
                tl.store(logits + b * WIDTH + lane, total, mask=real)
                z = z + (total,)
            wanted = token + turn == turns - 1
            experts = choose(
                z, bias, chooser, token_ids, ids, weights, token, wanted, vocab, scaling, rounds, E, K, KP, HASH
            )
            _group_one(tl.reshape(experts, (KP,)), token_ids, groups, heat, last, K, KP, HEAT)


def route_one(
    operands: tuple[Tensor, ...],
    groups: Groups,
    heat: Tensor | None,
    per_token: bool,
    scaling: float,
    comb: tuple[Tensor, HyperConnection] | None,
    pdl: bool | None,
) -> None:
    """`routing_gate.gate_route` of one token. operands: `x [1, D]`, `gate`, `logits`, `parts` of `empty_parts`,
    `chooser`, `token_ids`, `ids`, `weights`."""
    x, gate, chooser, ids = operands[0], operands[1], operands[4], operands[6]
    (num_experts, hidden), num_chosen = gate.shape, ids.shape[1]
    programs = triton.cdiv(num_experts, EXPERTS) * splits(hidden)
    matrix, iters, eps = (ids, 0, 0.0) if comb is None else (comb[0], comb[1].iters, comb[1].eps)
    hashed = not chooser.dtype.is_floating_point
    lists = (groups.num_active, groups.active_experts, groups.active_begin, groups.pair_order)
    route_one_kernel[(programs + 2,)](
        *(*operands, *lists, ids if heat is None else heat, matrix),
        *(chooser.shape[0] if hashed else 0, scaling, num_chosen, TURNS),
        D=hidden,
        KW=blocks_of_program(hidden),
        BE=EXPERTS,
        E=num_experts,
        K=num_chosen,
        KP=triton.next_power_of_2(num_chosen),
        BT=TOKENS,
        HASH=hashed,
        HEAT=0 if heat is None else (PER_TOKEN if per_token else PER_STEP).value,
        ITERS=iters,
        EPS=eps,
        WIDEN=not x.is_cuda,
        num_warps=1,
        **pdl_options(x, pdl),
    )


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """V4-Flash, for the check that every architecture compiles."""
    ints = ("parts", "token_ids", "ids", "num_active", "active_experts", "active_begin", "pair_order", "heat")
    types = {"x": "*bf16", "gate": "*bf16", **dict.fromkeys(("logits", "weights", "comb"), "*fp32")}
    types |= {**dict.fromkeys(ints, "*i32"), "vocab": "i32", "rounds": "i32", "turns": "i32", "scaling": "fp32"}
    sizes: dict[str, Any] = {"D": 4096, "KW": 4, "BE": EXPERTS, "E": 256, "K": 6, "KP": 8, "BT": TOKENS}
    sizes |= {"HEAT": PER_STEP.value, "ITERS": 20, "EPS": 1e-6, "WIDEN": False, "PDL": arch >= 90}
    options = {"num_warps": 1} | ({"launch_pdl": True} if arch >= 90 else {})
    cases = []
    for hashed in (False, True):
        signature = types | {"chooser": "*i32" if hashed else "*fp32"}
        signature = {name: signature[name] for name in route_one_kernel.arg_names if name in signature}
        constants = sizes | {"HASH": hashed}
        cases.append(("one hash" if hashed else "one", route_one_kernel, signature, constants, options))
    return cases
