"""Requests answered together: each as it would be alone, whatever is wrong with the others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
from aiohttp import ClientSession

from pi05_lightning import Pi05Policy
from pi05_lightning.acting.together import predict_together
from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.serving.batches import Batches, Batching, Busy, Client
from pi05_lightning.serving.wire import pack, unpack
from tests.serving.inside import MESSAGE, OBSERVATION, served_inside, until

TASKS = ("open the drawer", "push", "close the drawer with the gripper")
BOUND = 1e-5
"""In quantile ranges: how far an action may be from the one that its robot would get alone, by rounding."""
FREE: dict[str, Any] = {"max_state_distance": None, "noise_scale": 1.0}
CRASH = "crash"


def observation(robot: int, step: int = 0, task: str | None = None) -> dict[str, Any]:
    rng = np.random.default_rng((robot, step))
    height = 40 + 8 * robot
    images = {camera: rng.integers(0, 256, (3, height, 64), np.uint8) for camera in ("top", "wrist")}
    return {"image": images, "state": rng.uniform(-1, 1, 4), "task": task or TASKS[robot % len(TASKS)]}


def prefix(robot: int, step: int) -> np.ndarray | None:
    """What every other robot still executes, one action or two."""
    return None if robot % 2 else np.full((1 + step % 2, 2), 0.1 * robot, np.float32)


def together(
    policies: Sequence[Pi05Policy], observations: Sequence[dict[str, Any]], prefixes: Sequence[np.ndarray | None]
) -> list[np.ndarray | Exception]:
    asked = zip(policies, observations, prefixes, strict=True)
    return predict_together([policy.request(seen, prefix_actions=given) for policy, seen, given in asked]).chunks


def assert_same(policy: Pi05Policy, chunk: Any, alone: np.ndarray) -> None:
    assert isinstance(chunk, np.ndarray), chunk
    quantiles = policy.processor.robots[policy.robot].normalize.action
    assert np.abs((chunk - alone) / (quantiles.q99 - quantiles.q01)).max() <= BOUND


@pytest.mark.slow_cases
@pytest.mark.parametrize(
    ("options", "goes_on"),
    [
        ({"hierarchical": False}, True),
        ({"noise_scale": 0.0}, False),
        ({"replan_subtask_every": 2}, False),
        ({"replan_subtask_every": 3}, True),
        ({"temperature": 1.0}, False),
        ({"actions": "fast"}, False),
        ({"actions": "fast", "temperature": 1.0}, False),
    ],
)
def test_robot_gets_what_it_would_get_alone(with_fast: Path, options: dict[str, Any], goes_on: bool) -> None:
    policy = Pi05Policy(with_fast, **FREE | options)
    alone, beside = ([policy.session(seed) for seed in range(4)] for _ in range(2))
    for step in range(5):
        asking = [robot for robot in range(4) if (robot + step) % 3]  # so that their subtasks are due at other times
        seen = [observation(robot, step) for robot in asking]
        given = [prefix(robot, step) if goes_on else None for robot in asking]
        chunks = together([beside[robot] for robot in asking], seen, given)
        for robot, one, actions, chunk in zip(asking, seen, given, chunks, strict=True):
            assert_same(policy, chunk, alone[robot].predict_chunk(one, None, actions))
            assert beside[robot].subtask == alone[robot].subtask


def test_chunk_that_is_refused_is_the_mistake_of_its_robot(served: Path) -> None:
    policy = Pi05Policy(served, **FREE, max_action_distance=1e3)
    alone, beside = ([policy.session(seed) for seed in range(3)] for _ in range(2))
    seen = [observation(robot) for robot in range(3)]
    chunks = together(beside, seen, [None, np.full((1, 2), 1e5, np.float32), None])
    with pytest.raises(ValueError, match="max_action_distance is 1000"):
        raise chunks[1]  # type: ignore[misc]
    for robot in (0, 2):
        assert_same(policy, chunks[robot], alone[robot].predict_chunk(seen[robot]))


def test_tokens_that_are_no_chunk_are_the_mistake_of_their_robot(with_fast: Path, monkeypatch) -> None:
    policy = Pi05Policy(with_fast, actions="fast", **FREE)
    sessions = [policy.session(0) for _ in range(3)]
    compute = Pi05Policy.compute
    monkeypatch.setattr(
        Pi05Policy, "compute", lambda *args: [row if n != 1 else row[:-1] for n, row in enumerate(compute(*args))]
    )
    chunks = together(sessions, [observation(robot) for robot in range(3)], [None] * 3)
    assert [isinstance(chunk, FastDecodeError) for chunk in chunks] == [False, True, False]


@pytest.mark.parametrize("part", ["say", "compute"])
def test_batch_that_crashes_is_computed_robot_by_robot(with_fast: Path, monkeypatch, part: str) -> None:
    policy = Pi05Policy(with_fast, temperature=1.0, **FREE)
    alone, beside = ([policy.session(seed) for seed in range(3)] for _ in range(2))
    seen = [observation(0), observation(1, task=CRASH), observation(2)]
    original = getattr(Pi05Policy, part)

    def crash_for_one(self: Pi05Policy, frames: Any, *args: Any) -> Any:
        result = original(self, frames, *args)  # which draws from their generators
        if CRASH in [frame.task for frame in frames]:
            raise RuntimeError("out of memory")
        return result

    monkeypatch.setattr(Pi05Policy, part, crash_for_one)
    chunks = together(beside, seen, [None] * 3)
    assert str(chunks[1]) == "out of memory"
    for robot in (0, 2):
        assert_same(policy, chunks[robot], alone[robot].predict_chunk(seen[robot]))


# --- which requests are answered together


class Model:
    """Lets the test say when computing goes on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.busy, self.go_on = threading.Event(), threading.Event()
        self.computed: list[str] = []
        compute = Pi05Policy.compute

        def wait_and_compute(policy: Pi05Policy, frames: Any, *args: Any) -> Any:
            self.busy.set()
            assert self.go_on.wait(60)
            self.computed += [frame.task for frame in frames]
            return compute(policy, frames, *args)

        monkeypatch.setattr(Pi05Policy, "compute", wait_and_compute)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    return Model(monkeypatch)


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[tuple[Batches, list[int]]]:
    """Batches of observations that need not be unpacked, and the sizes of those that were computed."""
    sizes: list[int] = []
    read: Callable[..., Any] = lambda policy, observation: policy.request(observation)  # noqa: E731
    batches = Batches(read, Batching(**options), lambda batch: sizes.append(len(batch.waited)))
    task = asyncio.create_task(batches.run())
    try:
        yield batches, sizes
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def ask(batches: Batches, policy: Pi05Policy, task: str, times: int = 1) -> None:
    with batches.client(policy.session(0)) as client:
        for _ in range(times):
            await batches.answer(client, observation(0, task=task))  # type: ignore[arg-type]


