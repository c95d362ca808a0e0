"""Overridden loaders, samplers, losses and collators: pre-passes and searches look at what training would see."""

import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from hf_ft_ext import (
    FisherTrainer,
    FisherTrainingArguments,
    GradientlessTrainer,
    GradientlessTrainingArguments,
    InputError,
    SparseTrainer,
    SparseTrainingArguments,
)
from hf_ft_ext.entries.layer import entries_of
from hf_ft_ext.fisher.prepass import prepass_batches
from hf_ft_ext.sparse.convert import sparse_layers
from hf_ft_ext.sparse.prepass import for_each_gradient
from hf_ft_ext.training.runs.plan import training_plan

PLAIN = {
    "use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 2,
    "per_device_train_batch_size": 4, "dataloader_pin_memory": False,
}  # fmt: skip
ROWS = tiny_dataset(64, seed=5)  # those of the overridden loader
OTHER = tiny_dataset(24, seed=6)  # those of train_dataset


def own_loader(batch_size: int = 4, seed: int = 3) -> DataLoader:
    return DataLoader(
        ROWS, batch_size=batch_size, shuffle=True, collate_fn=DataCollatorWithPadding(tiny_tokenizer()),
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip


def with_loader(kind, loader=None):
    """`kind` with an overridden data loader, always the same object."""
    loader = own_loader() if loader is None else loader
    return type("Mine", (kind,), {"get_train_dataloader": lambda self: loader})


def make(kind, arguments, folder, model=None, dataset=OTHER, trainer=None, **options):
    args = arguments(str(folder), **{**PLAIN, **options})
    model = tiny_model() if model is None else model
    return kind(model, args, train_dataset=dataset, processing_class=tiny_tokenizer(), **(trainer or {}))


def sparse(folder, kind=SparseTrainer, **options):
    options = {"sparse_support": "dynamic", "sparse_density": 0.2, "sparse_basis_steps": 3, **options}
    return make(kind, SparseTrainingArguments, folder, **options)


# --- sparse -------------------------------------------------------------------------------------------------


def gradients_of(model, names, batches):
    """Dense gradients of the mean loss over each step's batches, by the plainest code."""
    found = []
    for step in batches:
        sums = dict.fromkeys(names, 0)
        rows = sum(len(batch["labels"]) for batch in step)
        for batch in step:
            model.zero_grad()
            (model(**batch).loss * len(batch["labels"]) / rows).backward()
            for name in names:
                sums[name] = sums[name] + model.get_submodule(name).weight.grad.clone()
        found.append(sums)
    return found


@pytest.mark.parametrize("dataset", [OTHER, None])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_sparse_pre_pass_takes_the_batches_of_an_overridden_loader(tmp_path, accumulation, dataset):
    plain = tiny_model().eval()
    trainer = sparse(
        tmp_path, with_loader(SparseTrainer), dataset=dataset, gradient_accumulation_steps=accumulation, max_steps=3
    )
    layers = sparse_layers(trainer.model)
    found = []
    for_each_gradient(trainer, layers, 3, lambda name, gradient: found.append((name, gradient.clone())), "test")
    batches = [dict(batch) for batch in own_loader()]
    steps = [batches[i * accumulation : (i + 1) * accumulation] for i in range(3)]
    expected = [(name, step[name]) for step in gradients_of(plain, list(layers), steps) for name in layers]
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (_, ours), (_, theirs) in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_the_pre_pass_moves_no_generator(tmp_path):
    torch.manual_seed(11)
    trainer = sparse(tmp_path, with_loader(SparseTrainer))
    before = torch.get_rng_state()
    for_each_gradient(trainer, sparse_layers(trainer.model), 2, lambda *_: None, "test")
    assert torch.equal(torch.get_rng_state(), before)
    first = next(iter(trainer.get_train_dataloader()))["input_ids"]
    assert torch.equal(first, next(iter(own_loader()))["input_ids"]), "the loader's own generator has moved"


def test_the_pre_pass_leaves_every_module_in_its_mode(tmp_path):
    trainer = sparse(tmp_path)
    trainer.model.train().bert.embeddings.eval()
    modes = [module.training for module in trainer.model.modules()]
    for_each_gradient(trainer, sparse_layers(trainer.model), 1, lambda *_: None, "test")
    training_plan(trainer)
    assert [module.training for module in trainer.model.modules()] == modes


def test_an_overridden_sampler_is_honoured(tmp_path):
    class Sorted(SparseTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    trainer = sparse(tmp_path, Sorted, max_steps=1)
    names = list(sparse_layers(trainer.model))
    found = {}
    for_each_gradient(
        trainer, sparse_layers(trainer.model), 1, lambda name, g: found.update({name: g.clone()}), "test"
    )
    batch = dict(DataCollatorWithPadding(tiny_tokenizer())([OTHER[i] for i in range(4)]))
    (expected,) = gradients_of(tiny_model().eval(), names, [[batch]])
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-7)


def test_a_loader_without_batches_is_refused(tmp_path):
    trainer = sparse(tmp_path, with_loader(SparseTrainer, []))
    with pytest.raises(InputError, match="get_train_dataloader yields no batch, but the pre-pass needs some"):
        for_each_gradient(trainer, sparse_layers(trainer.model), 1, lambda *_: None, "test")


class EmptyStream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize("dataset", [OTHER.select([]), EmptyStream()])
def test_training_data_without_rows_is_refused(tmp_path, dataset):
    trainer = sparse(tmp_path, dataset=dataset)
    with pytest.raises(InputError, match="the training data yields no rows, but the pre-pass needs some"):
        for_each_gradient(trainer, sparse_layers(trainer.model), 1, lambda *_: None, "test")


def test_a_short_loader_is_read_again(tmp_path):
    loader = own_loader(batch_size=32)
    trainer = sparse(tmp_path, with_loader(SparseTrainer, loader))
    seen = []
    for_each_gradient(trainer, sparse_layers(trainer.model), 5, lambda name, _: seen.append(name), "test")
    assert len(seen) == 5 * len(sparse_layers(trainer.model))


# --- fisher -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [OTHER, None])
def test_the_fisher_pre_pass_takes_the_rows_of_an_overridden_loader(tmp_path, dataset):
    trainer = make(with_loader(FisherTrainer), FisherTrainingArguments, tmp_path, dataset=dataset)
    batches = prepass_batches(trainer, 10, 3)
    assert [len(batch["labels"]) for batch in batches] == [3, 1, 3, 1, 2]
    expected = torch.cat([batch["labels"] for batch in own_loader()])[:10]
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), expected)
    everything = prepass_batches(trainer, 1000, 8)
    assert sum(len(batch["labels"]) for batch in everything) == len(ROWS)


