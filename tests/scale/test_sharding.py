"""FSDP2 and DeepSpeed: what trains whole modules or adapters does as one process, every other method refuses."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.launch import launch_command, launch_command_parser
from processes import Ended, two_ranks
from safetensors.torch import load_file
from spans import principal_angle, with_changes
from tiny import text_dataset, tiny_dataset, tiny_model, tiny_tokenizer
from transformers import AutoModelForSequenceClassification

import run_glue
from hf_ft_ext.errors import InputError
from hf_ft_ext.methods import METHODS
from hf_ft_ext.training.runs.plan import TrainedWeight
from hf_ft_ext.training.weights.sharding import sharding

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
SHARDS = ("full", "lora")
FSDP_TOO = (*SHARDS, "sparse")  # its adapter; converted layers refuse
QUICK = {"kernel": {"kernel_regularization": "1e-2"}, "sparse": {"sparse_support": "dynamic"}}


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SHARDS])
@pytest.mark.parametrize("kind", ["fsdp", "deepspeed", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_a_method_that_needs_whole_weights_refuses(tmp_path, monkeypatch, method, kind):
    arguments = METHODS[method].arguments_class()
    args = arguments(str(tmp_path), use_cpu=True, report_to="none", **QUICK.get(method, {}))
    if kind.isupper():  # what `accelerate launch` sets by its configuration file
        monkeypatch.setenv(kind, "true")
    else:
        setattr(args, kind, "zero.json" if kind == "deepspeed" else True)
    name = "DeepSpeed" if "deepspeed" in kind.lower() else "FSDP"
    with pytest.raises(InputError, match=rf"needs whole weights .*{name} spreads them; .* configs/ddp.yaml"):
        METHODS[method].trainer_class()(
            tiny_model(), args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer()
        )


def test_a_sparse_adapter_takes_fsdp_alone(tmp_path):
    args = METHODS["sparse"].arguments_class()(str(tmp_path), use_cpu=True, report_to="none")
    args.deepspeed = "zero.json"
    with pytest.raises(InputError, match=r"sparse training needs whole weights .*DeepSpeed spreads them"):
        METHODS["sparse"].trainer_class()(tiny_model(), args, train_dataset=tiny_dataset(8))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharding_on_the_cpu_is_refused(monkeypatch, capsys, tiny_bert_dir, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    if name == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        monkeypatch.delenv(f"ACCELERATE_USE_{name}")
        pytest.skip("transformers wants deepspeed installed before it looks any further")
    argv = ["--method", "full", "--model_name_or_path", tiny_bert_dir, "--use_cpu"]
    assert run_glue.main(argv) == 2
    assert "needs accelerators, and --use_cpu trains without" in capsys.readouterr().err


def test_sharding_is_detected_and_shapes_are_those_of_whole_parameters(tmp_path):
    args = METHODS["full"].arguments_class()(str(tmp_path), use_cpu=True, report_to="none")
    assert sharding(args) is None
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_shape = torch.Size((3, 4))  # as ZeRO-3 leaves it
    assert TrainedWeight.dense("weight", parameter).trained == 12


def test_the_configs_are_what_the_page_says():
    found = {path.stem: yaml.safe_load(path.read_text()) for path in CONFIGS.glob("*.yaml")}
    assert set(found) == {"cpu", "ddp", "fsdp2", "zero2", "zero3"}
    kinds = {name: config["distributed_type"] for name, config in found.items()}
    assert kinds == {"cpu": "MULTI_CPU", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED",
                     "zero3": "DEEPSPEED"}  # fmt: skip
    assert found["fsdp2"]["fsdp_config"]["fsdp_version"] == 2
    assert [found[f"zero{stage}"]["deepspeed_config"]["zero_stage"] for stage in (2, 3)] == [2, 3]
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert all(f"configs/{name}.yaml" in page for name in found)


@pytest.mark.parametrize("name", ["cpu", "ddp", "fsdp2", "zero2", "zero3"])
def test_accelerate_reads_the_configs(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.num_processes == 2 and config.mixed_precision == "no"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    text_dataset(32, seed=0).select_columns(["sentence", "label"]).to_csv(folder / "train.csv")
    text_dataset(12, seed=1).select_columns(["sentence", "label"]).to_csv(folder / "dev.csv")
    return folder


def words(method: str, batch: int, output: str) -> list[str]:
    # One column: beyond the first, these few rows' gradients have less energy than rounding.
    own = ["--sparse_basis_steps", "4", "--sparse_n_params", "1"] if method == "sparse" else []
    return [
        "--method", method, "--model_name_or_path", "model", "--train_file", "train.csv", "--validation_file",
        "dev.csv", "--max_seq_length", "16", "--max_steps", "3", "--adam_epsilon", "1e-2", "--learning_rate", "1e-2",
        "--per_device_train_batch_size", str(batch), "--logging_steps", "1", "--disable_tqdm", "true",
        "--output_dir", output, "--report_to", "none", *own,
    ]  # fmt: skip


def sharded(place: Path, method: str, config: str, monkeypatch) -> list[Ended]:
    """The launcher under `accelerate launch` with the configuration, on two processes.

    `accelerate launch` sets the environment; where it would have torch start two new processes, two forks go on.
    """
    layer = ("--fsdp_transformer_layer_cls_to_wrap", "BertLayer") if config == "fsdp2" else ()
    script = str(Path(__file__).with_name("sharded_launch.py"))
    argv = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", "0", *layer, script]
    args = launch_command_parser().parse_args([*argv, *words(method, 4, f"{config}-{method}")])
    found = []

    def start(run) -> None:
        assert int(run.nproc_per_node) == 2 and run.training_script == script
        found.extend(two_ranks(Path(script), *run.training_script_args, folder=place))

    with monkeypatch.context() as patched:
        patched.setenv("DS_ACCELERATOR", "cpu")
        patched.setattr("torch.distributed.run.run", start)
        launch_command(args)
    return found


def saved(folder: Path) -> dict[str, torch.Tensor]:
    """The weights as users load them: under ZeRO-3 transformers writes some of BERT's by their old names."""
    if (folder / "adapter_model.safetensors").exists():
        return with_changes(load_file(folder / "adapter_model.safetensors"))
    return AutoModelForSequenceClassification.from_pretrained(folder).state_dict()


