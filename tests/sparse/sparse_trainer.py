"""A SparseTrainer on a tiny model, and the comparisons that several test files make."""

import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

from hf_ft_ext import SparseTrainer, SparseTrainingArguments, convert_to_sparse, sparse_layers

INPUTS = {"input_ids": torch.arange(5, 25).view(2, 10)}
OPTIONS = {
    "num_train_epochs": 2,
    "learning_rate": 5e-3,
    "per_device_train_batch_size": 8,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "use_cpu": True,
}


def make(folder, model=None, dataset=None, adapter=False, **options):
    """A trainer as published (`dynamic`), unless `options` say otherwise.

    Structured support is that of converted layers with all else training, unless `adapter`.
    """
    model = model or tiny_model()
    options.setdefault("sparse_support", "dynamic")
    if not sparse_layers(model) and "sparse_n_params" not in options and "sparse_threshold" not in options:
        options.setdefault("sparse_density", 0.1)
    if options["sparse_support"] == "structured" and not adapter:
        options.setdefault("sparse_train_rest", "all")
        if not sparse_layers(model):
            convert_to_sparse(
                model,
                options.pop("sparse_n_params", None),
                options.pop("sparse_density", None),
                support="structured",
                basis=options.get("sparse_basis", "hosvd"),
                basis_scope=options.get("sparse_basis_scope", "kind"),
            )
    steps = options.pop("sparse_basis_steps", 3)
    args = SparseTrainingArguments(output_dir=str(folder), **{**OPTIONS, **options})
    if args.needs_gradients:
        args.sparse_basis_steps = steps
    return SparseTrainer(
        model,
        args,
        train_dataset=tiny_dataset(32) if dataset is None else dataset,
        eval_dataset=tiny_dataset(16, seed=1),
        processing_class=tiny_tokenizer(),
    )


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def assert_close(a, b, tolerance):
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def reference_gradients(trainer, steps, batch_size=8):
    """The batches' gradients by plain backward passes of an unconverted model."""
    model = tiny_model().eval()
    names = sparse_layers(trainer.model)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(trainer.args.seed)).tolist()
    for i in range(steps):
        rows = [trainer.train_dataset[row] for row in order[batch_size * i : batch_size * (i + 1)]]
        model.zero_grad()
        model(**trainer.data_collator(rows)).loss.backward()
        yield {name: model.get_submodule(name).weight.grad.clone() for name in names}


def structured(folder, model=None, **options):
    return make(folder, model, adapter=True, **{"sparse_support": "structured", **options})


def logits(model):
    with torch.no_grad():
        return model.eval()(**INPUTS).logits
