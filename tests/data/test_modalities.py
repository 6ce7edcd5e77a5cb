"""All five modalities from one YAML mixture; one episode yields four of them."""

from __future__ import annotations

import re
from collections import Counter
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser
from PIL import Image

from pi05_lightning.data.datamodule import Pi05DataModule
from pi05_lightning.data.fast import FastTokenizer
from pi05_lightning.data.mixture import Mixture
from pi05_lightning.data.processor import Language
from pi05_lightning.data.samples import Samples
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.models.pi05 import Pi05
from pi05_lightning.recipe import Recipe
from pi05_lightning.training.callbacks.stages import StageSwitch
from pi05_lightning.types import Modality, Sample, Subset, Target

SHAPES = ModelConfig.preset("debug").shapes


@pytest.fixture(scope="module")
def config(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A whole mixture as a user writes it: a robot's dataset, captions, and the shares of both stages."""
    folder = tmp_path_factory.mktemp("mixture")
    for row in range(6):
        Image.new("RGB", (20, 20), (40 * row, 0, 0)).save(folder / f"{row}.png")
    lines = [f'{{"image": "{row}.png", "caption": "a wall in shade {row}"}}' for row in range(6)]
    (folder / "captions.jsonl").write_text("\n".join(lines))
    chunks = np.random.default_rng(0).uniform(-1, 1, (50, SHAPES.horizon, 2)).astype(np.float32)
    FastTokenizer.fit([chunks], vocab_size=SHAPES.fast_vocab_size, scale=2).save(folder / "fast")
    return f"""
data:
  sources:
    robot:
      class_path: pi05_lightning.data.sources.lerobot.LeRobotConfig
      init_args: {{path: {videos}, val_fraction: 0.2}}
    web:
      class_path: pi05_lightning.data.sources.vision_text.VisionTextConfig
      init_args: {{path: {folder}, camera: top}}
  fast: {folder / "fast"}
  batch_size: 20
  shapes: {yaml.safe_dump(vars(SHAPES), default_flow_style=True).strip()}
recipe:
  pretrain:
    mixture:
      web/web_caption: 0.2
      robot/qa: 0.2
      robot/hl_subtask: 0.2
      robot/fast_robot_actions: 0.2
      robot/continuous_robot_actions: 0.2
"""


@pytest.fixture(scope="module")
def parsed(config: str) -> tuple[Samples, Recipe]:
    parser = ArgumentParser()
    parser.add_class_arguments(Pi05DataModule, "data")
    parser.add_class_arguments(StageSwitch, "recipe")
    made = parser.instantiate(parser.parse_string(config))
    return Samples(made.data.sources("train"), made.data.processor), made.recipe.recipe


def test_one_mixture_yields_all_five(parsed: tuple[Samples, Recipe]) -> None:
    samples, recipe = parsed
    trained_by = Pi05.without_memory(ModelConfig.preset("debug")).terms
    mixture = Mixture(samples.entries, trained_by, batch_size=20)
    draws = mixture.batch(0, mixture.weights(recipe.at(0)))
    batch = samples.collate([samples[draw] for draw in draws])
    assert batch.drawn is not None
    drawn: Counter[Modality] = Counter()
    for name, count in batch.drawn.names.items():
        drawn[Subset.parse(name).modality] += count
    assert drawn == dict.fromkeys(Modality, 4)
    assert {int(kind) for kind in batch.target_kind.unique()} == {int(kind) for kind in Target} - {Target.SAID}
    assert len(batch.actions) == 4


def test_one_frame_is_its_subtask_its_fast_chunk_and_its_continuous_chunk(parsed: tuple[Samples, Recipe]) -> None:
    samples, _ = parsed
    frame = 3  # with subtask, questions and actions
    made = {}
    for number, (subset, indices) in enumerate(zip(samples.subsets, samples.indices, strict=True)):
        if subset.source == "robot":
            made[subset.modality] = samples[number, int(np.flatnonzero(indices == frame)[0]), 0]
    kinds = {modality: set(sample.target_kind.tolist()) - {0} for modality, sample in made.items()}
    assert kinds == {
        Modality.QA: {Target.TEXT},
        Modality.HL_SUBTASK: {Target.SUBTASK},
        Modality.FAST: {Target.FAST},
        Modality.CONTINUOUS: set(),
    }
    np.testing.assert_array_equal(made[Modality.FAST].actions, made[Modality.CONTINUOUS].actions)


def test_subtask_of_the_policys_own_words_is_told_and_no_target(parsed: tuple[Samples, Recipe]) -> None:
    samples, subset = parsed[0], Subset("robot", Modality.CONTINUOUS)
    processor = copy(samples.processor)
    processor.language = replace(processor.language, condition_on="both", task_only_share=0.0)
    frame = samples.sources["robot"][3]
    told, own = (processor.sample(replace(frame, subtask_is_target=is_target), subset) for is_target in (True, False))
    np.testing.assert_array_equal(own.tokens, told.tokens)
    assert set(own.target_kind.tolist()) == {Target.NONE, Target.SAID}
    np.testing.assert_array_equal(own.target_kind == Target.SAID, told.target_kind == Target.SUBTASK)
    with pytest.raises(ValueError, match="needs a subtask to be learned"):
        processor.sample(replace(frame, subtask_is_target=False), Subset("robot", Modality.HL_SUBTASK))


def test_flow_sample_goes_on_with_the_fast_tokens_of_the_same_actions(parsed: tuple[Samples, Recipe]) -> None:
    frame = parsed[0].sources["robot"][3]
    flow, fast = Subset("robot", Modality.CONTINUOUS), Subset("robot", Modality.FAST)

    def made(subset: Subset, **language: float) -> list[Sample]:
        processor = copy(parsed[0].processor)
        processor.language = replace(processor.language, condition_on="both", **language)
        return [processor.sample(frame, subset, key) for key in range(100)]

    def kinds(sample: Sample) -> set[int]:
        return set(sample.target_kind.tolist())

    for alone, both, said in zip(made(flow), made(flow, fast_share=1.0), made(fast), strict=True):
        np.testing.assert_array_equal(both.tokens, said.tokens)
        np.testing.assert_array_equal(both.target_kind, said.target_kind)
        np.testing.assert_array_equal(both.tokens[: len(alone.tokens)], alone.tokens)
        np.testing.assert_array_equal(both.actions, alone.actions)
    some = made(flow, fast_share=0.3, task_only_share=0.2)
    assert 10 <= sum(Target.FAST in kinds(sample) for sample in some) <= 40
    assert not any(Target.FAST in kinds(sample) and Target.SUBTASK not in kinds(sample) for sample in some)
    with pytest.raises(ValueError, match="needs condition_on: both, not task"):
        Language(condition_on="task", fast_share=0.5)


def test_share_of_the_samples_is_told_no_task(videos: Path) -> None:
    def prompts(training: bool = True, **language: float) -> list[str]:
        source = {"robot": LeRobotConfig(str(videos))}
        data = Pi05DataModule(source, shapes=SHAPES, language=Language(condition_on="task", **language))
        frame, subset = data.sources("train")["robot"][0], Subset("robot", Modality.CONTINUOUS)
        samples = [data.processor.sample(frame, subset, key, training=training) for key in range(100)]
        return [data.processor.tokenizer.decode(sample.tokens.tolist()) for sample in samples]

    (always,) = set(prompts())
    task = re.search("Task: (.+), State: ", always)
    assert task is not None
    sometimes = prompts(no_task_share=0.3)
    assert set(sometimes) == {always, always.replace(task[1], "")}
    assert 15 <= sum(prompt != always for prompt in sometimes) <= 45
    assert set(prompts(training=False, no_task_share=0.3)) == {always}  # what is validated says what it asks for
    assert always not in prompts(training=False, no_task_share=1.0)
    data = Pi05DataModule({"robot": LeRobotConfig(str(videos))}, shapes=SHAPES, language=Language(no_task_share=1.0))
    frame = data.sources("train")["robot"][0]
    asked = [data.processor.prompt(replace(frame, task=task), "robot").tokens.tolist() for task in ("open", "close")]
    assert asked[0] == asked[1]


def test_a_policy_says_no_subtask_that_no_action_was_taught_with(parsed: tuple[Samples, Recipe]) -> None:
    processor = copy(parsed[0].processor)
    for share, says in ((0.5, True), (1.0, False)):
        processor.language = replace(processor.language, condition_on="both", task_only_share=share)
        assert processor.predicts_subtasks("robot") is says
