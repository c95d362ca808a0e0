"""Selection of adapters: formulas of the criteria, budgets, plan files, plots, bad input."""

import functools
import itertools
import json

import pytest
import torch
from classifiers import classifier_rows, tiny_classifier
from peft import LoraConfig
from probes import batched, plain_way, rows
from tiny import tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from hf_ft_ext import AdapterPlan, BottleneckConfig, LayerPrefixConfig, select_adapters
from hf_ft_ext.errors import InputError
from hf_ft_ext.fisher.candidates import default_candidates, make_candidates, modules_of, probing
from hf_ft_ext.fisher.pictures import draw_plan
from hf_ft_ext.fisher.selection import added_parameters, choose, random_choice
from hf_ft_ext.models.peft import task_type_of

SMALL = {
    "prefix": LayerPrefixConfig(prefix_length=3, projection_size=6),
    "bottleneck": BottleneckConfig(bottleneck_size=5),
    "lora": LoraConfig(r=3),
}


def plan_of(model=None, data=None, candidates=SMALL, **settings) -> AdapterPlan:
    model = tiny_model().double() if model is None else model
    return select_adapters(model, batched(rows(), 4) if data is None else data, candidates, progress=False, **settings)


def test_scores_equal_the_written_out_formulas():
    model = tiny_model().double()
    plans = {
        criterion: plan_of(model, criterion=criterion) for criterion in ("thesis", "mean", "decrease", "agreement")
    }
    with probing(model, SMALL, [0, 1], 42) as probe:
        for module in modules_of(probe, SMALL):
            names = [*module.parameters, *module.shared]
            assert bool(module.shared) == (module.candidate == "prefix")
            for p in probe.parameters():
                p.requires_grad_(True)
            squares = plain_way(probe, rows(), names)
            own, each = dict(probe.named_parameters()), []
            for row in rows():
                probe.zero_grad()
                probe(**row).loss.backward()
                each.append(torch.cat([own[name].grad.flatten() for name in names]))
            each = torch.stack(each)
            kept = torch.cat([v.flatten() for n, v in squares.items() if "lora_A" not in n])
            product = torch.stack([each[i] @ each[j] for i, j in itertools.combinations(range(6), 2)]).mean()
            expected = {
                "thesis": kept.mean() * {"prefix": 10_000, "bottleneck": 5, "lora": 1}[module.candidate],
                "mean": torch.cat([v.flatten() for v in squares.values()]).mean(),
                "decrease": product.sign() * product.abs().sqrt(),
                "agreement": product / (each**2).sum(1).mean(),
            }
            for criterion, plan in plans.items():
                found = plan.scores[module.layer][module.candidate]
                wanted = pytest.approx(expected[criterion].item(), rel=1e-8)
                assert found == wanted, (criterion, module.layer, module.candidate)
    for plan in plans.values():
        for layer, own in plan.scores.items():
            assert plan.choice[layer] == max(own, key=own.get)


def test_model_is_restored_and_the_choice_is_reproducible():
    model = tiny_model()
    before = {n: (p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    random = torch.get_rng_state()
    first = plan_of(model)
    assert plan_of(model) == first and first != plan_of(model, seed=7)
    assert torch.equal(random, torch.get_rng_state()) and not hasattr(model, "peft_config")
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], p) and after[n].requires_grad == t for n, (p, t) in before.items())


_STARTS = [
    *({"init_lora_weights": start} for start in ("pissa", "pissa_niter_2", "olora", "mica")),
    {"init_lora_weights": "orthogonal", "r": 4},
    {"use_dora": True},
    {"peft_type": "oft", "oft_block_size": 4},
    {"peft_type": "miss", "r": 4},
    {"peft_type": "shira", "r": 4},
    {"peft_type": "road", "group_size": 4},
    *({"peft_type": kind} for kind in ("loha", "hra", "psoft", "delora")),
]


