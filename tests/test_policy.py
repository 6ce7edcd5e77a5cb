"""The policy: what it predicts is what the trained module predicts, and observations that do not fit are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from pi05_lightning import Pi05DataModule, Pi05Module, Pi05Policy, StageSwitch
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import LossWeights, Stage


@pytest.fixture(scope="module")
def trained(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pi05Module, Pi05DataModule, Path]:
    """A module after two steps, its data, and its checkpoint."""
    module = Pi05Module(ModelConfig.preset("debug"))
    data = Pi05DataModule({"robot": LeRobotConfig(path=str(videos), val_fraction=0.2)}, batch_size=4, num_workers=0)
    act = Stage(LossWeights(subtask=1, flow=1), {"robot/continuous_robot_actions": 1.0})
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        limit_val_batches=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StageSwitch(0, 2, posttrain=act)],
        default_root_dir=tmp_path_factory.mktemp("run"),
    )
    trainer.fit(module, data)
    path = Path(trainer.default_root_dir, "last.ckpt")
    trainer.save_checkpoint(path)
    return module, data, path


def observation(data: Pi05DataModule, index: int = 0) -> dict:
    frame = data.sources("val")["robot"][index]
    return {"image": frame.images, "state": frame.state, "task": frame.task}


def test_policy_from_checkpoint_predicts_what_the_module_predicts(trained) -> None:
    module, data, path = trained
    frame = data.sources("val")["robot"][0]
    noise = torch.randn(1, module.config.horizon, module.config.action_dim)
    batch = module.processor.collate([module.processor.prompt(frame, "robot")])
    with torch.no_grad():
        prefix = module.backbone(batch, need_hidden=False)
        expected = module.flow_head.sample(prefix, noise[:, None])[0, 0].numpy()
    policy = Pi05Policy.from_pretrained(path, hierarchical=False)
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


def test_subtask_conditions_the_actions(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    frame = policy.frame(observation(data))
    noise = torch.randn(1, policy.model.config.horizon, policy.model.config.action_dim)
    flat, told = (policy.predict_chunks([frame], [subtask], noise) for subtask in (None, "pull the drawer open"))
    assert not np.array_equal(flat, told)


def test_chunk_of_a_robot_does_not_depend_on_the_others_in_the_batch(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    frames = [policy.frame(observation(data, i)) for i in range(3)]
    noise = torch.randn(3, policy.model.config.horizon, policy.model.config.action_dim)
    together = policy.predict_chunks(frames, ["reach", None, "pull the handle"], noise)
    alone = policy.predict_chunks(frames[2:], ["pull the handle"], noise[2:])
    np.testing.assert_allclose(together[2], alone[0], rtol=1e-4, atol=1e-5)


def test_float_images_in_0_to_1_are_the_same_as_uint8(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    seen = observation(data)
    floats = {**seen, "image": {name: (image / 255).astype(np.float32) for name, image in seen["image"].items()}}
    one, other = (policy.prepare(o).pixels.float() for o in (seen, floats))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": {"elbow": np.zeros((3, 8, 8), np.uint8)}}, "elbow"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, r"\[3 H W\]"),
        ({"state": np.zeros(9)}, "state has 9 dimensions"),
    ],
)
def test_observation_that_does_not_fit_is_refused_by_key(trained, change: dict, message: str) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    with pytest.raises(ValueError, match=message):
        policy.predict({**observation(data), **change})


def test_float_image_out_of_range_is_clipped_with_a_warning(trained) -> None:
    _, data, path = trained
    policy = Pi05Policy.from_pretrained(path)
    with pytest.warns(UserWarning, match="outside 0..1"):
        batch = policy.prepare({**observation(data), "image": np.full((3, 8, 8), 7.0)})
    assert float(batch.pixels.max()) == pytest.approx(255)


@pytest.mark.parametrize("wrong", [{"obs_dim": 9}, {"action_dim": 9}, {"backbone_type": "other"}, {"pred_horizon": 99}])
def test_checkpoint_other_than_expected_is_refused_by_name(trained, wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pi05Policy(trained[2], **wrong)


def test_fast_tokens_need_a_fast_tokenizer(trained) -> None:
    with pytest.raises(ValueError, match="no FAST tokenizer"):
        Pi05Policy(trained[2], use_flow_matching=False)


def test_path_without_a_policy_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a checkpoint nor a folder with one"):
        Pi05Policy.from_pretrained(tmp_path)
