"""Demonstrations: labelled training rows in a row's context, in the same template with the label word at the mask."""

import hashlib
from collections.abc import Sequence as Rows
from typing import Any

import numpy as np
from datasets import Dataset, Sequence

from hf_ft_ext.arguments import DataArguments
from hf_ft_ext.data.preprocess import column_type
from hf_ft_ext.data.task_data import LABEL, TaskData
from hf_ft_ext.errors import InputError
from hf_ft_ext.prompts.configuration import PromptConfig
from hf_ft_ext.prompts.readout import Reading
from hf_ft_ext.prompts.similarity import similarities
from hf_ft_ext.prompts.templates.encode import Ids, PromptEncoder

DEFAULT_SEED = 13
TRAIN = "train"


class DemonstrationRows:
    """Encodes rows by a template, followed (for decoders: preceded) by `num_demo` training rows of each class.

    A training row has one context. An evaluation row has `num_sample` contexts (nested lists), whose logits the model
    averages. The draw depends only on the data seed, the split, the row and the context; a training row is never its
    own demonstration. The demonstrations are ordered by class. For a regression they are drawn from both halves of the
    scale and show the word of their half.

    Args:
        encoder: encoder of the model's template.
        data: its training split provides the demonstrations.
        data_args: `num_demo`, `num_sample`, `demo_filter` and `demo_filter_model` are read.
        config: configuration of the model.
        data_seed: seed of the draw; `None` = 13.

    Raises:
        InputError: a value out of range, no training split, or a class with too few rows; in a call, a context that
            does not fit into `max_seq_length`.

    Source: LM-BFF (Gao et al., ACL 2021, arXiv 2012.15723), which draws anew in each epoch.
    """

    def __init__(
        self,
        encoder: PromptEncoder,
        data: TaskData,
        data_args: DataArguments,
        config: PromptConfig,
        data_seed: int | None = None,
    ):
        self.encoder, self.data, self.train = encoder, data, _checked(data_args, data)
        self.seed = DEFAULT_SEED if data_seed is None else data_seed
        self.num_demo, self.num_sample, self.share = data_args.num_demo, data_args.num_sample, data_args.demo_filter
        self.filter_model = data_args.demo_filter_model
        labels = np.asarray(self.train[LABEL][:])
        names = data.label_names
        if config.bounds is not None:
            low, high = config.bounds
            labels = (labels >= (low + high) / 2).astype(np.int64)
            names = config.words
        if names is None or config.word_ids is None:
            raise InputError(
                f"each row of task {data.task.name!r} has its own options, but demonstrations need common label "
                "words; pass --few_shot_type prompt"
            )
        # The model's order of the labels may differ from that of the data.
        ids = {str(name).lower(): i for name, i in config.label2id.items()}
        order = [ids.get(str(name).lower(), i) for i, name in enumerate(names)]
        self.classes = {names[i]: np.flatnonzero(labels == i) for i in np.argsort(order)}
        tokens = config.word_sequences or [[token] for token in config.word_ids]
        words = [tokens[order[label]] for label in labels]
        for name, rows in self.classes.items():
            if len(rows) < self.num_demo + 1:
                raise InputError(
                    f"class '{name}' has {len(rows)} training rows, too few for num_demo={self.num_demo} and the row "
                    "itself; lower it, or pass more shots (--num_k)"
                )
        self.blocks = self._blocks(words)

    def _blocks(self, words: list[Ids]) -> list[tuple[Ids, Ids]]:
        """Return tokens and segments of each training row as a demonstration, without the template's start token."""
        encoder = self.encoder
        other, first = encoder.other_limit, encoder.first_limit
        try:
            encoder.first_limit = other  # all texts of demonstrations count as "other" texts
            texts = encoder.text_ids([self.train[column][:] for column in self.data.text_columns])
            encoder.cut.rows = len(words)
            for row in zip(*texts, strict=True):
                encoder.cut.add_row(encoder.length(row), encoder.max_length)
        finally:
            encoder.first_limit = first
        encoder.report_cut_rows("demonstration")
        blocks = []
        for row, word in zip(zip(*texts, strict=True), words, strict=True):
            ids, segments = encoder.join(row, encoder.max_length)
            skip = self._start_tokens(ids)
            last = len(ids) - encoder.end_tokens  # an encoder-decoder's end token closes the whole row
            ids, segments = ids[skip:last], segments[skip:last]
            if encoder.mask_id is None:
                ids = [*ids, *word, *encoder.tail]
                segments = [0] * len(ids)
            else:
                position = ids.index(encoder.mask_id)
                ids[position : position + 1] = word
                segments[position : position + 1] = [segments[position]] * len(word)
            blocks.append((ids, segments))
        return blocks

    def _start_tokens(self, ids: Ids) -> int:
        """Return how many leading tokens belong to the row as a whole."""
        encoder = self.encoder
        if encoder.reading is not Reading.MASK:
            count = len(encoder.start)
            return count if ids[:count] == encoder.start else 0
        start = {encoder.tokenizer.cls_token_id, encoder.tokenizer.bos_token_id}
        return int(bool(ids) and ids[0] in start)

    def __call__(self, columns: Rows[list[str]], split: str, indices: list[int]) -> dict[str, list]:
        texts = list(zip(*self.encoder.text_ids(columns), strict=True))
        kept = None
        if self.share < 1:
            kept = similarities(
                self.filter_model,
                [" ".join(row) for row in zip(*columns, strict=True)],
                [" ".join(row) for row in zip(*(self.train[c][:] for c in self.data.text_columns), strict=True)],
            )
        samples = 1 if split == TRAIN else self.num_sample
        ids, segments = [], []
        for position, index in enumerate(indices):
            pools = self._pools(split, index, None if kept is None else kept[position])
            drawn = [self._draw(pools, split, index, sample) for sample in range(samples)]
            shown = max(sum(len(self.blocks[row][0]) for row in rows) for rows in drawn)
            self.encoder.cut.add_row(self.encoder.length(texts[position]) + shown, self.encoder.max_length)
            for rows in drawn:
                one = self._context(texts[position], rows, split, index)
                ids.append(one[0])
                segments.append(one[1])
        self.encoder.cut.rows += len(indices)
        result = self.encoder.columns(ids, segments)
        if samples > 1:
            return {
                name: [rows[i : i + samples] for i in range(0, len(rows), samples)] for name, rows in result.items()
            }
        return result

    def report(self, split: str, so_far: bool) -> None:
        self.encoder.report_cut_rows(split, so_far)

    def _pools(self, split: str, index: int, similarity: np.ndarray | None) -> list[np.ndarray]:
        """Return the rows of each class that may be drawn."""
        pools = []
        for rows in self.classes.values():
            rows = rows[rows != index] if split == TRAIN else rows
            if similarity is not None:
                count = max(self.num_demo, round(self.share * len(rows)))
                rows = rows[np.argsort(-similarity[rows], kind="stable")[:count]]
            pools.append(rows)
        return pools

    def _draw(self, pools: list[np.ndarray], split: str, index: int, sample: int) -> list[int]:
        """Draw `num_demo` different rows from each pool."""
        drawn = []
        for number, pool in enumerate(pools):
            left = pool.tolist()
            for demo in range(self.num_demo):
                text = f"{self.seed} {split} {index} {sample} {number} {demo}"
                drawn.append(left.pop(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) % len(left)))
        return drawn

    def _context(self, texts: tuple[Ids, ...], demonstrations: list[int], split: str, index: int) -> tuple[Ids, Ids]:
        encoder = self.encoder
        length = sum(len(self.blocks[row][0]) for row in demonstrations)
        room = encoder.max_length - length
        if room < encoder.overhead + len(texts):
            raise InputError(
                f"the {len(demonstrations)} demonstrations of row {index} of split '{split}' take {length} tokens, "
                f"which with the row's own template is more than max_seq_length={encoder.max_length}; pass a lower "
                "--other_sent_limit or --num_demo, or a higher --max_seq_length"
            )
        ids, segments = encoder.join(texts, room)
        if encoder.reading is not Reading.MASK:  # the row comes last, because the answer follows its end
            skip = self._start_tokens(ids)
            shown = [token for row in demonstrations for token in self.blocks[row][0]]
            ids = [*ids[:skip], *shown, *ids[skip:]]
            return ids, [0] * len(ids)
        last = encoder.last_segment
        for row in demonstrations:
            ids += self.blocks[row][0]
            segments += [min(1, segment + last) for segment in self.blocks[row][1]]
        return ids, segments

    def features(self, split: str) -> dict[str, Any]:
        nested = split != TRAIN and self.num_sample > 1
        names = self.encoder.columns([[0]], None)
        types = {name: Sequence(column_type(name)) for name in names}
        return {name: Sequence(kind) if nested else kind for name, kind in types.items()}


def _checked(data_args: DataArguments, data: TaskData) -> Dataset:
    """Check the settings; return the training split."""
    for name in ("num_demo", "num_sample"):
        if getattr(data_args, name) < 1:
            raise InputError(f"{name}={getattr(data_args, name)} is out of range; pass 1 or more")
    if not 0 < data_args.demo_filter <= 1:
        raise InputError(f"demo_filter={data_args.demo_filter} is not in (0, 1]; pass 0.5, say, or 1 for no filter")
    if data_args.demo_filter_model is not None and data_args.demo_filter == 1:
        raise InputError("--demo_filter_model has no effect without a filter; pass --demo_filter below 1 with it")
    if data.train is None or LABEL not in data.train.column_names:
        raise InputError(f"demonstrations are training rows, and {data.task.name!r} has no training split; pass one")
    if data_args.pad_to_max_length:
        raise InputError("--pad_to_max_length is not supported with demonstrations; leave it out")
    return data.train
