"""Labels of rows that fit no class: refused with their row, instead of fitted as numbers."""

import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import DataCollatorForTokenClassification

from hf_ft_ext.errors import InputError
from hf_ft_ext.label_tokens import check_row_labels, other_labels
from hf_ft_ext.methods import METHODS

MULTI = {"num_labels": 3, "problem_type": "multi_label_classification"}
SETTINGS = {
    "kernel": ("kernel", {"kernel_regularization": "1e-3"}),
    "linearhead": ("linearhead", {"feature_cache_gb": 0.0}),
    "cached search": ("gradientless", {"max_steps": 1}),
    "search": ("gradientless", {"max_steps": 1, "search_method": "spsa", "search_target": "all"}),
    "accuracy": ("gradientless", {"max_steps": 1, "search_objective": "accuracy"}),
}
# labels of every three rows in turn, settings of the model, the message
WRONG = {
    "no class": ([0, 1, -1], {}, r"label -1 .*is not a class id \(0 to 1\)"),
    "ignored": ([0, 1, -100], {}, r"label -100 .*is not a class id \(0 to 1\)"),
    "class of others": ([0, 1, 5], {}, r"label 5 .*is not a class id \(0 to 1\)"),
    "several": ([[1.0, 0.0, 2.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]], MULTI, r"label 2 .* is not (0 or|from 0 to) 1"),
    "missing": ([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, float("nan")]], MULTI, r"label nan of row \d+ is not"),
    "number": ([0.5, 1.0, float("nan")], {"num_labels": 1}, "label nan of row 2 is not a finite number"),
    "infinite": ([0.5, float("-inf"), 1.0], {"num_labels": 1}, "label -inf of row 1 is not a finite number"),
}  # fmt: skip


def trainer_of(folder, way, labels, form=lambda rows: rows, **config):
    method, options = SETTINGS[way]
    rows = tiny_dataset(len(labels)).remove_columns("labels").add_column("labels", labels)
    args = METHODS[method].arguments_class()(
        str(folder), report_to="none", use_cpu=True, disable_tqdm=True, **options,
        **({"feature_cache_dir": str(folder / "features")} if way == "cached search" else {}),
    )  # fmt: skip
    trainer = METHODS[method].trainer_class()
    return trainer(tiny_model(**config), args, train_dataset=form(rows), processing_class=tiny_tokenizer())


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("way", SETTINGS)
def test_labels_that_fit_no_class_are_refused(tmp_path, way, kind):
    labels, config, message = WRONG[kind]
    if way == "accuracy" and config.get("num_labels") == 1:
        pytest.skip("there is no accuracy of a regression")
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, way, labels * 8, **config).train()


def test_a_search_takes_soft_labels_and_class_ids_as_floats_are_refused(tmp_path):
    trainer_of(tmp_path, "search", [[0.3, 0.0, 1.0]] * 24, **MULTI).train()
    with pytest.raises(InputError, match=r"labels have shape .* and type torch.float32; pass class ids as integers"):
        trainer_of(tmp_path, "search", [0.0, 1.0] * 12).train()


def test_problem_types_are_inferred_as_in_transformers():
    check_row_labels(torch.tensor([3.5, -2.0]), 1, None)
    check_row_labels(torch.tensor([[0.0, 1.0], [1.0, 1.0]]), 2, None)
    for dtype in (torch.long, torch.int32, torch.uint8, torch.bool, torch.float16):
        check_row_labels(torch.tensor([1, 0]).to(dtype), 2, None)
    check_row_labels(torch.tensor([[3.5, -2.0]]), 2, "regression")
    for labels, classes, problem in (
        (torch.tensor([[0.0, 0.5]]), 2, None),
        (torch.tensor([0.5, 1.0]), 2, "single_label_classification"),
        (torch.tensor([True, False]).long() * 2, 2, None),
    ):
        with pytest.raises(InputError):
            check_row_labels(labels, classes, problem)


def test_other_labels_are_of_all_classes():
    assert other_labels(torch.zeros(4, dtype=torch.long), 3).tolist() == [1, 2, 0, 1]
    assert other_labels(torch.tensor([[1, -100, 1]]), 2).tolist() == [[0, -100, 0]]
    assert other_labels(torch.tensor([[1.0, 0.0]]), 2).tolist() == [[0.0, 1.0]]
    assert other_labels(torch.tensor([2.5]), 1).tolist() == [3.5]


class Tensors(torch.utils.data.Dataset):
    """Rows as dictionaries of tensors, as users write them."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return {name: torch.as_tensor(value) for name, value in self.rows[i].items()}


@pytest.mark.parametrize("name", ["linearhead", "kernel"])
def test_several_labels_per_row_in_any_form_of_rows(tmp_path, name):
    labels = [[float(i % 2), float(i % 3 == 0), float(i % 4 == 1)] for i in range(12)]
    forms = (lambda rows: rows, lambda rows: rows.with_format("torch"), Tensors)
    found = [trainer_of(tmp_path, name, labels, form, **MULTI).train().training_loss for form in forms]
    assert found[0] == pytest.approx(found[1]) == pytest.approx(found[2])


@pytest.mark.parametrize("name", ["linearhead", "kernel"])
def test_labels_of_tokens_are_refused_where_rows_have_one(tmp_path, name):
    trainer = trainer_of(tmp_path, name, tiny_dataset(12)["input_ids"])
    trainer.data_collator = DataCollatorForTokenClassification(tiny_tokenizer())
    with pytest.raises(InputError, match="different shapes"):
        trainer.train()
