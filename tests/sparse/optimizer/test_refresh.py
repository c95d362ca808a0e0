"""A refreshed basis: the factors of the gradients since, moments that rotate with it, unchanged weights."""

import copy
import itertools

import pytest
import torch
from sparse_trainer import make
from test_fixed import make as fixed_layer
from test_fixed import random
from test_optimizer import batches, loss_of, train
from test_optimizer import make as two_layers
from torch import nn
from transformers import TrainerCallback

from hf_ft_ext import InputError, SparseAdamW, SparseTrainingArguments, prepare_layers, sparse_layers
from hf_ft_ext.sparse.basis import ACTIVATIONS, GRADIENT, Basis, GramSums
from hf_ft_ext.sparse.fixed import FixedSupport
from hf_ft_ext.sparse.optimizer.moments import rotate_dynamic_moments, rotate_fixed_moments, rotate_moments
from hf_ft_ext.sparse.optimizer.refresh import RunningSums
from hf_ft_ext.training.runs.plan import training_plan

BETAS = (0.9, 0.999)


def orthonormal(n, seed):
    return torch.linalg.qr(random(n, n, seed=seed)).Q


def signed_permutation(n, seed):
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1
    return torch.eye(n).double()[torch.randperm(n, generator=generator)] * signs


def test_moments_rotate_exactly_with_the_order_and_signs_of_directions():
    left, right = signed_permutation(6, 1), signed_permutation(5, 2)
    mean = random(6, 5, seed=3)
    square = mean.square() * 0.5 + 0.1  # smaller than the mean squared here and there, as Adam's averages can be
    rotated, squares = rotate_moments(left, right, mean, square)
    torch.testing.assert_close(rotated, left @ mean @ right, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(squares, left.abs() @ square @ right.abs(), rtol=1e-14, atol=1e-14)


def test_moments_keep_their_size_and_never_give_a_step_above_the_rate():
    left, right = orthonormal(6, 1), orthonormal(5, 2)
    mean = random(6, 5, seed=3)
    rotated, squares = rotate_moments(left, right, mean, mean.square() * 1.5)
    torch.testing.assert_close(rotated.norm(), mean.norm(), rtol=1e-12, atol=0)
    assert (rotated.square() <= squares).all()
    # Entries that agree: rotated as if they were independent, the squares would be a thirtieth of what they are.
    ones = torch.ones(6, 5).double()
    aligned = torch.full((1, 6), 6**-0.5).double(), torch.full((5, 1), 5**-0.5).double()
    rotated, squares = rotate_moments(*aligned, ones, ones)
    torch.testing.assert_close(rotated.square(), torch.full((1, 1), 30.0).double())
    torch.testing.assert_close(squares, rotated.square())


@pytest.mark.parametrize("rotates", [ACTIVATIONS, GRADIENT])
@pytest.mark.parametrize("n_params", [7, 30])
@pytest.mark.parametrize("dense", [False, True])
def test_a_basis_with_directions_in_another_order_changes_nothing(rotates, n_params, dense, monkeypatch):
    net, data = two_layers(n_params, rotates), batches(12)
    plain = copy.deepcopy(net)
    rotations = signed_permutation(6, 1), signed_permutation(5, 2)

    def update_basis(self, kind, basis):
        basis.out_factor, basis.in_factor = basis.out_factor @ rotations[0], basis.in_factor @ rotations[1]
        return rotations[0].T, rotations[1]

    monkeypatch.setattr(RunningSums, "update_basis", update_basis)
    options = {"lr": 0.05, "weight_decay": 0.1, "dense_moments": dense}
    train(net, SparseAdamW(net.parameters(), [net[0]], refresh_steps=5, **options), data)
    train(plain, SparseAdamW(plain.parameters(), [plain[0]], **options), data)
    assert not torch.equal(net[0].basis.out_factor, plain[0].basis.out_factor)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("rotates", [ACTIVATIONS, GRADIENT])
def test_the_new_factors_are_those_of_the_gradients_since(rotates, published):
    net = two_layers(7, rotates)
    layer = net[0]
    layer.basis.in_transposed = published
    optimizer = SparseAdamW(net.parameters(), [layer], lr=0.05, refresh_steps=6, refresh_gradients=3)
    old, seen = copy.copy(layer.basis), []
    for x in batches(6):
        twin = copy.deepcopy(net)
        twin[0] = nn.Linear(5, 6).double()
        twin[0].load_state_dict(layer.state_dict())
        loss_of(twin, x).backward()
        seen.append(twin[0].weight.grad)
        weight = layer.weight.detach().clone()
        train(net, optimizer, [x])
    sums = GramSums(6, 5, torch.float64, torch.device("cpu"))
    for gradient in seen[1::2]:  # every other step: three of six
        sums.add(gradient)
    out_factor, in_factor = sums.factors()
    in_factor = in_factor.T if published else in_factor
    basis = layer.basis
    assert not torch.equal(basis.out_factor, old.out_factor)
    for found, expected in ((basis.out_factor, out_factor), (basis.in_factor, in_factor)):
        torch.testing.assert_close(found.abs(), expected.abs(), rtol=1e-6, atol=1e-6)
    # The refresh itself left the weight: all that changed since the step before lies in the old support.
    change = (old.out_factor.T @ (layer.weight.detach() - weight) @ old.in_factor).flatten()
    assert (change.abs() > 1e-9).sum() == 7


def test_left_and_right_take_the_old_basis_into_the_new_one():
    for published in (False, True):
        basis = Basis(orthonormal(6, 1), orthonormal(5, 2), in_transposed=published)
        old, running, gradient = copy.copy(basis), RunningSums(2, 2), random(6, 5, seed=3)
        running.begin_step()
        running.observe("kind", old.rotate(gradient))
        left, right = running.update_basis("kind", basis)
        expected = basis.rotate(gradient)
        torch.testing.assert_close(left @ old.rotate(gradient) @ right, expected, rtol=1e-10, atol=1e-10)


def test_two_refreshes_without_a_step_in_between_keep_the_moments_finite():
    """An expert that gets no tokens between two refreshes has no step, while others of its kind have."""
    state = {"step": torch.full((5,), 3).int(), "indices": torch.arange(5).int()}
    state |= {"exp_avg": random(5, seed=1), "exp_avg_sq": random(5, seed=2).square()}
    for seed in (3, 5):
        rotate_dynamic_moments(
            state, torch.zeros(8, 7).double(), BETAS, orthonormal(8, seed), orthonormal(7, seed + 1)
        )
        assert 0 in state["step"] and all(part.isfinite().all() for part in state.values())


@pytest.mark.parametrize("shape", ["block", "entries"])
def test_fixed_moments_stay_in_the_same_support(shape):
    _, layer, *_ = fixed_layer("rotated", shape)
    support, k = layer.support, layer.support.size
    state = {"step": torch.tensor(3.0), "exp_avg": random(k, seed=1), "exp_avg_sq": random(k, seed=2).square() + 5}
    rotated = {key: value.clone() for key, value in state.items()}
    rotate_fixed_moments(rotated, BETAS, support, support)
    for key, value in state.items():
        torch.testing.assert_close(rotated[key], value, rtol=1e-9, atol=1e-9)


def test_fixed_moments_of_unknown_directions_are_average_ones():
    factors = orthonormal(7, 1), orthonormal(5, 2)
    old = FixedSupport.of_block(Basis(*factors), torch.arange(2), torch.arange(2))
    new = FixedSupport.of_block(Basis(*factors), torch.arange(1, 3), torch.arange(1, 3))
    state = {"step": torch.tensor(9.0), "exp_avg": random(4, seed=1), "exp_avg_sq": random(4, seed=2).square() + 5}
    mean, square = state["exp_avg"][3].item(), state["exp_avg_sq"].clone()
    rotate_fixed_moments(state, BETAS, old, new)
    assert state["exp_avg"].tolist() == pytest.approx([mean, 0, 0, 0], abs=1e-12)
    assert state["exp_avg_sq"].tolist() == pytest.approx([square[3].item(), *[square.mean().item()] * 3])


def entries(shape):
    return list(itertools.product(*map(range, shape)))


def adam_state(gradients):
    """State of torch's Adam after these gradients, in float64."""
    parameter = torch.zeros_like(gradients[0]).requires_grad_()
    optimizer = torch.optim.Adam([parameter], betas=BETAS)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return optimizer.state[parameter]


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 200])
@pytest.mark.parametrize("shape", [(1, 5), (2, 2), (3, 4), (7, 5)])
def test_fixed_moments_equal_adams_in_the_new_basis_from_the_first_step_on(steps, shape):
    r, c = shape
    v, u = orthonormal(7, 1)[:, :r], orthonormal(5, 2)[:, :c]
    left, right = orthonormal(r, 3), orthonormal(c, 4)  # the new columns span the same rows and columns
    whole = torch.arange(r), torch.arange(c)
    old, new = (FixedSupport(*whole, None, *sides) for sides in ((v, u), (v @ left.T, u @ right)))

    def turned(gradients):
        state = {key: value.flatten() for key, value in adam_state(gradients).items() if key != "step"}
        state["step"] = torch.tensor(float(steps))
        rotate_fixed_moments(state, BETAS, old, new)
        return state["exp_avg"].view(shape), state["exp_avg_sq"].view(shape)

    # The mean is linear in the gradients, so it is Adam's for the rotated ones, whatever they are.
    gradients = [random(r, c, seed=seed) for seed in range(steps)]
    expected = adam_state([left @ gradient @ right for gradient in gradients])["exp_avg"]
    torch.testing.assert_close(turned(gradients)[0], expected, rtol=1e-10, atol=1e-10)
    # Equal gradients: the mean square is the square of the mean, in each basis. Where the rotated square is larger
    # than that of uncorrelated entries, the mean square is Adam's for the rotated gradient; else it is the latter.
    gradient = random(r, c, seed=99)
    rotated = left @ gradient @ right
    alone = torch.zeros(shape).double()
    for (i, j), (k, m) in itertools.product(entries(shape), entries(shape)):
        alone[i, j] += (left[i, k] * gradient[k, m] * right[m, j]) ** 2
    first, second = turned([gradient] * steps)
    state = adam_state([rotated] * steps)
    torch.testing.assert_close(first, state["exp_avg"], rtol=1e-10, atol=1e-10)
    correction = 1 - BETAS[1] ** steps
    expected = torch.where(rotated.square() >= alone, state["exp_avg_sq"], alone * correction)
    torch.testing.assert_close(second, expected, rtol=1e-9, atol=1e-12)
    assert (rotated.square() >= alone).any()


