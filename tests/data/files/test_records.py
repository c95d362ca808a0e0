"""JSON files: every layout people write, values as they are written, or an error that names the line."""

import gzip
import json
import logging

import pytest

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.errors import InputError

ROWS = [{"text": "2020-01-01", "label": "007"}, {"text": "2021-12-31 10:00:00", "label": "010"}]


@pytest.fixture
def load(tmp_path):
    def call(content, name="t.json", **kwargs):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return load_data(DataArguments(train_file=str(path), **kwargs), cache_dir=str(tmp_path / "cache"))

    return call


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lines(ROWS), ""),
        ("\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n"), ""),
        (json.dumps(ROWS), ""),
        (json.dumps(ROWS, indent=2), ""),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), ""),
        (json.dumps({"version": 1, "data": ROWS}), "its rows are those of the field 'data'"),
        (json.dumps({"data": ROWS, "tags": ["a"]}, indent=2), "its rows are those of the field 'data'"),
        (json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}), "one object that holds columns"),
        (
            json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}),
            "one object that holds columns",
        ),
        (gzip.compress(lines(ROWS).encode(), mtime=0), ""),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_every_layout(load, caplog, content, said, streaming):
    caplog.set_level(logging.INFO)
    name = "t.json.gz" if content[:2] == b"\x1f\x8b" else "t.json"
    data = load(content, name, streaming=streaming)
    assert [row["text"] for row in data.train] == [row["text"] for row in ROWS]
    assert data.label_names == ["007", "010"]
    assert said in caplog.text


def test_types_do_not_change_between_parts_of_a_file(load):
    rows = [{"text": "1999-01-01", "label": i % 2} for i in range(2000)] + [{"text": 5, "label": 2, "more": None}]
    data = load(lines(rows))
    assert data.train["text"][-2:] == ["1999-01-01", "5"]
    assert data.label_names == ["0", "1", "2"]
    assert load(lines([{"text": "a", "label": 0}, {"text": "b", "label": "x"}])).label_names == ["0", "x"]
    assert load(lines([{"text": "a", "label": 1}, {"text": "b", "label": 0.5}])).problem_type == "regression"


@pytest.mark.parametrize("ids", [[2**64 + 1, 2**64 + 2], [2**64, 7], ["a", 2**64]])
def test_ids_that_no_int64_holds_stay_apart(load, ids):
    data = load(lines([{"text": id_, "label": id_} for id_ in ids]))
    assert data.train["text"][:] == [data.label_names[i] for i in data.train["label"]] == [str(id_) for id_ in ids]
    scores = load(lines([{"text": "a", "label": 10**20}, {"text": "b", "label": 0.5}]))
    assert (scores.problem_type, scores.train["label"][1]) == ("regression", 0.5)


def test_nested_columns(load, caplog):
    caplog.set_level(logging.INFO)
    rows = [{"text": f"{i}", "label": i, "meta": {"id": 1}, "tags": ["x"], "odd": [1, "a"][i]} for i in (0, 1)]
    assert load(lines(rows)).train.column_names == ["text", "label"]
    assert "column 'meta' is left out: it is nested" in caplog.text
    for column in ("meta", "odd"):
        with pytest.raises(
            InputError, match=f"column '{column}' is nested or holds values of several types.*write one"
        ):
            load(lines(rows).replace('"odd": 1', '"odd": [1]'), label_column=column)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ('{"text": "a", "label": 0}\n{"text": ', r"line 2: Expecting value\); write one object per line"),
        ('{"text": "a", "label": 0}\n["b", 1]\n', r"line 2: list instead of an object"),
        ('{"text": "a", "text": "b", "label": 0}\n{"text": "c"}\n', "line 1: two values are named 'text'"),
        ('[{"text": "a",\n "label": 0},\n {"text" "b"}]', "line 3: Expecting ':' delimiter.*correct it"),
        ('["a", "b"]', "entry 0 of its list is str instead of an object"),
        ('"a"', "it holds one str"),
        (
            json.dumps({"train": ROWS, "test": ROWS}),
            "any of the fields train, test.*each of them to a file of its own",
        ),
        (b'{"text": "caf\xe9", "label": 0}\n', "line 1 has the byte 0xe9, which is not UTF-8.*iconv"),
        (json.dumps({"text": {"en": "a"}, "label": 0}), "column 'text' is nested"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_faults(load, content, match, streaming):
    with pytest.raises(InputError, match=r"cannot read --train_file .*t.json \(.*" + match):
        load(content, streaming=streaming)


def test_missing_keys_are_missing_values(load):
    with pytest.raises(InputError, match=r"1 of 2 rows of split 'train' have no label .*row 1"):
        load(lines([{"text": "a", "label": 0}, {"text": "b"}]))
    data = load(lines([{"text": "a", "label": 0}, {"label": 1}]))
    assert data.train["text"][:] == ["a", None]  # the tokenizer's step names the row
