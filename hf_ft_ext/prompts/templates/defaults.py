"""Templates, label words and lengths of known tasks: LM-BFF's for masked language models, MeZO's for decoders.

Sources: Gao et al., ACL 2021 (arXiv 2012.15723); for decoders rte, cb, boolq, wsc, wic, multirc and copa as in
princeton-nlp/MeZO, large_models/templates.py (Malladi et al., NeurIPS 2023, arXiv 2305.17333). MeZO has no decoder
templates for qnli, mrpc, qqp, stsb, mnli, snli, trec and ag_news; those are this package's own, in the same style.
"""

from dataclasses import dataclass

from hf_ft_ext.data.tasks import Task
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.readout import Reading


@dataclass(frozen=True)
class TaskPrompt:
    """The prompt of a task.

    Attributes:
        template: see `parse_template`.
        words: label name -> label word; a regression has `"0"` and `"1"`.
        first_sent_limit: maximum number of tokens of the first text, or `None`.
        other_sent_limit: maximum number of tokens of any other text, or `None`.
        max_seq_length: maximum number of tokens of a row; doubled with demonstrations.
        truncate_head: whether long texts lose their beginning, as in MeZO, so that the question at the end stays
            whole.
    """

    template: str
    words: dict[str, str]
    first_sent_limit: int | None = None
    other_sent_limit: int | None = None
    max_seq_length: int = 128
    truncate_head: bool = False


_IT_WAS = "*cls**sent_0*_It_was*mask*.*sep+*"
_THIS_IS = "*cls**sent_0*_This_is*mask*.*sep+*"
_SAME = "*cls**sent_0**mask*,*+sentl_1**sep+*"
_FOLLOWS = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
_POLARITY = {"negative": "terrible", "positive": "great"}
_YES = {"not_entailment": "No", "entailment": "Yes"}
_NLI = {"contradiction": "No", "entailment": "Yes", "neutral": "Maybe"}
_SST5 = dict(
    zip(
        ("very negative", "negative", "neutral", "positive", "very positive"),
        ("terrible", "bad", "okay", "good", "great"),
        strict=True,
    )
)
_TREC = {
    "description": "Description",
    "entity": "Entity",
    "abbreviation": "Expression",
    "human": "Human",
    "location": "Location",
    "number": "Number",
}
_NEWS = {"World": "world", "Sports": "sports", "Business": "business", "Sci/Tech": "tech"}

PROMPTS: dict[str, TaskPrompt] = {
    "sst2": TaskPrompt(_IT_WAS, _POLARITY),
    "mr": TaskPrompt(_IT_WAS, _POLARITY, 110, 50),
    "cr": TaskPrompt(_IT_WAS, _POLARITY, 110, 50),
    "mpqa": TaskPrompt(_IT_WAS, _POLARITY, 110),
    "sst5": TaskPrompt(_IT_WAS, _SST5),
    "subj": TaskPrompt(_THIS_IS, {"subjective": "subjective", "objective": "objective"}, 110, 50),
    "trec": TaskPrompt("*cls**mask*:*+sent_0**sep+*", _TREC, 110),
    "cola": TaskPrompt(_THIS_IS, {"unacceptable": "incorrect", "acceptable": "correct"}),
    "mrpc": TaskPrompt(_SAME, {"not_equivalent": "No", "equivalent": "Yes"}),
    "qqp": TaskPrompt(_SAME, {"not_duplicate": "No", "duplicate": "Yes"}),
    "stsb": TaskPrompt(_SAME, {"0": "No", "1": "Yes"}),
    "rte": TaskPrompt(_FOLLOWS, _YES, 240, None, 256),
    "qnli": TaskPrompt(_FOLLOWS, _YES),
    "mnli": TaskPrompt(_FOLLOWS, _NLI, 240, None, 256),
    "snli": TaskPrompt(_FOLLOWS, _NLI, None, None, 256),
    "ag_news": TaskPrompt("*cls**sent_0*_This_article_is_about*mask*_news.*sep+*", _NEWS, 240, None, 256),
    "demo": TaskPrompt(_IT_WAS, _POLARITY),
}