def test_a_fixed_support_in_another_order_changes_nothing_in_early_steps():
    """Adam of the full rotated gradient is the oracle: its entries do not depend on each other."""
    factors = orthonormal(7, 1), orthonormal(5, 2)
    turns = signed_permutation(7, 3), signed_permutation(5, 4)
    rows, columns = torch.tensor([0, 2, 6]), torch.tensor([1, 4])
    old = FixedSupport.of_block(Basis(*factors), rows, columns)
    # The same columns of V and U, in another place and with other signs.
    new_rows, new_columns = (turn[kept].abs().argmax(1) for turn, kept in zip(turns, (rows, columns), strict=True))
    turned = Basis(factors[0] @ turns[0], factors[1] @ turns[1])
    new = FixedSupport.of_block(turned, new_rows, new_columns)
    gradients = [random(7, 5, seed=seed) for seed in range(6)]
    state = adam_state([old.block_of(gradient).flatten() for gradient in gradients[:2]])
    rotate_fixed_moments(state, BETAS, old, new)
    parameter = torch.zeros(6).double().requires_grad_()
    optimizer = torch.optim.Adam([parameter], lr=0.1, betas=BETAS)
    optimizer.state[parameter] = state
    dense = torch.zeros(7, 5).double().requires_grad_()
    oracle = torch.optim.Adam([dense], lr=0.1, betas=BETAS)
    before = None
    for i, gradient in enumerate(gradients):
        dense.grad = factors[0].T @ gradient @ factors[1]
        oracle.step()
        if i == 1:
            before = dense.detach().clone()
        if i > 1:
            parameter.grad = new.block_of(gradient).flatten()
            optimizer.step()
    change = new.out_columns @ parameter.detach().view(3, 2) @ new.in_columns.T
    kept = torch.zeros(7, 5).double()
    kept[rows[:, None], columns] = (dense.detach() - before)[rows[:, None], columns]
    torch.testing.assert_close(change, factors[0] @ kept @ factors[1].T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("support", ["static", "structured"])
def test_fixed_supports_are_chosen_anew_at_the_present_weights(tmp_path, support):
    options = {"sparse_support": support, "sparse_train_rest": "head", "max_steps": 5}
    trainer = make(tmp_path, sparse_basis_refresh_steps=4, **options)
    layers, at_refresh = sparse_layers(trainer.model), {}

    class Watch(TrainerCallback):  # runs after the trainer's own callback, which was added first
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                at_refresh.update(copy.deepcopy(trainer.model.state_dict()))

    trainer.add_callback(Watch())
    trainer.train()
    twin = make(tmp_path, **options)
    twin.model.load_state_dict(at_refresh)
    twins = sparse_layers(twin.model)
    prepare_layers(twin, twins, twin.args)
    for name, layer in layers.items():
        (first, change), (second, later) = layer.changes()
        assert second is layer.support and change.abs().max() > 0 and later.abs().max() > 0
        assert torch.equal(second.out_columns, twins[name].support.out_columns)
        assert torch.equal(second.in_columns, twins[name].support.in_columns)
        assert torch.equal(layer.initial, twins[name].initial)  # the values are what the weight holds there
        assert layer.base_hash != twins[name].base_hash  # still that of the weight before training
        if support == "structured":
            assert not torch.equal(first.out_columns, second.out_columns)


def test_the_plan_counts_dense_moments_and_running_sums(tmp_path):
    def planned(**options):
        return training_plan(make(tmp_path, **options), measure_activations=False).memory["optimizer state"]

    own, dense, refreshed = planned(), planned(sparse_moments="dense"), planned(sparse_basis_refresh_steps=3)
    layers = sparse_layers(make(tmp_path).model).values()
    entries = sum(layer.weight.numel() for layer in layers)
    assert dense - own == 8 * entries - 16 * sum(layer.n_params for layer in layers)
    kinds = {layer.kind: layer for layer in layers}.values()
    assert refreshed - own == 4 * sum(layer.out_features**2 + layer.in_features**2 for layer in kinds)


@pytest.mark.parametrize("every, gradients, taken", [(100, 30, 25), (5, 30, 5), (6, 3, 3)])
def test_at_most_so_many_gradients_go_into_the_sums(every, gradients, taken):
    running, seen = RunningSums(every, gradients), 0
    for _ in range(every):
        running.begin_step()
        running.sums.clear()
        running.observe("kind", torch.eye(2))
        seen += len(running.sums)
    assert seen == taken <= gradients and running.due


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sparse_basis_refresh_steps": -1}, "sparse_basis_refresh_steps=-1 is out of range; pass 0"),
        ({"sparse_basis_refresh_steps": 5, "sparse_basis": "none"}, "is about the hosvd basis, but sparse_basis=none"),
        ({"sparse_skip_leading": 1.0, "sparse_support": "structured"}, "sparse_skip_leading=1.0 is out of range"),
        (
            {"sparse_skip_leading": 0.1, "sparse_support": "dynamic"},
            "is for sparse_support=structured in the hosvd basis, not dynamic in hosvd",
        ),
        ({"sparse_moments": "sparse"}, "sparse_moments='sparse' is unknown; choose from: own, dense"),
        (
            {"sparse_moments": "dense", "sparse_support": "static"},
            "sparse_moments=dense is for sparse_support=dynamic",
        ),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        SparseTrainingArguments(output_dir=str(tmp_path), **options)


def test_an_optimizer_without_a_basis_to_refresh(tmp_path):
    net = two_layers(4)
    net[0].basis = Basis(identity=True)
    with pytest.raises(ValueError, match="refresh_steps=5, but layers converted with basis='none' have none"):
        SparseAdamW(net.parameters(), [net[0]], refresh_steps=5)
