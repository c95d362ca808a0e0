"""One step of every method on a small model, as numbers that can be compared between devices and number formats.

`STEPS` maps a name to `step(place) -> {name: float64 tensor on the CPU}`. The model, the rows and all random numbers
come from seeds on the CPU. Optimizers have `eps=1`, so that a step is about proportional to the gradient: with a
small one, the sign of a gradient that is zero but for rounding would decide where a weight goes.

Directions of `SPSA` come from the device's own generator. Its step is therefore compared with losses that the CPU
finds at the same perturbed weights.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification

from hf_ft_ext import (
    SPSA,
    BottleneckConfig,
    DirectSearch,
    LayerPrefixConfig,
    NodePerturbation,
    SparseAdamW,
    SparseGradConfig,
    attach_entries,
    compute_bases,
    convert_to_sparse,
    empirical_ntk,
    fisher_information,
    fit_linear_head,
    projected_gradients,
)
from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers
from hf_ft_ext.features import HeadReader
from hf_ft_ext.gradientless.scoring.evaluation import HeadEvaluation
from hf_ft_ext.gradientless.scoring.full_models import FullObjective, objective_of_logits
from hf_ft_ext.gradientless.scoring.objectives import make_objective, row_losses
from hf_ft_ext.sparse.basis import by_columns
from hf_ft_ext.sparse.fixed import FixedSupport

Outcome = dict[str, torch.Tensor]
_SHAPE = {
    "vocab_size": 120, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 2,
}  # fmt: skip
_ROWS, _LENGTH, _ENTRIES = 6, 12, 60
_KIND = "single_label_classification"
_RATE = 100.0  # large, so that rounding of 16-bit weights does not hide the step


@dataclass(frozen=True)
class Place:
    """Where and in which number format a step is taken.

    Attributes:
        dtype: of the model.
        stored: the weights are rounded to it first, so that models of several formats hold the same numbers.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    stored: torch.dtype = torch.float32

    def model(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("roberta", **_SHAPE))
            for parameter in model.parameters():  # larger than they start, so that gradients are not tiny
                parameter.data.add_(0.1 * torch.randn(parameter.shape))
        return model.to(self.stored).to(self.dtype).to(self.device).eval()

    def batch(self) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(5, _SHAPE["vocab_size"], (_ROWS, _LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, -4:] = 0
        batch = {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask, "labels": torch.arange(_ROWS) % 2}
        return {key: value.to(self.device) for key, value in batch.items()}


def error_of(outcome: Outcome, reference: Outcome) -> float:
    """The largest relative error among the tensors, in norms; small tensors are measured against all together."""
    if outcome.keys() != reference.keys():
        raise ValueError(f"other tensors than in the reference: {sorted(outcome.keys() ^ reference.keys())}")
    norms = {name: float(value.norm()) for name, value in reference.items()}
    whole = sum(norm**2 for norm in norms.values()) ** 0.5
    errors = []
    for name, value in reference.items():
        error = float((outcome[name] - value).norm()) / max(norms[name], 1e-2 * whole)
        errors.append(error if math.isfinite(error) else math.inf)
    return max(errors)


def _home(values: torch.Tensor) -> torch.Tensor:
    return values.detach().cpu().double()


def _trained(model: nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> Outcome:
    """What one step changes in each parameter."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.train()
    model(**batch).loss.backward()
    optimizer.step()
    changes = {name: _home(parameter.detach() - before[name]) for name, parameter in model.named_parameters()}
    return {
        name: change for name, change in changes.items() if model.get_parameter(name).requires_grad or change.any()
    }


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=_RATE, eps=1.0, weight_decay=0.0)


def full(place: Place) -> Outcome:
    model = place.model()
    return _trained(model, _adamw(model), place.batch())


def _adapter(config) -> Callable[[Place], Outcome]:
    def step(place: Place) -> Outcome:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            model = get_peft_model(Place(torch.device("cpu"), place.dtype, place.stored).model(), config())
        model = model.to(place.device)
        return _trained(model, _adamw(model), place.batch())

    return step


def structured(place: Place) -> Outcome:
    """The adapter with its gradient pre-pass; the columns are found up to rotations, so the change is compared."""
    config = SparseGradConfig(task_type="SEQ_CLS", n_params=_ENTRIES)
    model, batch = get_peft_model(place.model(), config), place.batch()
    compute_bases(model, [batch])
    changes = _trained(model, _adamw(model), batch)
    found = {name: value for name, value in changes.items() if "sparse_grad" not in name}
    return found | {name: _home(layer.get_delta_weight("default")) for name, layer in sparse_grad_layers(model)}


def _converted(support: str) -> Callable[[Place], Outcome]:
    def step(place: Place) -> Outcome:
        model = place.model()
        layers = convert_to_sparse(model, _ENTRIES, support=support, basis="random")
        generator = torch.Generator().manual_seed(3)
        for layer in {layer.kind: layer for layer in layers.values()}.values():
            sides = (layer.out_features, layer.in_features)
            factors = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q.to(layer.weight) for n in sides)
            layer.basis.out_factor, layer.basis.in_factor = map(by_columns, factors)
            layer.basis.rotates = "activations"
        for layer in layers.values():
            if support == "static":
                chosen = torch.randperm(layer.weight.numel(), generator=generator)[:_ENTRIES].sort().values
                layer.set_support(FixedSupport.of_entries(layer.basis, chosen.to(place.device), layer.in_features))
            elif support == "structured":
                sides = (torch.arange(n, device=place.device) for n in layer.block)
                layer.set_support(FixedSupport.of_block(layer.basis, *sides))
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = SparseAdamW(trained, layers.values(), lr=_RATE, eps=1.0, weight_decay=0.0)
        return _trained(model, optimizer, place.batch())

    return step


def entries(place: Place) -> Outcome:
    model, generator = place.model(), torch.Generator().manual_seed(4)
    names = [name for name, parameter in model.named_parameters() if "dense.weight" in name]
    own = dict(model.named_parameters())
    chosen = {name: torch.randperm(own[name].numel(), generator=generator)[:_ENTRIES] for name in names}
    model.requires_grad_(False)
    attach_entries(model, {name: indices.to(place.device) for name, indices in chosen.items()})
    return _trained(model, _adamw(model), place.batch())


def fisher(place: Place) -> Outcome:
    return {name: _home(v) for name, v in fisher_information(place.model(), [place.batch()], progress=False).items()}


def fisher_expected(place: Place) -> Outcome:
    found = fisher_information(place.model(), [place.batch()], labels="expected", progress=False)
    return {name: _home(value) for name, value in found.items()}


def _kernel(formula: str) -> Callable[[Place], Outcome]:
    def step(place: Place) -> Outcome:
        batch = place.batch()
        first, second = ({key: v[part] for key, v in batch.items()} for part in (slice(0, 3), slice(3, None)))
        return {"kernel": _home(empirical_ntk(place.model(), first, second, formula, memory_gb=1.0))}

    return step


def projected(place: Place) -> Outcome:
    return {"features": _home(projected_gradients(place.model(), place.batch(), dimension=64, memory_gb=1.0))}


def linear_head(place: Place) -> Outcome:
    model, batch = place.model(), Place(torch.device("cpu")).batch()
    rows = [{key: value[i] for key, value in batch.items()} for i in range(_ROWS)]
    fit_linear_head(model, rows, lambda part: {key: torch.stack([row[key] for row in part]) for key in part[0]}, c=0.1)
    return {"weight": _home(model.classifier.out_proj.weight)}


# --- searches -------------------------------------------------------------------------------------------


def _objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> FullObjective:
    return objective_of_logits(model, make_objective("loss", _KIND, 2), [batch])


def direct_search(place: Place) -> Outcome:
    """Losses before and after three steps of the whole model's search."""
    model = place.model().requires_grad_(False)
    full = _objective(model, place.batch())
    searched = [model.get_parameter(f"roberta.encoder.layer.{i}.output.dense.weight") for i in range(2)]
    optimizer = DirectSearch(searched, lr=0.3, sampling_size=_ENTRIES, options="1x1")
    with torch.no_grad():
        losses = [optimizer.step(lambda: float(full.value())) for _ in range(3)]
    return {"losses": torch.tensor(losses, dtype=torch.float64)}


def _head(place: Place) -> tuple[HeadEvaluation, list[nn.Parameter]]:
    model, batch = place.model().requires_grad_(False), place.batch()
    labels = batch.pop("labels")
    reader = HeadReader.find(model, batch)
    head = reader.head_parameters()
    names = {id(p): name for name, p in head.items()}
    of_rows = functools.partial(row_losses, problem_type=_KIND)
    scoring = HeadEvaluation(reader, names, make_objective("loss", _KIND, 2), of_rows=of_rows)
    scoring.load([(reader.features(batch), labels)])
    return scoring, list(head.values())


def direct_search_head(place: Place) -> Outcome:
    """Losses of some steps on cached features, candidates in one batch."""
    scoring, head = _head(place)
    optimizer = DirectSearch(head, lr=0.3, sampling_size=_ENTRIES, options="3x2")
    losses = [optimizer.step(scoring.closure, scoring) for _ in range(3)]
    return {"losses": torch.tensor(losses, dtype=torch.float64)}


def node_perturbation(place: Place) -> Outcome:
    scoring, head = _head(place)
    before = [p.detach().clone() for p in head]
    optimizer = NodePerturbation(head, lr=1.0, eps=0.1, num_directions=64, update="sgd")
    loss = optimizer.step(scoring.closure, scoring)
    changes = {f"head {i}": _home(p - old) for i, (p, old) in enumerate(zip(head, before, strict=True))}
    return changes | {"loss": torch.tensor([loss], dtype=torch.float64)}


def _spsa(**settings) -> Callable[[Place], Outcome]:
    """A step's slopes, as losses at the perturbed weights, in units of those that the CPU finds there."""

    def step(place: Place) -> Outcome:
        model, eps = place.model().requires_grad_(False), 0.05
        full = _objective(model, place.batch())
        parameters = list(model.parameters())
        settings_of_both = {"lr": 1e-3, "eps": eps, **settings}
        optimizer = SPSA(parameters, model, **settings_of_both)
        twin = SPSA(parameters, model, **settings_of_both)
        twin.steps = 1
        draws = twin._draws()  # the same that the step makes
        directions = [[_home(_part(optimizer, p, i, draw)) for i, p in enumerate(parameters)] for draw in draws]
        start = [p.detach().clone() for p in parameters]

        @torch.no_grad()
        def loss() -> float:
            return float(full.value())

        optimizer.step(loss, full)
        slopes = torch.tensor(optimizer.record[0][0], dtype=torch.float64)
        expected = torch.stack([_difference(place, z, eps) for z in directions])  # of the losses, and their mean
        moved = sum(float((p.detach() - old).float().norm()) for p, old in zip(parameters, start, strict=True))
        return {
            "loss difference / loss": 1 + (2 * eps * slopes - expected[:, 0]) / expected[:, 1],
            "moved": torch.tensor([float(moved > 0)], dtype=torch.float64),
        }

    return step


def _part(optimizer: SPSA, parameter: torch.Tensor, number: int, draw) -> torch.Tensor:
    """The direction's part of a tensor, as a whole."""
    directions = optimizer.directions
    if directions.has_factors(parameter.shape):
        left, right = directions.factors(parameter.shape, number, draw, torch.float32, parameter.device)
        return left @ right.T
    flat = parameter.detach().view(-1)
    parts = [directions.dense(flat[part], number, draw, part) for part in directions.chunks(parameter)]
    return torch.cat(parts).view(parameter.shape)


@torch.no_grad()
def _difference(place: Place, direction: list[torch.Tensor], eps: float) -> torch.Tensor:
    """`loss(theta + eps z) - loss(theta - eps z)` and the mean of the two, by the CPU in float64."""
    home = Place(torch.device("cpu"), torch.float64, place.stored)
    losses = []
    for sign in (1, -1):
        model, batch = home.model(), home.batch()
        for parameter, z in zip(model.parameters(), direction, strict=True):
            parameter.add_(sign * eps * z)
        losses.append(functional.cross_entropy(model(**batch).logits, batch["labels"]))
    return torch.stack([losses[0] - losses[1], (losses[0] + losses[1]) / 2])


STEPS: dict[str, Callable[[Place], Outcome]] = {
    "full": full,
    "lora": _adapter(lambda: LoraConfig(task_type="SEQ_CLS", r=4)),
    "bottleneck": _adapter(lambda: BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=8)),
    "prefix": _adapter(lambda: LayerPrefixConfig(task_type="SEQ_CLS", prefix_length=4, projection_size=16)),
    "sparse adapter": structured,
    "sparse dynamic": _converted("dynamic"),
    "sparse static": _converted("static"),
    "sparse structured": _converted("structured"),
    "entries": entries,
    "fisher": fisher,
    "fisher expected": fisher_expected,
    "kernel sgd": _kernel("sgd"),
    "kernel signgd": _kernel("signgd"),
    "kernel asymmetric_signgd": _kernel("asymmetric_signgd"),
    "kernel projected": projected,
    "linear head": linear_head,
    "direct search": direct_search,
    "direct search, head": direct_search_head,
    "node perturbation, head": node_perturbation,
    "spsa gaussian": _spsa(),
    "spsa rademacher": _spsa(direction="rademacher"),
    "spsa lozo": _spsa(direction="lozo"),
    "spsa subzero": _spsa(direction="subzero", rank=4),
    "spsa outer, at once": _spsa(direction="rademacher-outer", num_directions=2, candidates_per_forward=4),
}
