"""A robot's control loop when answers fail, are late or never come: the fallback acts, and the loop goes on."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from pi05_lightning.serving.client import Controller, Refused, ServerError, always, hold_last
from tests.serving import counting
from tests.serving.counting import OURS, CountingServer
from tests.serving.driven import STILL, Robot, driven


def test_fallback_acts_by_the_callers_rule_and_the_policy_goes_on_where_it_was():
    server = CountingServer(seconds=0.1, length=4)
    with server.running() as url, Controller(url, hold_last(STILL)) as controller:
        robot = Robot(controller)
        robot.run_to(12)
    assert tuple(robot.got[0][0]) == tuple(STILL)
    for (before, _), (action, from_policy) in pairwise(robot.got):
        if not from_policy:
            np.testing.assert_array_equal(action, before)
    assert {int(action[0]) for action, from_policy in robot.got if not from_policy} >= {-1, 3}


def test_fallback_that_raises_ends_the_loop():
    def give_up(observation, last):
        raise RuntimeError("nothing to do")

    with Controller("ws://127.0.0.1:1", give_up) as controller, pytest.raises(RuntimeError, match="nothing to do"):
        controller.step({})


@pytest.mark.parametrize(
    "given", [None, [], [[0.0, 0.0]], [0.0, np.nan], [0.0, np.inf], 1.0, [0.0] * 3, {"x": 0.0}, "up"]
)
def test_fallback_that_gives_no_action_of_the_robot_is_refused(given):
    server = CountingServer(metadata=OURS | {"action_dim": 2})
    server.say = {0: "nothing"}
    with server.running() as url, Controller(url, hold_last(lambda: given)) as controller:
        controller.connect(30)
        with pytest.raises(ValueError, match=r"the fallback gave .*: it must be an action of 2 dims, of finite"):
            controller.step({"observation/state": np.zeros(1)})


@pytest.mark.parametrize("given", [None, []])
def test_fallback_that_gives_no_action_before_there_is_a_server_is_refused(given):
    with Controller("ws://127.0.0.1:1", always(given)) as controller, pytest.raises(ValueError, match="be an action"):
        controller.step({})


def test_no_server_is_said_after_the_time_that_it_was_waited_for():
    with (
        Controller("ws://127.0.0.1:1", always(STILL)) as controller,
        pytest.raises(TimeoutError, match=r"no policy at ws://127\.0\.0\.1:1: .*Connect call failed"),
    ):
        controller.connect(0.3)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("ValueError: state has 9 dimensions", "state has 9 dimensions"),
        ({"actions": np.full((8, 2), np.nan)}, "not finite"),
        ({"actions": np.zeros(8)}, r"`actions` is float64\[8\]"),
        ({"subtask": "go"}, "holds no actions"),
        ({"actions": "go"}, "holds no actions"),
        ([1, 2], "is no answer but a list"),
    ],
)
def test_error_of_the_server_is_raised_or_handed_over(said, message):
    server, errors = CountingServer(length=8), []
    server.say = {2: said, 4: said}
    with server.running() as url, Controller(url, always(STILL)) as controller:
        robot = Robot(controller)
        with pytest.raises(ServerError, match=message):
            robot.run_to(100)
        controller.on_error = errors.append
        robot.run_to(robot.position + 20)
        assert controller.latencies.summary()["errors"] == 2
    assert len(errors) == 1
    assert message in str(errors[0]) or isinstance(errors[0], ServerError)


def test_waiting_is_over_once_the_server_has_refused_and_the_fallback_acts():
    server, errors = CountingServer(metadata=OURS), []
    server.say = dict.fromkeys(range(1, 100), "ValueError: state[0] is outside")
    with driven(server, mode="waiting", on_error=errors.append) as robot:
        robot.run(40)
        assert robot.longest_step < 1  # seconds; an answer is waited for 60
        assert robot.controller.latencies.counts["fallback_steps"] > 10
        assert 1 <= len(errors) <= 5
        server.say.clear()
        robot.run_to(12)


def test_server_of_openpi_that_fails_says_why_and_is_connected_to_anew():
    server, errors = CountingServer(), []
    server.say = {2: "crash"}
    with driven(server, on_error=errors.append) as robot:
        robot.run_to(30)
    assert [str(error) for error in errors] == ["Traceback (most recent call last): KeyError: 'image'"]
    assert len(server.headers) == 2


def test_busy_server_is_asked_again(caplog):
    server = CountingServer()
    server.say = {0: "Busy: 64 requests wait", 1: "Busy: 64 requests wait"}
    with driven(server) as robot:
        robot.run_to(10)
        assert robot.controller.latencies.summary()["busy"] == 2
    assert caplog.text.count("64 requests wait (it is asked again)") == 1


def test_observation_that_is_too_large_for_the_server_is_an_error():
    with driven(CountingServer(max_bytes=1000)) as robot:
        robot.run_to(5)
        robot.see = lambda: {"observation/state": np.full(1000, robot.position)}
        with pytest.raises(ServerError, match="the observation is too large"):
            robot.run_to(50)


def test_observation_that_cannot_be_sent_is_the_callers_error():
    with driven(CountingServer()) as robot, pytest.raises(ValueError, match="a object cannot be sent"):
        robot.controller.step({"observation/state": object()})


def test_token_is_sent_as_openpis_clients_send_it(monkeypatch):
    server = CountingServer(token="secret")
    with driven(server, token="secret") as robot:
        robot.run_to(5)
    monkeypatch.setenv("PI05_TOKEN", "secret")
    with driven(server):
        pass
    assert server.headers == ["Api-Key secret"] * 2


def test_space_around_a_token_is_not_sent(monkeypatch):
    server = CountingServer(token="secret")
    with driven(server, token="secret\n"):
        pass
    monkeypatch.setenv("PI05_TOKEN", " secret\r\n")
    with driven(server):
        pass
    assert server.headers == ["Api-Key secret"] * 2


@pytest.mark.parametrize("token", ["se cret", "se\ncret", "secrét", "\n"])
def test_what_is_no_token_is_refused_and_not_repeated(monkeypatch, token):
    for where, options in (("token", {"token": token}), ("PI05_TOKEN", {})):
        monkeypatch.setenv("PI05_TOKEN", token)
        with pytest.raises(ValueError, match=f"^{where} holds no token: give letters, digits") as refused:
            Controller("ws://127.0.0.1:1", always(STILL), **options)
        assert token.strip() == "" or token not in str(refused.value)


def test_wrong_token_is_an_error_and_the_fallback_acts():
    errors = []
    with CountingServer(token="secret").running() as url:
        with (
            Controller(url, always(STILL), token="other") as controller,
            pytest.raises(Refused, match=r"401.*wrong token.*give the token"),
        ):
            controller.connect(10)
        with Controller(url, always(STILL), on_error=errors.append) as controller:
            robot = Robot(controller)
            robot.run_until(lambda: bool(errors))
    assert isinstance(errors[0], Refused)
    assert robot.position == 0


def test_connection_that_is_lost_is_made_anew():
    server = CountingServer(seconds=0.01)
    server.say = {2: "drop", 5: "drop"}
    with driven(server) as robot:
        robot.run_to(60)
        assert robot.controller.latencies.summary()["lost"] == 2
    assert len(server.headers) == 3


def test_answer_that_never_comes_is_given_up():
    server = CountingServer()
    server.say = {1: "nothing"}
    with driven(server, answer_timeout=0.3) as robot:
        robot.run_to(30)
    assert len(server.headers) == 2


def test_server_that_is_killed_and_started_again_costs_no_more_than_the_time_it_is_away():
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, counting.__file__, str(port), "0.02"])

    with CountingServer().running() as url:
        port = int(url.rpartition(":")[2])  # that is free afterwards
    process = start()
    try:
        with Controller(f"ws://127.0.0.1:{port}", always(STILL)) as controller:
            controller.connect(20)
            robot = Robot(controller)
            robot.run_to(20)
            process.kill()
            process.wait()
            at = robot.position
            robot.run(20)
            assert at + 1 <= robot.position <= at + 8  # what was in the queue
            assert not robot.got[-1][1]
            process = start()
            robot.run_to(robot.position + 20)
    finally:
        process.kill()
        process.wait()
