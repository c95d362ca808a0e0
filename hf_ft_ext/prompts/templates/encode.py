"""Tokenise rows by a template: tokenise each part of all rows in one call, then join the parts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from hf_ft_ext.data.preprocess import own_special_ids
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.readout import Reading
from hf_ft_ext.prompts.templates.template import CLS, MASK, SEP, Literal, Part, Sentence, Special, parse_template
from hf_ft_ext.prompts.templates.words import continuation_tokens, plain_ids

Ids = list[int]
_NO_LIMIT = 10**6  # tokens of a row

logger = logging.getLogger(__name__)


@dataclass
class CutRows:
    """Counts of truncated rows.

    Attributes:
        rows: all rows so far.
        long: rows truncated to the row's maximum length.
        limited: rows with a text truncated to a limit of texts.
        longest: number of tokens of the longest row before truncation.
        logged: truncated rows at the last log message.
    """

    rows: int = 0
    long: int = 0
    limited: int = 0
    longest: int = 0
    logged: int = 0

    def add_row(self, length: int, room: int) -> None:
        """Count a row of `length` tokens, of which `room` fit."""
        self.longest = max(self.longest, length)
        self.long += length > room


class PromptEncoder:
    """Converts texts to `input_ids`: the template's own tokens around the rows' texts.

    Texts are truncated to their limits first. Rows that are still too long lose tokens of their texts only: from the
    end of the last text backwards, or with `truncate_head` from the beginning of the first. The template's own tokens,
    including the mask, are always kept.

    Args:
        tokenizer: tokenizer of the model.
        template: see `parse_template`.
        texts: number of texts of a row.
        max_length: maximum number of tokens of a row.
        first_sent_limit: maximum number of tokens of text 0, or `None`.
        other_sent_limit: maximum number of tokens of any other text, or `None`.
        truncate_head: truncate beginnings, not ends.
        reading: the position of the class, see `Reading`. A row of a causal model ends where the answer begins; there
            `*cls*` stands for the tokens that the tokenizer puts before a text, and `*sep*` for a line break.

    Raises:
        InputError: the template is invalid, the tokenizer lacks one of its special tokens, or the template's own
            tokens leave no room for a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        texts: int,
        max_length: int,
        first_sent_limit: int | None = None,
        other_sent_limit: int | None = None,
        truncate_head: bool = False,
        reading: str | Reading = Reading.MASK,
    ):
        for name, limit in (("first_sent_limit", first_sent_limit), ("other_sent_limit", other_sent_limit)):
            if limit is not None and limit < 1:
                raise InputError(f"{name}={limit} leaves nothing of the text; pass 1 or more")
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.first_limit, self.other_limit, self.truncate_head = first_sent_limit, other_sent_limit, truncate_head
        self.cut = CutRows()
        self.reading = Reading(reading)
        parts = parse_template(template, texts, self.reading.value)
        self.mask_id = answer_id(tokenizer, parts, self.reading)  # token at the position of the answer
        self.start, end = own_special_ids(tokenizer)
        # fixed[i] precedes sentences[i]; the last fixed part ends the row
        self.sentences: list[Sentence] = []
        self.fixed: list[Ids] = [[]]
        self.segments: list[list[int]] = [[]]  # of the fixed tokens
        self.sentence_segments: list[int] = []
        # tokens after the label word of demonstrations; rows without a mask token end before them
        self.tail: Ids = []
        self.end_tokens = 0
        segment = 0
        answered = False
        if self.reading is not Reading.MASK:
            parts = _spaces_to_the_right(parts)
        for part in parts:
            if isinstance(part, Sentence):
                self.sentences.append(part)
                self.sentence_segments.append(segment)
                self.fixed.append([])
                self.segments.append([])
                continue
            if part == Special(MASK) and self.mask_id is None:
                answered = True
                continue
            ids = self._fixed_ids(part)
            if answered:
                self.tail += ids
                continue
            self.fixed[-1] += ids
            self.segments[-1] += [segment] * len(ids)
            if isinstance(part, Special) and part.next_segment:
                segment = 1  # models have two token types
        if self.reading is Reading.DECODER:  # an encoder expects the tokenizer's end token after a text
            self.end_tokens = len(end)
            self.fixed[-1] += end
            self.segments[-1] += [segment] * len(end)
        self.last_segment = segment
        self.overhead = sum(map(len, self.fixed))
        if self.overhead + len(self.sentences) > max_length:
            raise InputError(
                f"the template {template!r} takes {self.overhead} tokens of its own, so with max_seq_length="
                f"{max_length} no sentence limit can keep the mask and a text; pass --max_seq_length "
                f"{self.overhead + 8 * len(self.sentences)} or more, or a shorter template"
            )

    def _fixed_ids(self, part: Literal | Special) -> Ids:
        if self.reading is Reading.MASK:
            if isinstance(part, Literal):
                return literal_ids(self.tokenizer, part)
            return [special_id(self.tokenizer, part.name)]
        if isinstance(part, Special):
            if part.name == CLS:
                return list(self.start)
            if part.name == SEP:
                return continuation_tokens(self.tokenizer, ["\n"])[0]
            assert self.mask_id is not None  # without such a token, the row ends before the mask (`__init__`)
            return [self.mask_id]
        if len(self.fixed) == 1 and len(self.fixed[0]) <= len(self.start):  # it begins the row
            return self.tokenizer(part.text, add_special_tokens=False)["input_ids"]
        return continuation_tokens(self.tokenizer, [part.text])[0]

    def check_limits(
        self, first_sent_limit: int | None, other_sent_limit: int | None, demonstrations: bool = False
    ) -> None:
        """Refuse limits set by the user that do not fit into `max_seq_length`, or that have no effect.

        Args:
            demonstrations: they follow, and their texts count as other ones.

        Raises:
            InputError: a limit is too large, or the template has no text to which it applies.
        """
        limits = {"first_sent_limit": first_sent_limit, "other_sent_limit": other_sent_limit}
        for name, limit in limits.items():
            slots = [s for s in self.sentences if (s.index == 0) == (name == "first_sent_limit")]
            if limit is not None and not slots and not (demonstrations and name == "other_sent_limit"):
                which = "no text but the first" if name == "other_sent_limit" else "no place for the first text"
                raise InputError(
                    f"{name}={limit} has no effect: the template {self.template!r} has {which}; leave --{name} out"
                )
            room = self.max_length - self.overhead - (len(self.sentences) - len(slots))
            if limit is not None and slots and limit * len(slots) > room:
                raise InputError(
                    f"{name}={limit} cannot keep the mask: with the template's {self.overhead} tokens that is more "
                    f"than max_seq_length={self.max_length}; pass --{name} {room // len(slots)} or less"
                )

    def text_ids(self, columns: Sequence[list[str]]) -> list[list[Ids]]:
        """Return the tokens of each of the template's texts, within its limit: `[texts of the template][rows]`."""
        result = []
        limited: set[int] = set()  # rows
        for sentence in self.sentences:
            column = columns[sentence.index]
            if self.reading is not Reading.MASK:  # as in MeZO; LM-BFF keeps the space at the end of GLUE's sst2 rows
                column = [text.strip() for text in column]
            ids = self._ids_of_texts(sentence.texts(column), first=len(result) == 0)
            limit = self.first_limit if sentence.index == 0 else self.other_limit
            if limit is not None:
                limited.update(i for i, row in enumerate(ids) if len(row) > limit)
                ids = [row[-limit:] for row in ids] if self.truncate_head else [row[:limit] for row in ids]
            mask = self.mask_id
            result.append([self._without_mask(row) if mask is not None and mask in row else row for row in ids])
        self.cut.limited += len(limited)
        return result

    def _ids_of_texts(self, texts: list[str], first: bool) -> list[Ids]:
        begins = first and len(self.fixed[0]) <= len(self.start)
        if self.reading is not Reading.MASK and not begins:
            return continuation_tokens(self.tokenizer, texts)
        return plain_ids(self.tokenizer, texts)

    def _without_mask(self, ids: Ids) -> Ids:
        """Replace mask tokens in a text, because a row must have exactly one mask."""
        other = self.tokenizer.unk_token_id
        instead = [] if other is None else [other]
        return [token for i in ids for token in (instead if i == self.mask_id else [i])]

    def join(self, texts: Sequence[Ids], room: int) -> tuple[Ids, list[int]]:
        """Return the tokens of one row, at most `room`, and their segments.

        Args:
            texts: tokens of each of the template's texts.
            room: at least `overhead` plus one token per text.
        """
        excess = self.length(texts) - room
        if excess > 0:
            texts = shorten(texts, excess, self.truncate_head)
        ids, segments = list(self.fixed[0]), list(self.segments[0])
        for i, text in enumerate(texts):
            ids += text
            ids += self.fixed[i + 1]
            segments += [self.sentence_segments[i]] * len(text)
            segments += self.segments[i + 1]
        return ids, segments

    def __call__(self, columns: Sequence[list[str]], behind: Sequence[int] | None = None) -> dict[str, list[Ids]]:
        """Return `input_ids`, `attention_mask` and, if the tokenizer uses them, `token_type_ids` of all rows.

        Args:
            columns: one list for each text of a row, all of equal length.
            behind: number of tokens that will follow each row and count towards `max_length`; `None` = none.
        """
        joined = []
        for i, texts in enumerate(zip(*self.text_ids(columns), strict=True)):
            room = self.max_length - (0 if behind is None else behind[i])
            self.cut.add_row(self.length(texts), room)
            joined.append(self.join(texts, room))
        self.cut.rows += len(joined)
        return self.columns([ids for ids, _ in joined], [segments for _, segments in joined])

    def length(self, texts: Sequence[Ids]) -> int:
        """Return the number of tokens of a row before truncation."""
        return self.overhead + sum(map(len, texts))

    def report_cut_rows(self, name: str, so_far: bool = False) -> None:
        """Log how many rows of the split `name` were truncated, if any, and reset the counts.

        Args:
            so_far: the split is a stream with more rows: log only if the count has doubled, and keep the counts.
        """
        cut, lost = self.cut, "beginning" if self.truncate_head else "end"
        if so_far and cut.long + cut.limited < max(1, 2 * cut.logged):
            return
        rows = f"{cut.rows} rows{' so far' if so_far else ''} of the {name} data"
        if cut.long:
            logger.warning(
                "%d of %s are longer than %d tokens with the template (the longest has %d): their texts lose their "
                "%s. Pass a higher --max_seq_length to keep them whole.",
                cut.long, rows, self.max_length, cut.longest, lost,
            )  # fmt: skip
        if cut.limited:
            limits = {"first_sent_limit": self.first_limit, "other_sent_limit": self.other_limit}
            given = " or ".join(f"{option}={limit}" for option, limit in limits.items() if limit is not None)
            logger.warning("%d of %s have a text beyond %s, which loses its %s.", cut.limited, rows, given, lost)
        cut.logged = cut.long + cut.limited
        if not so_far:
            self.cut = CutRows()

    def columns(self, ids: list[Ids], segments: list[Ids] | None) -> dict[str, list[Ids]]:
        """Return the columns of rows from their tokens and segments (`None` = all 0)."""
        lengths = [len(row) for row in ids]
        # Rows of one length share a list: the data set copies them anyway.
        ones = {n: [1] * n for n in set(lengths)}
        result = {"input_ids": ids, "attention_mask": [ones[n] for n in lengths]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            zeros = {n: [0] * n for n in set(lengths)}
            result["token_type_ids"] = [zeros[n] for n in lengths] if segments is None else segments
        return result


def row_end(tokenizer: PreTrainedTokenizerBase, template: str, reading: Reading) -> list[int] | None:
    """Return the template's own tokens at the end of every row; `None` for a mask, or if a row ends with its text.

    The first of them may be one with the text's last one if a tokenizer reads both together, and is left out.
    """
    if reading is Reading.MASK:
        return None
    texts = 1 + max(
        (p.index for p in parse_template(template, reading=reading.value) if isinstance(p, Sentence)), default=0
    )
    encoder = PromptEncoder(tokenizer, template, texts, _NO_LIMIT, reading=reading)
    own = encoder.fixed[-1]
    return own[1:] if len(own) - encoder.end_tokens > 1 else None


def answer_context(parts: Sequence[Part]) -> str:
    """Return the text before the answer, as far as it decides about a space there; "" = the answer begins the row."""
    before = list(parts[: parts.index(Special(MASK))])
    last = before[-1] if before else None
    if isinstance(last, Literal):
        return last.text[:-1] or "a" if last.text.endswith(" ") else last.text
    return "a" if isinstance(last, Sentence) else ""


_SENTINEL = "<extra_id_0>"  # T5's token for a gap in the text


def answer_id(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part], reading: Reading) -> int | None:
    """Return the token at the position of the answer; `None` = the row ends there.

    Raises:
        InputError: the model needs such a token and its tokenizer has none.
    """
    if reading is Reading.MASK:
        return special_id(tokenizer, MASK)
    behind = [part for part in parts[parts.index(Special(MASK)) + 1 :] if not isinstance(part, Special)]
    words = any(isinstance(p, Sentence) or any(c.isalnum() for c in p.text) for p in behind)
    if reading is Reading.LAST or not words:
        return None
    sentinel = tokenizer.convert_tokens_to_ids(_SENTINEL)
    if sentinel is None or sentinel == tokenizer.unk_token_id:
        raise InputError(
            f"the template continues after *mask*, but the tokenizer {tokenizer.name_or_path!r} has no token for a "
            f"gap ({_SENTINEL}); put *mask* last"
        )
    return sentinel


