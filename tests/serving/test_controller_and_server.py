"""The robot's controller against this package's own server, and in an environment of its own."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest

from pi05_lightning import Pi05Policy
from pi05_lightning.serving.access import Access
from pi05_lightning.serving.client import Controller, Refused, ServerError, always
from pi05_lightning.serving.limits import Limits
from pi05_lightning.serving.reader import Reader
from pi05_lightning.serving.server import PolicyServer
from tests.serving import counting
from tests.serving.counting import CountingServer
from tests.serving.inside import OBSERVATION, PICTURE

ROOT = Path(__file__).parents[2]
STILL = np.zeros(2)


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextmanager
def serving(policy: Pi05Policy, **options: Any) -> Iterator[str]:
    """The server in a thread; its address."""
    loop, port = asyncio.new_event_loop(), free_port()
    server = PolicyServer(policy, Reader(policy.processor.cameras, {}, None), **options)
    server.warm_up()
    task = loop.create_task(server.run("127.0.0.1", port))

    def run() -> None:
        with suppress(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"ws://127.0.0.1:{port}"
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(20)


def drive(
    controller: Controller, executed: int, observation: dict[str, Any] = OBSERVATION, seconds: float = 30.0
) -> list[tuple[int, int, np.ndarray]]:
    """Step until so many actions of the policy were executed: (step, chunk, action) of each."""
    found, deadline = list[tuple[int, int, np.ndarray]](), monotonic() + seconds
    while len(found) < executed:
        assert monotonic() < deadline, controller.latencies.summary()
        action, due = controller.step(observation), controller.executed
        if due is not None:
            found.append((due.step, due.chunk, action))
        sleep(0.02)
    return found


def test_chunks_go_on_from_what_was_executed_as_the_policy_itself_would(served):
    observations = [OBSERVATION | {"observation/state": np.full(4, 0.1 * step)} for step in range(12)]
    policy = Pi05Policy(served, inference_delay=2, execution_horizon=2)
    with serving(policy) as url, Controller(url, always(STILL)) as controller:
        assert controller.connect(20)["acting"]["inference_delay"] == 2
        assert controller.mode == "rtc"
        executed = [controller.step(observation, max_wait=20) for observation in observations[:1]]
        seconds = controller.latencies.summary()["latency_ms"]["max"] / 1000
        executed += [controller.step(observation, max_wait=20) for observation in observations[1:]]
        assert controller.latencies.summary()["fallback_steps"] == 0
        assert controller.delay == 2
        assert controller.subtask is not None

    alone, queue = Pi05Policy(served), list[np.ndarray]()
    told = min(2, math.ceil(seconds * policy.processor.robots[policy.robot].fps))  # by the first answer
    for step in range(0, 12, 2):
        ours = {"image": {name: PICTURE.transpose(2, 0, 1) for name in ("top", "wrist")}, "task": "open the drawer"}
        ours["state"] = observations[step]["observation/state"].astype(np.float32)
        prefix = queue[step : step + (told if step == 2 else 2)]
        chunk = alone.predict_chunk(ours, prefix_actions=np.stack(prefix) if prefix else None)
        queue[step + 2 * bool(step) :] = chunk[2 * bool(step) : 4]
    np.testing.assert_allclose(executed, queue[:12], rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_said_in_the_servers_words(policy):
    with serving(policy) as url, Controller(url, always(STILL)) as controller:
        controller.connect(20)
        with pytest.raises(ServerError, match="wrist missing, and the policy was trained with top, wrist"):
            drive(controller, 1, {key: value for key, value in OBSERVATION.items() if key != "observation/wrist"})
        drive(controller, 3)


def test_token_opens_the_server_to_those_who_have_it(policy):
    with serving(policy, access=Access(token="secret")) as url:
        with (
            Controller(url, always(STILL), token="other") as controller,
            pytest.raises(Refused, match=r"401: another token.*give the token"),
        ):
            controller.connect(20)
        with Controller(url, always(STILL), token="secret") as controller:
            controller.connect(20)
            drive(controller, 3)


def test_limits_of_the_server_are_said_with_the_option_that_raises_them(policy):
    with (
        serving(policy, limits=Limits(max_message_bytes=10_000)) as url,
        Controller(url, always(STILL)) as controller,
    ):
        controller.connect(20)
        with pytest.raises(ServerError, match="raise --max_message_bytes"):
            drive(controller, 1)


def test_client_that_is_one_too_many_is_told_so(policy):
    with (
        serving(policy, limits=Limits(max_clients=1)) as url,
        Controller(url, always(STILL)) as first,
    ):
        first.connect(20)
        with Controller(url, always(STILL)) as second:
            with pytest.raises(TimeoutError, match="1 clients are connected: raise --max_clients"):
                second.connect(2)
            first.close()
            second.connect(20)


# --- processes of their own


@contextmanager
def served_by_a_process(policy: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    command = ["-m", "pi05_lightning", "serve", str(policy), "--port", str(port), "--inference_delay", "2"]
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_killed_server_that_comes_back_is_found_again(served):
    port = free_port()
    with Controller(f"ws://127.0.0.1:{port}", always(STILL)) as controller:
        with served_by_a_process(served, port):
            controller.connect(120)
            drive(controller, 20)
        for _ in range(20):  # what is in the queue, then the fallback
            action = controller.step(OBSERVATION)
            sleep(0.02)
        assert controller.executed is None
        np.testing.assert_array_equal(action, STILL)
        with served_by_a_process(served, port):
            drive(controller, 20, seconds=120)


def uv(*arguments: str | Path) -> str:
    command = [sys.executable, "-m", "uv", *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT / "plugins").stdout


@pytest.fixture(scope="module", params=["3.10", "3.12"])
def robot_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the client's distribution, and with what that needs."""
    folder = tmp_path_factory.mktemp("robot")
    try:
        python = uv("python", "find", "--no-python-downloads", request.param).strip()
    except subprocess.CalledProcessError:
        pytest.skip(f"there is no Python {request.param}")
    uv("build", "--out-dir", folder / "dist", ROOT / "plugins" / "pi05_client")
    uv("venv", "--python", python, folder / "venv")
    (wheel,) = (folder / "dist").glob("*.whl")
    uv("pip", "install", "--python", folder / "venv" / "bin" / "python", wheel)
    return folder / "venv" / "bin" / "python"


