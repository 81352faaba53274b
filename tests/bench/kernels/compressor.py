"""Compressor of one layer at V4-Flash shapes, decode and prefill. `python -m tests.bench.kernels.compressor`

Floor: the raw row is read and written to the ring once; a token that finishes an entry reads 8 half rows (C4) or 128
rows (C128) and writes one entry. All of it is a few KB to 0.5 MB at batch 1, so a launch is the real floor of decode.
Prefill reads the chunk's raw rows once: 10 KB a token in C4 layers, 4 KB in C128 layers.

Result (H200, 2026-11-21, PDL, us, batch 1): C4 0.8 for a ring row, 2.0 for a token that finishes an entry and a key;
C128 0.6 and 3.1 (21 to 40 when one program pooled the entry). The launch that stores everything of a step
(`kv_step.store_and_compress`) takes 1.0 and 2.0 (C4), 1.0 and 3.0 (C128); where 64 sequences of 64K tokens all finish
entries 4.2 (C4) and 13.8 (C128, 59 % of the floor); C128 with 8 warps a program 18.3, with one reduction for both sums
14.0, with at most 96 registers 13.8; C4 with 8 warps 4.5, with at most 64 registers 5.9. Prefill of 8,192 tokens: C4
58, C128 32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.bench.kernels.timing import Row, copy_bandwidth, graph_ms, report
from workers.kernels.compressor import C128Work, CompressorTensors, compress_c4, compress_c128

HD, DI, RD = 512, 128, 64
C4_STRIDE, INDEX_STRIDE, C128_STRIDE = 37440, 8448, 1728
COPIES = 64
CONTEXT = 4096


def tensors(ratio: int, size: int, ring: int, stride: int, batch: int, pages: int) -> CompressorTensors:
    """One compressor's weights and pools, filled with finite values."""
    width = (4 if ratio == 4 else 2) * size
    state = torch.randn(batch, ring * width, device="cuda").view(torch.uint8)
    entries = torch.zeros(pages, stride, dtype=torch.uint8, device="cuda")
    ape = torch.randn(ratio, width // 2, device="cuda")
    return CompressorTensors(ape, torch.ones(size, device="cuda"), state, entries)


def decode_meta(batch: int, position: int) -> SimpleNamespace:
    pages = torch.arange(batch * CONTEXT // 256, dtype=torch.int32, device="cuda").view(batch, -1)
    index = torch.arange(batch, dtype=torch.int32, device="cuda")
    positions = torch.full((batch,), position, dtype=torch.int32, device="cuda")
    return SimpleNamespace(positions=positions, slots=index, full_pages=pages)


def prefill_meta(tokens: int) -> SimpleNamespace:
    ints = {"dtype": torch.int32, "device": "cuda"}
    return SimpleNamespace(
        positions=torch.arange(tokens, **ints),
        sequence_of_token=torch.zeros(tokens, **ints),
        slots=torch.zeros(1, **ints),
        full_pages=torch.arange(-(-tokens // 256), **ints)[None],
        start=torch.zeros(1, **ints),
        cu_starts=torch.tensor([0, tokens], **ints),
    )


def layer_calls(
    ratio: int, tokens: int, batch: int, pages: int, meta: SimpleNamespace, mode: str, copies: int, rope: Tensor
) -> list[Callable[[], None]]:
    """One call per layer."""
    calls = []
    work = C128Work.allocate(tokens, HD, "cuda")
    for _ in range(copies):
        if ratio == 4:
            rows = torch.randn(tokens, 4 * HD + 4 * DI + 64, device="cuda")
            main = tensors(4, HD, 8, C4_STRIDE, batch, pages)
            index = tensors(4, DI, 8, INDEX_STRIDE, batch, pages)
            calls.append(lambda r=rows, m=main, i=index: compress_c4(r, meta, m, i, rope, 1e-6, mode=mode))
        else:
            rows = torch.randn(tokens, 2 * HD, device="cuda")
            main = tensors(128, HD, 128, C128_STRIDE, batch, pages)
            calls.append(lambda r=rows, m=main: compress_c128(r, meta, m, rope, 1e-6, work=work, mode=mode))
    return calls


def decode_rows(ratio: int, batch: int) -> Iterator[Row]:
    """A token that finishes no entry, and one that does."""
    rope = torch.rand(CONTEXT, RD, device="cuda")
    raw = 4 * (4 * HD + 4 * DI if ratio == 4 else 2 * HD)
    for finishing, position in ((False, CONTEXT - 2), (True, CONTEXT - 1)):
        meta = decode_meta(batch, position)
        calls = layer_calls(ratio, batch, batch, batch * CONTEXT // 256, meta, "decode", COPIES, rope)
        more = (3.5 * raw if ratio == 4 else 127 * raw) + 716 if finishing else 0
        name = f"decode C{ratio}, batch {batch}, {'finishing' if finishing else 'ring row only'}"
        yield Row(name, graph_ms(calls), batch * (2 * raw + more))


def prefill_rows(ratio: int, tokens: int) -> Iterator[Row]:
    rope = torch.rand(tokens, RD, device="cuda")
    meta = prefill_meta(tokens)
    calls = layer_calls(ratio, tokens, 1, tokens // 256, meta, "prefill", 6, rope)
    raw = 4 * (4 * HD + 4 * DI if ratio == 4 else 2 * HD)
    yield Row(f"prefill C{ratio}, {tokens} tokens", graph_ms(calls), tokens * (raw + 716 / ratio))


def main() -> None:
    rows = [row for ratio in (4, 128) for batch in (1, 16, 64) for row in decode_rows(ratio, batch)]
    rows += [row for ratio in (4, 128) for row in prefill_rows(ratio, 8192)]
    report(rows, copy_bandwidth())


if __name__ == "__main__":
    main()
