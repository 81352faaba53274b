"""Many requests over tiny pools and tiers, with aborts, shortage and forced retracts: everything adds up after each."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.workers.retract.harness import RetractPair, prompt, retract_config
from tests.workers.runtime.fake_model import fake_engine, oracle_tokens
from tests.workers.runtime.pair import make_request, tokens_of
from workers.errors import RequestError
from workers.messages import FinishReason, GenerateRequest

CONTROLS = (
    {},
    {"interval": 1, "poison_freed": True},
    {"interval": 3, "other_pages": True},
    {"interval": 2, "victim": "random"},
    {"interval": 2, "victim": "policy", "fail_copy": 2},
    {"interval": 2, "tier": "disk", "poison_freed": True, "other_pages": True},
)


@pytest.mark.parametrize("ahead", [False, True], ids=["in_turn", "ahead"])
def test_random_life_loses_nothing_and_leaks_nothing(ahead: bool, seed: int, tmp_path: Path) -> None:
    """`ahead`: each step is launched before the tokens of the last one are taken."""
    rng = random.Random(seed)
    config = retract_config(
        host=96 << 10, disk=str(tmp_path), admission="predicted", forecast_initial=3, extra_requests=4,
        horizon_steps=6, time_slice_steps=8, min_run_steps=2,
    )  # fmt: skip
    live: list[GenerateRequest] = []
    done = aborted = 0
    with RetractPair(
        decode_engine=fake_engine(full_pages=5, window_pages=5, slots=3, ahead=ahead),
        retract=config,
        admit_wait_s=1e6,
    ) as pair:
        waiting = {}
        for number in range(160):
            action = rng.random()
            if action < 0.3 and len(live) < 9:
                request = make_request(
                    f"r{number}", prompt(rng.choice([2, 60, 127, 250, 255, 256]), number),
                    max_tokens=rng.randint(1, 14), temperature=rng.choice([0.0, 1.0]),
                )  # fmt: skip
                waiting[request.request_id] = (request, pair.compute(request), pair.decode.admit(request))
                live.append(request)
            elif action < 0.4 and live:
                victim = rng.choice(live)
                live.remove(victim)
                if pair.decode.abort(victim.request_id).result(20):
                    aborted += 1
                waiting.pop(victim.request_id, None)
            elif action < 0.5:
                pair.control(**rng.choice(CONTROLS), seed=number)
            for name, (request, sink, granted) in tuple(waiting.items()):
                if granted.done():
                    del waiting[name]
                    try:
                        pair.land(request, sink)
                    except RequestError:
                        live.remove(request)
            pair.on_engine(pair.decode.retract.check_integrity)
            assert pair.on_engine(pair.decode.retract.num_leaked) == 0
        for request, sink, granted in waiting.values():
            granted.result(20)
            pair.land(request, sink)
        for request in live:
            events = pair.events.rest(request.request_id)
            if events[-1].finish is FinishReason.ERROR:
                # Without a prefill worker to ask, an image that no tier takes ends its request, with a clear error.
                assert events[-1].error is not None and events[-1].error.code == "kv_lost"
                continue
            expected = oracle_tokens(request.prompt_ids, request.sampling, request.request_id)
            assert tokens_of(events) == expected, request.request_id
            done += 1
        assert done > 5 and pair.report().events > 20
