"""Tokens a second of a whole cluster on the CPU against transformers' `generate`. `python -m tests.bench.serve`.

Both sides run on the same two CPUs, one after the other, with the same dequantised weights of the bundled model, the
same prompts (equal lengths, so that neither pads), the same number of new tokens, greedy, and prefill included. The
cluster is the one a user gets: `dsv4 up` as its own processes (one maths thread in prefill and in decode, two in all),
asked over HTTP with streaming answers. transformers runs with two threads, in fp32 and in bf16 and with each expert
implementation it offers; its fastest counts.

Physics: a step of dsv4-nano reads about 3 MB of active weights per token from cache or memory, well under a
millisecond; both sides are bound by Python and by small operations, which is what the CPU path fuses away. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.e2e.deployment import Deployment, deploy, model_folder

TARGETS = {1: 2.0, 8: 5.0}
"""Wanted ratio to transformers by batch size."""

READY_TARGET_S = 30.0

CONFIG = """
model: {model}
device: cpu
router: {{port: 0}}
prefill: {{threads: 1, chunk_tokens: 512}}
decode: {{threads: 1, max_running: 16}}
"""


def prompts_of(batch: int, length: int, vocab_size: int) -> list[list[int]]:
    draw = random.Random(f"serve:{batch}:{length}")
    return [[draw.randrange(300, vocab_size) for _ in range(length)] for _ in range(batch)]


def tokens_per_s(run: Callable[[], int], repeats: int) -> float:
    """Median of `repeats` after one run that does not count; `run` returns the tokens it made."""
    run()
    rates = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = run()
        rates.append(made / (time.perf_counter() - start))
    return statistics.median(rates)


def stream_completion(deployment: Deployment, prompt: list[int], new_tokens: int) -> int:
    """One streamed completion of exactly `new_tokens`; returns the number that usage reports."""
    host, _, port = deployment.url.removeprefix("http://").partition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=300)
    body = {
        "model": deployment.model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    last = ""
    for line in response:
        if line.startswith(b"data: {"):
            last = line[6:].decode()
    connection.close()
    return int(json.loads(last)["usage"]["completion_tokens"])


def bench_cluster(model: Path, batches: list[int], length: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as folder:
        deployment = deploy(Path(folder), CONFIG.format(model=model))
        try:
            rates = {}
            vocab_size = json.loads((model / "config.json").read_text())["vocab_size"]
            for batch in batches:
                prompts = prompts_of(batch, length, vocab_size)
                with ThreadPoolExecutor(batch) as pool:

                    def run(pool: ThreadPoolExecutor = pool, prompts: list[list[int]] = prompts) -> int:
                        return sum(pool.map(lambda prompt: stream_completion(deployment, prompt, new_tokens), prompts))

                    rates[batch] = tokens_per_s(run, repeats)
            return {"rates": rates, "ready_s": deployment.state["ready_s"]}
        finally:
            deployment.stop()
            deployment.destroy()


def bench_transformers(
    model: Path, batches: list[int], length: int, new_tokens: int, repeats: int, threads: int
) -> dict[int, dict[str, float]]:
    """Rates by batch and variant."""
    import torch

    from tests.support.oracle import oracle_model
    from workers.checkpoint.load import load_named

    torch.set_num_threads(threads)
    config, named = load_named(model)
    reference = oracle_model(config, named)
    reference.generation_config.eos_token_id = None
    rates: dict[int, dict[str, float]] = {batch: {} for batch in batches}
    for dtype in (torch.float32, torch.bfloat16):
        reference.to(dtype)
        for experts in ("eager", "grouped_mm"):
            reference.config._experts_implementation = experts
            for batch in batches:
                ids = torch.tensor(prompts_of(batch, length, config.vocab_size))

                def run(ids: torch.Tensor = ids) -> int:
                    out = reference.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        do_sample=False,
                        max_new_tokens=new_tokens,
                        min_new_tokens=new_tokens,
                        pad_token_id=0,
                    )
                    return int(out.numel() - ids.numel())

                name = f"{str(dtype).removeprefix('torch.')}/{experts}"
                try:
                    rates[batch][name] = tokens_per_s(run, repeats)
                except (RuntimeError, NotImplementedError, ValueError) as exc:
                    print(f"transformers {name} batch {batch}: not available here ({str(exc).splitlines()[0][:80]})")
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cpus", type=int, default=2, help="CPUs that either side may use")
    parser.add_argument("--model", type=Path, help="checkpoint folder; the bundled one when not given")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cpus])
    with tempfile.TemporaryDirectory(prefix="dsv4-bench-") as scratch:
        model = options.model.resolve() if options.model else model_folder(Path(scratch))
        shape = (options.batches, options.prompt_tokens, options.new_tokens, options.repeats)
        ours = bench_cluster(model, *shape)
        theirs = bench_transformers(model, *shape, options.cpus)
    result: dict[str, Any] = {
        "bench": "serve",
        "cpu": platform.processor() or platform.machine(),
        "cpus": options.cpus,
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "ready_s": round(ours["ready_s"], 1),
    }
    print(f"ready after {ours['ready_s']:.1f} s (target {READY_TARGET_S:.0f} s)")
    for batch in options.batches:
        best = max(theirs[batch], key=lambda name: theirs[batch][name])
        ratio = ours["rates"][batch] / theirs[batch][best]
        result[f"batch_{batch}"] = {
            "cluster_tokens_per_s": round(ours["rates"][batch], 1),
            "transformers_tokens_per_s": round(theirs[batch][best], 1),
            "transformers_variant": best,
            "ratio": round(ratio, 2),
        }
        print(f"batch {batch}: cluster {ours['rates'][batch]:.1f} tokens/s, transformers:")
        for name, rate in sorted(theirs[batch].items(), key=lambda item: -item[1]):
            print(f"    {name:<22} {rate:8.1f} tokens/s")
        print(f"    ratio to its fastest   {ratio:8.2f}  (target {TARGETS.get(batch, 0):g})")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
