"""The resource monitor: training alone is measured, and a resumed run adds up."""

import time

import numpy as np
import pytest
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ft_ext.training.resources import PeakMemory, ResourceMonitor, find_monitor, preparation


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
    """Holds `mib` MiB during an optimizer step (on_pre_optimizer_step) or during evaluation."""

    def __init__(self, event: str, mib: int):
        setattr(self, event, lambda *args, **kwargs: np.ones(mib * 2**20, dtype=np.uint8).sum() and None)


def test_peak_memory_sees_what_was_freed_again():
    peak = PeakMemory()
    if not peak.exact:
        pytest.skip("this system has no resettable high-water mark")
    peak.reset()
    before = peak.bytes()
    np.ones(64 * 2**20, dtype=np.uint8).sum()
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
