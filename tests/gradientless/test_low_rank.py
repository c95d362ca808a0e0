"""Low-rank directions on layer outputs, several candidates in one forward pass, and trajectories."""

import copy

import pytest
import torch
from heads import FAMILIES, family, padded_batch
from tiny import CONFIGS
from torch import nn

from hf_ft_ext import SPSA, InputError, apply_trajectory, save_trajectory
from hf_ft_ext.gradientless import trajectory
from hf_ft_ext.gradientless.optimizers.perturbation import directions as directions_module
from hf_ft_ext.gradientless.optimizers.perturbation.directions import Draw
from hf_ft_ext.gradientless.optimizers.perturbation.perturb import PerturbationsCannotBatch, PerturbedForward
from hf_ft_ext.gradientless.scoring.full_models import objective_of_logits, repeat
from hf_ft_ext.gradientless.scoring.objectives import make_objective

KINDS = ("lozo", "subzero", "rademacher-outer", "gaussian")
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])


def search(model, kind="lozo", **settings):
    rank = {"rank": 2} if kind in ("lozo", "subzero") else {}
    return SPSA(model.parameters(), model, direction=kind, **rank, **settings)


def moved_copy(model, optimizer, combination):
    """A copy of the model with the combination added to its weights, each direction written out."""
    result = copy.deepcopy(model)
    with torch.no_grad():
        for i, p in enumerate(result.parameters()):
            for draw, factor in combination:
                if optimizer.directions.has_factors(p.shape):
                    left, right = optimizer.directions.factors(p.shape, i, draw, p.dtype, p.device)
                    p.add_(left @ right.T, alpha=factor)
                    continue
                flat = p.detach().view(-1)
                for part in optimizer.directions.chunks(p):
                    flat[part] += factor * optimizer.directions.dense(flat[part].clone(), i, draw, part)
    return result


