"""The desk: one scene in which every instruction is possible, and only the instruction says which one is meant."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from pi05_lightning.sim.demonstrations import questions
from pi05_lightning.sim.desk.environment import ChainEnvironment, Desk, DeskEnvironment
from pi05_lightning.sim.desk.scene import BLOCKS, BUTTONS, OBJECTS, place_words
from pi05_lightning.sim.desk.tasks import (
    CHAIN,
    CHAIN_LENGTH,
    INSTRUCTIONS,
    SEVERAL_STEPS,
    TASKS,
    Left,
    draw_before,
    draw_chain,
    holds,
)
from pi05_lightning.sim.environment import NoSuchEnvironment, View, act_as_expert
from pi05_lightning.sim.instructions import PARAPHRASES, read_paraphrases
from pi05_lightning.sim.splits import split_seeds

VIEW = View(Desk.cameras, 64, 10.0)
HELD_OUT = split_seeds("rollout", 100)


@pytest.fixture(scope="module")
def desk() -> Iterator[DeskEnvironment]:
    with Desk(same_states=True).open("drawer-open", VIEW) as env:
        yield env


def begin(env: DeskEnvironment, name: str, seed: int) -> None:
    """As an environment of another task would, which costs a renderer."""
    env.reset(seed)
    env.instruct(name)


def actions_to_success(env: DeskEnvironment) -> int | None:
    """How many of the expert's actions it takes; None if it runs out of time."""
    for number in range(1, round(env.max_seconds * env.fps) + 1):
        if act_as_expert(env):
            return number
    return None


def test_there_are_at_least_twelve_instructions_and_no_two_are_the_same():
    assert len(INSTRUCTIONS) >= 12
    assert len({task.sentence for task in TASKS.values()}) == len(TASKS)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_each_instruction_is_possible_in_the_same_state_and_does_no_other(desk, name):
    begin(desk, name, HELD_OUT[0])
    assert not any(TASKS[task].solved(desk.episode) for task in TASKS)
    assert actions_to_success(desk) is not None
    for _ in range(2):
        act_as_expert(desk)
    assert [other for other in INSTRUCTIONS if TASKS[other].solved(desk.episode)] == [name]


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_experts_solve_at_least_97_of_100_held_out_states(name):
    with Desk().open(name, VIEW) as env:
        solved = 0
        for seed in HELD_OUT:
            env.reset(seed)
            solved += actions_to_success(env) is not None
    assert solved >= 97


def test_state_depends_on_seed_and_task_or_on_the_seed_alone(desk):
    def seen(env: DeskEnvironment, seed: int) -> np.ndarray:
        env.reset(seed)
        return env.render()["desk"]

    with Desk().open("drawer-open", VIEW) as env, Desk(same_states=True).open("button-red", VIEW) as same:
        first = seen(env, 0)
        steps = actions_to_success(env), env.state
        assert not np.array_equal(seen(env, 1), first)
        actions_to_success(env)
        np.testing.assert_array_equal(seen(env, 0), first)
        np.testing.assert_equal((actions_to_success(env), env.state), steps)
        assert not np.array_equal(seen(same, 0), first)
        desk.reset(0)
        np.testing.assert_array_equal(seen(same, 0), desk.render()["desk"])


def test_everything_is_visible_at_the_start_and_where_its_box_says(desk):
    for seed in HELD_OUT[:8]:
        desk.reset(seed)
        boxes, image = desk.boxes()["desk"], desk.render()["desk"]
        assert boxes.keys() == {*OBJECTS, "gripper"}
        for colour, channel in {"red": 0, "blue": 2, "green": 1}.items():
            name = f"{colour} {'block' if colour in BLOCKS else 'button'}"
            top, left, bottom, right = (round(64 * edge) for edge in boxes[name])
            means = image[:, top:bottom, left:right].mean((1, 2))
            assert means.argmax() == channel, f"{name} at seed {seed} is {means}"


def test_questions_ask_for_the_state_of_things(desk):
    begin(desk, "block-green-drawer", HELD_OUT[1])

    def told() -> dict[str, str]:
        return {a.question: a.answer for a in questions.answers(desk, desk.boxes(["desk"]))}

    before = told()
    actions_to_success(desk)
    after = told()
    assert before["is the drawer open?"] == "half"
    assert (before["is the green block in the drawer?"], after["is the green block in the drawer?"]) == ("no", "yes")
    assert {f"where is the {colour} button?" for colour in BUTTONS} & before.keys()