_NO_YES = {"False": "No", "True": "Yes"}
# Only tasks whose masked template has text after the mask, or for which MeZO has another template. For all others,
# `PROMPTS` is used for decoders too.
DECODER_PROMPTS: dict[str, TaskPrompt] = {
    "rte": TaskPrompt('*cls**sent_0*\nDoes this mean that "*sent_1*" is true? Yes or No?\n*mask*', _YES,
                      max_seq_length=256, truncate_head=True),
    "qnli": TaskPrompt('*cls**sent_0*\nDoes this sentence answer it: "*sent_1*"? Yes or No?\n*mask*',
                       {"not_entailment": "No", "entailment": "Yes"}, max_seq_length=256),
    "mrpc": TaskPrompt('*cls**sent_0*\nDoes this mean the same as "*sent_1*"? Yes or No?\n*mask*',
                       {"not_equivalent": "No", "equivalent": "Yes"}, max_seq_length=256, truncate_head=True),
    "qqp": TaskPrompt('*cls**sent_0*\nDoes this ask the same as "*sent_1*"? Yes or No?\n*mask*',
                      {"not_duplicate": "No", "duplicate": "Yes"}, max_seq_length=256, truncate_head=True),
    "stsb": TaskPrompt('*cls**sent_0*\nDoes this mean the same as "*sent_1*"? Yes or No?\n*mask*',
                       {"0": "No", "1": "Yes"}, max_seq_length=256, truncate_head=True),
    "mnli": TaskPrompt('*cls*Suppose *sent_0* Can we infer that "*sent_1*"? Yes, No, or Maybe?\n*mask*', _NLI,
                       max_seq_length=256, truncate_head=True),
    "snli": TaskPrompt('*cls*Suppose *sent_0* Can we infer that "*sent_1*"? Yes, No, or Maybe?\n*mask*', _NLI,
                       max_seq_length=256, truncate_head=True),
    "trec": TaskPrompt("*cls**sent_0*\nThe answer is about:*mask*", _TREC, 110),
    "ag_news": TaskPrompt("*cls**sent_0*\nThe topic of this article is*mask*", _NEWS, 240, None, 256),
    "cb": TaskPrompt('*cls*Suppose *sent_0* Can we infer that "*sent_1*"? Yes, No, or Maybe?\n*mask*', _NLI,
                     max_seq_length=512, truncate_head=True),
    "boolq": TaskPrompt("*cls**sent_0* *sentu?_1*\n*mask*", _NO_YES, max_seq_length=512, truncate_head=True),
    "wsc": TaskPrompt(
        '*cls**sent_0*\nIn the previous sentence, does the pronoun "*sentl_2*" refer to *sent_1*? Yes or No?\n*mask*',
        _NO_YES, max_seq_length=256, truncate_head=True,
    ),
    "wic": TaskPrompt(
        '*cls*Does the word "*sent_2*" have the same meaning in these two sentences? Yes, No?\n*sent_0*\n*sent_1*\n'
        "*mask*", _NO_YES, max_seq_length=256,
    ),
    "multirc": TaskPrompt(
        '*cls**sent_0*\nQuestion: *sent_1*\nI found this answer "*sent_2*". Is that correct? Yes or No?\n*mask*',
        _NO_YES, max_seq_length=512, truncate_head=True,
    ),
    "copa": TaskPrompt("*cls**sent_0**mask*", {}),
}  # fmt: skip


def known_prompt(task: Task, reading: Reading) -> TaskPrompt | None:
    """Return the task's own prompt for this kind of model, if any; SuperGLUE's are used for masked models too."""
    first, second = (PROMPTS, DECODER_PROMPTS) if reading is Reading.MASK else (DECODER_PROMPTS, PROMPTS)
    return first.get(task.name) or second.get(task.name)


def task_prompt(
    task: Task, template: str | None, mapping: dict | str | None, reading: Reading = Reading.MASK
) -> tuple[str, dict | str]:
    """Return template and mapping: those that the user passed, otherwise those of the task's own prompt.

    Raises:
        InputError: the task has no prompt, and template or mapping is missing.
    """
    found = known_prompt(task, reading)
    if template is not None and mapping is not None:
        return template, mapping
    if found is None:
        missing = [option for option, value in (("--template", template), ("--mapping", mapping)) if value is None]
        raise InputError(
            f"task {task.name!r} has no prompt of its own; pass {' and '.join(missing)}, such as --template "
            f'"{_IT_WAS}" --mapping "{_POLARITY}"'
        )
    return found.template if template is None else template, found.words if mapping is None else mapping