def on_the_robot(python: Path, folder: Path, script: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [python, "-c", script], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return run.stdout


@pytest.mark.slow
def test_robots_environment_holds_three_packages_beside_the_client(robot_python, tmp_path):
    script = "from importlib.metadata import distributions; print(*(d.name for d in distributions()))"
    assert set(on_the_robot(robot_python, tmp_path, script).split()) == {
        "pi05-client",
        "numpy",
        "msgpack",
        "websockets",
    }


@pytest.mark.slow
def test_robots_environment_drives(robot_python, tmp_path):
    server = CountingServer(seconds=0.03, metadata=counting.OURS)
    with server.running() as url:
        script = f"""
import time
import numpy as np
from pi05_lightning.serving.client import Controller, always

position = 0
with Controller({url!r}, always([-1, -1]), rate=50) as controller:
    controller.connect(10)
    while position < 40:
        action = controller.step({{"observation/state": np.array([position]), "prompt": "count"}})
        if controller.executed is not None:
            assert action[0] == position
            position += 1
        time.sleep(0.02)
print(controller.mode, position)
"""
        assert on_the_robot(robot_python, tmp_path, script).split() == ["rtc", "40"]
    assert any("prefix_actions" in message for message in server.asked)


def test_distribution_holds_links_to_the_packages_own_files() -> None:
    plugin = ROOT / "plugins" / "pi05_client"
    code = [file for file in plugin.rglob("*.py") if file.relative_to(plugin).parts[0] != "build"]
    assert {file.name for file in code} >= {"__init__.py", "wire.py"}
    assert all(file.is_symlink() for file in code)
    assert (plugin / "pi05_lightning" / "serving" / "client").resolve() == ROOT / "pi05_lightning/serving/client"