def test_state_of_a_thing_is_asked_of_the_first_camera_that_shows_it(desk):
    desk.reset(HELD_OUT[1])
    block, drawer, faucet = ({name: (0.1, 0.1, 0.9, 0.9)} for name in ("green block", "drawer", "faucet handle"))
    asked = questions.answers(desk, {"desk": block, "gripperPOV": block | drawer | faucet, "topview": faucet})
    assert {answer.question: answer.camera for answer in asked if not answer.question.startswith("detect")} == {
        "is the green block in the drawer?": "gripperPOV",
        "where does the faucet point?": "gripperPOV",
    }


@pytest.mark.parametrize("task", INSTRUCTIONS)
def test_instruction_as_a_question_is_answered_by_what_it_is_about(desk, task):
    begin(desk, task, HELD_OUT[0])
    said = desk.other_sentences[-1]
    asked = [(a.question, a.camera, a.answer) for a in questions.answers(desk, desk.boxes(), said)]
    assert desk.target.removesuffix(" handle") in TASKS[task].sentence
    boxes = {(camera, answer) for question, camera, answer in asked if question == f"detect the {desk.target}"}
    assert boxes
    assert {(camera, answer) for question, camera, answer in asked if question == said} == boxes


def test_instruction_of_several_steps_is_about_no_one_thing(desk):
    begin(desk, "tidy-up", HELD_OUT[0])
    assert desk.target is None
    assert all(answer.question != "tidy" for answer in questions.answers(desk, desk.boxes(), "tidy"))


def test_other_task_is_watched_whichever_it_is(desk):
    partners = Desk().partners(list(INSTRUCTIONS))
    assert partners.keys() == INSTRUCTIONS.keys()
    assert {*partners.values()} == {*INSTRUCTIONS}
    assert Desk().partners(["button-red"])["button-red"] in INSTRUCTIONS
    begin(desk, "faucet-left", HELD_OUT[2])
    assert desk.watch("button-red")
    assert actions_to_success(desk) is not None
    assert not desk.solved_other
    begin(desk, "button-red", HELD_OUT[2])
    assert desk.watch("faucet-left")
    while not desk.solved_other:
        desk.control_step(TASKS["faucet-left"].expert(desk.episode).action(desk.episode.now.hand))
    assert not TASKS["button-red"].solved(desk.episode)
    assert not desk.watch("faucet-left")


def test_no_task_is_told_in_place_of_another_that_is_done_by_it():
    partners = Desk().partners(list(TASKS))
    assert partners.keys() == TASKS.keys()
    assert not [name for name, other in partners.items() if holds(name, other)]
    with Desk().open("tidy-up", VIEW) as env:
        env.reset(HELD_OUT[0])
        assert not env.watch("store-green")
        assert env.watch("turn-and-open")


def test_unknown_tasks_and_cameras_are_named():
    with pytest.raises(NoSuchEnvironment, match=r"no task 'juggle': use one of drawer-open, .*also chain"):
        Desk().open("juggle", VIEW)
    with pytest.raises(NoSuchEnvironment, match=r"no camera 'front': use one of .*desk"):
        Desk().open("button-red", View(("front",), 64, 10.0))


# --- several steps, and chains


def test_chains_hold_only_what_is_possible_after_what_was_done():
    for seed in range(200):
        left, last = Left(), ""
        chain = draw_chain(np.random.default_rng(seed))
        assert len(chain) == CHAIN_LENGTH
        for name in chain:
            assert name != last
            assert INSTRUCTIONS[name].needs(left)
            left, last = INSTRUCTIONS[name].leaves(left), name


def test_expert_does_a_whole_chain_without_a_reset():
    with Desk().open(CHAIN, VIEW) as env:
        assert isinstance(env, ChainEnvironment)
        env.reset(HELD_OUT[0])
        told = [env.sentence]
        assert actions_to_success(env) is not None or env.ended
        assert (env.done, env.ended) == (CHAIN_LENGTH, False)
        env.reset(HELD_OUT[0])
        assert (env.done, env.sentence) == (0, told[0])
        for _ in range(60):
            env.step(np.zeros(4))
        assert (env.done, env.ended) == (0, True)


def test_instruction_of_a_chain_that_holds_already_is_done_once_it_is_done_anew():
    def do(env: ChainEnvironment, name: str) -> None:
        while not env.ended and not INSTRUCTIONS[name].solved(env.episode):
            env.control_step(INSTRUCTIONS[name].expert(env.episode).action(env.episode.now.hand))

    with Desk().open(CHAIN, VIEW) as env:
        env.reset(HELD_OUT[8])
        first = env.sentence
        do(env, "drawer-open")
        assert (env.done, env.sentence) == (0, first)
        assert first == INSTRUCTIONS["block-purple-right"].sentence
        while env.done == 0 and not env.ended:
            act_as_expert(env)
        for _ in range(10):
            env.control_step(np.zeros(4))
        assert (env.done, env.sentence) == (1, INSTRUCTIONS["drawer-open"].sentence)
        do(env, "drawer-close")
        do(env, "drawer-open")
        assert env.done == 2


