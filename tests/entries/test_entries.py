"""Training chosen entries: gradients, updates, files, memory, bad input."""

import copy
import io
import pickle

import pytest
import torch
from peft import PeftModel
from tiny import tiny_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from hf_ft_ext import attach_entries, convert_to_sparse, export_shira, load_entries, merge_entries, save_entries
from hf_ft_ext.entries.choice import largest_entries, random_entries
from hf_ft_ext.entries.layer import entries_of
from hf_ft_ext.errors import InputError

BATCH = {
    "input_ids": torch.arange(5, 25).view(2, 10),
    "attention_mask": torch.ones(2, 10, dtype=torch.long),
    "labels": torch.tensor([0, 1]),
}
CHOSEN = {
    "bert.embeddings.word_embeddings.weight": torch.tensor([32 * 7 + 3, 32 * 6, 5]),
    "bert.encoder.layer.0.output.dense.weight": torch.tensor([0, 700, 31]),
    "bert.encoder.layer.0.output.dense.bias": torch.tensor([4]),
    "bert.encoder.layer.1.output.LayerNorm.weight": torch.tensor([1, 2]),
}


def entered(**config):
    model = tiny_model(**config)
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("classifier"))
    attach_entries(model, CHOSEN)
    return model.eval()


def loss(model) -> torch.Tensor:
    return model(**BATCH).loss


def train(model, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()


def test_gradients_and_optimizer_state_have_the_size_of_the_entries():
    model, dense = entered(), tiny_model().eval()
    loss(dense).backward()
    loss(model).backward()
    own = dict(dense.named_parameters())
    for name, entries in entries_of(model).items():
        expected = own[name].grad.flatten()[CHOSEN[name].sort().values]
        torch.testing.assert_close(entries.values.grad, expected)
    assert [n for n, p in model.named_parameters() if p.grad is not None and "classifier" not in n] == [
        f"{n}_entries.values" for n in CHOSEN
    ]
    optimizer = torch.optim.AdamW([e.values for e in entries_of(model).values()])
    optimizer.step()
    state = [t for values in optimizer.state.values() for t in values.values() if t.dim()]
    assert sum(t.numel() for t in state) == 2 * 9


def test_only_the_entries_change_and_names_stay(tmp_path):
    model, before = entered(), tiny_model().state_dict()
    assert model.state_dict().keys() == before.keys()
    train(model)
    after = model.state_dict()
    for name, value in before.items():
        moved = set((after[name] != value).flatten().nonzero().flatten().tolist())
        if name in CHOSEN:
            # an embedding of a token that the batch has not got has no gradient
            assert moved <= set(CHOSEN[name].tolist()) and moved
        else:
            assert bool(moved) == name.startswith("classifier")
    expected = model(**BATCH).logits
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**BATCH).logits, expected)
    assert f"{next(iter(CHOSEN))}_entries.indices" in model._ddp_params_and_buffers_to_ignore
    merged = merge_entries(model)
    assert not model._ddp_params_and_buffers_to_ignore  # of several processes, all have to train the same weights
    assert type(merged.bert.encoder.layer[0].output.dense) is torch.nn.Linear and not entries_of(merged)
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in tiny_model().named_parameters()}
    assert torch.equal(merged(**BATCH).logits, expected)


def test_training_equals_dense_training_with_a_mask():
    model, dense = entered(), tiny_model().eval()
    own = dict(dense.named_parameters())
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        sgd.zero_grad()
        loss(model).backward()
        sgd.step()
        dense.zero_grad()
        loss(dense).backward()
        with torch.no_grad():
            for name, p in own.items():
                kept = torch.zeros_like(p).flatten()
                kept[CHOSEN.get(name, torch.arange(p.numel()) if "classifier" in name else [])] = 1
                p -= 0.1 * p.grad * kept.view_as(p)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, dense.state_dict()[name])


def test_weights_cut_from_one_stored_weight_train():
    whole, inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 4, requires_grad=True)
    weights = [nn.Parameter(whole[:4]), nn.Parameter(whole[4:])]
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[0].weight, model[1].weight = weights
    expected = whole.clone().unflatten(0, (2, 4)).requires_grad_()
    attach_entries(model, {"0.weight": torch.arange(16), "1.weight": torch.arange(16)})
    optimizers = [torch.optim.SGD(trained, lr=0.1) for trained in (model.parameters(), [expected])]
    for _ in range(3):
        model(inputs).square().sum().backward()
        (inputs @ expected[0].T @ expected[1].T).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(torch.stack([merge_entries(model)[i].weight for i in range(2)]), expected)


