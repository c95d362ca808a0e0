"""`--do_eval` and `--do_predict` from the folder of a trained adapter give what the training run gave."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from decoders import save_decoder
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_masked_lm, text_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

import run_glue
from hf_ft_ext import PromptForSequenceClassification
from hf_ft_ext.hub.files import shared_files
from hf_ft_ext.prompts.model import classifier

pytest.importorskip("trl")

PAIRS = [("the film was", " great"), ("a dull plot, and", " not the ending"), ("we hated it and really", " bad")]
TEMPLATE = "*cls**sent_0*_it_was*mask*"
PROMPT = {"few_shot_type": "prompt", "template": TEMPLATE, "mapping": "{'no': 'bad', 'yes': 'great'}"}
WRITES = {"predict_with_generate": True, "max_new_tokens": 4}
TASKS = {
    "head": {}, "prompt": PROMPT, "causal": {"task_type": "causal_lm", **WRITES},
    "seq2seq": {"task_type": "seq2seq_lm", **WRITES},
}  # fmt: skip
_TRAIN = {"learning_rate": 0.05, "max_steps": 3, "warmup_steps": 0, "save_steps": 3}
WAYS = {
    "lora": {"method": "lora"},
    "sparse": {"method": "sparse", "sparse_basis_steps": 2, "sparse_density": 0.2},
    "fisher": {"method": "fisher", "fisher_examples": 4},
    "ia3": {"method": "full", "peft": "ia3"},
    "prefix": {"method": "full", "peft": "prefix_tuning", "peft_config": '{"num_virtual_tokens": 3}'},
    "search": {"method": "gradientless", "search_method": "spsa", "search_peft": "lora"},
}
CELLS = [
    ("lora", "bert", "head"), ("sparse", "bert", "head"), ("fisher", "bert", "head"), ("prefix", "bert", "head"),
    ("lora", "llama", "head"), ("search", "bert", "head"), ("lora", "masked", "prompt"), ("fisher", "gpt2", "prompt"),
    ("sparse", "t5", "prompt"), ("ia3", "opt", "prompt"), ("prefix", "llama", "prompt"), ("lora", "llama", "causal"),
    ("sparse", "gpt2", "causal"), ("fisher", "qwen3", "causal"), ("search", "opt", "causal"),
    ("prefix", "gpt2", "causal"), ("lora", "t5", "seq2seq"), ("fisher", "bart", "seq2seq"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("adapters")
    for family in ("llama", "gpt2", "t5", "opt", "qwen3", "bart"):
        save_decoder(root / family, family)
    save_masked_lm(root / "masked")
    tiny_model(seed=3).save_pretrained(root / "bert")
    tiny_tokenizer().save_pretrained(root / "bert")
    for name, rows, seed in (("train", 24, 0), ("test", 12, 1)):
        data = text_dataset(rows, seed=seed)
        labels = [data.features["label"].names[i] for i in data["label"]]
        lines = [{"sentence": s, "label": label} for s, label in zip(data["sentence"], labels, strict=True)]
        (root / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    # without labels, the labels have to come from the folder
    bare = [{"sentence": json.loads(line)["sentence"]} for line in (root / "test.jsonl").read_text().splitlines()]
    (root / "bare.jsonl").write_text("\n".join(map(json.dumps, bare)))
    pairs = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS * 4]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return root


def launch(**options) -> int:
    options = {"use_cpu": True, "disable_tqdm": True, "max_seq_length": 48, **options}
    return run_glue.main([text for name, value in options.items() for text in (f"--{name}", str(value))])


def files(folder: Path, task: str) -> dict:
    train, test = ("train.jsonl", "test.jsonl") if task in ("head", "prompt") else ("pairs.jsonl", "pairs.jsonl")
    return {"train_file": folder / train, "validation_file": folder / test, "test_file": folder / test}


def train(folder: Path, out: Path, way: str, family: str, task: str, **more) -> dict:
    """Train, evaluate and predict; return the record."""
    assert launch(
        model_name_or_path=folder / family, output_dir=out, do_train=True, do_eval=True, do_predict=True,
        **files(folder, task), **WAYS[way], **TASKS[task], **_TRAIN, **more,
    ) == 0  # fmt: skip
    assert (out / "adapter_config.json").is_file()
    return json.loads((out / "run.json").read_text())


def predictions(out: Path) -> str:
    (file,) = out.glob("predictions.*")
    return file.read_text(encoding="utf-8")


def same_metrics(before: dict, after: dict) -> None:
    def scores(record):
        spent = ("runtime", "per_second", "time", "num_tokens")  # trl counts the tokens seen in training
        return {k: v for k, v in record["metrics"].items() if not k.endswith(spent)}

    wanted = {k: v for k, v in scores(before).items() if k.startswith(("eval_", "test_"))}
    assert "eval_loss" in wanted
    found = {k: v for k, v in scores(after).items() if k in wanted}
    assert found == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(("way", "family", "task"), CELLS)
def test_an_adapter_folder_predicts_as_its_run_did(folder, tmp_path, way, family, task):
    out, again = tmp_path / "out", tmp_path / "again"
    classifies = task in ("head", "prompt")
    more = {"prediction_probabilities": True} if classifies else {}
    own = {} if classifies else TASKS[task]
    before = train(folder, out, way, family, task, **more)
    data = {k: v for k, v in files(folder, task).items() if k != "train_file"}
    method = WAYS[way]["method"]
    assert launch(model_name_or_path=out, output_dir=again, method=method, do_eval=True, do_predict=True, **data,
                       **own, **more) == 0  # fmt: skip
    assert predictions(again) == predictions(out)
    same_metrics(before, json.loads((again / "run.json").read_text()))
    # a checkpoint is such a folder too, and any method reads it
    checkpoint = tmp_path / "checkpoint"
    assert launch(model_name_or_path=out / "checkpoint-3", output_dir=checkpoint, method="lora", do_predict=True,
                       test_file=data["test_file"],
                       **{k: v for k, v in own.items() if k != "predict_with_generate"}, **more) == 0  # fmt: skip
    assert predictions(checkpoint) == predictions(out)


def test_labels_come_from_the_folder_where_the_data_has_none(folder, tmp_path):
    before = train(folder, tmp_path / "out", "lora", "bert", "head")
    assert before["labels"] == ["no", "yes"]
    assert launch(model_name_or_path=tmp_path / "out", output_dir=tmp_path / "again", method="lora",
                       do_predict=True, test_file=folder / "bare.jsonl") == 0  # fmt: skip
    assert predictions(tmp_path / "again") == predictions(tmp_path / "out")


@pytest.mark.parametrize("way", ["lora", "sparse", "fisher"])
def test_a_base_in_16_bits_predicts_with_the_head_in_32(folder, tmp_path, way):
    model = tiny_model(seed=3).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    tiny_tokenizer().save_pretrained(tmp_path / "half")
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copy(folder / name, tmp_path / name)
    train(tmp_path, tmp_path / "out", way, "half", "head", prediction_probabilities=True)
    assert launch(model_name_or_path=tmp_path / "out", output_dir=tmp_path / "again", method=way, do_predict=True,
                       test_file=folder / "test.jsonl", prediction_probabilities=True) == 0  # fmt: skip
    assert predictions(tmp_path / "again") == predictions(tmp_path / "out")


def test_an_adapter_saved_by_peft_alone_predicts_with_the_base_model_s_labels(folder, tmp_path):
    names = {"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    base = tiny_model(seed=5, **names)
    base.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False))
    with torch.no_grad():
        model.get_base_model().classifier.modules_to_save["default"].weight.mul_(3)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    assert launch(model_name_or_path=tmp_path / "adapter", output_dir=tmp_path / "out", method="lora",
                       do_predict=True, test_file=folder / "test.jsonl") == 0  # fmt: skip
    texts = [json.loads(line)["sentence"] for line in (folder / "test.jsonl").read_text().splitlines()]
    tokenizer = tiny_tokenizer()
    model.eval()
    found = []
    for text in texts:
        with torch.no_grad():
            found.append("no yes".split()[int(model(**tokenizer(text, return_tensors="pt")).logits[0].argmax())])
    written = [line.split("\t")[1] for line in predictions(tmp_path / "out").splitlines()[1:]]
    assert written == found


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    """A LoRA classifier's folder."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train(folder, out, "lora", "bert", "head")
    return out


