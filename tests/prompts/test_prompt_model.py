"""The prompt model: its logits, its files, its place under peft, torch.func and every kind of masked LM."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from prompt_models import FAMILIES, TEMPLATE, batch, masked_lm, prompt_model
from safetensors import safe_open
from tiny import tiny_model, tiny_tokenizer
from torch.func import functional_call, grad, jacrev, vmap
from transformers import AutoModelForSequenceClassification, GPT2Config, T5Config, ViTConfig

from hf_ft_ext import InputError, PromptConfig, PromptForSequenceClassification
from hf_ft_ext.adapters.folder import save_configuration
from hf_ft_ext.features import HeadReader, head_parameters
from hf_ft_ext.models.peft import wrap_with_peft
from hf_ft_ext.prompts.configuration import PROMPT_FILE
from hf_ft_ext.prompts.readout import reading_of

WORDS = ["bad", "good"]


def logits_at_mask(lm, inputs):
    """The definition: vocabulary logits of every position, then the mask's, then the words'."""
    tokenizer = tiny_tokenizer()
    rows = torch.arange(len(inputs["input_ids"]))
    position = (inputs["input_ids"] == tokenizer.mask_token_id).int().argmax(-1)
    return lm(**inputs).logits[rows, position][:, tokenizer.convert_tokens_to_ids(WORDS)]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_words_at_the_mask_tied_or_not(family, tmp_path):
    inputs, lm = batch(), masked_lm(family)
    expected = logits_at_mask(lm, inputs)
    model = prompt_model(family)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path / "tied")
    loaded = PromptForSequenceClassification.from_pretrained(tmp_path / "tied")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)

    layer = model.untie_label_words()
    assert layer.weight.shape[0] == 2 and model.untie_label_words() is layer
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():  # now they can move without the embeddings
        layer.weight[:, 0].add_(1.0)  # one column: what the layer reads has mean zero behind a norm
    assert not torch.allclose(model(**inputs).logits, expected)
    model.save_pretrained(tmp_path / "untied")
    loaded = PromptForSequenceClassification.from_pretrained(tmp_path / "untied")
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    torch.testing.assert_close(
        loaded.get_input_embeddings().weight, masked_lm(family).get_input_embeddings().weight, rtol=0, atol=0
    )


def test_more_rows_of_the_vocabulary_change_no_logit():
    model, inputs = prompt_model(), batch()
    before, rows = model(**inputs).logits, model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 3)
    assert model.masked_lm.get_input_embeddings().weight.shape[0] == rows + 3
    assert model.get_output_embeddings().weight.shape[0] == rows + 3
    torch.testing.assert_close(model(**inputs).logits, before)


def test_a_saved_model_loads_with_its_prompt(tmp_path):
    model = prompt_model()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["template"], config["words"], config["id2label"]) == (
        TEMPLATE, WORDS, {"0": "label bad", "1": "label good"},
    )  # fmt: skip
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is PromptForSequenceClassification
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    assert isinstance(loaded.config, PromptConfig) and loaded.config.hidden_size == 32
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "decoder.weight" in key]  # noqa: SIM118 - tied, kept once


def test_loss_and_tuples():
    model, labels = prompt_model(), torch.tensor([0, 1, 1])
    out = model(**batch(), labels=labels)
    torch.testing.assert_close(out.loss, torch.nn.functional.cross_entropy(out.logits, labels))
    loss, logits = model(**batch(), labels=labels, return_dict=False)
    assert torch.equal(loss, out.loss) and torch.equal(logits, out.logits)
    assert len(model(**batch(), output_hidden_states=True).hidden_states) == 3


def test_a_regression_gives_the_place_between_the_bounds():
    model, labels = prompt_model(bounds=(1.0, 5.0)), torch.tensor([1.0, 4.0, 5.0])
    out = model(**batch(), labels=labels)
    likely = logits_at_mask(masked_lm(), batch()).softmax(-1)
    torch.testing.assert_close(out.logits, 1 + 4 * likely[:, 1:])
    place = (labels - 1) / 4
    entropy = -(torch.xlogy(place, place) + torch.xlogy(1 - place, 1 - place))
    cross = -((1 - place) * likely[:, 0].log() + place * likely[:, 1].log())
    torch.testing.assert_close(out.loss, (cross - entropy).mean())


def test_rows_of_several_contexts_are_averaged():
    model = prompt_model()
    inputs = batch(["a great film", "good", "dull", "the plot was very long"])
    nested = {key: value.unflatten(0, (2, 2)) for key, value in inputs.items()}
    expected = model(**inputs).logits.unflatten(0, (2, 2)).mean(1)
    torch.testing.assert_close(model(**nested).logits, expected)
    assert model(**nested, labels=torch.tensor([0, 1])).loss.ndim == 0


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_per_example_gradients_by_torch_func(family):
    model = prompt_model(family).double()
    inputs = batch()
    # a ready mask: what transformers makes of a plain one depends on its values, which vmap does not allow
    allowed = inputs["attention_mask"][:, None, None].bool().expand(-1, 1, inputs["input_ids"].shape[1], -1)
    masks = torch.zeros(allowed.shape).double().masked_fill(~allowed, torch.finfo(torch.float64).min)
    parameters = {name: p.detach() for name, p in model.named_parameters() if "layer.1" in name or "dense" in name}

    def first_minus_second(parameters, ids, mask):
        inputs = {"input_ids": ids[None], "attention_mask": mask[None]}
        return functional_call(model, parameters, kwargs=inputs).logits[0] @ torch.tensor([1.0, -1.0]).double()

    rows = (inputs["input_ids"], masks)
    found = vmap(grad(first_minus_second), in_dims=(None, 0, 0))(parameters, *rows)
    for i in range(3):
        one = {key: value[i : i + 1] for key, value in inputs.items()}
        out = model(**one).logits[0]
        expected = torch.autograd.grad(out[0] - out[1], [dict(model.named_parameters())[name] for name in parameters])
        for name, gradient in zip(parameters, expected, strict=True):
            torch.testing.assert_close(found[name][i], gradient, rtol=1e-9, atol=1e-11)
    jacobian = vmap(jacrev(first_minus_second), in_dims=(None, 0, 0))(parameters, *rows)
    assert all(torch.allclose(jacobian[name], found[name]) for name in found)


def test_copies_keep_reading_the_mask():
    model = prompt_model()
    clone = copy.deepcopy(model)
    assert torch.equal(clone(**batch()).logits, model(**batch()).logits)
    model.gradient_checkpointing_enable()
    model.train()
    model(**batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "layer.0" in name)
    assert all(p.grad is None for p in clone.parameters())


def test_eager_and_sdpa_agree():
    logits = []
    for kind in ("eager", "sdpa"):
        model = prompt_model()
        model.set_attn_implementation(kind)
        assert model.masked_lm.config._attn_implementation == kind
        logits.append(model(**batch()).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lora", {}),
        ("ia3", {"target_modules": ["key", "value"], "feedforward_modules": []}),
        ("prefix_tuning", {"num_virtual_tokens": 3}),
        ("prefix_tuning", {"num_virtual_tokens": 3, "init_from_activations": True}),
    ],
)
@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_under_peft(family, kind, settings, tmp_path):
    wrapped = wrap_with_peft(prompt_model(family), kind, settings, seed=0)
    trained = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained and not any("original_module" in name or "decoder" in name for name in trained)
    before = wrapped.eval()(**batch()).logits
    wrapped(**batch(), labels=torch.tensor([0, 1, 1])).loss.backward()
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if name in trained:
                parameter.sub_(parameter.grad.sign(), alpha=0.1)
    logits = wrapped(**batch()).logits
    assert not torch.allclose(logits, before)
    wrapped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(prompt_model(family), tmp_path).eval()
    assert torch.equal(loaded(**batch()).logits, logits)


def test_a_prefix_of_real_activations_holds_keys_and_values(tmp_path):
    """The first layer's keys of random tokens: key projection of their embeddings."""
    wrapped = wrap_with_peft(
        prompt_model(), "prefix_tuning", {"num_virtual_tokens": 3, "init_from_activations": True}, seed=5
    )
    bert = wrapped.get_base_model().masked_lm.bert
    rows = wrapped.prompt_encoder["default"].embedding.weight.view(3, 4, 32)  # two layers, keys and values
    keys = {}
    for ids in torch.cartesian_prod(*[torch.arange(bert.config.vocab_size)] * 1)[:, None]:
        embedded = [bert.embeddings(ids.view(1, 1), position_ids=torch.tensor([[i]])) for i in range(3)]
        keys[int(ids)] = [bert.encoder.layer[0].attention.self.key(e)[0, 0] for e in embedded]
    for i in range(3):
        assert any(torch.allclose(rows[i, 0], candidates[i], atol=1e-6) for candidates in keys.values())
    with pytest.raises(InputError, match="a prefix with prefix_projection does not hold keys and values"):
        settings = {"num_virtual_tokens": 3, "init_from_activations": True, "prefix_projection": True}
        wrap_with_peft(prompt_model(), "prefix_tuning", {**settings, "encoder_hidden_size": 8}, seed=5)
    with pytest.raises(InputError, match="init_from_activations is about prefix_tuning, not lora"):
        wrap_with_peft(prompt_model(), "lora", {"init_from_activations": True}, seed=5)


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra"])
@pytest.mark.parametrize("untie", [False, True])
def test_the_head_reads_the_mask_position(family, untie):
    model = prompt_model(family, untie=untie)
    reader = HeadReader.find(model, batch())
    features = reader.features(batch())
    hidden = model.get_submodule(model.encoder_path)
    assert features.shape[0] == 3 and hidden is not None
    torch.testing.assert_close(reader.logits(features), model(**batch()).logits, rtol=1e-5, atol=1e-6)
    head = head_parameters(model)
    # The tied output rows are the input embeddings: to search them would change what the encoder gives.
    assert any(
        "decoder.weight" in name or "projector.weight" in name or "lm_head.weight" in name for name in head
    ) == (untie)
    assert head and all("layer." not in name for name in head)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (
            {"input_ids": torch.tensor([[2, 5, 3]])},
            "row 0 of the batch has 0 mask tokens, but a prompt model reads one",
        ),
        ({"input_ids": torch.tensor([[2, 4, 3], [4, 4, 3]])}, "row 1 of the batch has 2 mask tokens"),
        ({"inputs_embeds": torch.zeros(1, 3, 32)}, "finds the mask in input_ids; pass them, not inputs_embeds"),
    ],
)
def test_rows_without_one_mask_are_refused(inputs, message):
    with pytest.raises(InputError, match=message):
        prompt_model()(**inputs)


