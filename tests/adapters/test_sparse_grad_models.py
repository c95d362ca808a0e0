"""SparseGrad adapters on models of many kinds and under other transforms, against weights changed by hand."""

import functools

import pytest
import torch
from other_models import OTHER_MODELS, SINGLE, loss_of, other_batch, other_model, output_of
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch.func import functional_call, jvp, vmap
from transformers.pytorch_utils import Conv1D

from hf_ft_ext import SPSA, BottleneckConfig, SparseGradConfig, compute_bases, empirical_ntk, export_lora
from hf_ft_ext.adapters.layers import shown_name
from hf_ft_ext.adapters.sparse_grad.model import sparse_grad_layers
from hf_ft_ext.errors import InputError

RANDOM = {"density": 0.3, "init": "random", "init_std": 0.2}


def adapted(name, **config):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return get_peft_model(other_model(name), SparseGradConfig(**{**RANDOM, **config})).eval()


def linears(model):
    """Names of the linear layers but the output embedding, and of classifiers with several outputs."""
    last = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and m is not last]


def oriented(linear, matrix):
    return matrix.T if isinstance(linear, Conv1D) else matrix


def changes(model, adapters=("default",)):
    """`V D U^T` of each layer, in float64."""
    found = {}
    for name, layer in sparse_grad_layers(model):
        parts = []
        for adapter in adapters:
            columns, values = layer.sparse_grad_columns[adapter], layer.sparse_grad_values[adapter].detach()
            parts.append(columns.out_columns.double() @ values.double() @ columns.in_columns.double().T)
        found[shown_name(name)] = sum(parts)
    return found


def changed_by_hand(name, found):
    model = other_model(name)
    with torch.no_grad():
        for path, change in found.items():
            linear = model.get_submodule(path)
            linear.weight += oriented(linear, change).to(linear.weight.dtype)
    return model


def check_gradients(model, twin, adapters, close):
    for name, layer in sparse_grad_layers(model):
        linear = twin.get_submodule(shown_name(name))
        gradient = oriented(linear, linear.weight.grad)
        for adapter in adapters:
            columns = layer.sparse_grad_columns[adapter]
            expected = columns.out_columns.T @ gradient @ columns.in_columns  # V^T G U
            close(layer.sparse_grad_values[adapter].grad, expected, msg=name)


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        (name, targets)
        for name in OTHER_MODELS
        for targets in ("default", "all-linear", "names")
        if name != "mamba" or targets == "default"  # its dt_proj is never called: the mixer reads the weight itself
    ],
)
def test_outputs_and_gradients_are_those_of_the_changed_weights(tmp_path, name, targets):
    single = name in SINGLE
    close = functools.partial(torch.testing.assert_close, rtol=1e-4 if single else 1e-8, atol=1e-5 if single else 1e-9)
    chosen = {"default": None, "all-linear": "all-linear", "names": linears(other_model(name))}[targets]
    model, batch = adapted(name, target_modules=chosen), other_batch(name)
    if targets != "default":
        expected = set(linears(other_model(name)))
        assert {shown_name(path) for path, _ in sparse_grad_layers(model)} == expected
    twin = changed_by_hand(name, changes(model))
    output = output_of(model, batch)
    close(output, output_of(twin, batch))
    assert (output - output_of(other_model(name), batch)).abs().max() > 1e-3
    loss_of(model, batch).backward()
    loss_of(twin, batch).backward()
    check_gradients(model, twin, ["default"], close)
    model.save_pretrained(tmp_path)
    close(output_of(PeftModel.from_pretrained(other_model(name), tmp_path).eval(), batch), output)
    model.merge_adapter()
    close(output_of(model, batch), output)
    model.unmerge_adapter()
    close(output_of(model.merge_and_unload(), batch), output)


@pytest.mark.parametrize(
    ("name", "endings", "layers"),
    [
        ("vit", {"mlp.fc1", "mlp.fc2"}, 2),
        ("swin", {"mlp.fc1", "mlp.fc2"}, 2),
        ("convnext", {"pwconv1", "pwconv2"}, 2),
        ("whisper", {"fc1", "fc2"}, 4),
        ("wav2vec2", {"feed_forward.intermediate_dense", "feed_forward.output_dense"}, 2),
        ("clip_text_model", {"mlp.fc1", "mlp.fc2"}, 2),
        ("switch_transformers", {"mlp.wi", "mlp.wo", *(f"expert_{i}.w{s}" for i in range(4) for s in "io")}, 0),
    ],
)
def test_the_feed_forwards_of_images_sounds_and_texts_train_by_default(name, endings, layers):
    names = {shown_name(path) for path, _ in sparse_grad_layers(adapted(name))}
    expected = {n for n in linears(other_model(name)) if n.endswith(tuple(f".{ending}" for ending in endings))}
    assert names == expected and (not layers or len(names) == 2 * layers)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_columns_are_chosen_on_any_model(name):
    model = get_peft_model(other_model(name), SparseGradConfig(density=0.3))
    compute_bases(model, [other_batch(name)] * 2, loss_of)
    for path, layer in sparse_grad_layers(model):
        columns = layer.sparse_grad_columns["default"]
        for side in columns.buffers():
            torch.testing.assert_close(side.T @ side, torch.eye(side.shape[1]).to(side), rtol=0, atol=1e-5, msg=path)