def damaged(trained: Path, folder: Path, how: str) -> Path:
    shutil.copytree(trained, folder / "bad", ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((folder / "bad" / "adapter_config.json").read_text())
    weights = load_file(folder / "bad" / "adapter_model.safetensors")
    if how == "no base":
        config["base_model_name_or_path"] = None
    elif how == "lost base":
        config["base_model_name_or_path"] = str(folder / "nowhere")
    elif how == "no type":
        config["peft_type"] = "NO_SUCH"
    elif how == "fewer weights":
        weights.pop(next(k for k in weights if "lora_A" in k))
    elif how == "nan":
        next(iter(weights.values())).view(-1)[0] = float("nan")
    (folder / "bad" / "adapter_config.json").write_text(json.dumps(config))
    save_file(weights, folder / "bad" / "adapter_model.safetensors", {"format": "pt"})
    return folder / "bad"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no base", "names no base model; set base_model_name_or_path in its adapter_config.json"),
        ("lost base", "is not usable: model '.*nowhere': there is no such folder, and it is not a Hub id"),
        ("no type", "the configuration of the adapter in '.*bad' cannot be read"),
        ("fewer weights", "does not hold all of its weights"),
        ("nan", "holds NaN or infinity in"),
    ],
)
def test_a_damaged_adapter_is_refused(trained, folder, tmp_path, refused, how, message):
    refused(message, model_name_or_path=damaged(trained, tmp_path, how), do_predict=True, method="lora",
            test_file=folder / "test.jsonl", output_dir=tmp_path / "out")  # fmt: skip


