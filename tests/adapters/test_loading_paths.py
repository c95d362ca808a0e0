"""Each way by which peft and transformers load, copy and drop an adapter, for every adapter of ours."""

import copy
import pickle

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from test_adapter_contract import attach, step
from tiny import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, pipeline
from zoo import ADAPTERS, ALL, MERGEABLE, inputs, logits, mixture, small

from hf_ft_ext import LayerMixtureConfig, LayerPrefixConfig
from hf_ft_ext.adapters import registration
from hf_ft_ext.adapters.layer_prefix.layer import PrefixLayer
from hf_ft_ext.errors import InputError


def seeded(make, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


@pytest.fixture
def base_dir(tmp_path):
    small("bert").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def trained_folder(name, base_dir, tmp_path):
    """A folder with a trained adapter, and the logits that it gives."""
    model = attach(AutoModelForSequenceClassification.from_pretrained(base_dir), name)
    step(model)
    model.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), logits(model)


@pytest.mark.parametrize("name", ALL)
def test_low_cpu_mem_usage(tmp_path, base_dir, name):
    folder, expected = trained_folder(name, base_dir, tmp_path)
    loaded = PeftModel.from_pretrained(small("bert"), folder, low_cpu_mem_usage=True)
    loaded.load_adapter(folder, "other", low_cpu_mem_usage=True)
    assert not [n for n, p in loaded.named_parameters() if p.device.type == "meta"]
    for adapter in ("default", "other"):
        loaded.set_adapter(adapter)
        assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("name", ALL)
