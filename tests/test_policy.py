"""The policy: what it predicts is what the trained module predicts, and observations that do not fit are refused."""

from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pi05_lightning import Pi05DataModule, Pi05Module, Pi05Policy, StageSwitch
from pi05_lightning.data.fast import FastDecodeError
from pi05_lightning.data.processor import Processor
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, StageOptions
from pi05_lightning.weights.folder import save
from tests.quiet_trainer import quiet_trainer
from tests.random_fast import random_fast
from tests.untrained import untrained_model


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pi05Module, Pi05DataModule, Path]:
    """A module after two steps, its data, and its checkpoint."""
    module = Pi05Module(ModelConfig.preset("debug"), rtc_max_delay=3)
    data = Pi05DataModule({"robot": LeRobotConfig(path=str(videos), val_fraction=0.2)}, batch_size=4, num_workers=0)
    drawn = {"robot/continuous_robot_actions": 0.5, "robot/hl_subtask": 0.5}
    act = StageOptions(LossWeights(subtask=1, flow=1), drawn)
    switch = StageSwitch(0, 2, posttrain=act)
    trainer = quiet_trainer(switch, default_root_dir=tmp_path_factory.mktemp("run"))
    trainer.fit(module, data)
    path = Path(trainer.default_root_dir, "last.ckpt")
    trainer.save_checkpoint(path)
    return module, data, path


def observation(data: Pi05DataModule, index: int = 0) -> dict:
    frame = data.sources("val")["robot"][index]
    return {"image": frame.images, "state": frame.state, "task": frame.task}


@pytest.mark.parametrize("num_steps", [3, 10])
def test_policy_from_checkpoint_predicts_what_the_module_predicts(trained, num_steps: int) -> None:
    module, data, path = trained
    frame = data.sources("val")["robot"][0]
    noise = torch.randn(1, module.config.horizon, module.config.action_dim)
    batch = module.processor.collate([module.processor.prompt(frame, "robot")])
    with torch.no_grad():
        prefix = module.model.backbone(batch, need_hidden=False)
        expected = module.model.flow_head.sample(prefix, noise[:, None], num_steps)[0, 0].numpy()
    policy = Pi05Policy.from_pretrained(path, hierarchical=False, num_steps=num_steps)
    found = policy.predict_chunk(observation(data), noise[0])
    np.testing.assert_allclose(found, module.processor.real_actions(expected, frame, "robot"), rtol=1e-5)


def test_exported_folder_predicts_what_the_checkpoint_predicts(trained, tmp_path: Path) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    policy.save_pretrained(tmp_path)
    again = Pi05Policy.from_pretrained(tmp_path)
    noise = torch.randn(policy.model.config.horizon, policy.model.config.action_dim)
    one, other = (p.predict_chunk(observation(data), noise) for p in (policy, again))
    assert np.array_equal(one, other)


def test_predict_hands_out_a_chunk_before_it_asks_for_the_next(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path, hierarchical=False, pred_horizon=2)
    chunks = []
    original = policy.predict_chunk
    monkeypatch.setattr(policy, "predict_chunk", lambda *args: chunks.append(original(*args)) or chunks[-1])
    actions = [policy.predict(observation(data)) for _ in range(4)]
    assert len(chunks) == 2
    assert np.array_equal(actions[2], chunks[1][0])


class Robot:
    """What a policy is asked at each step of an episode, and a record of the chunks that it computes."""

    def __init__(self, policy: Pi05Policy, data: Pi05DataModule, monkeypatch: pytest.MonkeyPatch) -> None:
        self.policy, self.chunks, self.data = policy, [], data
        compute = policy.predict_chunk

        def recorded(*args) -> np.ndarray:
            self.chunks.append(compute(*args))
            return self.chunks[-1]

        monkeypatch.setattr(policy, "predict_chunk", recorded)

    def run(self, steps: int) -> np.ndarray:
        return np.stack([self.policy.predict(observation(self.data, step % 5)) for step in range(steps)])


def test_next_chunk_goes_on_from_the_actions_that_run_while_it_is_computed(trained, monkeypatch) -> None:
    _, data, path = trained
    robot = Robot(Pi05Policy.from_pretrained(path, pred_horizon=4, inference_delay=2), data, monkeypatch)
    actions = robot.run(12)
    first, second, third = robot.chunks[:3]
    assert np.array_equal(second[:2], first[4:6])
    assert np.array_equal(third[:2], second[4:6])
    assert np.array_equal(actions, np.concatenate([first[:6], second[2:6], third[2:4]]))