def test_weights_that_are_not_contiguous_train_and_load(tmp_path):
    weight = torch.randn(6, 4).T
    models = [nn.Sequential(nn.Linear(6, 4, bias=False)) for _ in range(2)]
    for model in models:
        model[0].weight = nn.Parameter(weight.clone())
    attach_entries(models[0], {"0.weight": torch.arange(3)})
    optimizer = torch.optim.SGD(models[0].parameters(), lr=0.1)
    models[0](torch.ones(2, 6)).sum().backward()
    optimizer.step()
    expected = weight.clone()
    expected[0, :3] -= 0.2
    save_entries(models[0], tmp_path)
    torch.testing.assert_close(models[0][0].weight.detach(), expected)
    torch.testing.assert_close(load_entries(models[1], tmp_path)[0].weight.detach(), expected)


def test_the_order_of_the_parameters_is_the_model_s():
    orders = []
    for names in (list(CHOSEN), list(reversed(CHOSEN))):
        model = tiny_model()
        attach_entries(model, {name: CHOSEN[name] for name in names})
        orders.append([name for name, _ in model.named_parameters()])
    assert orders[0] == orders[1]


def test_small_changes_are_not_lost_in_half_precision():
    model = entered().bfloat16()
    for entries in entries_of(model).values():
        entries.values.data = entries.values.data.float()
    entries = next(iter(entries_of(model).values()))
    weight = model.bert.embeddings.word_embeddings._buffers["weight"].flatten()[entries.indices].clone()
    with torch.no_grad():
        for _ in range(64):
            entries.values += weight.float().abs() * 2**-10  # an eighth of what bfloat16 can tell
    model(**BATCH)
    after = model.bert.embeddings.word_embeddings._buffers["weight"].flatten()[entries.indices]
    assert after.dtype == torch.bfloat16 and (after != weight)[weight != 0].all()


def test_loading_weights_updates_the_values():
    model = entered()
    other = tiny_model(seed=3).state_dict()
    assert not any(model.load_state_dict(other))
    for name, entries in entries_of(model).items():
        assert torch.equal(entries.values, other[name].flatten()[entries.indices])
    assert torch.equal(model(**BATCH).logits, tiny_model(seed=3).eval()(**BATCH).logits)


def test_the_delta_is_small_and_exact(tmp_path):
    model = entered()
    train(model)
    size = save_entries(model, tmp_path)
    assert size < 4000
    loaded = load_entries(tiny_model(), tmp_path).eval()
    assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_deltas_that_do_not_fit_are_refused(tmp_path):
    model = entered()
    save_entries(model, tmp_path)
    plain = tiny_model(seed=1)
    before = {n: p.clone() for n, p in plain.named_parameters()}
    with pytest.raises(InputError, match="belongs to other weights than this BertForSequenceClassification has"):
        load_entries(plain, tmp_path)
    with pytest.raises(InputError, match=r"belongs to another model: this one has no bert\."):
        load_entries(tiny_model("roberta"), tmp_path)
    with pytest.raises(InputError, match=r"classifier\.\w+ has another shape here \(the label count"):
        load_entries(tiny_model(num_labels=3), tmp_path)
    with pytest.raises(InputError, match="already trains entries; load the delta into the plain model"):
        load_entries(entered(), tmp_path)
    with pytest.raises(InputError, match=r"holds no entries_delta\.safetensors"):
        load_entries(plain, tmp_path / "none")
    (tmp_path / "entries_delta.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"cannot be read .*copy it again"):
        load_entries(plain, tmp_path)
    assert all(torch.equal(p, before[n]) for n, p in plain.named_parameters())
    with pytest.raises(InputError, match="no part of the model trains"):
        save_entries(tiny_model().requires_grad_(False), tmp_path)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"bert.none": torch.tensor([0])}, r"the model has no parameter 'bert\.none'"),
        (
            {"classifier.bias": torch.tensor([2])},
            r"classifier\.bias has 2 entries; pass at least one index, and only indices from 0 to 1",
        ),
        ({"classifier.bias": torch.tensor([], dtype=torch.long)}, r"classifier\.bias has 2 entries"),
        ({"classifier.bias": torch.tensor([False, True])}, r"bias got a boolean mask, .* pass mask\.flatten"),
        ({"classifier.bias": torch.tensor([1.0])}, r"have the shape \(1,\) and type float32; pass flat"),
        ({"classifier.bias": torch.tensor([[0, 1]])}, r"have the shape \(1, 2\) and type int64; pass flat positions"),
        ({"classifier.bias": torch.tensor([1, 1])}, r"once \(2 indices of 1 entries\).* pass indices\.unique"),
        ({"classifier.bias": [0, 1]}, r"indices of classifier\.bias are a list; pass torch\.tensor\(indices\)"),
    ],
)
def test_entries_that_do_not_fit_are_refused(chosen, message):
    with pytest.raises(InputError, match=message):
        attach_entries(tiny_model(), chosen)