def test_a_folder_loads_through_auto_classes_and_pipeline(tmp_path, base_dir, name):
    folder, expected = trained_folder(name, base_dir, tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(logits(loaded), expected)
    tokenizer = tiny_tokenizer()
    classify = pipeline("text-classification", model=folder, tokenizer=tokenizer)
    rows = tokenizer("good film", return_tensors="pt")
    wanted = logits(PeftModel.from_pretrained(small("bert"), folder), **rows).softmax(-1).max().item()
    assert classify("good film")[0]["score"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_adapters_of_a_plain_transformers_model(tmp_path, base_dir, name):
    folder, expected = trained_folder(name, base_dir, tmp_path)
    model = small("bert")
    plain = logits(model)
    model.load_adapter(folder, adapter_name="trained")
    assert torch.equal(logits(model), expected)
    model.disable_adapters()
    assert torch.equal(logits(model), plain)
    model.enable_adapters()
    model.classifier.enable_adapters(True)  # transformers 5.23 switches off heads with the adapters, and not on again
    assert torch.equal(logits(model), expected)
    seeded(lambda: model.add_adapter(ALL[name](modules_to_save=["classifier"]), adapter_name="new"))
    model.set_adapter("new")
    new = logits(model)
    assert not torch.allclose(new, expected, atol=1e-5)
    model.save_pretrained(tmp_path / "new")
    again = small("bert")
    again.load_adapter(str(tmp_path / "new"))
    assert torch.equal(logits(again), new)
    model.delete_adapter("new")
    model.set_adapter("trained")
    assert torch.equal(logits(model), expected)
    assert not leftovers(model, "new")


def leftovers(model, adapter: str) -> list[str]:
    """What is left of an adapter: parameters, buffers, and entries of any dictionary in a tuner's layer."""
    found = [n for n, _ in (*model.named_parameters(), *model.named_buffers()) if f".{adapter}." in f"{n}."]
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for key, value in {**vars(module), **module._modules}.items():
                if hasattr(value, "keys") and key not in ("_modules", "_parameters", "_buffers") and adapter in value:
                    found.append(f"{name}.{key}")
    return found


@pytest.mark.parametrize("name", ALL)
def test_a_deleted_adapter_leaves_nothing(name):
    model = attach(small("bert"), name)
    first = logits(model)
    seeded(lambda: model.add_adapter("other", ALL[name](task_type="SEQ_CLS")), seed=2)
    assert leftovers(model, "other")
    model.set_adapter("other")
    model.delete_adapter("other")
    assert not leftovers(model, "other") and model.active_adapters == ["default"]
    assert torch.equal(logits(model), first)
    seeded(lambda: model.add_adapter("other", ALL[name](task_type="SEQ_CLS")), seed=2)  # the name is free again
    model.requires_grad_(False)
    with pytest.raises(InputError, match="there is no adapter 'third'; this model has: default, other"):
        model.base_model.delete_adapter("third")
    model.delete_adapter("other")  # not the active one: whether that trains does not change
    assert not any(p.requires_grad for p in model.parameters()) and torch.equal(logits(model), first)


@pytest.mark.parametrize("name", ALL)
def test_injected_without_a_peft_model(name):
    model = seeded(lambda: inject_adapter_in_model(ALL[name](), small("bert")))
    expected = logits(model)
    assert not torch.equal(expected, logits(small("bert")))
    state = get_peft_model_state_dict(model)
    other = seeded(lambda: inject_adapter_in_model(ALL[name](inference_mode=True), small("bert")), seed=2)
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys and torch.equal(logits(other), expected)


@pytest.mark.parametrize("name", ALL)
def test_copies_are_whole_and_independent(name):
    model = attach(small("bert"), name)
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        assert not {id(m) for m in copied.modules()} & {id(m) for m in model.modules()}
        assert sum(p.numel() for p in copied.parameters()) == sum(p.numel() for p in model.parameters())
        step(copied)
        assert not torch.equal(logits(copied), expected) and torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ALL)
def test_layers_have_in_and_out_features(name):
    layers = [m for m in attach(small("bert"), name).modules() if isinstance(m, BaseTunerLayer)]
    assert layers
    for layer in layers:
        base = layer.get_base_layer()
        linear = base if isinstance(base, torch.nn.Linear) else torch.nn.Linear(32, 32)
        assert (layer.in_features, layer.out_features) == (linear.in_features, linear.out_features)


@pytest.mark.parametrize("name", ALL)
def test_dtypes_follow_the_base_unless_cast(name):
    for cast, wanted in ((True, torch.float32), (False, torch.bfloat16)):
        with torch.random.fork_rng():
            config = ALL[name](task_type="SEQ_CLS")
            model = get_peft_model(small("bert").bfloat16(), config, autocast_adapter_dtype=cast)
        own = {p.dtype for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" not in n}
        assert own == {wanted}
        assert logits(model).dtype in (torch.bfloat16, torch.float32) and logits(model).isfinite().all()
    assert {p.dtype for n, p in model.double().named_parameters()} == {torch.float64}
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("name", ADAPTERS)  # in the mixture is peft's IA3, which does not run offloaded
def test_an_offloaded_model_gives_the_same(tmp_path, name, buffers):
    """accelerate loads weights around calls of the modules that hold them; adapters are also read without a call."""
    model = attach(small("bert"), name)
    step(model)
    expected = logits(model)
    offloaded = disk_offload if buffers else cpu_offload
    more = {"offload_dir": str(tmp_path)} if buffers else {}
    offloaded(model, execution_device=torch.device("cpu"), offload_buffers=buffers, **more)
    assert any(parameter.is_meta for key, parameter in model.named_parameters() if parameter.requires_grad)
    for _ in range(2):
        assert torch.equal(logits(model), expected)
    assert all(p.is_meta for p in model.parameters()) or not buffers
    if name in MERGEABLE:
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_compiled_gives_the_same(name):
    alike = name in ("pfeiffer", "houlsby", "parallel", "prefix", "sparse")  # in each layer, nothing is shared
    model = attach(small("bert", num_hidden_layers=1 if alike else 2), name)
    expected = logits(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), expected)


@pytest.mark.parametrize("make", [
    lambda size: LayerPrefixConfig(prefix_length=3, projection_size=size, task_type="SEQ_CLS"),
    lambda size: LayerMixtureConfig(kinds={"p": LayerPrefixConfig(prefix_length=3, projection_size=size)},
                                    layers={0: "p", 1: "p"}, task_type="SEQ_CLS"),
])  # fmt: skip
def test_a_folded_prefix_loads_under_its_training_configuration(tmp_path, make):
    model = seeded(lambda: get_peft_model(small("bert"), make(6)))
    model.save_pretrained(tmp_path)
    config = make(6)
    config.inference_mode = True
    for low in (False, True):
        options = {"config": copy.deepcopy(config), "low_cpu_mem_usage": low}
        loaded = PeftModel.from_pretrained(small("bert"), tmp_path, **options)
        assert torch.equal(logits(loaded), logits(model))
        assert not [n for n, _ in loaded.named_parameters() if "hidden" in n]
    with pytest.raises(InputError, match="holds only the keys and values of a prefix"):
        PeftModel.from_pretrained(small("bert"), tmp_path, config=make(6), is_trainable=True)


def test_a_projection_is_one_module_saved_once(tmp_path):
    from safetensors.torch import load_file

    from hf_ft_ext import keep_projection

    model = seeded(lambda: get_peft_model(small("bert"), LayerPrefixConfig(prefix_length=3, projection_size=6)))
    layers = [m for m in model.modules() if isinstance(m, PrefixLayer)]
    assert len({id(layer.layer_prefix_hidden["default"]) for layer in layers}) == 1 < len(layers)
    with keep_projection(model):
        model.save_pretrained(tmp_path)
    assert sum("layer_prefix_hidden.weight" in key for key in load_file(tmp_path / "adapter_model.safetensors")) == 1
    loaded = PeftModel.from_pretrained(small("bert"), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(logits(loaded), logits(model))
    layers = [m for m in loaded.modules() if isinstance(m, PrefixLayer)]
    assert len({id(layer.layer_prefix_hidden["default"]) for layer in layers}) == 1


def test_files_do_not_depend_on_the_other_adapters_of_the_model(tmp_path):
    """LoRA inside an attention that another adapter puts a prefix around."""
    lora = {"lora": {"peft_type": "LORA", "r": 2, "init_lora_weights": False}}
    alone = {"kinds": lora, "layers": {0: "lora", 1: "lora"}}
    around = {"kinds": {"prefix": LayerPrefixConfig(prefix_length=2)}, "layers": {0: "prefix", 1: "prefix"}}
    model = seeded(lambda: get_peft_model(small("bert"), LayerMixtureConfig(**alone)))
    expected = logits(model)
    names = set(get_peft_model_state_dict(model))
    model.add_adapter("around", LayerMixtureConfig(**around))
    assert set(get_peft_model_state_dict(model)) == names
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small("bert"), tmp_path)
    assert torch.equal(logits(loaded), expected)
    model.load_adapter(tmp_path, "again")  # into a model whose modules are wrapped already
    model.set_adapter("again")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_module_and_its_part_cannot_both_be_wrapped(name):
    config = ADAPTERS[name](target_modules=r".*layer\.\d+\.attention(\.self)?")
    with pytest.raises(InputError, match=r"matches '.*attention' and '.*attention\.self', which is inside of it"):
        get_peft_model(small("bert"), config)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_names_of_no_module_are_refused(name, option):
    """Also beside names that are right, as the others would be ignored."""
    right = {"target_modules": "output.dense"}.get(option, "intermediate.dense")
    for names in (["dense"], [right, "dense"]):
        with pytest.raises(InputError, match=rf"^{option}: Bert.* has no module 'dense'; pass complete names within a "
                           r"layer or in the model, such as 'output.dense', "):  # fmt: skip
            get_peft_model(small("bert"), ADAPTERS[name](**{option: names}))
    with pytest.raises(InputError, match=r"has no module 'nothing'; .* in the model, or a regular expression as a st"):
        get_peft_model(small("bert"), ADAPTERS[name](**{option: ["nothing"]}))


@pytest.mark.parametrize("name", ALL)
def test_weighted_combinations_are_refused(name):
    model = attach(small("bert"), name)
    with pytest.raises(InputError, match=r"cannot combine adapters into a new one; activate several with model\.b"):
        model.add_weighted_adapter(["default"], [1.0], "sum")


def test_a_regular_expression_over_a_block_and_its_layer_names_the_cause():
    config = ADAPTERS["pfeiffer"](target_modules=r".*mlp(\.down_proj)?")
    with pytest.raises(InputError, match=r"matches '.*mlp' and '.*mlp\.down_proj'"):
        get_peft_model(small("llama"), config)


def test_a_peft_that_does_not_fit_is_a_warning(monkeypatch):
    def fails():
        raise ImportError("cannot import name '_ExcludedModule'")

    monkeypatch.setattr(registration, "register_adapters", fails)
    with pytest.warns(UserWarning, match=r"not available with peft .*_ExcludedModule.*pip install 'peft>="):
        registration.register_on_import_of_peft()


def test_kinds_with_state_of_their_own_are_refused():
    for kind in ("randlora", "vera", "vblora", "lily", "adalora"):
        with pytest.raises(InputError, match=f"kind '{kind}': {kind} shares parameters between layers"):
            LayerMixtureConfig(kinds={kind: {}}, layers={0: kind})


def test_configurations_survive_a_round_trip(tmp_path):
    mixture().save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).layers == mixture().layers
    assert inputs()["input_ids"].shape == (2, 10)
