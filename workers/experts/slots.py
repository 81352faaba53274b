"""`SlotTable`: which expert sits in which slot of the slab, and when a slot may be written. Torch-free.

Owns: the life of every slot and the code of every (layer, expert) pair that kernels read. Does not own: bytes, streams,
or who deserves a slot (`residency.py`). The life of a slot:

    FREE -> FILLING -> RESIDENT -> LEAVING -> FREE

A pair's code points into the slab only while its slot is RESIDENT. LEAVING means that the device's table is being
changed: a step that began before may still read the slot, so nothing is written into it before `quiet`. Between leaving
and arriving a pair is read from its other home, so an eviction can never make a kernel read a wrong expert.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.errors import IntegrityError
from workers.experts.layout import TIER_SHIFT, Tier, code_of

NOWHERE = -1
"""The home of a pair that only the slab holds: it can never leave its slot. No tier has this code."""


class SlotState(enum.Enum):
    """Life of one slot."""

    FREE = "free"
    FILLING = "filling"
    RESIDENT = "resident"
    LEAVING = "leaving"


@dataclass(frozen=True, slots=True)
class Change:
    """One entry of the device's table: `pair` is from now on found at `code`."""

    pair: int
    code: int


class SlotTable:
    """Slots of one GPU. One owner; not thread-safe."""

    def __init__(self, homes: npt.NDArray[np.int32], num_slots: int) -> None:
        """`homes` int32 [pairs]: the code of each pair while it is not in the slab (`HOST` or `PEER`, or `NOWHERE`)."""
        if num_slots < 1 or (homes >> TIER_SHIFT == Tier.SLAB).any():
            raise ValueError(f"{num_slots} slots; homes must not lie in the slab")
        self._homes = homes.copy()
        self.codes = homes.copy()
        """int32 [pairs]: what the device's table holds once every change given out has been applied."""
        self._pair_of = np.full(num_slots, -1, np.int64)
        self._state = [SlotState.FREE] * num_slots
        self._slot_of = np.full(len(homes), -1, np.int64)
        self._free = list(range(num_slots - 1, -1, -1))

    @property
    def num_slots(self) -> int:
        """Slots of the slab."""
        return len(self._state)

    @property
    def num_free(self) -> int:
        """Slots that `fill` may take."""
        return len(self._free)

    def state_of(self, pair: int) -> SlotState | None:
        """State of the pair's slot; `None` when it has none."""
        slot = self.slot_of(pair)
        return None if slot is None else self._state[slot]

    def slot_of(self, pair: int) -> int | None:
        """The pair's slot, in any state but LEAVING."""
        slot = int(self._slot_of[pair])
        return None if slot < 0 else slot

    def residents(self) -> npt.NDArray[np.int64]:
        """Ascending pairs whose code points into the slab."""
        return np.flatnonzero(self.codes >> TIER_SHIFT == Tier.SLAB)

    def has_home(self, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of `pairs` are somewhere beside the slab."""
        known: npt.NDArray[np.bool_] = self._homes[pairs] != NOWHERE
        return known

    def held(self) -> npt.NDArray[np.int64]:
        """Ascending pairs with a slot: resident, or on the way in."""
        return np.flatnonzero(self._slot_of >= 0)

    def in_flight(self, pairs: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of `pairs`, each with a slot, are still on the way in."""
        coming: npt.NDArray[np.bool_] = self.codes[pairs] >> TIER_SHIFT != Tier.SLAB
        return coming

    def fill(self, pair: int) -> int | None:
        """A slot to copy `pair` into; `None` when none is free. Raises ValueError when it has one."""
        if self._slot_of[pair] >= 0:
            raise ValueError(f"pair {pair} already has slot {self._slot_of[pair]}")
        if not self._free:
            return None
        slot = self._free.pop()
        self._state[slot], self._pair_of[slot], self._slot_of[pair] = SlotState.FILLING, pair, slot
        return slot

    def arrived(self, pair: int) -> Change:
        """The copy is over; the change must be applied before the pair is read from its slot."""
        slot = self._expect(pair, SlotState.FILLING)
        self._state[slot] = SlotState.RESIDENT
        return self._point(pair, code_of(Tier.SLAB, slot))

    def failed(self, pair: int) -> None:
        """The copy came to nothing: the slot is free again, the code never changed."""
        slot = self._expect(pair, SlotState.FILLING)
        self._slot_of[pair] = -1
        self._release(slot)

    def leave(self, pair: int) -> tuple[int, Change]:
        """(slot, change): the pair goes back to its home. The slot waits for `quiet`."""
        slot = self._expect(pair, SlotState.RESIDENT)
        if self._homes[pair] == NOWHERE:
            raise IntegrityError(f"pair {pair} has no home but slot {slot}")
        self._state[slot] = SlotState.LEAVING
        self._slot_of[pair] = -1
        return slot, self._point(pair, int(self._homes[pair]))

    def quiet(self, slot: int) -> None:
        """Every step that may have read a leaving slot is over."""
        if self._state[slot] is not SlotState.LEAVING:
            raise IntegrityError(f"slot {slot} is {self._state[slot].value}, not leaving")
        self._release(slot)

    def rehome(self, homes: npt.NDArray[np.int32]) -> list[Change]:
        """New homes of all pairs (a peer came or went); the changes of those that live there now.

        Raises `IntegrityError` when a pair outside the slab would be nowhere.
        """
        absent = self.codes >> TIER_SHIFT != Tier.SLAB
        if (lost := np.flatnonzero(absent & (homes == NOWHERE) & (self._homes != NOWHERE))).size:
            raise IntegrityError(f"{lost.size} pairs would be nowhere, pair {lost[0]} for one")
        self._homes[:] = homes
        return [self._point(int(pair), int(homes[pair])) for pair in np.flatnonzero(absent & (self.codes != homes))]

    def _point(self, pair: int, code: int) -> Change:
        self.codes[pair] = code
        return Change(pair, code)

    def _release(self, slot: int) -> None:
        self._state[slot], self._pair_of[slot] = SlotState.FREE, -1
        self._free.append(slot)

    def _expect(self, pair: int, state: SlotState) -> int:
        slot = self.slot_of(pair)
        if slot is None or self._state[slot] is not state:
            found = "no slot" if slot is None else self._state[slot].value
            raise IntegrityError(f"pair {pair} has {found}, not {state.value}")
        return slot

    def check_integrity(self) -> None:
        """Raises `IntegrityError` unless slots, pairs and codes agree."""
        if sorted(self._free) != [s for s, state in enumerate(self._state) if state is SlotState.FREE]:
            raise IntegrityError("the free list is not the free slots")
        for slot, state in enumerate(self._state):
            pair = int(self._pair_of[slot])
            if (pair >= 0) == (state is SlotState.FREE):
                raise IntegrityError(f"slot {slot} is {state.value} and holds pair {pair}")
            owned = state in (SlotState.FILLING, SlotState.RESIDENT)
            if owned != (pair >= 0 and self._slot_of[pair] == slot):
                raise IntegrityError(f"slot {slot} is {state.value} and holds pair {pair}, which knows of another")
            if state is SlotState.RESIDENT and self.codes[pair] != code_of(Tier.SLAB, slot):
                raise IntegrityError(f"pair {pair} is resident in slot {slot}, its code is {self.codes[pair]:#x}")
        resident = {p for p in self.held().tolist() if self.state_of(p) is SlotState.RESIDENT}
        if set(self.residents().tolist()) != resident:
            raise IntegrityError("codes point into slots that hold other pairs")
        elsewhere = np.setdiff1d(np.arange(len(self.codes)), np.array(sorted(resident), np.int64))
        if not np.array_equal(self.codes[elsewhere], self._homes[elsewhere]):
            raise IntegrityError("a pair outside the slab is not found at its home")
