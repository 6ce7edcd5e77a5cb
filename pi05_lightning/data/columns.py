"""Rows of tables, and columns of parquet files as arrays, whichever type pandas, polars or pyarrow wrote them in."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_LISTS = (
    pa.types.is_list,
    pa.types.is_large_list,
    pa.types.is_fixed_size_list,
    pa.types.is_list_view,
    pa.types.is_large_list_view,
)


def is_text(kind: pa.DataType) -> bool:
    """Whether a column's type is one of those in which pandas, polars and pyarrow write text."""
    if pa.types.is_dictionary(kind):
        return is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def whole_numbers(column: pa.ChunkedArray, where: str, null: int | None = None) -> np.ndarray:
    """A column of any numeric type as i64[N]; ValueError, with `where` it is, for fractions, nulls and other types.

    null: what nulls become; they are refused by default.
    """
    try:
        numbers = column.cast(pa.int64())
    except pa.ArrowException as error:
        raise ValueError(f"{where} holds {column.type} where whole numbers are expected ({error})") from error
    if null is not None:
        numbers = numbers.fill_null(null)
    if numbers.null_count:
        raise ValueError(f"{where} holds nothing in {numbers.null_count} of {len(numbers)} rows")
    return numbers.to_numpy()


def real_numbers(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """A column of any numeric type as f64[N], NaN for null; ValueError, with `where` it is, for other types."""
    try:
        return column.cast(pa.float64(), safe=False).to_numpy()
    except pa.ArrowException as error:
        raise ValueError(f"{where} holds {column.type} where numbers are expected ({error})") from error


def evenly_spaced(size: int, number: int) -> np.ndarray:
    """At most `number` of `size` rows, from the first to the last, i64[min(size, number)]; none twice."""
    return np.linspace(0, size - 1, min(size, number)).astype(np.int64)


def runs_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where each run of equal values begins in i64[N], and how long it is: i64[R] each."""
    begins = np.flatnonzero(np.diff(values, prepend=values[:1] - 1))
    return begins, np.diff(begins, append=len(values))


def rows_at(episode: np.ndarray, frame: np.ndarray, wanted: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """The row of each wanted frame, i64[M], in a table of i64[N] episodes and frames; -1 where it is not there.

    wanted: episodes and frames, i64[M] each.
    """
    place = {key: row for row, key in enumerate(zip(episode.tolist(), frame.tolist(), strict=True))}
    return np.array([place.get(key, -1) for key in zip(*(part.tolist() for part in wanted), strict=True)], dtype=int)


def vectors(column: pa.ChunkedArray, width: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """A numeric column (numbers, or lists of `width` numbers) as f32[N width], and every row's number of values i64[N].

    What is null becomes NaN, and so do rows with more or fewer values.  Any type of number and of list, as pandas,
    polars and pyarrow write them; ValueError, with `where` it is, for other types.
    """
    values = np.full((len(column), width), np.nan, dtype=np.float32)
    if not any(is_list(column.type) for is_list in _LISTS):
        numbers = real_numbers(column, where).astype(np.float32)[:, None]
        return (numbers if width == 1 else values), np.ones(len(column), int)
    rows = column.combine_chunks()
    sizes = pc.if_else(rows.is_valid(), pc.list_value_length(rows), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    right = sizes == width
    flat = pa.chunked_array([rows.filter(pa.array(right)).flatten()])
    values[right] = real_numbers(flat, where).astype(np.float32).reshape(-1, width)
    return values, sizes
