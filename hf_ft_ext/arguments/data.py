"""Arguments of the data: task, files and columns; few-shot splits and prompts; language modelling."""

from dataclasses import dataclass, field

from hf_ft_ext.problem_types import CLASSIFICATION, REGRESSION

DEFAULT_LENGTH = 128
FEW_SHOT_SPLITS = ("k-shot", "k-shot-10x", "k-shot-1k-test")
QUOTINGS = ("auto", "none", "minimal", "backslash")
PROBLEM_TYPES = (CLASSIFICATION, REGRESSION)
SAMPLES = FIRST, RANDOM, STRATIFIED = ("first", "random", "stratified")
WORD_SCORINGS = ("first_token", "sequence", "sequence_mean")
FEW_SHOT_TYPES = FINETUNE, PROMPT, PROMPT_DEMO = ("finetune", "prompt", "prompt-demo")


@dataclass
class FewShotArguments:
    """Few-shot splits and prompts; a base class of `DataArguments`."""

    _argument_group_name = "few shots and prompts"

    num_k: int | None = field(
        default=None,
        metadata={
            "help": "Few-shot: train on this many rows of each class (regression: of each half of the scale), drawn "
            "from the training split by `data_seed` (13 if none is given), and evaluate on as many others; none = all."
        },
    )
    few_shot_split: str = field(
        default="k-shot",
        metadata={
            "help": "With num_k. k-shot: as many rows for evaluation as for training; k-shot-10x: ten times as many; "
            "k-shot-1k-test: as k-shot, and test data of 1,000 rows at most.",
            "choices": FEW_SHOT_SPLITS,
        },
    )
    allow_small_classes: bool = field(
        default=False,
        metadata={
            "help": "With num_k: take all rows of a class that has too few, first for training, instead of an error."
        },
    )
    few_shot_type: str = field(
        default="finetune",
        metadata={
            "help": "finetune: a classification head. prompt: the language-model head predicts the class as a word at "
            "the mask of a template (masked), at its end (causal) or in the decoder. prompt-demo: the same with "
            "labelled examples in the context.",
            "choices": FEW_SHOT_TYPES,
        },
    )
    template: str | None = field(
        default=None,
        metadata={"help": "Prompts: the template, such as *cls**sent_0*_It_was*mask*.*sep+*; none = the task's own."},
    )
    mapping: dict | str | None = field(
        default=None,
        metadata={
            "help": "Prompts: a label word for each label, as JSON or Python: {'negative': 'terrible', 'positive': "
            "'great'}; label ids may stand for names; none = the task's own."
        },
    )
    word_scoring: str | None = field(
        default=None,
        metadata={
            "help": "Prompts of causal models and encoder-decoders: what a label word's logit is. first_token: of its "
            "first token; sequence: log probability of all its tokens; sequence_mean: the same divided by their "
            "number; none = first_token, or sequence where each row has options of its own (copa).",
            "choices": WORD_SCORINGS,
        },
    )
    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Prompts: subtract the logits of the template around an empty text, which measure the model's "
            "bias for each word; with demonstrations, their mean over num_sample contexts."
        },
    )
    first_sent_limit: int | None = field(
        default=None, metadata={"help": "Prompts: maximum tokens of the first text; none = the task's own, if any."}
    )
    other_sent_limit: int | None = field(
        default=None,
        metadata={"help": "Prompts: maximum tokens of any other text, also in demonstrations; none = the task's own."},
    )
    truncate_head: bool | None = field(
        default=None,
        metadata={
            "help": "Prompts: cut too long texts at the beginning, not at the end; the mask is kept. none = the "
            "task's own: the beginning in MeZO's tasks of several texts, whose questions come last, else the end.",
            "nargs": "?",
            "const": True,
        },
    )
    untie_words: bool = field(
        default=False,
        metadata={
            "help": "Prompts: make the label words' output rows a separate layer instead of sharing them with "
            "the input embeddings and the rest of the vocabulary."
        },
    )
    num_demo: int = field(default=1, metadata={"help": "prompt-demo: demonstrations of each class in the context."})
    num_sample: int = field(
        default=16,
        metadata={"help": "prompt-demo: contexts drawn for each row in evaluation; their logits are averaged."},
    )
    demo_filter: float = field(
        default=1.0,
        metadata={
            "help": "prompt-demo: draw demonstrations from this share of the training rows of each class, those most "
            "similar to the row by demo_filter_model, in (0, 1]; 1 = from all."
        },
    )
    demo_filter_model: str | None = field(
        default=None,
        metadata={
            "help": "prompt-demo: Hub id or folder of the encoder that compares texts; none = the demo encoder."
        },
    )


