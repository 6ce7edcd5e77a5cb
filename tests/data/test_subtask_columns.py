"""Where an episode's subtasks are: in language_persistent, or in subtask_index where that holds none for it."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi05_lightning import Pi05DataModule
from pi05_lightning.data.errors import BadSample
from pi05_lightning.data.lerobot_files import LeRobotFiles
from pi05_lightning.data.mixture import Mixture
from pi05_lightning.data.processor import Language
from pi05_lightning.data.sources.lerobot import LeRobotConfig
from pi05_lightning.models.config import ModelConfig
from pi05_lightning.recipe import StageOptions
from pi05_lightning.types import Modality
from tests.data.recorded import LENGTHS, STARTS, data_file, edit_info, open_source, rewrite

EPISODES = np.repeat(np.arange(len(LENGTHS)), LENGTHS)


def annotate(root: Path, without: tuple[int, ...], codes: list | pa.Array | None = None) -> None:
    """subtask_index beside language_persistent, which keeps only its plans in these episodes."""
    persistent = pq.read_table(data_file(root))["language_persistent"]
    rows = [
        [row for row in rows if row["style"] != "subtask" or episode not in without]
        for episode, rows in zip(EPISODES, persistent.to_pylist(), strict=True)
    ]
    codes = (EPISODES % 2).tolist() if codes is None else codes
    rewrite(data_file(root), language_persistent=pa.array(rows, persistent.type), subtask_index=codes)
    table = pa.table({"subtask": ["wipe", "fold"], "subtask_index": [0, 1]})
    pq.write_table(table, root / "meta" / "subtasks.parquet")


def subtasks(root: Path, **options) -> list[str | None]:
    source = open_source(root, **options)
    return [source[int(start) + 4].subtask for start in STARTS[:-1]]


def test_subtask_index_counts_where_language_holds_no_subtask(
    videos_copy: Path, caplog: pytest.LogCaptureFixture
) -> None:
    annotate(videos_copy, without=(0, 1, 2, 3, 4))
    with caplog.at_level(logging.WARNING):
        assert subtasks(videos_copy) == ["wipe", "fold", "wipe", "fold", "wipe"]
    (said,) = [record.getMessage() for record in caplog.records]
    assert "language_persistent has subtasks of 0 episodes; those of 5 others are taken from subtask_index" in said


def test_each_episode_has_the_subtasks_that_there_are(videos_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotate(videos_copy, without=(1, 3))
    with caplog.at_level(logging.WARNING):
        assert subtasks(videos_copy) == ["reach 0", "fold", "reach 0", "fold", "reach 0"]
    assert "language_persistent has subtasks of 3 episodes; those of 2 others" in caplog.text


def test_a_named_column_is_the_only_one(videos_copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    annotate(videos_copy, without=(1, 3))
    with caplog.at_level(logging.WARNING):
        named = [subtasks(videos_copy, subtask_key=key) for key in ("language_persistent", "subtask_index")]
    assert named == [["reach 0", None, "reach 0", None, "reach 0"], ["wipe", "fold", "wipe", "fold", "wipe"]]
    assert not caplog.records


@pytest.mark.parametrize("split", ["train", "val"])
def test_both_splits_decide_alike(videos_copy: Path, split: str) -> None:
    annotate(videos_copy, without=(0, 1, 2, 3, 4))
    source = open_source(videos_copy, split, val_fraction=0.4)
    assert {source[index].subtask for index in range(len(source))} <= {"wipe", "fold"}


@pytest.mark.parametrize(
    "codes",
    [
        pa.array(EPISODES % 2, pa.int32()),
        pa.array(EPISODES % 2, pa.uint8()),
        pa.array([None if episode == 4 else float(episode % 2) for episode in EPISODES]),
        pa.array((EPISODES % 2).astype(float)).dictionary_encode(),
    ],
    ids=["int32", "uint8", "float with nulls, as pandas", "categorical"],
)
def test_subtask_numbers_may_be_of_any_type(videos_copy: Path, codes: pa.Array) -> None:
    annotate(videos_copy, without=(0, 1, 2, 3, 4), codes=codes)
    last = None if codes.null_count else "wipe"
    assert subtasks(videos_copy) == ["wipe", "fold", "wipe", "fold", last]


def test_a_number_without_a_sentence_is_named(videos_copy: Path) -> None:
    annotate(videos_copy, without=(0, 1, 2, 3, 4), codes=[7, -1, *[0] * (sum(LENGTHS) - 2)])
    with pytest.raises(BadSample, match=r"subtask_index: meta/subtasks.parquet has no sentence for \[7\]"):
        open_source(videos_copy)


def test_a_number_without_a_sentence_matters_in_chosen_episodes_alone(videos_copy: Path) -> None:
    codes = [7] * LENGTHS[0] + [0] * sum(LENGTHS[1:])
    annotate(videos_copy, without=(0, 1, 2, 3, 4), codes=codes)
    source = open_source(videos_copy, episodes=[1, 2, 3, 4])
    assert source[0].subtask == "wipe"


@pytest.mark.parametrize("without", [(0, 1, 2, 3, 4), (1,), ()])
def test_numbers_without_their_table_are_not_read_unless_named(
    videos_copy: Path, without: tuple[int, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """LeRobot's tools that edit datasets leave the table out, and LeRobot opens what they write."""
    annotate(videos_copy, without)
    (videos_copy / "meta" / "subtasks.parquet").unlink()
    features = LeRobotFiles.open(videos_copy).features
    edit_info(videos_copy, features=features | {"subtask_index": {"dtype": "int64", "shape": [1], "names": None}})
    with caplog.at_level(logging.WARNING):
        found = subtasks(videos_copy)
    assert [text is None for text in found] == [episode in without for episode in range(5)]
    assert caplog.text.count("subtask_index is not read: meta/subtasks.parquet") == bool(without)


