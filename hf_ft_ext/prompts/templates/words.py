"""Label words: parse a mapping to one word per label, and tokenise the words."""

import ast
import json
import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hf_ft_ext.arguments import WORD_SCORINGS
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.readout import Reading

logger = logging.getLogger(__name__)

_NO_SPACE = "<[.,"  # no space is put before words that begin with these characters
BOUNDS = ("0", "1")  # labels in a regression's mapping: lower and upper end of the scale
FIRST_TOKEN, SEQUENCE, SEQUENCE_MEAN = WORD_SCORINGS
_EXAMPLE = "{'negative': 'terrible', 'positive': 'great'}"


def parse_mapping(mapping: dict[Any, str] | str, labels: Sequence[str] | None) -> list[str]:
    """Return the label words in the order of the label ids.

    Args:
        mapping: label (id, or name in any case) -> word. As text: JSON or a Python dictionary of plain strings and
            numbers, which is parsed, never executed. Numbers are names of labels if all of them are.
        labels: label names by id; `None` = a regression, whose labels are 0 (lower end) and 1 (upper end).

    Raises:
        InputError: the text is not a dictionary, a label is missing, unknown or repeated, two labels have the same
            word, or a regression does not have two words.
    """
    pairs = _pairs(mapping)
    known = BOUNDS if labels is None else labels
    if labels is None and len(pairs) != 2:
        raise InputError(
            f"mapping {mapping!r} has {len(pairs)} words, but a regression needs two: one for the lower end of the "
            "scale and one for the upper end, such as {'0': 'No', '1': 'Yes'}"
        )
    ids = _label_ids([str(key) for key, _ in pairs], [str(label) for label in known])
    words: dict[int, str] = {}
    for (key, word), i in zip(pairs, ids, strict=True):
        if i is None:
            raise InputError(f"mapping {mapping!r} has the unknown label {key!r}; the labels are: {_listed(known)}")
        if i in words:
            raise InputError(f"mapping {mapping!r} has label {known[i]!r} twice; name each label once")
        if not isinstance(word, str) or not word.strip():
            raise InputError(
                f"mapping {mapping!r} maps label {known[i]!r} to {word!r}, which is not a word; pass text"
            )
        words[i] = word.strip()
    if missing := [label for i, label in enumerate(known) if i not in words]:
        raise InputError(f"mapping {mapping!r} has no word for label {missing[0]!r}; the labels are: {_listed(known)}")
    ordered = [words[i] for i in range(len(known))]
    for i, word in enumerate(ordered):
        if word in ordered[:i]:
            other = known[ordered.index(word)]
            raise InputError(
                f"mapping {mapping!r} maps both {other!r} and {known[i]!r} to {word!r}; choose different words"
            )
    return ordered


