"""What a model consists of: layers, feed-forwards, attentions."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FeedForward:
    """One feed-forward of a layer: projections by role, each a module's name (an expert tensor: a parameter's).

    Attributes:
        up: read the feed-forward's input.
        gate: read it too; their activated output multiplies that of `up`. A fused projection stands in both.
        down: give the feed-forward's output.
        width, inner: features of input and output, and between.
        module: the largest module that is this feed-forward and nothing else; `None` = its projections stand in the
            layer itself.
    """

    up: tuple[str, ...]
    gate: tuple[str, ...]
    down: tuple[str, ...]
    width: int
    inner: int
    module: str | None = None

    @property
    def projections(self) -> tuple[str, ...]:
        """All of them once, gate and up before down."""
        return tuple(dict.fromkeys([*self.gate, *self.up, *self.down]))


@dataclass(frozen=True)
class Attention:
    """One attention (or another block that mixes positions) of a layer: projections by role.

    Attributes:
        query, key, value: whose outputs meet; a fused projection stands in several. Without query and key: what a
            block without products of activations mixes.
        output: read what the block mixed.
        other: feed one of these, or gate the result.
        cross: whether keys come from elsewhere than queries.
        module: the smallest module that holds all of it.
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
        """All of them once."""
        return tuple(dict.fromkeys([*self.query, *self.key, *self.value, *self.other, *self.output]))


@dataclass(frozen=True)
class Layer:
    """One of a model's repeated layers.

    Attributes:
        name: dotted name; of layers whose parts stand in parallel lists (XLM), of the part that runs first.
        number: the first number in the name, by which adapters know the layer.
        runs: how often it runs in one pass; above 1 where layers share weights (ALBERT).
        norm: the normalization that reads the sum of the last feed-forward's output and the residual, and ends the
            layer; `None` where the layer normalizes first.
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
        layers: in the order in which they run.
        embeddings: tables that the pass looked up.
        head: what reads the last layer: names of modules outside of the base model.
        kinds: projection -> name of its class, or `tensor` for a weight that stands in no linear layer.
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
