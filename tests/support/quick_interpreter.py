"""Triton's CPU interpreter without the work whose result it throws away. Imports triton: set TRITON_INTERPRET first.

Almost all time of an interpreted kernel goes into the interpreter's own bookkeeping: every call of a device function
searches `triton.language` for functions to replace that are replaced already, every tensor builds the text of its shape
and type, every integer sum is computed again in 64 bits for an overflow check that is then skipped (its assertion is
only made with `debug`). What kernels load, compute and store is untouched; `tests/workers/kernels/test_interpreter.py`
compares the bytes. The replaced functions are those of triton 3.6; another version keeps its own.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

VERSION = "3.6."
"""Of triton: whose internals the replacements know."""

Replacement = tuple[Any, str, Any]
"""Object, attribute, original value."""


@functools.cache
def quicken_interpreter() -> tuple[Replacement, ...]:
    """Replace the slow parts for the rest of the process and return what they were; does nothing the second time."""
    import triton
    from triton.language import core, semantic
    from triton.runtime import interpreter

    if not triton.__version__.startswith(VERSION):
        return ()
    builder = interpreter.interpreter_builder
    new = (
        (builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False)),
        (interpreter, "_patch_lang", _patch_once(interpreter._patch_lang)),
        (interpreter, "_get_np_dtype", _numpy_types(interpreter._get_np_dtype)),
        (core.block_type, "__init__", _block_types(core.block_type.__init__)),
        (core.tensor, "__init__", _tensors(core)),
        (core.tuple, "__eq__", _equal_tuples(core)),
        (semantic.TritonSemantic, "broadcast_impl_value", _broadcast(semantic.TritonSemantic.broadcast_impl_value)),
    )
    old = tuple((owner, name, getattr(owner, name)) for owner, name, _ in new)
    for owner, name, value in new:
        setattr(owner, name, value)
    return old


class _Kept:
    """The scope of replacements that stay: nothing in the process uses the language outside of kernels."""

    def restore(self) -> None:
        pass


def _patch_once(patch_lang: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Replace the functions of a language module when the first kernel that sees it runs, and leave them replaced."""
    import triton.language as tl

    seen: set[Any] = set()
    patched: set[str] = set()

    def patch_once(fn: Any) -> _Kept:
        if fn not in seen:
            visible = {lang.__name__ for lang in (tl, tl.core) if any(x is lang for x in fn.__globals__.values())}
            if not visible or not visible <= patched:
                patch_lang(fn)
            patched.update(visible)
            seen.add(fn)
        return _Kept()

    return patch_once


def _numpy_types(get_np_dtype: Callable[[Any], Any]) -> Callable[[Any], Any]:
    known: dict[str, Any] = {}

    def numpy_type(kind: Any) -> Any:
        if kind.name not in known:
            known[kind.name] = get_np_dtype(kind)
        return known[kind.name]

    return numpy_type


def _block_types(init: Callable[..., None]) -> Callable[..., None]:
    """Check and name each pair of element type and shape once."""
    known: dict[tuple[Any, ...], dict[str, Any]] = {}

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = [getattr(size, "value", size) for size in shape]
        # With the kinds: 16.0 equals 16, and is refused.
        key = (element_ty.name, getattr(element_ty, "address_space", None), *sizes, *map(type, sizes))
        found = known.get(key)
        if found is None:
            init(self, element_ty, shape)
            known[key] = dict(vars(self))
        else:
            vars(self).update(found, element_ty=element_ty)

    return block_type


def _tensors(core: Any) -> Callable[..., None]:
    """Tensors of one shape share the objects that describe it."""
    known: dict[tuple[int, ...], tuple[Any, Any]] = {}

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in known:
            known[sizes] = core.constexpr(math.prod(sizes)), core.tuple([core.constexpr(size) for size in sizes])
        self.numel, self.shape = known[sizes]

    return tensor


def _equal_tuples(core: Any) -> Callable[[Any, Any], Any]:
    """Compare with a list or another tuple without making a third one."""

    def equal(self: Any, other: Any) -> Any:
        return core.constexpr(
            self.values == (other if isinstance(other, list) else core._normalize_tuple(other).values)
        )

    return equal


def _broadcast(broadcast: Callable[..., Any]) -> Callable[..., Any]:
    """Leave operands alone whose shapes are one object, which `_tensors` gives to those that are equal."""

    def broadcast_values(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    return broadcast_values
