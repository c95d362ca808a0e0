"""Deltas: small, exact on their own base, refused on any other and when damaged."""

import pytest
import torch
from sparse_trainer import INPUTS, make
from test_families import build, inputs
from tiny import tiny_dataset, tiny_model

from hf_ft_ext import InputError, convert_to_sparse, load_delta, merge_sparse, save_delta
from hf_ft_ext.files import tensor_hash
from hf_ft_ext.sparse.basis import Basis
from hf_ft_ext.sparse.saved.delta import DELTA_FILE
from hf_ft_ext.sparse.saved.difference import differences

MODES = [
    {"sparse_support": "structured", "sparse_train_rest": "head"},
    {"sparse_support": "structured", "sparse_basis": "none", "sparse_train_rest": "LayerNorm"},
    {"sparse_support": "static"},
    {"sparse_support": "structured", "sparse_basis_refresh_steps": 3},
    {"sparse_support": "dynamic", "sparse_train_rest": "head"},
    {"sparse_support": "dynamic", "sparse_basis": "none"},
    {"sparse_support": "dynamic", "sparse_basis_refresh_steps": 3},
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("delta")
    trainer = make(folder, sparse_support="structured", sparse_train_rest="head")
    trainer.train()
    save_delta(trainer.model, folder)
    return trainer.model.eval(), folder


@pytest.mark.parametrize(
    ("mode", "resumed"),
    [*((mode, False) for mode in MODES), (MODES[0], True), (MODES[3], True), (MODES[6], True)],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_applied_to_its_base_it_gives_the_trained_model(tmp_path, mode, resumed):
    trainer = make(tmp_path, save_strategy="epoch", **mode)
    trainer.train()
    if resumed:
        trainer = make(tmp_path, save_strategy="epoch", num_train_epochs=3, **mode)
        trainer.train(resume_from_checkpoint=True)
    size = save_delta(trainer.model, tmp_path / "delta", base=tiny_model())
    assert size == (tmp_path / "delta" / DELTA_FILE).stat().st_size
    loaded = load_delta(tiny_model(), tmp_path / "delta").eval()
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-5, atol=1e-6)
    logits = trainer.model.eval()(**INPUTS).logits
    torch.testing.assert_close(loaded(**INPUTS).logits, logits, rtol=1e-5, atol=1e-6)
    assert (logits - tiny_model().eval()(**INPUTS).logits).abs().max() > 1e-3


@pytest.mark.parametrize("support", ["structured", "static"])
def test_a_second_training_of_the_model_adds_to_its_delta(tmp_path, support):
    model = tiny_model()
    for number in range(2):  # with other data, and so another support
        data = tiny_dataset(32, seed=number)
        trainer = make(tmp_path, model, data, sparse_support=support, sparse_train_rest="head", max_steps=2)
        trainer.train()
    save_delta(model, tmp_path)
    loaded = load_delta(tiny_model(), tmp_path)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_running_statistics_belong_to_the_changes(tmp_path):
    model, base = (with_batch_norm().requires_grad_(False) for _ in range(2))
    convert_to_sparse(model, basis="none")
    model.train()(**INPUTS)
    save_delta(model, tmp_path, base)
    assert torch.equal(load_delta(base, tmp_path).eval()(**INPUTS).logits, model.eval()(**INPUTS).logits)


def with_batch_norm():
    model = tiny_model()
    model.classifier = torch.nn.Sequential(model.classifier, torch.nn.BatchNorm1d(2))
    return model


def test_other_families(tmp_path):
    model, _ = build("gpt2")
    trainer = make(tmp_path, model, sparse_support="structured", sparse_train_rest="head")
    trainer.train()
    save_delta(trainer.model, tmp_path)
    loaded = load_delta(build("gpt2")[0], tmp_path).eval()
    logits = trainer.model.eval()(**inputs("gpt2")).logits
    torch.testing.assert_close(loaded(**inputs("gpt2")).logits, logits, rtol=1e-5, atol=1e-6)


def test_the_delta_is_small_if_layers_share_rows_and_columns(tmp_path):
    trainer = make(tmp_path, tiny_model(num_hidden_layers=8), sparse_support="structured", sparse_train_rest="head")
    trainer.args.sparse_basis_steps = 1
    trainer.train()
    with_two = save_delta(trainer.model, tmp_path)
    whole = sum(p.numel() * 4 for p in tiny_model(num_hidden_layers=8).parameters())
    assert with_two < 0.25 * whole  # of a model this tiny; the factors are there once, not eight times
    per_layer = make(
        tmp_path / "b",
        tiny_model(num_hidden_layers=8),
        sparse_support="structured",
        sparse_train_rest="head",
        sparse_basis_scope="layer",
    )
    per_layer.train()
    assert save_delta(per_layer.model, tmp_path / "b") > 1.5 * with_two


@pytest.mark.parametrize("part", ["bert.encoder.layer.0.output.dense.weight", "bert.embeddings.LayerNorm.weight"])
def test_another_base_is_refused_and_left_unchanged(trained, part):
    _, folder = trained
    other = tiny_model()
    with torch.no_grad():
        other.get_parameter(part).view(-1)[0] += 1e-3
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(InputError, match="belongs to other weights than this BertForSequenceClassification"):
        load_delta(other, folder)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())


