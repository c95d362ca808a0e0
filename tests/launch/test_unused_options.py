"""No option is accepted and ignored: what has nothing to act on ends in one line."""

import re
from dataclasses import fields

import pytest
from test_parsing import parse
from tiny import write_texts

from hf_ft_ext.arguments import DataArguments, ModelArguments, RunArguments
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.defaults import RULES
from hf_ft_ext.launch.language import check_language_options
from hf_ft_ext.launch.validation import check_splits
from hf_ft_ext.prompts.loading import check_prompt_options

# Options that act in every run that can have them (or whose refusal needs the data or the model: tested there).
ALWAYS = set(
    "method recipe_row task_type overwrite_output_dir dry_run hp_search from_linearhead model_name_or_path "
    "tokenizer_name cache_dir token trust_remote_code dtype attn_implementation quantization device_map num_k "
    "few_shot_type task_name dataset_name train_file validation_file test_file text_columns label_column "
    "positive_label multi_label_threshold max_seq_length pad_to_max_length streaming".split()
)
IDLE = [
    ("max_train_samples", ["5", "--do_eval"], "this run does not train; add --do_train"),
    ("max_eval_samples", ["5", "--do_train"], "this run does not evaluate; add --do_eval"),
    ("max_predict_samples", ["5"], "this run does not predict; add --do_predict"),
    ("metric", ["accuracy", "--do_train"], "this run does not evaluate; add --do_eval"),
    ("num_sample", ["4", "--few_shot_type", "prompt-demo", "--do_train"], "does not evaluate; add --do_eval"),
    ("stream_buffer", ["5"], "shuffles a stream"),
    ("stream_buffer", ["5", "--streaming", "--max_steps", "1", "--train_sampling_strategy", "sequential"],
     "rows keep their order here"),
    ("early_stopping_patience", ["2", "--do_eval", "--load_best_model_at_end", "--eval_strategy", "epoch",
     "--save_strategy", "epoch"], "this run does not train; add --do_train"),
    ("save_strategy", ["best", "--do_train"], "pass --eval_strategy steps or epoch"),
    ("metric_for_best_model", ["accuracy", "--do_train"], "pass --eval_strategy steps or epoch"),
    ("greater_is_better", ["true", "--do_train"], "pass --eval_strategy steps or epoch"),
    # refused by the library too, when the data or the model is loaded
    ("model_revision", ["v2"], "is about a model of the Hub"),
    ("few_shot_split", ["k-shot-10x"], "is for few-shot splits; pass --num_k"),
    ("allow_small_classes", [], "is for few-shot splits; pass --num_k"),
    ("dataset_config_name", ["x"], "applies only to data sets; pass --dataset_name"),
    ("dataset_revision", ["x"], "applies only to data sets; pass --dataset_name"),
    ("train_split", ["x"], "the data has no such split"),
    ("validation_split", ["x"], "the data has no such split"),
    ("test_split", ["x"], "the data has no such split"),
    ("quoting", ["none"], "is for csv and tsv files"),
    ("column_names", ["a", "b"], "is for csv and tsv files"),
    ("problem_type", ["regression"], "task 'demo' is"),
    ("sample", ["random"], "draws the rows of --max_train_samples"),
    ("prediction_probabilities", ["--do_train"], "this run does not predict; add --do_predict"),
    ("template", ["*cls*"], "pass --few_shot_type prompt, or leave it out"),
    ("mapping", ["{0:'a'}"], "pass --few_shot_type prompt, or leave it out"),
    ("first_sent_limit", ["5"], "pass --few_shot_type prompt, or leave it out"),
    ("other_sent_limit", ["5"], "pass --few_shot_type prompt, or leave it out"),
    ("truncate_head", [], "pass --few_shot_type prompt, or leave it out"),
    ("untie_words", [], "pass --few_shot_type prompt, or leave it out"),
    ("word_scoring", ["sequence"], "pass --few_shot_type prompt, or leave it out"),
    ("calibrate", [], "pass --few_shot_type prompt, or leave it out"),
    ("packing", [], "is about language modelling; pass --task_type causal_lm too"),
    ("completion_only_loss", ["true"], "is about language modelling; pass --task_type causal_lm too"),
    ("assistant_only_loss", [], "is about language modelling; pass --task_type causal_lm too"),
    ("source_lang", ["en_XX"], "is about language modelling; pass --task_type seq2seq_lm too"),
    ("target_lang", ["en_XX"], "is about language modelling; pass --task_type seq2seq_lm too"),
    ("chat_template_path", ["x"], "is about language modelling; pass --task_type causal_lm too"),
    ("predict_with_generate", [], "is about language modelling; pass --task_type causal_lm too"),
    ("predict_with_generate", ["--task_type", "causal_lm", "--do_train"], "does not evaluate; add --do_eval"),
    ("max_new_tokens", ["5", "--do_eval"], "this run writes none; add --predict_with_generate or --do_predict"),
    ("num_beams", ["5", "--do_eval"], "this run writes none; add --predict_with_generate or --do_predict"),
    ("num_demo", ["2"], "pass --few_shot_type prompt-demo, or leave it out"),
    ("num_demo", ["2", "--few_shot_type", "prompt"], "pass --few_shot_type prompt-demo, or leave it out"),
    ("num_sample", ["2"], "pass --few_shot_type prompt-demo, or leave it out"),
    ("demo_filter", ["0.5"], "pass --few_shot_type prompt-demo, or leave it out"),
    ("demo_filter_model", ["x"], "pass --few_shot_type prompt-demo, or leave it out"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("name", "words", "message"), IDLE, ids=[f"{n} {' '.join(w[:3])}" for n, w, _ in IDLE])
def test_an_option_without_effect_is_refused(name, words, message, tiny_bert_dir):
    from hf_ft_ext.models import load_tokenizer_and_model

    with pytest.raises(InputError, match=f"{name}.*{message}"):
        run_args, model_args, data_args, args = parse(
            "--method", "full", "--model_name_or_path", tiny_bert_dir, f"--{name}", *words
        )
        check_language_options(run_args)
        check_prompt_options(data_args)
        data = load_data(data_args)
        load_tokenizer_and_model(model_args, data, seed=0, args=args, data_args=data_args)


def test_every_option_is_either_refused_or_acts():
    """A new option: say when it has no effect (`launch.defaults.RULES`), or that it always has one (`ALWAYS`)."""
    names = {f.name for group in (RunArguments, ModelArguments, DataArguments) for f in fields(group) if f.init}
    refused = {name for name, *_ in IDLE}
    assert names - refused - ALWAYS == set() and set(RULES) <= refused


@pytest.mark.parametrize(
    "words",
    [
        ["--max_eval_samples", "5", "--method", "kernel", "--kernel_regularization", "auto", "--do_train"],
        ["--max_eval_samples", "5", "--hp_search", "2", "--do_train"],
        ["--max_train_samples", "5", "--few_shot_type", "prompt-demo", "--do_eval"],
        ["--metric_for_best_model", "loss", "--eval_strategy", "epoch"],
        ["--few_shot_split", "k-shot-10x", "--num_k", "4"],
        ["--max_predict_samples", "5", "--do_predict", "--metric", "accuracy"],
        ["--max_eval_samples", "5", "--do_train", "--do_predict", "--multi_label_threshold", "auto"],
    ],
)
def test_options_with_effect_pass(words):
    parse(*([] if "--method" in words else ["--method", "full"]), *words)


def test_values_that_a_search_overrides_are_logged(caplog):
    caplog.set_level("WARNING", logger="hf_ft_ext")
    parse("--method", "full", "--hp_search", "2", "--learning_rate", "1e-3")
    assert [r.getMessage() for r in caplog.records] == [
        "--hp_search chooses learning_rate: the value 0.001 is not used."
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--method", "full", "--max_steps", "2", "--num_train_epochs", "3"], "--num_train_epochs 3 is not used"),
        (
            ["--method", "full", "--lr_scheduler_type", "constant", "--warmup_steps", "2"],
            "--warmup_steps 2.* not used",
        ),
        (
            ["--method", "full", "--eval_steps", "5"],
            "--eval_steps 5 is not used: eval_strategy=no; --eval_strategy steps",
        ),
        (
            ["--method", "full", "--save_strategy", "epoch", "--save_steps", "5"],
            "--save_steps 5 .* save_strategy=epoch",
        ),
        (["--method", "gradientless", "--warmup_steps", "2"], "--warmup_steps 2.* lr_scheduler_type=constant has no"),
    ],
)
def test_values_that_other_options_override_are_logged(words, message, caplog):
    caplog.set_level("WARNING", logger="hf_ft_ext")
    parse(*words)
    (record,) = caplog.records
    assert re.search(message, record.getMessage())


def test_evaluation_without_rows_after_a_few_shot_draw_names_num_k(tiny_bert_dir):
    write_texts("train.csv", 20)
    files = ["--train_file", "train.csv", "--validation_file", "train.csv", "--num_k", "50", "--allow_small_classes"]
    run_args, _, data_args, args = parse("--method", "full", "--model_name_or_path", tiny_bert_dir, *files)
    with pytest.raises(InputError, match=r"--num_k 50 trains on all rows .* pass a smaller --num_k"):
        check_splits(run_args, args, load_data(data_args))