def test_entries_of_trained_entries_are_refused():
    model = tiny_model()
    attach_entries(model, {"classifier.bias": torch.tensor([1])})
    for name in ("classifier.bias", "classifier.bias_entries.values"):
        with pytest.raises(
            InputError, match=r"already trains entries of classifier\.bias; call merge_entries\(model\)"
        ):
            attach_entries(model, {name: torch.tensor([0])})
    attach_entries(model, {"classifier.weight": torch.tensor([0])})


def test_shared_weights_are_refused():
    model = tiny_model()
    model.bert.encoder.layer[1].output.dense.weight = model.bert.encoder.layer[0].output.dense.weight
    with pytest.raises(InputError, match=r"is also bert\.encoder\.layer\.1\.output\.dense\.weight; entries of shared"):
        attach_entries(model, {"bert.encoder.layer.0.output.dense.weight": torch.tensor([0])})


def test_largest_entries_over_all_tensors():
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(7, 3, generator=generator), "b": torch.rand(5, generator=generator), "c": torch.zeros(4)}
    every = sorted(((v.item(), n, i) for n, t in scores.items() for i, v in enumerate(t.flatten())), reverse=True)
    for k in (1, 6, 20):
        chosen = largest_entries(scores, k)
        assert {(n, i) for n, t in chosen.items() for i in t.tolist()} == {(n, i) for _, n, i in every[:k]}


def test_random_entries_are_distinct_over_all_tensors():
    shapes = {"a": torch.Size([100, 10]), "b": torch.Size([9000])}
    chosen = random_entries(shapes, 2000, 0)
    assert sum(len(t) for t in chosen.values()) == 2000 and all(len(t.unique()) == len(t) for t in chosen.values())
    assert 120 < len(chosen["a"]) < 280 and int(chosen["b"].max()) < 9000 and int(chosen["b"].max()) > 8900
    assert torch.equal(chosen["b"], random_entries(shapes, 2000, 0)["b"])
    assert not torch.equal(chosen["b"][:50], random_entries(shapes, 2000, 1)["b"][:50])


@pytest.mark.parametrize("k", [7, 8])
def test_random_entries_can_be_nearly_all_or_all(k):
    chosen = random_entries({"a": torch.Size([5]), "b": torch.Size([3])}, k, 0)
    pairs = {(name, i) for name, indices in chosen.items() for i in indices.tolist()}
    assert len(pairs) == sum(len(indices) for indices in chosen.values()) == k
    assert pairs <= {("a", i) for i in range(5)} | {("b", i) for i in range(3)}


def test_values_are_compared_once_a_step_and_not_at_each_read(monkeypatch):
    model = entered()
    train(model, 1)
    compared = []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: compared.append(a) or equal(a, b))
    for _ in range(3):  # evaluation
        loss(model)
    assert len(compared) == len(CHOSEN)
    loss(model).backward()
    loss(model).backward()  # accumulation: nothing has changed, but may have
    assert len(compared) == 2 * len(CHOSEN)
    with torch.no_grad():
        for entries in entries_of(model).values():
            entries.values += 1
    before = len(compared)
    changed = loss(model)
    assert len(compared) == before + len(CHOSEN) and not torch.equal(changed, loss(tiny_model().eval()))


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode])
def test_values_exchanged_for_an_evaluation_are_used_and_given_back(inference):
    """Averages of weights are exchanged through `data`, which leaves no new version."""
    model = entered()
    train(model, 1)
    values = [entries.values for entries in entries_of(model).values()]
    averages = [value.detach() + 0.5 for value in values]
    merged = copy.deepcopy(model)
    for value, average in zip([entries.values for entries in entries_of(merged).values()], averages, strict=True):
        value.data = average.clone()
    expected = [loss(merge_entries(merged)).item(), loss(model).item()]
    before = loss(model)  # its graph holds the weights
    found = []
    for _ in range(2):
        for value, average in zip(values, averages, strict=True):
            own = value.data.clone()
            value.data.copy_(average)
            average.copy_(own)
        with inference():
            found.append(loss(model).item())
    assert found == expected and abs(found[0] - found[1]) > 1e-4
    before.backward()
    assert loss(model).item() == expected[1]


