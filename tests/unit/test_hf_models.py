"""What we make of a Hugging Face folder computes what `transformers` computes, in every family."""

from pathlib import Path

import numpy as np
import pytest

from farrier.targets.checkpoint import CheckpointReader
from farrier.targets.convert import convert
from tests.models import FAMILIES, VOCAB_SIZE, save_tiny
from tests.reference import logits

torch = pytest.importorskip("torch", reason="compares with transformers, which needs torch")
transformers = pytest.importorskip("transformers", reason="compares with transformers")

PROMPT = np.random.default_rng(7).integers(0, VOCAB_SIZE, 80).tolist()


def expected_logits(folder: Path) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return model.eval()(torch.tensor([PROMPT])).logits[0].float().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    save_tiny(family, tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    checkpoint = CheckpointReader(tmp_path / "checkpoint")
    expected = expected_logits(tmp_path / "hf")
    np.testing.assert_allclose(logits(checkpoint, PROMPT), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_the_language_model_of_multimodal_gemma3(tmp_path: Path) -> None:
    save_tiny("gemma3", tmp_path / "text")
    text = transformers.AutoConfig.from_pretrained(tmp_path / "text")
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "checkpoint")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    actual = logits(CheckpointReader(tmp_path / "checkpoint"), PROMPT)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_fused_experts_are_split(tmp_path: Path) -> None:
    """transformers 5 holds experts fused, and some tools save them so."""
    save_tiny("qwen3_moe", tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    safetensors = pytest.importorskip("safetensors.torch")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    assert any(name.endswith("experts.gate_up_proj") for name in state)
    (tmp_path / "fused").mkdir()
    (tmp_path / "fused" / "config.json").write_bytes((tmp_path / "hf" / "config.json").read_bytes())
    safetensors.save_file(state, tmp_path / "fused" / "model.safetensors")
    for folder in ("hf", "fused"):
        convert(tmp_path / folder, tmp_path / f"{folder}-checkpoint")
    apart, fused = (CheckpointReader(tmp_path / f"{folder}-checkpoint") for folder in ("hf", "fused"))
    for name in apart.names:
        np.testing.assert_array_equal(fused.tensor(name), apart.tensor(name), err_msg=name)
