"""The resource monitor: training alone is measured, and a resumed run adds up."""

import mmap
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from hf_ft_ext.training.runs.record import write_run_record
from hf_ft_ext.training.runs.resources import PeakMemory, ResourceMonitor, find_monitor, preparation
from hf_ft_ext.training.weights.devices import device_name


def make(folder, monitor, callbacks=(), **options):
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "save_strategy": "no", **options}
    return Trainer(
        tiny_model(),
        TrainingArguments(
            str(folder), report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False, **options
        ),
        train_dataset=tiny_dataset(32),
        eval_dataset=tiny_dataset(16, seed=1),
        processing_class=tiny_tokenizer(),
        callbacks=[monitor, *callbacks],
    )


class Allocate(TrainerCallback):
    """Holds `mib` MiB once, in an optimizer step (on_pre_optimizer_step) or in an evaluation."""

    def __init__(self, event: str, mib: int):
        def hold(*args, **kwargs) -> None:
            if not self.done:
                self.done = bool(np.ones(mib * 2**20, dtype=np.uint8).all())

        self.done = False
        setattr(self, event, hold)


def test_peak_memory_sees_what_was_freed_again():
    peak = PeakMemory()
    if not peak.exact:
        pytest.skip("this system has no resettable high-water mark")
    peak.reset()
    before = peak.bytes()
    # Not from malloc, which may keep what is freed once a library has raised its thresholds.
    with mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert 60 * 2**20 < peak.bytes() - before < 80 * 2**20
    peak.reset()
    assert peak.bytes() - before < 16 * 2**20


def test_training_peaks_count_and_evaluation_peaks_do_not(tmp_path):
    if not PeakMemory().exact:
        pytest.skip("this system has no resettable high-water mark")
    plain, step, evaluation = ResourceMonitor(), ResourceMonitor(), ResourceMonitor()
    make(tmp_path, plain).train()
    make(tmp_path, step, [Allocate("on_pre_optimizer_step", 200)]).train()
    make(tmp_path, evaluation, [Allocate("on_prediction_step", 200)], eval_strategy="epoch").train()
    assert step.peak_memory_bytes > plain.peak_memory_bytes + 100 * 2**20
    assert evaluation.peak_memory_bytes < plain.peak_memory_bytes + 100 * 2**20


def test_evaluation_time_is_left_out_and_samples_are_counted(tmp_path):
    class Slow(TrainerCallback):
        def on_prediction_step(self, *args, **kwargs):
            time.sleep(0.1)

    monitor = ResourceMonitor()
    trainer = make(tmp_path, monitor, [Slow()], eval_strategy="epoch")
    start = time.perf_counter()
    trainer.train()
    total = time.perf_counter() - start
    assert monitor.train_seconds < total - 0.35  # two evaluations of two batches
    assert monitor.samples_per_second * monitor.train_seconds == pytest.approx(64, rel=1e-6)


def test_preparation_belongs_to_training(tmp_path):
    monitor = ResourceMonitor()
    trainer = make(tmp_path, monitor)
    with preparation(trainer):
        time.sleep(0.05)
    trainer.train()
    assert 0.05 <= monitor.preparation_seconds < monitor.train_seconds
    assert find_monitor(trainer) is monitor


@pytest.mark.parametrize("restore", [False, True])
def test_resumed_run_adds_the_seconds_before_its_checkpoint(tmp_path, restore):
    first = ResourceMonitor()
    trainer = make(tmp_path, first, save_strategy="epoch", num_train_epochs=1)
    with preparation(trainer):
        time.sleep(0.2)
    trainer.train()
    trainer = make(tmp_path, ResourceMonitor(), save_strategy="epoch", restore_callback_states_from_checkpoint=restore)
    trainer.train(resume_from_checkpoint=True)
    monitor = find_monitor(trainer)
    assert monitor.preparation_seconds >= 0.2
    loop = monitor.train_seconds - monitor.preparation_seconds
    assert monitor.samples_per_second * loop == pytest.approx(64, rel=1e-6)


def test_without_a_monitor_nothing_is_measured(tmp_path):
    trainer = make(tmp_path, ResourceMonitor())
    trainer.remove_callback(ResourceMonitor)
    with preparation(trainer):
        assert find_monitor(trainer) is None


