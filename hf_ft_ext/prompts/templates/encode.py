"""Tokenising rows by a template: each part of all rows in one call, joined by template."""

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.readout import Reading
from hf_ft_ext.prompts.templates.template import CLS, MASK, SEP, Literal, Part, Sentence, Special, parse_template
from hf_ft_ext.prompts.templates.words import tokens_behind

Ids = list[int]


class PromptEncoder:
    """Texts in, `input_ids` out: the template's own tokens around the rows' texts.

    Texts are cut to their limits first. What is still too long loses tokens of its texts alone: from the end of the
    last text on, or with `truncate_head` from the beginning of the first. The template's own tokens, the mask among
    them, always stay.

    Args:
        tokenizer: of the model.
        template: see `parse_template`.
        texts: texts of a row, 1 or 2.
        max_length: tokens of a row.
        first_sent_limit: most tokens of text 0, or none.
        other_sent_limit: most tokens of any other text, or none.
        truncate_head: cut beginnings, not ends.
        reading: how the model is read, see `Reading`. A row of a causal model ends where the answer goes; `*cls*` is
            then what the tokenizer itself puts in front of a text, and `*sep*` a line break.

    Raises:
        InputError: the template cannot be read, the tokenizer lacks one of its special tokens, or the template's own
            tokens leave no room for a text, so that no sentence limit could keep the mask.
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
        self.reading = Reading(reading)
        parts = parse_template(template, texts, self.reading.value)
        self.mask_id = answer_id(tokenizer, parts, self.reading)  # stands at the answer's place in the row
        self.start, end = own_special_ids(tokenizer)
        # fixed[i] comes before sentences[i]; the last fixed part ends the row
        self.sentences: list[Sentence] = []
        self.fixed: list[Ids] = [[]]
        self.segments: list[list[int]] = [[]]  # of the fixed tokens
        self.sentence_segments: list[int] = []
        # what demonstrations have behind their label word, and rows of a model that answers at the end have not
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
        if self.reading is Reading.DECODER:  # the encoder reads whole texts, which end in its own token
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
            return tokens_behind(self.tokenizer, ["\n"])[0] if part.name == SEP else [self.mask_id]
        if len(self.fixed) == 1 and len(self.fixed[0]) <= len(self.start):  # it begins the row
            return self.tokenizer(part.text, add_special_tokens=False)["input_ids"]
        return tokens_behind(self.tokenizer, [part.text])[0]

    def check_limits(self, first_sent_limit: int | None, other_sent_limit: int | None) -> None:
        """Refuse limits, set by the user, that `max_seq_length` would cut again.

        Raises:
            InputError: there is one.
        """
        limits = {"first_sent_limit": first_sent_limit, "other_sent_limit": other_sent_limit}
        for name, limit in limits.items():
            slots = [s for s in self.sentences if (s.index == 0) == (name == "first_sent_limit")]
            room = self.max_length - self.overhead - (len(self.sentences) - len(slots))
            if limit is not None and slots and limit * len(slots) > room:
                raise InputError(
                    f"{name}={limit} cannot keep the mask: with the template's {self.overhead} tokens that is more "
                    f"than max_seq_length={self.max_length}; pass --{name} {room // len(slots)} or less"
                )

    def text_ids(self, columns: Sequence[list[str]]) -> list[list[Ids]]:
        """Tokens of each of the template's texts, within its limit: `[texts of the template][rows]`."""
        result = []
        for sentence in self.sentences:
            ids = self._ids_of_texts(sentence.texts(columns[sentence.index]), first=len(result) == 0)
            limit = self.first_limit if sentence.index == 0 else self.other_limit
            if limit is not None:
                ids = [row[-limit:] for row in ids] if self.truncate_head else [row[:limit] for row in ids]
            mask = self.mask_id
            result.append([self._without_mask(row) if mask is not None and mask in row else row for row in ids])
        return result

    def _ids_of_texts(self, texts: list[str], first: bool) -> list[Ids]:
        begins = first and len(self.fixed[0]) <= len(self.start)
        if self.reading is not Reading.MASK and not begins:
            return tokens_behind(self.tokenizer, texts)
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            truncation=False,
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]

    def _without_mask(self, ids: Ids) -> Ids:
        """A mask token that the text itself contains would make two."""
        other = self.tokenizer.unk_token_id
        instead = [] if other is None else [other]
        return [token for i in ids for token in (instead if i == self.mask_id else [i])]

    def join(self, texts: Sequence[Ids], room: int) -> tuple[Ids, list[int]]:
        """One row: its tokens, at most `room`, and their segments.

        Args:
            texts: tokens of each of the template's texts.
            room: at least `overhead` and one token per text.
        """
        excess = self.overhead + sum(map(len, texts)) - room
        if excess > 0:
            texts = shorten(texts, excess, self.truncate_head)
        ids, segments = list(self.fixed[0]), list(self.segments[0])
        for i, text in enumerate(texts):
            ids += text
            ids += self.fixed[i + 1]
            segments += [self.sentence_segments[i]] * len(text)
            segments += self.segments[i + 1]
        return ids, segments

    def __call__(self, columns: Sequence[list[str]]) -> dict[str, list[Ids]]:
        """`input_ids`, `attention_mask` and, if the tokenizer gives them, `token_type_ids` of all rows.

        Args:
            columns: one list of texts per text of the rows, all of one length.
        """
        texts = self.text_ids(columns)
        if len(texts) == 1 and not self.last_segment:  # the common case, without a call per row
            before, after = self.fixed
            room = self.max_length - self.overhead
            cut = slice(-room, None) if self.truncate_head else slice(room)
            ids = [before + (row if len(row) <= room else row[cut]) + after for row in texts[0]]
            return self.columns(ids, None)
        joined = [self.join(row, self.max_length) for row in zip(*texts, strict=True)]
        return self.columns([ids for ids, _ in joined], [segments for _, segments in joined])

    def columns(self, ids: list[Ids], segments: list[Ids] | None) -> dict[str, list[Ids]]:
        """The columns of rows from their tokens and segments (`None` = all 0)."""
        lengths = [len(row) for row in ids]
        # Rows of one length share a list: the data set copies them anyway.
        ones = {n: [1] * n for n in set(lengths)}
        result = {"input_ids": ids, "attention_mask": [ones[n] for n in lengths]}
        if "token_type_ids" in self.tokenizer.model_input_names:
            zeros = {n: [0] * n for n in set(lengths)}
            result["token_type_ids"] = [zeros[n] for n in lengths] if segments is None else segments
        return result


