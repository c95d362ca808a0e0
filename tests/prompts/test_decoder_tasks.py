"""MeZO's tasks: folders in the Hub copies' form become the sentences that the decoders' templates say."""

import json

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from decoders import MESSAGES, decoder, save_decoder, subword_tokenizer
from tiny import tiny_masked_lm, tiny_tokenizer

import run_glue
from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.language import Form, load_language_data, prompt_and_references
from hf_ft_ext.data.loading import load_data
from hf_ft_ext.data.preprocess import tokenize
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.loading import load_prompt_model
from hf_ft_ext.prompts.preprocess import tokenize_prompts

BOOLEAN = ["False", "True"]
# task -> columns of a row, names of the labels, the row's label, the sentence, the words
TASKS = {
    "sst2": ({"sentence": " a film "}, ["negative", "positive"], 1, "a film It was", ["terrible", "great"]),
    "rte": (
        {"sentence1": "It is hot.", "sentence2": "It is warm."}, ["entailment", "not_entailment"], 0,
        'It is hot.\nDoes this mean that "It is warm." is true? Yes or No?\n', ["Yes", "No"],
    ),
    "cb": (
        {"premise": "It is hot.", "hypothesis": "it is warm"}, ["entailment", "contradiction", "neutral"], 2,
        'Suppose It is hot. Can we infer that "it is warm"? Yes, No, or Maybe?\n', ["Yes", "No", "Maybe"],
    ),
    "boolq": (
        {"question": "is it hot", "passage": "It is warm."}, BOOLEAN, 1, "It is warm. Is it hot?\n", ["No", "Yes"],
    ),
    "wsc": (
        {"text": "Mark told Pete, and he ran.", "span1_text": "Mark", "span2_text": "He"}, BOOLEAN, 0,
        'Mark told Pete, and he ran.\nIn the previous sentence, does the pronoun "he" refer to Mark? Yes or No?\n',
        ["No", "Yes"],
    ),
    "wic": (
        {"word": "place", "sentence1": "a place", "sentence2": "to place"}, BOOLEAN, 0,
        'Does the word "place" have the same meaning in these two sentences? Yes, No?\na place\nto place\n',
        ["No", "Yes"],
    ),
    "multirc": (
        {"paragraph": "It was hot.", "question": "How was it?", "answer": "hot"}, BOOLEAN, 1,
        'It was hot.\nQuestion: How was it?\nI found this answer "hot". Is that correct? Yes or No?\n', ["No", "Yes"],
    ),
}  # fmt: skip


def write_folder(folder, config, columns, names, labels, split="train"):
    """A data set folder with one configuration, in parquet, as the Hub's copies are."""
    features = Features({**dict.fromkeys(columns, Value("string")), "label": ClassLabel(names=names)})
    rows = {name: [value] * len(labels) for name, value in columns.items()}
    (folder / config).mkdir(parents=True, exist_ok=True)
    Dataset.from_dict({**rows, "label": labels}, features=features).to_parquet(folder / config / f"{split}.parquet")
    files = [f"  - {{split: {path.stem}, path: {config}/{path.name}}}" for path in (folder / config).glob("*.parquet")]
    (folder / "README.md").write_text(
        "\n".join(["---", "configs:", f"- config_name: {config}", "  data_files:", *files, "---", ""])
    )
    return str(folder)


BOOLQ_WITH_A_MARK = ({"question": "is it hot?", "passage": "It is warm."}, *TASKS["boolq"][1:])