@pytest.mark.parametrize("how", ["copy", "pickle", "torch"])
def test_a_model_with_entries_can_be_copied_and_stored(how):
    model = entered()
    train(model, 1)
    if how == "torch":
        torch.save(model, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(model) if how == "copy" else pickle.loads(pickle.dumps(model))
    assert torch.equal(loss(other), loss(model))
    before = loss(model).item()
    train(other, 1)
    train(model, 1)
    assert loss(other).item() == loss(model).item() != before
    assert type(merge_entries(other).bert.encoder.layer[0].output.dense) is torch.nn.Linear


# --- SHiRA -------------------------------------------------------------------------------------------

WEIGHTS = {
    "bert.encoder.layer.0.output.dense.weight": torch.tensor([0, 700, 31]),
    "bert.encoder.layer.1.attention.self.query.weight": torch.arange(90),  # more than in + out = 64
    "bert.encoder.layer.1.output.LayerNorm.weight": torch.tensor([1, 2]),  # no linear layer: saved in full
}


def shira_logits(folder):
    loaded = PeftModel.from_pretrained(tiny_model(), folder).eval()
    assert loaded.peft_config["default"].peft_type == "SHIRA"
    return loaded(**BATCH).logits


def test_entries_of_linear_weights_become_a_shira_adapter(tmp_path):
    model = tiny_model()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("classifier"))
    attach_entries(model, WEIGHTS)
    train(model.eval())
    export_shira(model, tmp_path)
    expected = model(**BATCH).logits
    torch.testing.assert_close(shira_logits(tmp_path), expected, rtol=1e-5, atol=1e-6)
    assert (expected - tiny_model().eval()(**BATCH).logits).abs().max() > 1e-3


def test_static_support_without_a_basis_becomes_a_shira_adapter(tmp_path):
    from hf_ft_ext.sparse.basis import Basis
    from hf_ft_ext.sparse.fixed import FixedSupport
    from hf_ft_ext.sparse.optimizer import SparseAdamW

    model = tiny_model().requires_grad_(False).eval()
    layers = convert_to_sparse(model, n_params=70, support="static", basis="none")
    for seed, layer in enumerate(layers.values()):
        chosen = torch.randperm(layer.weight.numel(), generator=torch.Generator().manual_seed(seed))[:70].sort().values
        layer.set_support(FixedSupport.of_entries(Basis(identity=True), chosen, layer.in_features))
    optimizer = SparseAdamW([layer.values for layer in layers.values()], layers.values(), lr=0.05)
    for _ in range(3):
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.fresh_parameters = ()
    export_shira(model, tmp_path)
    expected = model(**BATCH).logits
    torch.testing.assert_close(shira_logits(tmp_path), expected, rtol=1e-5, atol=1e-6)
    assert (expected - tiny_model().eval()(**BATCH).logits).abs().max() > 1e-3


DENSE = {  # one r for all layers: 18, and the smaller layer holds 16 at most
    "bert.encoder.layer.0.output.dense.weight": torch.arange(1400),
    "bert.encoder.layer.1.attention.self.query.weight": torch.arange(3),
}
PARENT = {  # the attention has a parameter of its own, and the linear layer inside
    "deberta.encoder.layer.0.attention.self.q_bias": torch.arange(3),
    "deberta.encoder.layer.0.attention.self.in_proj.weight": torch.arange(3),
}


def test_what_shira_cannot_hold_is_saved_in_full(tmp_path):
    model = tiny_model().requires_grad_(False)
    attach_entries(model, DENSE)
    train(model.eval())
    export_shira(model, tmp_path)
    torch.testing.assert_close(shira_logits(tmp_path), model(**BATCH).logits, rtol=1e-5, atol=1e-6)


def test_a_delta_holds_running_statistics(tmp_path):
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    attach_entries(models[0], {"0.weight": torch.arange(2)})
    models[0](torch.randn(5, 3))
    save_entries(models[0], tmp_path)
    load_entries(models[1], tmp_path)
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name
    assert models[1][1].running_mean.any()


def test_models_that_shira_does_not_support_are_refused(tmp_path):
    with pytest.raises(InputError, match="no entries of linear weights train, but SHiRA supports only those"):
        export_shira(tiny_model(), tmp_path)
    model = tiny_model().requires_grad_(False)
    attach_entries(model, {"bert.encoder.layer.0.output.dense.weight": torch.arange(1536)})
    with pytest.raises(
        InputError, match=r"saved in full, in bert\.enc.*output\.dense, classifier, but SHiRA needs one"
    ):
        export_shira(model, tmp_path)
    model = entered()
    with pytest.raises(
        InputError, match=r"the bias of bert\.encoder\.layer\.0\.output\.dense trained in addition to entries"
    ):
        export_shira(model, tmp_path)
