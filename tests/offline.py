"""A small world without a network: a model, and data of GLUE's form, for commands that name real ones."""

from pathlib import Path

import yaml
from tiny import CONFIGS, WORDS, text_dataset, tiny_masked_lm, tiny_tokenizer
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from hf_ft_ext.data.tasks import TASKS
from hf_ft_ext.metrics import REGRESSION
from hf_ft_ext.prompts.templates.defaults import PROMPTS

LENGTH = 256  # as long as the longest of the tasks' prompts
ROWS = {"train": 300, "validation": 40, "test": 24}


def tokenizer_with_label_words() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, and one token for every label word of the tasks' own prompts."""
    words = {word.lower() for prompt in PROMPTS.values() for word in prompt.words.values()}
    tokenizer = tiny_tokenizer(tuple(sorted(words - set(WORDS))))
    tokenizer.model_max_length = LENGTH
    return tokenizer


def write_model(folder: Path, model_type: str = "bert") -> str:
    """A masked language model with a pooler, of two small layers: for prompts and for a classification head."""
    tokenizer = tokenizer_with_label_words()
    sizes = {**CONFIGS[model_type], "vocab_size": len(tokenizer), "max_position_embeddings": LENGTH + 2}
    tiny_masked_lm(model_type, **sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_classifier(folder: Path, masked_lm: str) -> str:
    """A two-class model on the encoder of `masked_lm`, with a head of its own."""
    AutoModelForSequenceClassification.from_pretrained(masked_lm, num_labels=2).save_pretrained(folder)
    tokenizer_with_label_words().save_pretrained(folder)
    return str(folder)


def write_glue(folder: Path, tasks: set[str] | None = None) -> str:
    """A folder of the form of `nyu-mll/glue` with made-up rows; all tasks with a Hub id unless named."""
    configs = []
    for name, task in TASKS.items():
        if task.hub_id is None or (tasks is not None and name not in tasks):
            continue
        columns = task.text_columns[0]
        splits = ["train", *task.validation_splits, *task.test_splits]
        files = [{"split": split, "path": f"{name}/{split}.csv"} for split in splits]
        configs.append({"config_name": name, "data_files": files})
        for seed, split in enumerate(splits):
            rows = text_dataset(ROWS[split.partition("_")[0]], pair=len(columns) == 2, seed=seed)
            own = rows.column_names[: len(columns)]
            labels = [i % 11 / 2.2 if task.problem_type == REGRESSION else _label(task, i) for i in range(len(rows))]
            rows = rows.select_columns(own).rename_columns(dict(zip(own, columns, strict=True)))
            path = folder / name / f"{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.add_column("label", labels).to_csv(path)
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n")
    return str(folder)


def _label(task, i: int) -> str:
    return task.label_names[i % len(task.label_names)]
