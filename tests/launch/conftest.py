"""Small files, and the launcher on them and a tiny model."""

import pytest
from quick import QUICK, SOLVER_METHODS
from tiny import text_dataset, write_texts

import run_glue


@pytest.fixture
def files(tmp_path) -> list[str]:
    write_texts(tmp_path / "train.csv", 32)
    write_texts(tmp_path / "dev.csv", 12, seed=1)
    text_dataset(7, seed=2).select_columns(["sentence"]).to_csv(tmp_path / "test.csv")
    return ["--train_file", "train.csv", "--validation_file", "dev.csv", "--test_file", "test.csv"]


@pytest.fixture
def launch(files, tiny_bert_dir):
    def _launch(*argv: str, method: str = "full", data=None) -> int:
        return run_glue.main(
            [
                "--method", method, "--model_name_or_path", tiny_bert_dir, *(files if data is None else data),
                "--max_seq_length", "16", "--use_cpu", "--disable_tqdm", "true", *QUICK.get(method, ()),
                *(() if method in SOLVER_METHODS else ("--learning_rate", "1e-2")), *argv,
            ]
        )  # fmt: skip

    return _launch
