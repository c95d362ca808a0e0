"""`--source_lang` and `--target_lang`: codes of prompts and completions in mBART, mBART-50, M2M100 and NLLB.

Losses are those of the bare model for ids written out here, as transformers' documentation describes them.
"""

import importlib
import importlib.util
import json
import math
import re
import sys
import types

import pytest
import torch
from datasets import Dataset
from test_multilingual import _PIECES, FAIRSEQ, PAIRS, save_model_and_pairs, with_codes
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    M2M100Config,
    MBart50Tokenizer,
    MBartConfig,
    MBartTokenizer,
    NllbTokenizer,
)
from transformers.models.auto import tokenization_auto

import run_glue
from hf_ft_ext.errors import InputError
from hf_ft_ext.launch.language import encoder_decoder_rows
from hf_ft_ext.launch.language.encoder_decoder import fit_encoder_decoder, language_codes

KINDS = {"mbart": MBartTokenizer, "mbart50": MBart50Tokenizer, "nllb": NllbTokenizer}
NAMES = [*KINDS, "m2m"]
_M2M100 = "transformers.models.m2m_100.tokenization_m2m_100"
INSTALLED = importlib.util.find_spec("sentencepiece") is not None
# source and target language, other than those that the tokenizers are saved with
LANGUAGES = {
    "mbart": ("de_DE", "fr_XX"), "mbart50": ("de_DE", "fr_XX"), "nllb": ("deu_Latn", "ron_Latn"), "m2m": ("de", "fr"),
}  # fmt: skip


class Pieces:
    """Stands in for sentencepiece's processor, which M2M100's tokenizer imports: the longest known piece comes first.

    Its file is the list of pieces.
    """

    def Load(self, path):
        with open(path, encoding="utf-8") as file:
            self.pieces = sorted(json.load(file), key=len, reverse=True)

    def encode(self, text, out_type):
        rest, found = f"▁{text.strip().replace(' ', '▁')}", []
        while rest:
            found.append(next((piece for piece in self.pieces if rest.startswith(piece)), rest[0]))
            rest = rest[len(found[-1]) :]
        return found

    def decode(self, pieces):
        return "".join(pieces).replace("▁", " ").strip()


@pytest.fixture(autouse=True)
def m2m100(monkeypatch):
    """Lets M2M100's tokenizer load where sentencepiece is not installed."""
    if not INSTALLED:
        stand_in = types.SimpleNamespace(SentencePieceProcessor=Pieces)
        monkeypatch.setitem(sys.modules, "sentencepiece", stand_in)
        kind = importlib.import_module(_M2M100).M2M100Tokenizer
        monkeypatch.setitem(tokenization_auto.REGISTERED_TOKENIZER_CLASSES, "M2M100Tokenizer", kind)


