"""Routed FP4 experts and the shared expert's down projection at decode, straight from the checkpoint's bytes.

Owns: `expert_gate_up` and `expert_down` for few tokens per expert, and `quantise_rows`: the launches, and which form of
the kernels makes them. Does not own: the kernels (`experts_sm90.py`, and `experts_plain.py` for other GPUs, sizes and
the interpreter), routing, prefill. Reference: `workers/reference/moe.py`.

The forms sum in different orders, so which one serves depends on GPU and sizes alone, never on the batch. `hidden` and
`shared_hidden` between the two launches stand as the form likes it: in the plain one fake-quantised and in expert order
(`experts_plain.py`), in the other natural.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.experts.layout import ExpertShape, ExpertSlab
from workers.kernels import experts_hidden, experts_plain, experts_sm90
from workers.kernels.experts_plain import fake_quantised
from workers.kernels.formats import hardware_formats
from workers.kernels.launch import pdl_options
from workers.kernels.linear_decode import shared_gate_up

GROUP = 128
"""Columns that share one activation scale."""


@triton.jit
def _quantise_rows(x, out, K: tl.constexpr, HW: tl.constexpr, PDL: tl.constexpr):
    """Grid (T, K / 128)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * K + tl.program_id(1) * 128 + tl.arange(0, 128)[None, :]
    tl.store(out + at, fake_quantised(tl.load(x + at).to(tl.float32), 4, HW))


# -- launchers ----------------------------------------------------------------------------------------------------


