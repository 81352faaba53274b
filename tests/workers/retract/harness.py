"""A pair of workers whose decode side retracts: short-hands for controls, reports and integrity."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvstore.tiers.config import TiersConfig
from tests.workers.runtime.fake_model import VOCAB, oracle_tokens
from tests.workers.runtime.pair import WAIT_S, Pair, tokens_of
from workers.messages import GenerateRequest, RetractControl, RetractReport
from workers.retract.config import RetractConfig

HOST = 8 << 20


def retract_config(*, host: int = HOST, disk: str = "", disk_bytes: int = 64 << 20, **knobs: object) -> RetractConfig:
    """`host` bytes of host tier and, when `disk` names a folder, a disk tier."""
    tiers = TiersConfig(
        host_budget_bytes=host, disk_directory=disk, disk_budget_bytes=disk_bytes, disk_fsync=False, retry_after_s=0.0
    )
    return RetractConfig(tiers=tiers, **knobs)  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed * 10_007 + length)
    return [rng.randrange(2, VOCAB) for _ in range(length)]


class RetractPair(Pair):
    """Leaving the block checks tickets, tiers and pages as well."""

    def __init__(self, *, retract: RetractConfig | None = None, **rest: object) -> None:
        super().__init__(retract=retract or retract_config(), **rest)  # type: ignore[arg-type]

    def __exit__(self, kind: object, *exc: object) -> None:
        if kind is None:
            self.settle()
        super().__exit__(kind, *exc)

    def settle(self) -> None:
        """Waits until nothing is out of the batch or under way, then checks that everything adds up."""
        for _ in range(10_000):
            if not self.on_engine(lambda: len(self.decode._attempts) or self.decode.retract.pending):
                break
        self.on_engine(self.decode.retract.check_integrity)
        report = self.report()
        assert report.leaked_pages == 0 and report.parked_requests == 0
        assert self.on_engine(self.decode.retract.cascade.stats).parked_images == 0

    def on_engine(self, call):  # type: ignore[no-untyped-def]
        return self.decode.loop.call(call).result(WAIT_S)

    def control(self, **fields: object) -> None:
        self.decode.control(RetractControl(**fields)).result(WAIT_S)  # type: ignore[arg-type]

    def report(self, *, reset: bool = False) -> RetractReport:
        return self.decode.retract_report(reset=reset).result(WAIT_S)

    def check_tokens(self, requests: Sequence[GenerateRequest]) -> None:
        """Every request gets exactly the tokens of the oracle."""
        for request in requests:
            tokens = tokens_of(self.events.rest(request.request_id))
            assert tokens == oracle_tokens(request.prompt_ids, request.sampling, request.request_id), request.request_id