@pytest.mark.parametrize(("name", "task"), [*TASKS.items(), ("boolq", BOOLQ_WITH_A_MARK)])
def test_a_row_of_the_hubs_form_becomes_the_sentence(tmp_path, name, task):
    columns, names, label, sentence, words = task
    place = write_folder(tmp_path / "data", name, columns, names, [label, -1])
    data = load_data(DataArguments(task_name=name, dataset_name=place))
    assert len(data.train) == 1 and data.label_names[data.train["label"][0]] == names[label]
    tokenizer = subword_tokenizer("bytes")
    network = decoder("gpt2", len(tokenizer))
    model_args = DataArguments(task_name=name, few_shot_type="prompt", word_scoring="sequence", max_seq_length=600)
    network.save_pretrained(tmp_path / "model")
    model = load_prompt_model(str(tmp_path / "model"), network.config, tokenizer, data, model_args)
    by_label = dict(zip(names, words, strict=True))
    assert model.config.words == [by_label[label] for label in data.label_names]
    row = tokenize_prompts(data, tokenizer, model_args, model.config, None).train[0]
    text = tokenizer.decode(row["input_ids"])
    assert text == sentence
    # the word goes on behind the text as the tokenizer has it
    for word, tokens in zip(model.config.words, model.config.word_sequences, strict=True):
        assert tokenizer.decode(tokens) == (word if sentence.endswith("\n") else f" {word}")


COPA = {"premise": "My body cast a shadow.", "choice1": "THE sun rose.", "choice2": "The grass was cut."}


def test_copa_chooses_between_the_rows_own_options(tmp_path):
    place = write_folder(tmp_path / "data", "copa", {**COPA, "question": "cause"}, ["choice1", "choice2"], [0, 1])
    data = load_data(DataArguments(task_name="copa", dataset_name=place))
    assert data.train[0] == {
        "premise": "My body cast a shadow because", "choice1": "the sun rose.", "choice2": "the grass was cut.",
        "label": 0,
    }  # fmt: skip
    tokenizer = subword_tokenizer("bytes")
    network = decoder("gpt2", len(tokenizer))
    network.save_pretrained(tmp_path / "model")
    args = DataArguments(task_name="copa", few_shot_type="prompt")
    model = load_prompt_model(str(tmp_path / "model"), network.config, tokenizer, data, args)
    assert model.config.word_scoring == "sequence" and model.config.words is None
    row = tokenize_prompts(data, tokenizer, args, model.config, None).train[0]
    options = [[i for i in option if i != -100] for option in row["option_ids"]]
    assert tokenizer.decode(row["input_ids"]) == "My body cast a shadow because"
    assert [tokenizer.decode(option) for option in options] == [" the sun rose.", " the grass was cut."]
    with pytest.raises(InputError, match="its own options, but demonstrations need common label words"):
        load_prompt_model(
            str(tmp_path / "model"), network.config, tokenizer, data,
            DataArguments(task_name="copa", few_shot_type="prompt-demo"),
        )  # fmt: skip
    bert = tiny_masked_lm()
    bert.save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="which the single mask of a masked language model cannot hold"):
        load_prompt_model(str(tmp_path / "bert"), bert.config, tiny_tokenizer(), data, args)


def test_copa_with_another_question_is_refused(tmp_path):
    place = write_folder(tmp_path / "data", "copa", {**COPA, "question": "why"}, ["choice1", "choice2"], [0, 1])
    with pytest.raises(InputError, match="column 'question' of copa holds 'why'; it is either 'cause' or 'effect'"):
        load_data(DataArguments(task_name="copa", dataset_name=place))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("opt", ["full"]),
        ("t5", ["full"]),
        ("gpt2", ["lora"]),
        ("gpt2", ["sparse", "--sparse_basis_steps", "2", "--sparse_density", "0.2"]),
        ("llama", ["fisher", "--fisher_examples", "4"]),
        ("opt", ["gradientless", "--search_method", "spsa", "--search_target", "all"]),
        ("gpt2", ["kernel"]),
    ],
)
def test_copa_trains_and_predicts_through_the_launcher(tmp_path, model, words):
    for split in ("train", "validation"):
        place = write_folder(
            tmp_path / "data", "copa", {**COPA, "question": "effect"}, ["choice1", "choice2"], [0, 1] * 3, split
        )
    save_decoder(tmp_path / model, model)
    steps = () if words == ["kernel"] else ("--max_steps", "2")  # it takes none
    status = run_glue.main(
        [
            "--method", *words, "--task_name", "copa", "--dataset_name", place, "--few_shot_type", "prompt",
            "--model_name_or_path", str(tmp_path / model), "--max_seq_length", "64", *steps, "--use_cpu",
            "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out"),
        ]
    )  # fmt: skip
    assert status == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["metrics"]["eval_accuracy"] == 0.5  # all rows are the same, the labels are not
    assert words == ["kernel"] or np.isfinite(record["metrics"]["train_loss"])


