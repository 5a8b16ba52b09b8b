"""Writes a small random Llama as a Hugging Face folder: a model for tests, with long, varied greedy answers."""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class TinyLlama:
    """Geometry and seed of a random Llama. Equal values give equal weights."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    hidden: int = 64
    max_tokens: int = 8192
    seed: int = 0

    def write(self, folder: Path, tokenizer: Path) -> Path:
        """Write config, float32 weights and a copy of the tokenizer in the folder ``tokenizer``; return ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, folder / name)
        vocab = len(json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
        save_file(self._weights(vocab), folder / "model.safetensors", metadata={"format": "pt"})
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab,
            "hidden_size": self.hidden,
            "intermediate_size": 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_tokens,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float32",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        }
        (folder / "config.json").write_text(json.dumps(config, indent=1))
        return folder

    def _weights(self, vocab: int) -> dict[str, torch.Tensor]:
        """Random weights that keep activations near 1.

        q and k are larger: scores then spread enough for each query to pick out a few tokens, so that a wrong or a
        missing token in the cache changes the answer.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def matrix(rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
            return torch.randn(rows, columns, generator=generator) * (gain / math.sqrt(columns))

        q_width, kv_width, inner = self.heads * self.head_dim, self.kv_heads * self.head_dim, 2 * self.hidden
        weights = {"model.embed_tokens.weight": torch.randn(vocab, self.hidden, generator=generator)}
        for number in range(self.layers):
            layer = f"model.layers.{number}"
            weights |= {
                f"{layer}.self_attn.q_proj.weight": matrix(q_width, self.hidden, gain=1.7),
                f"{layer}.self_attn.k_proj.weight": matrix(kv_width, self.hidden, gain=1.7),
                f"{layer}.self_attn.v_proj.weight": matrix(kv_width, self.hidden),
                f"{layer}.self_attn.o_proj.weight": matrix(self.hidden, q_width, gain=4.0),
                f"{layer}.mlp.gate_proj.weight": matrix(inner, self.hidden),
                f"{layer}.mlp.up_proj.weight": matrix(inner, self.hidden),
                f"{layer}.mlp.down_proj.weight": matrix(self.hidden, inner),
                f"{layer}.input_layernorm.weight": torch.ones(self.hidden),
                f"{layer}.post_attention_layernorm.weight": torch.ones(self.hidden),
            }
        weights["model.norm.weight"] = torch.ones(self.hidden)
        weights["lm_head.weight"] = matrix(vocab, self.hidden, gain=4.0)
        return weights
