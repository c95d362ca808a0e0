"""Each family of transformers' classifiers through LoRA, SparseGrad and FishPAL's candidates: one step, saved, loaded.

What a family is refused for is listed here; all else has to work. The fast part takes families chosen to differ.
"""

import copy
import functools

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


@functools.lru_cache(1)  # the tests of a family follow each other
def _start(kind: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The family's model and its logits."""
    model = tiny_classifier(kind)
    return model, logits(model)


def start(kind: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A new model of the family, and its logits."""
    model, before = _start(kind)
    return copy.deepcopy(model), before


def step(model, kind: str) -> None:
    """One step of plain gradient descent."""
    model.train(kind == REFORMER)
    model(**classifier_rows(length=64 if kind == REFORMER else 16)).loss.backward()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is not None:
            parameter.data -= 0.1 * parameter.grad


def lora(kind, folder) -> None:
    model, before = start(kind)
    model = add_lora(model, LoraTrainingArguments(str(folder), use_cpu=True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    step(model, kind)
    adapters = [parameter.grad for name, parameter in model.named_parameters() if ".lora_" in name]
    assert adapters and (kind == REFORMER or any(gradient is not None for gradient in adapters))
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(start(kind)[0], folder)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not torch.allclose(logits(model), before, atol=1e-6)


def sparse(kind, folder) -> None:
    model, before = start(kind)
    layers = convert_to_sparse(model)
    torch.testing.assert_close(logits(model), before)
    step(model, kind)
    trained = [layer.weight.grad is not None for layer in layers.values()]
    assert any(trained)
    expected = logits(model)
    merge_sparse(model).save_pretrained(folder)
    torch.testing.assert_close(logits(type(model).from_pretrained(folder, attn_implementation="eager")), expected)


def fisher(kind, folder) -> None:
    model, before = start(kind)
    left = fitting_candidates(model, default_candidates(), layers_of(model), seed=0)
    assert {"bottleneck", "lora"} <= left.keys() or len(left) >= 2
    assert torch.equal(logits(model), before)


def check(kind: str, folder) -> list[str]:
    """What went wrong, as lines."""
    found = []
    for method in (lora, sparse, fisher):
        message = REFUSED[method.__name__].get(kind)
        try:
            if message is None:
                method(kind, folder / method.__name__)
            else:
                with pytest.raises(InputError, match=message):
                    method(kind, folder / method.__name__)
        except (Exception, pytest.fail.Exception) as error:
            found.append(f"{kind} {method.__name__}: {type(error).__name__}: {str(error)[:200]}")
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FAST)
def test_families_chosen_to_differ(kind, tmp_path):
    assert check(kind, tmp_path) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_all_other_families(tmp_path):
    kinds = runnable()
    assert len(kinds) >= 100
    others = [kind for kind in kinds if kind not in FAST]
    assert [line for kind in others for line in check(kind, tmp_path / kind)] == []
