"""A quick trainer of any method on a tiny model."""

from quick import SOLVER_METHODS
from tiny import one_layer_model, tiny_dataset, tiny_tokenizer

from hf_ft_ext.methods import METHODS

# What makes a method quick on a tiny model.
QUICK = {
    "sparse": {"sparse_basis_steps": 2, "sparse_density": 0.2},
    "gradientless": {"feature_cache_gb": 0.0},
    "linearhead": {"feature_cache_gb": 0.0},
    "fisher": {"fisher_examples": 4, "fisher_candidates": ["lora", "bottleneck"]},
    "kernel": {"kernel_regularization": "1e-2"},
}
PLAIN = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 7}
LOOP = {"max_steps": 2, "save_strategy": "no", "per_device_train_batch_size": 4}


def classes(name):
    method = METHODS[name]
    return method.arguments_class(), method.trainer_class()


def make(name, args=None, model=None, folder=None, trainer_class=None, **kwargs):
    own, kind = classes(name)
    if args is None:
        args = own(str(folder), **PLAIN, **({} if name in SOLVER_METHODS else LOOP), **QUICK.get(name, {}))
    kwargs = {"train_dataset": tiny_dataset(16), "eval_dataset": tiny_dataset(8, seed=1), **kwargs}
    if "model_init" not in kwargs:
        kwargs["model"] = one_layer_model() if model is None else model
    return (trainer_class or kind)(args=args, processing_class=tiny_tokenizer(), **kwargs)
