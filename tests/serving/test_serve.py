"""The policy server: openpi's protocol, several clients at once, and mistakes that stay their client's."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from aiohttp import ClientSession, ClientWebSocketResponse, WSMsgType
from aiohttp.test_utils import TestServer

from pi05_lightning import Pi05Policy
from pi05_lightning.cli.main import main
from pi05_lightning.serving.reader import Reader
from pi05_lightning.serving.server import PolicyServer
from pi05_lightning.serving.wire import pack, unpack
from tests.serving.inside import OBSERVATION, PICTURE

OURS = {
    "image": {"top": PICTURE.transpose(2, 0, 1), "wrist": PICTURE.transpose(2, 0, 1)},
    "state": np.zeros(4, np.float32),
    "task": "open the drawer",
}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in OBSERVATION.items() if name != key}


def renamed(key: str, other: str) -> dict[str, Any]:
    return without(key) | {other: OBSERVATION[key]}


class Client:
    """What openpi's client does: read the metadata, then send observations and read the answers."""

    def __init__(self, socket: ClientWebSocketResponse) -> None:
        self.socket = socket

    async def metadata(self) -> dict[str, Any]:
        return unpack(await self.socket.receive_bytes())

    async def infer(self, observation: Any) -> Any:
        await self.socket.send_bytes(observation if isinstance(observation, bytes) else pack(observation))
        message = await self.socket.receive()
        return message.data if message.type is WSMsgType.TEXT else unpack(message.data)


def talk(
    policy: Pi05Policy, conversation: Callable[..., Awaitable[Any]], clients: int = 1, read: Reader | None = None
) -> Any:
    """What a conversation of some clients with a server, all of them connected, comes to."""

    async def run() -> Any:
        server = PolicyServer(policy, read or Reader(policy.processor.cameras, {}, None))
        server.warm_up()
        async with TestServer(server.app()) as address, ClientSession() as session:
            connected = [Client(await session.ws_connect(address.make_url("/"))) for _ in range(clients)]
            for client in connected:
                assert (await client.metadata())["action_dim"] == 2
            return await conversation(*connected)

    return asyncio.run(run())


def test_actions_are_those_of_the_policy(policy, served):
    answer = talk(policy, lambda client: client.infer(OBSERVATION))
    executed = Pi05Policy(served).predict_chunk(OURS)[: policy.execution_horizon]
    np.testing.assert_allclose(answer["actions"], executed, rtol=1e-5)
    assert answer["subtask"] == Pi05Policy(served).predict_subtask(OURS)


def test_a_made_up_prompt_that_is_too_long_is_said_and_a_shorter_one_is_answered(served, caplog):
    policy = Pi05Policy(served, hierarchical=False)
    most = policy.prepare(OURS).tokens.shape[1] - 1
    policy.processor.language = replace(policy.processor.language, max_tokens=most)
    answer = talk(policy, lambda client: client.infer(OBSERVATION | {"prompt": "open"}))
    assert len(answer["actions"]) == policy.execution_horizon
    assert f"are not prepared for: its text is {most + 1} tokens long" in caplog.text


def test_chunk_goes_on_from_the_actions_that_a_client_still_executes(served):
    running = np.full((2, 2), 0.25, np.float32)

    async def ask(client):
        given = await client.infer(OBSERVATION | {"prefix_actions": running})
        others = (running[0], np.zeros((3, 2), np.float32))
        return (
            given,
            await client.infer(OBSERVATION),
            *[await client.infer(OBSERVATION | {"prefix_actions": other}) for other in others],
        )

    policy = Pi05Policy(served, inference_delay=2, execution_horizon=3)
    given, alone, wrong, long = talk(policy, ask)
    expected = Pi05Policy(served).predict_chunk(OURS, prefix_actions=running)[:5]
    np.testing.assert_allclose(given["actions"], expected, rtol=1e-5)
    np.testing.assert_array_equal(given["actions"][:2], running)
    assert alone["actions"].shape == (5, 2)
    assert "prefix_actions has shape [2]" in wrong
    assert "prefix_actions has 3 actions, and --inference_delay lets at most 2 be given" in long


def test_actions_that_a_server_without_real_time_chunking_is_given_are_refused_by_its_option(served):
    policy = Pi05Policy(served, inference_delay=2, execution_horizon=3, rtc=False)
    given = OBSERVATION | {"prefix_actions": np.zeros((2, 2), np.float32)}
    said = talk(policy, lambda client: client.infer(given))
    assert "prefix_actions has 2 actions, and --rtc false lets at most 0 be given" in said