@pytest.mark.parametrize("settings", _STARTS, ids=str)
def test_initialization_of_candidates_does_not_change_base_weights(settings):
    model = tiny_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    candidates = make_candidates(["own"], {"own": {"peft_type": "lora", "target_modules": ["query"], **settings}})
    with probing(model, candidates, [0, 1], 1):
        pass
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_plan_stores_the_task_type_of_its_model(tmp_path):
    plan = plan_of(tiny_model())
    assert plan.config().task_type == "SEQ_CLS" and plan.config(task_type="CAUSAL_LM").task_type == "CAUSAL_LM"
    plan.save(tmp_path)
    assert AdapterPlan.load(tmp_path).config().task_type == "SEQ_CLS"
    gpt2 = AutoConfig.for_model("gpt2", n_embd=8, n_layer=1, n_head=1)
    assert task_type_of(AutoModelForCausalLM.from_config(gpt2)) == "CAUSAL_LM"
    assert task_type_of(tiny_model().bert) is None


def test_candidates_of_the_same_type_and_of_other_peft_methods():
    targets = ["query", "value"]
    candidates = [LoraConfig(r=2), LoraConfig(r=8), *(
        make_candidates([name], {name: {"target_modules": targets}})[name] for name in ("loha", "lokr")
    )]  # fmt: skip
    plan = plan_of(candidates=candidates)
    assert list(plan.candidates) == ["lora", "lora-1", "loha", "lokr"]
    assert all(list(own) == list(plan.candidates) for own in plan.scores.values())
    assert plan.parameters[0] == {"lora": 256, "lora-1": 1024, "loha": 2048, "lokr": 160}
    ia3 = make_candidates(
        ["ia3", "dora"], {"dora": {"peft_type": "LORA", "use_dora": True, "target_modules": targets}}
    )
    assert set(plan_of(candidates=ia3).scores[1]) == {"ia3", "dora"}


def test_budget_is_kept_and_used_optimally():
    scores = {0: {"a": 5.0, "b": 3.0}, 1: {"a": 4.0, "b": 3.5}, 2: {"a": 1.0, "b": 0.9}}
    size = {layer: {"a": 10, "b": 6} for layer in scores}
    for budget in range(6, 31):
        choice = choose(scores, size, budget)
        spent = sum(size[layer][name] for layer, name in choice.items() if name)
        value = sum(scores[layer][name] for layer, name in choice.items() if name)
        best = max(
            sum(scores[layer][name] for layer, name in enumerate(names) if name)
            for names in itertools.product((None, "a", "b"), repeat=3)
            if sum(size[layer][name] for layer, name in enumerate(names) if name) <= budget
        )
        assert spent <= budget and value == pytest.approx(best)
    assert choose(scores, size, None) == {0: "a", 1: "a", 2: "a"}
    plan = plan_of(budget=500, criterion="mean")
    assert plan.added is not None and plan.added <= 500 and None in plan.choice.values()
    with pytest.raises(InputError, match="budget=5 parameters, but the smallest module of any layer has 192"):
        plan_of(budget=5)


def test_budget_without_positive_scores_is_refused():
    data = [{**batch, "labels": torch.arange(len(batch["labels"])) % 2} for batch in batched(rows(4), 4)]
    plan = plan_of(data=data, criterion="agreement")
    assert max(score for own in plan.scores.values() for score in own.values()) < 0  # opposite labels, equal texts
    with pytest.raises(InputError, match=r"no module within the budget has a score above 0 .* pass more examples"):
        plan_of(data=data, criterion="agreement", budget=5000)


def test_random_choices_keep_the_budget_and_depend_on_the_seed():
    model = tiny_model(num_hidden_layers=6)
    size = added_parameters(model, SMALL, list(range(6)), 42)
    choices = [random_choice(list(range(6)), list(SMALL), size, 1000, seed) for seed in range(20)]
    spent = [sum(size[layer][name] for layer, name in choice.items() if name) for choice in choices]
    assert max(spent) <= 1000 and min(spent) > 1000 - 192 and len({str(choice) for choice in choices}) > 10
    assert choices[0] == random_choice(list(range(6)), list(SMALL), size, 1000, 0)
    assert None not in random_choice(list(range(6)), list(SMALL), size, None, 0).values()
    with pytest.raises(InputError, match="budget=5 parameters"):
        random_choice([0], list(SMALL), size, 5, 0)


