"""Pushing runs: artefacts, cards, a fresh process that loads them, and failures that lose nothing."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from offline import write_model
from pushed import QUICK, card_of, fresh_process, snippets
from run_records import model_run, run_record, write_run
from stand_in import BROKEN, Fault, Repository
from tiny import tiny_dataset, tiny_model, write_texts
from transformers import AutoConfig, AutoModelForSequenceClassification

import run_glue
from hf_ft_ext import LoraTrainer, LoraTrainingArguments, PromptEncoder, load_kernel
from hf_ft_ext.errors import InputError
from hf_ft_ext.hub.__main__ import main as push_main
from hf_ft_ext.hub.push import push_run
from hf_ft_ext.methods import METHODS

MASK = ["--fisher_mode", "mask", "--fisher_keep_ratio", "0.1", "--fisher_examples", "8"]
# Layers converted in place: the whole model is saved, and a delta beside it.
STRUCTURED = [*QUICK["sparse"], "--sparse_support", "structured", "--sparse_train_rest", "LayerNorm"]
# The whole model is saved, and beside it the steps that lead to it from the base.
TRAJECTORY = ["--search_method", "spsa", "--search_target", "all", "--search_trajectory", "true"]
NO_LOOP = ("linearhead", "kernel")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_texts("train.csv", 24)
    write_texts("dev.csv", 12, seed=1)


@pytest.fixture
def base(hub, tmp_path, tokenizer) -> str:
    """Hub id of a tiny pretrained model."""
    folder = tmp_path / "base"
    tiny_model("bert").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    HfApi().create_repo("me/base")
    HfApi().upload_folder(repo_id="me/base", folder_path=folder)
    return "me/base"


def push(model: str, method: str, name: str, *extra: str) -> int:
    loop = () if method in NO_LOOP else ("--max_steps", "2", "--learning_rate", "1e-2")
    return run_glue.main(
        [
            "--method", method, "--model_name_or_path", model, "--train_file", "train.csv", "--validation_file",
            "dev.csv", "--max_seq_length", "16", "--use_cpu", "--disable_tqdm", "true", "--output_dir", name,
            "--push_to_hub", *loop, *QUICK.get(method, ()), *extra,
        ]
    )  # fmt: skip


def logits(model, tokenizer) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(
            **tokenizer(["the film was good", "a bad , dull plot"], return_tensors="pt", padding=True)
        ).logits


def pushed_kernels(hub, base: str, tmp_path: Path) -> tuple[dict, list[str]]:
    """Kernels on the Hub: names of the runs, and the code of their cards, which prints the logits of two rows.

    With a head, with a prompt, and with an adapter on a base model of the Hub.
    """
    write_model(tmp_path / "masked")
    HfApi().create_repo("me/masked")
    HfApi().upload_folder(repo_id="me/masked", folder_path=tmp_path / "masked")
    mapping = ("--template", "*cls**sent_0*_it_was*mask*.*sep+*", "--mapping", '{"0": "bad", "1": "good"}')
    runs = {
        "head": ("me/masked", ("--kernel_regularization", "1e-2", "--from_linearhead")),
        "prompt": ("me/masked", ("--few_shot_type", "prompt", *mapping)),
        "adapter": (base, ("--kernel_peft", "lora", "--kernel_peft_config", '{"r": 2}')),
    }
    code = []
    for name, (model, extra) in runs.items():
        assert push(model, "kernel", name, *extra, "--use_cpu") == 0
        _, text = card_of(hub, name)
        (snippet,) = snippets(text)
        assert str(tmp_path) not in text and not [f for f in hub.repositories[f"me/{name}"].files if "kernels/" in f]
        code += [snippet, "import json", "print('logits', json.dumps(kernel(batch).logits.tolist()))"]
    return runs, code


def check_kernels(runs, printed: str) -> None:
    """What was printed are the logits of the kernels in the runs' own folders."""
    found = [json.loads(line.removeprefix("logits ")) for line in printed.splitlines() if line.startswith("logits ")]
    assert len(found) == len(runs)
    for name, theirs in zip(runs, found, strict=True):
        kernel = load_kernel(name)
        rows = kernel.tokenizer(["a text", "another one"], padding=True, return_tensors="pt")
        if name == "prompt":
            encode = PromptEncoder(kernel.tokenizer, kernel.model.config.template, 1, 16)
            rows = kernel.tokenizer.pad(encode([["a text", "another one"]]), return_tensors="pt")
        torch.testing.assert_close(torch.tensor(theirs, dtype=torch.float64), kernel(rows).logits)


