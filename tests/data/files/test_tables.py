"""Delimited files: every row and value as written, with any quoting, or an error that says how to fix the file."""

import csv
import gzip
import io
import logging
import random

import pytest
from datasets import load_dataset

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.files import own_files
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.errors import InputError


@pytest.fixture
def load(tmp_path):
    def call(content, name="t.csv", **kwargs):
        path = tmp_path / name
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return load_data(DataArguments(train_file=str(path), **kwargs), cache_dir=str(tmp_path / "cache"))

    return call


def texts(data):
    return list(zip(*(data.train[column][:] for column in data.text_columns), strict=True))


def written(rows, delimiter, quoting):
    """A file's content: `None` writes no quotes at all, anything else is the csv module's."""
    if quoting is None:
        return "".join(delimiter.join(row) + "\n" for row in rows)
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator="\n").writerows(rows)
    return text.getvalue()


FORMS = {
    "unquoted.tsv": ("\t", None),
    "quoted.tsv": ("\t", csv.QUOTE_MINIMAL),
    "all.tsv": ("\t", csv.QUOTE_ALL),
    "quoted.csv": (",", csv.QUOTE_MINIMAL),
    "all.csv": (",", csv.QUOTE_ALL),
    "semicolon.csv": (";", csv.QUOTE_MINIMAL),
}


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("glue/mrpc", ["sentence1", "sentence2"]),
        ("glue/stsb", ["sentence1", "sentence2"]),
        ("glue/rte", ["sentence1", "sentence2"]),
        ("glue/cola", ["sentence"]),
        ("fewshot/mr", ["text"]),
        ("fewshot/subj", ["text"]),
        ("fewshot/trec", ["text"]),
    ],
)
def test_real_rows_come_back_from_every_form(load, data_root, tmp_path, name, columns):
    path = str(next((data_root / name).glob("train-*.parquet")))
    source = load_dataset("parquet", data_files=path, split="train", cache_dir=str(tmp_path / "cache"))
    everything = [
        list(row) for row in zip(*(source[c][:] for c in columns), map(str, source["label"][:]), strict=True)
    ]
    with_quotes = [row for row in everything if any('"' in value for value in row)]
    for form, (delimiter, quoting) in FORMS.items():
        rows = everything if quoting is None else with_quotes + everything[::50]
        data = load(written([[*columns, "label"], *rows], delimiter, quoting), f"{name.split('/')[1]}-{form}")
        assert texts(data) == [tuple(row[:-1]) for row in rows], form
        if data.label_names:
            assert [data.label_names[i] for i in data.train["label"][:]] == [row[-1] for row in rows]
        else:
            assert data.train["label"][:] == pytest.approx([float(row[-1]) for row in rows])


QUOTED = ['" bare', 'a "word" inside', '" whole "', 'end "', 'a, "b"', '""', '"a" b', "plain", '"', 'x ""y"" z']


@pytest.mark.parametrize("form", FORMS)
def test_texts_with_quotes_of_every_kind(load, form):
    delimiter, quoting = FORMS[form]
    rng = random.Random(0)
    for length in (3, 8, 30):
        rows = [[rng.choice(QUOTED), str(i % 2)] for i in range(length)]
        data = load(written([["text", "label"], *rows], delimiter, quoting), form)
        assert texts(data) == [(row[0],) for row in rows]


def test_each_file_of_a_run_has_its_own_reading(load, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "dev.tsv").write_text('text\tlabel\n"said ""no"""\t1\n"a\tb"\t0\n')
    (tmp_path / "test.tsv").write_text('text\n" one\n" two\n')
    files = {"validation_file": str(tmp_path / "dev.tsv"), "test_file": str(tmp_path / "test.tsv")}
    data = load('text\tlabel\n" so\t1\nit " is\t0\n', "t.tsv", **files)
    assert texts(data) == [('" so',), ('it " is',)]
    assert data.validation["validation"]["text"][:] == ['said "no"', "a\tb"]
    assert data.test["test"]["text"][:] == ['" one', '" two']
    lines = [record.message for record in caplog.records if "read with" in record.message]
    assert [("without quotes" in line, "--quoting forces" in line) for line in lines] == [
        (True, True),
        (False, True),
        (True, True),
    ]


