"""Group attentions and feed-forwards into layers, and find the modules in a layer that an adapter can wrap."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from hf_ft_ext.structure.parts import Attention, FeedForward, Layer
from hf_ft_ext.structure.roles import Calls
from hf_ft_ext.structure.trace import ModuleCall, Paths, Trace, is_projection

Block = Attention | FeedForward


def find_layers(
    trace: Trace,
    calls: Calls,
    attentions: list[Attention],
    feed_forwards: list[FeedForward],
    modules: dict[str, nn.Module],
) -> tuple[Layer, ...]:
    """Group blocks into layers, in execution order.

    A layer is an element of a list of modules: the innermost element that contains an attention and a feed-forward. If
    there is none, it is the outermost element that contains a block. Two parallel lists, one of attentions and one of
    feed-forwards, are combined (XLM). A block outside of all lists belongs to no layer.
    """
    blocks: list[Block] = [*attentions, *feed_forwards]
    kinds_of: dict[str, set[type]] = defaultdict(set)
    places = {id(block): _numbered_prefixes(block.projections) for block in blocks}
    for block in blocks:
        for place in places[id(block)]:
            kinds_of[place].add(type(block))
    members: dict[str, list[Block]] = defaultdict(list)
    for block in blocks:
        if places[id(block)]:
            both = [place for place in places[id(block)] if len(kinds_of[place]) == 2]
            members[both[-1] if both else places[id(block)][0]].append(block)
    first = {name: min(calls[n].order for block in own for n in block.projections) for name, own in members.items()}
    partners = _parallel_lists(members)
    times = Counter(call.name for call in trace.calls)
    layers = []
    for name in sorted(members, key=first.__getitem__):
        if name in partners.values():
            continue
        own = [*members[name], *members.get(partners.get(name, ""), ())]
        inside = [name, *filter(None, [partners.get(name)])]
        layers.append(_layer(name, inside, own, trace, calls, modules, min(times[n] for n in own[0].projections)))
    return tuple(layers)


def _layer(
    name: str, inside: list[str], blocks: list[Block], trace: Trace, calls: Calls, modules: dict[str, nn.Module],
    runs: int,
) -> Layer:  # fmt: skip
    blocks = sorted(blocks, key=lambda block: calls[block.projections[0]].order)
    attentions = [block for block in blocks if isinstance(block, Attention)]
    feed_forwards = [block for block in blocks if isinstance(block, FeedForward)]
    around = {unit for block in attentions for unit in block.projections}
    feed_forwards = [_with_module(block, feed_forwards, around, name, trace, calls) for block in feed_forwards]
    attentions = [replace(block, module=_common([*block.query, *block.key, *block.value])) for block in attentions]
    number = next(int(part) for part in name.split(".") if part.isdigit())
    norm = _closing_norm(feed_forwards[-1], inside, trace, calls, modules, around) if feed_forwards else None
    return Layer(name, number, runs, tuple(feed_forwards), tuple(attentions), norm)


def _numbered_prefixes(names: Iterable[str]) -> list[str]:
    """List elements that contain all of `names`, the outermost first."""
    parts = (_common(names) or "").split(".")
    return [".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()]


def _common(names: Iterable[str]) -> str | None:
    """The innermost module that contains all of `names` (for a single name: its parent)."""
    split = [name.split(".")[:-1] for name in names]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared) or None


def _parallel_lists(members: dict[str, list[Block]]) -> dict[str, str]:
    """Map elements with attentions only to the element with feed-forwards only, of equal number in a sibling list."""
    kinds = {name: {type(block) for block in own} for name, own in members.items()}
    found = {}
    for name in members:
        holder, _, number = name.rpartition(".")
        for other in members:
            beside, _, same = other.rpartition(".")
            siblings = holder != beside and holder.rpartition(".")[0] == beside.rpartition(".")[0]
            if siblings and same == number and (kinds[name], kinds[other]) == ({Attention}, {FeedForward}):
                found[name] = other
    return found


def _with_module(
    block: FeedForward, all_of_layer: list[FeedForward], around: set[str], layer: str, trace: Trace, calls: Calls
) -> FeedForward:
    """`block` with its module: the largest one with the block's inputs, and outputs of this block or its experts only.

    A module that adds the residual is too large: part of its output comes from outside of it.
    """
    sources = _direct(calls[(*block.up, *block.gate)[0]].paths)  # by paths, as experts read copies of some tokens
    candidates: dict[str, ModuleCall] = {}
    for call in trace.modules:
        if call.name and call.name != layer and not layer.startswith(f"{call.name}.") and call.name not in candidates:
            candidates[call.name] = call
    for name, call in sorted(candidates.items(), key=lambda item: len(item[0])):
        inside = [other for other in all_of_layer if all(unit.startswith(f"{name}.") for unit in other.projections)]
        if block not in inside or any(unit.startswith(f"{name}.") for unit in around):
            continue
        downs = {unit for other in inside for unit in other.down}
        outputs = _direct(call.outputs)
        computed_inside = all(unit.startswith(f"{name}.") for unit in outputs)  # including a router's weights
        if outputs & downs and computed_inside and _direct(call.inputs) == sources and call.width == block.width:
            return replace(block, module=name)
    return block


def _direct(paths: Paths) -> set[str]:
    return {unit for unit, path in paths.items() if path.direct}


def _closing_norm(
    block: FeedForward, inside: list[str], trace: Trace, calls: Calls, modules: dict[str, nn.Module], around: set[str]
) -> str | None:
    """The normalization, inside the layer and after all attentions, of the sum of `block`'s output and a residual."""
    order = calls[block.down[0]].order
    if any(calls[unit].order > order for unit in around):
        return None
    for call in trace.modules:
        module = modules.get(call.name)
        if call.start < order or module is None or not any(call.name.startswith(f"{name}.") for name in inside):
            continue
        own = list(module.parameters(recurse=False))
        scales = own and all(p.dim() == 1 for p in own) and call.width == block.width
        if not scales or is_projection(module) or any(True for _ in module.children()):
            continue
        direct = _direct(call.inputs)
        if direct >= set(block.down) and direct - set(block.down):
            return call.name
    return None
