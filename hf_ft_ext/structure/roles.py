"""Find feed-forwards and attentions in the trace of a forward pass, by data flow and not by names."""

from collections import defaultdict

from hf_ft_ext.structure.parts import Attention, FeedForward
from hf_ft_ext.structure.trace import Call, Paths, Trace

Calls = dict[str, Call]


def first_calls(trace: Trace) -> Calls:
    """The first call of each projection, in execution order."""
    found: Calls = {}
    for call in trace.calls:
        found.setdefault(call.name, call)
    return found


def find_attentions(trace: Trace) -> list[Attention]:
    """Find groups of projections whose outputs are multiplied with each other, and the projections of the result.

    A projection that reads a product of other projections' outputs is the block's output projection. Its inputs give
    the roles: values reach it on a path without an activation function, queries and keys only through the softmax. The
    query is the left operand of the first product, the key the right one. A single projection whose output is mixed
    along positions in another way (a convolution, a scan) forms a block by itself.
    """
    calls = first_calls(trace)
    left, right = set(), set()
    for product in trace.products:
        if not any(path.most for path in (*product.left.values(), *product.right.values())):  # query and key
            left.update(product.left)
            right.update(product.right)
    blocks: dict[frozenset[str], list[str]] = {}
    mixed: dict[frozenset[str], Paths] = {}
    for name, call in calls.items():
        members = frozenset(unit for unit, path in call.paths.items() if path.most and unit in calls and unit != name)
        if not members:
            members = frozenset(_state_space_projection(call, calls))
        if members:
            blocks.setdefault(members, []).append(name)
            mixed.setdefault(members, call.paths)
    outputs = {name for names in blocks.values() for name in names}
    found: list[Attention] = []
    for members, names in blocks.items():
        inputs = mixed[members]
        query, key, value = _roles([m for m in calls if m in members], inputs, left, right)
        gates = {unit for unit, path in inputs.items() if not path.most and unit in calls and not path.direct}
        feeders = _low_rank_factors([*members, *names], calls, outputs)
        other = tuple(n for n in calls if n in gates | feeders and n not in members and n not in names)
        cross = _is_cross(query, key, calls, found)
        found.append(Attention(query, key, value, tuple(names), other, cross))
    return found


def find_feed_forwards(trace: Trace, attentions: list[Attention]) -> list[FeedForward]:
    """Find chains `down(activation(up(x)))`, gated or not, with equal numbers of input and output features.

    `down` reads only `up` (and `gate`), without a residual sum or a mixing of positions in between. `up` and `gate`
    read the same tensor. The output of `down` reaches a later projection or the output without an activation, so it is
    not only a gate.
    """
    calls = first_calls(trace)
    read_directly = {unit for call in trace.calls for unit, path in call.paths.items() if path.direct}
    read_directly |= {unit for module in trace.modules[-1:] for unit in module.outputs}
    taken = {name for block in attentions for name in block.projections}
    found: list[FeedForward] = []
    for down in calls.values():
        units = [calls[name] for name in down.paths if name in calls]
        if not units or len(units) < len(down.paths) or down.name in taken or down.name not in read_directly:
            continue
        if any(path.most or path.mixed for path in down.paths.values()) or len({unit.reads for unit in units}) > 1:
            continue
        if any(unit.width_in != down.width_out or unit.name in taken or unit.name == down.name for unit in units):
            continue
        if any(unit.width_out < down.width_in for unit in units):
            continue
        gate = tuple(u.name for u in units if down.paths[u.name].curved)
        up = tuple(u.name for u in units if not down.paths[u.name].curved)
        if not up:
            fused = units[0].width_out >= 2 * down.width_in
            up, gate = gate, gate if fused else ()
        taken |= {down.name, *up, *gate}
        found.append(FeedForward(up, gate, (down.name,), down.width_out, down.width_in))
    return found


def _state_space_projection(call: Call, calls: Calls) -> list[str]:
    """The one projection whose output `call` reads mixed along positions: a state-space block; empty otherwise."""
    units = [unit for unit, path in call.paths.items() if path.mixed]
    if len(units) != 1 or len(call.paths) != 1 or units[0] not in calls:
        return []
    source = calls[units[0]]
    return units if source.width_in == call.width_out and source.name != call.name else []


def _roles(
    members: list[str], inputs: Paths, left: set[str], right: set[str]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return query, key and value among the members of a block."""
    direct = [m for m in members if inputs[m].direct]
    if not direct or (len(direct) == len(members) > 1):  # no softmax: the value is the one in the fewest products
        fewest = min(inputs[m].products for m in members)
        direct = [m for m in members if inputs[m].products == fewest]
    scored = [m for m in members if inputs[m].curved or m not in direct or len(members) == 1]
    query = tuple(m for m in scored if m in left)
    key = tuple(m for m in scored if m in right)
    return query, key, tuple(direct)


def _low_rank_factors(members: list[str], calls: Calls, outputs: set[str]) -> set[str]:
    """Projections whose output only members of the block read: low-rank factors of queries and keys."""
    readers: dict[str, set[str]] = defaultdict(set)
    for name, call in calls.items():
        for unit in call.paths:
            readers[unit].add(name)
    found: set[str] = set()
    while True:
        own = {*members, *found}
        sources = {unit for name in own for unit in calls[name].paths if unit in calls}
        more = {unit for unit in sources if readers[unit] <= own and unit not in outputs} - own
        if not more:
            return found
        found |= more


def _is_cross(query: tuple[str, ...], key: tuple[str, ...], calls: Calls, before: list[Attention]) -> bool:
    """Whether keys read another sequence than queries: one that was computed before the latest other attention.

    This is the encoder's output in a decoder's cross-attention.
    """
    reads = [{calls[name].reads for name in names} for names in (query, key)]
    if not (reads[0] and reads[1]) or reads[0] & reads[1]:
        return False
    others = [calls[name] for block in before for name in (*block.query, *block.key)]
    sources = {unit for name in key for unit in calls[name].paths}
    latest = max((call.order for call in others if call.reads not in reads[1]), default=0)
    # The encoder's output was computed before the layer's self-attention ran.
    written = max((calls[unit].order for unit in sources if unit in calls), default=0)
    return 0 < written < latest