# Two kinds, with factors and without, on all families; the other two, which draw their entries otherwise, on one.
@pytest.mark.parametrize(
    ("model_type", "kind"),
    [(model_type, kind) for model_type in (*CONFIGS, *FAMILIES) for kind in ("lozo", "gaussian")]
    + [("bert", "subzero"), ("bert", "rademacher-outer")],
)
def test_candidates_of_one_forward_pass_equal_separate_models(model_type, kind, monkeypatch):
    monkeypatch.setattr(directions_module, "CHUNK", 400)  # several chunks of each matrix
    model, batch = family(model_type).double(), padded_batch()
    optimizer = search(model, kind)
    if model_type == "deberta-v2":  # its encoder reads an embedding that is never called
        optimizer.step(lambda: model(**batch, labels=LABELS).loss)
        assert optimizer.perturbed_forward.elsewhere and not optimizer.perturbed_forward.unread
    combinations = [[(Draw(1, 9), 0.05)], [], [(Draw(1, 9), -0.05)], [(Draw(2, 9), 0.05), (Draw(3, 9), 0.02)]]
    with torch.no_grad():
        expected = [moved_copy(model, optimizer, c)(**batch).logits for c in combinations]
        for combination, logits in zip(combinations, expected, strict=True):
            with optimizer.perturbed_forward(combination):
                torch.testing.assert_close(model(**batch).logits, logits, rtol=1e-9, atol=1e-11)
        with optimizer.perturbed_forward(*combinations):
            try:
                at_once = model(**repeat(batch, 4)).logits.view(4, len(LABELS), -1)
            except PerturbationsCannotBatch:
                assert model_type == "deberta-v2"  # relative positions are no rows
                return
    torch.testing.assert_close(at_once, torch.stack(expected), rtol=1e-9, atol=1e-11)
    assert (expected[0] - expected[1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_batched_and_separate_forward_passes_take_the_same_steps(kind):
    ends = []
    for candidates in (1, 2, 6):
        model = family("bert").double()
        batches = [{**padded_batch(), "labels": LABELS}, {**padded_batch(6, 1), "labels": LABELS}]
        full = objective_of_logits(model, make_objective("loss", None, 2), batches)
        optimizer = search(model, kind, num_directions=3, lr=1e-2, candidates_per_forward=candidates)
        for _ in range(2):
            optimizer.step(lambda full=full: float(full.value()), full)
        assert optimizer.batches == (candidates > 1) and optimizer.evaluations == 12
        ends.append([p.detach() for p in model.parameters()])
    for alone, *at_once in zip(*ends, strict=True):
        for found in at_once:
            torch.testing.assert_close(found, alone, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", ["lozo", "gaussian"])
def test_a_model_whose_modules_get_no_rows_is_evaluated_one_by_one(kind):
    """DeBERTa's relative positions go through linear layers, once for all rows."""
    ends = []
    for candidates in (1, 2):
        model = family("deberta-v2").double()
        full = objective_of_logits(model, make_objective("loss", None, 2), [{**padded_batch(), "labels": LABELS}])
        optimizer = search(model, kind, lr=1e-2, candidates_per_forward=candidates)
        for _ in range(2):
            optimizer.step(lambda full=full: float(full.value()), full)
        assert not optimizer.batches
        ends.append([p.detach() for p in model.parameters()])
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_model_that_mixes_rows_is_evaluated_one_by_one(caplog):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x - x.mean(0))

    model = Centred().double()
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    class Twice:
        def repeated(self, n):
            rows = x.repeat(n, 1) * torch.arange(1, 1 + n * len(x))[:, None]
            return torch.stack([part.square().sum() for part in model(rows).chunk(n)])

    optimizer = search(model, candidates_per_forward=2, eps=0.1)
    optimizer.step(lambda: model(x).square().sum(), Twice())
    assert not optimizer.batches and "candidates are evaluated one by one: losses of the repeated" in caplog.text

    class Never:  # as on cached features
        def repeated(self, n):
            return None

    optimizer = search(model, candidates_per_forward=2, eps=0.1)
    optimizer.step(lambda: model(x).square().sum(), Never())
    assert "candidates_per_forward has no effect, candidates are evaluated one by one: this evaluation" in caplog.text


@pytest.mark.parametrize("kind", ["lozo", "gaussian"])
def test_layers_that_are_called_by_keyword_are_perturbed(kind):
    model = nn.Linear(6, 5).double()
    optimizer, x = search(model, kind), torch.ones(3, 6, dtype=torch.double)
    combination = [(Draw(1, 2), 0.1)]
    with torch.no_grad():
        plain, expected = model(x), moved_copy(model, optimizer, combination)(x)
        with optimizer.perturbed_forward(combination):
            torch.testing.assert_close(model(input=x), expected)
    assert (expected - plain).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["lozo", "gaussian"])
def test_no_matrix_of_a_linear_layer_or_embedding_is_copied(kind, monkeypatch):
    copied = []
    original = PerturbedForward.perturbed
    monkeypatch.setattr(
        PerturbedForward, "perturbed", lambda self, p, i: copied.append(tuple(p.shape)) or original(self, p, i)
    )
    model = family("llama")
    optimizer = search(model, kind, eps=0.1)
    optimizer.step(lambda: model(**padded_batch(), labels=LABELS).loss)
    assert copied and all(len(shape) == 1 for shape in copied) and not optimizer.perturbed_forward.unread


@pytest.mark.slow
def test_low_rank_search_learns_in_sixteen_bits():
    model = family("bert").bfloat16()
    batch = {**padded_batch(), "labels": torch.ones(6, dtype=torch.long)}
    optimizer = search(model, "lozo", lr=2.5e-2, eps=1e-2, num_directions=4)
    first = float(model(**batch).loss.detach())
    for _ in range(10):
        optimizer.step(lambda: model(**batch).loss)
    assert float(model(**batch).loss.detach()) < first - 0.02


# --- trajectories -----------------------------------------------------------------------------------------------

SEARCHES = {
    "mezo": {}, "momentum": {"update": "momentum"}, "adam": {"update": "adam", "weight_decay": 0.1},
    "lozo-m": {"direction": "lozo", "rank": 2, "renew": 3, "update": "momentum"},
    "subzero": {"direction": "subzero", "rank": 2, "renew": 4},
    "fzoo": {"direction": "rademacher", "estimate": "one-sided"},
    "es": {"estimate": "population"}, "sparse": {"small": 0.5}, "rms": {"update": "rms"},
    "conservative": {"update": "conservative"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in SEARCHES),
        *((name, torch.bfloat16) for name in ("mezo", "adam", "lozo-m", "conservative")),
        ("mezo", torch.float64),
    ],
)
def test_a_trajectory_ends_bit_for_bit_where_the_search_did(tmp_path, caplog, name, dtype):
    model, base, start = (family("roberta", num_hidden_layers=1).to(dtype) for _ in range(3))
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]},
              {"params": [p for p in model.parameters() if p.ndim < 2], "lr": 3e-3}]  # fmt: skip
    optimizer = SPSA(groups, model, lr=1e-3, eps=1e-2, seed=4, num_directions=2, **SEARCHES[name])
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=8)
    batch = {**padded_batch(), "labels": LABELS}
    for _ in range(5):
        optimizer.step(lambda: model(**batch).loss)
        schedule.step()
    file = save_trajectory(optimizer, model, tmp_path)
    assert apply_trajectory(base, file) is base and "other random numbers" not in caplog.text
    moved = 0
    for (key, value), (_, expected) in zip(base.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(value, expected), key
        moved += int(not torch.equal(expected, start.state_dict()[key])) if moved < 3 else 0
    assert moved == 3 or (name == "conservative" and dtype == torch.bfloat16)  # all moves are below rounding there


def test_a_device_that_draws_other_numbers_is_noticed(tmp_path, monkeypatch, caplog):
    model = family("bert")
    optimizer = SPSA(model.parameters(), model, lr=1e-3)
    optimizer.step(lambda: model(**padded_batch(), labels=LABELS).loss)
    save_trajectory(optimizer, model, tmp_path)
    monkeypatch.setattr(directions_module, "_normal", lambda size, _, dtype: torch.ones(size, dtype=dtype))
    apply_trajectory(family("bert"), tmp_path)
    assert "The repeated weights are not those with which" in caplog.text


def test_twenty_thousand_steps_are_below_a_tenth_of_a_megabyte(tmp_path):
    model = family("bert")
    optimizer = SPSA(model.parameters(), model)
    generator = torch.Generator().manual_seed(0)
    for t in range(20_000):
        slope = torch.randn((), generator=generator).item()
        optimizer.record.append(([slope], [1e-6 * (1 - t / 20_000)]))
    assert save_trajectory(optimizer, model, tmp_path / "file.safetensors").stat().st_size < 100_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trajectories_of_the_first_format_are_refused_where_rounding_has_changed(tmp_path, monkeypatch, dtype):
    model = family("bert").to(dtype)
    optimizer = SPSA(model.parameters(), model)
    optimizer.step(lambda: model(**padded_batch(), labels=LABELS).loss)
    with monkeypatch.context() as patched:
        patched.setattr(trajectory, "_FORMAT", "hf_ft_ext trajectory 1")
        save_trajectory(optimizer, model, tmp_path)
    if dtype == torch.float32:
        repeated = apply_trajectory(family("bert"), tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(repeated.parameters(), model.parameters(), strict=True))
    else:
        with pytest.raises(InputError, match="earlier version of hf_ft_ext, which rounded 16-bit weights differently"):
            apply_trajectory(family("bert").to(dtype), tmp_path)


def test_unsuitable_models_and_files_of_a_trajectory_are_refused(tmp_path, monkeypatch):
    model = family("bert")
    optimizer = SPSA(model.parameters(), model)
    optimizer.step(lambda: model(**padded_batch(), labels=LABELS).loss)
    save_trajectory(optimizer, model, tmp_path)
    with pytest.raises(InputError, match=r"the trajectory changes bert\..*, and Distil.* has no such parameter"):
        apply_trajectory(family("distilbert"), tmp_path)
    with pytest.raises(
        InputError, match="the trajectory is of float32 weights, and these are float64; load the model"
    ):
        apply_trajectory(family("bert").double(), tmp_path)
    mixed = family("bert")
    mixed.classifier.bfloat16()
    with pytest.raises(InputError, match="is of float32 weights, and these are bfloat16"):
        apply_trajectory(mixed, tmp_path)
    about, slopes, rates = trajectory._read(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(trajectory, "_read", lambda path: ({**about, "device": "cuda"}, slopes, rates))
        with pytest.raises(InputError, match=r"recorded on cuda, and the model is on cpu, .* model\.to\('cuda'\)"):
            apply_trajectory(family("bert"), tmp_path)
    with pytest.raises(InputError, match="these are not the weights that the search started from"):
        apply_trajectory(family("bert", seed=1), tmp_path)
    with pytest.raises(InputError, match="does not exist; pass the file or folder of a trajectory"):
        apply_trajectory(model, tmp_path / "nothing")
    (tmp_path / "broken").write_bytes(b"x" * 40)
    with pytest.raises(InputError, match="cannot be read as a trajectory"):
        apply_trajectory(model, tmp_path / "broken")
    with pytest.raises(InputError, match="the search changes parameters that the model does not have"):
        save_trajectory(optimizer, family("bert"), tmp_path)
    masks = [torch.ones_like(p, dtype=torch.bool) for p in model.parameters()]
    with pytest.raises(InputError, match="a trajectory cannot store masks"):
        save_trajectory(SPSA(model.parameters(), model, masks=masks), model, tmp_path)
