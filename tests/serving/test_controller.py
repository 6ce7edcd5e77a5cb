"""A robot's control loop against a server of openpi's protocol: what is due is executed, whatever answers take."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from pathlib import Path
from time import monotonic, sleep
from types import SimpleNamespace

import numpy as np
import pytest

from pi05_lightning.serving.client import Controller, always, hold_last
from tests.serving.counting import OURS, CountingServer
from tests.serving.driven import PERIOD, STILL, driven

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mode", ["waiting", "asynchronous", "rtc"])
@pytest.mark.parametrize("seconds", [0.0, 0.025])
def test_every_action_is_executed_at_the_step_that_it_is_due_at(mode, seconds):
    server = CountingServer(seconds, metadata=OURS)
    with driven(server, mode=mode) as robot:
        robot.run_to(50)  # `step` of the robot looks at each
    assert len(set(robot.chunks)) >= 6
    assert robot.chunks == sorted(robot.chunks)


def test_step_waits_for_nothing():
    with driven(CountingServer(seconds=0.5, metadata=OURS)) as robot:
        robot.run_to(6)
    assert robot.longest_step < 0.3  # seconds, on a machine that does other things too


def test_server_is_told_the_actions_that_are_executed_until_it_answers():
    server = CountingServer(seconds=0.025, metadata=OURS)
    with driven(server) as robot:
        robot.run_to(60)
    assert robot.controller.mode == "rtc"
    told = [message for message in server.asked if "prefix_actions" in message]
    assert len(told) >= 5
    executed = [action for action, from_policy in robot.got if from_policy]
    for message in told:
        begin, prefix = int(message["observation/state"][0]), message["prefix_actions"]
        assert 1 <= len(prefix) <= 4  # what the server goes on from
        length = min(len(prefix), len(executed) - begin)
        np.testing.assert_array_equal(prefix[:length], executed[begin : begin + length])
    assert robot.controller.latencies.summary()["delay_steps"]["max"] <= 8


def test_server_is_told_no_more_than_the_last_answers_took():
    long = OURS | {"action_horizon": 12, "acting": {"inference_delay": 12, "rtc": True}}
    server = CountingServer(seconds=0.0, length=24, metadata=long)
    with driven(server, rate=50) as robot:
        robot.run_to(100)
    lengths = [len(message["prefix_actions"]) for message in server.asked if "prefix_actions" in message]
    assert 1 <= lengths[-1] < 12  # an answer of no time is there at the next step, or soon on a busy machine


def test_answers_that_take_longer_than_was_told_are_joined_at_the_step_that_is_due(caplog):
    metadata = OURS | {"acting": {"inference_delay": 1, "rtc": True}}
    server = CountingServer(seconds=0.035, length=12, metadata=metadata)
    with driven(server) as robot:
        robot.run_to(40)
    assert robot.controller.latencies.summary()["late"] > 0
    assert "the server goes on from 1 at most" in caplog.text


def test_server_of_openpi_is_sent_openpis_keys_alone():
    server = CountingServer(seconds=0.02)
    with driven(server) as robot:
        assert robot.controller.connect() == {}
        robot.run_to(30)
    assert robot.controller.mode == "asynchronous"
    assert {key for message in server.asked for key in message} == {"observation/state", "prompt"}


def test_half_a_chunk_is_executed_where_the_server_does_not_say_how_much():
    server = CountingServer(length=10)
    with driven(server) as robot:
        robot.run_to(40)
    asked_at = [int(message["observation/state"][0]) for message in server.asked]
    assert set(np.diff(asked_at)[:4]) == {5}


@pytest.mark.parametrize("rate", [100, None])
def test_next_chunk_is_asked_for_in_time_where_a_whole_chunk_is_to_be_executed(rate):
    server = CountingServer(seconds=0.025, length=16)
    with driven(server, execution_horizon=16, rate=rate) as robot:
        robot.run_to(120)
        summary = robot.controller.latencies.summary()
    dry = [not from_policy for _, from_policy in robot.got]
    assert sum(dry[dry.index(False) + 20 :]) <= 6  # steps, on a machine that does other things too
    assert summary["answers"] < 14  # yet not at every step


def test_next_chunk_is_asked_for_earlier_once_answers_take_longer():
    server = CountingServer(seconds=0.0, length=24)
    with driven(server, execution_horizon=24, rate=100) as robot:
        robot.run_to(50)
        server.seconds = 0.06  # the queue holds no more than the answers of before took
        robot.run_to(200)
    last = [from_policy for _, from_policy in robot.got][-100:]
    assert last.count(False) <= 8  # of six after every chunk


def test_a_chunk_that_did_not_come_is_asked_for_again_while_the_last_one_is_executed():
    server = CountingServer(length=100)
    server.say = {1: "Busy: 64 requests wait"}
    with driven(server) as robot:
        robot.run_to(95)
    asked_at = [int(message["observation/state"][0]) for message in server.asked]
    assert asked_at[:2] == [0, 50]
    assert asked_at[2] < 90


@pytest.mark.parametrize("length", [1, 2, 8])
def test_answers_that_take_longer_than_their_actions_last_still_move_the_robot(length, caplog):
    server = CountingServer(seconds=0.1, length=length)
    with driven(server, rate=100) as robot:
        robot.run_to(3 * length)
        assert robot.controller.delay is not None
    assert len(server.asked) <= 8  # every one of which adds something
    assert f"and held {length} actions" in caplog.text


def test_old_chunk_fades_into_the_new_one_by_choice():
    server = CountingServer(seconds=0.0, length=12)
    with driven(server, blend=3, execution_horizon=6) as robot:
        robot.run_to(30)
    seconds = [float(action[1]) for action, from_policy in robot.got if from_policy]
    assert {0.25, 0.5, 0.75} <= {value % 1 for value in seconds}
    assert seconds == sorted(seconds)


def test_nothing_fades_where_the_server_goes_on_from_what_is_executed():
    server = CountingServer(metadata=OURS)
    with driven(server, blend=3) as robot:
        robot.run_to(30)
    assert robot.controller.mode == "rtc"
    assert {float(action[1]) % 1 for action, from_policy in robot.got if from_policy} == {0.0}


def test_waiting_executes_a_chunk_and_then_waits():
    server = CountingServer(seconds=0.05, metadata=OURS)
    with driven(server, mode="waiting") as robot:
        robot.run(12)
    assert [from_policy for _, from_policy in robot.got] == [True] * 12
    assert robot.chunks == [0] * 4 + [1] * 4 + [2] * 4
    assert not any("prefix_actions" in message for message in server.asked)


def test_waiting_waits_for_no_server_that_is_gone():
    server = CountingServer(metadata=OURS)
    server.say[1] = "drop"
    with driven(server, mode="waiting") as robot:
        robot.run_until(lambda: robot.controller.latencies.counts["fallback_steps"] >= 1)
        robot.run_to(12)
    assert robot.longest_step < 5  # seconds; a lost connection is made anew after 0.1


def test_answer_to_an_old_observation_is_dropped_and_asked_anew():
    server = CountingServer(seconds=0.4, metadata=OURS)
    with driven(server, max_age=0.2) as robot:
        robot.run_until(lambda: len(server.asked) >= 2)
        assert not robot.chunks
        server.seconds = 0.0
        robot.run_to(10)
    assert robot.controller.latencies.counts["late"] >= 1
    assert server.asked[1]["reset"]  # the robot has done nothing of this episode yet


def test_age_is_that_of_the_observation_however_soon_it_was_answered():
    server = CountingServer(metadata=OURS)
    with driven(server, max_age=0.3) as robot:
        robot.step()
        sleep(0.6)  # a robot that was stopped meanwhile
        robot.step()
        assert not robot.chunks
        assert robot.controller.latencies.counts["late"] == 1
        robot.run_to(10)
        # one that waits has only this observation, and does not ask with it again
        server.seconds = 0.5
        robot.controller.reset()
        controller, start = robot.controller, monotonic()
        controller.step({"observation/state": np.array([0])}, max_wait=10)
        assert controller.executed is None
        assert monotonic() - start < 5


@pytest.mark.parametrize(("said", "option"), [({"fps": 10.0}, {}), ({"fps": None}, {"fps": 10.0})])
def test_action_lasts_several_control_steps_where_the_loop_is_faster_than_the_policy(said, option):
    server, position = CountingServer(seconds=0.03, metadata=OURS | said), [0]
    with server.running() as url, Controller(url, always(STILL), rate=50, **option) as controller:
        controller.connect(10)
        steps, deadline = [], monotonic() + 20
        while len(steps) < 100:
            assert monotonic() < deadline
            action = controller.step(lambda: {"observation/state": np.array([position[0]])})
            if controller.executed is not None:
                steps.append(int(action[0]))
                position[0] = controller.executed.step + (len(steps) % 5 == 0)
            sleep(PERIOD)
    assert steps == [number // 5 for number in range(100)]
    begins = [int(message["observation/state"][0]) for message in server.asked]
    assert begins == sorted(set(begins))


def test_rate_that_nobody_knows_is_told(caplog):
    with driven(CountingServer(), rate=50.0):
        assert "Give fps if it is not 50" in caplog.text


def test_loop_that_is_slower_than_the_policy_is_an_error():
    with pytest.raises(ValueError, match="50 actions per"), driven(CountingServer(metadata=OURS), rate=20.0):
        pass


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_age": 0}, "max_age is 0: give seconds above 0"),
        ({"mode": "async"}, "mode is 'async': expected waiting, asynchronous, rtc"),
        ({"mode": "rtc", "blend": 2}, "blend"),
        ({"execution_horizon": 0}, "execution_horizon 0"),
        ({"rate": 0.0}, "rate is 0.0"),
    ],
)
def test_options_that_cannot_be_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Controller("ws://127.0.0.1:1", always(STILL), **options)


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://127.0.0.1:8000", "ws://"])
def test_address_that_is_none_is_an_error(url):
    with pytest.raises(ValueError, match="give ws://host:port"):
        Controller(url, always(STILL))


def test_mode_that_the_server_cannot_is_an_error():
    with (
        CountingServer().running() as url,
        Controller(url, always(STILL), mode="rtc") as controller,
        pytest.raises(ValueError, match="start it with --inference_delay"),
    ):
        controller.connect(10)


def test_episode_begins_anew_and_an_answer_of_the_last_one_is_dropped():
    server = CountingServer(seconds=0.1, metadata=OURS)
    with driven(server) as robot:
        robot.run_until(lambda: len(server.asked) == 2)
        robot.controller.reset()
        robot.position, chunks = 0, len(robot.chunks)
        robot.run_to(12)
    assert [message.get("reset", False) for message in server.asked[:3]] == [True, False, True]
    assert [int(message["observation/state"][0]) for message in server.asked[2:]] == sorted(
        int(message["observation/state"][0]) for message in server.asked[2:]
    )
    assert 1 not in robot.chunks[chunks:]


def test_latencies_are_summed_up_and_logged(caplog):
    caplog.set_level(logging.INFO)
    with driven(CountingServer(seconds=0.02, metadata=OURS), log_every=0.2) as robot:
        robot.run_to(30)
        summary = robot.controller.latencies.summary()
        assert robot.controller.subtask.startswith("chunk")
    assert summary["steps"] == len(robot.got)
    assert summary["fallback_steps"] == sum(not from_policy for _, from_policy in robot.got)
    assert summary["server_ms"]["p50"] == 20.0
    assert 20 <= summary["latency_ms"]["p50"] <= summary["latency_ms"]["p99"] <= summary["latency_ms"]["max"]
    lines = [record.message for record in caplog.records if "answers: latency p50" in record.message]
    assert len(lines) >= 2  # on the way, and in the end


def test_loop_of_the_docs_runs_as_written():
    page = (ROOT / "docs" / "drive-a-robot.md").read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (loop,) = (code for language, code in fenced if not language)
    sent: list[np.ndarray] = []
    arm = SimpleNamespace(
        camera=lambda name: np.zeros((48, 64, 3), np.uint8),
        joints=lambda: np.array([sum(action[0] >= 0 for action in sent), 0.0]),
        is_on=lambda: len(sent) < 60,
        send=sent.append,
        wait_for_the_next_step=lambda: sleep(PERIOD),
    )
    server = CountingServer(seconds=0.02, metadata=OURS)
    with server.running() as url:
        exec(loop.replace("ws://gpu-server:8000", url), {"robot": arm})
    assert len(sent) == 60
    assert sent[-1][0] > 20
    assert set(server.asked[1]) >= {"observation/topview", "observation/state", "prompt", "prefix_actions"}


def test_closed_controller_says_so():
    with driven(CountingServer()) as robot:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        robot.step()


def test_importing_the_client_imports_none_of_the_rest():
    heavy = {"torch", "lightning", "lerobot", "aiohttp", "jsonargparse", "scipy", "PIL"}
    check = f"import sys, pi05_lightning.serving.client; sys.exit(str({heavy} & sys.modules.keys() or ''))"
    ran = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert ran.stderr.strip() == ""


def test_before_an_episode_the_robot_is_held_where_it_is():
    where = [[1.0], [2.0]]
    hold = hold_last(lambda: where.pop(0))
    assert [hold({}, None), hold({}, None), hold({}, [3.0])] == [[1.0], [2.0], [3.0]]


@pytest.mark.parametrize(
    "other", [{"action_horizon": 3}, {"checkpoint": "another"}, {"acting": OURS["acting"] | {"robot": "b"}}]
)
def test_last_action_is_held_when_the_server_comes_back_with_another_policy(other, caplog):
    first, second = CountingServer(metadata=OURS), CountingServer(metadata=OURS | other)
    second.say = dict.fromkeys(range(1000), "nothing")
    seen = {"observation/state": np.array([7]), "prompt": "count"}
    with first.running() as url:
        controller = Controller(url, hold_last([-1.0, -1.0]))
        controller.connect(10)
        controller.step(seen, max_wait=5)
    with controller, second.running(int(url.rpartition(":")[2])):
        held = []
        until = monotonic() + 10
        while not second.asked and monotonic() < until:
            held.append(controller.step(seen).tolist())
            sleep(0.02)
        held += [controller.step(seen).tolist() for _ in range(3)]
    assert second.asked
    assert "prefix_actions" not in second.asked[0]
    assert "serves another policy than before" in caplog.text
    assert [-1.0, -1.0] not in held