def test_answer_says_how_long_it_took(policy):
    async def twice(client):
        return [(await client.infer(OBSERVATION))["server_timing"] for _ in range(2)]

    first, second = talk(policy, twice)
    assert set(first) == {"infer_ms", "wait_ms", "batch_size"}
    assert first["batch_size"] == 1
    assert 0 < first["wait_ms"] + first["infer_ms"] < second["prev_total_ms"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({**OBSERVATION, "observation/state": np.zeros(9)}, "state has 9 dimensions"),
        ({**OBSERVATION, "observation/top": np.zeros((4, 4))}, r"'observation/top' has the shape \[4, 4\]"),
        ({"prompt": "go"}, "no image: expected one of top, wrist, got prompt"),
        ({key: value for key, value in OBSERVATION.items() if key != "prompt"}, "no instruction"),
        ({**OBSERVATION, "camera/state": np.zeros(4)}, "observation/state and camera/state could both be 'state'"),
        ([1, 2], "an observation is a dictionary, not a list"),
        (b"\xc1", "not msgpack"),
        (without("observation/wrist"), "image: wrist missing, and the policy was trained with top, wrist"),
        (without("observation/state"), "state is missing: the policy was trained with one of 4 dimensions"),
        (renamed("observation/wrist", "observation/wrists"), r"reads observation/wrists \(did you mean wrist\?\)"),
        (renamed("observation/state", "observation/states"), r"reads observation/states \(did you mean state\?\)"),
        (renamed("observation/state", "joint_position"), r"nothing reads joint_position: .* state"),
        (renamed("prompt", "promt"), r"nothing reads promt \(did you mean prompt\?\)"),
        (renamed("prompt", "instruction"), "nothing reads instruction: .* prompt or task"),
        (
            {**OBSERVATION, "observation/exterior_image_1_left": PICTURE},
            "nothing reads observation/exterior_image_1_left",
        ),
        ({**OBSERVATION, "task": "close the drawer"}, "prompt and task differ"),
        ({**OBSERVATION, "prompt": ["open"]}, "prompt is a list"),
        ({**OBSERVATION, "prompt": " "}, "task is blank"),
        ({**OBSERVATION, "reset": "false"}, "reset is 'false': give true or false"),
        ({**OBSERVATION, "reset": 0}, "reset is 0: give true or false"),
        ({**OBSERVATION, "tasks": "close the drawer"}, r"nothing reads tasks \(did you mean task\?\)"),
        ({**OBSERVATION, "resett": True}, r"nothing reads resett \(did you mean reset\?\)"),
        ({**OBSERVATION, "observation": {"top": PICTURE}}, "observation/top comes twice"),
        ({**OBSERVATION, "observation/state": [0, np.nan, 0, 0]}, r"observation/state\[1\] is nan"),
        ({**OBSERVATION, "observation/state": ["a"] * 4}, "observation/state holds text"),
        ({**OBSERVATION, "observation/state": np.array([0, 0, 1e30, 0])}, r"state\[2\] is 1e\+30: .* quantile ranges"),
        (
            {**OBSERVATION, "observation/top": PICTURE.astype(np.float32)},
            r"observation/top\[0, 0, 2\] is 2\.0: floats are in",
        ),
        ({**OBSERVATION, "observation/top": PICTURE.astype(np.int64)}, "observation/top is int64"),
        ({**OBSERVATION, "observation/top": np.full((8, 8, 3), np.nan)}, r"observation/top\[0, 0, 0\] is nan"),
        ({**OBSERVATION, "observation/top": np.zeros((0, 0, 3), np.uint8)}, "shape"),
        (
            {**OBSERVATION, "observation/top": np.zeros((8, 8, 1), np.uint8)},
            r"'observation/top' has the shape \[8, 8, 1\]",
        ),
        ({**OBSERVATION, "observation/top": b"\xff\xd8"}, "observation/top holds bytes"),
        (msgpack.packb({b"__ndarray__": True, b"data": b"", b"dtype": "f4, (", b"shape": [0]}), "not msgpack"),
    ],
)
def test_mistake_is_answered_with_text_and_the_connection_lives(policy, bad, message):
    async def err_and_go_on(client):
        return await client.infer(bad), await client.infer(OBSERVATION)

    error, answer = talk(policy, err_and_go_on)
    assert re.search(message, error)
    assert answer["actions"].shape == (policy.execution_horizon, 2)