def test_chunk_in_the_background_is_the_one_of_the_observation_it_was_started_with(trained, monkeypatch) -> None:
    _, data, path = trained
    options = {"pred_horizon": 4, "inference_delay": 2, "hierarchical": False, "seed": 3}
    robot = Robot(Pi05Policy.from_pretrained(path, **options), data, monkeypatch)
    robot.run(7)
    policy = Pi05Policy.from_pretrained(path, **options)
    first = policy.predict_chunk(observation(data, 0))
    # the fifth action is asked for, and two are left
    assert np.array_equal(robot.chunks[1], policy.predict_chunk(observation(data, 4), None, first[4:6]))


def test_reset_forgets_the_chunk_in_the_background(trained, monkeypatch) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path, pred_horizon=3, inference_delay=2, hierarchical=False)
    robot = Robot(policy, data, monkeypatch)
    robot.run(4)
    policy.reset()
    assert np.array_equal(robot.run(1)[0], robot.chunks[-1][0])


def fail(*_) -> None:
    raise RuntimeError("out of memory")


def test_an_error_in_the_background_reaches_the_caller_once(trained, monkeypatch) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path, pred_horizon=2, inference_delay=1, hierarchical=False)
    for _ in range(2):
        policy.predict(observation(data))
    with monkeypatch.context() as broken:
        broken.setattr(policy, "compute", fail)
        policy.predict(observation(data))
        wait([policy._next])
    with pytest.raises(RuntimeError, match="out of memory"):
        policy.predict(observation(data))
    assert np.isfinite([policy.predict(observation(data)) for _ in range(6)]).all()


def test_background_chunk_sees_the_images_as_they_were_when_it_was_started(trained, monkeypatch) -> None:
    _, data, path = trained
    options = {"pred_horizon": 4, "inference_delay": 2, "hierarchical": False, "seed": 3}
    chunks = []
    for overwritten in (False, True):
        policy = Pi05Policy.from_pretrained(path, **options)
        monkeypatch.setattr(policy, "_worker", Later())
        buffers = {name: image.copy() for name, image in observation(data)["image"].items()}
        for _ in range(5):
            policy.predict(observation(data) | {"image": buffers})
        if overwritten:  # as a camera's driver does
            for buffer in buffers.values():
                buffer[:] = 255 - buffer
        chunks.append([policy.predict(observation(data)) for _ in range(3)])
    assert np.array_equal(*chunks)


class Later:
    """An executor that runs a call when its result is asked for: the slowest that one can be."""

    def submit(self, function, *args):
        future = Future()
        future.result = lambda: function(*args)
        return future


def test_another_task_ends_the_chunk_and_the_subtask_of_the_last(trained) -> None:
    _, data, path = trained
    options = {"noise_scale": 0, "replan_subtask_every": 9, "pred_horizon": 4}
    policy = Pi05Policy.from_pretrained(path, **options)
    policy.predict(observation(data))
    other = observation(data) | {"task": "close the door"}
    found = policy.predict(other), policy.predict(other)
    policy = Pi05Policy.from_pretrained(path, **options)
    assert np.array_equal(found, [policy.predict(other), policy.predict(other)])


def test_actions_that_are_given_come_back_in_the_robots_units(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path, hierarchical=False)
    noise = torch.randn(policy.model.config.horizon, policy.model.config.action_dim)
    given = policy.predict_chunk(observation(data))[:3]
    chunk = policy.predict_chunk(observation(data), noise, given)
    assert np.array_equal(chunk[:3], given)
    assert not np.array_equal(chunk[3:], policy.predict_chunk(observation(data), noise)[3:])


@pytest.mark.parametrize("shape", [(2, 9), (8, 2), (2,)])
def test_actions_given_in_another_shape_are_refused(trained, shape: tuple[int, ...]) -> None:
    _, data, path = trained
    with pytest.raises(ValueError, match="prefix_actions has shape"):
        Pi05Policy.from_pretrained(path).predict_chunk(observation(data), None, np.zeros(shape))


def test_checkpoint_of_captions_alone_is_no_policy(trained) -> None:
    policy = Pi05Policy.from_pretrained(trained[2])
    policy.processor.robots.clear()
    with pytest.raises(ValueError, match="no robot's data"):
        Pi05Policy((policy.model, policy.processor))


