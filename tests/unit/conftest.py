"""Small tokenizers, trained on a few lines, saved as Hugging Face folders."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from farrier.runtime.tokenizer import Tokenizer

LINES = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps.",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}}',
    "[1, 2, 3, true, false, null]   \n\n    indented text\n",
    "naïve café, 你好世界, Привет мир, 🙂 👩‍👩‍👧",
]
CONTROL_TOKENS = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "[TOOL_CALLS]", "<|tool|>"]

TEMPLATES = Path(__file__).parents[1] / "fixtures" / "chat_templates"
CONTROL_TOKENS_OF = {
    "llama-3.1": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>"],
    "mistral-v0.3": ["[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"],
    "qwen2.5": ["<|endoftext|>"],
    "qwen3": ["<|endoftext|>"],
    "gemma-2": ["<start_of_turn>", "<end_of_turn>"],
    "gemma-3": ["<start_of_turn>", "<end_of_turn>"],
    "phi-3": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "phi-4": ["<|im_sep|>"],
    "phi-4-mini": ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|/tool|>", "<|tool_response|>"],
}


def save(backend: Backend, folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def byte_level_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE as in Llama 3 and Qwen; `<tool_call>` is an added token, but not a special one."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=CONTROL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return save(backend, tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="session")
def sentencepiece_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BPE with spaces written as ▁ and byte tokens for unknown characters, as in Llama 2 and Mistral."""
    trained = Backend(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=150, limit_alphabet=60, show_progress=False)
    trained.train_from_iterator(LINES[:3], trainer)
    model = json.loads(trained.to_str())["model"]

    tokens = [*CONTROL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = trained.normalizer
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return save(backend, tmp_path_factory.mktemp("sentencepiece"))


@pytest.fixture(scope="session")
def byte_level(byte_level_folder: Path) -> Tokenizer:
    return Tokenizer.load(byte_level_folder)


@pytest.fixture(scope="session")
def sentencepiece(sentencepiece_folder: Path) -> Tokenizer:
    return Tokenizer.load(sentencepiece_folder)


@pytest.fixture(scope="session", params=["byte_level", "sentencepiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Each of the two in turn."""
    loaded: Tokenizer = request.getfixturevalue(request.param)
    return loaded


@pytest.fixture(scope="session")
def chat_folder(byte_level_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model with the control tokens and the chat template of a family, or with a template's source."""
    folders: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in folders:
            folder = folders[family] = tmp_path_factory.mktemp("chat") / "model"
            shutil.copytree(byte_level_folder, folder)
            backend = Backend.from_file(str(folder / "tokenizer.json"))
            tokens = CONTROL_TOKENS_OF.get(family, [])
            backend.add_special_tokens([AddedToken(token, special=True) for token in tokens])
            backend.save(str(folder / "tokenizer.json"))
            source = (TEMPLATES / f"{family}.jinja").read_text() if family in CONTROL_TOKENS_OF else family
            (folder / "chat_template.jinja").write_text(source)
        return folders[family]

    return make