@pytest.mark.slow
def test_every_method_is_pushed_and_pulled_into_a_fresh_process(hub, base, tokenizer, capsys, tmp_path):
    """The card's own snippet, run where nothing is but the Hub, gives the logits of the run's own folder."""
    runs = {f"run-{method}": (method, ()) for method in METHODS if method != "kernel"}  # kernels: below
    runs |= {"run-structured": ("sparse", STRUCTURED), "run-mask": ("fisher", MASK)}
    runs["run-trajectory"] = ("gradientless", TRAJECTORY)
    code, line = {}, {}
    for name, (method, extra) in runs.items():
        assert push(base, method, name, *extra) == 0, capsys.readouterr().err
        files = hub.repositories[f"me/{name}"].files
        assert {"README.md", "run.json", "tokenizer.json"} <= files.keys()
        assert not [f for f in files if "training_args" in f or "checkpoint" in f or f.endswith((".bin", ".tsv"))]
        metadata, text = card_of(hub, name)
        assert metadata["base_model"] == base and metadata["tags"] == ["hf_ft_ext", method, "train.csv"]
        record = json.loads(files["run.json"])
        (result,) = metadata["model-index"][0]["results"]
        assert result["metrics"][0] == {
            "type": "accuracy", "name": "accuracy", "value": round(record["metrics"]["eval_accuracy"], 6),
        }  # fmt: skip
        assert str(tmp_path) not in text and f"--method {method}" in text and "--push_to_hub" not in text
        code[name], *delta = snippets(text)
        line[name] = record["load"]
        if delta:
            code[f"{name}-delta"], line[f"{name}-delta"] = delta[0], record["load"]
    assert {"run-structured-delta", "run-mask-delta", "run-trajectory-delta"} <= code.keys()
    assert "apply_trajectory(" in code["run-trajectory-delta"]
    assert len(hub.repositories["me/run-structured"].commits) == 1
    printed = capsys.readouterr().out
    assert printed.count("pushed: http://127.0.0.1") == len(runs)

    kernels, program = pushed_kernels(hub, base, tmp_path)
    program += [
        "import json, sys, torch",
        "from transformers import AutoTokenizer",
        "result = {}",
        f"texts = {['the film was good', 'a bad , dull plot']!r}",
        f"for name, code in json.loads({json.dumps(code)!r}).items():",
        "    names = {}",
        "    exec(code, names)",
        f"    batch = AutoTokenizer.from_pretrained({base!r})(texts, return_tensors='pt', padding=True)",
        "    with torch.no_grad():",
        "        result[name] = names['model'].eval()(**batch).logits.tolist()",
        "print(json.dumps(result))",
    ]
    done = fresh_process("\n".join(program), hub, tmp_path / "elsewhere")
    check_kernels(kernels, done.stdout)
    pulled = json.loads(done.stdout.splitlines()[-1])
    from peft import PeftModel

    names = {"AutoConfig": AutoConfig, "PeftModel": PeftModel}
    names["AutoModelForSequenceClassification"] = AutoModelForSequenceClassification
    for name in code:
        own = logits(eval(line[name], dict(names)), tokenizer)
        exact = not name.endswith("-delta")  # a delta is added to the base: equal to rounding
        assert torch.allclose(torch.tensor(pulled[name]), own, atol=0 if exact else 1e-5, rtol=0), name
        assert not torch.allclose(own, logits(AutoModelForSequenceClassification.from_pretrained("base"), tokenizer))


def test_tokens_and_paths_are_in_no_file_and_not_in_the_repository(hub, base, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "none")
    options = (
        "--hub_token",
        "writer",
        "--hub_private_repo",
        "true",
        "--hub_model_id",
        "me/named",
        "--save_steps",
        "1",
        "--hub_revision",
        "try",
        "--max_eval_samples",
        "5",
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "1",
        "--load_best_model_at_end",
        "true",
    )
    assert push(str(tmp_path / "base"), "full", str(tmp_path / "out"), *options) == 0, capsys.readouterr().err
    repository = hub.repositories["me/named"]
    assert repository.private and not repository.files
    for path in Path("out").rglob("*"):
        assert not path.is_file() or b"writer" not in path.read_bytes(), path
    pushed = repository.branches["try"]
    assert {"run.json", "trainer_state.json", "README.md", "model.safetensors", "tokenizer.json"} <= pushed.keys()
    for name, content in pushed.items():  # the folder's path holds the user's name
        assert str(tmp_path).encode() not in content and str(Path.home()).encode() + b"/" not in content, name
    assert json.loads(Path("out/trainer_state.json").read_text())["best_model_checkpoint"].startswith(str(tmp_path))
    assert json.loads(pushed["trainer_state.json"])["best_model_checkpoint"].startswith("checkpoint-")
    card = pushed["README.md"].decode()
    assert "from a local folder (`base`)" in card and "| validation | 5 of 12, the first ones | accuracy |" in card
    assert "model-index" not in card