def test_noise_of_another_shape_is_refused(trained) -> None:
    _, data, path = trained
    with pytest.raises(ValueError, match=r"noise has shape .* expected \[horizon D\] = \[8, 6\]"):
        Pi05Policy.from_pretrained(path).predict_chunk(observation(data), torch.zeros(3, 6))


def test_noise_scale_0_starts_the_flow_from_the_mean_of_its_noise(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path, noise_scale=0)
    np.testing.assert_array_equal(
        policy.predict_chunk(observation(data)), policy.predict_chunk(observation(data), torch.zeros(8, 6))
    )


def test_subtask_is_predicted_again_for_every_nth_chunk(trained, monkeypatch: pytest.MonkeyPatch) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path, pred_horizon=2, replan_subtask_every=3)
    said, used = iter("abcdef"), []
    original = policy.compute
    monkeypatch.setattr(policy, "say", lambda *args: [next(said)])
    monkeypatch.setattr(policy, "compute", lambda *args: used.append(args[1][0]) or original(*args))
    for _ in range(14):
        policy.predict(observation(data))
    assert used == ["a", "a", "a", "b", "b", "b", "c"]
    policy.reset()
    policy.predict(observation(data))
    assert used[-1] == "d"


@pytest.mark.parametrize(
    ("said", "subtask"),
    [
        ("Subtask: open the drawer", "open the drawer"),
        ("<loc0001><loc0002><loc0003><loc0004> drawer Subtask: open it", "open it"),
        ("open it", "open it"),
    ],
)
def test_subtask_is_what_follows_its_opening(trained, monkeypatch, said: str, subtask: str) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    tokens = torch.tensor([policy.processor.tokenizer.encode(said)])
    monkeypatch.setattr(
        policy.model.subtask_head, "generate", lambda *args, **options: (tokens, torch.ones_like(tokens).bool(), None)
    )
    assert policy.predict_subtask(observation(data)) == subtask


def test_weights_are_cast_on_loading(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in policy.model.parameters()} == {torch.bfloat16}
    assert np.isfinite(policy.predict(observation(data))).all()


# --- FAST