@pytest.fixture
def free(served: Path) -> Pi05Policy:
    return Pi05Policy(served, **FREE)


def test_requests_that_wait_are_answered_together_in_their_order(free: Pi05Policy, model: Model) -> None:
    async def run() -> list[int]:
        async with running(max_batch=3) as (batches, sizes), asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(ask(batches, free, f"task {number}"))
                await until(lambda number=number: model.busy.is_set() and batches.waiting == number)  # type: ignore[misc]
            model.go_on.set()
        return sizes

    assert asyncio.run(run()) == [1, 3, 2]
    assert model.computed == [f"task {number}" for number in range(6)]


def test_request_of_a_robot_that_left_is_not_computed(free: Pi05Policy, model: Model) -> None:
    async def run() -> None:
        async with running() as (batches, _), asyncio.TaskGroup() as group:
            group.create_task(ask(batches, free, "first"))
            await until(model.busy.is_set)
            leaving, _ = (group.create_task(ask(batches, free, task)) for task in ("left", "stayed"))
            await until(lambda: batches.waiting == 2)
            leaving.cancel()
            await until(lambda: batches.waiting == 1)
            model.go_on.set()

    asyncio.run(run())
    assert model.computed == ["first", "stayed"]


def test_request_beyond_those_that_may_wait_is_refused(free: Pi05Policy, model: Model) -> None:
    async def run() -> None:
        async with running(max_waiting=1) as (batches, _), asyncio.TaskGroup() as group:
            group.create_task(ask(batches, free, "first"))
            await until(model.busy.is_set)
            group.create_task(ask(batches, free, "second"))
            await until(lambda: batches.waiting == 1)
            with pytest.raises(Busy, match=r"1 requests wait, as many as may: .* --max_waiting"):
                await ask(batches, free, "third")
            model.go_on.set()

    asyncio.run(run())
    assert model.computed == ["first", "second"]