def test_a_reading_can_be_forced(load):
    content = 'text\tlabel\n"a"\t0\n"b"\t1\n'
    assert texts(load(content, "t.tsv")) == [('"a"',), ('"b"',)]
    assert texts(load(content, "t.tsv", quoting="minimal")) == [("a",), ("b",)]
    assert texts(load(content.replace("\t", ","))) == [("a",), ("b",)]
    assert texts(load(content.replace("\t", ","), quoting="none")) == [('"a"',), ('"b"',)]
    with pytest.raises(InputError, match=r"""line 2: ',' expected after '"'.*double every"""):
        load('text,label\n"a" b,0\n', quoting="minimal")
    with pytest.raises(InputError, match="--quoting is for csv and tsv files, but this data is json"):
        load('{"text": "a", "label": 0}\n', "t.jsonl", quoting="none")


def test_a_csv_that_can_be_read_in_two_ways_is_refused(load):
    content = 'text,label\n"one,1\ntwo",0\n'
    with pytest.raises(InputError, match=r"in two ways: 2 rows without quotes, 1 with quotes.*--quoting none"):
        load(content)
    assert len(load(content, quoting="none").train) == 2


def test_backslashes_before_quotes(load, caplog):
    caplog.set_level(logging.INFO)
    data = load('text,label\n"he said \\"no, no\\"",0\nb,1\n')
    assert texts(data) == [('he said "no, no"',), ("b",)]
    assert 'with quotes, \\" inside them' in caplog.text
    assert texts(load('"text"\t"label"\n"he said \\"no\\""\t0\n"b"\t1\n', "r.tsv")) == [('he said "no"',), ("b",)]


