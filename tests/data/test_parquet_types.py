"""Tables as LeRobot, pandas, polars and pyarrow write them: the same texts and vectors are read from each."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi05_lightning.data.errors import BadSample
from tests.data.recorded import LENGTHS, STARTS, data_file, open_source, rewrite


def with_language(table: pa.Table) -> pa.Table:
    """A text column before the sentences."""
    return table.add_column(0, "language", pa.array(["en"] * len(table)))


def without_pandas(table: pa.Table) -> pa.Table:
    """As polars and pyarrow write it: without an index, the sentences in a column of their name."""
    (index,) = table.schema.pandas_metadata["index_columns"]
    names = ["task" if name == index else name for name in table.column_names]
    return with_language(table.rename_columns(names)).replace_schema_metadata(None)


def with_numbered_rows(table: pa.Table) -> pa.Table:
    """As pandas writes a table of which rows were dropped: the numbers of those left are its index."""
    tasks = table.to_pandas().rename_axis("task").reset_index()
    return pa.Table.from_pandas(
        pd.concat([tasks.assign(task="dropped", task_index=9), tasks])[lambda t: t.task_index < 9]
    )


def with_two_levels(table: pa.Table) -> pa.Table:
    """As pandas writes an index of language and task."""
    tasks = table.to_pandas().rename_axis("task").reset_index().assign(language="en")
    return pa.Table.from_pandas(tasks.set_index(["language", "task"]))


def of_type(kind: pa.DataType):
    """The sentences as another type of text."""

    def change(table: pa.Table) -> pa.Table:
        (index,) = table.schema.pandas_metadata["index_columns"]
        place = table.column_names.index(index)
        values = table[index].combine_chunks()
        values = values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)
        return table.set_column(place, index, values)

    return change


@pytest.mark.parametrize(
    "change",
    [
        with_language,
        without_pandas,
        with_numbered_rows,
        with_two_levels,
        of_type(pa.large_string()),
        of_type(pa.string_view()),
        of_type(pa.dictionary(pa.int32(), pa.string())),
    ],
    ids=[
        "another text column",
        "no index",
        "numbered rows",
        "two levels",
        "large_string",
        "string_view",
        "categorical",
    ],
)
def test_tasks_are_found_by_name(pictures_copy: Path, change) -> None:
    path = pictures_copy / "meta" / "tasks.parquet"
    expected = [open_source(pictures_copy)[int(row)].task for row in STARTS[:2]]
    pq.write_table(change(pq.read_table(path)), path)
    assert [open_source(pictures_copy)[int(row)].task for row in STARTS[:2]] == expected
    assert expected == ["close the drawer", "open the drawer"]


def test_tasks_that_have_no_name_are_refused(pictures_copy: Path) -> None:
    path = pictures_copy / "meta" / "tasks.parquet"
    table = without_pandas(pq.read_table(path))
    pq.write_table(table.rename_columns(["language", "task_index", "instruction"]), path)
    with pytest.raises(ValueError, match=r"tasks.parquet needs the columns task_index and task .* instruction"):
        open_source(pictures_copy)


@pytest.mark.parametrize(
    "sentences", [pa.array([3, 4]), pa.array([["close"], ["open"]])], ids=["numbers", "lists of texts"]
)
def test_tasks_that_are_no_texts_are_refused(pictures_copy: Path, sentences: pa.Array) -> None:
    path = pictures_copy / "meta" / "tasks.parquet"
    pq.write_table(pa.table({"task": sentences, "task_index": [0, 1]}), path)
    with pytest.raises(ValueError, match=r"tasks.parquet needs .* of texts, and has task \((int64|list<.*>)\)"):
        open_source(pictures_copy)


def test_a_number_with_two_sentences_is_refused(pictures_copy: Path) -> None:
    path = pictures_copy / "meta" / "tasks.parquet"
    pq.write_table(pa.table({"task": ["close it", "open it", "wipe it"], "task_index": [0, 1, 1]}), path)
    with pytest.raises(ValueError, match=r"tasks.parquet has two sentences for task_index 1, 'open it' and 'wipe it'"):
        open_source(pictures_copy)


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_subtasks_may_be_any_type_of_text(pictures_copy: Path, kind: pa.DataType) -> None:
    table = pq.read_table(data_file(pictures_copy))
    texts = pa.array([f"reach {episode}" for episode in table["episode_index"].to_pylist()])
    texts = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    pq.write_table(table.append_column("words", texts), data_file(pictures_copy))
    assert open_source(pictures_copy, subtask_key="words")[int(STARTS[3])].subtask == "reach 3"


# --- numbers


def cast(path: Path, **kinds: pa.DataType) -> None:
    """Write columns of a parquet file as other types."""
    table = pq.read_table(path)
    for name, kind in kinds.items():
        values = table[name].combine_chunks()
        if pa.types.is_dictionary(kind):
            values = values.dictionary_encode()
        elif pa.types.is_decimal(kind):
            values = pa.array([Decimal(str(round(value, 3))) for value in values.to_pylist()], kind)
        elif values.type != kind:
            values = pa.array(values.to_pylist(), kind) if pa.types.is_nested(kind) else values.cast(kind)
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, path)


def frames(root: Path) -> list:
    source = open_source(root, cameras=None)
    return [source[index] for index in range(0, len(source), 7)]


def assert_same(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.task, ours.subtask) == (theirs.task, theirs.subtask)
        np.testing.assert_allclose(ours.state, theirs.state, atol=2e-3)
        np.testing.assert_allclose(ours.actions, theirs.actions, atol=2e-3)
        np.testing.assert_array_equal(ours.images["top"], theirs.images["top"])


@pytest.mark.parametrize(
    "kind",
    [
        pa.int8(),
        pa.int32(),
        pa.uint16(),
        pa.uint64(),
        pa.float32(),
        pa.float64(),
        pa.decimal128(12, 0),
        pa.dictionary(pa.int32(), pa.int64()),
    ],
    ids=str,
)
def test_indices_may_be_of_any_type_that_holds_whole_numbers(pictures_copy: Path, kind: pa.DataType) -> None:
    expected = frames(pictures_copy)
    names = ("episode_index", "frame_index", "task_index", "index")
    cast(data_file(pictures_copy), **dict.fromkeys(names, kind))
    meta = next((pictures_copy / "meta" / "episodes").glob("*/*.parquet"))
    cast(meta, **dict.fromkeys(("episode_index", "length", "data/file_index"), kind))
    cast(pictures_copy / "meta" / "tasks.parquet", task_index=kind)
    assert_same(frames(pictures_copy), expected)
    assert len(open_source(pictures_copy, episodes=[1, 3])) == LENGTHS[1] + LENGTHS[3]


@pytest.mark.parametrize("kind", [pa.float64(), pa.decimal128(12, 3), pa.dictionary(pa.int32(), pa.float32())], ids=str)
def test_timestamps_may_be_of_any_type_of_number(videos_copy: Path, kind: pa.DataType) -> None:
    expected = frames(videos_copy)
    cast(data_file(videos_copy), timestamp=kind)
    meta = next((videos_copy / "meta" / "episodes").glob("*/*.parquet"))
    column = "videos/observation.images.top/from_timestamp"
    cast(meta, **{column: pa.float32(), "videos/observation.images.top/file_index": pa.float64()})
    assert_same(frames(videos_copy), expected)


@pytest.mark.parametrize(
    "kind",
    [
        pa.list_(pa.float64()),
        pa.list_(pa.float16()),
        pa.large_list(pa.float32()),
        pa.list_(pa.float32(), 3),
        pa.list_view(pa.float32()),
        pa.large_list_view(pa.float64()),
    ],
    ids=str,
)
def test_vectors_may_be_any_list_of_any_number(pictures_copy: Path, kind: pa.DataType) -> None:
    expected = frames(pictures_copy)
    cast(data_file(pictures_copy), **{"observation.state": kind})
    assert_same(frames(pictures_copy), expected)


def test_actions_may_be_truth_values(pictures_copy: Path) -> None:
    rewrite(data_file(pictures_copy), action=[[True, row % 2 == 0] for row in range(sum(LENGTHS))])
    np.testing.assert_array_equal(open_source(pictures_copy)[0].actions[:3], [[1, 1], [1, 0], [1, 1]])


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), 3), pa.large_list(pa.float32())], ids=str)
def test_a_row_without_a_vector_is_named(pictures_copy: Path, kind: pa.DataType) -> None:
    values = pq.read_table(data_file(pictures_copy))["observation.state"].to_pylist()
    values[14] = None
    rewrite(data_file(pictures_copy), **{"observation.state": pa.array(values, kind)})
    with pytest.raises(BadSample, match=r"episode 1, frame 2, observation.state: 0 values where meta/info.json says 3"):
        open_source(pictures_copy)


ROWS = sum(LENGTHS)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("episode_index", [0.5] * ROWS),
        ("episode_index", [None] + [0] * (ROWS - 1)),
        ("frame_index", ["first"] * ROWS),
        ("frame_index", pa.nulls(ROWS)),
        ("task_index", [[0]] * ROWS),
        ("timestamp", ["early"] * ROWS),
        ("timestamp", pa.array(range(ROWS), pa.timestamp("s"))),
        ("action", ["up"] * ROWS),
        ("action", [[["a"], ["b"]]] * ROWS),
        ("observation.state", [{"x": 1.0}] * ROWS),
        ("observation.images.top", [1.0] * ROWS),
    ],
)
def test_a_column_that_means_nothing_is_named_with_its_file(pictures_copy: Path, column: str, values) -> None:
    rewrite(data_file(pictures_copy), **{column: values})
    with pytest.raises(ValueError, match=rf"file-000.parquet, {column} holds "):
        open_source(pictures_copy, cameras=None)


@pytest.mark.parametrize(
    ("column", "values"),
    [("length", ["ten"] * 5), ("episode_index", [0, 1, 2, 3, None]), ("length", [1.5] * 5)],
)
def test_a_column_of_the_episodes_that_means_nothing_is_named(pictures_copy: Path, column: str, values: list) -> None:
    rewrite(next((pictures_copy / "meta" / "episodes").glob("*/*.parquet")), **{column: values})
    with pytest.raises(ValueError, match=rf"meta/episodes, {column} holds "):
        open_source(pictures_copy)


def test_files_of_the_episodes_may_have_different_types(pictures_copy: Path) -> None:
    meta = next((pictures_copy / "meta" / "episodes").glob("*/*.parquet"))
    table = pq.read_table(meta)
    pq.write_table(table[3:], meta.with_name("file-001.parquet"))
    pq.write_table(table[:3], meta)
    cast(meta, episode_index=pa.float64(), length=pa.int32())
    assert len(open_source(pictures_copy)) == ROWS