def test_applying_twice_and_to_another_model_are_refused(trained):
    _, folder = trained
    model = load_delta(tiny_model(), folder)
    with pytest.raises(InputError, match="apply the delta once"):
        load_delta(model, folder)
    with pytest.raises(InputError, match=r"another model: this one has no bert\.encoder"):
        load_delta(tiny_model("distilbert"), folder)
    with pytest.raises(InputError, match=r"classifier\.(weight|bias) has another shape"):
        load_delta(tiny_model(num_labels=3), folder)


def test_damaged_and_missing_files(trained, tmp_path):
    _, folder = trained
    with pytest.raises(InputError, match=f"holds no {DELTA_FILE}"):
        load_delta(tiny_model(), tmp_path)
    data = (folder / DELTA_FILE).read_bytes()
    (tmp_path / DELTA_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read"):
        load_delta(tiny_model(), tmp_path)
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / DELTA_FILE)
    with pytest.raises(InputError, match="is not of the format 'hf_ft_ext sparse delta"):
        load_delta(tiny_model(), tmp_path)


def test_dynamic_support_needs_its_base(tmp_path):
    trainer = make(tmp_path, sparse_train_rest="head")
    with pytest.raises(
        InputError, match="needs converted layers and a support that has been chosen: train first, merge afterwards"
    ):
        save_delta(trainer.model, tmp_path, base=tiny_model())
    trainer.train()
    with pytest.raises(InputError, match="pass base=, the plain model that training started from"):
        save_delta(trainer.model, tmp_path)
    other = tiny_model()
    with torch.no_grad():
        other.bert.embeddings.LayerNorm.weight[0] += 1
    with pytest.raises(InputError, match=r"weights that training started from \(bert.embeddings.LayerNorm"):
        save_delta(trainer.model, tmp_path, base=other)
    with pytest.raises(InputError, match="not a plain model of the trained model's architecture"):
        save_delta(trainer.model, tmp_path, base=tiny_model("distilbert"))
    assert not (tmp_path / DELTA_FILE).exists()


def test_a_given_base_is_checked_with_fixed_support_too(trained, tmp_path):
    model, _ = trained
    other = tiny_model()
    with torch.no_grad():
        other.bert.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(InputError, match=r"weights that training started from \(bert.encoder.layer.0.output"):
        save_delta(model, tmp_path, base=other)


def test_a_support_that_is_not_chosen_yet_and_a_merged_model_have_no_delta(tmp_path):
    trainer = make(tmp_path, sparse_support="structured")
    for model in (trainer.model, tiny_model()):
        with pytest.raises(InputError, match="needs converted layers and a support that has been chosen"):
            save_delta(model, tmp_path)


def test_difference_keeps_what_changed_and_drops_rounding():
    torch.manual_seed(0)
    basis = Basis(*(torch.linalg.qr(torch.randn(n, n))[0] for n in (48, 32)))
    pairs = {}
    for name in "abcd":
        base, change = torch.randn(48, 32) * 0.05, torch.zeros(48, 32)
        change.view(-1)[torch.randperm(48 * 32)[:90]] = 1e-3
        pairs[name] = (base.clone(), base)
        for _ in range(5):
            pairs[name][0].add_(basis.out_factor @ (change / 5) @ basis.in_factor.T)
    chosen, found = differences(pairs, basis)
    assert chosen is basis  # 4 x 90 entries and the factors take less than 4 x 1,536 changes
    for name, (weight, base) in pairs.items():
        assert 90 <= found[name].values.numel() < 100  # a rounding may exceed the bound
        rebuilt = base.clone()
        found[name].add_to(rebuilt, chosen)
        torch.testing.assert_close(rebuilt, weight, rtol=0, atol=5e-7)
    everywhere, plain = differences({"a": (base + 1e-3 * torch.randn(48, 32), base)}, basis)
    assert everywhere.identity and plain["a"].values.numel() > 1500


def test_half_precision_is_rounded_once(tmp_path):
    trainer = make(tmp_path, tiny_model().bfloat16(), sparse_train_rest="head")
    trainer.train()
    save_delta(trainer.model, tmp_path, base=tiny_model().bfloat16())
    loaded = load_delta(tiny_model().bfloat16(), tmp_path).state_dict()
    changed = 0
    for name, value in merge_sparse(trainer.model).state_dict().items():
        torch.testing.assert_close(loaded[name], value, rtol=2**-7, atol=0)
        changed += int((loaded[name] != value).sum())
    assert changed <= 2  # a tie of rounding


def test_hash_sees_type_shape_and_bytes():
    tensor = torch.arange(6.0)
    variants = [tensor, tensor.double(), tensor.view(2, 3), tensor + 1e-6, tensor.bfloat16(), torch.tensor(1.0)]
    assert len({tensor_hash(variant) for variant in variants}) == len(variants)
    assert tensor_hash(tensor) == tensor_hash(tensor.view(2, 3).T.T.reshape(6))
