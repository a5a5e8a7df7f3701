"""Models of transformers on random weights, of every family that model.py covers."""
from pathlib import Path

import pytest
import torch
import transformers

from kernels import layers
from model import Llama, load_model

SIZES = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=256, rms_norm_eps=1e-5)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
# name: (transformers' config class, what differs)
FAMILIES = {
    "llama1-mha": ("LlamaConfig", dict(num_key_value_heads=4)),
    "llama2-gqa-tied": ("LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "llama-mqa": ("LlamaConfig", dict(num_key_value_heads=1)),
    "llama-biases": ("LlamaConfig", dict(num_key_value_heads=2, attention_bias=True, mlp_bias=True)),
    "llama-head-dim": ("LlamaConfig", dict(num_key_value_heads=2, head_dim=16)),
    "llama-linear": ("LlamaConfig",
                     dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "llama3.1": ("LlamaConfig", dict(num_key_value_heads=2, rope_parameters=dict(LLAMA3, rope_theta=5e5))),
    "llama3.2-tied": ("LlamaConfig", dict(num_key_value_heads=2, tie_word_embeddings=True,
                                          rope_parameters=dict(LLAMA3, rope_theta=5e5))),
    "mistral": ("MistralConfig", dict(num_key_value_heads=2, sliding_window=None)),
    "mistral-linear": ("MistralConfig",
                       dict(num_key_value_heads=2, sliding_window=None,
                            rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e6))),
    "qwen2": ("Qwen2Config", dict(num_key_value_heads=2)),
    "qwen2-tied": ("Qwen2Config", dict(num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=16)),
    "qwen3-tied-bias-llama3": ("Qwen3Config", dict(num_key_value_heads=2, head_dim=16,
                                                   tie_word_embeddings=True, attention_bias=True,
                                                   rope_parameters=dict(LLAMA3, rope_theta=1e6))),
}


def make_reference(name: str, seed: int = 0) -> transformers.PreTrainedModel:
    """transformers' model with weights that make every part matter
    (its own start leaves biases 0 and norms 1)."""
    config_class, more = FAMILIES[name]
    config = getattr(transformers, config_class)(**{**SIZES, **more}, attn_implementation="eager")
    torch.manual_seed(seed)
    reference = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in reference.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.3)
    reference.tie_weights()
    return reference


def packed(documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions = torch.cat([torch.arange(len(d)) for d in documents])
    cu_seqlens = torch.tensor([0, *(len(d) for d in documents)]).cumsum(0).int()
    return torch.cat(documents), positions, cu_seqlens


def pad_rows(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Let rows of any length be padded to a multiple of `rows`."""
    monkeypatch.setattr(layers, "ROWS", rows)
    monkeypatch.setattr(layers, "LEAST_PADDED", 1)


def same_as_transformers(folder: Path) -> Llama:
    """Loads a folder, compares its logits with those of transformers from the same folder."""
    mine, ids = load_model(folder), torch.arange(30)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = mine(ids, ids, torch.tensor([0, 30])) @ mine.head_weight.T
        expected = theirs(ids[None]).logits[0]
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    return mine

