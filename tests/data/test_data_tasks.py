"""The table of tasks: complete, and helpful about names it does not know."""

import pytest

from hf_ft_ext.data.tasks import GLUE_ID, SUPERGLUE_ID, TASKS, get_task
from hf_ft_ext.errors import InputError
from hf_ft_ext.metrics import check_metric

GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")
SUPERGLUE = ("boolq", "cb", "copa", "multirc", "wic", "wsc")
FEW_SHOT = ("mr", "cr", "mpqa", "subj", "trec", "sst5", "snli", "ag_news")


def test_all_tasks_are_there_and_consistent():
    assert set(TASKS) == {*GLUE, *SUPERGLUE, *FEW_SHOT, "demo"}
    for name, task in TASKS.items():
        assert task.name == name
        assert len({len(columns) for columns in task.text_columns}) == 1
        assert set(task.label_aliases.values()) <= set(task.label_names or ())
        assert (task.label_names is None) == (task.problem_type == "regression")
        check_metric(task.metric, task.problem_type, len(task.label_names) if task.label_names else None)
    assert all(TASKS[name].hub_id == GLUE_ID and TASKS[name].hub_config == name for name in GLUE)
    assert all(TASKS[name].hub_id == SUPERGLUE_ID and TASKS[name].hub_config == name for name in SUPERGLUE)
    assert all(TASKS[name].hub_id.count("/") == 1 for name in FEW_SHOT)


def test_metrics_are_glues():
    metrics = {name: TASKS[name].metric for name in GLUE}
    assert {name: metric for name, metric in metrics.items() if metric != "accuracy"} == {
        "cola": "matthews",
        "mrpc": "accuracy_f1",
        "qqp": "accuracy_f1",
        "stsb": "pearson_spearman",
    }


@pytest.mark.parametrize(("name", "known"), [("SST-2", "sst2"), ("STS-B", "stsb"), ("CoLA", "cola"), ("sst5", "sst5")])
def test_usual_spellings(name, known):
    assert get_task(name) is TASKS[known]


def test_unknown_task_names_the_nearest():
    with pytest.raises(InputError, match=r"unknown task 'sts2'; did you mean .*sst2.*Known: cola, .*--train_file"):
        get_task("sts2")
    with pytest.raises(InputError, match=r"unknown task 'xyzzy'; Known: cola"):
        get_task("xyzzy")