def test_policy_that_crashes_is_answered_with_text_and_the_server_stays(policy, monkeypatch):
    def crash(*_, **__):
        raise RuntimeError("out of memory")

    async def crash_and_go_on(client, other):
        with monkeypatch.context() as broken:
            broken.setattr(Pi05Policy, "compute", crash)
            error = await client.infer(OBSERVATION)
        return error, await other.infer(OBSERVATION)

    error, answer = talk(policy, crash_and_go_on, clients=2)
    assert error == "RuntimeError: out of memory"
    assert answer["actions"].shape[1] == policy.action_dim


def test_client_gets_the_same_whoever_else_asks(policy):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 48, 64, 3), np.uint8)
    seen = [OBSERVATION | {"observation/top": picture} for picture in pictures]

    async def together(*clients):
        asked = zip(clients, seen, strict=True)
        return await asyncio.gather(*(client.infer(observation) for client, observation in asked))

    async def one_after_another(client):
        return [await client.infer(observation) for observation in seen]

    found = [answer["actions"] for answer in talk(policy, together, clients=3)]
    alone = [answer["actions"] for answer in talk(policy, one_after_another)]
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
    assert np.ptp(alone, axis=0).max() > 1e-3


def test_reset_holds_though_its_observation_is_refused(served):
    policy = Pi05Policy(served, replan_subtask_every=100, temperature=1.0)  # it hardly says the same twice

    async def ask(client):
        said = [(await client.infer(OBSERVATION))["subtask"] for _ in range(2)]
        refused = await client.infer({**without("observation/state"), "reset": True})
        return *said, refused, (await client.infer(OBSERVATION))["subtask"]

    first, kept, refused, anew = talk(policy, ask)
    assert isinstance(refused, str)
    assert first == kept != anew


def test_unknown_camera_is_named_at_the_start():
    with pytest.raises(ValueError, match="no elbow; it has top, wrist"):
        Reader(("top", "wrist"), {"elbow": "x"}, None)


@pytest.mark.parametrize(
    "message",
    [
        OBSERVATION,
        {"observation": {"top": PICTURE, "wrist": PICTURE, "state": np.zeros(4)}, "prompt": "open the drawer"},
        {"images": OURS["image"], "state": np.zeros(4), "prompt": "open the drawer"},
        {"image": OURS["image"], "state": [0, 0, 0, 0], "task": "open the drawer"},
        {
            "observation.images.top": PICTURE,
            "observation.images.wrist": PICTURE,
            "observation.state": np.zeros((1, 4)),
            "task": "open the drawer",
        },
    ],
)
def test_observations_of_openpi_and_lerobot_are_understood(message):
    found = Reader(("top", "wrist"), {}, None)(message)
    np.testing.assert_equal(found, OURS)


DROID = {
    "observation/exterior_image_1_left": PICTURE,
    "observation/wrist_image_left": PICTURE,
    "observation/joint_position": np.arange(3.0),
    "observation/gripper_position": np.array([7.0]),
    "prompt": "open the drawer",
}
DROID_NAMES = {"top": "observation/exterior_image_1_left", "wrist": "observation/wrist_image_left"}
DROID_STATE = ["observation/joint_position", "observation/gripper_position"]


def test_cameras_and_state_may_have_other_keys():
    found = Reader(("top", "wrist"), DROID_NAMES, DROID_STATE)(DROID)
    assert list(found["image"]) == ["top", "wrist"]
    np.testing.assert_array_equal(found["state"], [0, 1, 2, 7])


@pytest.mark.parametrize(
    ("named", "state", "message"),
    [
        ({}, None, "nothing reads observation/exterior_image_1_left"),
        (DROID_NAMES, None, "nothing reads observation/joint_position"),
        (DROID_NAMES, DROID_STATE[:1], "nothing reads observation/gripper_position"),
        (
            DROID_NAMES,
            ["observation/joint_positions"],
            r"joint_positions for the state \(did you mean observation/joint",
        ),
        ({"top": DROID_NAMES["top"]}, DROID_STATE, r"nothing reads observation/wrist_image_left"),
    ],
)
def test_images_and_states_of_a_client_are_read_or_refused(named, state, message):
    with pytest.raises(ValueError, match=message):
        Reader(("top", "wrist"), named, state)(DROID)


