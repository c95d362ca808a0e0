"""What a head reads, and the table of it on disk."""

import copy
import functools
import os
import struct

import filelock
import pytest
import torch
from datasets import Dataset
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, DataCollatorWithPadding

from hf_ft_ext.errors import InputError
from hf_ft_ext.features import HeadReader, head_parameters
from hf_ft_ext.features.cache import cached_features, data_fingerprint, encoder_hash
from hf_ft_ext.features.rows import inputs_of, labels_of, read_in_order, sample_rows


def batch(rows=6):
    ids = torch.randint(5, 30, (rows, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < 4 + torch.arange(rows)[:, None] % 9).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def reader_of(model):
    return HeadReader.find(model, batch())


def collate(rows):
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": torch.zeros(len(rows))}


def parts(reader, dataset):
    """Features by windows of two batches of four rows."""
    return lambda start: read_in_order(reader.features, dataset, collate, 4, window=2, start=start)


def test_head_reads_the_first_token_and_its_pooler_counts_as_head():
    model = tiny_model("bert")
    reader = reader_of(model)
    assert model.training  # left as it was
    assert list(head_parameters(model)) == [
        *("bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias")
    ]
    model.eval()
    expected = model(**batch()).logits
    torch.testing.assert_close(reader.logits(reader.features(batch())), expected, rtol=1e-5, atol=1e-6)
    assert isinstance(model.bert, type(tiny_model("bert").bert)) and model.bert.pooler is not None
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in tiny_model().named_parameters()}


def test_every_module_is_in_the_mode_that_it_had():
    model = tiny_model("bert").train()
    model.bert.eval()  # frozen by the user: no dropout in training
    modes = [module.training for module in model.modules()]
    reader = reader_of(model)
    reader.features(batch())
    assert [module.training for module in model.modules()] == modes and True in modes and False in modes


