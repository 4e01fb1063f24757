"""The tokenizer: byte-level BPE whose vocabulary is the bytes and the words that questions and answers are made of.

It has no merges: `ignore_merges` takes a word whole if the vocabulary has it and spells it in bytes if not. So digits
and the letters of the words that are asked about are single tokens, which arithmetic, reversing and spelling need,
while the words around them cost one token each.

    python -m demo_model.tokenizer OUTPUT_DIR
"""

import json
import sys
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from demo_model.words import listed

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (PAD, START, END)
MARKUP = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
# A word with the blank before it, a digit, a run of signs with the blank before it, or a blank.
PIECE = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"


def splitter() -> pre_tokenizers.PreTokenizer:
    pieces = pre_tokenizers.Split(Regex(PIECE), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pieces, as_bytes])


def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*CONTROL, *MARKUP, *alphabet, *listed("pieces")]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    built.pre_tokenizer = splitter()
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL])
    built.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP])
    return built


def configuration(template: str) -> dict[str, Any]:
    """tokenizer_config.json"""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START],
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": template,
    }


if __name__ == "__main__":
    output = Path(sys.argv[1])
    output.mkdir(parents=True, exist_ok=True)
    tokenizer().save(str(output / "tokenizer.json"))
    template = (Path(__file__).parent / "chat_template.jinja").read_text()
    (output / "tokenizer_config.json").write_text(json.dumps(configuration(template), indent=2) + "\n")
