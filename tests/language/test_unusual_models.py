"""Generation and losses of models that trl or transformers treat in their own way: RWKV, Mixtral, Blenderbot."""

import json
import math

import pytest
import torch
from decoders import decoder, subword_tokenizer
from peft import AutoPeftModelForCausalLM
from processes import launch_two
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import run_glue
from hf_ft_ext.launch.language.trainers import Generation, generate_texts
from hf_ft_ext.training.saved.saving import keep_weights_in_evaluation

pytest.importorskip("trl")
from test_generation import stand_in

_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = {
    "rwkv": {
        "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16, "intermediate_size": 24,
        "context_length": 128, **_IDS,
    },
    "mixtral": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "max_position_embeddings": 128, "num_local_experts": 4, "num_experts_per_tok": 2,
        "router_aux_loss_coef": 1.0, **_IDS,
    },
    "prophetnet": {
        "hidden_size": 16, "encoder_ffn_dim": 24, "num_encoder_layers": 2, "num_encoder_attention_heads": 2,
        "decoder_ffn_dim": 24, "num_decoder_layers": 2, "num_decoder_attention_heads": 2, "dropout": 0.0,
        "attention_dropout": 0.0, "activation_dropout": 0.0, "max_position_embeddings": 128, "ngram": 2,
        "decoder_start_token_id": 1, **_IDS,
    },
    "blenderbot": {
        "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "dropout": 0.0,
        "max_position_embeddings": 128, "decoder_start_token_id": 1, **_IDS,
    },
}  # fmt: skip
PAIRS = [("the film was", " great"), ("a dull plot, and", " not the ending"), ("we hated it and really", " bad")]


def build(family: str, **sizes):
    tokenizer = subword_tokenizer("byte-level")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=len(tokenizer), **{**CONFIGS[family], **sizes})
        kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = kind.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return tokenizer, model.eval()


def test_a_model_that_reads_padding_generates_in_batches_of_equal_length(caplog):
    caplog.set_level("WARNING")
    tokenizer, model = build("rwkv")
    prompts = ["a film", "we hated the dull scene, but not the ending", "it was", "a film"]
    together = generate_texts(stand_in(model, tokenizer), prompts, Generation(max_new_tokens=1, batch_size=4))
    assert "RwkvForCausalLM reads the padding of shorter prompts" in caplog.text
    for prompt, text in zip(prompts, together, strict=True):
        with torch.no_grad():
            best = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].argmax()
        assert text == tokenizer.decode([int(best)], skip_special_tokens=True).strip()


PROMPTS = ["a film", "we hated the dull scene, but not the ending", "it was", "a film"]


@pytest.mark.parametrize("prompts", [PROMPTS, ["a film", "a film", "a film"], PROMPTS[:1]])
@torch.no_grad()
def test_a_model_that_mixes_rows_in_its_cache_generates_the_texts_of_each_row_alone(caplog, prompts):
    caplog.set_level("WARNING")
    tokenizer, model = build("rwkv")
    found = generate_texts(stand_in(model, tokenizer), prompts, Generation(max_new_tokens=6, batch_size=4))
    warned = "mixes the rows of a batch in its cache, so prompts are generated one by one" in caplog.text
    assert warned == (len(prompts) > 1)
    for prompt, text in zip(prompts, found, strict=True):
        ids, new = tokenizer(prompt)["input_ids"], []
        while len(new) < 6 and tokenizer.eos_token_id not in new:
            logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits
            new.append(int(logits[0, -1].argmax()))
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_two_processes_probe_the_model_and_write_the_texts_of_each_row_alone(tmp_path):
    tokenizer, model = build("rwkv")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": prompt, "completion": " great"} for prompt in (*PROMPTS, "in paris we liked it", "bad")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    written = []
    for beams in (1, 3):
        out = tmp_path / f"out{beams}"
        argv = [
            "--model_name_or_path", str(tmp_path / "model"), "--task_type", "causal_lm", "--method", "full",
            "--do_predict", "--test_file", str(tmp_path / "rows.jsonl"), "--max_new_tokens", "5", "--num_beams",
            str(beams), "--use_cpu", "--disable_tqdm", "true", "--output_dir", str(out),
        ]  # fmt: skip
        ended = launch_two(argv, tmp_path)
        assert [process.status for process in ended] == [0, 0], ended[0].err
        written.append(
            [json.loads(line)["prediction"] for line in (out / "predictions.jsonl").read_text().splitlines()]
        )
    alone = stand_in(model, tokenizer)
    for beams, texts in zip((1, 3), written, strict=True):
        settings = Generation(5, num_beams=beams, batch_size=1)
        assert texts == [generate_texts(alone, [row["prompt"]], settings)[0] for row in rows]
    with torch.no_grad():
        for row, text in zip(rows, written[0], strict=True):
            ids, new = tokenizer(row["prompt"])["input_ids"], []
            while len(new) < 5 and tokenizer.eos_token_id not in new:
                logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits
                new.append(int(logits[0, -1].argmax()))
            assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


