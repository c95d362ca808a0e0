"""What a user's model returns may be a dict or a tuple, as transformers' Trainer allows."""

import numpy as np
import pytest
import torch
from any_trainer import LOOP, PLAIN, QUICK, classes, make
from quick import SOLVER_METHODS
from tiny import tiny_model
from torch import nn

from hf_ft_ext.methods import METHODS

FORMS = {
    "dict": lambda output: {key: output[key] for key in ("loss", "logits") if key in output},
    "tuple": lambda output: tuple(output[key] for key in ("loss", "logits") if key in output),
}
MORE = {
    "fisher": {"fisher_mode": "mask", "fisher_keep_ratio": 0.5, "fisher_candidates": None},
    "gradientless": {"search_method": "spsa", "search_target": "all"},
    "head": {"search_target": "head"},
}
QUIET = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def returning(form: str | None, name: str) -> nn.Module:
    """BERT's classifier as a subclass of this name that returns the form; `None` = transformers' own output."""
    plain = type(tiny_model())

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        output = plain.forward(self, input_ids, attention_mask, labels=labels)
        return output if form is None else FORMS[form](output)

    model = tiny_model(**QUIET)
    model.__class__ = type(name, (plain,), {"forward": forward})
    return model


@pytest.mark.parametrize(("name", "form"), [("MineForSequenceClassification", "dict"), ("Mine", "tuple")])
@pytest.mark.parametrize("method", [*METHODS, "head"])
def test_every_form_of_outputs_trains_the_same(tmp_path, method, name, form):
    kind = "gradientless" if method == "head" else method
    values = {**PLAIN, **({} if kind in SOLVER_METHODS else LOOP), **QUICK.get(kind, {}), **MORE.get(method, {})}
    values |= {"lora_dropout": 0.0} if kind == "lora" else {}
    found = []
    for output in (None, form):
        args = classes(kind)[0](str(tmp_path / str(output)), **{k: v for k, v in values.items() if v is not None})
        trainer = make(kind, args, returning(output, name))
        trainer.train()
        weights = {key: p.detach().clone() for key, p in trainer.model.named_parameters()}
        found.append((weights, trainer.predict(trainer.eval_dataset).predictions))
    for key, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][key], msg=key)
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-4, atol=1e-6)