def check(place: Path, monkeypatch, method: str, config: str) -> None:
    monkeypatch.chdir(place)
    assert run_glue.main([*words(method, 8, f"one-{method}"), "--use_cpu", "--overwrite_output_dir"]) == 0
    both = sharded(place, method, config, monkeypatch)
    kind = "FSDP" if config == "fsdp2" else "DEEPSPEED"
    assert all(f"spread by DistributedType.{kind}" in ended.out for ended in both)
    one, two = (saved(place / f"{name}-{method}") for name in ("one", config))
    assert one.keys() == two.keys()
    for key, value in one.items():
        if "_columns." in key:
            assert principal_angle(value[:, :1], two[key][:, :1]) < 1e-3, key
        else:
            assert torch.allclose(value, two[key], atol=2e-6), key
    first, second = (json.loads((place / f"{name}-{method}" / "run.json").read_text()) for name in ("one", config))
    for key in ("trainable_parameters", "total_parameters"):
        assert first[key] == second[key], key
    assert first["metrics"]["eval_accuracy"] == second["metrics"]["eval_accuracy"]
    assert (first["world_size"], second["world_size"]) == (1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("method", FSDP_TOO)
def test_fsdp2_gives_what_one_process_gives(place, monkeypatch, method):
    check(place, monkeypatch, method, "fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize("method", SHARDS)
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_zero_gives_what_one_process_gives(place, monkeypatch, config, method):
    pytest.importorskip("deepspeed", reason="pip install deepspeed, to run ZeRO on the CPU")
    check(place, monkeypatch, method, config)
