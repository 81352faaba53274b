"""Planned errors of a restore, to prove that comparing tokens and logits would find a real one.

Each is applied while an image goes into the pools, after every checksum was verified, so that nothing but the compared
output can catch it. Reachable only through `RetractControl.mutate`.

`skip:<pool>` leaves the rows of one pool as the new pages had them (a state ring as it is after its reset),
`corrupt:<pool>` flips one bit in every data byte of the pool's rows (the sign of fp8 and bf16 values), and
`sampler_position` moves the request's position in its random sequence on by one, which greedy requests do not notice.
"""

from __future__ import annotations

import torch

from kvstore.pools.aggregate import KVPools
from kvstore.pools.pool import Pool
from kvstore.sequence_kv import SequenceIndices
from kvstore.spec import PoolName
from workers.sampler import SampleState
from workers.sequence import Sequence

SAMPLER_POSITION = "sampler_position"
_FLIPPED_BIT = 0x80


def apply_mutation(name: str, pools: KVPools, indices: SequenceIndices, sequence: Sequence) -> None:
    """Damages a request whose image has just been loaded into the pages of `indices`."""
    if name == SAMPLER_POSITION:
        assert isinstance(sequence.sampling, SampleState)
        sequence.sampling.num_output += 1
        return
    kind, _, pool_name = name.partition(":")
    pool = pools.pool(PoolName(pool_name))
    rows = pool.spec.live_rows(indices.num_tokens)
    if not rows:
        return
    locations = pool.locations(rows, indices)
    if kind == "corrupt":
        data = pool.gather(locations)
        width = pool.spec.planes[0].row_bytes
        data[..., :width] ^= _FLIPPED_BIT
        pool.scatter(locations, data)
    else:
        pool.scatter(locations, unwritten_rows(pool, len(rows)))


def unwritten_rows(pool: Pool, count: int) -> torch.Tensor:
    """What fresh memory of the pool holds: uint8 [L, count, row_bytes]."""
    fresh = Pool(pool.spec, -(-count // pool.spec.rows_per_unit), pool.data.device)
    return fresh.gather(torch.arange(count, device=pool.data.device))
