"""Requests whose answers are asked for alone before a campaign, and must be the same in it."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.campaigns.calls import Caller, Outcome
from loraf_serve.client import request_of
from loraf_serve.v1 import generation_pb2 as pb

SELECTIONS: tuple[dict[str, Any], ...] = (
    {"tasks": ["math"]},
    {"tasks": ["nlu"]},
    {"tasks": {"math": 0.5, "code": -1.25}},
    {"as_trained": "nlu"},
    {"named": "both"},
    {},
    {"base": True},
    {"adapter": "pair", "tasks": ["nlu"]},
    {"adapter": "pair"},
)
"""Two of them differ only in their adapter."""


def make_questions(
    count: int, seed: int, shortest: int = 1, longest: int = 24, prefix: int = 0
) -> list[pb.GenerateRequest]:
    """Makes requests: every set in turn, half of them greedy and half with a seed.

    Args:
        shortest, longest: new tokens of an answer.
        prefix: tokens with which every prompt begins, so that a prefix cache is used; each prompt comes with several
            sets, so that a cache that mixes them is noticed.
    """
    source = random.Random(seed)
    beginning = [source.randrange(3, 259) for _ in range(prefix)]
    requests = []
    ending: list[int] = []
    for i in range(count):
        if i % len(SELECTIONS) == 0:
            ending = [source.randrange(3, 259) for _ in range(source.randint(1, 12))]
        sampling = {"temperature": 0} if i % 2 else {"temperature": 0.8, "seed": i}
        requests.append(
            request_of(
                pb.GenerateRequest,
                prompt_token_ids=[1, *beginning, *ending],
                max_tokens=source.randint(shortest, longest),
                ignore_eos=True,
                **{"adapter": "trio", **SELECTIONS[i % len(SELECTIONS)], **sampling},
            )
        )
    return requests


async def ask_alone(caller: Caller, requests: list[pb.GenerateRequest]) -> list[Outcome]:
    """The answer to each request while nothing else runs.

    Raises:
        RuntimeError: one was refused.
    """
    outcomes = []
    for request in requests:
        outcome = await caller.generate(request, timeout=120)
        if outcome.code != "OK" or not outcome.finished:
            raise RuntimeError(f"refused although nothing else runs: {outcome}")
        outcomes.append(outcome)
    return outcomes


def is_same(outcome: Outcome, alone: Outcome) -> bool:
    """Whether a request got the answer that it gets alone, completely."""
    return (
        outcome.code == "OK" and outcome.finished and (outcome.text, outcome.token_ids) == (alone.text, alone.token_ids)
    )
