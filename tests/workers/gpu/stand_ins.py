"""Torch stand-ins for the kernels, with their signatures, made of `workers/reference`.

They test the plumbing of a step (operands, buffers, metadata, order) apart from the kernels: activations between ops
are rounded to bf16 as the buffers are, everything else is the reference's arithmetic in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.expert_bytes import matrix_of
from workers.experts.layout import ExpertShape, ExpertSlab
from workers.gpu.buffers import CompressorTensors, Groups, StepMeta
from workers.gpu.kernel_set import KernelSet, StepSizes
from workers.gpu.weights import Fp8Weight, HyperConnection
from workers.model.config import ModelConfig
from workers.reference import kv_format, mhc
from workers.reference.compressor import compress_finish, compress_pool
from workers.reference.indexer import hadamard, index_scores, select_topk
from workers.reference.linear import grouped_linear as grouped
from workers.reference.moe import swiglu
from workers.reference.norm_rope import apply_rope, rms_norm
from workers.reference.quant import fp8_block_dequant, fp8_fake_quant, indexer_fp8_fake_quant
from workers.reference.sparse_attention import sparse_attention as attend

PAGE, WINDOW, ROPE = 256, 128, 64


def _rounded(x: Tensor) -> Tensor:
    """fp32 `x` through e4m3; a test that wants no roundings replaces this function."""
    return fp8_fake_quant(x.float(), 128)


def _fp8(weight: Fp8Weight) -> Tensor:
    return fp8_block_dequant(weight.codes, weight.scales)


def _rope(table: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    return table[positions.clamp(min=0).long()].chunk(2, dim=-1)


def _rows(pool: Tensor, units: Tensor, offsets: Tensor, rows_per_unit: int, planes: tuple[int, ...]) -> Tensor:
    """Rows [n, sum of planes] of a block-split pool."""
    parts, base = [], 0
    for width in planes:
        view = pool[:, base : base + rows_per_unit * width].unflatten(1, (rows_per_unit, width))
        parts.append(view[units.long(), offsets.long()])
        base += rows_per_unit * width
    return torch.cat(parts, dim=-1)


def _store(pool: Tensor, units: Tensor, offsets: Tensor, rows_per_unit: int, planes: tuple[int, ...], rows: Tensor):
    base = start = 0
    for width in planes:
        view = pool[:, base : base + rows_per_unit * width].unflatten(1, (rows_per_unit, width))
        view[units.long(), offsets.long()] = rows[..., start : start + width]
        base, start = base + rows_per_unit * width, start + width


def _entry_planes(head_dim: int) -> tuple[int, int]:
    scales = -(-((head_dim - ROPE) // 64) // 8) * 8
    return kv_format.kv_data_bytes(head_dim, ROPE), scales


def embed_streams(token_ids: Tensor, embed: Tensor, streams: Tensor) -> None:
    rows = embed[token_ids.clamp(min=0).long()].masked_fill(token_ids[:, None] < 0, 0.0)
    streams.copy_(rows[:, None].expand_as(streams))


def _pre(streams: Tensor, hc: HyperConnection, norm: Tensor, x: Tensor, post: Tensor, comb: Tensor, rounded) -> None:
    mixed, gates, matrix = mhc.hc_pre(
        streams.float(), hc.fn, hc.base, hc.scale, iters=hc.iters, eps=hc.eps, norm_eps=hc.norm_eps
    )
    x.copy_(rms_norm(mixed, norm, hc.norm_eps))
    post.copy_(gates)
    comb.copy_(matrix.flatten(-2))
    if rounded is not None:
        rounded.copy_(_rounded(x))


def hc_pre(streams, hc, norm_weight, x, post, comb, *, x_quantised) -> None:
    _pre(streams, hc, norm_weight, x, post, comb, x_quantised)


def _post(sub_out: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return mhc.hc_post(sub_out.float().sum(1), streams.float(), post, comb.unflatten(-1, (4, 4)))


def hc_post_pre(sub_out, streams, post, comb, hc, norm_weight, x, *, x_quantised, x_experts=None) -> None:
    streams.copy_(_post(sub_out, streams, post, comb))
    _pre(streams, hc, norm_weight, x, post, comb, x_quantised)
    if x_experts is not None:
        x_experts.copy_(x_quantised)


def hc_post_head(sub_out, streams, post, comb, hc, norm_weight, rows, x) -> None:
    final = _post(sub_out, streams, post, comb)
    final = final if rows is None else final[rows.long()]
    collapsed = mhc.hc_head(final, hc.fn, hc.base, hc.scale, eps=hc.eps, norm_eps=hc.norm_eps)
    x.copy_(rms_norm(collapsed, norm_weight, hc.norm_eps))


def project_x(x, x_fp8, x_bf16, out_fp8, out_bf16, *, x_quantised, between) -> None:
    out_fp8.copy_(_rounded(x) @ _fp8(x_fp8).T)
    if out_bf16 is not None:
        out_bf16.copy_(x.float() @ x_bf16.float().T)


def linear(x, weight, out, *, act_fp8=True, norm=None) -> None:
    if norm is not None:
        x = rms_norm(x.float(), *norm)
    out.copy_((_rounded(x) if act_fp8 else x.float()) @ _fp8(weight).T)


def grouped_linear(x, weight, out) -> None:
    groups = x.shape[1]
    out.copy_(grouped(x.float(), _fp8(weight).unflatten(0, (groups, -1))).flatten(1))


def head(x, weight, out) -> None:
    out.copy_(x.float() @ weight.float().T)


def store_and_compress(
    out_fp8, q_norm, kv_norm, rope_table, meta: StepMeta, window_pool, latent, *, rows, main, index, eps, between
) -> None:
    _store_window(out_fp8, q_norm, kv_norm, rope_table, meta, window_pool, latent, eps)
    if rows is not None:
        _compress(rows, meta, main, rope_table, eps, 4 if index is not None else 128, False)
    if index is not None:
        _compress(rows[:, 4 * main.norm.shape[0] :], meta, index, rope_table, eps, 4, True)


def _store_window(out_fp8, q_norm, kv_norm, rope_table, meta: StepMeta, window_pool, latent, eps) -> None:
    lora, head_dim = q_norm.shape[0], kv_norm.shape[0]
    if latent is not None:
        latent.copy_(rms_norm(out_fp8[:, :lora].float(), q_norm, eps))
    live = meta.positions >= 0
    positions, sequence = meta.positions[live].long(), meta.sequence_of_token[live].long()
    kv = rms_norm(out_fp8[live, lora:].float(), kv_norm, eps)
    kv = apply_rope(kv, *_rope(rope_table, positions))
    pages = meta.window_pages[sequence, positions // PAGE]
    rows = kv_format.pack_kv_fp8(kv, ROPE)
    _store(window_pool, pages, positions % PAGE, PAGE, _entry_planes(head_dim), rows)


def _compress(rows: Tensor, meta: StepMeta, c: CompressorTensors, table, eps, ratio: int, index: bool) -> None:
    """As `PagedAttention._compress`, one token after the other."""
    ring, head_dim = {4: 8, 128: 128}[ratio], c.norm.shape[0]
    width = (4 if ratio == 4 else 2) * head_dim
    state = c.state.view(torch.float32).unflatten(1, (ring, width))
    every = PAGE // ratio
    planes = (head_dim, 4) if index else _entry_planes(head_dim)
    for token in range(len(meta.positions)):
        position = int(meta.positions[token])
        if position < 0:
            continue
        sequence = int(meta.sequence_of_token[token])
        slot = int(meta.slots[sequence])
        state[slot, position % ring] = rows[token, :width]
        if (position + 1) % ratio:
            continue
        source = torch.arange(position + 1 - ring, position + 1)
        present = source >= 0
        pooled = compress_pool(state[slot, source % ring], present, c.ape, ratio=ratio)
        cos, sin = _rope(table, torch.tensor(position + 1 - ratio))
        entry = compress_finish(pooled, c.norm, cos, sin, eps)[None]
        stored = kv_format.pack_indexer_fp8(hadamard(entry)) if index else kv_format.pack_kv_fp8(entry, ROPE)
        row = position // ratio
        page = meta.full_pages[sequence, row // every].reshape(1)
        _store(c.entries, page, torch.tensor([row % every]), every, planes, stored)


def select_entries(q, head_weights, meta, rope_table, pool, selected, *, max_entries=None, dependent=True) -> None:
    heads, chosen = head_weights.shape[1], selected.shape[1]
    selected.fill_(-1)
    for token in range(q.shape[0]):
        position = int(meta.positions[token])
        visible = (position + 1) // 4
        if visible < 1:
            continue
        if max_entries is not None:
            assert visible <= max_entries
        cos, sin = _rope(rope_table, torch.tensor(position))
        queries = apply_rope(q[token].float().unflatten(0, (heads, -1)), cos, sin)
        queries = indexer_fp8_fake_quant(hadamard(queries))
        rows = torch.arange(visible)
        pages = meta.full_pages[int(meta.sequence_of_token[token]), rows // 64]
        keys = kv_format.unpack_indexer_fp8(_rows(pool, pages, rows % 64, 64, (queries.shape[-1], 4)), 128)
        weights = head_weights[token] * (queries.shape[-1] ** -0.5 * heads**-0.5)
        scores = index_scores(queries[None], weights[None], keys)
        ids, valid = select_topk(scores, torch.ones(1, visible, dtype=torch.bool), chosen)
        found = ids[0][valid[0]].sort().values
        selected[token, : len(found)] = found.int()


def sparse_attention(
    q, meta, window_pool, entry_pool, selected, ratio, sink, rope_table, out, *, eps, window=WINDOW
) -> None:
    heads = sink.shape[0]
    head_dim = out.shape[1] // heads
    planes = _entry_planes(head_dim)
    for token in range(q.shape[0]):
        position, sequence = int(meta.positions[token]), int(meta.sequence_of_token[token])
        if position < 0:
            out[token] = 0
            continue
        cos, sin = _rope(rope_table, torch.tensor(position))
        queries = rms_norm(q[token, : heads * head_dim].float().unflatten(0, (heads, -1)), None, eps)
        queries = apply_rope(queries, cos, sin)
        at = torch.arange(max(0, position + 1 - window), position + 1)
        rows = [_rows(window_pool, meta.window_pages[sequence, at // PAGE], at % PAGE, PAGE, planes)]
        if ratio:
            every = PAGE // ratio
            picked = torch.arange((position + 1) // ratio) if selected is None else selected[token]
            picked = picked[picked >= 0].long()
            rows.append(_rows(entry_pool, meta.full_pages[sequence, picked // every], picked % every, every, planes))
        kv = kv_format.unpack_kv_fp8(torch.cat(rows), head_dim, ROPE)
        mask = torch.ones(1, len(kv), dtype=torch.bool)
        found = attend(queries[None], kv[None], mask, sink, head_dim**-0.5)[0]
        out[token] = apply_rope(found, cos, -sin).flatten().to(out.dtype)


def route(x, gate, logits, chooser, token_ids, scaling, ids, weights, groups: Groups, *, comb, heat=None) -> None:
    logits.copy_(x.float() @ gate.float().T)
    scores = torch.nn.functional.softplus(logits).sqrt()
    if chooser.ndim == 1:
        order = (scores + chooser).sort(dim=-1, descending=True, stable=True).indices
        ids.copy_(order[:, : ids.shape[1]])
    else:
        ids.copy_(chooser[token_ids.clamp(0, chooser.shape[0] - 1).long()])
    picked = scores.gather(1, ids.long())
    weights.copy_(picked / picked.sum(-1, keepdim=True) * scaling)
    pairs = [
        (int(e), t * ids.shape[1] + c) for t, row in enumerate(ids) for c, e in enumerate(row) if token_ids[t] >= 0
    ]
    pairs.sort()
    active = sorted({e for e, _ in pairs})
    if heat is not None:
        heat[active] += 1
    groups.num_active[0] = len(active)
    for i, e in enumerate(active):
        groups.active_experts[i] = e
        groups.active_begin[i] = sum(other < e for other, _ in pairs)
    groups.active_begin[len(active)] = len(pairs)
    for i, (_, pair) in enumerate(pairs):
        groups.pair_order[i] = pair


def _expert(slab: ExpertSlab, shape: ExpertShape, expert: int, name: str) -> Tensor:
    code = int(slab.table[expert])
    base, at = (slab.base, slab.host, slab.peer)[code >> 24], (code & 0xFFFFFF) * shape.expert_bytes
    return matrix_of(shape, base[at : at + shape.expert_bytes], name)


def _members(groups: Groups) -> list[tuple[int, list[int]]]:
    begin, order = groups.active_begin.tolist(), groups.pair_order.tolist()
    count = int(groups.num_active)
    return [(int(groups.active_experts[i]), order[begin[i] : begin[i + 1]]) for i in range(count)]


def expert_gate_up(
    x, experts_x, shared_w13, ids, weights, groups: Groups, slab, hidden, limit, *, shared_hidden, x_quantised, room
) -> None:
    """`experts_x` and what comes out are already through e4m3."""
    up_gate = _rounded(x) @ _fp8(shared_w13).T
    shared_hidden.copy_(swiglu(*up_gate.chunk(2, dim=-1), limit))
    tokens, chosen, inner = hidden.shape
    shape, flat = ExpertShape(x.shape[1], inner), hidden.view(tokens * chosen, inner)
    for expert, pairs in _members(groups):
        rows = experts_x[[pair // chosen for pair in pairs]].float()
        gate, up = (rows @ _expert(slab, shape, expert, name).T for name in ("w1", "w3"))
        values = swiglu(gate, up, limit) * weights.flatten()[pairs, None]
        flat[pairs] = _rounded(values.to(flat.dtype)).to(flat.dtype)
    shared_hidden.copy_(_rounded(shared_hidden))


def expert_down(hidden, shared_hidden, shared_w2, ids, groups: Groups, slab, out) -> None:
    tokens, chosen, inner = hidden.shape
    shape, flat = ExpertShape(out.shape[2], inner), hidden.view(tokens * chosen, inner)
    for expert, pairs in _members(groups):
        found = flat[pairs].float() @ _expert(slab, shape, expert, "w2").T
        for pair, row in zip(pairs, found, strict=True):
            out[pair // chosen, pair % chosen] = row.to(out.dtype)
    out[:, chosen] = (shared_hidden.float() @ _fp8(shared_w2).T).to(out.dtype)


def sample_greedy(logits, token_ids, results, *, positions=None) -> None:
    best, ids = logits.max(-1)
    live = torch.ones_like(token_ids) if positions is None else (positions >= 0).int()
    token_ids.copy_(torch.where(live > 0, ids.int(), -1))
    results.copy_(torch.stack([ids.int(), (best - best == 0).int()], 1))
    if positions is not None:
        positions.add_(live)


def stand_ins(config: ModelConfig, sizes: StepSizes) -> KernelSet:
    """All ops, for decode and for prefill."""
    return KernelSet(
        embed_streams=embed_streams,
        hc_pre=hc_pre,
        hc_post_pre=hc_post_pre,
        hc_post_head=hc_post_head,
        project_x=project_x,
        store_and_compress=store_and_compress,
        linear=linear,
        select_entries=select_entries,
        sparse_attention=sparse_attention,
        grouped_linear=grouped_linear,
        route=route,
        expert_gate_up=expert_gate_up,
        expert_down=expert_down,
        head=head,
        sample_greedy=sample_greedy,
    )
