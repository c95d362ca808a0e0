"""Scores of generated texts against references: exact match, F1 over words, ROUGE.

Exact match and F1 are those of SQuAD (Rajpurkar et al., EMNLP 2016, arXiv 1606.05250): lower case, without punctuation
and articles, the best over a row's references. ROUGE-1, -2 and -L are F-measures (Lin, 2004) over lower-case words
without stemming, the best over a row's references. All are 0 to 1, higher is better, means over the rows.
"""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from hf_ft_ext.errors import InputError

OF_TRL = re.compile(r"entropy|num_tokens|mean_token_accuracy")  # what trl logs about its batches beside the loss
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def generation_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return `exact_match`, `f1`, `rouge1`, `rouge2` and `rougeL`, means over the rows.

    Args:
        predictions: generated texts, one per row.
        references: the correct texts, one or more per row.

    Raises:
        InputError: no rows, another number of rows, or a row without a reference.
    """
    if not predictions or len(predictions) != len(references):
        raise InputError(
            f"generation metrics need one list of references per row, got {len(predictions)} predictions and "
            f"{len(references)} lists"
        )
    sums = dict.fromkeys(_SCORES, 0.0)
    for row, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        if not accepted:
            raise InputError(f"row {row} has no reference; add one, or remove the row")
        for name, score in _SCORES.items():
            sums[name] += max(score(prediction, text) for text in accepted)
    return {name: total / len(predictions) for name, total in sums.items()}


def _normalized(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _exact_match(prediction: str, reference: str) -> float:
    return float(_normalized(prediction) == _normalized(reference))


def _f1(prediction: str, reference: str) -> float:
    found, wanted = _normalized(prediction).split(), _normalized(reference).split()
    if not found or not wanted:
        return float(found == wanted)
    return _f_measure(sum((Counter(found) & Counter(wanted)).values()), len(found), len(wanted))


def _rouge_n(prediction: str, reference: str, n: int) -> float:
    both = _words(prediction), _words(reference)
    grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in both]
    return _f_measure(sum((grams[0] & grams[1]).values()), *(sum(counts.values()) for counts in grams))


def _rouge_l(prediction: str, reference: str) -> float:
    found, wanted = _words(prediction), _words(reference)
    # longest common subsequence, one row of the table at a time
    row = [0] * (len(wanted) + 1)
    for word in found:
        above = row
        row = [0]
        for j, other in enumerate(wanted):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
    return _f_measure(row[-1], len(found), len(wanted))


def _f_measure(common: int, found: int, wanted: int) -> float:
    # 2 P R / (P + R) with P = common / found and R = common / wanted
    return 2 * common / (found + wanted) if common else 0.0


_SCORES: dict[str, Callable[[str, str], float]] = {
    "exact_match": _exact_match,
    "f1": _f1,
    "rouge1": functools.partial(_rouge_n, n=1),
    "rouge2": functools.partial(_rouge_n, n=2),
    "rougeL": _rouge_l,
}
