"""Index scores of C4 entries on the GPU, decode and prefill: `workers/reference/indexer.index_scores` over pages.

Owns: scores `sum_h relu(q[h] . k) * weight[h]` straight from the e4m3 keys in their pages, and the launches of the
whole selection (`select_entries`). Does not own: the queries' arithmetic (`index_queries.py`), the choice (`topk.py`),
the forms of sm_90 for decode of many tokens and for prefill (`index_scores_sm90.py`).

Codes of queries and keys are exact in f16 and their products in fp32; both scales are positive and so leave the relu:
a query's is folded into its head weight, a key's multiplies the finished sum. A score is computed by one tile shape and
one order of sums, whatever the batch, the number of programs or the length of the context. Only visible entries (their
last token is not after the query's) are written; keys of other rows may hold anything.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from workers.kernels import index_scores_sm90
from workers.kernels.compressor import Mode, StepMeta
from workers.kernels.formats import e4m3_to_f16, hardware_formats
from workers.kernels.index_queries import hadamard_matrix, index_queries_tile, query_codes
from workers.kernels.launch import EARLY_TOKENS, num_sms, pdl_options
from workers.kernels.topk import TopkWork, select_topk

PAGE_ENTRIES = 64
"""C4 entries of one page: 256 tokens."""

HEAD_DIM = 128
"""Dimensions of an indexer vector, half of them rotary: the kernels are written for the two halves."""

PROGRAMS_PER_SM = ((1, 1), (7, 2), (1 << 30, 4))
"""(largest batch, programs of decode scores for each multiprocessor): a program makes its token's queries once, so few
for few tokens; many tokens need more to hide latency. measured: H200, 2026-11, at 64K tokens of context."""

PREFILL_ENTRIES = 128
PREFILL_TOKENS = 16
"""Tile of prefill scores: keys held by a program, and tokens that pass by them."""

_PREFILL_WARPS = 4

QUERY_TOKENS = 8
"""Tokens of one program of the prefill queries: they share the Hadamard matrix."""

FEW_TOKENS = 8
"""Decode: each program of so many tokens makes its token's queries; on sm_90 those of more have a launch of their own.
# measured (H200, 2026-11-21, 64K tokens of context): scores of 16 and 64 tokens 14.9 and 42.3 us, else 23.9 and 78.5.
"""


@triton.jit
def _load_page(keys, key_scales, page, live, STRIDE: tl.constexpr):
    """uint8 codes of dimensions 0..63 and 64..127, [64, 64] each, and fp32 scales [64] of a page, if `live`."""
    unit = tl.maximum(page, 0).to(tl.int64) * STRIDE
    row = tl.arange(0, 64)
    mask = row < tl.where(live, 64, 0)
    at = keys + unit + (row[:, None] * 128 + row[None, :])
    low = tl.load(at, mask=mask[:, None], other=0)
    high = tl.load(at + 64, mask=mask[:, None], other=0)
    return low, high, tl.load(key_scales + unit // 4 + 2048 + row, mask=mask, other=0.0)


@triton.jit
def scores_decode(
    q,
    head_weights,
    rope_table,
    positions,
    full_pages,
    page_columns,
    keys,
    key_scales,
    scores,
    scores_stride,
    SCALE: tl.constexpr,
    Q_ROW: tl.constexpr,
    WEIGHT_ROW: tl.constexpr,
    HEADS: tl.constexpr,
    HP: tl.constexpr,
    STRIDE: tl.constexpr,
    HW: tl.constexpr,
    EARLY: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (splits, T): program i of a token scores its i-th run of pages. keys uint8, key_scales the same as fp32.
    EARLY: the launch behind, top-k, may start at once: before its wait it reads positions only.

    Keys are older than the launch that makes the queries, which waits before it signals: the first page comes early.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    matrix = hadamard_matrix(64)
    token = tl.program_id(1)
    split = tl.program_id(0)
    pages = full_pages + token * page_columns
    position = tl.load(positions + token)
    page = tl.load(pages + split, mask=split < page_columns, other=0)  # the first of its run if runs are of one page
    visible = (position + 1) // 4
    blocks = (visible + 63) // 64
    each = tl.cdiv(blocks, tl.num_programs(0))
    first = split * each
    end = min(first + each, blocks)
    if first < end:
        if each > 1:
            page = tl.load(pages + first)
        # The first page is on its way while the queries are made, every other one while its predecessor is scored.
        low, high, key_scale = _load_page(keys, key_scales, page, True, STRIDE)
        page = tl.load(pages + min(first + 1, end - 1))
        at = token.to(tl.int64)
        if PDL:
            tl.extra.cuda.gdc_wait()
        query_low, query_high, weight = query_codes(
            q + at * Q_ROW,
            head_weights + at * WEIGHT_ROW,
            rope_table,
            position,
            matrix,
            SCALE,
            HEADS,
            HP,
            HW,
        )
        query_low, query_high = tl.trans(query_low), tl.trans(query_high)  # [64, HP]
        for block in range(first, end):
            next_low, next_high, next_scale = _load_page(keys, key_scales, page, block + 1 < end, STRIDE)
            page = tl.load(pages + min(block + 2, end - 1))
            dots = tl.dot(e4m3_to_f16(low, HW), query_low)  # [64, HP]
            dots = tl.dot(e4m3_to_f16(high, HW), query_high, dots)
            score = tl.sum(tl.maximum(dots, 0.0) * weight[None, :], 1) * key_scale
            entry = block * 64 + tl.arange(0, 64)
            tl.store(scores + at * scores_stride + entry, score, mask=entry < visible)
            low, high, key_scale = next_low, next_high, next_scale
    if PDL:
        tl.extra.cuda.gdc_wait()  # programs without work too
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def scores_prefill(
    codes,
    weights,
    positions,
    sequence_of_token,
    full_pages,
    page_columns,
    keys,
    key_scales,
    scores,
    scores_stride,
    num_tokens,
    TOKENS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HP: tl.constexpr,
    STRIDE: tl.constexpr,
    HW: tl.constexpr,
):
    """Grid (blocks of ENTRIES, ceil(T / TOKENS)). Tokens of one sequence pass by one load of its keys.

    codes f16 [T, HP, 128], weights fp32 [T, HP]: of these T tokens, as are `positions` and `sequence_of_token`.
    """
    first_entry = tl.program_id(0) * ENTRIES
    first = tl.program_id(1) * TOKENS
    at = tl.arange(0, TOKENS)
    inside = first + at < num_tokens
    position = tl.load(positions + first + at, mask=inside, other=-1)
    sequences = tl.load(sequence_of_token + first + at, mask=inside, other=-1)
    sees = (position + 1) // 4 > first_entry  # position + 1 >= 0
    begin = tl.min(tl.where(sees, at, TOKENS), 0)
    entry = first_entry + tl.arange(0, ENTRIES)
    head = tl.arange(0, HP)
    column = tl.arange(0, 128)
    while begin < TOKENS:
        sequence = tl.load(sequence_of_token + first + begin)
        end = tl.min(tl.where((at > begin) & ((sequences != sequence) | (position < 0)), at, TOKENS), 0)
        page = tl.load(full_pages + sequence * page_columns + entry // 64, mask=entry // 64 < page_columns, other=0)
        unit = tl.maximum(page, 0).to(tl.int64) * STRIDE
        code = tl.load(keys + unit[:, None] + ((entry % 64)[:, None] * 128 + column[None, :]))
        key_scale = tl.load(key_scales + unit // 4 + 2048 + entry % 64)
        key = e4m3_to_f16(code, HW)  # [ENTRIES, 128]
        for i in range(begin, end):
            base = first.to(tl.int64) + i
            query = tl.load(codes + base * (HP * 128) + head[None, :] * 128 + column[:, None])  # [128, HP]
            weight = tl.load(weights + base * HP + head)
            dots = tl.dot(key, query)  # [ENTRIES, HP]
            score = tl.sum(tl.maximum(dots, 0.0) * weight[None, :], 1) * key_scale
            visible = (tl.load(positions + base) + 1) // 4
            tl.store(scores + base * scores_stride + entry, score, mask=entry < visible)
        begin = tl.min(tl.where(sees & (at >= end), at, TOKENS), 0)


class IndexWork(NamedTuple):
    """Buffers of a selection of up to `tokens` tokens; `allocate` once, used by every layer and step in turn."""

    scores: Tensor  # fp32 [F] flat: rows of one block of tokens
    topk: TopkWork
    codes: Tensor | None  # f16 [T', HP, 128], for prefill on sm_90 e4m3: of one block of its tokens, or of decode there
    weights: Tensor | None  # fp32 [T', HP]

    @classmethod
    def allocate(
        cls,
        tokens: int,
        max_entries: int,
        k: int,
        num_heads: int,
        device: torch.device | str,
        *,
        prefill: bool = False,
        score_bytes: int = 64 << 20,
    ) -> IndexWork:
        """Decode holds every token's scores at once; prefill as many tokens' as fit `score_bytes` (at least one)."""
        columns = _columns(max_entries)
        padded = _padded_heads(num_heads)
        weights = torch.empty(tokens, padded, dtype=torch.float32, device=device)
        explicit = index_scores_sm90.serves(weights.device, num_heads)
        kind = torch.float8_e4m3fn if explicit and prefill else torch.float16
        codes = torch.empty(tokens, padded, HEAD_DIM, dtype=kind, device=device)
        if not prefill:
            scores = torch.empty(tokens * columns, dtype=torch.float32, device=device)
            topk = TopkWork.allocate(tokens, columns, k, device)
            many = explicit and tokens > FEW_TOKENS
            return cls(scores, topk, codes, weights) if many else cls(scores, topk, None, None)
        floats = max(columns, min(score_bytes // 4, tokens * columns))
        scores = torch.empty(floats, dtype=torch.float32, device=device)
        topk = TopkWork.allocate(max(1, min(tokens, floats // columns)), columns, k, device)
        return cls(scores, topk, codes, weights)

    @property
    def nbytes(self) -> int:
        """Device bytes held."""
        tensors = (self.scores, self.codes, self.weights, *self.topk)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def _columns(max_entries: int) -> int:
    return max(1, -(-max_entries // PREFILL_ENTRIES)) * PREFILL_ENTRIES


def _padded_heads(num_heads: int) -> int:
    return max(16, triton.next_power_of_2(num_heads))


def _check_shapes(q: Tensor, heads: int, rope_table: Tensor) -> None:
    if q.shape[1] != heads * HEAD_DIM or rope_table.shape[1] != HEAD_DIM // 2:
        raise ValueError(f"no indexer kernel for {q.shape[1]} columns of {heads} heads, rope {rope_table.shape[1]}")


def _static(heads: int, pool: Tensor) -> dict[str, Any]:
    return {
        "HP": _padded_heads(heads),
        "STRIDE": pool.stride(0),
        "HW": hardware_formats(pool.device),
    }


def index_scores(
    q: Tensor,
    head_weights: Tensor,
    meta: StepMeta,
    rope_table: Tensor,
    pool: Tensor,
    scores: Tensor,
    *,
    dependent: bool = True,
    pdl: bool | None = None,
) -> None:
    """Decode: scores fp32 [T, N] of each token's visible entries, N a multiple of 64 that holds them all.

    q: bf16 [T, Hi * Di] as projected (rows may be strided); head_weights: fp32 [T, Hi] as projected; pool: uint8
    [pages, stride] of the layer's indexer keys. Token b is sequence b's.
    """
    num_tokens, heads = head_weights.shape
    if not num_tokens:
        return
    _check_shapes(q, heads, rope_table)
    programs = next(count for most, count in PROGRAMS_PER_SM if num_tokens <= most) * num_sms(q.device)
    splits = -(-programs // num_tokens)
    splits = max(1, min(splits, scores.shape[1] // PAGE_ENTRIES))
    options = pdl_options(q, pdl, dependent=dependent)
    scores_decode[splits, num_tokens](
        q,
        head_weights,
        rope_table,
        meta.positions,
        meta.full_pages,
        meta.full_pages.stride(0),
        pool,
        pool.view(torch.float32),
        scores,
        scores.stride(0),
        SCALE=HEAD_DIM**-0.5 * heads**-0.5,
        Q_ROW=q.stride(0),
        WEIGHT_ROW=head_weights.stride(0),
        HEADS=heads,
        **_static(heads, pool),
        EARLY=options["PDL"] and num_tokens <= EARLY_TOKENS,
        num_warps=4,
        num_stages=1,
        **options,
    )


def decode_scores(
    q: Tensor,
    head_weights: Tensor,
    meta: StepMeta,
    rope_table: Tensor,
    pool: Tensor,
    scores: Tensor,
    work: IndexWork,
    *,
    dependent: bool = True,
    pdl: bool | None = None,
) -> None:
    """`index_scores` in the form for so many tokens; `dependent`: as in `select_entries`."""
    if len(scores) > FEW_TOKENS and work.codes is not None and work.weights is not None:
        _make_queries(q, head_weights, meta.positions, rope_table, work.codes, work.weights, 1, pdl=pdl)
        index_scores_sm90.score_decode(work.codes, work.weights, meta, pool, scores, pdl=pdl)
    else:
        index_scores(q, head_weights, meta, rope_table, pool, scores, dependent=dependent, pdl=pdl)


def _make_queries(
    q: Tensor,
    head_weights: Tensor,
    positions: Tensor,
    rope_table: Tensor,
    codes: Tensor,
    weights: Tensor,
    tokens: int,
    *,
    pdl: bool | None,
) -> None:
    """The first rows of `codes` and `weights`, so many tokens a program."""
    num_tokens, heads = head_weights.shape
    _check_shapes(q, heads, rope_table)
    index_queries_tile[(triton.cdiv(num_tokens, tokens),)](
        q,
        head_weights,
        rope_table,
        positions,
        codes,
        weights,
        num_tokens,
        TOKENS=tokens,
        SCALE=HEAD_DIM**-0.5 * heads**-0.5,
        Q_ROW=q.stride(0),
        WEIGHT_ROW=head_weights.stride(0),
        HEADS=heads,
        HP=_padded_heads(heads),
        HW=hardware_formats(q.device),
        num_warps=4,
        **pdl_options(q, pdl),
    )


def _prefill_block(
    q: Tensor,
    head_weights: Tensor,
    positions: Tensor,
    sequence_of_token: Tensor,
    full_pages: Tensor,
    rope_table: Tensor,
    pool: Tensor,
    scores: Tensor,
    work: IndexWork,
) -> None:
    """Queries and scores [T', N] of one block of tokens."""
    num_tokens, heads = head_weights.shape
    assert work.codes is not None and work.weights is not None, "IndexWork.allocate(..., prefill=True)"
    _make_queries(q, head_weights, positions, rope_table, work.codes, work.weights, QUERY_TOKENS, pdl=False)
    if index_scores_sm90.serves(q.device, heads):
        inputs = (positions, sequence_of_token, full_pages, pool)
        index_scores_sm90.score_prefill(work.codes, work.weights, *inputs, scores)
        return
    grid = (scores.shape[1] // PREFILL_ENTRIES, triton.cdiv(num_tokens, PREFILL_TOKENS))
    scores_prefill[grid](
        work.codes,
        work.weights,
        positions,
        sequence_of_token,
        full_pages,
        full_pages.stride(0),
        pool,
        pool.view(torch.float32),
        scores,
        scores.stride(0),
        num_tokens,
        TOKENS=PREFILL_TOKENS,
        ENTRIES=PREFILL_ENTRIES,
        **_static(heads, pool),
        num_warps=_PREFILL_WARPS,
        num_stages=3,
    )


def select_entries(
    q: Tensor,
    head_weights: Tensor,
    meta: StepMeta,
    rope_table: Tensor,
    pool: Tensor,
    selected: Tensor,
    work: IndexWork,
    *,
    mode: Mode = "decode",
    max_entries: int | None = None,
    dependent: bool = True,
    pdl: bool | None = None,
) -> None:
    """The K best visible entries of each token: selected int32 [T, K], -1 after the last.

    Arguments as for `index_scores`. Decode is two launches, three for many tokens. Prefill walks blocks of tokens whose
    scores fit the work buffer, three launches each; `max_entries` bounds the visible entries of any token there
    (default: what the page table can name). `dependent` False, for few tokens: it starts when all before has ended.
    """
    num_tokens = selected.shape[0]
    reach = meta.full_pages.shape[1] * PAGE_ENTRIES
    columns = _columns(reach if max_entries is None else min(reach, max_entries))
    if mode == "decode":
        scores = work.scores[: num_tokens * columns].view(num_tokens, columns)
        decode_scores(q, head_weights, meta, rope_table, pool, scores, work, dependent=dependent, pdl=pdl)
        select_topk(scores, meta.positions, selected, work.topk, pdl=pdl)
        return
    block = min(work.scores.numel() // columns, work.topk.capacity(columns), max(num_tokens, 1))
    for lo in range(0, num_tokens, block):
        part = slice(lo, min(lo + block, num_tokens))
        count = part.stop - lo
        scores = work.scores[: count * columns].view(count, columns)
        positions, sequences = meta.positions[part], meta.sequence_of_token[part]
        inputs = (q[part], head_weights[part], positions, sequences, meta.full_pages, rope_table, pool)
        _prefill_block(*inputs, scores, work)
        select_topk(scores, positions, selected[part], work.topk, ranked=False, pdl=False)


def compile_cases(arch: int) -> list[tuple[str, Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """Compilations for V4-Flash, for `tests/workers/kernels/compiling.py`."""
    kinds = dict.fromkeys(("head_weights", "rope_table", "key_scales", "scores", "weights"), "*fp32")
    kinds |= dict.fromkeys(("positions", "full_pages", "sequence_of_token"), "*i32")
    kinds |= dict.fromkeys(("page_columns", "scores_stride", "num_tokens"), "i32")
    kinds |= {"q": "*bf16", "keys": "*u8", "codes": "*fp16"}
    shape = {"HP": 64, "HW": arch >= 89}
    query = {"SCALE": 128**-0.5 * 64**-0.5, "HEADS": 64, "Q_ROW": 40960, "WEIGHT_ROW": 2688}
    pdl = arch >= 90
    prefill = {"TOKENS": PREFILL_TOKENS, "ENTRIES": PREFILL_ENTRIES, "STRIDE": 8448}
    four = {"num_warps": 4}
    launch = four | {"launch_pdl": pdl}
    decode = {"num_warps": 4, "num_stages": 1, "launch_pdl": pdl}
    cases = (
        ("scores_decode", scores_decode, shape | query | {"STRIDE": 8448, "EARLY": pdl, "PDL": pdl}, decode),
        ("index_queries_tile", index_queries_tile, shape | query | {"TOKENS": QUERY_TOKENS, "PDL": False}, four),
        ("index_queries_decode", index_queries_tile, shape | query | {"TOKENS": 1, "PDL": pdl}, launch),
        ("scores_prefill", scores_prefill, shape | prefill, {"num_warps": _PREFILL_WARPS, "num_stages": 3}),
    )
    found = [
        (name, fn, {arg: kinds[arg] for arg in fn.arg_names if arg in kinds}, constants, options)
        for name, fn, constants, options in cases
    ]
    if arch != 90:
        return found
    name, fn, types, constants, options = found[1]
    e4m3 = (f"{name}_e4m3", fn, types | {"codes": "*fp8e4nv"}, constants, options)
    return [*found, e4m3, *index_scores_sm90.compile_list()]