def _label_ids(keys: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """Return the label id that each key of a mapping stands for; `None` = none."""
    in_any_case = {name.lower(): i for i, name in enumerate(names)}
    exact = {name: i for i, name in enumerate(names)}  # names may differ only in case
    by_name = [exact.get(key, in_any_case.get(key.lower())) for key in keys]
    by_id = [int(key) if key.isdecimal() and int(key) < len(names) else None for key in keys]
    if None in by_name and None not in by_id:  # ids 0, 1 and 2 of the labels 1, 2 and 3
        return by_id
    return [number if name is None else name for name, number in zip(by_name, by_id, strict=True)]


def check_word_scoring(word_scoring: str, reading: Reading, untie_words: bool) -> None:
    """Refuse a scoring of label words that the model or another option does not support.

    Raises:
        InputError: an unknown scoring, or sequences with a masked language model or untied words.
    """
    if word_scoring not in WORD_SCORINGS:
        raise InputError(f"word_scoring={word_scoring!r} is unknown; choose from: {', '.join(WORD_SCORINGS)}")
    if word_scoring == FIRST_TOKEN:
        return
    if reading is Reading.MASK:
        raise InputError(
            f"word_scoring={word_scoring} scores several tokens, but a masked language model has one mask; pass "
            "first_token, or a causal language model"
        )
    if untie_words:
        raise InputError(
            f"word_scoring={word_scoring} needs the output rows of the whole vocabulary, but untie_words keeps only "
            "those of the label words; leave out one of the two"
        )


def word_ids(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """Return the token of each label word, tokenised with a space before it.

    Raises:
        InputError: a word has several tokens (the message shows them) or is unknown to the tokenizer, or two words are
            the same token.
    """
    ids: list[int] = []
    for word in words:
        text = word if word[0] in _NO_SPACE else f" {word}"
        pieces = tokenizer.tokenize(text)
        if len(pieces) != 1:
            raise InputError(
                f"label word {word!r} is {len(pieces)} tokens for this tokenizer ({' '.join(pieces)}), but the mask "
                "is one; choose a word that is one token (--mapping)"
            )
        token = tokenizer.convert_tokens_to_ids(pieces[0])
        if token == tokenizer.unk_token_id and word != tokenizer.unk_token:
            raise InputError(f"label word {word!r} is unknown to this tokenizer; choose another word (--mapping)")
        if token in ids:
            raise InputError(
                f"label words {words[ids.index(token)]!r} and {word!r} are the same token for this tokenizer "
                f"({pieces[0]}); choose words that differ (--mapping)"
            )
        ids.append(token)
    return ids


def word_tokens(
    tokenizer: PreTrainedTokenizerBase, words: Sequence[str], before: str | None, scoring: str = FIRST_TOKEN
) -> list[list[int]]:
    """Return all tokens of each label word.

    Args:
        before: the template's text before the answer, for a model that generates the word after it; `None` = a masked
            language model, whose words have one token each.
        scoring: with "first_token" the first tokens must differ.

    Raises:
        InputError: as for `word_ids`; two words begin with the same token although only the first token is scored; a
            word has no tokens.
    """
    if before is None:
        return [[token] for token in word_ids(tokenizer, words)]
    found: list[list[int]] = []
    for word in words:
        tokens = answer_tokens(tokenizer, word, before)
        unknown = tokenizer.unk_token_id in tokens and word != tokenizer.unk_token
        if not tokens or unknown:  # SentencePiece puts a space in front of an unknown character
            raise InputError(f"label word {word!r} is unknown to this tokenizer; choose another word (--mapping)")
        for other, its in zip(words, found, strict=False):
            if its == tokens:
                raise InputError(
                    f"label words {other!r} and {word!r} are the same tokens for this tokenizer; choose words that "
                    "differ (--mapping)"
                )
            if scoring == FIRST_TOKEN and its[0] == tokens[0]:
                shared = tokenizer.convert_ids_to_tokens(tokens[0])
                raise InputError(
                    f"label words {other!r} and {word!r} begin with the same token for this tokenizer ({shared!r}), "
                    "which alone gives the class; pass --word_scoring sequence, or choose other words "
                    "(--mapping)"
                )
        if scoring == SEQUENCE:
            _warn_of_beginning(words, found, word, tokens)
        found.append(tokens)
    longer = [word for word, tokens in zip(words, found, strict=True) if len(tokens) > 1]
    if longer and scoring == FIRST_TOKEN:
        logger.info("Only the first token is scored of: %s (--word_scoring sequence scores all tokens).", longer)
    return found


def answer_tokens(tokenizer: PreTrainedTokenizerBase, word: str, before: str) -> list[int]:
    """Return the tokens of an answer after the text `before`, with a space between them unless it begins a line."""
    space = "" if not before or before[-1].isspace() or word[:1] in _NO_SPACE else " "
    leads = ("\n", "a") if before.endswith("\n") else ("a", "\n")
    return continuation_tokens(tokenizer, [space + word], leads)[0]


def continuation_tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], leads: Sequence[str] = ("a", "\n")
) -> list[list[int]]:
    """Return the tokens of texts that continue another text, without special tokens.

    SentencePiece tokenizers (Llama, T5) put a space before every separate text. Therefore each text is tokenised after
    a letter, or after a line break if the letter merges with the text, and the tokens of this lead are removed.
    """
    alone = [list(ids) for ids in plain_ids(tokenizer, texts)]
    found: list[list[int] | None] = [None] * len(texts)
    for lead in leads:
        own = plain_ids(tokenizer, [lead])[0]
        open_rows = [i for i, ids in enumerate(found) if ids is None]
        if not open_rows:
            break
        longer = plain_ids(tokenizer, [lead + texts[i] for i in open_rows])
        for i, ids in zip(open_rows, longer, strict=True):
            if list(ids[: len(own)]) == list(own):
                found[i] = list(ids[len(own) :])
    return [ids if own is None else own for ids, own in zip(alone, found, strict=True)]


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each text by itself, without special tokens and untruncated."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        truncation=False,
        padding=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _pairs(mapping: dict[Any, str] | str) -> list[tuple[Any, Any]]:
    """Return keys and values in order, including repeated keys."""
    if isinstance(mapping, dict):
        return list(mapping.items())
    try:
        pairs = json.loads(mapping, object_pairs_hook=lambda found: found)
    except ValueError:
        pairs = _python_pairs(mapping)
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise InputError(f"mapping {mapping!r} is not a dictionary; pass one such as {_EXAMPLE}")
    return pairs


def _python_pairs(mapping: str) -> list[tuple[Any, Any]] | None:
    try:
        tree = ast.parse(mapping.strip(), mode="eval").body
        if not isinstance(tree, ast.Dict):
            return None
        pairs = []
        for key, value in zip(tree.keys, tree.values, strict=True):
            if key is None:
                raise ValueError("an unpacked dictionary (**)")
            pairs.append((ast.literal_eval(key), ast.literal_eval(value)))
        return pairs
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        raise InputError(f"mapping {mapping!r} cannot be read; pass a dictionary such as {_EXAMPLE}") from None


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(map(str, labels))


def _warn_of_beginning(words: Sequence[str], found: list[list[int]], word: str, tokens: list[int]) -> None:
    """Warn if one word's tokens are a prefix of another's: `p(a b) = p(a) p(b | a)` is never above `p(a)`."""
    for other, its in zip(words, found, strict=False):
        (short, a), (long, b) = sorted([(other, its), (word, tokens)], key=lambda pair: len(pair[1]))
        if b[: len(a)] == a:
            logger.warning(
                "The tokens of label word %r are a prefix of those of %r, whose sequence probability is therefore "
                "never higher: without --calibrate it is never predicted. Pass --word_scoring sequence_mean, or other "
                "words.",
                short, long,
            )  # fmt: skip
