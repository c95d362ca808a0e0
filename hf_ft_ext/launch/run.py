"""One run of the launcher, from its arguments to its exit status: parse, load, train, evaluate, record, push."""

import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from hf_ft_ext.errors import InputError, PushError
from hf_ft_ext.launch.choice import read_choice
from hf_ft_ext.launch.processes import Process, another_failed, report, report_crash, silence_bars, start_log
from hf_ft_ext.launch.stopping import Interrupted, Signals, end_process, keep_alive
from hf_ft_ext.methods import list_methods, only_help_wanted

DONE, CRASHED, BAD_INPUT, NOT_PUSHED = 0, 1, 2, 3  # exit statuses; a signal ends with 128 + its number


def main(argv: list[str] | None = None, program: Sequence[str] = ("run_glue.py",)) -> int:
    """Run the launcher on `argv` (`None` = this process's words); return the exit status.

    0 = done, 2 = bad input, 3 = done but not pushed, 130 = Ctrl-C, 143 = SIGTERM.

    Args:
        argv: the arguments, without the program's own name.
        program: the words by which the program was called, for the run record.
    """
    log = start_log(Process.this())
    argv = sys.argv[1:] if argv is None else list(argv)
    signals = Signals()
    try:
        with signals, contextlib.ExitStack() as at_end:
            if only_help_wanted(argv):  # answered before the slow imports
                sys.stdout.write(list_methods())
            else:
                run_method(argv, list(program), signals, at_end)
    except Interrupted as stop:
        return _report_interruption(stop, signals)
    except Exception as error:
        if signals.raised is not None:  # a library replaced the exception
            return _report_interruption(Interrupted(signals.raised), signals)
        if isinstance(error, PushError):
            sys.stderr.write(f"error: {error}\n")
            return NOT_PUSHED
        if not isinstance(error, InputError):
            raise
        report("error", str(error))
        return BAD_INPUT
    finally:
        log.flush_held()
    return DONE


def command(argv: list[str] | None = None, program: Sequence[str] = ("run_glue.py",)) -> None:
    """Run `main` as a program and end the process with its status."""
    if Process.this().is_single:
        sys.exit(main(argv, program))
    try:
        status = main(argv, program)
    except Exception as error:
        report_crash(error)
        status = CRASHED
    end_process(status)


def run_method(argv: list[str], program: list[str], signals: Signals, at_end: contextlib.ExitStack) -> None:
    choice = read_choice(argv)  # an unknown recipe or method is refused before the slow imports

    from hf_ft_ext.launch.parsing import parse_choice

    run_args, model_args, data_args, args = parse_choice(choice)

    from hf_ft_ext.arguments import SEQUENCE_CLASSIFICATION
    from hf_ft_ext.launch import building, folder, language, results, search, sharing  # after --help has been answered
    from hf_ft_ext.launch.interruption import SaveAndStop

    if args.disable_tqdm or args.process_index > 0:
        silence_bars()
    sharing.prepare(run_args, args)
    language.check_language_options(run_args)
    existed = os.path.isdir(args.output_dir)
    load = building.load if run_args.task_type == SEQUENCE_CLASSIFICATION else language.load
    build_trainer, data = load(run_args, model_args, data_args, args, [SaveAndStop(signals)])
    trainer = build_trainer(args)
    signals.check()
    if args.world_size > 1:
        keep_alive(trainer)
    if run_args.dry_run:
        _show_plan(trainer)
        if args.process_index == 0 and not existed:  # `Trainer` creates it
            with contextlib.suppress(OSError):
                os.rmdir(args.output_dir)
        trainer.accelerator.end_training()
        return
    folder.prepare_folder(run_args, args, at_end)  # only now, when all input has been checked
    signals.output_dir = args.output_dir
    with folder.disk_errors_as_input_errors(args.output_dir):
        if run_args.hp_search:
            signals.found = search.search_hyperparameters(build_trainer, args, run_args.hp_search)
            trainer = build_trainer(args)
            if args.world_size > 1:
                keep_alive(trainer)
        metrics, push = _train_and_score(trainer, data, run_args, args, signals)
        if trainer.is_world_process_zero():
            print(results.record_run(trainer, metrics, [*program, *argv], run_args, model_args, data_args, data))
    failure = sharing.push_finished(trainer, push)
    trainer.accelerator.wait_for_everyone()  # gloo's threads abort a process that exits while they hold tensors
    trainer.accelerator.end_training()
    if failure is not None:
        raise failure


def _train_and_score(
    trainer: Any, data: Any, run_args: Any, args: Any, signals: Signals
) -> tuple[dict[str, float], bool]:
    """Train, save, evaluate and predict, as far as the arguments ask for it: the metrics, and the postponed push."""
    from hf_ft_ext.launch import results, sharing

    metrics, push = {}, False
    if args.do_train:
        metrics |= trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
        push = sharing.postpone_push(trainer)  # save_model would push before there are metrics
        trainer.save_model()
        trainer.save_state()  # saves the log of losses even without checkpoints
    signals.check()
    results.choose_thresholds(trainer, data.validation)
    if args.do_eval:
        metrics |= results.evaluate_all(trainer, data.validation)
    if args.do_predict:
        numbers = getattr(data, "row_numbers", None)  # of classifiers
        metrics |= results.predict_all(trainer, data.test, run_args.prediction_probabilities, numbers)
    signals.check()
    if args.do_train and not args.load_best_model_at_end:  # the final evaluation is of the last step
        trainer.save_state()
    return metrics, push


def _show_plan(trainer: Any) -> None:
    """Print what the run would train, and the parts of the model. All processes call it; the first one prints."""
    from hf_ft_ext.structure.table import parts_table
    from hf_ft_ext.training.runs.plan import training_plan

    plan = training_plan(trainer)
    if trainer.args.process_index > 0:
        return
    print(plan.table())
    # In a sharded run a process holds only parts of the weights, and a forward pass would wait for the others.
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        print("", parts_table(trainer.model), sep="\n")


def _report_interruption(stop: Interrupted, signals: Signals) -> int:
    """Report, once, how to continue the interrupted run; return the exit status."""
    from hf_ft_ext.launch.interruption import how_to_continue

    if not another_failed():  # then the launcher ended this process, and the other's error says what to do
        report(f"stopped by {stop.name}", how_to_continue(signals), same="stopped", failed=False)
    return stop.status