# --- several adapters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t5", "gpt2", "vit"])
def test_several_active_adapters_add_up(tmp_path, name):
    model, batch, both = adapted(name), other_batch(name), ["default", "other"]
    model.add_adapter("other", SparseGradConfig(**{**RANDOM, "seed": 5, "density": 0.1}))
    model.base_model.set_adapter(both)
    twin = changed_by_hand(name, changes(model, both))
    output = output_of(model, batch)
    torch.testing.assert_close(output, output_of(twin, batch), rtol=1e-9, atol=1e-9)
    loss_of(model, batch).backward()
    loss_of(twin, batch).backward()
    check_gradients(model, twin, both, functools.partial(torch.testing.assert_close, rtol=1e-8, atol=1e-9))
    # As LoRA, the ranks add up; float64 factors are not rounded.
    assert export_lora(model, tmp_path) == 0
    lora = PeftModel.from_pretrained(other_model(name), tmp_path, autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(output_of(lora, batch), output, rtol=1e-5, atol=1e-6)
    model.merge_adapter()
    torch.testing.assert_close(output_of(model, batch), output, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(output_of(model.merge_and_unload(), batch), output, rtol=1e-9, atol=1e-9)


def test_an_export_of_other_active_adapters_is_refused(tmp_path):
    model = get_peft_model(other_model("vit"), LoraConfig(target_modules=["fc1"]))
    with pytest.raises(InputError, match="the active adapter 'default' is not a SparseGrad adapter"):
        export_lora(model, tmp_path)


def test_an_adapter_for_each_row_is_refused():
    model, batch = adapted("t5"), other_batch("t5")
    model.add_adapter("other", SparseGradConfig(**RANDOM))
    with pytest.raises(
        InputError, match=r"adapter_names=\['default', .* SparseGradModel does not support; call set_ad"
    ):
        model(**batch, adapter_names=["default", "other", "default"])
    assert output_of(model, batch).isfinite().all()


def test_all_linear_beside_an_adapter_means_the_same_layers():
    names = linears(other_model("vit"))
    model = adapted("vit", target_modules="all-linear")
    model.add_adapter("other", SparseGradConfig(**RANDOM, target_modules="all-linear"))
    assert all("other" in layer.sparse_grad_values for _, layer in sparse_grad_layers(model))
    assert len(list(sparse_grad_layers(model))) == len(names)


@pytest.mark.parametrize("config", [SparseGradConfig, BottleneckConfig])
def test_many_names_mean_these_modules_and_no_fewer(tmp_path, config):
    """peft shortens lists of 20 names or more, to endings that mean something else here."""
    names = [n for n in linears(other_model("bart")) if not n.endswith(("fc2", "out_proj"))]
    assert len(names) > 20
    model = get_peft_model(other_model("bart"), config(target_modules=names))
    found = {n.partition(".base_layer")[0] for n, _ in model.named_parameters() if ".base_layer." in n}
    assert {shown_name(n) for n in found} == set(names)
    assert model.peft_config["default"].target_modules == names
    model.save_pretrained(tmp_path)
    assert set(PeftModel.from_pretrained(other_model("bart"), tmp_path).peft_config["default"].target_modules) == {
        *names
    }


# --- weights ---------------------------------------------------------------------------------------------


def test_merging_into_a_shared_weight_is_refused():
    batch = other_batch("gpt2")
    model = adapted("gpt2", target_modules=["lm_head"])
    twin = changed_by_hand("gpt2", {})
    change = changes(model)["lm_head"]
    twin.lm_head = nn.Linear(16, 60, bias=False).double()
    twin.lm_head.weight.data = other_model("gpt2").lm_head.weight.detach() + change
    before = output_of(model, batch)
    torch.testing.assert_close(before, output_of(twin, batch), rtol=1e-9, atol=1e-9)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            InputError, match=r"lm_head shares its weight with transformer\.wte, so merging would chan"
        ):
            merge()
    assert torch.equal(output_of(model, batch), before)


@pytest.mark.parametrize("low", [False, True])
def test_columns_that_a_loader_assigned_are_known(tmp_path, low):
    """Loaders that replace tensors without a call to the module's hook: transformers' own, `low_cpu_mem_usage`."""
    batch = other_batch("vit")
    trained = get_peft_model(other_model("vit"), SparseGradConfig(density=0.3))
    compute_bases(trained, [batch])
    trained.save_pretrained(tmp_path)
    models = [PeftModel.from_pretrained(other_model("vit"), tmp_path, is_trainable=True, low_cpu_mem_usage=low)]
    plain = other_model("vit")
    plain.load_adapter(str(tmp_path), is_trainable=True)
    fresh = get_peft_model(other_model("vit"), SparseGradConfig(density=0.3), low_cpu_mem_usage=low)
    set_peft_model_state_dict(fresh, get_peft_model_state_dict(trained), low_cpu_mem_usage=low)
    for model in (*models, plain, fresh):
        loss_of(model.train(), batch).backward()
        gradients = [layer.sparse_grad_values["default"].grad for _, layer in sparse_grad_layers(model)]
        assert gradients and all(gradient.abs().max() > 0 for gradient in gradients)


def test_autocast_leaves_double_precision_alone():
    model, batch = adapted("vit"), other_batch("vit")
    expected = output_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(output_of(model, batch), expected)


# --- transforms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_transforms_of_torch_func_and_forward_derivatives(name):
    model, batch = adapted(name), other_batch(name)
    parameters = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values):
        return functional_call(model, values, args=(), kwargs=batch)["loss"]

    gradient = torch.func.grad(loss)(parameters)
    model.zero_grad()
    loss_of(model, batch).backward()
    for path, parameter in model.named_parameters():
        if path in gradient:
            torch.testing.assert_close(gradient[path], parameter.grad, rtol=1e-9, atol=1e-11)
    tangents = {n: torch.randn_like(p) for n, p in parameters.items()}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        slope = jvp(loss, (parameters,), (tangents,))[1]
    torch.testing.assert_close(slope, sum((gradient[n] * t).sum() for n, t in tangents.items()), rtol=1e-8, atol=1e-9)