def test_a_plan_is_written_read_and_edited(tmp_path):
    plan = plan_of()
    plan.save(tmp_path)
    path = tmp_path / "adapter_plan.json"
    assert AdapterPlan.load(tmp_path) == AdapterPlan.load(path) == plan
    values = json.loads(path.read_text())
    assert (
        values["model"]["layers"] == 2 and values["data"]["examples"] == 6 and len(values["data"]["fingerprint"]) == 64
    )
    values["choice"] = {"0": None, "1": "bottleneck"}
    path.write_text(json.dumps(values))
    edited = AdapterPlan.load(path)
    assert edited.config().layers == {"1": ["bottleneck"]} and list(edited.config().kinds) == ["bottleneck"]
    edited.check_model(tiny_model())
    assert edited.same_weights(tiny_model().double()) and not edited.same_weights(tiny_model(seed=1).double())
    assert "layer 1: " in edited.table() and "*" in edited.table()


def test_a_picture_marks_the_choice(tmp_path):
    pytest.importorskip("matplotlib")
    plan = plan_of()
    assert draw_plan(plan, tmp_path).read_bytes()[:4] == b"\x89PNG"
    plan.choice = dict.fromkeys(plan.choice)
    unmarked = draw_plan(plan, tmp_path / "none.png").read_bytes()
    assert unmarked != (tmp_path / "adapter_plan.png").read_bytes()
    with pytest.raises(InputError, match="the plan holds no scores to draw"):
        draw_plan(AdapterPlan({0: "lora"}, {"lora": {}}), tmp_path)


@functools.cache
def some_plan() -> AdapterPlan:
    return plan_of()


def edit(values, **changes):
    return {**values, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: "no json", "is not valid JSON"),
        (lambda v: [], "is not an adapter plan of this version"),
        (lambda v: edit(v, format="other"), "is not an adapter plan of this version"),
        (lambda v: edit(v, choise={}), "has an unknown entry 'choise'; did you mean 'choice'"),
        (lambda v: edit(v, choice=None), "has no mapping 'choice'"),
        (lambda v: edit(v, choice={"0": "lore"}), "the choice for layer 0 is 'lore'; did you mean 'lora'"),
        (lambda v: edit(v, choice={"0": ["lora"]}), r"the choice for layer 0 is \['lora'\]"),
        (lambda v: edit(v, choice={"first": "lora"}), "'first' is not a layer index"),
        (lambda v: edit(v, model={"model_type": "roberta"}), "is for a model with model_type='roberta', but this one"),
        (lambda v: edit(v, model={"layers": 12}), "is for a model with layers=12, but this one has 2"),
        (lambda v: edit(v, choice={"5": "lora"}), "names layer 5, but the model has layers 0 to 1"),
        (lambda v: edit(v, choice={"0": None}), "chooses no adapter for any layer"),
    ],
)
def test_invalid_plans_are_refused(tmp_path, change, message):
    path = tmp_path / "adapter_plan.json"
    some_plan().save(path)
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(InputError, match=message):
        AdapterPlan.load(path).check_model(tiny_model())


@pytest.mark.parametrize(
    ("names", "settings", "message"),
    [
        (["lorra"], None, "candidate 'lorra' is unknown; did you mean 'lora'"),
        (["lora", "lora"], None, "candidate 'lora' is named twice"),
        (["prompt_tuning"], None, "prompt_tuning adds its parameters to the inputs .*cannot be limited to layers"),
        (["vera"], None, "vera shares parameters between layers"),
        (None, {"lora": 8}, "settings of candidate 'lora' must be a mapping, .* got 8"),
        (None, {"lora": {"rank": 8}}, "kind 'lora': .*rank"),
    ],
)
def test_invalid_candidates_are_refused(names, settings, message):
    with pytest.raises(InputError, match=message):
        make_candidates(names, settings)


