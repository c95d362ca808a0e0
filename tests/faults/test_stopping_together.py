"""When the processes of a run ask each other for signals: seldom, all after the same steps, and never too late."""

import random

import pytest
import torch
from tiny import tiny_dataset, tiny_model, tiny_tokenizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_ft_ext.launch import interruption
from hf_ft_ext.launch.interruption import SaveAndStop, _Schedule
from hf_ft_ext.launch.stopping import Interrupted, Signals


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


def asked(seconds_of, steps: int, monkeypatch) -> tuple[list[int], list[float]]:
    """The steps after which two processes ask each other, and the seconds in between.

    Args:
        seconds_of: the seconds that a step takes, of a process and a step.
    """
    clocks, schedules = (Clock(), Clock()), []
    for clock in clocks:
        monkeypatch.setattr(interruption, "time", clock)
        schedules.append(_Schedule())
    found, gaps, before = [], [], 0.0
    for step in range(1, steps + 1):
        due = []
        for process in (0, 1):
            clocks[process].now += seconds_of(process, step)
        for clock in clocks:  # the gradients are a barrier
            clock.now = max(other.now for other in clocks)
        seconds = []
        for clock, schedule in zip(clocks, schedules, strict=True):
            monkeypatch.setattr(interruption, "time", clock)
            due.append(schedule.is_due(step))
            seconds.append(schedule.seconds_per_step(step))
        assert due[0] == due[1]
        if due[0]:
            found.append(step)
            gaps.append(clocks[0].now - before)
            before = clocks[0].now
            for clock, schedule in zip(clocks, schedules, strict=True):
                monkeypatch.setattr(interruption, "time", clock)
                schedule.plan(step, max(seconds))
    return found, gaps


def test_quick_steps_are_asked_about_once_a_second(monkeypatch):
    draw = random.Random(3)
    found, gaps = asked(lambda process, step: 60.0 if step == 1 else draw.uniform(0.001, 0.003), 10000, monkeypatch)
    assert len(found) < 50  # of 10,000 steps, or 25 seconds
    assert found[:4] == [1, 2, 4, 8]  # a slow first step does not decide
    assert max(gaps[1:]) < 2 * _Schedule.INTERVAL
    assert gaps[-1] > 0.5 * _Schedule.INTERVAL


def test_slow_steps_are_asked_about_every_time(monkeypatch):
    found, _ = asked(lambda process, step: 0.5 if process else 1.5, 20, monkeypatch)
    assert found == list(range(1, 21))


class Request(TrainerCallback):
    """A signal comes at `event`."""

    def __init__(self, event: str, signals: Signals):
        setattr(self, event, lambda *args, **kwargs: setattr(signals, "requested", 15))


@pytest.mark.parametrize(("event", "step"), [("on_step_begin", 1), ("on_substep_end", 1), ("on_train_end", 2)])
def test_a_signal_in_training_always_ends_it(tmp_path, event, step):
    signals = Signals()
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=2, save_steps=100,
        gradient_accumulation_steps=2, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(
        tiny_model(), args, train_dataset=tiny_dataset(32), processing_class=tiny_tokenizer(),
        callbacks=[Request(event, signals), SaveAndStop(signals)],
    )  # fmt: skip
    with pytest.raises(Interrupted):
        trainer.train()
    assert trainer.state.global_step == step
    assert (tmp_path / f"checkpoint-{step}/model.safetensors").is_file()


@pytest.mark.parametrize(("strategy", "step"), [("epoch", 1), ("epoch", 2), ("epoch", 4), ("best", 4)])
def test_a_signal_in_the_last_step_of_an_epoch_waits_for_the_evaluation_at_its_end(tmp_path, strategy, step):
    """A resumed run begins with the next epoch, so the evaluation would be left out, and with it the best model."""

    def trainer(*callbacks: TrainerCallback) -> Trainer:
        args = TrainingArguments(
            str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, num_train_epochs=2,
            per_device_train_batch_size=8, eval_strategy="epoch", save_strategy=strategy, dataloader_pin_memory=False,
            learning_rate=0.0, metric_for_best_model="loss",
        )  # fmt: skip
        rows = tiny_dataset(16)
        return Trainer(
            tiny_model(), args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer(),
            callbacks=list(callbacks),
        )  # fmt: skip

    signals = Signals()
    request = TrainerCallback()

    def on_step_end(args, state, control, **kwargs):
        if state.global_step == step:
            signals.requested = 15

    request.on_step_end = on_step_end
    with pytest.raises(Interrupted):
        trainer(request, SaveAndStop(signals)).train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert [entry["step"] for entry in resumed.state.log_history if "eval_loss" in entry] == (
        [2, 4] if strategy == "epoch" else [2]  # one that is not the best would take back that a checkpoint is due
    )


def test_two_processes_ask_after_the_last_step_too(tmp_path, monkeypatch):
    """A stub in place of the collective: the other process has the signal."""
    calls = []

    def other_has_it(mine: torch.Tensor) -> torch.Tensor:
        calls.append(mine)
        return torch.cat([mine, torch.tensor([[15.0 if len(calls) > 1 else 0.0, 1e-4]])])

    monkeypatch.setattr(interruption, "gather", other_has_it)
    callback, control = SaveAndStop(Signals()), type("Control", (), {"should_training_stop": False})()
    args = type("Args", (), {"world_size": 2, "device": torch.device("cpu"), "save_strategy": "steps"})()
    state = type("State", (), {"global_step": 0, "max_steps": 2, "epoch": 0.5})()
    callback.on_train_begin(args, state, control)
    stopped = []
    for step in (1, 2):
        callback.on_step_begin(args, state, control, optimizer=object())
        state.global_step = step
        callback.on_step_end(args, state, control)
        if step == 2:
            callback.on_epoch_end(args, state, control)
        stopped.append(control.should_training_stop)
    assert stopped == [False, True]
    with pytest.raises(Interrupted) as stop:
        callback.on_train_end(args, state, control)
    assert stop.value.number == 15