class FakeDevices:
    """Stands in for `torch.cuda`: what is allocated on each of its devices, and the peak of it."""

    def __init__(self, count: int):
        self.allocated, self.peak = [0] * count, [0] * count

    def allocate(self, index: int, size: int) -> None:
        self.allocated[index] += size
        self.peak[index] = max(self.peak[index], self.allocated[index])

    def memory_allocated(self, device) -> int:
        return self.allocated[device.index]

    def max_memory_allocated(self, device) -> int:
        return self.peak[device.index]

    def reset_peak_memory_stats(self, device) -> None:
        self.peak[device.index] = self.allocated[device.index]

    def current_device(self) -> int:
        return 0


@pytest.fixture
def gpus(monkeypatch):
    fake = FakeDevices(3)
    monkeypatch.setattr(torch, "get_device_module", lambda device=None: fake)
    return fake


class At:
    """Stands in for arguments and model of a run on `device`, the model spread over `devices`."""

    world_size = 1

    def __init__(self, device: str, *devices: str):
        self.device, self.devices = torch.device(device), [torch.device(d) for d in devices or (device,)]

    def parameters(self):
        return iter([SimpleNamespace(device=d, is_meta=False, detach=lambda: torch.zeros(1)) for d in self.devices])


@pytest.mark.parametrize(
    ("devices", "own", "other"),
    [(("cuda:0",), 500, 0), (("cuda",), 500, 0), (("cuda:0", "cuda:1"), 500, 70), (("cuda:1", "cpu"), 0, 70)],
)
def test_memory_on_gpus_is_above_the_level_before_training_too(gpus, devices, own, other):
    """The model's 1,000 and 300 bytes do not count, nor does what another GPU holds; of several GPUs it is the sum."""
    at, monitor, state = At(devices[0], *devices), ResourceMonitor(), TrainerState()
    for index, size in enumerate((1000, 300, 9999)):
        gpus.allocate(index, size)
    monitor.on_init_end(at, state, None, model=at)
    monitor.on_train_begin(at, state, None, model=at)
    monitor.on_step_begin(at, state, None)
    for index, size in enumerate((500, 70, 9999)):
        gpus.allocate(index, size)
        gpus.allocate(index, -size)
    monitor.on_step_end(at, state, None, train_dataloader=SimpleNamespace(dataset=[]))
    monitor.on_train_end(at, state, None)
    assert monitor.peak_memory_bytes == own + other
    assert monitor.memory.what == "allocated on cuda"


def test_a_model_that_is_moved_when_training_begins_does_not_count(gpus):
    at, monitor, state = At("cuda:0", "cpu"), ResourceMonitor(), TrainerState()
    monitor.on_init_end(at, state, None, model=at)
    gpus.allocate(0, 1000)
    monitor.on_train_begin(at, state, None, model=at)
    monitor.on_step_begin(at, state, None)
    gpus.allocate(0, 10)
    monitor.on_step_end(at, state, None, train_dataloader=SimpleNamespace(dataset=[]))
    assert monitor.peak_memory_bytes == 10


def test_a_run_on_the_cpu_of_a_machine_with_a_gpu_measures_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *args: pytest.fail("asked CUDA"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *args: pytest.fail("asked CUDA"))
    monitor = ResourceMonitor()
    trainer = make(tmp_path, monitor, max_steps=1)
    trainer.train()
    assert monitor.memory.what == "resident set"
    record = write_run_record(
        tmp_path, method="full", task="demo", model="tiny", seed=1, metrics={}, command=[], monitor=monitor,
        device=trainer.args.device,
    )  # fmt: skip
    assert record["device"] == device_name(torch.device("cpu"))
    assert record["peak_memory_kind"] == "resident set, above the level before training, largest of all processes"


def test_device_name_is_that_of_the_run(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert device_name(torch.device("cuda:1")) == "GPU 1"
    for count, expected in ((1, "cpu, 1 thread"), (2, "cpu, 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        assert device_name(torch.device("cpu")) == expected


def test_of_several_processes_the_largest_memory_counts(monkeypatch):
    monkeypatch.setattr("hf_ft_ext.training.runs.resources.gather", lambda mine: torch.cat([mine, mine + 5]))
    at, monitor, state = At("cpu"), ResourceMonitor(), TrainerState()
    at.world_size = 2
    monitor.on_train_begin(at, state, None, model=at)
    monitor.on_step_begin(at, state, None)
    monitor.on_step_end(at, state, None, train_dataloader=SimpleNamespace(dataset=[]))
    own = monitor.peak_memory_bytes
    monitor.on_train_end(at, state, None)
    assert monitor.peak_memory_bytes == own + 5