def test_fisher_trains_with_a_loader_and_no_data_set(tmp_path):
    trainer = make(
        with_loader(FisherTrainer), FisherTrainingArguments, tmp_path, dataset=None, fisher_examples=6,
        fisher_candidates=["lora", "bottleneck"],
    )  # fmt: skip
    trainer.train()
    assert trainer.plan.data["examples"] == 6
    with pytest.raises(InputError, match="the pre-pass needs training data; pass train_dataset"):
        make(FisherTrainer, FisherTrainingArguments, tmp_path, dataset=None).train()


def loss_of_first_class(outputs, labels, num_items_in_batch=None):
    return outputs["logits"][:, 0].square().mean()


@pytest.mark.parametrize("way", ["compute_loss", "compute_loss_func"])
def test_fisher_masks_are_chosen_by_the_users_loss(tmp_path, way):
    class Mine(FisherTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**{key: value for key, value in inputs.items() if key != "labels"})
            loss = loss_of_first_class(outputs, None)
            return (loss, outputs) if return_outputs else loss

    own = way == "compute_loss"
    passed = {} if own else {"trainer": {"compute_loss_func": loss_of_first_class}}
    settings = {"fisher_mode": "mask", "fisher_examples": 5, "fisher_keep_ratio": 0.05}
    trainer = make(Mine if own else FisherTrainer, FisherTrainingArguments, tmp_path, **settings, **passed)
    batches = prepass_batches(trainer, 5, 8)
    model = tiny_model().eval()
    sums = {name: torch.zeros_like(p) for name, p in model.named_parameters() if not name.startswith("classifier")}
    for batch in batches:  # one example, one backward pass
        for i in range(len(batch["labels"])):
            model.zero_grad()
            one = {key: value[i : i + 1] for key, value in batch.items() if key != "labels"}
            model(**one).logits[:, 0].square().mean().backward()
            for name in sums:
                sums[name] += model.get_parameter(name).grad.square()
    trainer.prepare()
    kept = sum(entries.values.numel() for entries in entries_of(trainer.model).values())
    border = torch.cat([value.flatten() for value in sums.values()]).sort(descending=True).values[kept - 1]
    for name, entries in entries_of(trainer.model).items():
        scores = sums[name].flatten()
        assert bool((scores[entries.indices.long()] >= 0.99 * border).all())
        assert int((scores > 1.01 * border).sum()) <= entries.values.numel()


# --- gradientless -------------------------------------------------------------------------------------------


def gradientless(folder, kind=GradientlessTrainer, cache="features", **options):
    return make(kind, GradientlessTrainingArguments, folder, feature_cache_dir=str(folder / cache), **options)


@pytest.mark.parametrize("dataset", [OTHER, None])
@pytest.mark.parametrize("target", ["head", "all"])
def test_gradientless_searches_on_the_batches_of_an_overridden_loader(tmp_path, target, dataset):
    losses = []

    class Seen(GradientlessTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            with torch.no_grad():
                losses.append((float(model.eval()(**inputs).loss), None))
            loss = super().training_step(model, inputs, num_items_in_batch)
            losses[-1] = (losses[-1][0], float(loss))
            return loss

    options = {"search_target": target, "search_candidates": 1, "max_evaluations_per_step": 1000}
    trainer = gradientless(tmp_path, with_loader(Seen), dataset=dataset, **options)
    trainer.train()
    assert len(losses) == 2 and not (tmp_path / "features").exists()
    for expected, found in losses:  # the step's loss is that of the loader's batch
        assert found == pytest.approx(expected, rel=1e-4)


def test_a_collator_of_the_users_is_called_for_every_batch(tmp_path):
    calls = []
    pad = DataCollatorWithPadding(tiny_tokenizer())

    def flipping(rows):
        batch = pad(rows)
        batch["labels"] = 1 - batch["labels"]
        calls.append(len(rows))
        return batch

    seen = []

    class Watched(GradientlessTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            seen.append(inputs)
            return super().training_step(model, inputs, num_items_in_batch)

    gradientless(tmp_path, Watched, trainer={"data_collator": flipping}).train()
    assert len(calls) >= 2 and not (tmp_path / "features").exists()
    assert len(seen) == 2 and all("input_ids" in batch for batch in seen)  # tokens, not cached features


def test_whole_batches_and_an_overridden_loader_contradict_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(GradientlessTrainingArguments, "world_size", 2)
    with pytest.raises(InputError, match="candidate_parallel=candidates gives every process the whole batch"):
        gradientless(tmp_path, with_loader(GradientlessTrainer), candidate_parallel="candidates")
