"""Descriptors of the boxes that decode's experts on sm_90 ask the tensor memory accelerator for.

Owns: where codes and scales of an expert's matrices are, as boxes. Does not own: who asks (`experts_tiles.issue`).
"""

from __future__ import annotations

from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from workers.experts.layout import ExpertSlab
from workers.kernels.experts_tiles import BOX3, BOX5, ROWS, SCALE_BOX3, SCALE_BOX5


def boxes(slab: ExpertSlab, wide: int, inner: int, *, gates: bool) -> list[TensorDescriptor]:
    """Descriptors of codes and scales in the slab, the host bank and the peer's slab, for `experts_tiles.issue`.

    Dimensions, `gates`: expert, eight rows, w1 or w3, row, byte; else: expert, row of w2, byte. A box has the rows of a
    tile, and 128 bytes of codes or 16 of scales. A tier that is not there has the slab's.
    """
    codes, scales = wide * inner // 2, wide * inner // 32
    found = []
    for tier in (slab.base, slab.host, slab.peer):
        base = slab.base if tier is None else tier
        experts, stride = base.numel() // (3 * (codes + scales)), 3 * (codes + scales)
        for start, size, group, width in ((0, codes, 2, 128), (3 * codes, scales, 32, 16)):
            if gates:
                row = wide // group
                shape, strides = [experts, inner // 8, 2, 8, row], [stride, 8 * row, size, row, 1]
                box, layout = [1, ROWS.value // 16, 2, 8, width], BOX5 if width == 128 else SCALE_BOX5
            else:
                row = inner // group
                shape, strides = [experts, wide, row], [stride, row, 1]
                box, layout = [1, ROWS.value, width], BOX3 if width == 128 else SCALE_BOX3
                start += 2 * size
            found.append(TensorDescriptor(base[start:], shape, strides, box, layout.value))
    return found


def box_types(*, gates: bool) -> dict[str, str]:
    """Types of the arguments that `boxes` makes, as the compiler writes them."""
    codes, scales = ("1, 4, 2, 8, 128", BOX5), ("1, 4, 2, 8, 16", SCALE_BOX5)
    if not gates:
        codes, scales = ("1, 64, 128", BOX3), ("1, 64, 16", SCALE_BOX3)
    return {
        f"{tier}_{part}": f"tensordesc<u8[{shape}],{layout.value!r}>"
        for tier in ("slab", "host", "peer")
        for part, (shape, layout) in (("codes", codes), ("scales", scales))
    }
