"""Arguments of the model: which one is loaded, in which number format, and on which devices."""

from dataclasses import dataclass, field

AUTO = "auto"
DTYPES = (AUTO, "float32", "bfloat16", "float16")
QUANTIZATIONS = BITSANDBYTES_8BIT, BITSANDBYTES_4BIT, TORCHAO_8BIT = ("8bit", "4bit", "torchao-8bit")


@dataclass
class ModelArguments:
    """Which model to fine-tune."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "Hub id or local folder of the pretrained model; none = the demo encoder (`demo` extra)."},
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a Hub model."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Hub id or local folder of the tokenizer; none = the model's own."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Folder for downloads; none = the Hub's cache."})
    token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub access token; none = the one of your Hub login."}
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run model code from a Hub repository."})
    dtype: str = field(
        default=AUTO,
        metadata={
            "help": "Number format of the weights. auto: float32 for weights that gradients change, the checkpoint's "
            "own format for frozen ones. `bf16` computes in bfloat16 and does not change the weights' format.",
            "choices": DTYPES,
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention implementation: eager, sdpa, flash_attention_2, or another name that transformers "
            "accepts; none = the model's default."
        },
    )
    quantization: str | None = field(
        default=None,
        metadata={
            "help": "Load the frozen weights in 8 or 4 bits (bitsandbytes, `quantization` extra) or in torchao's 8 "
            "bits (`torchao` extra), the head in full: for adapters, linear probing and searches in the head; none = "
            "as stored.",
            "choices": QUANTIZATIONS,
        },
    )
    device_map: str | None = field(
        default=None,
        metadata={
            "help": "Placement of the weights of one process: auto, balanced, balanced_low_0 or sequential (over its "
            "accelerators), a device such as cuda:1, or JSON from modules to devices, also cpu and disk, from where "
            "each layer is loaded when it runs (gradientless, and evaluation); none = the process's own device."
        },
    )
