"""Triton's CPU interpreter on the numpy at hand. Imports triton: set TRITON_INTERPRET first."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def allow_loaded_bounds() -> None:
    """Let kernels loop to bounds that they loaded: `range(first, end)` of scalars.

    The interpreter (3.6) keeps a loaded scalar as an array of shape [1] and calls `int` on it, which numpy refuses
    since 2.4. Call once before any kernel runs; does nothing to compiled kernels.
    """
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
