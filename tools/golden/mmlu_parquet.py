#!/usr/bin/env python3
"""Writes tests/mmlu: parquet files in the form of Hugging Face's `cais/mmlu`, and some that are not. Needs pyarrow."""

import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

HERE = pathlib.Path(__file__).resolve().parents[2] / "tests" / "mmlu"
SCHEMA = pa.schema(
    [("question", pa.string()), ("subject", pa.string()), ("choices", pa.list_(pa.string())), ("answer", pa.int64())]
)


def rows(subject, split, count):
    """The same as the CSV files that tests/mmlu.rs writes."""
    first = ('Say "hi",\nnow?', subject, ["1", "2", "3,5", "é"], 2)
    return [first] + [(f"{subject} {split} {n}?", subject, [f"{c}{n}" for c in "wxyz"], n % 4) for n in range(1, count)]


def write(name, rows, schema=SCHEMA, **options):
    path = HERE / name
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [pa.array(list(column), field.type) for column, field in zip(zip(*rows), schema)]
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), path, **options)


def main():
    for subject in ("anatomy", "sociology"):
        for split, count in (("dev", 2), ("validation", 2), ("test", 3)):
            write(f"hub/{subject}/{split}-00000-of-00001.parquet", rows(subject, split, count))
    good = ("q", "anatomy", ["1", "2", "3", "4"], 0)
    write("bad/three.parquet", [good, ("q", "anatomy", ["1", "2", "3"], 0)])
    write("bad/answer.parquet", [("q", "anatomy", ["1", "2", "3", "4"], 4)])
    write("bad/empty.parquet", [(" ", "anatomy", ["1", "2", "3", "4"], 0)])
    write("bad/null.parquet", [(None, "anatomy", ["1", "2", "3", "4"], 0)])
    write("bad/zstd.parquet", [good], compression="zstd")
    letters = SCHEMA.set(3, pa.field("answer", pa.string()))
    write("bad/letters.parquet", [("q", "anatomy", ["1", "2", "3", "4"], "A")], letters)
    write("bad/text.parquet", [("q", "anatomy", "1 2 3 4", 0)], SCHEMA.set(2, pa.field("choices", pa.string())))
    other = pa.schema([("question", pa.string()), ("options", pa.list_(pa.string())), ("answer", pa.int64())])
    write("bad/columns.parquet", [("q", ["1", "2", "3", "4"], 0)], other)


main()