def test_button_that_is_down_when_its_instruction_is_given_is_to_be_pressed_anew():
    with Desk().open("button-red", VIEW) as env:
        env.reset(HELD_OUT[0])
        solved, expert = TASKS["button-red"].solved, TASKS["button-red"].expert
        while not solved(env.episode):
            env.control_step(expert(env.episode).action(env.episode.now.hand))
        env.instruct("button-red")
        env.control_step(np.zeros(4))
        assert not solved(env.episode)
        while env.episode.held:  # it springs back
            env.control_step(np.array([0.0, 0.0, 1.0, 0.0]))
        assert not solved(env.episode)
        while not solved(env.episode):
            env.control_step(expert(env.episode).action(env.episode.now.hand))


@pytest.mark.parametrize("name", ["store-green", pytest.param("tidy-up", marks=pytest.mark.slow)])
def test_several_steps_are_done_once_all_of_them_are(name):
    with Desk().open(name, VIEW) as env:
        env.reset(HELD_OUT[3])
        subtasks = []
        for _ in range(round(env.max_seconds * env.fps)):
            subtasks.append(env.subtask())
            if act_as_expert(env):
                break
        else:
            pytest.fail("the expert ran out of time")
        assert env.episode.now.in_drawer("green")
        assert subtasks[-1].startswith("push the drawer shut at the back ")
        assert SEVERAL_STEPS[name].sentence == env.sentence


@pytest.mark.parametrize(
    "name", ["block-green-drawer", "turn-and-open", pytest.param("tidy-up", marks=pytest.mark.slow)]
)
def test_task_is_possible_where_others_have_ended(name):
    with Desk().open(name, VIEW) as env:
        starts = []
        for seed in HELD_OUT[:3]:
            env.reset_after_others(seed)
            starts.append(env.state[:3])
            assert env.sentence == TASKS[name].sentence
            assert not TASKS[name].solved(env.episode)
            assert actions_to_success(env) is not None
        env.reset(HELD_OUT[0])
        assert min(np.linalg.norm(start - env.state[:3]) for start in starts) > 0.02
        env.reset_after_others(HELD_OUT[2])
        np.testing.assert_array_equal(env.state[:3], starts[2])


def test_no_task_of_the_blocks_follows_what_put_them_away():
    tidy, store = TASKS["tidy-up"], TASKS["block-green-drawer"]
    for seed in range(200):
        for task in (tidy, store):
            left = Left()
            for name in draw_before(np.random.default_rng(seed), task):
                left = INSTRUCTIONS[name].leaves(left)
            assert left.drawer != "shut"
            assert left.block("green") is not None
            assert INSTRUCTIONS[name] is not task


def test_subtask_says_where_the_thing_is_that_it_names_last(desk):
    begin(desk, "block-green-drawer", HELD_OUT[0])
    said = []
    while not TASKS["block-green-drawer"].solved(desk.episode):
        said.append(desk.subtask())
        act_as_expert(desk)
    places = {
        words: [subtask.partition(" at the ")[2] for subtask in said if words in subtask]
        for words in ("grasp", "carry")
    }
    block, drawer = desk.positions()["green block"], desk.positions()["drawer"]
    assert set(places["grasp"]) <= {"front centre", "middle centre"}
    assert set(places["carry"]) == {"back right" if drawer[0] > 0 else "back left"}
    assert place_words(block) == place_words(drawer)


@pytest.mark.parametrize("thing", OBJECTS)
def test_place_of_a_thing_is_said_alike_however_little_it_is_moved(desk, thing):
    for seed in HELD_OUT[:20]:
        desk.reset(seed)
        at = desk.positions()[thing]
        assert len({place_words(at + np.array([x, y, 0.0])) for x in (-0.01, 0.01) for y in (-0.005, 0.005)}) == 1


def test_words_for_training_are_no_paraphrase_that_a_rollout_says():
    held_out = read_paraphrases(PARAPHRASES)
    assert held_out.keys() >= {task.sentence for task in TASKS.values()}
    said = {words for task in TASKS.values() for words in (task.sentence, *task.others)}
    assert not said & {words for others in held_out.values() for words in others}
    assert all(len(task.others) >= 4 for task in INSTRUCTIONS.values())