def test_the_default_candidates_and_their_settings():
    assert list(make_candidates(None)) == list(default_candidates()) == ["prefix", "bottleneck", "lora"]
    changed = make_candidates(None, {"lora": {"r": 2}, "wide": {"peft_type": "LORA", "r": 32}})
    assert (changed["lora"].r, changed["lora"].lora_alpha, changed["wide"].r) == (2, 16, 32)
    assert changed["prefix"].projection_size == 512 and changed["bottleneck"].bottleneck_size == 48


def test_unsupported_models_and_options_are_refused():
    with pytest.raises(InputError, match="criterion 'thesys' is unknown; did you mean 'thesis'"):
        plan_of(criterion="thesys")
    with pytest.raises(InputError, match="criterion 'decrease' needs squared gradients, but power=1"):
        plan_of(criterion="decrease", power=1)
    for criterion in ("agreement", "decrease"):
        with pytest.raises(
            InputError, match=f"criterion '{criterion}' uses the mean gradient, but labels='expected' makes it zero"
        ):
            plan_of(criterion=criterion, labels="expected")
    with pytest.raises(InputError, match=r"data is a single batch, .* pass \[batch\]"):
        plan_of(data=rows(1)[0])
    with pytest.raises(InputError, match="no candidates to choose from"):
        plan_of(candidates=[])
    with pytest.raises(InputError, match="compares gradients of different examples, but there is 1; use 2 or more"):
        plan_of(data=rows(1), criterion="agreement")
    message = (
        r"too few of the candidates fit DebertaV2\w+ \(prefix: .*\).*--fisher_candidates, or .*--fisher_candidate_s"
    )
    with pytest.raises(InputError, match=message):
        plan_of(left := deberta(), candidates={"prefix": SMALL["prefix"], "lora": SMALL["lora"]})
    assert not any("base_layer" in name for name, _ in left.named_modules())
    blind = tiny_model()
    torch.nn.init.zeros_(blind.classifier.weight)
    with pytest.raises(InputError, match=r"every gradient is exactly zero.*classifier's weights and the labels"):
        plan_of(blind)
    with (
        pytest.raises(InputError, match="carries PEFT adapters already"),
        probing(tiny_model(), SMALL, [0], 1) as probe,
    ):
        plan_of(probe.get_base_model())


def deberta():
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "deberta-v2", hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=45
    )
    return AutoModelForSequenceClassification.from_config(config)


def test_a_candidate_that_does_not_fit_is_left_out_with_one_line(caplog):
    plan = plan_of(deberta())
    assert list(plan.candidates) == ["bottleneck", "lora"] and set(plan.choice.values()) <= {"bottleneck", "lora"}
    lines = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert len(lines) == 1 and "Candidate 'prefix' does not fit DebertaV2ForSequenceClassification" in lines[0]


@pytest.mark.parametrize("kind", ["mpnet", "t5", "funnel", "xlm", "albert", "mixtral"])
def test_selection_on_other_families(kind):
    model = tiny_classifier(kind)
    before = model(**classifier_rows()).logits
    plan = plan_of(model, [classifier_rows()])
    assert len(plan.candidates) >= 2 and len(plan.choice) == (1 if kind == "albert" else 2)
    torch.testing.assert_close(model(**classifier_rows()).logits, before)


def test_plan_of_an_encoder_decoder_with_a_longer_decoder_fits_its_model():
    """`num_hidden_layers` of BART's configuration counts the encoder's layers only."""
    model = tiny_classifier("bart", encoder_layers=1, decoder_layers=3)
    plan = plan_of(model, [classifier_rows()])
    assert sorted(plan.choice) == [0, 1, 2]
    plan.check_model(model)


def test_model_without_layers_is_refused():
    with pytest.raises(InputError, match="Bag has no repeated layers, so there is nothing to choose adapters for"):
        plan_of(Bag())


class Bag(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.out = torch.nn.EmbeddingBag(60, 8), torch.nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask=None, labels=None):
        return self.out(self.bag(input_ids))
