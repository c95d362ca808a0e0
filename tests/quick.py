"""Settings with which the launcher's runs of each method are small and quick."""

import json

from hf_ft_ext.methods import METHODS

# Small and quick, by argument name; methods with work before the first step get less of it.
QUICK = {
    "sparse": ("--sparse_basis_steps", "2", "--sparse_density", "0.2"),
    "gradientless": ("--feature_cache_dir", "features"),
    "linearhead": ("--feature_cache_dir", "features"),
    "fisher": (
        "--fisher_examples",
        "6",
        "--fisher_candidate_settings",
        json.dumps({"prefix": {"projection_size": 8}}),
    ),
    "kernel": ("--kernel_regularization", "1e-2"),
}
SOLVER_METHODS = ("linearhead", "kernel")  # no training loop, hence no steps, no learning rate, no checkpoints
ITERATIVE_METHODS = tuple(method for method in METHODS if method not in SOLVER_METHODS)
OF_OTHER_PACKAGES = tuple(name for name, method in METHODS.items() if not method.trainer.startswith("hf_ft_ext."))
