"""Tokens per second of the CPU model against transformers' `generate`, same weights, same run, 2 threads each.

Physics: a token of dsv4-nano multiplies 8.5 M weights (0.1 ms on one AVX-512 core) and reads 17 MB of them (0.3 ms from
L3, shared by a batch). Eager torch issues some 4,000 operations a step at about 5 us each, whatever the batch: that is
what the compiled step removes. No engine, router or network here: the whole cluster is measured by `serve.py`.

Both sides get the same dequantised weights (random, rounded to the checkpoint's formats, or `--checkpoint DIR`), the
same prompts, greedy sampling and the same number of new tokens; time covers prefill and decode. transformers runs in
each dtype and expert implementation that it accepts, and its fastest is what we compare with. Ends with one JSON line.

    python -m tests.bench.cpu_model [--prompt 128] [--new 64] [--checkpoint DIR]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from kvstore.pools.aggregate import KVPools, PoolSizes
from tests.support.oracle import oracle_model
from tests.support.paged import Tables
from workers.batch import ForwardBatch
from workers.checkpoint.load import load_named
from workers.model.config import PAGE_TOKENS, ModelConfig
from workers.model.kv_layout import kv_spec
from workers.model.precision import Precision
from workers.model.presets import NANO
from workers.model.transformer import Transformer
from workers.model.weights import ModelWeights, WeightClass, random_named_weights, tensor_infos
from workers.reference.quant import fp4_weight_fake_quant, fp8_weight_fake_quant

THREADS = 2
BATCHES = (1, 8)
LONG_PROMPT = 8192


def checkpoint_like_weights(config: ModelConfig) -> dict[str, torch.Tensor]:
    """Random weights rounded to the formats of an official checkpoint."""
    rounders: dict[WeightClass, Callable[[torch.Tensor], torch.Tensor]] = {
        WeightClass.EXPERT: fp4_weight_fake_quant,
        WeightClass.LINEAR: fp8_weight_fake_quant,
        WeightClass.BF16: lambda tensor: tensor.bfloat16().float(),
    }
    named = random_named_weights(config, seed=0, mtp=False)
    for info in tensor_infos(config, mtp=False):
        round_tensor = rounders.get(info.weight_class)
        if round_tensor is not None:
            named |= {part: round_tensor(named[part]) for part in info.parts}
    return named


def our_model(config: ModelConfig, named: dict[str, torch.Tensor], batch: int, tokens: int) -> tuple[Transformer, list]:
    """Our model in native precision, and one set of page tables per sequence."""
    pages = -(-tokens // PAGE_TOKENS)
    precision = Precision.native()
    pools = KVPools(kv_spec(config, "fp8"), PoolSizes(batch * pages, batch * pages, batch))
    weights = ModelWeights.from_named(config, named)
    tables = [Tables(*(tuple(range(b * pages, (b + 1) * pages)),) * 2, b) for b in range(batch)]
    return Transformer(config, weights, precision, pools, num_threads=THREADS), tables


def run_ours(model: Transformer, tables: list[Tables], prompts: torch.Tensor, num_new: int) -> float:
    """Seconds of prefill and greedy decode of all prompts [B, N] as one batch."""
    begin = time.perf_counter()
    size = prompts.shape[1]
    items = [(table, 0, row.tolist()) for table, row in zip(tables, prompts, strict=True)]
    next_ids = model.forward(ForwardBatch.build(items)).argmax(-1).tolist()
    for step in range(num_new - 1):
        items = [(table, size + step, [token]) for table, token in zip(tables, next_ids, strict=True)]
        next_ids = model.forward(ForwardBatch.build(items)).argmax(-1).tolist()
    return time.perf_counter() - begin


def transformers_variants(config: ModelConfig, named: dict[str, torch.Tensor]) -> dict[str, torch.nn.Module]:
    """Every dtype and expert implementation that transformers can run this model with."""
    variants = {}
    for dtype in (torch.float32, torch.bfloat16):
        for experts in ("eager", "grouped_mm", "batched_mm"):
            model = oracle_model(config, named).to(dtype)
            try:
                model.set_experts_implementation(experts)
                model.generation_config.eos_token_id = None
                model.generate(torch.ones(1, 4, dtype=torch.int64), max_new_tokens=2, do_sample=False, pad_token_id=0)
            except Exception as error:  # a variant that cannot run is not a competitor; the others still are
                print(f"transformers {dtype} {experts}: not available ({type(error).__name__}: {error})")
                continue
            variants[f"{str(dtype).removeprefix('torch.')}/{experts}"] = model
    return variants


def run_transformers(model: torch.nn.Module, prompts: torch.Tensor, num_new: int) -> float:
    """Seconds of `generate` with exactly `num_new` new tokens."""
    begin = time.perf_counter()
    out = model.generate(
        prompts, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0, use_cache=True
    )
    assert out.shape[1] == prompts.shape[1] + num_new
    return time.perf_counter() - begin


def measure(config: ModelConfig, named: dict[str, torch.Tensor], prompt: int, num_new: int) -> dict[str, object]:
    """Best of two runs for each side and batch."""
    result: dict[str, object] = {}
    rivals = transformers_variants(config, named)
    for batch in BATCHES:
        prompts = torch.randint(2, config.vocab_size, (batch, prompt), generator=torch.Generator().manual_seed(batch))
        model, tables = our_model(config, named, batch, prompt + num_new)
        run_ours(model, tables, prompts, 2)
        ours = batch * num_new / min(run_ours(model, tables, prompts, num_new) for _ in range(2))
        theirs = {
            name: batch * num_new / min(run_transformers(rival, prompts, num_new) for _ in range(2))
            for name, rival in rivals.items()
        }
        best = max(theirs, key=lambda name: theirs[name])
        ratio = ours / theirs[best]
        print(f"batch {batch}: ours {ours:.0f} tok/s, transformers {theirs[best]:.0f} ({best}), ratio {ratio:.1f}")
        result |= {
            f"tok_s_b{batch}": round(ours, 1),
            f"transformers_tok_s_b{batch}": {name: round(value, 1) for name, value in theirs.items()},
            f"ratio_b{batch}": round(ratio, 2),
        }
    return result


def measure_prefill(config: ModelConfig, named: dict[str, torch.Tensor], chunk: int) -> dict[str, object]:
    """Prompt tokens per second of one 512-token and one 8K prompt in chunks."""
    result: dict[str, object] = {}
    for size in (512, LONG_PROMPT):
        model, tables = our_model(config, named, 1, size)
        ids = torch.randint(2, config.vocab_size, (size,), generator=torch.Generator().manual_seed(size)).tolist()
        model.forward(ForwardBatch.build([(tables[0], 0, ids[:8])]))
        begin = time.perf_counter()
        for start in range(0, size, chunk):
            model.forward(ForwardBatch.build([(tables[0], start, ids[start : start + chunk])]))
        rate = size / (time.perf_counter() - begin)
        print(f"prefill of {size} tokens in chunks of {chunk}: {rate:.0f} tok/s")
        result[f"prefill_tok_s_{size}"] = round(rate)
    return result


def main() -> None:
    """Parse arguments, measure, print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--checkpoint", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    if arguments.checkpoint is None:
        config, named = NANO, checkpoint_like_weights(NANO)
    else:
        config, named = load_named(arguments.checkpoint, draft_blocks=False)
    result = {"bench": "cpu_model", "threads": THREADS, "prompt": arguments.prompt, "new": arguments.new}
    result |= measure(config, named, arguments.prompt, arguments.new)
    result |= measure_prefill(config, named, arguments.chunk)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
