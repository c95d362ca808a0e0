"""Searches of models that accelerate offloads: bit for bit the search of the loaded model."""

import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from other_models import loss_of, other_batch, other_model
from safetensors.torch import load_file
from tiny import one_layer_model, tiny_dataset, tiny_masked_lm, tiny_tokenizer
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ft_ext import (
    SPSA,
    ActivityPerturbation,
    DirectSearch,
    GradientlessTrainer,
    GradientlessTrainingArguments,
    InputError,
    SparseTrainer,
    SparseTrainingArguments,
    apply_trajectory,
    save_trajectory,
)
from hf_ft_ext.launch.trainers import check_model_placement
from hf_ft_ext.offload import has_offloaded, hold_offloaded, keep_loaded

CPU = torch.device("cpu")
IDS = torch.arange(5, 37).view(4, 8)
FORMS = ("disk", "disk-buffers", "cpu", "device_map", "dispatch", "preload")
SEARCHES = {
    "mezo": {},
    "lozo-m": {"direction": "lozo", "update": "momentum"},
    "subzero-at-once": {"direction": "subzero", "rank": 2, "candidates_per_forward": 2},
    "adam-at-once": {"update": "adam", "candidates_per_forward": 2},
    "momentum": {"update": "momentum", "direction": "rademacher"},
    "fzoo": {"direction": "rademacher-outer", "estimate": "one-sided", "num_directions": 3},
    "small": {"small": 0.3, "update": "conservative"},
    "forward": {"estimate": "forward"},
    "carry": {"carry": True, "weight_decay": 0.1},
}


def loaded(kind="bert", dtype=torch.float32):
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 60, "bos_token_id": 1, "eos_token_id": 1}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    else:
        model = tiny_masked_lm(num_hidden_layers=1) if kind == "mlm" else one_layer_model(kind)
    return model.to(dtype).eval()


def offloaded(model, form, folder):
    """The model, offloaded in one of accelerate's ways."""
    if form == "device_map":  # reads the checkpoint's own file
        model.save_pretrained(folder / "checkpoint")
        options = {"device_map": {"": "disk"}, "offload_folder": str(folder / "changed"), "dtype": model.dtype}
        return type(model).from_pretrained(folder / "checkpoint", **options).eval()
    if form == "dispatch":  # the part that is not offloaded stays loaded
        parts = {name: "cpu" for name, _ in model.named_children()}
        first = next(iter(parts))
        places = {f"{first}.{name}": "disk" for name, _ in model.get_submodule(first).named_children()}
        return dispatch_model(model, {**parts, **places}, offload_dir=str(folder))
    if form == "cpu":
        return cpu_offload(model, CPU)
    classes = ["BertLayer"] if form == "preload" else None  # all weights of a layer are loaded together
    buffers = form == "disk-buffers"
    return disk_offload(model, str(folder), CPU, offload_buffers=buffers, preload_module_classes=classes)


class Batch:
    """Closure and `evaluate` of a batch, for all kinds of models."""

    def __init__(self, model):
        self.model = model
        self.words = not type(model).__name__.endswith("ForSequenceClassification")
        self.labels = IDS if self.words else torch.tensor([0, 1, 0, 1])

    def losses(self, n=1):
        logits = self.model(input_ids=IDS.repeat(n, 1)).logits
        logits = logits.view(n, len(IDS), *logits.shape[1:])
        return torch.stack([cross_entropy(one.flatten(0, -2).float(), self.labels.flatten()) for one in logits])

    repeated = losses

    def __call__(self):
        return self.losses()[0]

    def rows(self):
        return cross_entropy(self.model(input_ids=IDS).logits, self.labels, reduction="none")


def searched(model, steps=3, **options):
    """Final values, and everything that the steps reported."""
    batch, search = Batch(model), SPSA(model.parameters(), model, lr=1e-3, **options)
    means = [search.step(batch, batch) for _ in range(steps)]
    with torch.no_grad():
        final = float(batch())
    values = [value.clone() for value in search.perturbed_forward.tensors]
    return values, (means, search.record, final, search.batches, search.evaluations)


