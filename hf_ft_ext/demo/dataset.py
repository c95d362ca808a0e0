"""A synthetic sentiment data set: sentences in which no single word decides the label.

A small grammar generates opinions about films, meals and the like. Single clauses are plain ("was rather dull"),
negated ("was hardly dull") or doubly negated ("nobody could say it was not dull"). Compound sentences have two clauses
of opposite polarity, and one of them decides: the clause after `but` or `yet`, the main clause beside `although`, or
the speaker's own opinion against a reported one. Every opinion word therefore occurs about equally often in both
classes, and a model has to use the combination of words.

Measured with the default seed (accuracy on the 500 validation sentences, training on 2,000): logistic
regression on unigrams 60.6 %, on uni- to trigrams 77.4 % (`tests/data/test_data_demo.py`); all-MiniLM-L6-v2 with
all weights fine-tuned 94.6 %, 98.6 % and 99.2 % after the first, second and third of three epochs:

    run_glue.py --method full --learning_rate 3e-4 --warmup_steps 0.06 --per_device_train_batch_size 16 \\
        --eval_strategy epoch --save_strategy no
"""

from random import Random

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

LABEL_NAMES = ("negative", "positive")

# Index 0 holds the negative words, index 1 the positive ones.
ADJECTIVES = (
    ("dull", "awful", "bland", "clumsy", "dreary", "tedious", "weak", "sloppy", "boring", "poor", "lifeless", "grim"),
    ("good", "great", "lovely", "clever", "charming", "gripping", "superb", "fresh", "funny", "fine", "vivid", "warm"),
)
NOUNS = (
    ("flaws", "mistakes", "clichés", "weaknesses", "problems", "faults"),
    ("charm", "wit", "merit", "beauty", "skill", "grace"),
)
SUBJECTS = (
    "the film", "the meal", "the concert", "the novel", "the hotel", "the play", "the album", "the lecture",
    "the exhibition", "the garden tour", "the new series", "the museum", "the game", "the recital",
)  # fmt: skip
DETAILS = ("", "", "", " as a whole", " in the end", " from start to finish", " on the day", " this time")
NEGATED_INTENSIFIERS = ("", "", "very ")
INTENSIFIERS = ("", "", "very ", "rather ", "really ", "quite ", "truly ")
OPENINGS = (
    "", "", "", "last monday ", "in lisbon ", "on a rainy evening ", "for my cousin ", "back in june ",
    "at the harbour ", "on our second visit ", "before dinner ", "in the old town ",
)  # fmt: skip
NEGATIONS = ("was not", "was never", "was hardly", "was far from", "was anything but", "did not seem")
DOUBLE_NEGATIONS = ("nobody could say that {} was not", "it would be wrong to say that {} was not")
SOURCES = ("everyone", "the critics", "our neighbours", "the brochure", "my brother", "a friend")

# Shares of the sentence forms; the rest are joined clauses.
_PLAIN, _NEGATED, _DOUBLE = 0.40, 0.17, 0.05


def demo_dataset(seed: int = 0, train_rows: int = 2000, validation_rows: int = 500) -> DatasetDict:
    """Return splits `train` and `validation` with the columns `sentence` and `label` (negative, positive).

    No sentence occurs twice, within or across splits. Labels come in pairs, one of each in random
    order, so that every first n rows are balanced to within one. The same seed gives the same rows
    on every platform and Python version; no global random generator is used.

    Args:
        seed: seed of the private random generator.
        train_rows: number of training rows, 1 or more.
        validation_rows: number of validation rows, 1 or more.
    """
    writer = _Writer(seed)
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=list(LABEL_NAMES))})
    seen: set[str] = set()
    splits = {}
    for split, rows in (("train", train_rows), ("validation", validation_rows)):
        sentences: list[str] = []
        labels: list[int] = []
        while len(labels) < rows:
            label = 1 - labels[-1] if len(labels) % 2 else int(writer.chance(0.5))
            text = writer.sentence(label)
            while text in seen:
                text = writer.sentence(label)
            seen.add(text)
            sentences.append(text)
            labels.append(label)
        splits[split] = Dataset.from_dict({"sentence": sentences, "label": labels}, features=features)
    return DatasetDict(splits)


class _Writer:
    """Draws sentences of a wanted label from a private generator."""

    def __init__(self, seed: int):
        # Use only `random()`, whose sequence is guaranteed to stay the same across Python versions.
        self._random = Random(seed).random

    def pick(self, items):
        return items[int(self._random() * len(items))]

    def chance(self, share: float) -> bool:
        return self._random() < share

    def phrase(self, label: int, intensifiers=INTENSIFIERS) -> str:
        """Return an opinion word of the given polarity, possibly with an intensifier."""
        return self.pick(intensifiers) + self.pick(ADJECTIVES[label])

    def plain(self, subject: str, label: int) -> str:
        if self.chance(0.2):
            return f"{subject} was full of {self.pick(NOUNS[label])}"
        return f"{subject} {self.pick(('was', 'seemed', 'turned out'))} {self.phrase(label)}"

    def negated(self, subject: str, label: int) -> str:
        if self.chance(0.3):
            return f"{subject} was without {self.pick(NOUNS[1 - label])}"
        return f"{subject} {self.pick(NEGATIONS)} {self.phrase(1 - label, NEGATED_INTENSIFIERS)}"

    def double(self, subject: str, label: int) -> str:
        if self.chance(0.5):
            return f"{subject} was not without {self.pick(NOUNS[label])}"
        return f"{self.pick(DOUBLE_NEGATIONS).format(subject)} {self.phrase(label)}"

    def clause(self, subject: str, label: int) -> str:
        return self.negated(subject, label) if self.chance(0.25) else self.plain(subject, label)

    def joined(self, subject: str, label: int) -> str:
        """Return two clauses of opposite polarity; `label` is that of the deciding clause."""
        form = int(self._random() * 4)
        if form == 0:
            return f"{self.clause(subject, 1 - label)} , but {self.clause(self.pick(('it', 'the rest')), label)}"
        if form == 1:
            return f"although {self.clause(subject, 1 - label)} , {self.clause('it', label)}"
        if form == 2:
            return f"{self.clause(subject, label)} , although {self.clause('the start', 1 - label)}"
        told = f"{self.pick(SOURCES)} told us that {subject} would be {self.phrase(1 - label)}"
        if self.chance(0.5):
            return f"{told} , which was wrong"
        return f"{told} , yet {self.clause('it', label)}"

    def sentence(self, label: int) -> str:
        subject = self.pick(SUBJECTS)
        draw = self._random()
        if draw < _PLAIN:
            text = self.plain(subject, label)
        elif draw < _PLAIN + _NEGATED:
            text = self.negated(subject, label)
        elif draw < _PLAIN + _NEGATED + _DOUBLE:
            text = self.double(subject, label)
        else:
            text = self.joined(subject, label)
        return f"{self.pick(OPENINGS)}{text}{self.pick(DETAILS)} ."