def test_models_without_a_language_model_head(tmp_path):
    with pytest.raises(InputError, match="model 'x' is of type 'vit', for which transformers has no language model"):
        reading_of(ViTConfig(), "x")
    assert reading_of(GPT2Config(), "x") == "last" and reading_of(T5Config(), "x") == "decoder"
    tiny_model("bert").save_pretrained(tmp_path)
    with pytest.raises(
        InputError, match=r"have no language-model head \(cls\.predictions.* is missing\); pass the pretr"
    ):
        PromptForSequenceClassification.from_masked_lm(str(tmp_path), tiny_tokenizer(), TEMPLATE, WORDS)
    for words, passed in ((["a", *WORDS], "3 were passed: a, bad, good"), (None, "none were passed")):
        with pytest.raises(InputError, match=f"a regression has two words, but {passed}"):
            PromptForSequenceClassification.from_masked_lm(
                masked_lm(), tiny_tokenizer(), TEMPLATE, words, bounds=(0, 1)
            )


def test_the_configuration_of_a_plain_masked_lm_is_wrapped(tmp_path, caplog):
    masked_lm().save_pretrained(tmp_path)
    config = PromptConfig.from_pretrained(tmp_path)
    assert (config.masked_lm.model_type, config.hidden_size, config.vocab_size) == ("bert", 32, len(tiny_tokenizer()))
    with pytest.raises(AttributeError, match="no attribute 'nothing_of_the_kind'"):
        _ = config.nothing_of_the_kind


