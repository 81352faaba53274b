"""Which experts each of two GPU workers promises the other, so that what one lacks the other holds. Torch-free, pure.

Owns: the division of all pairs between two workers. Does not own: slots, memory, who else is resident. A promised pair
sits in a slot from the start and never leaves it, so that the other worker may point its table there without asking
again; all other slots stay a cache.

Prefill reads nearly every expert in every chunk and gains nothing from choosing, so it promises all of its slots; the
decode worker then promises only what is left (with a profile the most used experts, which it would keep anyway) and
has its other slots for what its requests use. Two workers of one role promise half of the pairs each. Where both
together cannot hold everything, some pairs are read from the host bank anyway, and a worker that decodes promises at
most half of its slots: a cache then saves more than the other's memory.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from workers.experts.policy import Values

Pairs = npt.NDArray[np.int64]


def spread(num_layers: int, num_experts: int) -> Pairs:
    """All pairs, expert 0 of every layer first: any stretch holds an equal share of each layer, within one."""
    order = np.arange(num_layers * num_experts).reshape(num_layers, num_experts)
    return order.T.reshape(-1).astype(np.int64)


def promised(
    side: int,
    slots: tuple[int, int],
    num_layers: int,
    num_experts: int,
    *,
    is_even: bool,
    profile: Values | None = None,
) -> Pairs:
    """Ascending pairs that worker `side` (0 or 1) of two with so many slots promises.

    Args:
        slots: of worker 0 and of worker 1.
        is_even: half each, as far as slots go; else worker 0 promises all of its slots and worker 1 the rest.
        profile: `[L * E]` use of each pair in a recorded run, the same for both workers.

    Raises:
        ValueError: a side other than 0 and 1.
    """
    if side not in (0, 1):
        raise ValueError(f"side {side} of two workers")
    order = spread(num_layers, num_experts)
    if profile is not None and not is_even:
        order = order[np.argsort(profile[order], kind="stable")]
    first, second = (min(count, len(order)) for count in slots)
    is_enough = first + second >= len(order)
    if not is_even:
        middle = first
    elif is_enough:
        middle = min(first, max(len(order) // 2, len(order) - second))
    else:
        middle = first // 2
    end = middle + (second if is_enough else second // 2)
    return np.sort(order[:middle] if side == 0 else order[middle:end])
