"""Reports and cards of language models: a low perplexity is the better one, and a few texts are shown."""

from decoders import save_decoder
from run_records import run_record, write_run

from hf_ft_ext.hub.card import model_card
from hf_ft_ext.report.build import write_report
from hf_ft_ext.report.read import find_runs
from hf_ft_ext.report.rows import pareto_front, sections

TEXTS = [
    {"prompt": "a film\nis", "prediction": "very | good", "references": ["good"]},
    {"prompt": [{"role": "user", "content": "hello"}], "prediction": "hi", "references": []},
]


def language_run(method, perplexity, **fields):
    record = run_record(method, 1, None, task_type="causal_lm", quality="eval_perplexity", **fields)
    record["metrics"]["eval_perplexity"] = perplexity
    return record


def test_the_lowest_perplexity_comes_first(tmp_path):
    for method, perplexity, seconds in (("full", 9.0, 5.0), ("lora", 11.0, 4.0), ("sparse", 12.0, 6.0)):
        write_run(tmp_path / method, language_run(method, perplexity, train_seconds=seconds, generations=TEXTS))
    (section,) = sections(find_runs([tmp_path]).runs)
    assert [row.name for row in section.rows] == ["full", "lora", "sparse"]
    assert [row.name for row in pareto_front(section.rows, "seconds")] == ["lora", "full"]
    write_report([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| full | a film is | very \\| good | good |" in text and "| full | user: hello | hi |  |" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<li>user: hello <strong>hi</strong></li>" in page and "reference: good" in page


def test_further_metrics_have_columns_of_their_own(tmp_path):
    for method, f1, perplexity in (("full", 0.5, 9.0), ("lora", 0.75, 11.0)):
        record = language_run(method, perplexity)
        record["quality"] = "eval_f1"
        record["metrics"] |= {"eval_f1": f1, "eval_exact_match": f1 / 2, "eval_num_tokens": 99.0, "eval_loss": 2.0}
        write_run(tmp_path / method, record)
    write_report([tmp_path], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| method | f1 | perplexity | exact match | seeds |" in text
    assert "| 1. lora | 0.7500 | 11.0000 | 0.3750 | 1 |" in text
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.index(">perplexity</button>") < page.index(">seeds</button>") and "num tokens" not in page


def test_a_card_says_what_the_model_does(tmp_path):
    folder = tmp_path / "model"
    save_decoder(folder, "gpt2")
    load = f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"
    record = language_run("full", 9.0, generations=TEXTS, load=load, output_dir=str(folder))
    card = model_card(folder, record, "me/model")
    assert "pipeline_tag: text-generation" in card and "type: text-generation" in card
    assert "name: perplexity" in card and "AutoModelForCausalLM.from_pretrained('me/model')" in card
    assert "- `a film is`: `very | good`" in card and "- `user: hello`: `hi`" in card
    card = model_card(folder, {**record, "task_type": "seq2seq_lm"}, "me/model")
    assert "pipeline_tag: text2text-generation" in card
    assert "pipeline_tag: text-classification" in model_card(folder, run_record("full", 1, 0.5), "me/model")