def answer_context(parts: Sequence[Part]) -> str:
    """The template's text in front of the answer, as far as it decides about a space there: "" = it begins a line."""
    before = list(parts[: parts.index(Special(MASK))])
    last = before[-1] if before else None
    if isinstance(last, Literal):
        return last.text[:-1] or "a" if last.text.endswith(" ") else last.text
    return "a" if isinstance(last, Sentence) else ""


def _spaces_to_the_right(parts: Sequence[Part]) -> list[Part]:
    """Move a space at the end of the template's text to what follows, as tokenizers of decoders have it."""
    moved: list[Part] = []
    for i, part in enumerate(parts):
        follows = parts[i + 1] if i + 1 < len(parts) else None
        if isinstance(part, Literal) and part.text.endswith(" ") and follows is not None:
            part = Literal(part.text[:-1])  # in front of the answer, its word brings the space along
        before = parts[i - 1] if i else None
        if isinstance(part, Sentence) and isinstance(before, Literal) and before.text.endswith(" "):
            part = replace(part, space=True)
        if part != Literal(""):
            moved.append(part)
    return moved


def own_special_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[Ids, Ids]:
    """What the tokenizer itself puts before and behind a text: OPT a start token, GPT-2 nothing, T5 an end token."""
    whole, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if bare and whole[start : start + len(bare)] == bare:
            return list(whole[:start]), list(whole[start + len(bare) :])
    return [], []


_SENTINEL = "<extra_id_0>"  # T5's mark for a gap in its text


def answer_id(tokenizer: PreTrainedTokenizerBase, parts: Sequence[Part], reading: Reading) -> int | None:
    """The token that stands at the answer's place in a row; `None` = the row ends there.

    Raises:
        InputError: the model needs one there and its tokenizer has none.
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
            f"the template goes on behind *mask*, and the tokenizer {tokenizer.name_or_path!r} has no {_SENTINEL} to "
            "stand for a gap; put *mask* last"
        )
    return sentinel


def shorten(texts: Sequence[Ids], excess: int, head: bool) -> list[Ids]:
    """Take `excess` tokens away: from the end of the last text on, or with `head` from the beginning of the first.

    Each text keeps a token as long as there are others to take.
    """
    texts = [list(text) for text in texts]
    order = list(range(len(texts))) if head else list(range(len(texts)))[::-1]
    for i in order:
        taken = min(excess, max(0, len(texts[i]) - 1))
        texts[i] = texts[i][taken:] if head else texts[i][: len(texts[i]) - taken]
        excess -= taken
    return texts


def literal_ids(tokenizer: PreTrainedTokenizerBase, part: Literal) -> Ids:
    """Tokens of a template's own text.

    A single character is taken as the token of that character, so that a full stop behind the mask is not one behind
    a space.
    """
    if len(part.text) == 1:
        token = tokenizer.convert_tokens_to_ids(part.text)
        if token is not None and token != tokenizer.unk_token_id:
            return [token]
    return tokenizer(part.text, add_special_tokens=False)["input_ids"]


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """Id of the tokenizer's `cls`, `sep` or `mask` token.

    Raises:
        InputError: it has none.
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
