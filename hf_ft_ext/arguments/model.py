"""Arguments that say which model is loaded, in which number format, and where."""

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
    cache_dir: str | None = field(default=None, metadata={"help": "Where downloads are kept; none = the Hub's cache."})
    token: str | None = field(
        default=None, repr=False, metadata={"help": "Hub access token; none = the one you logged in with."}
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run model code that a Hub repository brings along."}
    )
    dtype: str = field(
        default=AUTO,
        metadata={
            "help": "Number format of the weights. auto: float32 for those that gradients change, the checkpoint's "
            "own for those that stay. `bf16` computes in bfloat16 and leaves the weights as they are.",
            "choices": DTYPES,
        },
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "How attention is computed: eager, sdpa, flash_attention_2, or another name that transformers "
            "takes; none = the model's default."
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
            "help": "Where the weights go, of one process: auto, balanced, balanced_low_0 or sequential (over its "
            "accelerators), a device such as cuda:1, or JSON of modules to devices; none = the process's own device."
        },
    )
