"""Launch options shared by all kernels: programmatic dependent launch (PDL) and facts of the device.

With PDL a kernel may start while its predecessor in the stream still runs, and waits by itself before it touches what
the predecessor wrote; in a CUDA graph the launches of a chain then overlap. A kernel takes part like this:

    @triton.jit
    def kernel(..., PDL: tl.constexpr):
        ...                                          # addresses; loads and prefetches of weights only
        if PDL:
            tl.extra.cuda.gdc_wait()                 # the predecessor has ended and its writes are visible
        ...                                          # everything else
        if PDL:
            tl.extra.cuda.gdc_launch_dependents()    # once all programs are here or gone, the successor may start
        ...                                          # the last stores

    kernel[grid](..., **pdl_options(x, pdl))

Every program must reach `gdc_wait`, also one without work: a kernel counts as ended when its programs have, and that is
what makes the writes of the kernel before the predecessor visible. Nothing may be stored before the wait, for the
predecessor may still read it. What is read before the wait must have been written by a launch that had ended when the
predecessor signalled: where that signals after its own wait, and be it in one of its programs (`routing_one.py`), all
before it are old enough; where it signals first of all, not even the launch before it is. What a launch that still runs
writes may be read only by who is told so in memory: by a counter (`arrivals.py`), or by the words themselves
(`experts_hidden.py`, `routing_one.py`).

Kernels signal late, unless the next launch cannot crowd. While anything runs, the GPU places the programs of a
dependent launch depth first: as many as fit on one multiprocessor, then the next. Behind two small kernels that
signalled first of all, 256 programs of a linear stood on 46 of 132 multiprocessors.
# measured (H200, 2026-11-21): that linear 15.1 us, and 7.5 us where the small kernels signal at their end, which costs
# them nothing; 33 MB products 16.6 and 25.7 us against 12.6 and 14.3. Signalling first, they delay each other: two in a
# row take 36.9 us instead of 22.8. Room for one program a multiprocessor and no more also spreads them: 8.4 us.
Linears that stream (`linear_stream.py`) have such room, or programs for every place, and copy weights ahead of their
wait. The launch before one signals first of all (`EARLY_TOKENS`), so that memory is busy while it runs. At one token
they signal after their own wait, or first of all where the next launch is of their kind: beside their programs little
room is left to crowd.
# measured (H200, 2026-11-21): half a layer, mHC to wo_b, 60.9 us with their signals at the end, 58.5 after the wait.
Small launches that a large one does not depend on can run beside it (`workers/gpu/branch.py`).
# measured: bulk prefetches to L2 (`cp.async.bulk.prefetch.L2`) of a linear's weights, asked for by it or by the kernel
# before it, ahead of `gdc_wait`: -0.5 to +3 us. The products were no faster with their weights in L2.
# measured: all kernels with the largest shared memory carveout, so that none divides a multiprocessor's memory for
# itself: 8 layers at one token 1.036 ms, 1.030 with the driver's choice.
Triton's interpreter and GPUs before sm_90 know none of this: `PDL` is False there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl

L2_LINE_BYTES = 128
"""Bytes that one prefetch instruction brings to L2."""

EARLY_TOKENS = 1
"""Steps of up to so many tokens have linears that stream: the small launch before one signals first of all."""


@functools.cache
def has_pdl(device: torch.device) -> bool:
    """Whether kernels on `device` can be launched dependently: sm_90 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Multiprocessors of a GPU. 1 on the CPU: the interpreter runs programs one by one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def pdl_options(tensor: torch.Tensor, pdl: bool | None = None, *, dependent: bool = True) -> dict[str, Any]:
    """Keyword arguments of a launch on the tensor's device. `pdl` None: wherever the device can; True: only there.

    Without `dependent` the launch starts when all before it has ended, and lets its successor in as written.
    """
    enabled = has_pdl(tensor.device) and pdl is not False
    return {"PDL": enabled, "launch_pdl": dependent} if enabled else {"PDL": False}


@triton.jit
def prefetch_l2(pointers):
    """Bring the lines behind a block of pointers to L2, at once and without waiting. Only under `PDL` (inline PTX).

    Give one pointer per `L2_LINE_BYTES`; a line twice costs an instruction, an address outside the tensor faults.
    """
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; // dummy $0",
        "=r,l",
        [pointers],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