def shorten(texts: Sequence[Ids], excess: int, head: bool) -> list[Ids]:
    """Remove `excess` tokens: from the end of the last text backwards, or with `head` from the start of the first.

    Each text keeps at least one token.
    """
    texts = [list(text) for text in texts]
    order = list(range(len(texts))) if head else list(range(len(texts)))[::-1]
    for i in order:
        taken = min(excess, max(0, len(texts[i]) - 1))
        texts[i] = texts[i][taken:] if head else texts[i][: len(texts[i]) - taken]
        excess -= taken
    return texts


def literal_ids(tokenizer: PreTrainedTokenizerBase, part: Literal) -> Ids:
    """Return the tokens of a template's own text.

    A single character is converted directly to its token, so that a full stop after the mask is not tokenised as one
    after a space.
    """
    if len(part.text) == 1:
        token = tokenizer.convert_tokens_to_ids(part.text)
        if token is not None and token != tokenizer.unk_token_id:
            return [token]
    return tokenizer(part.text, add_special_tokens=False)["input_ids"]


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """Return the id of the tokenizer's `cls`, `sep` or `mask` token.

    Raises:
        InputError: the tokenizer has no such token.
    """
    token = {
        CLS: (tokenizer.cls_token_id, tokenizer.bos_token_id),
        SEP: (tokenizer.sep_token_id, tokenizer.eos_token_id),
        MASK: (tokenizer.mask_token_id,),
    }[name]
    found = next((i for i in token if i is not None), None)
    if found is None:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has no {name} token, which the template needs; pass a masked "
            "language model with its tokenizer"
        )
    return found


def _spaces_to_the_right(parts: Sequence[Part]) -> list[Part]:
    """Move a space at the end of the template's text to the next part: decoder tokenizers attach spaces to words."""
    moved: list[Part] = []
    for i, part in enumerate(parts):
        follows = parts[i + 1] if i + 1 < len(parts) else None
        if isinstance(part, Literal) and part.text.endswith(" ") and follows is not None:
            part = Literal(part.text[:-1])  # before the answer the label word has its own space
        before = parts[i - 1] if i else None
        if isinstance(part, Sentence) and isinstance(before, Literal) and before.text.endswith(" "):
            part = replace(part, space=True)
        if part != Literal(""):
            moved.append(part)
    return moved