SHORT, LONG = torch.bfloat16, torch.float32
CASES = [
    *itertools.product(("bert",), FORMS, ("mezo", "adam-at-once"), (LONG,)),
    *itertools.product(("gpt2",), ("disk", "cpu", "device_map"), ("mezo",), (LONG,)),  # with tied weights
    *itertools.product(("mlm",), ("disk", "cpu", "device_map"), ("lozo-m",), (SHORT,)),
    *itertools.product(("bert",), ("disk",), SEARCHES, (SHORT,)),
]


@pytest.mark.parametrize("name", ["t5", "whisper", "mixtral", "clip"])
def test_other_families(tmp_path, name):
    """Encoder-decoders, experts and images, with tied weights and unusual modules."""
    batch, ends = other_batch(name), []
    for form in (None, "disk"):
        model = other_model(name) if form is None else offloaded(other_model(name), form, tmp_path)
        search = SPSA(model.parameters(), model, lr=1e-3)
        search.step(lambda model=model: loss_of(model, batch))
        ends.append([value.clone() for value in search.perturbed_forward.tensors])
    assert len(ends[0]) == len(ends[1])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(("kind", "form", "name", "dtype"), CASES)
def test_an_offloaded_search_equals_the_loaded_one(tmp_path, kind, form, name, dtype):
    options = SEARCHES[name]
    start = [p.detach().clone() for p in loaded(kind, dtype).parameters()]
    expected, facts = searched(loaded(kind, dtype), **options)
    model = offloaded(loaded(kind, dtype), form, tmp_path)
    assert has_offloaded(model)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    found, told = searched(model, **options)
    assert told == facts
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert not all(map(torch.equal, found, start))
    assert all(path.read_bytes() == content for path, content in files.items()), "the offloaded originals changed"
    if "candidates_per_forward" in options:
        assert facts[3], "the candidates did not run at once"


def test_a_list_of_parameters_with_tied_copies_and_groups(tmp_path):
    """`cpu_offload` gives the two modules of a tied weight two parameters."""
    expected, facts = searched(loaded("gpt2"))
    model = offloaded(loaded("gpt2"), "cpu", tmp_path)
    named = list(model.named_parameters())
    assert len(named) == len(expected) + 1
    search, batch = SPSA(named, model, lr=1e-3), Batch(model)
    for _ in range(3):
        search.step(batch, batch)
    assert search.record == facts[1]
    assert all(map(torch.equal, search.perturbed_forward.tensors, expected))


def test_parameters_keep_their_identity(tmp_path):
    model = offloaded(loaded(), "disk", tmp_path)
    hold_offloaded(model)
    before = list(model.parameters())
    with torch.no_grad():
        model(input_ids=IDS)
        hold_offloaded(model)  # once more: nothing changes
        model(input_ids=IDS)
    assert all(p is q and p.is_meta for p, q in zip(before, model.parameters(), strict=True))
    named = dict(model.named_parameters())
    size = keep_loaded(model, [named["classifier.weight"]])
    now = dict(model.named_parameters())
    assert [name for name, p in now.items() if not p.is_meta] == ["classifier.weight", "classifier.bias"]
    assert size == 4 * (2 * 32 + 2)
    with torch.no_grad():
        expected = loaded()(input_ids=IDS).logits
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert now["classifier.weight"] is model.classifier.weight


def test_resume_saved_files_and_trajectory(tmp_path):
    """State, trajectory and saved model of an offloaded search are those of the loaded one."""
    options = {"lr": 1e-3, "update": "adam", "seed": 3}
    ends = []
    for form in (None, "disk"):
        model = loaded() if form is None else offloaded(loaded(), form, tmp_path / "offloaded")
        batch, search = Batch(model), SPSA(model.parameters(), model, **options)
        search.step(batch)
        state = copy.deepcopy(search.state_dict())
        again = SPSA(model.parameters(), model, **options)
        again.load_state_dict(state)
        again.step(batch)
        save_trajectory(again, model, tmp_path / f"{form}.safetensors")
        if form is not None:
            model.hf_device_map = {"": "disk"}  # what `save_pretrained` looks for
        model.save_pretrained(tmp_path / str(form))
        ends.append([value.clone() for value in again.perturbed_forward.tensors])
    assert all(map(torch.equal, *ends))
    saved = [type(loaded()).from_pretrained(tmp_path / str(form)) for form in (None, "disk")]
    assert all(map(torch.equal, *[list(model.parameters()) for model in saved]))
    base = offloaded(loaded(), "disk", tmp_path / "base")
    apply_trajectory(base, tmp_path / "disk.safetensors")
    with torch.no_grad():
        assert torch.equal(base(input_ids=IDS).logits, saved[0].eval()(input_ids=IDS).logits)
    with pytest.raises(InputError, match="these are not the weights that the search started from"):
        apply_trajectory(base, tmp_path / "disk.safetensors")