@torch.no_grad()
def test_beams_of_a_model_that_mixes_rows_are_the_likeliest_of_all_pairs(caplog):
    caplog.set_level("WARNING")
    tokenizer, model = build("rwkv")
    beams = len(tokenizer)  # as many as there are first tokens, so that the search is exhaustive
    found = generate_texts(stand_in(model, tokenizer), PROMPTS[:3], Generation(2, num_beams=beams, batch_size=2))
    assert "beams are searched without it" in caplog.text
    for prompt, text in zip(PROMPTS, found, strict=False):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        first = model(input_ids=ids, use_cache=False).logits[0, -1].log_softmax(-1)
        pairs = torch.cat([ids.expand(beams, -1), torch.arange(beams)[:, None]], 1)
        both = first[:, None] + model(input_ids=pairs, use_cache=False).logits[:, -1].log_softmax(-1)
        both = both / 2  # mean over the tokens: `length_penalty` 1
        both[tokenizer.eos_token_id] = -torch.inf
        best = int(both.argmax())
        assert first[tokenizer.eos_token_id] < both.max()
        assert text == tokenizer.decode([best // beams, best % beams], skip_special_tokens=True).strip()


def test_other_models_generate_padded_batches_without_a_warning(caplog):
    caplog.set_level("WARNING")
    tokenizer = subword_tokenizer("byte-level")
    for family in ("gpt2", "qwen3", "mamba2"):
        prompts = ["a film", "we hated the dull scene, but not the ending"]
        generate_texts(stand_in(decoder(family, len(tokenizer)), tokenizer), prompts, Generation(max_new_tokens=2))
    assert not [record for record in caplog.records if record.name.startswith("hf_ft_ext")]


@pytest.mark.parametrize("family", ["mixtral", "blenderbot"])
def test_trained_through_the_launcher_they_generate_and_report_the_plain_perplexity(tmp_path, family):
    tokenizer, model = build(family)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    both = model.config.is_encoder_decoder
    status = run_glue.main(
        [
            "--model_name_or_path", str(tmp_path / "model"), "--method", "full", "--task_type",
            "seq2seq_lm" if both else "causal_lm", "--train_file", str(tmp_path / "pairs.jsonl"), "--validation_file",
            str(tmp_path / "pairs.jsonl"), "--do_train", "--do_eval", "--max_steps", "2", "--warmup_steps", "0",
            "--predict_with_generate", "--max_new_tokens", "3", "--per_device_eval_batch_size", "2", "--use_cpu",
            "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out"),
        ]
    )  # fmt: skip
    assert status == 0
    trained = type(model).from_pretrained(tmp_path / "out").eval()
    assert not getattr(trained.config, "output_router_logits", False)  # the saved model generates elsewhere too
    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        ids = tokenizer(prompt)["input_ids"]
        if both:
            answer = tokenizer(completion.strip())["input_ids"]
            fed = torch.tensor([[trained.config.decoder_start_token_id, *answer[:-1]]])
            with torch.no_grad():
                logits = trained(input_ids=torch.tensor([ids]), decoder_input_ids=fed).logits[0]
        else:
            whole = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
            answer = whole[len(ids) :]
            with torch.no_grad():
                logits = trained(input_ids=torch.tensor([whole])).logits[0, len(ids) - 1 : -1]
        total += float(functional.cross_entropy(logits.double(), torch.tensor(answer), reduction="sum"))
        count += len(answer)
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(("family", "size"), [("prophetnet", 3), ("prophetnet", 1), ("blenderbot", 3)])
def test_rows_that_read_padding_are_named_and_alone_have_their_own_loss(tmp_path, caplog, family, size):
    caplog.set_level("WARNING")
    tokenizer, model = build(family)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    status = run_glue.main(
        [
            "--model_name_or_path", str(tmp_path / "model"), "--method", "full", "--task_type", "seq2seq_lm",
            "--validation_file", str(tmp_path / "pairs.jsonl"), "--do_eval", "--per_device_eval_batch_size", str(size),
            "--use_cpu", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out"),
        ]
    )  # fmt: skip
    assert status == 0
    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        answer = tokenizer(completion.strip())["input_ids"]
        fed = torch.tensor([[1, *answer[:-1]]])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([tokenizer(prompt)["input_ids"]]), decoder_input_ids=fed).logits[0]
        total += float(functional.cross_entropy(logits.double(), torch.tensor(answer), reduction="sum"))
        count += len(answer)
    found = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]["eval_perplexity"]
    reads = (family, size) == ("prophetnet", 3)
    assert reads == ("reads the padding of shorter rows, so their losses depend on the other rows" in caplog.text)
    assert reads != (found == pytest.approx(math.exp(total / count), rel=1e-5))