def test_a_model_without_a_base_or_with_another_kind_of_head_has_no_reader():
    assert HeadReader.find(nn.Linear(2, 2), {}) is None

    class Reversed(type(tiny_model("distilbert"))):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            hidden = self.distilbert(input_ids, attention_mask).last_hidden_state
            output = type(super().forward(input_ids=input_ids))
            return output(logits=self.classifier(hidden.amax(1)))  # reads the whole sequence

    model = tiny_model("distilbert")
    model.__class__ = Reversed
    assert HeadReader.find(model, batch()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_that_differ_by_a_thousandth_have_no_reader(dtype):
    class Other(type(tiny_model("distilbert"))):
        def forward(self, input_ids=None, attention_mask=None, **kwargs):
            output = super().forward(input_ids=input_ids, attention_mask=attention_mask)
            output.logits = output.logits + 2e-3 * (attention_mask.sum(1, keepdim=True) > 1)
            return output

    model = tiny_model("distilbert").to(dtype)
    assert HeadReader.find(model, batch()) is not None
    model.__class__ = Other
    assert HeadReader.find(model, batch()) is None


def test_features_are_computed_once_and_mapped(tmp_path, monkeypatch):
    model, data = tiny_model().eval(), tiny_dataset(20)
    reader = reader_of(model)
    first = cached_features(reader, data, parts(reader, data), tmp_path, disable_tqdm=True)
    assert first.shape == (20, 32)
    assert torch.equal(first, torch.cat(list(parts(reader, data)(0))))
    alone = torch.cat([reader.features(inputs_of(collate([row]), None)) for row in data])
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(HeadReader, "features", None)
    assert torch.equal(cached_features(reader, data, parts(reader, data), tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1  # no debris


def test_rows_come_in_their_order_whatever_the_batches(tmp_path):
    data = [{"input_ids": [i] * (1 + i * 7 % 5)} for i in range(1, 24)]
    widths = []

    def read(batch):
        widths.append(batch["input_ids"].shape[1])
        return batch["input_ids"][:, 0]

    for start in (0, 1, 8, 13, 22):
        found = torch.cat(list(read_in_order(read, data, collate, 4, window=2, start=start)))
        assert found.tolist() == list(range(1 + start, 24))
    assert widths[:2] == sorted(widths[:2]) and widths[0] < 5  # like lengths together


def test_another_encoder_or_other_data_are_not_confused(tmp_path):
    data = tiny_dataset(20)
    files = set()
    for model, rows in (
        (tiny_model(), data),
        (tiny_model(seed=1), data),
        (tiny_model(), tiny_dataset(20, seed=1)),
        (tiny_model(), tiny_dataset(19)),
    ):
        reader = reader_of(model.eval())
        cached_features(reader, rows, parts(reader, rows), tmp_path, disable_tqdm=True)
        assert len(files) + 1 == len(set(tmp_path.iterdir()))
        files = set(tmp_path.iterdir())
    other_head = tiny_model()
    nn.init.normal_(other_head.classifier.weight)
    nn.init.normal_(other_head.bert.pooler.dense.weight)
    assert encoder_hash(other_head) == encoder_hash(tiny_model()) != encoder_hash(tiny_model(seed=1))


def test_fingerprint_sees_rows_and_their_order_and_not_labels():
    data = tiny_dataset(20)
    same = data.remove_columns("labels").add_column("labels", [1] * 20)
    assert data_fingerprint(same) == data_fingerprint(data)
    assert data_fingerprint(data.select(range(19, -1, -1))) != data_fingerprint(data)
    assert data_fingerprint(data.select(range(20))) == data_fingerprint(data)
    nested = torch.zeros(2, 1, 2, 1100, dtype=torch.long)
    changed = nested.clone()
    changed[1, 0, 1, 550] = 1  # numpy's text of long rows leaves out their middle
    columns = [Dataset.from_dict({"values": values.tolist()}) for values in (nested, changed)]
    assert data_fingerprint(columns[0]) != data_fingerprint(columns[1])

    class Plain(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, i):
            return {"input_ids": [i, 1], "labels": 0}

    assert data_fingerprint(Plain()) == data_fingerprint(Plain())


def test_transforms_collators_and_mixed_precision_have_features_of_their_own(tmp_path):
    """The features are those of the batches, whatever an earlier run with other batches has stored."""
    reader, rows = reader_of(tiny_model().eval()), tiny_dataset(12)

    def cut(length):
        return lambda columns: {
            "input_ids": [ids[:length] for ids in columns["input_ids"]],
            "labels": columns["labels"],
        }

    def cutting(length):
        return lambda batch: collate([{"input_ids": row["input_ids"][:length]} for row in batch])

    tokenizer = tiny_tokenizer()
    right = DataCollatorWithPadding(tokenizer)
    left = DataCollatorWithPadding(copy.deepcopy(tokenizer))
    left.tokenizer.padding_side = "left"
    cases = [(rows, right), (rows, left), (rows, cutting(3)), (rows, cutting(2))]
    cases += [(rows.with_transform(cut(length)), collator) for length in (3, 2) for collator in (right, cutting(1))]
    for data, collator in cases * 2:
        for bf16 in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                expected = torch.cat(list(read_in_order(reader.features, data, collator, 4)))
                parts = functools.partial(read_in_order, reader.features, data, collator, 4)
                found = cached_features(
                    reader, data, lambda start, parts=parts: parts(start=start), tmp_path, True, collator
                )
            assert torch.equal(found, expected.float())
    assert len(list(tmp_path.iterdir())) == 2 * (len(cases) - 1)  # cutting to 1 is the same for both transforms


@pytest.mark.parametrize("model_type", ["fnet", "convbert", "bert", "roberta"])
def test_the_batch_size_counts_where_padding_changes_features(tmp_path, model_type):
    """FNet mixes padding into all tokens, ConvBERT into those beside it: the features are those of these batches."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(model_type, vocab_size=60, max_position_embeddings=64, pad_token_id=0, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reader = reader_of(AutoModelForSequenceClassification.from_config(config).eval())
    rows, files = tiny_dataset(12), []
    for size in (1, 3, 12, 3):

        def parts(start, size=size):
            return read_in_order(reader.features, rows, collate, size, window=2, start=start)

        expected = torch.cat(list(parts(0)))
        found = cached_features(reader, rows, parts, tmp_path, True, collate, size)
        if model_type in ("fnet", "convbert"):
            assert torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        files.append(len(list(tmp_path.iterdir())))
    assert files == ([1, 2, 3, 3] if model_type in ("fnet", "convbert") else [1, 1, 1, 1])


def test_a_sample_of_equal_rows_takes_one_of_another_length():
    rows = [{"input_ids": [5, 6, 7], "labels": 0}] * 30 + [{"input_ids": [5], "labels": 1}]
    for data in (rows, Dataset.from_list(rows), Dataset.from_list(rows).with_transform(lambda columns: columns)):
        found = [len(row["input_ids"]) for row in sample_rows(data)]
        assert found == [3] * 15 + [1]
        assert labels_of(data).tolist() == [0] * 30 + [1]


def test_labels_are_those_of_the_rows_not_of_the_columns():
    def opposite(columns):
        return {"input_ids": columns["input_ids"], "labels": [1 - label for label in columns["labels"]]}

    rows = tiny_dataset(8)
    assert labels_of(rows.with_transform(opposite)).tolist() == [1 - label for label in rows["labels"]]


def interrupted(reader, data, after):
    def some(start):
        yield from list(parts(reader, data)(start))[:after]
        raise KeyboardInterrupt

    return some


@pytest.mark.parametrize("cut", [0, 1, 33 * 4 + 1], ids=["whole", "a byte", "a row and a byte"])
def test_an_interrupted_run_is_continued(tmp_path, cut, monkeypatch):
    data = tiny_dataset(20)
    reader = reader_of(tiny_model().eval())
    whole = cached_features(reader, data, parts(reader, data), tmp_path / "whole", disable_tqdm=True)
    with pytest.raises(KeyboardInterrupt):
        cached_features(reader, data, interrupted(reader, data, 2), tmp_path / "a", disable_tqdm=True)
    (partial,) = (tmp_path / "a").glob(".*.partial")
    os.truncate(partial, partial.stat().st_size - cut)
    encoded, features = [], HeadReader.features

    def counting(self, batch):
        encoded.append(len(batch["input_ids"]))
        return features(self, batch)

    monkeypatch.setattr(HeadReader, "features", counting)
    assert torch.equal(cached_features(reader, data, parts(reader, data), tmp_path / "a", disable_tqdm=True), whole)
    assert sum(encoded) == 20 - (2 if not cut else 1) * 8  # whole windows are made again
    assert [path.suffix for path in (tmp_path / "a").iterdir()] == [".safetensors"]


def test_partial_files_of_other_features_are_discarded(tmp_path):
    data = tiny_dataset(20)
    reader = reader_of(tiny_model().eval())
    with pytest.raises(KeyboardInterrupt):
        cached_features(reader, data, interrupted(reader, data, 1), tmp_path, disable_tqdm=True)
    (partial,) = tmp_path.glob(".*.partial")
    partial.write_bytes(b"x" * 10_000)
    features = cached_features(reader, data, parts(reader, data), tmp_path, disable_tqdm=True)
    whole = cached_features(reader, data, parts(reader, data), tmp_path / "whole", disable_tqdm=True)
    assert torch.equal(features, whole)


def test_two_processes_at_once_do_not_meet(tmp_path):
    data = tiny_dataset(20)
    reader = reader_of(tiny_model().eval())

    def second_comes_in(start):
        for i, part in enumerate(parts(reader, data)(start)):
            if i == 1:  # as another process would: it finds the lock taken
                inner.append(cached_features(reader, data, parts(reader, data), tmp_path, disable_tqdm=True).clone())
            yield part

    inner = []
    outer = cached_features(reader, data, second_comes_in, tmp_path, disable_tqdm=True)
    assert torch.equal(outer, inner[0])


@pytest.fixture
def cached(tmp_path):
    data = tiny_dataset(20)
    reader = reader_of(tiny_model().eval())
    cached_features(reader, data, parts(reader, data), tmp_path, disable_tqdm=True)
    (path,) = tmp_path.iterdir()
    return path, lambda: cached_features(reader, data, parts(reader, data), tmp_path, disable_tqdm=True)


def test_a_truncated_cache_is_refused(cached):
    path, again = cached
    os.truncate(path, path.stat().st_size - 100)
    with pytest.raises(InputError, match=r"truncated or not a feature cache; delete the file and run again"):
        again()
    path.write_bytes(b"no")
    with pytest.raises(InputError, match="truncated or not a feature cache"):
        again()


def test_a_cache_of_another_model_is_refused(cached):
    path, again = cached
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + size].replace(encoder_hash(tiny_model()).encode(), b"0" * 64)
    path.write_bytes(content[:8] + header + content[8 + size :])
    with pytest.raises(InputError, match="was made from another encoder; delete the file, or pass another --feature"):
        again()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    data = tiny_dataset(4)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"features cannot be written to .* pass --feature_cache_dir with a folder"):
        reader = reader_of(tiny_model().eval())
        cached_features(reader, data, parts(reader, data), tmp_path / "file" / "in", disable_tqdm=True)


def test_a_read_only_folder_serves_what_it_holds(cached, monkeypatch):
    path, again = cached

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(filelock.FileLock, "acquire", read_only)  # before the first byte
    assert again().shape == (20, 32)
    path.unlink()
    with pytest.raises(InputError, match="Read-only file system"):
        again()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_keep_the_type_of_the_model(tmp_path, dtype):
    data = tiny_dataset(8)
    reader = reader_of(tiny_model().to(dtype).eval())
    assert cached_features(reader, data, parts(reader, data), tmp_path, disable_tqdm=True).dtype == dtype