def test_camera_whose_key_never_comes_is_refused_with_the_nearest():
    named = {**DROID_NAMES, "top": "observation/exterior_image_2_left"}
    message = (
        r"no observation/exterior_image_2_left, named as the camera top \(did you mean observation/exterior_image_1"
    )
    with pytest.raises(ValueError, match=message):
        Reader(("top", "wrist"), named, DROID_STATE)(DROID)


def test_keys_may_be_ignored_and_numbers_and_text_beside_the_instruction_are():
    more = {"depth": np.zeros((4, 4)), "raw": {"image": PICTURE}, "step": 3, "robot_id": "arm 1", "time": np.float32(1)}
    more |= {"stage": 2, "stop": False}  # which are spelled nearly like the state and the camera top
    read = Reader(("top", "wrist"), {}, None, ["depth", "raw/image"])
    np.testing.assert_equal(read(OBSERVATION | more), OURS)


@pytest.mark.parametrize("named", [{"top": "x", "wrist": "x"}, {"top": "wrist"}])
def test_two_cameras_of_one_key_are_refused(named):
    with pytest.raises(ValueError, match="two cameras have one key"):
        Reader(("top", "wrist"), named, None)
    with pytest.raises(ValueError, match="two cameras would read one key"):
        Reader(("top", "wrist"), {"top": "observation/wrist"}, None)(without("observation/top"))


def test_camera_may_be_missing_by_name(served):
    policy = Pi05Policy(served, missing_cameras=["wrist"], max_action_distance=0.0, noise_scale=9)
    read = Reader(policy.inputs.cameras, {"wrist": "observation/wrist"}, None, missing_cameras=["wrist"])
    far = talk(policy, lambda client: client.infer(without("observation/wrist")), read=read)
    assert re.search(r"action\[\d, \d\] is .* max_action_distance is 0", far)


def test_instruction_may_be_left_out_where_the_policy_has_one_task(served):
    policy = Pi05Policy(served)
    (robot,) = policy.processor.robots
    policy.processor.robots[robot] = replace(policy.processor.robots[robot], tasks=("open the drawer",))
    policy = Pi05Policy((policy.model, policy.processor), noise_scale=0)
    told, untold = (
        talk(policy, lambda client, sent=sent: client.infer(sent)) for sent in (OBSERVATION, without("prompt"))
    )
    np.testing.assert_array_equal(told["actions"], untold["actions"])


@pytest.mark.parametrize(
    ("port", "message"),
    [(None, "port {} is in use: choose another with --port"), (-1, "port is -1"), (70000, "port is 70000")],
)
@pytest.mark.parametrize("options", [[], ["--as_measured"]])
def test_port_that_cannot_be_had_is_said_before_a_checkpoint_is_read(port, message, options, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = port or other.getsockname()[1]
        with pytest.raises(SystemExit, match=message.format(port)):
            main(["serve", str(tmp_path / "none"), f"--port={port}", *options])


def test_host_that_is_not_this_machine_is_said(tmp_path):
    with pytest.raises(SystemExit, match=r"192\.0\.2\.1.* choose one with --host"):
        main(["serve", str(tmp_path / "none"), "--host", "192.0.2.1"])


def test_tokens_that_are_no_chunk_are_the_clients_answer_and_no_reason_not_to_serve(with_fast: Path):
    policy = Pi05Policy(with_fast, actions="fast", constrain_fast=False)
    assert talk(policy, lambda client: client.infer(OBSERVATION)).startswith("FastDecodeError: ")


def test_served_process_answers_and_is_healthy(with_fast: Path):
    options = ["--port", "0", "--execution_horizon", "1", "--actions", "fast"]
    command = [sys.executable, "-m", "pi05_lightning", "serve", str(with_fast), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if "serving at" in line)
        address = line.split("ws://")[1].strip()

        async def ask() -> tuple[int, dict[str, Any]]:
            async with ClientSession() as session, session.ws_connect(f"ws://{address}") as socket:
                client = Client(socket)
                await client.metadata()
                health = await session.get(f"http://{address}/healthz")
                return health.status, await client.infer(OBSERVATION)

        status, answer = asyncio.run(ask())
        assert (status, answer["actions"].shape) == (200, (1, 2))
    finally:
        process.terminate()
        process.communicate(timeout=60)
