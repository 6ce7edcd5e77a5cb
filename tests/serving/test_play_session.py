"""Playing with a policy: it acts as in a rollout, and goes on as it is told meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest

from pi05_lightning import Pi05Policy
from pi05_lightning.sim.environment import EnvironmentConfig
from pi05_lightning.sim.player import Player, Start
from pi05_lightning.sim.rollout import Lanes, view_of
from pi05_lightning.sim.session import MOST_SHOWN, Session, State
from pi05_lightning.sim.simulators import MT50
from pi05_lightning.sim.trials import ENDED, Trial
from tests.serving.room import SENTENCES, Room
from tests.sim.walk import result_of

SEEDS = {task: range(10 * number, 10 * number + 3) for number, task in enumerate(SENTENCES)}


@pytest.fixture(scope="module")
def policy(served: Path) -> Pi05Policy:
    return Pi05Policy(served, max_state_distance=None, execution_horizon=2, noise_scale=1.0)


@pytest.fixture
def player(policy: Pi05Policy) -> Player:
    return Player("it", policy.session(0), Start(Room(), SEEDS))


@pytest.fixture
def pair(policy: Pi05Policy) -> Session:
    return session_of(*(Player(name, policy.session(0), Start(Room(), SEEDS)) for name in ("it", "another")))


Open = Callable[..., Session]


@pytest.fixture
def play(policy: Pi05Policy) -> Iterator[Open]:
    """Begins a session of so many players; it is ended after the test."""
    begun: list[Session] = []

    def open_session(players: int = 1, env: EnvironmentConfig = Room(), states: list[State] | None = None) -> Session:  # noqa: B008
        def of() -> Sequence[Player]:
            return [Player(str(n), policy.session(0), Start(env, SEEDS, max_seconds=0.8)) for n in range(players)]

        begun.append(Session(of, [].append if states is None else states.append))
        begun[-1].begin()
        return begun[-1]

    yield open_session
    for session in begun:
        session.end()


def session_of(*players: Player) -> Session:
    """What is said is done at once, in this thread."""
    session = Session(lambda: players, lambda state: None)
    session.players = players
    return session


def tell(player: Player, text: str, stay: bool = False, task: str | None = None) -> None:
    session_of(player).tell(text, stay, task)


def done(future: Future[None]) -> None:
    future.result(timeout=60)


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = monotonic() + seconds
    while not condition():
        assert monotonic() < end
        sleep(0.01)


def test_it_acts_as_in_a_rollout_from_the_same_initial_state(policy: Pi05Policy, player: Player) -> None:
    trial, session = Trial("policy", "right", SEEDS["right"][2]), policy.session(0)
    (env,) = Lanes(Room(), view_of(policy)).of("right", 1)
    result = result_of(session, env, trial)
    player.reset("right", 2)
    while player.running:
        player.step()
    assert (player.course.result.decisions, player.course.result.outcome) == (result.decisions, result.outcome)
    np.testing.assert_array_equal(player.frame.state, env.observation().state)


def test_executed_actions_are_those_of_the_chunk_up_to_its_place(player: Player) -> None:
    for place in (0, 1, 0):
        player.step()
        assert player.chunk is not None
        assert player.place == place
        np.testing.assert_array_equal(player.executed[-1], player.chunk[place])


def test_what_is_due_counts_down_to_the_next_decision_also_while_the_last_chunk_goes_on(served: Path) -> None:
    options = {"max_state_distance": None, "execution_horizon": 3, "noise_scale": 1.0}
    policy = Pi05Policy(served, inference_delay=2, **options)
    player = Player("it", policy.session(0), Start(Room(), SEEDS))
    session, found = session_of(player), []
    for _ in range(6):
        player.step()
        (shown,) = session.state()["players"]
        found.append((shown["place"], shown["due"]))
    assert found == [(0, 2), (1, 1), (2, 0), (3, 2), (4, 1), (2, 0)]


def test_places_that_are_no_box_are_shown_as_they_were_said(player: Player, monkeypatch: pytest.MonkeyPatch) -> None:
    point, box = "<loc0400><loc0500>", "<loc0100><loc0200><loc0300><loc0400>"
    said = {point: (point, 0), f"{box} cube": ("cube", 1), f"{box}{point}": (point, 1), f"{box} ; {box}": (";", 2)}
    for text, (words, boxes) in said.items():
        monkeypatch.setattr(player.policy, "answer", lambda *_, text=text: text)
        player.ask("what is it?")
        (answer,) = player.answers
        assert (answer.text, len(answer.boxes)) == (words, boxes)


def test_another_task_of_the_scene_is_judged_from_where_it_is(player: Player) -> None:
    player.step()
    before = player.frame.state
    tell(player, "  go to the  RIGHT ")
    assert (player.judged, player.task, player.course.result.decisions) == ("right", "left", 0)
    np.testing.assert_array_equal(player.frame.state, before)
    assert player.frame.task == "go to the  RIGHT"
    player.step()
    player.env.at[0] = 1.0
    player.step()
    assert player.course.result.success
    tell(player, "go to the right")
    assert (player.task, player.course.result.success, player.number) == ("right", False, 0)


def test_a_task_of_another_scene_opens_it_at_the_same_number_and_whoever_stays_is_told_it_here(player: Player) -> None:
    player.reset("left", 2)
    tell(player, "go down", stay=True)
    assert (player.task, player.judged, player.frame.task) == ("left", "left", "go down")
    tell(player, "go down")
    assert (player.task, player.judged, player.number, player.course.trial.seed) == (
        "deep",
        "deep",
        2,
        SEEDS["deep"][2],
    )


def test_words_that_no_task_has_are_told_and_stay_told_when_it_begins_again(player: Player) -> None:
    tell(player, "wander about")
    player.step()
    assert (player.judged, player.frame.task, player.env.sentence) == ("left", "wander about", "go to the left")
    player.reset("left", 1)
    assert player.frame.task == "wander about"
    player.reset("right", 1)
    assert player.frame.task == "go to the right"


def test_a_task_that_begins_anew_has_its_own_instruction_again(pair: Session) -> None:
    pair.tell("wander about")
    pair.reset(1)
    assert [player.frame.task for player in pair.players] == ["wander about"] * 2
    pair.reset(1, "left", anew=True)
    assert [player.frame.task for player in pair.players] == ["go to the left"] * 2


@pytest.mark.parametrize(("text", "stay"), [("wander about", False), ("go down", True)])
def test_what_is_solved_when_it_is_told_counts_once_it_was_not(player: Player, text: str, stay: bool) -> None:
    player.env.at[0] = -1.0
    player.step()
    assert player.course.result.success
    tell(player, text, stay)
    player.step()
    assert (player.judged, player.course.result.success, player.running) == ("left", False, True)
    for place, success in ((0.0, False), (-1.0, True)):
        player.env.at[0] = place
        player.step()
        assert player.course.result.success is success


def test_what_was_not_solved_when_it_was_told_counts_at_once(player: Player) -> None:
    player.step()
    tell(player, "wander about")
    player.env.at[0] = -1.0
    player.step()
    assert player.course.result.success


def test_what_is_solved_and_told_again_begins_anew_whatever_was_told_since(player: Player) -> None:
    player.env.at[0] = -1.0
    player.step()
    tell(player, "wander about")
    tell(player, "go to the left")
    np.testing.assert_allclose(player.frame.state[:2], np.random.default_rng(0).uniform(-0.1, 0.1, 2), atol=1e-6)
    player.env.at[0] = -1.0
    player.step()
    assert player.course.result.success


def test_another_task_that_is_solved_already_counts_once_it_was_not(player: Player) -> None:
    player.env.at[0] = -1.0
    player.step()
    player.env.at[0] = 1.0
    for _ in range(2):
        tell(player, "go to the right")
    player.step()
    assert player.env.at[0] > 0.5
    assert (player.judged, player.course.result.success) == ("right", False)


def test_of_tasks_that_share_their_instruction_the_named_one_is_meant_else_the_judged_one() -> None:
    start = Start(MT50(), {"push-v3": range(3), "push-back-v3": range(3), "reach-v3": range(3)})
    for judged, task in (("push-v3", "push-v3"), ("push-back-v3", "push-back-v3"), ("reach-v3", "push-v3")):
        assert start.task_of("push the  puck to a goal", judged) == task


def test_an_instruction_is_of_the_task_that_it_is_said_to_be_of(player: Player) -> None:
    tell(player, "go there", task="right")
    assert (player.judged, player.frame.task) == ("right", "go there")


def test_what_the_environment_ended_begins_anew_when_something_else_is_told(policy: Pi05Policy) -> None:
    player = Player("it", policy.session(0), Start(Room(ends=2), SEEDS))
    player.reset("left", 1)
    start = player.frame.state
    for _ in range(2):
        player.step()
    assert player.course.result.outcome == ENDED
    tell(player, "wander about")
    assert (player.judged, player.number, player.frame.task) == ("left", 1, "wander about")
    np.testing.assert_array_equal(player.frame.state, start)
    player.step()
    assert player.running


def test_a_push_moves_the_arm_by_a_few_centimetres(player: Player) -> None:
    before = player.frame.state
    player.push("near")
    np.testing.assert_allclose(player.frame.state - before, [0, -0.08, 0, 0], atol=1e-6)


def test_where_something_is_is_asked_in_words_and_for_boxes_in_every_camera(
    player: Player, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def answer(frame: object, question: str, camera: str) -> str:
        asked.append((question, camera))
        return "<loc0100><loc0200><loc0300><loc0400>" if question.startswith("detect") else "left, ahead"

    monkeypatch.setattr(player.policy, "answer", answer)
    player.ask("Where is the red button?")
    assert asked == [
        ("Where is the red button?", "top"),
        ("detect the red button", "top"),
        ("detect the red button", "wrist"),
    ]
    assert [(said.text, len(said.boxes)) for said in player.answers] == [("left, ahead", 1), ("", 1)]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("the policy was not trained to answer questions"),
            "the policy was not trained to answer questions",
        ),
        (RuntimeError("CUDA error"), "RuntimeError: CUDA error"),
    ],
)
def test_who_cannot_answer_is_named_and_the_other_is_asked(
    pair: Session, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    first, second = pair.players
    pair.ask("is it closed?")

    def answer(*_: object) -> str:
        raise error

    monkeypatch.setattr(first.policy, "answer", answer)
    with pytest.raises(ValueError, match=f"it: {said}"):
        pair.ask("is it open?")
    assert ([one.asked for one in first.answers], [one.asked for one in second.answers]) == ([], ["is it open?"])


def test_the_policy_answers_in_words_that_it_knows(player: Player) -> None:
    player.ask("is it closed?")
    (said,) = player.answers
    assert (said.camera, said.picture.shape) == ("top", (48, 64, 3))


def test_a_simulator_that_raises_ends_its_episode_and_the_session_goes_on(play: Open) -> None:
    session = play(env=Room(breaks=3))
    done(session.do(lambda: session.tell("go to the left")))
    (player,) = session.players
    until(lambda: not player.running)
    assert player.course.result.outcome.startswith("the simulator raised RuntimeError: the floor gave way (")
    done(session.do(lambda: session.reset(1)))
    assert player.running


def test_what_is_wrong_is_said_to_who_asked_and_the_others_play_on(play: Open) -> None:
    session = play()
    wrong: dict[str, Callable[[], None]] = {
        "blank": lambda: session.tell(" \n"),
        "numbered from 0 to 2, not 3": lambda: session.reset(3),
        "no task 'fly'": lambda: session.reset(0, "fly"),
        "is no way": lambda: session.push("up and away"),
        "3 is none of": lambda: session.set_speed(3),
        "the question is blank": lambda: session.ask(""),
    }
    for message, what in wrong.items():
        with pytest.raises(ValueError, match=message):
            done(session.do(what))
    done(session.do(session.step))
    assert session.players[0].course.result.decisions == 1


def test_paused_it_waits_and_acts_once_when_asked(play: Open) -> None:
    states: list[State] = []
    session = play(players=2, states=states)
    for _ in range(3):
        done(session.do(session.step))
    done(session.do(lambda: session.pause(True)))
    assert [player["seconds"] for player in states[-1]["players"]] == pytest.approx([0.3, 0.3])


def test_what_is_done_is_shown_before_the_next_action(play: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[State] = []
    told: list[str] = []
    session = play(states=states)
    monkeypatch.setattr(Player, "step", lambda player: told.append(states[-1]["players"][0]["told"]))
    sleep(2 / MOST_SHOWN)
    session.do(lambda: session.tell("wander about"))
    done(session.do(lambda: session.tell("stand still")))
    until(lambda: bool(told))
    assert told[-1] == "stand still"


def test_players_side_by_side_keep_the_speed_that_they_are_given(play: Open) -> None:
    session = play(players=2)
    done(session.do(lambda: session.set_speed(4)))
    done(session.do(lambda: session.tell("wander about")))
    until(lambda: not any(player.running for player in session.players))
    first, second = session.players
    assert first.rate is not None
    assert first.rate < 4.4
    assert first.course.result.decisions == second.course.result.decisions


def test_the_scene_has_no_words_for_a_task_whose_instruction_its_environment_alone_can_tell(play: Open) -> None:
    session = play(env=Room(unsaid="deep"))
    assert session.scene()["tasks"] == SENTENCES | {"deep": None}


def test_players_side_by_side_begin_anew_together_where_one_has_done_what_they_are_told(pair: Session) -> None:
    first, second = pair.players
    first.env.at[0] = -1.0
    pair.step()
    assert (first.course.result.success, second.course.result.success) == (True, False)
    pair.tell("go to the left")
    assert (first.course.result.success, second.course.result.decisions) == (False, 0)
    np.testing.assert_array_equal(first.frame.state, second.frame.state)


def test_players_that_came_apart_begin_anew_together(pair: Session) -> None:
    first, second = pair.players
    second.reset("deep", 1)
    pair.tell("wander about")
    assert (second.task, second.judged, second.number) == ("left", "left", 0)
    np.testing.assert_array_equal(first.frame.state, second.frame.state)


@pytest.mark.parametrize(
    "what",
    [
        lambda session: session.pause(False),
        lambda session: session.step(),
        lambda session: session.set_speed(0.5),
        lambda session: session.ask("is it closed?"),
    ],
    ids=["pause", "step", "set_speed", "ask"],
)
def test_speed_is_that_since_it_last_stood_still(pair: Session, what: Callable[[Session], None]) -> None:
    for _ in range(3):
        for player in pair.players:
            player.step()
    assert all(player.rate is not None for player in pair.players)
    what(pair)
    assert [player.rate for player in pair.players] == [None, None]


def test_what_cannot_be_opened_is_raised_where_it_begins(policy: Pi05Policy) -> None:
    session = Session(lambda: [Player("it", policy.session(0), Start(Room(), {}))], lambda state: None)
    with pytest.raises(StopIteration):
        session.begin()
