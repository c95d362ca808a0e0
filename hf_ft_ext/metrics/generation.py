"""Scores of generated texts against references: exact match, F1 over words, ROUGE.

Exact match and F1 are those of SQuAD (Rajpurkar et al., EMNLP 2016, arXiv 1606.05250): lower case, without punctuation
and articles, the best over a row's references. ROUGE-1, -2 and -L are F-measures (Lin, 2004) over lower-case words
without stemming, the best over a row's references. All are 0 to 1, higher is better, means over the rows.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

from hf_ft_ext.errors import InputError

GENERATION_METRICS = ("exact_match", "f1", "rouge1", "rouge2", "rougeL")
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def generation_metrics(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """The scores of `GENERATION_METRICS`, by name.

    Args:
        predictions: generated texts, one a row.
        references: the texts that count as right, one or more a row.

    Raises:
        InputError: no rows, another number of rows, or a row without a reference.
    """
    if not predictions or len(predictions) != len(references):
        raise InputError(
            f"generation metrics need one list of references a row, got {len(predictions)} predictions and "
            f"{len(references)} lists"
        )
    sums = dict.fromkeys(GENERATION_METRICS, 0.0)
    for row, (prediction, accepted) in enumerate(zip(predictions, references, strict=True)):
        if not accepted:
            raise InputError(f"row {row} has no reference to score its generated text by; fill or remove it")
        words = _words(prediction)
        for name, score in (
            ("exact_match", lambda text: float(_normalized(prediction) == _normalized(text))),
            ("f1", lambda text: _f1(_normalized(prediction).split(), _normalized(text).split())),
            ("rouge1", lambda text: _ngram_f(words, _words(text), 1)),
            ("rouge2", lambda text: _ngram_f(words, _words(text), 2)),
            ("rougeL", lambda text: _lcs_f(words, _words(text))),
        ):
            sums[name] += max(score(text) for text in accepted)
    return {name: total / len(predictions) for name, total in sums.items()}


def _normalized(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _f1(found: list[str], wanted: list[str]) -> float:
    if not found or not wanted:
        return float(found == wanted)
    return _f_measure(sum((Counter(found) & Counter(wanted)).values()), len(found), len(wanted))


def _ngram_f(found: list[str], wanted: list[str], n: int) -> float:
    grams = [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for words in (found, wanted)]
    return _f_measure(sum((grams[0] & grams[1]).values()), *(sum(counts.values()) for counts in grams))


def _lcs_f(found: list[str], wanted: list[str]) -> float:
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
