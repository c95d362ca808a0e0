#!/usr/bin/env python
"""Fine-tune a sequence classifier with one of the methods of hf_ft_ext; `--help` lists them."""

import logging
import os
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the launcher on `argv` (`None` = this process's words); the exit status.

    0 = done, 2 = bad input, 3 = done but not pushed, 130 = Ctrl-C, 143 = SIGTERM.
    """
    from hf_ft_ext.errors import InputError, PushError
    from hf_ft_ext.launch.signals import Interrupted, Signals
    from hf_ft_ext.methods import list_methods, only_help_wanted

    first = int(os.environ.get("RANK", 0)) == 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("hf_ft_ext").setLevel(logging.INFO if first else logging.WARNING)
    argv = sys.argv[1:] if argv is None else list(argv)
    signals = Signals()
    try:
        with signals:
            if only_help_wanted(argv):  # answered before the slow imports
                sys.stdout.write(list_methods())
            else:
                run(argv, signals)
    except Interrupted as stop:
        return say_how_to_go_on(stop, signals)
    except Exception as error:
        if signals.raised is not None:  # a library made something else of it
            return say_how_to_go_on(Interrupted(signals.raised), signals)
        if isinstance(error, PushError):
            sys.stderr.write(f"error: {error}\n")
            return 3
        if not isinstance(error, InputError):
            raise
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


def say_how_to_go_on(stop, signals) -> int:
    """Say, once, what is left of a run that was interrupted; returns the exit status."""
    from hf_ft_ext.launch.interruption import what_now

    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        sys.stderr.write(f"stopped by {stop.name}: {what_now(signals)}\n")
    return stop.status


def run(argv: list[str], signals) -> None:
    """Parse, load, build, train, evaluate, predict, record, push."""
    from hf_ft_ext.parsing import parse_arguments

    run_args, model_args, data_args, args = parse_arguments(argv)

    from hf_ft_ext.launch import build, results, search, sharing, storage  # after --help has been answered
    from hf_ft_ext.launch.interruption import SaveAndStop
    from hf_ft_ext.launch.leaving import keep
    from hf_ft_ext.training.plan import training_plan

    sharing.prepare(run_args, args)
    build_trainer, data = build.load(run_args, model_args, data_args, args, [SaveAndStop(signals)])
    trainer = build_trainer(args)
    signals.check()
    if args.world_size > 1:
        keep(trainer)
    if run_args.dry_run:
        plan = training_plan(trainer)
        if args.process_index == 0:
            print(plan.table())
        trainer.accelerator.end_training()
        return
    build.make_room(run_args, args)  # only now: nothing that the user passed can fail any more
    signals.output_dir = args.output_dir
    with storage.explained(args.output_dir):
        if run_args.hp_search:
            search.search_hyperparameters(build_trainer, args, run_args.hp_search)
            trainer = build_trainer(args)
            if args.world_size > 1:
                keep(trainer)
        metrics, push = {}, False
        if args.do_train:
            metrics |= trainer.train(resume_from_checkpoint=args.resume_from_checkpoint).metrics
            push = sharing.postponed(args)  # save_model would push by itself, before there are numbers to show
            trainer.save_model()
        signals.check()
        if args.do_eval:
            metrics |= results.evaluate_all(trainer, data.validation)
        if args.do_predict:
            metrics |= results.predict_all(trainer, data.test)
        signals.check()
        if trainer.is_world_process_zero():
            print(results.record_run(trainer, metrics, ["run_glue.py", *argv], run_args, model_args, data_args))
    failure = sharing.push_finished(trainer, push)
    trainer.accelerator.wait_for_everyone()  # gloo's threads abort a process that exits while they hold tensors
    trainer.accelerator.end_training()
    if failure is not None:
        raise failure


def command() -> None:
    """`main` as a program."""
    status = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from hf_ft_ext.launch.leaving import leave

        leave(status)
    sys.exit(status)


if __name__ == "__main__":
    command()