def test_a_stack_of_values_runs_as_one_batch():
    layer = adapted("vit").base_model.model.vit.layers[0].mlp.fc1
    x = torch.randn(5, layer.in_features, dtype=torch.float64)
    stack = torch.randn(3, *layer.sparse_grad_values["default"].shape, dtype=torch.float64)

    def one(values):
        return functional_call(layer, {"sparse_grad_values.default": values}, (x,))

    torch.testing.assert_close(vmap(one)(stack), torch.stack([one(values) for values in stack]))


def test_the_forward_gradient_searches_an_adapter():
    model, batch = adapted("vit"), other_batch("vit")
    searched = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in searched]
    search = SPSA(searched, model, lr=1.0, estimate="forward")
    search.step(lambda: loss_of(model, batch))
    ((slopes, _),) = search.record
    for parameter, value in zip(searched, before, strict=True):
        parameter.data = value.clone()
    loss_of(model, batch).backward()
    # The move is -lr slope z, and slope = <gradient, z>, so <gradient, move> = -slope^2.
    search = SPSA(searched, model, lr=1.0, estimate="forward")
    search.step(lambda: loss_of(model, batch))
    moved = sum(((p - b) * p.grad).sum() for p, b in zip(searched, before, strict=True))
    torch.testing.assert_close(moved.item(), -(slopes[0] ** 2), rtol=1e-8, atol=0)


def test_engines_of_a_kernel_agree_on_an_adapter():
    model = adapted("vit")
    batch = {"pixel_values": other_batch("vit")["pixel_values"]}

    def function(model, rows):
        return model(**rows).logits

    one, two = (empirical_ntk(model, batch, engine=engine, function=function) for engine in ("jacobian", "auto"))
    torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-9)


# --- refusals of the pre-pass ----------------------------------------------------------------------------------


def test_new_columns_for_a_trained_adapter_are_refused():
    batch = other_batch("vit")
    model = get_peft_model(other_model("vit"), SparseGradConfig(density=0.3))
    compute_bases(model, [batch])
    compute_bases(model, [batch])  # nothing has been trained
    layer = next(layer for _, layer in sparse_grad_layers(model))
    with torch.no_grad():
        layer.sparse_grad_values["default"][0, 0] = 1.0
    before = output_of(model.eval(), batch)
    with pytest.raises(InputError, match=r"adapter 'default' already changes vit\.layers\.0.*; merge it"):
        compute_bases(model, [batch])
    assert torch.equal(output_of(model, batch), before)


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        (lambda b: [b], {"gradients": 0}, "gradients must be 1 or more, got 0"),
        (lambda b: b, {}, r"batches is a single batch, and an iterable of batches is needed; pass \[batch\]"),
        (lambda b: [tuple(b.values())], {}, r"a batch is a tuple, not keyword arguments of the model; pass loss\(mod"),
        (lambda b: [b], {"loss": lambda m, b: m(**b).logits}, r"return a tensor with one number, got shape \(3, 2\)"),
        (lambda b: [b], {"loss": lambda m, b: 1.0}, "must return a tensor with one number, got float"),
    ],
)
def test_bad_input_of_the_pre_pass(batches, options, message):
    model = get_peft_model(other_model("vit"), SparseGradConfig(density=0.3))
    with pytest.raises(InputError, match=message):
        compute_bases(model, batches(other_batch("vit")), **options)


def test_the_configured_seed_is_that_of_the_sketches():
    found = []
    for seed in (0, 7, 7):
        model = get_peft_model(other_model("vit"), SparseGradConfig(n_params=1, seed=seed))
        compute_bases(model, [other_batch("vit")])
        found.append(next(layer for _, layer in sparse_grad_layers(model)).sparse_grad_columns["default"].out_columns)
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])