def test_a_run_that_wants_subtasks_of_numbers_without_their_table_is_refused(videos_copy: Path) -> None:
    annotate(videos_copy, without=(0, 1, 2, 3, 4))
    (videos_copy / "meta" / "subtasks.parquet").unlink()
    source = LeRobotConfig(path=str(videos_copy))
    data = Pi05DataModule({"robot": source}, shapes=ModelConfig.preset("debug").shapes)
    mixture = Mixture(data.train_samples.entries, trained_by={}, batch_size=2)
    with pytest.raises(ValueError, match="mixture: unknown 'robot/hl_subtask'"):
        mixture.weights(StageOptions(mixture={"robot/hl_subtask": 1.0}))


def test_a_blank_subtask_is_none(videos_copy: Path) -> None:
    annotate(videos_copy, without=(0, 1, 2, 3, 4))
    table = pa.table({"subtask": ["wipe", "  "], "subtask_index": [0, 1]})
    pq.write_table(table, videos_copy / "meta" / "subtasks.parquet")
    assert subtasks(videos_copy) == ["wipe", None, "wipe", None, "wipe"]


def test_a_language_column_of_another_shape_is_named(videos_copy: Path) -> None:
    rewrite(data_file(videos_copy), language_persistent=["reach"] * sum(LENGTHS))
    with pytest.raises(BadSample, match=r"file-000.parquet, language_persistent holds string, which lacks"):
        open_source(videos_copy)


def test_language_columns_without_any_row_hold_nothing(videos_copy: Path) -> None:
    nothing = pa.nulls(sum(LENGTHS))
    rewrite(data_file(videos_copy), language_persistent=nothing, language_events=nothing)
    source = open_source(videos_copy)
    assert source[9].subtask is None
    assert source[3].answers == ()


@pytest.mark.parametrize(
    ("key", "language", "alike"),
    [
        ("subtask_index", Language(condition_on="both"), True),
        ("subtask_index", Language(condition_on="both", task_only_share=0.1), False),
        ("language_persistent", Language(condition_on="both"), False),  # the first two frames have none
        ("language_persistent", Language(condition_on="subtask"), True),  # which is not said
    ],
)
def test_samples_are_alike_where_all_or_none_say_a_subtask(
    videos_copy: Path, key: str, language: Language, alike: bool
) -> None:
    annotate(videos_copy, without=())
    source = LeRobotConfig(path=str(videos_copy), val_fraction=0, subtask_key=key)
    data = Pi05DataModule({"robot": source}, shapes=ModelConfig.preset("debug").shapes, language=language)
    samples = data.train_samples
    found = {subset.modality: samples.alike(number) for number, subset in enumerate(samples.subsets)}
    assert found == dict.fromkeys(found, True) | {Modality.CONTINUOUS: alike}


@pytest.mark.parametrize(
    ("corrected", "language", "alike"),
    [
        (range(0), Language(condition_on="both"), True),  # the policy said all of them itself
        (range(0), Language(condition_on="both", task_only_share=0.1), True),
        (range(0), Language(condition_on="both", fast_share=0.5), False),
        (range(17, 21), Language(condition_on="both"), False),
        (range(len(EPISODES)), Language(condition_on="both"), True),
    ],
)
def test_a_subtask_that_a_policy_said_itself_is_none_to_be_alike_in(
    videos_copy: Path, corrected: range, language: Language, alike: bool
) -> None:
    annotate(videos_copy, without=())
    rewrite(data_file(videos_copy), intervention=[row in corrected for row in range(len(EPISODES))])
    (videos_copy / "meta" / "pi05_collect.json").write_text("{}")
    source = LeRobotConfig(path=str(videos_copy), val_fraction=0, subtask_key="subtask_index")
    samples = Pi05DataModule(
        {"robot": source}, shapes=ModelConfig.preset("debug").shapes, language=language
    ).train_samples
    (number,) = [n for n, subset in enumerate(samples.subsets) if subset.modality is Modality.CONTINUOUS]
    assert samples.alike(number) is alike
    assert samples.entries[number].lacking == (set() if len(corrected) == len(EPISODES) else {"subtask"})