@pytest.fixture(scope="module")
def with_fast(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained policy with a FAST tokenizer, which it never saw."""
    policy = Pi05Policy.from_pretrained(trained[2])
    policy.processor.fast = random_fast(policy.processor.shapes, vocab_size=256)
    folder = tmp_path_factory.mktemp("fast")
    save(folder, policy.model, policy.processor)  # with no record of its training
    return folder


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_constrained_fast_tokens_always_decode(trained, with_fast: Path, temperature: float) -> None:
    policy = Pi05Policy.from_pretrained(with_fast, actions="fast", temperature=temperature)
    chunks = [policy.predict_chunk(observation(trained[1], i)) for i in range(3)]
    assert all(np.isfinite(chunk).all() for chunk in chunks)


def test_fast_tokens_that_do_not_decode_raise(trained, with_fast: Path) -> None:
    policy = Pi05Policy.from_pretrained(with_fast, actions="fast", constrain_fast=False, temperature=3.0)
    with pytest.raises(FastDecodeError):
        policy.predict_chunk(observation(trained[1]))


def test_fast_tokens_that_do_not_decode_are_counted_if_so_configured(trained, with_fast: Path) -> None:
    options = {"actions": "fast", "constrain_fast": False, "temperature": 3.0, "on_failed_decode": "count"}
    policy = Pi05Policy.from_pretrained(with_fast, **options)
    frames = [policy.frame(observation(trained[1], i)) for i in range(2)]
    assert np.isnan(policy.predict_chunks(frames, [None, None])).all()
    assert policy.failed_decodes == 2


def test_a_question_is_about_an_observation_or_a_frame(trained) -> None:
    module, data, _ = trained
    policy = Pi05Policy((module.model, module.processor))
    seen = observation(data)
    said = policy.answer(seen, "what is it?", "top")
    assert said == policy.answer(policy.frame(seen), "what is it?", "top")
    with pytest.raises(ValueError, match="no image of a camera 'side': ask about top"):
        policy.answer(seen, "what is it?", "side")
    with pytest.raises(ValueError, match="an observation has no key 'images'"):
        policy.answer({**seen, "images": seen["image"]}, "what is it?", "top")


def test_subtask_conditions_the_actions(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    frame = policy.frame(observation(data))
    noise = torch.randn(1, policy.model.config.horizon, policy.model.config.action_dim)
    flat, told = (policy.predict_chunks([frame], [subtask], noise) for subtask in (None, "pull the drawer open"))
    assert not np.array_equal(flat, told)


def test_tokens_of_a_row_are_drawn_with_its_own_generator(trained, with_fast: Path) -> None:
    _, data, _ = trained
    policy = Pi05Policy.from_pretrained(with_fast, actions="fast", temperature=3.0)
    frames = [policy.frame(observation(data, i)) for i in range(3)]

    def drawn(rows: Sequence[int]) -> np.ndarray:
        generators = [torch.Generator().manual_seed(row) for row in rows]
        return policy.predict_chunks([frames[row] for row in rows], [None] * len(rows), generator=generators)

    np.testing.assert_array_equal(drawn([0, 1, 2])[1:2], drawn([1]))
    assert not np.array_equal(drawn([1]), policy.predict_chunks([frames[1]], [None]))  # drawn with seed 0


def test_chunk_of_a_robot_does_not_depend_on_the_others_in_the_batch(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    frames = [policy.frame(observation(data, i)) for i in range(3)]
    noise = torch.randn(3, policy.model.config.horizon, policy.model.config.action_dim)
    together = policy.predict_chunks(frames, ["reach", None, "pull the handle"], noise)
    alone = policy.predict_chunks(frames[2:], ["pull the handle"], noise[2:])
    np.testing.assert_allclose(together[2], alone[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"obs_dim": 9},
        {"action_dim": 9},
        {"backbone_type": "other"},
        {"pred_horizon": 99},
        {"pred_horizon": 0},
        {"pred_horizon": 7, "inference_delay": 2},
        {"execution_horizon": 3, "pred_horizon": 4},
        {"inference_delay": 8},
        {"num_steps": 0},
        {"replan_subtask_every": 0},
        {"temperature": -1},
        {"temperature": "warm"},
        {"execution_horizon": 2.5},
        {"inference_delay": 1.0},
        {"inference_delay": True},
        {"num_steps": "10"},
        {"replan_subtask_every": None},
    ],
)
def test_checkpoint_other_than_expected_is_refused_by_name(trained, wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pi05Policy(trained[2], **wrong)


def test_fast_tokens_need_a_fast_tokenizer(trained) -> None:
    with pytest.raises(ValueError, match="no FAST tokenizer"):
        Pi05Policy(trained[2], actions="fast")


def test_session_shares_the_weights_and_nothing_that_happens(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy(path, inference_delay=1, execution_horizon=2, seed=3)
    policy.predict(observation(data))
    session = policy.session(seed=3)
    assert session.model is policy.model
    assert session.subtask is None
    assert np.array_equal(session.predict(observation(data)), Pi05Policy(path, seed=3).predict(observation(data)))
    assert policy.session(seed=4).predict(observation(data)).tolist() != session.predict(observation(data)).tolist()


def test_path_without_a_policy_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a checkpoint nor a folder with one"):
        Pi05Policy.from_pretrained(tmp_path)


def test_policy_whose_data_has_no_subtasks_acts_on_the_task(pictures: Path) -> None:
    model = untrained_model()
    robot = LeRobotConfig(path=str(pictures), val_fraction=0.2)
    data = Pi05DataModule({"robot": robot}, batch_size=2, num_workers=0, shapes=model.config.shapes)
    processor = Processor.from_dict(data.processor.to_dict())
    policy = Pi05Policy((model, processor), seed=3)
    policy.predict(observation(data))
    assert policy.subtask is None
    processor.robots["robot"] = replace(processor.robots["robot"], has_subtasks=True)
    policy = Pi05Policy((model, processor), seed=3)
    policy.predict(observation(data))
    assert policy.subtask is not None


def test_guidance_that_no_graph_is_captured_of_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cuda_graph: the graph is of one row, and guidance takes two"):
        Pi05Policy(tmp_path / "none", cuda_graph="plain", guidance=1.5)


def test_a_device_that_there_is_not_is_said(trained) -> None:
    with pytest.raises(ValueError, match="device 'cudda' cannot be used"):
        Pi05Policy(trained[2], device="cudda")


def test_an_unknown_option_is_named_with_the_nearest(trained) -> None:
    with pytest.raises(TypeError, match=r"no option 'exec_horizon' \(did you mean execution_horizon\?\)"):
        Pi05Policy(trained[2], exec_horizon=2)
