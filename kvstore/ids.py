"""Ids of the KV store, as distinct types so that a page id never travels where a slot id is meant. Torch-free."""

from __future__ import annotations

from typing import NewType

PageId = NewType("PageId", int)
"""Physical unit of a page pool (full or window space): 0 <= id < number of pages."""

SlotId = NewType("SlotId", int)
"""Physical unit of a per-request ring pool: 0 <= id < number of slots."""