def num_counters(num_tokens: int, choices: int, num_experts: int, inner: int) -> int:
    """int32 zeros that `expert_gate_up` needs. The plain form leaves them zero."""
    return max(min(num_tokens * choices, num_experts) * (inner // GROUP), experts_hidden.room(choices, inner))


def quantise_rows(x: Tensor, out: Tensor, *, pdl: bool | None = None) -> None:
    """`out [T, K] = dequant(quant(x))` in bf16 (exact), in expert order: e4m3, one power-of-two scale per 128."""
    tokens, width = x.shape
    if tokens:
        grid = (tokens, width // GROUP)
        _quantise_rows[grid](x, out, width, hardware_formats(x.device), num_warps=1, **pdl_options(x, pdl))


def expert_gate_up(
    x: Tensor,
    experts_x: Tensor,
    shared_w13: Any,
    ids: Tensor,
    weights: Tensor,
    groups: Any,
    slab: ExpertSlab,
    hidden: Tensor,
    limit: float,
    *,
    shared_hidden: Tensor,
    counters: Tensor,
    x_quantised: Tensor | None = None,
    pdl: bool | None = None,
) -> None:
    """`hidden [T, k, I]` bf16: clamped SwiGLU of w1 and w3 of the chosen experts times `weights`; `shared_hidden`
    bf16 `[T, I]`: the same of the shared expert, without a weight.

    `x [T, D]` bf16; `experts_x` the same fake-quantised and in expert order for the plain form. For the other one
    token's must be its coded row (`expert_codes.py`); more tokens it rounds itself, from `x`. `x_quantised`
    fake-quantised and in its own order, for many tokens. `shared_w13`: w1 | w3 of the shared expert, `codes [2I, D]`
    and `scales`. `ids` int32 and `weights` fp32 `[T, k]`; `groups` from `route`. `counters`: int32 zeros,
    `num_counters` many.
    """
    tokens, choices, inner = hidden.shape
    if not tokens:
        return
    if experts_sm90.serves(x.device, x.shape[1], inner):
        experts_sm90.gate_up(
            x, experts_x, shared_w13, weights, groups, slab, hidden, limit, shared_hidden, counters, pdl
        )
        return
    shared_gate_up(x, shared_w13, limit, shared_hidden, x_quantised=x_quantised, pdl=pdl)
    most = min(ids.numel(), slab.table.numel())
    experts_plain.gate_up_kernel[(2 * inner // experts_plain.ROWS, most + 1)](
        experts_x, weights, hidden, groups.num_active, groups.active_experts, groups.active_begin, groups.pair_order,
        slab.table, slab.base, _or_base(slab.host, slab), _or_base(slab.peer, slab),
        slab.first_scratch, slab.num_scratch, shared_hidden, counters, tokens, float(limit),
        D=x.shape[1], INNER=inner, CHOICES=choices, EXPERT_BYTES=ExpertShape(x.shape[1], inner).expert_bytes,
        E=triton.next_power_of_2(slab.table.numel()), N=experts_plain.TOKENS, HOST=slab.host is not None,
        PEER=slab.peer is not None, PACKED=x.is_cuda, HW=hardware_formats(x.device), **experts_plain.OPTIONS,
        **pdl_options(x, pdl),
    )  # fmt: skip


def expert_down(
    hidden: Tensor,
    shared_hidden: Tensor,
    shared_w2: Any,
    ids: Tensor,
    groups: Any,
    slab: ExpertSlab,
    out: Tensor,
    *,
    counters: Tensor,
    pdl: bool | None = None,
) -> None:
    """`out [T, k + 1, D]` bf16: w2 of the chosen experts, then the shared expert's, of fake-quantised inputs.

    `hidden [T, k, I]` and `shared_hidden [T, I]` as `expert_gate_up` leaves them; `shared_w2` has `codes [D, I]` (e4m3
    or uint8) and `scales` fp32 `[D/128, I/128]`.
    """
    tokens, choices, inner = hidden.shape
    if not tokens:
        return
    wide = out.shape[2]
    if experts_sm90.serves(hidden.device, wide, inner):
        experts_sm90.down(hidden, shared_hidden, shared_w2, groups, slab, out, counters, pdl)
        return
    most = min(ids.numel(), slab.table.numel())
    experts_plain.down_kernel[(wide // experts_plain.ROWS, 1 + most)](
        hidden, shared_hidden, shared_w2.codes.view(torch.uint8), shared_w2.scales, out, groups.num_active,
        groups.active_experts, groups.active_begin, groups.pair_order, slab.table, slab.base,
        _or_base(slab.host, slab), _or_base(slab.peer, slab), slab.first_scratch, slab.num_scratch, tokens,
        D=wide, INNER=inner, CHOICES=choices, EXPERT_BYTES=ExpertShape(wide, inner).expert_bytes,
        E=triton.next_power_of_2(slab.table.numel()), N=experts_plain.TOKENS, HOST=slab.host is not None,
        PEER=slab.peer is not None, PACKED=hidden.is_cuda, **experts_plain.OPTIONS,
        **pdl_options(hidden, pdl),
    )  # fmt: skip


def _or_base(tensor: Any, slab: ExpertSlab) -> Any:
    return slab.base if tensor is None else tensor


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations of V4-Flash for `arch`: name, function, signature, constants, options."""
    wide, inner, choices = 4096, 2048, 6
    common = {
        "D": wide, "INNER": inner, "CHOICES": choices, "EXPERT_BYTES": ExpertShape(wide, inner).expert_bytes,
        "E": 256, "N": experts_plain.TOKENS, "PACKED": True, "PDL": arch >= 90,
    }  # fmt: skip
    groups = dict.fromkeys(("num_active", "active_experts", "active_begin", "pair_order", "table"), "*i32")
    slab = dict.fromkeys(("base", "host", "peer"), "*u8") | {"first_scratch": "i32", "num_scratch": "i32"}
    cases = experts_sm90.compile_list() if arch == 90 else []
    for tiers in (False, True):
        name = "tiers" if tiers else "resident"
        both = {"HOST": tiers, "PEER": tiers}
        cases.append(
            (
                f"gate_up_{name}",
                experts_plain.gate_up_kernel,
                {"x": "*bf16", "routing": "*fp32", "hidden": "*bf16", "shared_hidden": "*bf16", "counters": "*i32"}
                | groups | slab | {"num_tokens": "i32", "limit": "fp32"},
                common | both | {"HW": arch >= 89},
                experts_plain.OPTIONS,
            )
        )  # fmt: skip
        cases.append(
            (
                f"down_{name}",
                experts_plain.down_kernel,
                {"hidden": "*bf16", "shared_hidden": "*bf16", "shared_codes": "*u8", "shared_scales": "*fp32"}
                | {"out": "*bf16", "num_tokens": "i32"} | groups | slab,
                common | both,
                experts_plain.OPTIONS,
            )
        )  # fmt: skip
    return cases
