"""Tables as LeRobot, pandas, polars and pyarrow write them: the same texts and vectors are read from each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.recorded import STARTS, data_file, open_source


def with_language(table: pa.Table) -> pa.Table:
    """A text column before the sentences."""
    return table.add_column(0, "language", pa.array(["en"] * len(table)))


def without_pandas(table: pa.Table) -> pa.Table:
    """As polars and pyarrow write it: without an index, the sentences in a column of their name."""
    (index,) = table.schema.pandas_metadata["index_columns"]
    names = ["task" if name == index else name for name in table.column_names]
    return with_language(table.rename_columns(names)).replace_schema_metadata(None)


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
        of_type(pa.large_string()),
        of_type(pa.string_view()),
        of_type(pa.dictionary(pa.int32(), pa.string())),
    ],
    ids=["another text column", "no index", "large_string", "string_view", "categorical"],
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


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())], ids=str)
def test_subtasks_may_be_any_type_of_text(pictures_copy: Path, kind: pa.DataType) -> None:
    table = pq.read_table(data_file(pictures_copy))
    texts = pa.array([f"reach {episode}" for episode in table["episode_index"].to_pylist()])
    texts = texts.dictionary_encode() if pa.types.is_dictionary(kind) else texts.cast(kind)
    pq.write_table(table.append_column("words", texts), data_file(pictures_copy))
    assert open_source(pictures_copy, subtask_key="words")[int(STARTS[3])].subtask == "reach 3"


def test_vectors_may_be_large_lists(pictures_copy: Path) -> None:
    expected = open_source(pictures_copy)[5]
    table = pq.read_table(data_file(pictures_copy))
    for key in ("action", "observation.state"):
        place = table.column_names.index(key)
        table = table.set_column(place, key, table[key].cast(pa.large_list(pa.float32())))
    pq.write_table(table, data_file(pictures_copy))
    found = open_source(pictures_copy)[5]
    assert np.array_equal(found.state, expected.state)
    assert np.array_equal(found.actions, expected.actions)
