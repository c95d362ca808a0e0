"""`--dtype`, `--attn_implementation`, `--device_map`, `--model_revision`: honoured, or refused in one line."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny import labels_only, tiny_dataset, tiny_masked_lm, tiny_model, tiny_tokenizer

from hf_ft_ext import SPSA
from hf_ft_ext.arguments import DataArguments, Gradients, ModelArguments
from hf_ft_ext.errors import InputError
from hf_ft_ext.full.arguments import FullTrainingArguments
from hf_ft_ext.gradientless.arguments import GradientlessTrainingArguments
from hf_ft_ext.lora.arguments import LoraTrainingArguments
from hf_ft_ext.methods import METHODS
from hf_ft_ext.models import load_tokenizer_and_model
from hf_ft_ext.models.weight_options import wanted_dtype
from hf_ft_ext.training.weights.placement import check_placement

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def load(folder, args=None, data_args=None, **options):
    arguments = ModelArguments(model_name_or_path=str(folder), **options)
    return load_tokenizer_and_model(arguments, labels_only("a", "b"), seed=0, args=args, data_args=data_args)[1]


def arguments(kind, train=True, **settings):
    return kind(output_dir="out", use_cpu=True, do_train=train, report_to=[], **settings)


@pytest.mark.parametrize(
    ("args", "requested", "stored", "expected"),
    [
        (arguments(FullTrainingArguments), "auto", BRAIN, SINGLE),
        (arguments(FullTrainingArguments), "auto", HALF, SINGLE),
        (arguments(FullTrainingArguments), "auto", DOUBLE, "auto"),  # not narrowed
        (arguments(FullTrainingArguments), "auto", None, SINGLE),
        (arguments(FullTrainingArguments), "bfloat16", SINGLE, BRAIN),
        (arguments(FullTrainingArguments, train=False), "auto", HALF, "auto"),
        (arguments(FullTrainingArguments, train=False), "float16", SINGLE, HALF),
        (arguments(FullTrainingArguments, peft="ia3"), "auto", BRAIN, "auto"),
        (arguments(LoraTrainingArguments), "auto", BRAIN, "auto"),
        (arguments(LoraTrainingArguments), "auto", HALF, SINGLE),  # on a CPU
        (arguments(LoraTrainingArguments), "float16", SINGLE, HALF),
        (arguments(GradientlessTrainingArguments), "auto", HALF, "auto"),
        (arguments(GradientlessTrainingArguments, search_method="adam"), "auto", HALF, SINGLE),
        (None, "auto", BRAIN, SINGLE),
    ],
)
def test_the_rule(args, requested, stored, expected):
    assert wanted_dtype(requested, args, stored) == expected


def test_the_dtype_is_that_of_the_model_and_its_configuration(folder, caplog):
    caplog.set_level("INFO", logger="hf_ft_ext")
    model = load(folder)
    assert model.dtype == model.config.dtype == SINGLE
    assert [r for r in caplog.records if "stored in bfloat16 and train in float32" in r.getMessage()]
    assert load(folder, dtype="bfloat16").dtype == BRAIN
    assert load(folder, arguments(LoraTrainingArguments), dtype="float16").dtype == HALF
    assert [r for r in caplog.records if "without loss scaling" in r.getMessage()]
    with pytest.raises(InputError, match=r"dtype=float16.*AdamW's epsilon is 0.*dtype=float32"):
        load(folder, dtype="float16")


def test_prompt_models_follow_the_same_options(tmp_path):
    tiny_masked_lm().half().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    prompt = DataArguments(
        few_shot_type="prompt", template="*cls**sent_0*_it*mask*.*sep+*", mapping="{0:'bad',1:'good'}"
    )
    task = SimpleNamespace(name="own", options=())
    rows = SimpleNamespace(**vars(labels_only("a", "b")), task=task, text_columns=("text",))
    for args, expected in ((None, SINGLE), (arguments(GradientlessTrainingArguments), HALF)):
        model_args = ModelArguments(model_name_or_path=str(tmp_path), attn_implementation="eager")
        _, model = load_tokenizer_and_model(model_args, rows, seed=0, args=args, data_args=prompt)
        assert model.dtype == model.config.masked_lm.dtype == expected
        assert {m.config._attn_implementation for m in model.masked_lm.modules() if hasattr(m, "config")} == {"eager"}


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_attention(folder, name):
    assert load(folder, attn_implementation=name).config._attn_implementation == name


@pytest.mark.parametrize("name", ["flash_attention_2", "sdpaa"])
def test_attention_that_does_not_work_is_one_line(folder, name):
    with pytest.raises(InputError, match=f"attn_implementation='{name}' does not work with model.*pass eager or sdpa"):
        load(folder, attn_implementation=name)


def test_a_local_folder_has_no_revision(folder):
    with pytest.raises(
        InputError, match=r"model_revision='v2' is about a model of the Hub.*local folder; leave it out"
    ):
        load(folder, model_revision="v2")
    load(folder, model_revision="main")  # the default, written out


# --- where the weights go ---------------------------------------------------------------------------------

PARTS = ("embeddings", "encoder.layer.0", "encoder.layer.1", "pooler")
SPREAD = json.dumps({**{f"bert.{part}": "cpu" for part in PARTS}, "bert.encoder.layer.1": "disk", "classifier": "cpu"})


@pytest.mark.parametrize("device_map", ["auto", "cpu", SPREAD])
def test_a_model_is_the_same_wherever_its_weights_are(folder, tmp_path, device_map):
    batch = {"input_ids": torch.arange(5, 25).view(2, 10)}
    args = arguments(FullTrainingArguments, train=False)
    plain, placed = load(folder, args, dtype="float32"), load(folder, args, dtype="float32", device_map=device_map)
    with torch.no_grad():
        assert torch.equal(plain.eval()(**batch).logits, placed.eval()(**batch).logits)
    offloaded = [name for name, p in placed.named_parameters() if p.is_meta]
    assert bool(offloaded) == (device_map == SPREAD)
    if offloaded:  # a run that trains has a folder for changed weights
        training = GradientlessTrainingArguments(str(tmp_path), use_cpu=True, do_train=True, report_to=[])
        model = load(folder, training, device_map=device_map)
        SPSA(model.parameters(), model).step(lambda: float(model(**batch).logits.square().sum()))
        assert list((tmp_path / "_offloaded").glob("bert.encoder.layer.1.*.safetensors"))


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("gpu", "device_map: 'gpu' is not a device; pass auto, balanced, balanced_low_0, sequential, a device"),
        ("{bert: 0}", "device_map='{bert: 0}' is not valid JSON: Expecting property name"),
        (
            '{"roberta": "cpu", "": "cpu"}',
            "names 'roberta', and model .* has no such part; its parts are bert",
        ),
        ("cuda:9", "there is no device 'cuda:9' here .*pass another one"),
    ],
)
def test_a_place_that_does_not_exist_is_one_line(folder, device_map, message):
    with pytest.raises(InputError, match=message):
        load(folder, device_map=device_map)


def test_a_spread_model_wants_one_process(folder):
    args = SimpleNamespace(world_size=2, do_train=True, gradients=Gradients.WEIGHTS, device=torch.device("cpu"))
    with pytest.raises(InputError, match=r"device_map=auto spreads a model .* this run has 2 processes"):
        load(folder, args, device_map="auto")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("devices", "message"),
    [
        (("cpu", "disk"), r"keeps parts of the model on disk .*\(cpu, disk\), so they cannot train"),
        ((0, 1), "spreads the model over 0, 1, and this method keeps what it computes on one device"),
    ],
    ids=["offloaded", "spread"],
)
def test_models_on_several_devices_train_or_are_refused(tmp_path, monkeypatch, method, devices, message):
    kind = METHODS[method]
    args = kind.arguments_class()(str(tmp_path), use_cpu=True, report_to=[])
    model = tiny_model()
    trainer = kind.trainer_class()(model, args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer())
    model.hf_device_map = {"bert": devices[0], "classifier": devices[1]}
    allowed = {"several": trainer.several_devices, "offloaded_too": trainer.offloaded_models}
    if allowed["several" if devices == (0, 1) else "offloaded_too"]:
        check_placement(trainer.model, **allowed)
        return
    with pytest.raises(InputError, match=message):
        trainer.train()
