"""`engine_logits`: logits of every position of one sequence, computed as a worker computes them.

Same model, pools, page tables, window reclaiming and step inputs as serving: the prompt part in chunks, the rest one
token a step. Used by `dsv4 logits` and by checks against other implementations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from kvstore.pools.aggregate import PoolSizes
from kvstore.sequence_kv import SequenceKV
from workers.batch import ForwardBatch
from workers.engine import Engine, InvalidTokens
from workers.errors import RequestTooLong
from workers.model_bundle import ModelBundle, make_engine, precision_of
from workers.scheduler.admission import pages_of, pages_spanned

DEFAULT_CHUNK = 512


def engine_logits(
    model_dir: str | Path | ModelBundle,
    ids: Sequence[int],
    *,
    precision: str = "native",
    prefill_chunk: int | None = None,
    decode_from: int | None = None,
    num_threads: int | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """float32 [len(ids), vocab]: logits after each position.

    Args:
        prefill_chunk: tokens of one prefill step, default 512.
        decode_from: first position that is computed in a step of its own; default none.

    Raises `RequestTooLong`, `InvalidTokens`, `BadCheckpoint`, `BadConfig`; `ValueError` for a chunk below 1.
    """
    chunk = DEFAULT_CHUNK if prefill_chunk is None else prefill_chunk
    if chunk < 1 or (decode_from is not None and decode_from < 0):
        raise ValueError(f"prefill chunk {chunk} and decode-from {decode_from} must be positive")
    exact = precision_of(precision)
    bundle = model_dir if isinstance(model_dir, ModelBundle) else ModelBundle.load_for(model_dir, device, exact)
    if len(ids) > bundle.config.max_position_embeddings:
        raise RequestTooLong(f"{len(ids)} tokens; the model has {bundle.config.max_position_embeddings} positions")
    if not ids or min(ids) < 0 or max(ids) >= bundle.config.vocab_size:
        raise InvalidTokens(f"expected at least one token id, all in [0, {bundle.config.vocab_size})")
    pages = pages_of(len(ids))
    window_pages = min(pages, pages_spanned(bundle.config.sliding_window + chunk))
    engine = make_engine(
        bundle,
        exact,
        PoolSizes(pages, window_pages, 1),
        num_threads=num_threads or torch.get_num_threads(),
        device=device,
    )
    return _run(engine, ids, list(_steps(len(ids), chunk, decode_from)), decode_from)


def _steps(num_tokens: int, chunk: int, decode_from: int | None) -> Iterator[tuple[int, int]]:
    """Half-open token ranges of the steps."""
    first_decode = num_tokens if decode_from is None else min(decode_from, num_tokens)
    for start in range(0, first_decode, chunk):
        yield start, min(start + chunk, first_decode)
    for start in range(first_decode, num_tokens):
        yield start, start + 1


def _run(engine: Engine, ids: Sequence[int], steps: Sequence[tuple[int, int]], decode_from: int | None) -> np.ndarray:
    logits = np.empty((len(ids), engine.facts.vocab_size), dtype=np.float32)
    kv = SequenceKV.open(engine.allocators, window_tokens=engine.spec.window_tokens)
    assert kv is not None
    with kv, torch.inference_mode():
        engine.open_slot(kv)
        for start, end in steps:
            kv.reclaim_window(start)
            assert kv.grow_to(end), "pools were sized for this sequence"
            batch = ForwardBatch.build([(kv.indices(end), start, ids[start:end])], engine.batch_device)
            alone = decode_from is not None and start >= decode_from
            found = engine.model.decode(batch) if alone else engine.model.forward(batch, "all")
            logits[start:end] = found.float().cpu().numpy()
    return logits
