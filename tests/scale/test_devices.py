"""Several GPUs: one process never drives them all, and a process that shall see one sees the user's first."""

import os

import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer

import run_glue
from hf_ft_ext.errors import InputError
from hf_ft_ext.methods import METHODS
from hf_ft_ext.training.weights.devices import _VISIBLE, one_device, seeing_one_device

QUICK = {"kernel": {"kernel_regularization": "1e-2"}, "sparse": {"sparse_density": 0.2}}


def make(monkeypatch, folder, method: str, model):
    """A trainer on a machine with two GPUs, which the arguments count; everything else runs on the CPU."""
    with monkeypatch.context() as two:
        two.setattr(torch.cuda, "device_count", lambda: 2)
        args = METHODS[method].arguments_class()(str(folder), report_to="none", bf16=False, **QUICK.get(method, {}))
    assert args.n_gpu == 2
    return METHODS[method].trainer_class()(
        model, args, train_dataset=tiny_dataset(8), processing_class=tiny_tokenizer()
    )


@pytest.mark.parametrize("method", METHODS)
def test_no_trainer_takes_two_gpus_into_one_process(tmp_path, monkeypatch, method):
    message = r"one process sees 2 GPUs .*DataParallel.*`accelerate launch --num_processes 2`.*CUDA_VISIBLE_DEVICES=0"
    with pytest.raises(InputError, match=message):
        make(monkeypatch, tmp_path, method, tiny_model())


def test_a_model_spread_over_gpus_is_no_copy_of_it(tmp_path, monkeypatch):
    model = tiny_model()
    model.hf_device_map = {"bert": 0, "classifier": 1}
    assert make(monkeypatch, tmp_path, "full", model).args.n_gpu == 1


def test_the_launcher_refuses_before_it_loads_anything(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert run_glue.main(["--method", "full", "--train_file", "not-there.csv", "--bf16", "false"]) == 2
    assert "error: one process sees 8 GPUs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"CUDA_VISIBLE_DEVICES": "0"}),
        ({"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "3"}),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, {"CUDA_VISIBLE_DEVICES": "-1"}),
        ({"HIP_VISIBLE_DEVICES": "2,1"}, {"HIP_VISIBLE_DEVICES": "2"}),
        ({"ROCR_VISIBLE_DEVICES": "4,5"}, {"ROCR_VISIBLE_DEVICES": "4"}),
        ({"ROCR_VISIBLE_DEVICES": "4,5", "HIP_VISIBLE_DEVICES": "1,0"}, {"HIP_VISIBLE_DEVICES": "1"}),
        ({"ZE_AFFINITY_MASK": "0.1,1"}, {"ZE_AFFINITY_MASK": "0.1", "CUDA_VISIBLE_DEVICES": "0"}),
        ({"ASCEND_RT_VISIBLE_DEVICES": "6,7"}, {"ASCEND_RT_VISIBLE_DEVICES": "6", "CUDA_VISIBLE_DEVICES": "0"}),
    ],
)
def test_the_users_first_device_is_taken(monkeypatch, given, expected):
    for name in _VISIBLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert one_device() == expected
    with seeing_one_device():
        assert {name: os.environ[name] for name in expected} == expected
        assert one_device() == expected or "ROCR_VISIBLE_DEVICES" in given
    assert {name: os.environ[name] for name in _VISIBLE if name in os.environ} == given