@pytest.fixture
def refused(capsys):
    def check(message, **options):
        status = launch(**options)
        error = capsys.readouterr().err.splitlines()[-1]
        assert status == 2 and re.search(message, error), error

    return check


def test_an_adapter_without_the_head_that_its_base_lacks_is_refused(folder, tmp_path, refused):
    base = AutoModelForSequenceClassification.from_pretrained(folder / "masked")
    get_peft_model(base, LoraConfig(target_modules=["query"])).save_pretrained(tmp_path / "adapter")
    refused("nor its base model has trained weights for bert.pooler.dense.bias, so predictions would be random",
            model_name_or_path=tmp_path / "adapter", do_predict=True, method="lora", test_file=folder / "test.jsonl",
            output_dir=tmp_path / "out")  # fmt: skip


def test_what_an_adapter_cannot_do_is_refused(trained, folder, tmp_path, refused):
    data = files(folder, "head")
    own = {"model_name_or_path": trained, "output_dir": tmp_path / "out"}
    refused("is a PEFT adapter; pass its base model, or merge the adapter .* leave --do_train out", method="lora",
            do_train=True, **own, **data)  # fmt: skip
    refused("--method kernel predicts with the solution that it saved, .* such as --method lora", method="kernel",
            do_predict=True, **own, test_file=data["test_file"])  # fmt: skip
    rows = [{"sentence": "a film", "label": label} for label in ("a", "b", "c")]
    (tmp_path / "three.jsonl").write_text("\n".join(map(json.dumps, rows)))
    refused(r"was trained for 2 outputs \(no, yes\), but this data needs 3", method="lora", do_eval=True, **own,
            validation_file=tmp_path / "three.jsonl")  # fmt: skip
    refused("model_revision='x' is about a model of the Hub", method="lora", do_predict=True, model_revision="x",
            **own, test_file=data["test_file"])  # fmt: skip


