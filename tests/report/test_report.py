"""Reports out of run folders: rows, Pareto fronts, pages."""

import html.parser
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from run_records import MIB, run_record, write_run, write_runs

from hf_ft_ext.errors import InputError
from hf_ft_ext.report.__main__ import main
from hf_ft_ext.report.build import write_report
from hf_ft_ext.report.read import find_runs
from hf_ft_ext.report.rows import Number, pareto_front, sections

PICTURES = ("quality-memory.png", "quality-time.png")


def rows_of(root: Path):
    (section,) = sections(find_runs([root]).runs)
    return section.rows


def test_rows_are_means_over_seeds_sorted_by_quality(tmp_path):
    rows = rows_of(write_runs(tmp_path))
    assert [row.name for row in rows] == ["good", "cheap", "bad"]
    assert rows[0].seeds == [1, 2, 3]
    assert rows[0].quality == Number(pytest.approx(0.9), pytest.approx(0.01))
    assert rows[0].memory == Number(pytest.approx(302), pytest.approx(1.0))
    assert rows[0].seconds.mean == pytest.approx(92)
    assert rows[0].evaluation_seconds.mean == 0.25


@pytest.mark.parametrize(
    ("told", "lowest_first"),
    [
        ({"greater_is_better": False}, True),
        ({"greater_is_better": False, "metric_for_best_model": "eval_cost"}, True),
        ({"greater_is_better": False, "metric_for_best_model": "loss"}, False),
        ({"greater_is_better": True}, False),
        ({}, False),
    ],
)
def test_a_metric_of_which_low_values_are_good_is_sorted_that_way(tmp_path, told, lowest_first):
    for name, cost, seconds in (("a", 0.2, 5.0), ("b", 0.9, 9.0), ("c", 0.5, 7.0)):
        arguments = {"metric": ["scores.py:cost"], **(told if name != "c" else {})}
        record = run_record(name, 1, None, quality="eval_cost", arguments=arguments, train_seconds=seconds)
        record["metrics"]["eval_cost"] = cost
        write_run(tmp_path / name, record)
    rows = rows_of(tmp_path)
    assert [row.name for row in rows] == (["a", "c", "b"] if lowest_first else ["b", "c", "a"])
    front = [row.name for row in pareto_front(rows, "seconds")]
    assert front == (["a"] if lowest_first else ["a", "c", "b"])


def test_pareto_front_equals_its_definition(tmp_path):
    points = dict(zip("abcdef", ((0.9, 30), (0.9, 20), (0.8, 20), (0.7, 5), (0.6, 6), (0.7, 5)), strict=True))
    points["g"] = (0.95, 90)
    for name, (quality, seconds) in points.items():
        write_run(tmp_path / name, run_record(name, 1, quality, train_seconds=float(seconds)))
    beaten = {
        name
        for name, (q, s) in points.items()
        for q2, s2 in points.values()
        if q2 >= q and s2 <= s and (q2, s2) != (q, s)
    }
    front = [row.name for row in pareto_front(rows_of(tmp_path), "seconds")]
    assert set(front) == points.keys() - beaten == {"b", "d", "f", "g"}
    assert [points[name][1] for name in front] == sorted(points[name][1] for name in front)


def test_runs_with_other_settings_are_other_rows(tmp_path):
    for seed in (1, 2):
        for rate in (1e-3, 1e-4):
            own = {"learning_rate": rate, "output_dir": f"x{seed}", "max_train_samples": 100 if rate == 1e-3 else 50}
            write_run(tmp_path / f"full-{rate}-{seed}", run_record("full", seed, rate * 100, arguments=own))
    write_run(tmp_path / "lora", run_record("lora", 1, 0.5, arguments={"max_train_samples": 100}))
    rows = rows_of(tmp_path)
    assert [row.name for row in rows] == [
        "lora",
        "full (learning_rate=0.001, max_train_samples=100)",
        "full (learning_rate=0.0001, max_train_samples=50)",
    ]
    assert [row.notes for row in rows] == [(), (), ("max_train_samples=50 (others: 100)",)]


