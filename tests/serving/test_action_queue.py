"""The robot's action queue: for every step the newest chunk's action, whatever order and delay chunks come with."""

from __future__ import annotations

import numpy as np
import pytest

from pi05_lightning.serving.client.actions import ActionQueue


def numbered(number: int, first: int, length: int) -> np.ndarray:
    """A chunk whose actions say [the step that they are due at, the number of their chunk]."""
    return np.stack([first + np.arange(length), np.full(length, number)], axis=1).astype(np.float32)


def taken(queue: ActionQueue, step: int, count: int) -> list[tuple[int, int]]:
    return [(int(a[0]), int(a[1])) for a in queue.upcoming(step, count)]


@pytest.mark.parametrize("seed", range(50))
def test_step_gets_the_action_of_the_newest_chunk_that_had_come_before_it_began(seed):
    rng = np.random.default_rng(seed)
    queue, held = ActionQueue(), dict[int, int]()  # step -> number of the chunk
    now = 0
    for number in range(30):
        first, length = now - int(rng.integers(0, 6)), int(rng.integers(1, 12))
        queue.merge(numbered(number, first, length), first, now, number)
        held |= dict.fromkeys(range(max(now, first), first + length), number)
        for _ in range(int(rng.integers(0, 6))):
            due = queue.at(now)
            assert (None if due is None else due.chunk) == held.get(now)
            if due is not None:
                assert due.step == due.action[0] == now
                assert due.place == now - (due.step - due.place)
            now += 1
            queue.forget(now)
    assert queue.left(now) == next(n for n in range(100) if now + n not in held)


def test_actions_that_were_due_while_the_chunk_was_computed_are_left_out():
    queue = ActionQueue()
    queue.merge(numbered(0, 0, 4), first=0, now=0, number=0)
    queue.merge(numbered(1, 1, 8), first=1, now=3, number=1)
    assert taken(queue, 0, 9) == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1), (6, 1), (7, 1), (8, 1)]


def test_given_actions_stay_the_chunks_that_they_are_from():
    queue = ActionQueue()
    queue.merge(numbered(0, 0, 6), first=0, now=0, number=0)
    queue.merge(numbered(1, 2, 8), first=2, now=3, number=1, given=3)
    assert taken(queue, 3, 4) == [(3, 0), (4, 0), (5, 1), (6, 1)]
    late = ActionQueue()  # what was given is there no more: what the chunk says of it counts
    late.merge(numbered(1, 2, 8), first=2, now=3, number=1, given=3)
    assert taken(late, 3, 2) == [(3, 1), (4, 1)]


def test_blending_fades_the_old_chunk_into_the_new_one():
    queue = ActionQueue()
    queue.merge(np.zeros((8, 1), np.float32), first=0, now=0, number=0)
    queue.merge(np.ones((8, 1), np.float32), first=2, now=4, number=1, blend=3)
    assert [float(a[0]) for a in queue.upcoming(0, 10)] == [0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1]
    assert queue.at(4).chunk == 1


def test_nothing_is_blended_where_the_old_chunk_has_ended():
    queue = ActionQueue()
    queue.merge(np.zeros((5, 1), np.float32), first=0, now=0, number=0)
    queue.merge(np.ones((8, 1), np.float32), first=2, now=4, number=1, blend=3)
    assert [float(a[0]) for a in queue.upcoming(4, 3)] == [0.25, 1, 1]


def test_chunk_that_comes_after_all_its_steps_changes_nothing():
    queue = ActionQueue()
    queue.merge(numbered(0, 0, 8), first=0, now=0, number=0)
    queue.merge(numbered(1, 1, 3), first=1, now=5, number=1)
    assert taken(queue, 5, 9) == [(5, 0), (6, 0), (7, 0)]
    assert queue.left(5) == 3


def test_a_gap_ends_what_is_left():
    queue = ActionQueue()
    queue.merge(numbered(0, 0, 2), first=0, now=0, number=0)
    queue.merge(numbered(1, 4, 2), first=4, now=0, number=1)
    assert queue.left(0) == 2
    assert queue.left(2) == 0
    assert queue.at(3) is None
    assert queue.at(4).chunk == 1