@pytest.mark.parametrize("target", ["all", "lora_B|query.base_layer"])
def test_a_search_of_weights_that_the_adapter_does_not_save_is_refused(folder, tmp_path, refused, target):
    refused("includes .*base.*, a weight of the base model, which a saved adapter does not contain; pass",
            model_name_or_path=folder / "bert", do_train=True, method="gradientless", search_method="spsa",
            search_peft="lora", search_target=target, max_steps=1, output_dir=tmp_path / "out",
            **files(folder, "head"))  # fmt: skip
    assert launch(model_name_or_path=folder / "bert", do_train=True, method="gradientless", search_method="spsa",
                  search_peft="lora", search_target="lora_B|classifier", max_steps=1, warmup_steps=0,
                  output_dir=tmp_path / "out", **files(folder, "head")) == 0  # fmt: skip


def test_the_base_model_s_revision_is_recorded_for_prompts(folder, tmp_path, monkeypatch):
    train(folder, tmp_path / "out", "lora", "gpt2", "prompt")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps({**config, "revision": "v2"}))
    asked = []
    plain = classifier.load_language_model
    monkeypatch.setattr(classifier, "load_language_model",
                        lambda name, **kw: asked.append(kw.get("revision")) or plain(name, **kw))  # fmt: skip
    assert isinstance(PromptForSequenceClassification.from_adapter(tmp_path / "out"), PromptForSequenceClassification)
    assert asked == ["v2"]


# --- by Hub id, from a cache without a network ------------------------------------------------------------


def in_cache(cache: Path, name: str, files: list[Path], folder: Path, revision: str, commit: str) -> None:
    """Copy files to where huggingface_hub keeps those that it has downloaded for `name` at `revision`."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for file in files:
        kept = repository / "snapshots" / commit / file.relative_to(folder)
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, kept)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


@pytest.mark.parametrize(
    ("way", "family", "task"),
    [("lora", "bert", "head"), ("fisher", "gpt2", "prompt"), ("lora", "llama", "causal"), ("lora", "bart", "seq2seq")],
)
@pytest.mark.parametrize("revision", ["main", "v1"])
def test_an_adapter_by_hub_id_predicts_as_its_run_did(folder, tmp_path, way, family, task, revision):
    out, again, cache = tmp_path / "out", tmp_path / "again", tmp_path / "cache"
    before = train(folder, out, way, family, task)
    config = json.loads((out / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "someone/base", "revision": "v2"}
    (out / "adapter_config.json").write_text(json.dumps(config))
    in_cache(cache, "someone/adapter", shared_files(out), out, revision, "a" * 40)
    base = folder / family
    in_cache(cache, "someone/base", list(base.iterdir()), base, "v2", "b" * 40)
    in_cache(cache, "someone/base", [base / "config.json"], base, "main", "c" * 40)  # has no weights
    data = {k: v for k, v in files(folder, task).items() if k != "train_file"}
    own = {} if task in ("head", "prompt") else TASKS[task]
    assert launch(model_name_or_path="someone/adapter", model_revision=revision, cache_dir=cache, output_dir=again,
                  method="lora", do_eval=True, do_predict=True, **data, **own) == 0  # fmt: skip
    assert predictions(again) == predictions(out)
    after = json.loads((again / "run.json").read_text())
    same_metrics(before, after)
    assert after["model"] == "someone/adapter"


def test_an_adapter_by_hub_id_is_refused_for_training_and_if_damaged(trained, folder, tmp_path, refused):
    cache, own = tmp_path / "cache", {"method": "lora", "model_name_or_path": "someone/adapter"}
    in_cache(cache, "someone/adapter", shared_files(trained), trained, "main", "a" * 40)
    own |= {"cache_dir": cache, "output_dir": tmp_path / "out"}
    data = files(folder, "head")
    refused("model 'someone/adapter' is a PEFT adapter; pass its base model", do_train=True, **own, **data)
    refused("could not be downloaded", do_predict=True, model_revision="v3", test_file=data["test_file"], **own)
    bad = damaged(trained, tmp_path, "fewer weights")
    in_cache(cache, "someone/adapter", shared_files(bad), bad, "main", "b" * 40)
    refused("the file of the adapter in 'someone/adapter' does not hold all of its weights", do_predict=True,
            test_file=data["test_file"], **own)  # fmt: skip