def test_texts_beyond_the_second_go_behind_it_for_a_classifier(tmp_path):
    columns, names, label, *_ = TASKS["wsc"]
    place = write_folder(tmp_path / "data", "wsc", {**columns, "text": "good film"}, names, [label])
    data = load_data(DataArguments(task_name="wsc", dataset_name=place))
    tokenizer = tiny_tokenizer(("mark", "he"))
    ids = tokenize(data, tokenizer, DataArguments(max_seq_length=20)).train[0]["input_ids"]
    assert ids == tokenizer("good film", "mark he")["input_ids"]


# --- tasks whose answers are written ----------------------------------------------------------------------

SQUAD = {"title": "Paris", "context": "It is in France.", "question": " Where is it? ",
         "answers": {"text": ["in France", "France", "France"], "answer_start": [6, 9, 9]}}  # fmt: skip
DROP = {"passage": "Ann ran 5 yards.", "question": "Who ran?", "answers_spans": {"spans": ["Ann"], "types": ["span"]}}
RECORD = {"passage": "Ann ran.", "query": "@placeholder ran.", "entities": ["Ann", "Bob"], "answers": ["Ann"]}


@pytest.mark.parametrize(
    ("task", "row", "prompt", "completion", "references"),
    [
        ("squad", SQUAD, "Title: Paris\nContext: It is in France.\nQuestion: Where is it?\nAnswer:", " in France",
         ["in France", "France"]),
        ("drop", DROP, "Passage: Ann ran 5 yards.\nQuestion: Who ran?\nAnswer:", " Ann", ["Ann"]),
        ("record", RECORD, 'Ann ran.\n@placeholder ran.\nQuestion: what is the "@placeholder"\nAnswer:', " Ann",
         ["Ann"]),
    ],
)  # fmt: skip
def test_questions_become_prompt_and_completion(tmp_path, task, row, prompt, completion, references):
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    data = load_language_data(DataArguments(task_name=task, train_file=str(tmp_path / "train.jsonl")))
    assert data.form is Form.PROMPT and data.train.column_names == ["prompt", "completion", "references"]
    assert (data.train[0]["prompt"], data.train[0]["completion"]) == (prompt, completion)
    assert prompt_and_references(data.train[0], data.form) == (prompt, references)
    assert data.origins["train", "train"].rows == 1


def test_a_task_of_another_form_is_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    file = str(tmp_path / "train.jsonl")
    with pytest.raises(InputError, match="the data has no column 'title', which this task needs"):
        load_language_data(DataArguments(task_name="squad", train_file=file))
    with pytest.raises(InputError, match="openassistant needs the message trees of OpenAssistant/oasst1"):
        load_language_data(DataArguments(task_name="openassistant", train_file=file))
    with pytest.raises(
        InputError, match="language modelling needs data: pass --train_file, --dataset_name, or --task"
    ):
        load_language_data(DataArguments())


def test_a_folder_of_json_keeps_nested_columns(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(SQUAD) + "\n")
    data = load_language_data(DataArguments(task_name="squad", dataset_name=str(tmp_path / "data")))
    assert data.train[0]["references"] == ["in France", "France"]
    with pytest.raises(InputError, match=r"both --dataset_name .* and --train_file are given; pass one of them"):
        load_language_data(DataArguments(dataset_name=str(tmp_path / "data"), train_file="x.jsonl"))
    with pytest.raises(InputError, match=r"--dataset_revision abc is for data sets of the Hub, and .* is a local"):
        load_language_data(DataArguments(dataset_name=str(tmp_path / "data"), dataset_revision="abc"))
    with pytest.raises(InputError, match="--column_names is for csv and tsv files, but this data is read as it is"):
        load_language_data(DataArguments(dataset_name=str(tmp_path / "data"), column_names=["a", "b"]))
    (tmp_path / "data" / "train.jsonl").write_text("{no json")
    with pytest.raises(InputError, match=r"cannot read data set folder .*pass a folder of csv"):
        load_language_data(DataArguments(dataset_name=str(tmp_path / "data")))


