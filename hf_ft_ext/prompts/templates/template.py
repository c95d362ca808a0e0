"""Parse templates such as `*cls**sent_0*_It_was*mask*.*sep+*` into their parts."""

import difflib
import re
from dataclasses import dataclass

from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.readout import Reading

CLS, SEP, MASK = "cls", "sep", "mask"
_SENTENCE = re.compile(r"(?P<space>\+?)sent(?P<first>[lu]?)(?P<last>[-?]?)_(?P<index>\d+)")
_MARKERS = (
    "cls", "mask", "sep", "sep+", "sent_0", "sent_1", "sent-_0", "sent?_0", "sentl_1", "+sent_0", "+sentl_1",
    "sentu_1",
)  # fmt: skip


@dataclass(frozen=True)
class Literal:
    """Text of the template itself."""

    text: str


@dataclass(frozen=True)
class Special:
    """A special token: `cls`, `sep` or `mask`; with `next_segment`, the tokens after it have the next token type."""

    name: str
    next_segment: bool = False


@dataclass(frozen=True)
class Sentence:
    """Text `index` of the row: with a leading space, its first letter changed, its last character changed."""

    index: int
    space: bool = False
    first: str = ""  # "l": lower, "u": upper
    cut: bool = False  # without its last character
    question: bool = False  # with a question mark at its end, unless it has one

    def texts(self, column: list[str]) -> list[str]:
        """Return the column's texts in the form that the template requires."""
        if self.cut:  # remove the final full stop or question mark, not a space after it
            column = [text.rstrip()[:-1] for text in column]
        if self.question:
            column = [text if text.rstrip().endswith("?") else f"{text}?" for text in column]
        if self.first:
            change = str.lower if self.first == "l" else str.upper
            column = [change(text[:1]) + text[1:] for text in column]
        return [f" {text}" for text in column] if self.space else column


Part = Literal | Special | Sentence


def parse_template(template: str, texts: int | None = None, reading: str = Reading.MASK.value) -> list[Part]:
    """Split a template into its parts.

    Markers are enclosed in asterisks: `cls`, `mask`, `sep`, `sep+` (a separator that also starts the next segment),
    `sent_i` (text i of the row), `sent-_i` (without its last character), `sent?_i` (with a question mark at its end,
    unless it has one), `sentl_i` (first letter in lower case), `sentu_i` (in upper case). A `+` before a text's marker
    adds a space before the text. All else is plain text, in which `_` is a space and `\\n` a line break.

    Args:
        texts: number of texts of a row; `None` = do not check.
        reading: the position of the class (see `Reading`). A causal model answers at the end of the row. Only special
            tokens and punctuation may follow the mask; rows omit them, demonstrations keep them.

    Raises:
        InputError: an unpaired asterisk, an unknown marker, no mask or several, no text, or a text that the rows do
            not have.

    Source: the templates of LM-BFF (Gao et al., ACL 2021, arXiv 2012.15723).
    """
    pieces = template.split("*")
    if len(pieces) % 2 == 0:
        raise InputError(f"template {template!r} has an unpaired asterisk; enclose markers in two: *mask*, *sent_0*")
    parts: list[Part] = []
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            if piece:
                parts.append(Literal(piece.replace("_", " ").replace("\\n", "\n")))
        else:
            parts.append(_marker(piece, template))
    masks = sum(part == Special(MASK) for part in parts)
    if masks != 1:
        count = "no mask" if masks == 0 else f"{masks} masks"
        raise InputError(f"template {template!r} has {count}; put *mask* in it once, where the label word goes")
    indices = {part.index for part in parts if isinstance(part, Sentence)}
    if not indices:
        raise InputError(f"template {template!r} has no text of the row; put *sent_0* in it")
    if texts is not None and max(indices) >= texts:
        has = "one text" if texts == 1 else f"{texts} texts"
        raise InputError(
            f"template {template!r} names text {max(indices)}, but the rows of this data have {has}, counted from 0; "
            "take it out, or pass --text_columns"
        )
    if reading == Reading.LAST.value and (behind := _part_after_answer(parts)) is not None:
        raise InputError(
            f"template {template!r} has {behind} after *mask*; a causal language model reads from left to right and "
            "answers at the end: put *mask* last (*cls**sent_0*_It_was*mask*), or pass a masked language model"
        )
    return parts


def _part_after_answer(parts: list[Part]) -> str | None:
    """Return the first text or word after the mask; `None` if there are only special tokens and punctuation."""
    for part in parts[parts.index(Special(MASK)) + 1 :]:
        if isinstance(part, Sentence):
            return f"text {part.index}"
        if isinstance(part, Literal) and any(character.isalnum() for character in part.text):
            return repr(part.text.strip())
    return None


def _marker(name: str, template: str) -> Part:
    if name in (CLS, SEP, MASK):
        return Special(name)
    if name == "sep+":
        return Special(SEP, next_segment=True)
    if match := _SENTENCE.fullmatch(name):
        last = match["last"]
        return Sentence(int(match["index"]), bool(match["space"]), match["first"], last == "-", last == "?")
    near = difflib.get_close_matches(name, _MARKERS, n=1, cutoff=0.5)
    hint = f"; did you mean *{near[0]}*?" if near else "."
    raise InputError(
        f"template {template!r} has the unknown marker *{name}*{hint} The markers are: *cls*, *mask*, *sep*, *sep+*, "
        "*sent_i*, *sent-_i*, *sent?_i*, *sentl_i*, *sentu_i*, and these with a + in front"
    )
