"""Wrapping with peft: what is saved besides the adapter."""

import pytest
import torch
from peft import PeftModel
from tiny import tiny_model, tiny_tokenizer

from hf_ft_ext.peft_models import wrap_with_peft

SETTINGS = {"target_modules": ["key"], "feedforward_modules": []}


@pytest.mark.parametrize(("asked", "trains"), [(None, True), ([], False), (["pooler"], True)])
def test_what_came_untrained_is_saved_whatever_was_asked_for(tmp_path, asked, trains):
    model = tiny_model(seed=1)
    model.fresh_parameters = frozenset(
        name for name, _ in model.named_parameters() if name.startswith(("bert.pooler", "classifier"))
    )
    wrapped = wrap_with_peft(model, "ia3", SETTINGS | ({} if asked is None else {"modules_to_save": asked}), 0).eval()
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert any("pooler" in name for name in trained) == trains
    assert any("classifier" in name for name in trained) and any("ia3" in name for name in trained)
    wrapped.save_pretrained(tmp_path)
    base = tiny_model(seed=1)
    with torch.no_grad():
        for parameter in (*base.bert.pooler.parameters(), *base.classifier.parameters()):
            parameter.normal_()  # another process draws others
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    batch = tiny_tokenizer()(["the film was good", "dull"], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, wrapped(**batch).logits)


def test_nothing_is_added_where_nothing_came_untrained():
    wrapped = wrap_with_peft(tiny_model(), "ia3", SETTINGS | {"modules_to_save": []}, 0)
    assert set(wrapped.peft_config["default"].modules_to_save) == {"classifier", "score"}
