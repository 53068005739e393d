# SPDX-License-Identifier: Apache-2.0
"""Who should move so that the workers have as much to do: the plan, and the measurement that it is made of."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpvhost.config import parse_moves
from xdpvhost.errors import ConfigError
from xdpvhost.rebalance import IDLE, NEARLY, Load, plan, totals


def load(name: str, worker: int, *parts: float) -> Load:
    return Load(name, worker, parts)


def after(loads: list[Load], fixed: list[float]) -> list[float]:
    moves = plan(loads, fixed)
    return totals(loads, fixed, {each.name: moves.get(each.name, each.worker) for each in loads})


def test_the_largest_goes_first() -> None:
    """From scratch 5, 4, 3, 3, 3 become 5+3 and 4+3+3. As even, and with fewer moves: 5 and 4 stay together."""
    sizes = dict(zip("abcde", (5, 4, 3, 3, 3), strict=True))
    loads = [load(name, 0, size / 20) for name, size in sizes.items()]
    assert plan(loads, [0.0, 0.0]) == {"c": 1, "d": 1, "e": 1}
    assert after(loads, [0.0, 0.0]) == pytest.approx([9 / 20, 9 / 20])
    apart = [
        load(name, worker, sizes[name] / 20) for name, worker in (("a", 0), ("d", 0), ("b", 1), ("c", 1), ("e", 1))
    ]
    assert plan(apart, [0.0, 0.0]) == {}


def test_nobody_moves_for_a_hairs_breadth() -> None:
    loads = [load("a", 0, 0.50), load("b", 1, 0.46)]
    assert plan(loads, [0.0, 0.0]) == {}
    swapped = [load("a", 1, 0.50), load("b", 0, 0.46)]
    assert plan(swapped, [0.0, 0.0]) == {}


def test_only_who_has_to_moves() -> None:
    loads = [load("a", 0, 0.3), load("b", 0, 0.3), load("c", 1, 0.1), load("d", 2, 0.3)]
    assert plan(loads, [0.0, 0.0, 0.0]) == {"b": 1}


def test_an_idle_guest_stays() -> None:
    loads = [load("a", 0, 0.4), load("b", 0, 0.4), load("idle", 0, 0.0), load("none", 1)]
    moves = plan(loads, [0.0, 0.0])
    assert set(moves.values()) == {1}
    assert set(moves) < {"a", "b"}


def test_idle_workers_are_left_alone() -> None:
    assert plan([load("a", 0, IDLE / 2), load("b", 0, IDLE / 3)], [0.0, 0.0]) == {}


def test_what_nobody_can_move_counts() -> None:
    assert plan([load("a", 0, 0.3)], [0.5, 0.0]) == {"a": 1}
    assert plan([load("a", 1, 0.3)], [0.5, 0.0]) == {}


def test_pairs_go_together() -> None:
    """Two guests whose first pair has everything, with all on the same worker in turn."""
    loads = [load("a", 0, 0.4, 0.0), load("b", 0, 0.4, 0.0)]
    moves = plan(loads, [0.0, 0.0])
    assert list(moves.values()) == [1]
    # a guest that is on both alike has nowhere better to go
    assert plan([load("a", 0, 0.4, 0.4)], [0.0, 0.0]) == {}
    # more parts than workers: numbers 0 and 2 share one
    assert totals([load("a", 1, 0.1, 0.2, 0.3)], [0.0, 0.0], {"a": 1}) == pytest.approx([0.2, 0.4])


def test_one_worker() -> None:
    assert plan([load("a", 0, 0.9), load("b", 0, 0.8)], [0.1]) == {}


shares = st.floats(0, 0.5, allow_nan=False)


@given(
    st.integers(1, 5).flatmap(
        lambda workers: st.tuples(
            st.lists(st.tuples(st.integers(0, workers - 1), st.lists(shares, max_size=4)), max_size=12),
            st.lists(shares, min_size=workers, max_size=workers),
        )
    )
)
def test_a_plan_is_never_worse_and_is_not_followed_by_another(
    drawn: tuple[list[tuple[int, list[float]]], list[float]],
) -> None:
    guests, fixed = drawn
    loads = [Load(f"vm{i}", worker, tuple(parts)) for i, (worker, parts) in enumerate(guests)]
    moves = plan(loads, fixed)
    now = {each.name: each.worker for each in loads}
    then = now | moves
    assert all(0 <= worker < len(fixed) for worker in then.values())
    assert not any(now[name] == worker for name, worker in moves.items())
    if moves:
        assert max(totals(loads, fixed, then)) < max(totals(loads, fixed, now))
        moved = [Load(each.name, then[each.name], each.parts) for each in loads]
        again = plan(moved, fixed)
        if again:  # found a little more, never the way back
            assert max(totals(moved, fixed, then | again)) * NEARLY < max(totals(moved, fixed, then)) * NEARLY


def test_moves_as_they_are_told() -> None:
    assert parse_moves(["vm1=0", "vm2=13"]) == {"vm1": 0, "vm2": 13}
    for text in ("vm1", "=1", "vm1=", "vm1=x", "vm1=-1", "vm1=64", "vm1=00000000000000064", "vm1=²"):
        with pytest.raises(ConfigError, match="is not GUEST=WORKER"):
            parse_moves([text])
    with pytest.raises(ConfigError, match="guest 'vm1' is given twice"):
        parse_moves(["vm1=0", "vm1=1"])