def tokenizer_of(name: str, folder):
    if name != "m2m":
        return with_codes(KINDS[name])
    kind = importlib.import_module(_M2M100).M2M100Tokenizer
    if not INSTALLED:
        (folder / "spm.model").write_text(json.dumps(_PIECES))
        known = _PIECES
    else:
        import sentencepiece

        corpus = " ".join(text for pair in PAIRS for text in pair) + " abcdefghijklmnopqrstuvwxyz,"
        (folder / "corpus.txt").write_text(f"{corpus}\n" * 20)
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "corpus.txt"), model_prefix=str(folder / "spm"), vocab_size=60, hard_vocab_limit=False,
            minloglevel=2,
        )  # fmt: skip
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
        known = [pieces.id_to_piece(i) for i in range(3, pieces.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(["<s>", "<pad>", "</s>", "<unk>", *known])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return kind(str(folder / "vocab.json"), str(folder / "spm.model"))  # no target language


def save(name: str, folder):
    tokenizer = tokenizer_of(name, folder)
    start = None if name == "mbart" else 2
    size = max(len(tokenizer), *language_codes(tokenizer).values()) + 1  # M2M100's tokenizer does not count the codes
    kind = MBartConfig if name.startswith("mbart") else M2M100Config
    config = kind(vocab_size=size, decoder_start_token_id=start, forced_eos_token_id=None, **FAIRSEQ)
    save_model_and_pairs(folder, tokenizer, config)


def launch(folder, *options, out="out", model="model", steps=("--do_train", "--do_eval", "--do_predict")) -> int:
    file = str(folder / "pairs.jsonl")
    data = ("--train_file", file) if "--do_train" in steps else ()
    return run_glue.main(
        [
            "--model_name_or_path", str(folder / model), "--task_type", "seq2seq_lm", *data, "--validation_file", file,
            "--test_file", file, *steps, "--max_steps", "2", "--warmup_steps", "0", "--learning_rate", "1e-2",
            "--predict_with_generate", "--max_new_tokens", "8", "--per_device_eval_batch_size", "3", "--use_cpu",
            "--disable_tqdm", "true", "--output_dir", str(folder / out), *options,
        ]
    )  # fmt: skip


def code_id(tokenizer, code: str) -> int:
    return tokenizer.convert_tokens_to_ids(f"__{code}__" if type(tokenizer).__name__ == "M2M100Tokenizer" else code)


def ids_of(name: str, tokenizer, text: str, code: str) -> list[int]:
    """mBART: X </s> code; the others: code X </s>."""
    bare, code = tokenizer(text, add_special_tokens=False)["input_ids"], code_id(tokenizer, code)
    return [*bare, 2, code] if name == "mbart" else [code, *bare, 2]


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_rows_get_the_codes_and_texts_begin_with_the_target_s(tmp_path, name, method):
    save(name, tmp_path)
    source, target = LANGUAGES[name]
    with torch.enable_grad():
        assert launch(tmp_path, "--method", method, "--source_lang", source, "--target_lang", target) == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    # for an adapter, transformers loads its base model with it
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    code = code_id(tokenizer, target)
    total, count, texts = 0.0, 0, []
    for prompt, completion in PAIRS:
        ids = torch.tensor([ids_of(name, tokenizer, prompt, source)])
        labels = ids_of(name, tokenizer, completion.strip(), target)
        start = labels[-1] if name == "mbart" else 2
        fed = torch.tensor([[start, *labels[:-1]]])
        log_p = model(input_ids=ids, decoder_input_ids=fed).logits[0].double().log_softmax(-1)
        total -= sum(float(log_p[i, token]) for i, token in enumerate(labels))
        count += len(labels)
        # greedily; after the first decoder token, mBART-50, M2M100 and NLLB write the code
        new = [start] if name == "mbart" else [2, code]
        while len(new) < 9 and (len(new) < 3 or new[-1] != 2):
            logits = model(input_ids=ids, decoder_input_ids=torch.tensor([new])).logits[0, -1]
            new.append(int(logits.argmax()))
        text = new[1:] if name == "mbart" else new[2:]  # M2M100's tokenizer does not count codes as special
        texts.append(tokenizer.decode(text, skip_special_tokens=True).strip())
    metrics = json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    written = (tmp_path / "out" / "predictions.jsonl").read_text()
    assert [json.loads(line)["prediction"] for line in written.splitlines()] == texts
    # what was saved needs no option: the tokenizer has the languages, generation_config.json the code
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["decoder_start_token_id" if name == "mbart" else "forced_bos_token_id"] == code
    again = launch(tmp_path, "--method", method, out="again", model="out", steps=("--do_eval", "--do_predict"))
    assert again == 0 and (tmp_path / "again" / "predictions.jsonl").read_text() == written


@pytest.mark.parametrize("name", NAMES)
def test_cut_completions_keep_their_language_code(tmp_path, name):
    tokenizer = tokenizer_of(name, tmp_path)
    source, target = LANGUAGES[name]
    tokenizer.src_lang, tokenizer.tgt_lang = source, target
    long = "the film was a great plot and a brilliant cast"
    data = Dataset.from_dict({"prompt": [long, "it was"], "completion": [long, "great"]})
    rows = encoder_decoder_rows("train", data, tokenizer, 10)
    bare, code = tokenizer(long, add_special_tokens=False)["input_ids"], code_id(tokenizer, target)
    assert len(bare) > 10
    wanted = [*bare[:8], 2, code] if name == "mbart" else [code, *bare[:9]]
    assert rows["labels"][0] == wanted
    assert rows["labels"][1] == ids_of(name, tokenizer, "great", target)
    first = code_id(tokenizer, source)
    assert rows["input_ids"][0] == ([*bare[-8:], 2, first] if name == "mbart" else [first, *bare[-8:], 2])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mbart",
            ("--target_lang", "fr_X"),
            "--target_lang cannot be 'fr_X'; did you mean 'fr_XX'.*; MBartTokenizer has",
        ),
        ("nllb", ("--source_lang", "xx"), "--source_lang cannot be 'xx'.*NllbTokenizer has: .* and [0-9]+ more"),
    ],
)
def test_languages_that_the_tokenizer_lacks_are_refused(tmp_path, capsys, name, options, message):
    save(name, tmp_path)
    assert launch(tmp_path, "--method", "full", *options) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(message, error), error


@pytest.mark.skipif(INSTALLED, reason="sentencepiece is installed")
def test_a_tokenizer_s_library_that_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    save("m2m", tmp_path)
    monkeypatch.delitem(tokenization_auto.REGISTERED_TOKENIZER_CLASSES, "M2M100Tokenizer")
    assert launch(tmp_path, "--method", "full") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "needs a library that is not installed: pip install sentencepiece" in error


class NeedsTarget(NllbTokenizer):
    """M2M100's tokenizer has no language for completions if none is set."""

    def _switch_to_target_mode(self):
        return self.set_tgt_lang_special_tokens({}[None] if self.tgt_lang is None else self.tgt_lang)


def test_a_tokenizer_that_needs_a_target_language_says_so():
    tokenizer = NeedsTarget(vocab={"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "a": 4}, merges=[])
    with pytest.raises(InputError, match=r"and none is set; pass --target_lang, one of: ace_Arab, ace_Latn, .* more"):
        fit_encoder_decoder(AutoModelForSeq2SeqLM.from_config(M2M100Config(vocab_size=300, **FAIRSEQ)), tokenizer)


def test_a_tokenizer_without_codes_and_a_causal_model_are_refused(tmp_path, capsys):
    from decoders import save_decoder

    save_decoder(tmp_path / "model", "t5")
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}))
    assert launch(tmp_path, "--method", "full", "--source_lang", "en") == 2
    assert "has no language codes; leave it out, and name the language in the prompts" in capsys.readouterr().err
    assert launch(tmp_path, "--method", "full", "--task_type", "causal_lm", "--target_lang", "en") == 2
    assert "--target_lang en sets language codes, which only encoder-decoders have" in capsys.readouterr().err


def test_completions_without_a_target_language_get_the_source_s_with_a_warning(tmp_path, caplog):
    caplog.set_level("WARNING")
    tokenizer = with_codes(MBartTokenizer)
    tokenizer.tgt_lang = None
    tokenizer.init_kwargs["tgt_lang"] = None
    save("mbart", tmp_path)
    tokenizer.save_pretrained(tmp_path / "model")
    assert launch(tmp_path, "--method", "full", steps=("--do_eval",)) == 0
    assert "completions get the code of the source, en_XX; pass --target_lang" in caplog.text