WAYS = {
    "lora": ("--learning_rate", "0.05"),
    "fisher": ("--learning_rate", "0.05", "--fisher_candidates", "lora", "bottleneck", "--fisher_examples", "3"),
    "full": ("--eval_strategy", "steps", "--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end"),
    "gradientless": ("--search_method", "spsa", "--search_target", "all", "--learning_rate", "1e-3"),
}


@pytest.mark.parametrize("method", WAYS)
def test_rwkv_is_saved_with_the_weights_it_was_evaluated_with(tmp_path, method):
    tokenizer, model = build("rwkv", num_hidden_layers=4, rescale_every=2)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS]
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    status = run_glue.main(
        [
            "--model_name_or_path", str(tmp_path / "model"), "--method", method, "--task_type", "causal_lm",
            "--train_file", str(file), "--validation_file", str(file), "--do_train", "--do_eval", "--max_steps", "2",
            "--warmup_steps", "0", "--use_cpu", "--disable_tqdm", "true", "--output_dir", str(tmp_path / "out"),
            *WAYS[method],
        ]
    )  # fmt: skip
    assert status == 0
    loader, more = AutoModelForCausalLM, {}
    if method in ("lora", "fisher"):  # also on the layers that transformers would divide
        loader, more = AutoPeftModelForCausalLM, {"rescale_every": 0}
    trained = loader.from_pretrained(tmp_path / "out", **more).eval()
    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        ids = tokenizer(prompt)["input_ids"]
        whole = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = trained(input_ids=torch.tensor([whole])).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[i - 1, whole[i]]) for i in range(len(ids), len(whole)))
        count += len(whole) - len(ids)
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


@torch.no_grad()
def test_rwkv_evaluated_before_training_keeps_its_logits():
    # an epsilon would weigh more beside halved activations
    tokenizer, model = build("rwkv", num_hidden_layers=4, rescale_every=2, layer_norm_epsilon=1e-12)
    model.rwkv.ln_out.eps = 1e-12
    ids = torch.tensor([tokenizer(PAIRS[1][0])["input_ids"]])
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    logits = model(input_ids=ids).logits
    assert any(not torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    keep_weights_in_evaluation(model)
    for _ in range(2):
        torch.testing.assert_close(model(input_ids=ids).logits, logits)
        assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    torch.testing.assert_close(model.train()(input_ids=ids).logits, logits)