def test_a_loaded_head_above_an_offloaded_encoder(tmp_path):
    """The searches that keep buffers or change tensors in place, on parameters that are not offloaded."""

    def heads(kind):
        ends = []
        for form in (None, "dispatch"):
            model = loaded() if form is None else offloaded(loaded(), form, tmp_path / kind.__name__)
            batch, head = Batch(model), list(model.classifier.parameters())
            if kind is DirectSearch:
                search, closure = DirectSearch(head, lr=0.1, seed=1), batch
            else:
                search, closure = kind(head, model, lr=1e-2, seed=1), batch
            closure = batch.rows if kind is ActivityPerturbation else closure
            for _ in range(3):
                search.step(closure)
            ends.append([p.detach().clone() for p in head])
        return ends

    for kind in (SPSA, DirectSearch, ActivityPerturbation):
        assert all(map(torch.equal, *heads(kind))), kind


class Halves(nn.Module):
    """The second layer is read by the model itself, not by its own forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.first(x) @ self.second.weight


def test_what_cannot_be_searched_is_refused(tmp_path):
    model = offloaded(loaded(), "disk", tmp_path / "a")
    old = list(model.parameters())
    with torch.no_grad():
        model(input_ids=IDS)
    with pytest.raises(InputError, match=r"on the meta device, .* pass model.parameters\(\) as they are now"):
        SPSA(old, model)
    for kind in (DirectSearch, lambda parameters: ActivityPerturbation(parameters, model)):
        with pytest.raises(InputError, match=r"is offloaded .* changes tensors in place; keep its module loaded"):
            kind(model.parameters())
    checkpoint = tmp_path / "checkpoint"
    loaded().save_pretrained(checkpoint)
    model = type(loaded()).from_pretrained(checkpoint, device_map={"": "disk"})
    with pytest.raises(InputError, match=r"read from the checkpoint's own file, .* pass offload_folder"):
        SPSA(model.parameters(), model)
    parts = {"transformer": "disk", "lm_head": "cpu"}
    tied = dispatch_model(loaded("gpt2"), parts, offload_dir=str(tmp_path / "b"))
    with pytest.raises(InputError, match=r"transformer.wte.weight is offloaded, and lm_head.weight, which shares"):
        SPSA(tied.parameters(), tied)
    mamba, batch = cpu_offload(other_model("mamba"), CPU), other_batch("mamba")
    search = SPSA(mamba.parameters(), mamba)
    with pytest.raises(InputError, match=r"8 searched tensors .* are offloaded and read by other code than their mod"):
        search.step(lambda: loss_of(mamba, batch))
    halves = cpu_offload(nn.Sequential(Halves()), CPU, preload_module_classes=["Halves"])
    search = SPSA(halves.parameters(), halves)
    search.perturbed_forward.read_elsewhere(2)
    with pytest.raises(InputError, match="weight of Linear is offloaded and read by other code"):
        search.step(lambda: halves(torch.ones(2, 3)).sum())


# --- the trainer ------------------------------------------------------------------------------------------

BOTH = {"search_method": "spsa", "search_candidates_per_forward": 2}
TRAINED = {
    "gld": ({}, "disk"),
    "node": ({"search_method": "node"}, "device_map"),
    "spsa-head": ({"search_method": "spsa"}, "disk"),
    "activity": ({"search_method": "activity", "search_target": r"layer\.0.*|classifier"}, "cpu"),
    "all": ({"search_method": "spsa", "search_target": "all", "learning_rate": 1e-3}, "device_map"),
    "lora": ({**BOTH, "search_peft": "lora"}, "disk"),
    "lora-map": ({**BOTH, "search_peft": "lora", "search_target": "lora_B|modules_to_save"}, "device_map"),
    "ia3": ({"search_method": "spsa", "search_peft": "ia3"}, "cpu"),
}


def trainer_of(model, folder, **options):
    args = GradientlessTrainingArguments(
        str(folder / "run"), use_cpu=True, report_to=[], per_device_train_batch_size=4, disable_tqdm=True,
        **{"max_steps": 2, "feature_cache_gb": 0, "save_strategy": "no", **options},
    )  # fmt: skip
    rows = tiny_dataset(16)
    return GradientlessTrainer(model, args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer())


def trained(model, folder, resume=None, **options):
    """Losses and saved tensors of a run."""
    trainer = trainer_of(model, folder, **options)
    loss = trainer.train(resume_from_checkpoint=resume).training_loss
    loss = loss, trainer.evaluate()["eval_loss"]
    trainer.save_model(str(folder / "saved"))
    (file,) = (folder / "saved").glob("*model.safetensors")
    return loss, load_file(file)


@pytest.mark.parametrize("name", TRAINED)
def test_the_trainer_on_an_offloaded_model_equals_the_loaded_one(tmp_path, name):
    options, form = TRAINED[name]
    (tmp_path / "loaded").mkdir()
    expected, values = trained(loaded(), tmp_path / "loaded", **options)
    model = offloaded(loaded(), form, tmp_path)
    losses, found = trained(model, tmp_path, **options)
    assert losses == expected
    assert found.keys() == values.keys()
    assert all(torch.equal(found[key], values[key]) for key in values)
    assert has_offloaded(model)


@pytest.mark.parametrize("cache", [0.0, 1.0])
def test_features_of_an_offloaded_encoder(tmp_path, cache):
    options = {"feature_cache_gb": cache, "feature_cache_dir": str(tmp_path / "features")}
    expected = trained(loaded(), tmp_path / "loaded", **options)[0]
    assert trained(offloaded(loaded(), "disk", tmp_path / "o"), tmp_path, **options)[0] == expected
    assert len(list((tmp_path / "features").glob("*"))) == (1 if cache else 0)  # one file for both


@pytest.mark.parametrize("form", ["disk", "device_map"])
def test_resume_writes_the_checkpoint_to_the_stored_weights(tmp_path, form):
    options = {"search_method": "spsa", "search_target": "all", "learning_rate": 1e-3, "max_steps": 3}
    expected = trained(loaded(), tmp_path / "loaded", **options)
    first = offloaded(loaded(), form, tmp_path / "first")
    trained(first, tmp_path, **{**options, "save_strategy": "steps", "save_steps": 2})
    again = offloaded(loaded(), form, tmp_path / "again")
    found = trained(again, tmp_path / "resumed", str(tmp_path / "run" / "checkpoint-2"), **options)
    assert found[0][1] == expected[0][1]
    assert all(torch.equal(found[1][key], expected[1][key]) for key in expected[1])


def test_runs_that_an_offloaded_model_cannot_have(tmp_path, monkeypatch):
    for start in ({"init_lora_weights": "pissa"}, {"use_dora": True}):
        with pytest.raises(
            InputError, match=r"search_peft=lora .* computed from the weights .* are offloaded; leave out"
        ):
            model = offloaded(loaded(), "disk", tmp_path / "a")
            trainer_of(model, tmp_path, search_peft="lora", search_peft_config=start)
    monkeypatch.setattr(GradientlessTrainingArguments, "world_size", 2)
    with pytest.raises(InputError, match="the model is offloaded, and 2 processes would change the same stored"):
        trainer_of(offloaded(loaded(), "disk", tmp_path / "b"), tmp_path)
    args = SparseTrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    model = offloaded(loaded(), "disk", tmp_path / "c")  # without a device map
    with pytest.raises(InputError, match="hp_search trains a copy of the model in each trial, and copies of an off"):
        check_model_placement(model, args, GradientlessTrainer, copied=True)
    with pytest.raises(InputError, match=r"keeps parts of the model on disk .* a search"):
        SparseTrainer(model, args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer()).train()
