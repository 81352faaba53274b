"""`python -m workers.cpu.warm`: compile the CPU kernels into the cache, so that the first worker starts in a second.

Run once after installation (`make` does). Every source change of this package needs it again; a worker that finds no
cache compiles for itself.
"""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

from kvstore.pools.aggregate import KVPools, PoolSizes
from workers.batch import ForwardBatch
from workers.cpu.compile import CACHE_FOLDER
from workers.cpu.model import CpuModel
from workers.model.config import ModelConfig
from workers.model.kv_layout import kv_spec
from workers.model.precision import Precision
from workers.model.presets import NANO
from workers.model.weights import ModelWeights, random_named_weights


def warm_config() -> ModelConfig:
    """One layer of each kind at a small size: machine code does not depend on sizes."""
    return dataclasses.replace(
        NANO, num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), hidden_size=64, vocab_size=64, num_hash_layers=1
    )


def warm() -> float:
    """Compile or load every kernel; returns the seconds it took."""
    begin = time.perf_counter()
    config, precision = warm_config(), Precision.native()
    weights = ModelWeights.from_named(config, random_named_weights(config, seed=0, mtp=False))
    pools = KVPools(kv_spec(config, "fp8"), PoolSizes(full_pages=1, window_pages=1, slots=1))
    model = CpuModel(config, weights, precision, pools, num_threads=2)
    tables = SimpleNamespace(full_pages=(0,), window_pages=(0,), slot=0)
    model.forward(ForwardBatch.build([(tables, 0, list(range(1, 3)))]))
    model.forward(ForwardBatch.build([(tables, 2, [1] * 130)]))
    return time.perf_counter() - begin


if __name__ == "__main__":
    print(f"CPU kernels ready in {warm():.1f} s; cache: {CACHE_FOLDER or 'none (no writable folder)'}")
