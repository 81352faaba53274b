"""Peak memory of loading stays within the stated bound of the final weights."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.workers.checkpoint.conftest import TINY
from workers.checkpoint.load import WORKING_BYTES
from workers.checkpoint.names import Encoding, tensor_table
from workers.checkpoint.synth import synthesise

CHILD = """
import json, resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from workers.checkpoint.load import iter_tensors, load_named
load_named(sys.argv[2])  # first use of operators allocates tables of its own
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
Path("/proc/self/clear_refs").write_text("5")  # restart the peak
start = resident()
kept = load_named(sys.argv[1]) if sys.argv[3] == "load" else max(t.weight.nbytes for t in iter_tensors(sys.argv[1]))
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"grown": peak - start}))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux accounting of peak memory")
@pytest.mark.parametrize("reader", ["load", "iterate"])
def test_peak_memory(tmp_path: Path, tiny_dir: Path, reader: str) -> None:
    # One tensor of each quantised kind and the embedding are larger than the bound itself when held twice.
    config = dataclasses.replace(
        TINY,
        hidden_size=2048,
        moe_intermediate_size=4096,
        num_hidden_layers=1,
        num_hash_layers=0,
        n_routed_experts=2,
        compress_ratios=(0,),
        num_nextn_predict_layers=0,
        vocab_size=32768,
    )
    synthesise(tmp_path / "large", config)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "large"), str(tiny_dir), reader]
    result = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=Path.cwd())
    assert result.returncode == 0, result.stderr
    grown = json.loads(result.stdout)["grown"]
    specs = tensor_table(config).values()
    if reader == "load":
        final = sum(4 * s.shape[0] * (s.shape[1] if len(s.shape) > 1 else 1) for s in specs)
        assert final < grown < final + WORKING_BYTES
    else:
        largest = max(s.stored_bytes for s in specs if s.encoding is not Encoding.I64)
        assert largest < grown < 2 * largest + WORKING_BYTES
