"""Data classes for the parts of a model: layers, feed-forwards, attentions."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward of a layer: names of its projections (modules, or parameters of expert tensors) by role.

    Attributes:
        up: projections of the feed-forward's input.
        gate: further projections of the input, whose activated output multiplies that of `up`. A fused projection is
            in both.
        down: projections that return the feed-forward's output.
        width, inner: number of features of input and output, and of the intermediate state.
        module: the largest module that contains only this feed-forward; `None` = its projections are direct children
            of the layer.
    """

    up: tuple[str, ...]
    gate: tuple[str, ...]
    down: tuple[str, ...]
    width: int
    inner: int
    module: str | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections once, gate and up before down."""
        return tuple(dict.fromkeys([*self.gate, *self.up, *self.down]))


@dataclass(frozen=True)
class Attention:
    """One attention (or another block that mixes positions) of a layer: names of its projections by role.

    Attributes:
        query, key, value: projections whose outputs are multiplied with each other; a fused projection is in several
            of them. A block without products of activations (a convolution or scan) has no query and key, and `value`
            is the projection that it mixes.
        output: projections of the mixed values.
        other: projections whose output feeds only the others, or gates the result.
        cross: whether keys come from another sequence than queries.
        module: the smallest module that contains queries, keys and values.
    """

    query: tuple[str, ...]
    key: tuple[str, ...]
    value: tuple[str, ...]
    output: tuple[str, ...]
    other: tuple[str, ...] = ()
    cross: bool = False
    module: str | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """All projections once."""
        return tuple(dict.fromkeys([*self.query, *self.key, *self.value, *self.other, *self.output]))


@dataclass(frozen=True)
class Layer:
    """One of a model's repeated layers.

    Attributes:
        name: dotted name; for layers in parallel lists (XLM), that of the part that runs first.
        number: the first number in the name, by which adapters select the layer.
        runs: number of times that it runs in one forward pass; above 1 if layers share weights (ALBERT).
        norm: the normalization at the end of the layer, of the sum of the last feed-forward's output and the residual;
            `None` in a pre-norm layer.
    """

    name: str
    number: int
    runs: int
    feed_forwards: tuple[FeedForward, ...] = ()
    attentions: tuple[Attention, ...] = ()
    norm: str | None = None


@dataclass(frozen=True)
class Structure:
    """The parts of a model; see `find_structure`.

    Attributes:
        model: name of the model's class.
        layers: in execution order.
        embeddings: names of the embedding tables that the forward pass uses.
        head: names of the modules outside of the base model.
        kinds: projection -> name of its class, or `tensor` for a weight that is not in a linear layer.
    """

    model: str
    layers: tuple[Layer, ...]
    embeddings: tuple[str, ...]
    head: tuple[str, ...]
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def feed_forwards(self) -> tuple[FeedForward, ...]:
        """The feed-forwards of all layers."""
        return tuple(part for layer in self.layers for part in layer.feed_forwards)

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The attentions of all layers."""
        return tuple(part for layer in self.layers for part in layer.attentions)


def unwrapped_name(name: str) -> str:
    """`name` as in the model without adapters: without the parts that peft adds for a wrapped or a copied module.

    The original of a module that trains in full (`original_module`) has the name of the module, as it is what runs in
    a model whose adapters are disabled. `adapters.layers.plain_name` keeps it apart.
    """
    wrappers = ("base_layer", "original_module")
    return ".".join(part for part in name.split(".") if part not in wrappers)
