"""The parts of a model as a text table."""

import re

from torch import nn

from hf_ft_ext.errors import InputError
from hf_ft_ext.structure.find import find_structure
from hf_ft_ext.structure.parts import Attention, FeedForward, Layer, Structure

_HEADER = ("part", "where", "what it is", "why")


def structure_table(structure: Structure) -> str:
    """A table with one line per kind of layer and part: names with `*` for layer numbers, kind, and reason."""
    rows: list[tuple[str, ...]] = [_HEADER]
    kinds: dict[tuple[tuple[str, ...], ...], list[Layer]] = {}
    for layer in structure.layers:
        kinds.setdefault(tuple(_layer_rows(layer, structure.kinds)), []).append(layer)
    for parts, layers in kinds.items():
        runs = sum(layer.runs for layer in layers)
        shared = f", run {runs} times" if runs > len(layers) else ""
        rows.append(("layers", _fold(layers[0].name), f"{len(layers)}{shared}", "elements of one list of modules"))
        rows.extend(dict.fromkeys(parts))
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER) - 1)]
    lines = ["  ".join(cell.ljust(n) for cell, n in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows]
    if not structure.layers:
        lines = ["no repeated layers: no feed-forward or attention is in a list of modules"]
    lines.append(f"embeddings (looked up by token or position): {_list(structure.embeddings)}")
    lines.append(f"head (outside of the base model): {_list(structure.head)}")
    return "\n".join(lines)


def parts_table(model: nn.Module) -> str:
    """The table of `model`, or the reason why its structure cannot be found."""
    try:
        return structure_table(find_structure(model))
    except InputError as error:
        return str(error)


def _layer_rows(layer: Layer, kinds: dict[str, str]) -> list[tuple[str, str, str, str]]:
    rows = []
    for attention in layer.attentions:
        rows.extend(_attention_rows(attention, kinds))
    for feed_forward in layer.feed_forwards:
        rows.extend(_feed_forward_rows(feed_forward, kinds))
    if layer.norm:
        rows.append(("  norm", _fold(layer.norm), "", "reads the residual sum and ends the layer"))
    return rows


def _attention_rows(block: Attention, kinds: dict[str, str]) -> list[tuple[str, str, str, str]]:
    name = "  cross-attention" if block.cross else "  attention"
    if not block.query and not block.key:
        name = "  mixing block"
    reasons = (
        ("query", block.query, "left in the first product of activations"),
        ("key", block.key, "right in the first product of activations"),
        ("value", block.value, "reaches the output past the softmax"),
        ("output", block.output, "reads the product"),
        ("other", block.other, "only feeds or gates the others"),
    )
    roles: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for role, names, why in reasons:
        if names:
            roles.setdefault(names, []).append((role, why))
    return [
        (f"{name} {'+'.join(role for role, _ in own)}", _names(names), _kinds(names, kinds), own[0][1])
        for names, own in roles.items()
    ]


def _feed_forward_rows(block: FeedForward, kinds: dict[str, str]) -> list[tuple[str, str, str, str]]:
    shape = f", {block.width} to {block.inner}"
    back = f", {block.inner} to {block.width}"
    rows = []
    if block.gate == block.up:
        rows.append(("  feed-forward gate+up", _names(block.up), _kinds(block.up, kinds) + shape, "read by down only"))
    else:
        for role, names in (("gate", block.gate), ("up", block.up)):
            why = "read by down only" + (", activated" if role == "gate" else "")
            if names:
                rows.append((f"  feed-forward {role}", _names(names), _kinds(names, kinds) + shape, why))
    rows.append(
        ("  feed-forward down", _names(block.down), _kinds(block.down, kinds) + back, "returns the layer's width")
    )
    return rows


def _names(names: tuple[str, ...]) -> str:
    return _list(tuple(dict.fromkeys(_fold(name) for name in names)))


def _kinds(names: tuple[str, ...], kinds: dict[str, str]) -> str:
    return "+".join(dict.fromkeys(kinds.get(name, "?") for name in names))


def _fold(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _list(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "none"