def test_an_adapter_s_folder_makes_its_base(tmp_path):
    for untie in (False, True):
        folder = tmp_path / str(untie)
        lm = masked_lm()
        lm.save_pretrained(folder / "base")
        model = PromptForSequenceClassification.from_masked_lm(
            str(folder / "base"), tiny_tokenizer(), TEMPLATE, WORDS, untie_words=untie
        )
        wrapped = wrap_with_peft(model, "lora", {}, seed=0).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        wrapped.save_pretrained(folder / "adapter")
        with pytest.raises(
            InputError, match=r"holds no prompt_config\.json, so it is not an adapter of a prompt model"
        ):
            PromptForSequenceClassification.from_adapter(folder / "adapter")
        (folder / "adapter" / PROMPT_FILE).write_text(json.dumps(model.config.to_dict(), default=str))
        base = PromptForSequenceClassification.from_adapter(folder / "adapter")
        assert (base.config.words, base.config.untied_words) == (WORDS, untie)
        loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
        assert torch.equal(loaded(**batch()).logits, wrapped(**batch()).logits)


def test_an_adapter_on_a_saved_prompt_model_keeps_the_words_it_was_trained_with(tmp_path):
    prompt_model().save_pretrained(tmp_path / "base")
    base = PromptForSequenceClassification.from_pretrained(tmp_path / "base")
    config = base.config
    config.words, config.word_ids = config.words[::-1], config.word_ids[::-1]
    config.id2label, config.label2id = {0: "yes", 1: "no"}, {"yes": 0, "no": 1}
    wrapped = wrap_with_peft(base, "lora", None, seed=0).eval()
    wrapped.save_pretrained(tmp_path / "out")
    save_configuration(wrapped, tmp_path / "out")  # without the launcher's prompt_config.json
    again = PromptForSequenceClassification.from_adapter(tmp_path / "out")
    assert (again.config.words, again.config.id2label) == (config.words, config.id2label)
    loaded = PeftModel.from_pretrained(again, tmp_path / "out").eval()
    assert torch.equal(loaded(**batch()).logits, wrapped(**batch()).logits)
