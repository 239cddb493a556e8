"""Requests in flight and tokens a minute of each client."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraf_serve.errors import RateLimited
from loraf_serve.security.allowance import Allowances
from loraf_serve.security.permissions import Permissions


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def test_requests_in_flight_are_counted_for_each_client():
    allowances = Allowances()
    alice, bob = Permissions("alice", in_flight=2), Permissions("bob", in_flight=1)
    with ExitStack() as stack:
        for client in (alice, bob, alice):
            stack.enter_context(allowances.enter(client))
        for client in (alice, bob):
            with pytest.raises(RateLimited, match="in flight") as error, allowances.enter(client):
                pass
            assert error.value.retry_after > 0
    with allowances.enter(alice), allowances.enter(alice):
        pass


def test_tokens_come_back_evenly_and_the_answer_says_when():
    clock = Clock()
    allowances, client = Allowances(clock), Permissions("alice", tokens_per_minute=60)
    with allowances.enter(client) as allowance:
        allowance.take(50)
        allowance.take(30)
    with pytest.raises(RateLimited, match="60 tokens a minute") as error, allowances.enter(client):
        pass
    assert error.value.retry_after == pytest.approx(21)  # 20 tokens below zero, one token a second
    clock.time += 20.5
    with allowances.enter(client) as allowance:
        allowance.take(1)
    clock.time += 10_000
    with allowances.enter(client) as allowance:
        allowance.take(60)  # no more than a minute's tokens are kept
    with pytest.raises(RateLimited), allowances.enter(client):
        pass


@given(
    st.lists(st.tuples(st.floats(0, 30), st.integers(0, 200)), min_size=1, max_size=60),
    st.integers(1, 500),
)
def test_no_client_gets_more_than_its_rate_and_one_request(steps, per_minute):
    """Against a slow obvious count: admitted tokens ≤ a full bucket + the refill + the last request."""
    clock = Clock()
    allowances, client = Allowances(clock), Permissions("alice", tokens_per_minute=per_minute)
    begun, admitted, largest = clock.time, 0, 0
    for pause, tokens in steps:
        clock.time += pause
        try:
            with allowances.enter(client) as allowance:
                allowance.take(tokens)
        except RateLimited:
            continue
        admitted += tokens
        largest = max(largest, tokens)
        assert admitted <= per_minute + (clock.time - begun) * per_minute / 60 + largest + 1e-6


def test_a_client_without_limits_is_never_refused():
    allowances = Allowances()
    with ExitStack() as stack:
        for _ in range(1000):
            allowance = stack.enter_context(allowances.enter(Permissions()))
            allowance.reserve(10_000)
            allowance.take(10_000)


def test_requests_at_once_get_no_more_than_one_of_them_could():
    """Against requests that all ask before any has taken a token."""
    allowances, client = Allowances(Clock()), Permissions("alice", tokens_per_minute=200)
    admitted = 0
    with ExitStack() as stack:
        waiting = [stack.enter_context(allowances.enter(client)) for _ in range(8)]
        for allowance in waiting:
            try:
                allowance.reserve(1200)
            except RateLimited:
                continue
            allowance.take(700)
            admitted += 1
    assert admitted == 1
    assert not allowances._reserved and not allowances._in_flight


def test_what_a_request_reserved_and_did_not_take_is_free_again():
    allowances, client = Allowances(Clock()), Permissions("alice", tokens_per_minute=200)
    with allowances.enter(client) as first:
        first.reserve(200)
        first.take(20)
        with pytest.raises(RateLimited, match="in flight"), allowances.enter(client):
            pass
    with allowances.enter(client) as second:
        second.reserve(100)
