"""Each family of transformers' classifiers through LoRA, SparseGrad and FishPAL's candidates: one step, saved, loaded.

What a family is refused for is listed here; all else has to work. The fast part takes families chosen to differ.
"""

import copy

import pytest
import torch
from classifiers import DIFFERENT, classifier_rows, runnable, tiny_classifier
from peft import PeftModel

from hf_ft_ext import InputError, convert_to_sparse, merge_sparse
from hf_ft_ext.fisher.candidates import default_candidates, fitting_candidates, layers_of
from hf_ft_ext.lora.arguments import LoraTrainingArguments
from hf_ft_ext.lora.trainer import add_lora

REFUSED = {
    "lora": {"ibert": r"QuantLinear\(\) .* is not supported"},
    "sparse": {
        "ibert": r"\(QuantLinear\)\) are not linear layers",
        "squeezebert": r"\(Conv1d\)\) are not linear layers",
    },
    "fisher": {"ibert": "too few of the candidates fit", "squeezebert": "too few of the candidates fit"},
}
FAST = (*DIFFERENT, "ibert")
# Its layers make gradients by themselves, in training alone and for one length; none reaches an adapter.
REFORMER = "reformer"


def logits(model) -> torch.Tensor:
    rows = {name: value for name, value in classifier_rows().items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**rows).logits


class Family:
    """A family's model and its logits; every method starts from a copy.

    Args:
        made: both, if they are known already.
    """

    def __init__(self, kind: str, made: tuple[torch.nn.Module, torch.Tensor] | None = None):
        self.kind = kind
        self.model, self.logits = made or self._new()

    def _new(self) -> tuple[torch.nn.Module, torch.Tensor]:
        model = tiny_classifier(self.kind)
        return model, logits(model)

    def copy(self) -> torch.nn.Module:
        return copy.deepcopy(self.model)


def step(model, kind: str) -> None:
    """One step of plain gradient descent."""
    model.train(kind == REFORMER)
    model(**classifier_rows(length=64 if kind == REFORMER else 16)).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad


def lora(family: Family, folder) -> None:
    model = add_lora(family.copy(), LoraTrainingArguments(str(folder), use_cpu=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    step(model, family.kind)
    adapters = [parameter.grad for name, parameter in model.named_parameters() if ".lora_" in name]
    assert adapters and (family.kind == REFORMER or any(gradient is not None for gradient in adapters))
    model.save_pretrained(folder)
    trained = logits(model)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(family.copy(), folder)), trained)
    assert not torch.allclose(trained, family.logits, atol=1e-6)


def sparse(family: Family, folder) -> None:
    model = family.copy()
    layers = convert_to_sparse(model)
    torch.testing.assert_close(logits(model), family.logits)
    step(model, family.kind)
    trained = [layer.weight.grad is not None for layer in layers.values()]
    assert any(trained)
    expected = logits(model)
    merge_sparse(model).save_pretrained(folder)
    torch.testing.assert_close(logits(type(model).from_pretrained(folder, attn_implementation="eager")), expected)


def fisher(family: Family, folder) -> None:
    model = family.copy()
    left = fitting_candidates(model, default_candidates(), layers_of(model), seed=0)
    assert {"bottleneck", "lora"} <= left.keys() or len(left) >= 2
    assert torch.equal(logits(model), family.logits)


def check(family: Family, folder) -> list[str]:
    """What went wrong, as lines."""
    found = []
    for method in (lora, sparse, fisher):
        message = REFUSED[method.__name__].get(family.kind)
        try:
            if message is None:
                method(family, folder / method.__name__)
            else:
                with pytest.raises(InputError, match=message):
                    method(family, folder / method.__name__)
        except (Exception, pytest.fail.Exception) as error:
            found.append(f"{family.kind} {method.__name__}: {type(error).__name__}: {str(error)[:200]}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAST)
def test_families_chosen_to_differ(kind, tmp_path):
    assert check(Family(kind), tmp_path) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_other_families(tmp_path):
    kinds, wrong = [], []
    for kind, *made in runnable():
        kinds.append(kind)
        if kind not in FAST:
            wrong += check(Family(kind, made), tmp_path / kind)
    assert wrong == [] and len(kinds) >= 100