def test_other_tasks_are_other_sections_with_their_own_metric(tmp_path):
    write_run(tmp_path / "a", run_record("full", 1, 0.9))
    metrics = {"eval_matthews_correlation": 0.4, "eval_accuracy": 0.7}
    write_run(tmp_path / "b", run_record("full", 1, None, task="cola", metrics=metrics))
    write_run(tmp_path / "c", run_record("full", 1, None, task="own.csv", metrics={"eval_pearson": 0.3}))
    found = {section.task: section.metric for section in sections(find_runs([tmp_path]).runs)}
    assert found == {"sst2": "eval_accuracy", "cola": "eval_matthews_correlation", "own.csv": "eval_pearson"}
    report = write_report([tmp_path], tmp_path / "out")
    assert len(report.sections) == 3
    assert {f"quality-time-{i}.png" for i in (1, 2, 3)} <= set(os.listdir(tmp_path / "out"))


class Page(html.parser.HTMLParser):
    """What a page refers to, and the text of its table's cells."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.rows, self._in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ("src", "href", "xlink:href") if key in attributes]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")
        self._in_cell = tag == "td" or (self._in_cell and tag != "th")

    def handle_endtag(self, tag):
        if tag == "td":
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data


def test_report_files(tmp_path):
    report = write_report([write_runs(tmp_path / "runs")], tmp_path / "out", title="A <b> & c")
    out = tmp_path / "out"
    text, markdown = (out / "report.html").read_text(), (out / "report.md").read_text()
    page = Page(text)
    assert all(link.startswith("#") for link in page.links), "the page must need nothing but itself"
    assert not re.search(r"@import|url\((?!#)", text)
    assert "A &lt;b&gt; &amp; c" in text
    cells = [row for row in page.rows if row]
    assert [re.sub(r"^\d", "", row[0]) for row in cells] == ["goodmemorytime", "cheapmemorytime", "bad"]
    assert cells[0][1:] == ["0.9000 ± 0.0100", "3", "302 ± 1", "92.0 ± 1.0", "0.2 ± 0.0", "1,000 1 %", "400.0 kB"]
    assert text.count("<svg") == 2 and "run_glue.py --method good --seed 1" in text
    for name in PICTURES:
        assert (out / name).read_bytes().startswith(b"\x89PNG") and f"({name})" in markdown
    assert "| 1. good | 0.9000 ± 0.0100 | 3 | 302 ± 1 | 92.0 ± 1.0 |" in markdown
    assert "good" in report.summary() and "0.9000 ± 0.0100" in report.summary()


def test_runs_without_an_evaluation_or_training_are_shown_last(tmp_path):
    write_run(tmp_path / "a", run_record("full", 1, None))
    write_run(tmp_path / "b", run_record("lora", 1, 0.1, train_seconds=None, peak_memory_bytes=None))
    nothing = {"trainable_parameters": None, "total_parameters": None, "artefact_bytes": 0, "peak_memory_bytes": 0}
    write_run(tmp_path / "c", run_record("sparse", 1, 0.2, **nothing))
    write_report([tmp_path], tmp_path)
    cells = [row for row in Page((tmp_path / "report.html").read_text()).rows if row]
    assert [row[1] for row in cells] == ["0.2000", "0.1000", "-"]
    assert cells[1][3] == cells[1][4] == "-"


def test_damaged_records_do_not_keep_the_others_out(tmp_path, capsys):
    write_runs(tmp_path)
    (tmp_path / "good-1" / "run.json").write_text('{"method": "good", ')
    (tmp_path / "good-2" / "run.json").write_text('{"method": "good"}')
    (tmp_path / "some.log").write_text("no run")
    assert main([*map(str, sorted(tmp_path.iterdir())), "--output_dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("run.json cannot be read") == 2 and "it has no &#39;task&#39;" in page
    assert "good-1: unreadable" in capsys.readouterr().out


def test_nothing_to_report(tmp_path, capsys):
    with pytest.raises(InputError, match=r"no run\.json in .*; pass the folders that run_glue\.py wrote"):
        find_runs([tmp_path])
    assert main([str(tmp_path / "none")]) == 2
    assert "does not exist; pass run folders" in capsys.readouterr().err


def test_a_comparison_shows_what_failed_and_why(tmp_path):
    write_runs(tmp_path / "runs")
    entry = {"method": "good", "log": "runs/x.log", "reason": "", "seconds": 3.0, "command": "x", "left_out": {}}
    runs = [
        {**entry, "variant": "mine", "seed": 1, "folder": "runs/good-1", "state": "done"},
        {**entry, "variant": "worse", "seed": 1, "folder": "runs/none", "state": "failed", "reason": "no <memory>",
         "left_out": {"learning_rate": "it has none"}},
    ]  # fmt: skip
    record = {"task": "sst2", "max_minutes": None, "seconds": 4.0, "runs": runs}
    (tmp_path / "comparison.json").write_text(json.dumps(record))
    write_report([tmp_path], tmp_path)
    page = (tmp_path / "report.html").read_text()
    for words in ("mine", "worse, seed 1", "failed", "no &lt;memory&gt;", "(it has none)", "took 4 s, 6 s of it"):
        assert words in page, words
    assert "cheap" not in page  # of another comparison: not in the list


def browser() -> str:
    names = ("chromium", "chromium-headless-shell", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        pytest.skip("no Chromium found; on Debian: apt-get install chromium-headless-shell")
    return found


@pytest.mark.slow
def test_page_in_a_browser(tmp_path):
    """Loaded without a network the page logs no error, shows both pictures within the window, and sorts."""
    write_report([write_runs(tmp_path / "runs")], tmp_path)
    page = tmp_path / "report.html"
    probe = """<script>
      const errors = []; addEventListener("error", event => errors.push(event.message));
      addEventListener("load", () => {
        const heads = document.querySelectorAll("th button");
        const names = () =>
          [...document.querySelectorAll("td.name")].map(cell => cell.childNodes[2].textContent).join();
        const sorted = names(); heads[4].click(); const slowest = names(); heads[4].click(); const quickest = names();
        const boxes = [...document.querySelectorAll("figure svg")].map(svg => svg.getBoundingClientRect());
        const result = {errors, sorted, slowest, quickest, wide: document.documentElement.scrollWidth,
          pictures: boxes.map(box => [box.width > 300, box.height > 200, box.right <= innerWidth])};
        document.body.innerHTML = "<pre id=result>" + JSON.stringify(result) + "</pre>";
      });
    </script>"""
    page.write_text(page.read_text().replace("</head>", f"{probe}</head>"))
    done = subprocess.run(
        [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", "--dump-dom",
         f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()],
        capture_output=True, text=True, timeout=90, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(re.search(r"<pre id=\"result\">(.*)</pre>", done.stdout).group(1))
    assert result["errors"] == [] and result["wide"] <= 1200
    assert result["sorted"] == "good,cheap,bad"
    assert (result["slowest"], result["quickest"]) == ("bad,good,cheap", "cheap,good,bad")
    assert result["pictures"] == [[True, True, True]] * 2


def test_memory_is_in_mib(tmp_path):
    write_run(tmp_path / "a", run_record("full", 1, 0.9, peak_memory_bytes=5 * MIB))
    assert rows_of(tmp_path)[0].memory == Number(5.0)


def test_old_records_of_gpus_are_read_and_marked(tmp_path):
    """They hold the peak with the model; records since say what their memory is."""
    kind = {"peak_memory_kind": "allocated on cuda, above the level before training, largest of all processes"}
    gpu = {"device": "A100"}
    write_run(tmp_path / "a", run_record("full", 1, 0.9, peak_memory_bytes=10 * MIB, **gpu, **kind))
    write_run(tmp_path / "b", run_record("lora", 1, 0.95, peak_memory_bytes=5 * MIB, **gpu))
    rows = rows_of(tmp_path)
    assert [(row.name, row.memory, row.memory_holds_model) for row in rows] == [
        ("lora", Number(5.0), True), ("full", Number(10.0), False),
    ]  # fmt: skip
    assert [row.name for row in pareto_front(rows, "memory")] == ["full"]
    write_report([tmp_path], tmp_path / "out")
    for page in ("report.md", "report.html"):
        assert (tmp_path / "out" / page).read_text().count("includes the loaded model") == 1