def test_adapters_pushed_by_transformers_lack_the_files_of_this_machine(hub, base, tokenizer):
    """During training and by `push_to_hub`; here the folders still load with the base model's files."""
    local = {"model.safetensors.index.json", "model-head.safetensors"}
    settings = {"max_steps": 2, "save_steps": 2, "hub_strategy": "checkpoint", "push_to_hub": True}
    args = LoraTrainingArguments("out", hub_model_id="me/out", use_cpu=True, disable_tqdm=True, **settings)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3, ignore_mismatched_sizes=True)
    trainer = LoraTrainer(model, args, train_dataset=tiny_dataset(8), processing_class=tokenizer)
    trainer.train()
    trainer.push_to_hub(blocking=False)
    pushed = hub.repositories["me/out"].files
    assert {"adapter_model.safetensors", "last-checkpoint/adapter_model.safetensors"} <= pushed.keys()
    assert not local & {Path(name).name for name in pushed}
    for folder in ("out", "out/checkpoint-2"):
        assert local <= set(os.listdir(folder))
        loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        assert torch.equal(logits(loaded, tokenizer), logits(trainer.model, tokenizer))


def test_an_adapter_of_a_local_model_is_warned_about(hub, base, caplog):
    assert push("base", "lora", "out") == 0
    assert "others cannot load the adapter" in caplog.text


# --- failures -----------------------------------------------------------------------------------------


REFUSALS = [
    ("commit", 401, "answered 401: the token is missing or not valid; log in with `hf auth login`"),
    ("PUT", BROKEN, r"the connection failed \(.+\); check the network"),
    ("commit", 500, "answered 500: the Hub has an internal error"),
    ("commit", 403, "answered 403: the token may not write there; use one with write permission"),
    ("preupload", 404, "answered 404: there is no such repository"),
    ("commit", 409, "answered 409: the repository was changed by another user at the same time"),
    ("commit", 429, "answered 429: too many requests"),
    ("validate-yaml", 500, "answered 500: the Hub has an internal error"),
    ("lfs/objects/batch", 500, "answered 500: the Hub has an internal error"),
    ("PUT", 500, "answered 500: the Hub has an internal error"),
    ("commit", 503, "answered 503: the Hub has an internal error"),
    ("commit", BROKEN, "the connection failed"),
]


@pytest.mark.parametrize(("pattern", "status", "message"), REFUSALS[:3])
def test_a_push_that_fails_after_training_loses_nothing(hub, base, capsys, pattern, status, message):
    hub.faults.append(Fault(pattern, status))
    hub.repositories["me/out"] = Repository()
    assert push("base", "full", "out") == 3
    printed = capsys.readouterr()
    assert re.search(f"error: --push_to_hub: .*{message}", printed.err), printed.err
    assert "Traceback" not in printed.err
    assert "complete in 'out'; to push it: hf-ft-ext push out --hub_model_id me/out" in printed.err
    record = json.loads(Path("out/run.json").read_text())
    assert "eval_accuracy" in record["metrics"] and not hub.repositories["me/out"].files
    AutoModelForSequenceClassification.from_pretrained("out")
    hub.faults.clear()
    assert push_main(["out", "--hub_model_id", "me/out"]) == 0
    assert "model.safetensors" in hub.repositories["me/out"].files


@pytest.mark.parametrize(("pattern", "status", "message"), REFUSALS)
def test_refusals_give_the_reason_and_keep_the_run(hub, tiny_bert_dir, capsys, pattern, status, message):
    folder = model_run("out", tiny_bert_dir)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.faults.append(Fault(pattern, status))
    assert push_main(["out"]) == 3
    assert re.search(f"error: --push_to_hub: .*{message}", capsys.readouterr().err)
    assert before.items() <= {path.name: path.read_bytes() for path in folder.iterdir()}.items()
    assert not hub.repositories["me/out"].files


@pytest.mark.parametrize(
    ("pattern", "status"), [("commit", 409), ("commit", 500), ("PUT", BROKEN), ("validate-yaml", 502), ("create", 503)]
)
def test_temporary_failures_are_retried(hub, pattern, status, tiny_bert_dir):
    folder = model_run("again", tiny_bert_dir)
    hub.faults.append(Fault(pattern, status, times=1))
    push_run(folder, "me/again")
    assert "model.safetensors" in hub.repositories["me/again"].files
    assert sum(line.startswith("PUT") for line in hub.requests) <= 4  # what was uploaded is not uploaded again