def test_mistake_of_a_robot_is_found_before_its_request_joins_the_others(free: Pi05Policy, model: Model) -> None:
    async def run() -> None:
        async with running() as (batches, _):
            with pytest.raises(ValueError, match="task is blank"):
                await ask(batches, free, " ")

    asyncio.run(run())
    assert not model.busy.is_set()


def test_robots_that_ask_again_at_once_come_to_be_answered_together(free: Pi05Policy, monkeypatch) -> None:
    compute = Pi05Policy.compute
    # nobody is waited for longer than computing takes
    monkeypatch.setattr(Pi05Policy, "compute", lambda *args: [sleep(0.2), compute(*args)][1])

    async def run() -> list[int]:
        async with running(batch_wait=60.0) as (batches, sizes), asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(ask(batches, free, "push", times=5))
        return sizes

    sizes = asyncio.run(run())
    assert (sum(sizes), sizes.count(3) >= 2) == (15, True), sizes


def test_nobody_waits_for_a_robot_that_is_not_about_to_ask(free: Pi05Policy) -> None:
    slow = Client(free)
    assert not slow.is_expected(now=0.0, wait=9.0), "it never asked"
    slow.answered_at = 10.0
    assert not slow.is_expected(now=10.0, wait=9.0), "nothing tells when it asks again"
    slow.asks(10.5)
    assert not slow.is_expected(now=10.5, wait=9.0), "it is being answered"
    slow.answered_at = 11.0
    assert [slow.is_expected(now, wait=0.1) for now in (11.3, 11.45, 11.55, 11.7)] == [False, True, True, False]


@pytest.mark.parametrize("way", ["close", "abort"])
def test_server_answers_the_others_when_it_is_busy_and_when_a_robot_leaves(
    free: Pi05Policy, model: Model, way: str
) -> None:
    async def run() -> None:
        batching = Batching(max_waiting=2)
        async with served_inside(free, batching=batching) as (server, address), ClientSession() as session:
            robots = [await session.ws_connect(f"ws://{address}") for _ in range(4)]
            for number, robot in enumerate(robots):
                await robot.receive_bytes()
                if number < 3:
                    await robot.send_bytes(pack(OBSERVATION | {"prompt": f"task {number}"}))
                    await until(lambda number=number: model.busy.is_set() and server.batches.waiting == number)  # type: ignore[misc]
            busy = robots[3]
            await busy.send_bytes(MESSAGE)
            assert (await busy.receive_str()).startswith("Busy: 2 requests wait")
            if way == "close":
                await robots[1].close()
            else:
                robots[1]._response.connection.transport.abort()  # type: ignore[union-attr]
            await until(lambda: server.batches.waiting == 1)
            model.go_on.set()
            answers = [await robots[number].receive_bytes() for number in (0, 2)]
            assert [unpack(answer)["actions"].shape[1] for answer in answers] == [2, 2]
            await busy.send_bytes(MESSAGE)
            assert "actions" in unpack(await busy.receive_bytes())

    asyncio.run(run())
    assert model.computed == ["task 0", "task 2", OBSERVATION["prompt"]]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"max_batch": 0}, "max_batch is 0"), ({"max_waiting": 0}, "max_waiting"), ({"batch_wait": -1.0}, "batch_wait")],
)
def test_wrong_option_is_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batching(**wrong)
