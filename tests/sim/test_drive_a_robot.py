"""The example of a robot behind a slow network: what it measures is what happened."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from time import monotonic

import numpy as np
import pytest

from examples.drive_a_robot import RATE, Driven, Robot, drive, stand_still, summary, table
from examples.slow_network import SlowNetwork
from pi05_lightning.serving.client import Controller
from pi05_lightning.types import Frame
from tests.serving.counting import OURS, CountingServer

ROOT = Path(__file__).parents[2]


class Counter:
    """An environment that is solved when its first action dimension has been commanded to be at a place."""

    sentence, fps, max_seconds, ended = "count", 80.0, 6.0, False
    action_low, action_high = np.zeros(4), np.full(4, 10.0)

    def __init__(self, solved_at: float) -> None:
        self.solved_at = solved_at
        self.taken: list[np.ndarray] = []

    def reset(self, seed: int) -> None:
        self.taken = []

    def step(self, action: np.ndarray) -> bool:
        self.taken.append(action)
        return bool(action[0] >= self.solved_at)

    def observation(self) -> Frame:
        return Frame(images={}, task="count", state=np.array([max((a[0] for a in self.taken), default=-1) + 1]))

    def close(self) -> None:
        pass


class FourDimensions(CountingServer):
    def chunk(self, observation, number):
        answer = super().chunk(observation, number)
        return answer | {"actions": np.concatenate([answer["actions"], answer["actions"]], axis=1)}


def test_world_takes_80_steps_while_the_robot_gets_50_commands():
    robot = Robot(Counter(solved_at=5))
    robot.begin(0)
    for _ in range(50):
        robot.command(np.zeros(4))
    assert (robot.steps, robot.seconds, robot.success) == (80, 1.0, False)
    robot.command(np.full(4, 5.0))
    assert (robot.steps, robot.success) == (81, True)


def test_hand_stands_still_and_the_gripper_holds_on():
    assert stand_still(None, None).tolist() == [0, 0, 0, 0]
    assert stand_still(None, np.array([0.5, -0.5, 0.1, 0.7], np.float32)).tolist() == pytest.approx([0, 0, 0, 0.7])


@pytest.mark.parametrize("mode", ["waiting", "asynchronous"])
def test_robot_stands_still_while_it_waits_and_time_goes_on(mode):
    server = FourDimensions(seconds=0.2, length=8, metadata=OURS | {"fps": 10.0})
    driven = Driven()
    with (
        server.running() as url,
        Controller(url, stand_still, rate=RATE, mode=mode) as controller,
    ):
        controller.connect(10)
        drive(Robot(Counter(solved_at=11)), controller, 0, 10.0, driven)
    assert driven.success == {"count": [True]}
    moving = 11 * 5 / RATE  # seconds: an action lasts five commands
    if mode == "waiting":  # at the begin, and twice on the way
        assert moving + 0.5 <= driven.seconds[0] <= moving + 2.0
        assert driven.still >= 2 * 9
    else:  # at the begin alone
        assert moving + 0.16 <= driven.seconds[0] <= moving + 1.0
        assert driven.still <= 9
    assert len(driven.seams) >= 2
    np.testing.assert_allclose(driven.inside, driven.inside[0], rtol=1e-5)  # it counts evenly


def test_episode_that_takes_too_long_has_failed():
    driven = Driven()
    with (
        FourDimensions(metadata=OURS | {"fps": 10.0}).running() as url,
        Controller(url, stand_still, rate=RATE) as controller,
    ):
        controller.connect(10)
        drive(Robot(Counter(solved_at=1e9)), controller, 0, 0.4, driven)
    assert (driven.success, driven.seconds, driven.commands) == ({"count": [False]}, [], 20)
    found = {"rtc": summary(driven) | {"slower": 1.0, "controller": controller.latencies.summary()}}
    assert "| `rtc` | 0/1 | – |" in table(found)


def test_network_delays_both_ways_and_keeps_the_order():
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def echo() -> None:
            connection, _ = listening.accept()
            with connection:
                while data := connection.recv(2**16):
                    connection.sendall(data)

        thread = threading.Thread(target=echo)
        thread.start()
        with SlowNetwork(listening.getsockname()[1], 0.2) as network:
            with socket.create_connection(("127.0.0.1", network.port)) as near:
                start, sent = monotonic(), bytes(range(256)) * 2000
                near.sendall(sent)
                received = b""
                while len(received) < len(sent):
                    received += near.recv(2**16)
                assert received == sent
                assert 0.2 <= monotonic() - start < 2.0
            thread.join(5)
        assert not thread.is_alive()  # it heard that the connection was closed


@pytest.mark.slow
def test_example_drives_in_every_mode(untrained, tmp_path):
    out = tmp_path / "driven.json"
    options = ["--tasks", "reach-v3", "--episodes", "1", "--max_seconds", "3", "--inference_delay", "4"]
    command = ["-m", "examples.drive_a_robot", str(untrained), *options, "--out", str(out)]
    shown = subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = json.loads(out.read_text())
    assert list(found) == ["waiting", "asynchronous", "rtc"]
    assert all(f"| `{mode}` | " in shown for mode in found)
    for row in found.values():
        assert [trials for _, trials in row["success"].values()] == [1]
        assert row["controller"]["latency_ms"]["p50"] >= 300
    assert found["waiting"]["still"] > found["asynchronous"]["still"]
