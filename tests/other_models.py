"""Tiny models of other tasks than text classification, and batches: images, sounds, text to text, experts."""

import torch
import transformers
from transformers import AutoConfig

_TEXT = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
_BERT = {**_SIZE, **_TEXT, "max_position_embeddings": 64}
_PAIR = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
         "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "decoder_start_token_id": 3,
         **_TEXT}  # fmt: skip
_T5 = {**_TEXT, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
_EXPERTS = {**_BERT, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 12, "shared_expert_intermediate_size": 20}  # fmt: skip
_CLASSES = {
    "image": "AutoModelForImageClassification",
    "sound": "AutoModelForAudioClassification",
    "speech": "AutoModelForSpeechSeq2Seq",
    "embedding": "CLIPTextModelWithProjection",
    "pair": "AutoModelForSeq2SeqLM",
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "rows": "AutoModelForSequenceClassification",
}
# fmt: off
OTHER_MODELS = {
    "modernbert": ("rows", {**_BERT, "cls_token_id": 3, "sep_token_id": 4}),
    "bert": ("masked", _BERT),
    "vit": ("image", {**_SIZE, "image_size": 16, "patch_size": 8}),
    "swin": ("image", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "image_size": 16, "patch_size": 2,
                       "window_size": 2}),
    "convnext": ("image", {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 16,
                           "patch_size": 2}),
    "clip": ("image", {"text_config": _BERT, "projection_dim": 8,
                       "vision_config": {**_SIZE, "image_size": 16, "patch_size": 8}}),  # no submodule `clip`
    "whisper": ("speech", {**_PAIR, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}),
    "wav2vec2": ("sound", {**_SIZE, "conv_dim": [8, 8], "conv_stride": [4, 4], "conv_kernel": [8, 4],
                           "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4,
                           "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}),
    "clip_text_model": ("embedding", {**_BERT, "projection_dim": 8}),
    "t5": ("pair", _T5),
    "bart": ("pair", {**_PAIR, "max_position_embeddings": 64, "forced_eos_token_id": 2}),
    "switch_transformers": ("pair", {**_T5, "num_experts": 4, "expert_capacity": 64, "num_sparse_encoder_layers": 1,
                                     "num_sparse_decoder_layers": 1, "num_decoder_layers": 2}),
    "gpt2": ("causal", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 24, **_TEXT}),
    "mixtral": ("causal", _EXPERTS),
    "qwen2_moe": ("causal", {**_EXPERTS, "decoder_sparse_step": 1, "mlp_only_layers": [0]}),
    "mamba": ("causal", {**_TEXT, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}),
}
# fmt: on
# Grouped products have no double precision on a CPU; the router of Switch computes in single precision.
SINGLE = ("mixtral", "qwen2_moe", "switch_transformers")


def other_model(name: str) -> torch.nn.Module:
    """A model of two small layers in evaluation mode, in double precision where it runs; always the same weights."""
    task, values = OTHER_MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **values)
        model_class = getattr(transformers, _CLASSES[task])
        model = model_class.from_config(config) if _CLASSES[task].startswith("Auto") else model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().to(torch.float32 if name in SINGLE else torch.float64)


def other_batch(name: str) -> dict[str, torch.Tensor]:
    """Three rows with labels, the second of the texts padded."""
    task, generator = OTHER_MODELS[name][0], torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1, 1])
    if task == "image":
        return {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator).double(), "labels": labels}
    if task == "sound":
        return {"input_values": torch.randn(3, 400, generator=generator).double(), "labels": labels}
    ids = torch.randint(5, 60, (3, 9), generator=generator)
    if task == "speech":
        return {"input_features": torch.randn(3, 8, 40, generator=generator).double(), "labels": ids}
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    text = {"input_ids": ids * mask, "attention_mask": mask}
    if task == "embedding":
        return text
    return {**text, "labels": labels if task == "rows" else torch.where(mask == 1, ids, -100)}


def output_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or the embedding of a text."""
    result = model(**batch)
    return result.logits if "labels" in batch else result.text_embeds


def loss_of(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model's loss, or the mean square of an embedding."""
    return model(**batch).loss if "labels" in batch else output_of(model, batch).square().mean()