def test_a_folder_s_configuration_is_the_task_s_the_only_one_or_named(tmp_path):
    for name in ("record", "other"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "train.jsonl").write_text(json.dumps(RECORD) + "\n")
    lines = [f"- config_name: {name}\n  data_files: {name}/train.jsonl" for name in ("record", "other")]
    (tmp_path / "data" / "README.md").write_text("\n".join(["---", "configs:", *lines, "---", ""]))
    given = {"dataset_name": str(tmp_path / "data")}
    assert load_language_data(DataArguments(task_name="record", **given)).train[0]["completion"] == " Ann"
    with pytest.raises(InputError, match="has several configurations; pass one of these to --dataset_config_name"):
        load_language_data(DataArguments(text_columns=["passage"], **given))
    data = load_language_data(DataArguments(text_columns=["passage"], dataset_config_name="other", **given))
    assert data.train[0] == {"text": "Ann ran."}
    # files that the README lists are read again when they change
    (tmp_path / "data" / "other" / "train.jsonl").write_text(json.dumps({**RECORD, "passage": "Bob ran."}) + "\n")
    data = load_language_data(DataArguments(text_columns=["passage"], dataset_config_name="other", **given))
    assert data.train[0] == {"text": "Bob ran."}


def test_a_file_whose_path_looks_like_a_pattern(tmp_path):
    path = tmp_path / "a[1]" / "x.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"text": "a film"}) + "\n")
    assert load_language_data(DataArguments(train_file=str(path))).train[0]["text"] == "a film"


def test_own_columns_take_trls_names(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "q", "answer": "a", "note": "n"}) + "\n")
    file = str(tmp_path / "a.jsonl")
    data = load_language_data(DataArguments(train_file=file, text_columns=["question", "answer"]))
    assert data.form is Form.PROMPT and data.train[0] == {"prompt": "q", "completion": "a"}
    data = load_language_data(DataArguments(train_file=file, text_columns=["note"]))
    assert data.form is Form.TEXT and data.train[0] == {"text": "n"}


def test_prompts_to_be_continued_need_no_completion(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a", "completion": " b"}) + "\n")
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "c"}) + "\n")
    files = {"train_file": str(tmp_path / "a.jsonl"), "test_file": str(tmp_path / "b.jsonl")}
    data = load_language_data(DataArguments(**files))
    assert prompt_and_references(data.test["test"][0], data.form) == ("c", [])
    with pytest.raises(InputError, match="split 'validation' has the columns prompt, and language modelling needs"):
        load_language_data(DataArguments(**files, validation_file=str(tmp_path / "b.jsonl")))
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "c", "text": "d"}) + "\n")
    with pytest.raises(InputError, match="split 'test' has text, another split has prompt and completion"):
        load_language_data(DataArguments(**files))


def test_every_reply_of_openassistant_comes_with_the_turns_before_it(tmp_path):
    for split in ("train", "validation"):
        path = tmp_path / "data" / f"{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(map(json.dumps, MESSAGES)))
    data = load_language_data(DataArguments(task_name="openassistant", dataset_name=str(tmp_path / "data")))
    assert data.form is Form.TEXT and list(data.validation) == ["validation"]
    assert list(data.train["text"]) == [
        "User: good film\nAssistant: a great plot",
        "User: good film\nAssistant: a great plot\nUser: bad film\nAssistant: a dull plot",
        "User: good film\nAssistant: fine",
    ]


def test_messages_are_scored_by_their_last_turn():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b "}]
    assert prompt_and_references({"messages": turns}, Form.MESSAGES) == (turns[:1], ["b"])
    assert prompt_and_references({"messages": turns[:1]}, Form.MESSAGES) == (turns[:1], [])