@dataclass
class LanguageArguments:
    """Language modelling; a base class of `DataArguments`."""

    _argument_group_name = "language models (task_type causal_lm and seq2seq_lm)"

    packing: bool = field(
        default=False,
        metadata={"help": "causal_lm: put several rows into one sequence of max_seq_length tokens (trl's packing)."},
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "causal_lm: take the loss over the completion alone; none = with prompt and completion, not with "
            "text and messages."
        },
    )
    assistant_only_loss: bool = field(
        default=False,
        metadata={
            "help": "messages: take the loss over the assistant's answers alone. The chat template has to mark them "
            "with `generation` tags, or be one for which trl has a template with them."
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={"help": "messages: file of a chat template, or folder of a tokenizer that has one; none = its own."},
    )
    source_lang: str | None = field(
        default=None,
        metadata={
            "help": "seq2seq_lm, models with language codes (mBART, M2M100, NLLB): code of the prompts' language; "
            "none = the tokenizer's."
        },
    )
    target_lang: str | None = field(
        default=None,
        metadata={"help": "The same for the completions; generation begins with it. None = the tokenizer's."},
    )
    predict_with_generate: bool = field(
        default=False,
        metadata={
            "help": "Evaluate by generated texts too: exact_match, f1, rouge1, rouge2, rougeL against the completion."
        },
    )
    max_new_tokens: int = field(default=64, metadata={"help": "Maximum tokens of a generated text."})
    num_beams: int = field(default=1, metadata={"help": "Beams of the generation; 1 = greedy decoding."})


@dataclass
class DataArguments(LanguageArguments, FewShotArguments):
    """Which data to train, evaluate and predict on."""

    _argument_group_name = "data"

    task_name: str | None = field(
        default=None,
        metadata={
            "help": "A task of GLUE, SuperGLUE or the few-shot suite, or `demo`; none and no data given = `demo`."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder of the data set; none = the task's own Hub id."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set; none = the task's name, if there is a task."}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a Hub data set; none = its main branch."}
    )
    train_split: list[str] | None = field(
        default=None,
        metadata={
            "help": "Splits of the data set to train on, concatenated (ANLI: train_r1 train_r2); none = `train`."
        },
    )
    validation_split: list[str] | None = field(
        default=None, metadata={"help": "Splits of the data set to evaluate on; none = those with the usual names."}
    )
    test_split: list[str] | None = field(
        default=None, metadata={"help": "Splits of the data set to predict on; none = those with the usual names."}
    )
    train_file: str | None = field(
        default=None, metadata={"help": "Own training data: csv, tsv, json, jsonl (also .gz, .bz2, .xz) or parquet."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Own validation data, same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Own test data, same formats; labels optional."})
    quoting: str = field(
        default="auto",
        metadata={
            "help": "Double quotes in csv and tsv files. auto: detected for each file, and logged; none: they are "
            "part of the text, as in GLUE's files; minimal: they enclose fields and are doubled inside; backslash: "
            "they enclose fields and are escaped by a backslash inside.",
            "choices": QUOTINGS,
        },
    )
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Names of all columns of csv and tsv files that have no header line."}
    )
    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two text columns; none = the task's, or detected in own data."}
    )
    problem_type: str | None = field(
        default=None,
        metadata={
            "help": "Kind of labels in own data: single_label_classification or regression (ratings such as 1 to 5); "
            "none = regression for labels with a decimal point, several labels per row for lists, else classes.",
            "choices": PROBLEM_TYPES,
        },
    )
    label_column: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Label column; none = the task's, or `label`. Float labels mean regression, lists mean several "
            "labels per row. With several columns of 0 and 1, each column is one label.",
            "nargs": "+",
        },
    )
    metric: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "One or several: accuracy, accuracy_f1, matthews, pearson_spearman, f1, f1_macro, precision, "
            "recall, roc_auc, ... (docs/launcher.md), your own function (`module:function`, `file.py:function`), "
            "or a metric of evaluate by name or path; none = the task's own. The first chooses the best model.",
            "nargs": "+",
        },
    )
    positive_label: str | None = field(
        default=None,
        metadata={
            "help": "Name of the class for which f1, precision and recall are computed; none = the task's, or "
            "inferred from the names of two classes (`yes` of no and yes)."
        },
    )
    multi_label_threshold: float | str | None = field(
        default=None,
        metadata={
            "help": "Several labels per row: the lowest probability to predict a label, from 0 to 1 (none = 0.5); "
            "auto = for each label the threshold with the best F1 on the validation split."
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": f"Tokens per example after truncation, special tokens included; none = {DEFAULT_LENGTH}, with "
            "prompts the task's own; less where the model has fewer positions."
        },
    )
    pad_to_max_length: bool = field(
        default=False, metadata={"help": "Pad every example to `max_seq_length` instead of to the batch's longest."}
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training split while training, without downloading or converting it first; needs "
            "`max_steps`. Rows come shuffled within a buffer (`stream_buffer`), or in their order with "
            "`train_sampling_strategy=sequential`."
        },
    )
    stream_buffer: int = field(default=10000, metadata={"help": "Rows in the buffer that shuffles a stream."})
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only n training rows; see `sample`."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use only n validation rows; see `sample`."})
    max_predict_samples: int | None = field(
        default=None,
        metadata={"help": "Use only the first n test rows; with few_shot_split=k-shot-1k-test, n drawn ones."},
    )
    sample: str = field(
        default="first",
        metadata={
            "help": "Which rows max_train_samples and max_eval_samples keep. first: the first ones; random: drawn by "
            "`data_seed` (13 if none is given); stratified: drawn with the class proportions (regression: over the "
            "whole scale). The rows keep their order.",
            "choices": SAMPLES,
        },
    )

    def __post_init__(self):
        self.label_column = _one_or_several(self.label_column)
        self.metric = _one_or_several(self.metric)


def _one_or_several(value: list[str] | str | None) -> list[str] | str | None:
    """Replace a list of one item by the item, so that the usual single value is plain text."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value