R_TEXTS = [f"{i} a" for i in range(1, 7)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("\ufefftext,label\r\na,x\r\nb,y\r\n", ["a", "b"]),
        ("text,label\ra,x\rb,y\r", ["a", "b"]),
        ("text,label\na\rb,x\nb,y", ["a\rb", "b"]),
        ('text,label\n"a\rb, c",x\nd\re,y\n', ["a\rb, c", "d\re"]),
        ('text,label\n"a\r\nb",x\n"c\n\nd",y\n', ["a\r\nb", "c\n\nd"]),
        ("text,label\n\na,x\n\n\nb,y\n\n", ["a", "b"]),
        ("text,label\nNA,x\nnull,y\n", ["NA", "null"]),
        ("text,label\nnan,x\n2020-01-01,y\n", ["nan", "2020-01-01"]),
        ("text,label\n007,x\n12,y\n", ["007", "12"]),
        ("text,label\n1,x\n0.50,y\n", ["1", "0.50"]),
        ("text,label\nTrue,x\nFALSE,y\n", ["True", "FALSE"]),
        ("text,label\na\0b,x\n b ,y\n", ["a\0b", " b "]),
        ("text,label\na\u2028b,x\nc\x0bd\x85e,y\n", ["a\u2028b", "c\x0bd\x85e"]),
        ("text,label,\na,x,\nb,y,\n", ["a", "b"]),
        ("text,label,\na,x\nb,y\n", ["a", "b"]),
        ("text,label\na,x,\nb,y,\n", ["a", "b"]),
        (",text,label\n0,a,x\n1,b,y\n", ["a", "b"]),
        ('"text","label"\n' + "".join(f'"{i}","{i} a","{"xy"[i % 2]}"\n' for i in range(1, 7)), R_TEXTS),
        ("sep=;\ntext;label\na,b;x\nc;y\n", ["a,b", "c"]),
        ("text;label\na,b;x\nc;y\n", ["a,b", "c"]),
        ("text\tlabel\na, b\tx\nc\ty\n", ["a, b", "c"]),
        (" text , label\na,x\nb,y\n", ["a", "b"]),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_values_stay_as_they_are_written(load, content, expected, streaming):
    data = load(content, streaming=streaming)
    assert data.text_columns == ("text",)
    assert [row["text"] for row in data.train] == expected
    assert data.label_names == ["x", "y"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_marks_of_an_encoding(load, encoding):
    assert texts(load("text\tlabel\nä\tx\nß\ty\n".encode(encoding), "t.tsv")) == [("ä",), ("ß",)]


def test_long_lines_and_compressed_files(load):
    long = "word " * 100_000
    content = f'text,label\n"{long}",x\nb,y\n'.encode()
    assert texts(load(gzip.compress(content), "t.csv.gz")) == [(long,), ("b",)]


@pytest.mark.parametrize(
    ("labels", "names", "kind"),
    [
        (["007", "010"], ["007", "010"], "name"),
        (["7", "10"], ["7", "10"], "int"),
        (["-1", "1"], ["-1", "1"], "int"),
        (["+1", "-1"], ["-1", "+1"], "name"),
        (["NA", "None"], ["NA", "None"], "name"),
        (["true", "FALSE"], ["FALSE", "true"], "name"),
        (["12345678901234567890", "1"], ["1", "12345678901234567890"], "name"),
        (["1_000", "2"], ["2", "1_000"], "name"),
        (["07", "7", "+7", "1", "0007", "007"], ["1", "+7", "0007", "007", "07", "7"], "name"),  # equal as numbers
        (["0.5", "1", "1e-3"], None, "float"),
        ([".5", "2."], None, "float"),
    ],
)
def test_labels_stay_as_they_are_written(load, labels, names, kind):
    rows = "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
    data = load("text,label\n" + rows)
    assert data.label_names == names
    if names is None:
        assert data.train["label"][:] == pytest.approx([float(label) for label in labels])
    else:
        assert [data.label_names[i] for i in data.train["label"]] == labels


def test_types_agree_between_files(load, tmp_path):
    (tmp_path / "dev.csv").write_text("body,label\n2020,07\n1984,8\n")
    data = load("body,label\na,07\nb,8\n", validation_file=str(tmp_path / "dev.csv"))
    assert data.validation["validation"]["body"][:] == ["2020", "1984"]
    assert data.label_names == ["07", "8"]


def test_a_label_column_with_capitals(load):
    data = load("Text,Category\na,x\nb,y\n", label_column="Category")
    assert (data.text_columns, data.label_names) == (("Text",), ["x", "y"])


def test_files_without_a_header(load):
    data = load("x,a\ny,b\n", column_names=["label", "text"])
    assert texts(data) == [("a",), ("b",)]
    with pytest.raises(
        InputError, match=r"'1' looks like data: if a csv or tsv file has no header line.*--column_names"
    ):
        load("good,1\nbad,0\n")
    with pytest.raises(InputError, match=r"its first line is a header line.*leave --column_names out"):
        load("label,text\nx,a\n", column_names=["label", "text"])
    with pytest.raises(InputError, match="every row has 3 fields, but the header has 2"):
        load("x,a,c\ny,b,d\n", column_names=["label", "text"])


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            "text,label\nit, was,1\nso, so,0\n",
            "every row has 3 fields, but the header has 2 .*comma too many.*double quotes",
        ),
        ("text,label\na,1\nit, was,0\nb,0\n", "1 of 3 rows do not fit: line 3 has 3 fields, the header has 2.*quotes"),
        ("text,label\na,1\nb\n,0\n", "1 of 3 rows do not fit: line 3 has 1 field, the header has 2.*line break"),
        ("label,text\n1,a, b\n2,c, d\n", "every row has 3 fields, but the header has 2 .*comma too many"),
        ("text,text,label\na,b,1\n", "2 of its columns are named 'text'.*rename all but one"),
        ("text,label\na,1\ntext,label\nb,0\n", "line 3 repeats the first line.*remove that line.*--column_names"),
        ("text;label\na;b;1\nc;0\n", "but a semicolon; with that delimiter, 1 of 2 rows.*sep=;"),
        (
            'label, text\n1, "a, b"\n',
            "line 2 has 3 fields, but the header has 2 .*: a space before .*remove the spaces",
        ),
        (b"text,label\ncaf\xe9,1\n", "line 2 has the byte 0xe9, which is not UTF-8.*iconv -f WINDOWS-1252"),
        ("text,label\na,1\n".encode("utf-16-le"), "NUL characters; it may be UTF-16.*save it as UTF-8"),
        ('text,label\n"a, b,1\nc,0\n', "with quotes: line 3: unexpected end of data; without quotes: .*line 2 has 3"),
        (b"\x1f\x8b broken", "not UTF-8|cannot read"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_faults_name_cause_and_cure(load, content, match, streaming):
    with pytest.raises(InputError, match=r"(?s)cannot read --train_file .*t.csv \(.*" + match):
        load(content, streaming=streaming)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl", "parquet"])
@pytest.mark.parametrize("name", ["d[1]", "d*", "d?", "d{1,2}", "d[!2]", "d 1%20#"])
def test_a_path_is_not_a_pattern(tmp_path, name, suffix, streaming):
    from datasets import Dataset

    folder = tmp_path / "a[b]*"
    folder.mkdir()
    for stem, text in (("d1", "wrong"), (name, "right")):
        data = Dataset.from_dict({"text": [text, "x"], "label": ["a", "b"]})
        path = str(folder / f"{stem}.{suffix}")
        if suffix == "jsonl":
            data.to_json(path)
        elif suffix == "parquet":
            data.to_parquet(path)
        else:
            data.to_csv(path, sep="\t" if suffix == "tsv" else ",")
    args = DataArguments(train_file=str(folder / f"{name}.{suffix}"), streaming=streaming)
    assert next(iter(load_data(args, cache_dir=str(tmp_path / "cache")).train))["text"] == "right"


def test_settings_of_a_data_sets_readme_are_kept_and_logged(tmp_path, caplog):
    (tmp_path / "train.csv").write_text("#\ntext;label\na,b;x\nNA;y\n")
    setting = "  sep: ';'\n  skiprows: 1\n"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: c\n  data_files: train.csv\n{setting}---\n")
    data = load_data(DataArguments(dataset_name=str(tmp_path)), cache_dir=str(tmp_path / "cache"))
    assert data.train["text"][:] == ["a,b", None]
    assert "read with its own settings: with quotes, NA as a missing value" in caplog.text


def test_a_stream_of_any_split_of_a_folder(tmp_path):
    (tmp_path / "one.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: c\n  data_files:\n  - {split: part, path: one.csv}\n---\n"
    )
    args = DataArguments(dataset_name=str(tmp_path), streaming=True, train_split=["part"])
    assert [row["text"] for row in load_data(args, cache_dir=str(tmp_path / "cache")).train] == ["a", "b"]


def test_a_folder_of_unquoted_files(tmp_path):
    folder = tmp_path / "MR"
    folder.mkdir()
    (folder / "train.tsv").write_text('sentence\tlabel\n" so it is\t0\nNA\t1\n" or "\t1\n')
    (folder / "dev.tsv").write_text("sentence\tlabel\n2001\t0\nb\t1\n")
    for streaming in (False, True):
        args = DataArguments(task_name="sst2", dataset_name=str(folder), streaming=streaming)
        data = load_data(args, cache_dir=str(tmp_path / "cache"))
        assert [row["sentence"] for row in data.train] == ['" so it is', "NA", '" or "']
        assert data.validation["validation"]["sentence"][:] == ["2001", "b"]


def test_a_folder_whose_path_is_a_pattern_is_refused(tmp_path):
    folder = tmp_path / "MR[1]"
    folder.mkdir()
    with pytest.raises(InputError, match=r"MR\[1\]: .* takes \* \? \[ in a path for a pattern; rename"):
        load_data(DataArguments(dataset_name=str(folder)))


def test_rows_of_a_stream_that_do_not_fit_are_skipped(load, monkeypatch, caplog):
    monkeypatch.setattr(own_files, "_HEAD", 3)
    monkeypatch.setattr("hf_ft_ext.data.loading.CHECKED", 3)
    data = load("text,label\na,0\nb,1\nc,0\nd,e,1\nf,0.5\ng,1\n", streaming=True)
    assert [row["text"] for row in data.train] == ["a", "b", "c", "g"]
    assert "rows so far lack a text or a label" in caplog.text


def test_an_edited_file_is_read_anew_and_a_read_one_is_kept(load, tmp_path):
    for label in ("x", "z"):
        assert load(f"text,label\na,{label}\nb,y\n").label_names == sorted([label, "y"])
    cached = sorted((tmp_path / "cache" / "own_files").iterdir())
    load_data(DataArguments(train_file=str(tmp_path / "t.csv")), cache_dir=str(tmp_path / "cache"))
    assert sorted((tmp_path / "cache" / "own_files").iterdir()) == cached and len(cached) == 2