@pytest.mark.parametrize(
    ("token", "fault", "message"),
    [
        ("wrong", None, "cannot be made: the Hub answered 401: the token is missing or not valid"),
        ("reader", None, "cannot be made: the Hub answered 403: the token may not write"),
        ("writer", Fault("create", 500), "cannot be made: the Hub answered 500"),
        ("writer", Fault("create", BROKEN), "cannot be made: the connection failed"),
    ],
)
def test_a_repository_that_cannot_be_made_ends_the_run_before_training(
    hub, capsys, monkeypatch, base, token, fault, message
):
    monkeypatch.setenv("HF_TOKEN", token)
    hub.faults += [fault] if fault else []
    assert push("base", "full", "out") == 2
    assert f"error: --push_to_hub: the Hub repository {message}" in capsys.readouterr().err
    assert not Path("out", "run.json").exists()


@pytest.mark.parametrize(
    ("revision", "fault", "message"),
    [
        ("v1", None, "hub_revision 'v1' is a tag of me/out; pass a branch"),
        (
            "refs/pr/7",
            None,
            r"hub_revision 'refs/pr/7' is not a branch of me/out, and the Hub cannot create it \(.*Invalid ref",
        ),
        ("new", Fault("branch/new", 403), "hub_revision new: the branch cannot be found or made: .* answered 403"),
        ("new", Fault("refs$", 500), "hub_revision new: the branch cannot be found or made: .* answered 500"),
    ],
)
def test_a_branch_that_cannot_be_pushed_to_ends_the_run_before_training(hub, base, capsys, revision, fault, message):
    hub.repositories["me/out"] = Repository(tags=["v1"])
    hub.faults += [fault] if fault else []
    assert push("base", "full", "out", "--hub_revision", revision) == 2
    assert re.search(f"error: .*{message}", capsys.readouterr().err, flags=re.DOTALL)
    assert not Path("out").exists() or not os.listdir("out"), "nothing was trained"


def test_a_missing_branch_is_made_and_a_known_one_is_used(hub, tiny_bert_dir):
    folder = model_run("out", tiny_bert_dir)
    for _ in range(2):
        assert push_main([str(folder), "--hub_revision", "try"]) == 0
    repository = hub.repositories["me/out"]
    assert not repository.files and "model.safetensors" in repository.branches["try"]
    assert sum("/branch/" in line for line in hub.requests) == 1
    with pytest.raises(InputError, match="is not a branch of me/out, and the Hub cannot create it"):
        push_run(folder, "me/out", revision="not a branch")


def test_commands_in_messages_keep_names_with_spaces_whole(hub, tiny_bert_dir, capsys):
    folder = model_run("my run", tiny_bert_dir)
    hub.faults.append(Fault("create", 403))
    assert push_main([str(folder), "--hub_model_id", "me/x"]) == 3
    assert "hf-ft-ext push 'my run' --hub_model_id me/x" in capsys.readouterr().err


def test_an_unreachable_hub(hub, capsys, tiny_bert_dir):
    folder = model_run("lonely", tiny_bert_dir)
    hub.shutdown()
    hub.server_close()
    assert push_main([str(folder)]) == 3
    error = capsys.readouterr().err
    assert "the connection failed" in error and "The result is complete in" in error


def test_nothing_to_push(tmp_path, capsys):
    assert push_main([str(tmp_path)]) == 2
    assert "contains no finished run" in capsys.readouterr().err
    write_run(tmp_path / "evaluated", run_record("full", 1, 0.5))
    with pytest.raises(InputError, match="contains no saved model, so there is nothing to push"):
        push_run(tmp_path / "evaluated", "me/x")
    assert run_glue.main(["--method", "full", "--do_eval", "--push_to_hub", "--validation_file", "dev.csv"]) == 2
    assert "--push_to_hub shares what training leaves; add --do_train" in capsys.readouterr().err


def test_a_dry_run_makes_no_repository(hub, base):
    assert push("base", "full", "out", "--dry_run") == 0
    assert hub.repositories.keys() == {"me/base"}


# --- files and cards ----------------------------------------------------------------------------------


def test_the_demo_encoder_has_its_name_on_the_hub(hub, tmp_path, tiny_bert_dir):
    folder = model_run("demo", tiny_bert_dir, model="all-MiniLM-L6-v2 (demo encoder)", task="demo")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": tiny_bert_dir})
    )
    push_run(folder, "me/demo")
    pushed = hub.repositories["me/demo"].files
    name = "sentence-transformers/all-MiniLM-L6-v2"
    assert json.loads(pushed["adapter_config.json"])["base_model_name_or_path"] == name
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_bert_dir
    metadata, _ = card_of(hub, "demo")
    assert (metadata["base_model"], metadata["base_model_relation"], metadata["library_name"]) == (
        name,
        "adapter",
        "peft",
    )
    assert "datasets" not in metadata
