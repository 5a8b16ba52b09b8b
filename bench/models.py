"""The model that a benchmark's servers load, and what they need on a machine without a GPU."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from sgl_vtensor.cli.smollm2 import smollm2
from sgl_vtensor.cli.tiny_model import TinyLlama

# An idle SGLang server polls: two of them side by side would leave the one that is measured half of two cores.
HOST_FLAGS = [
    "--sleep-on-idle", "--device=cpu", "--dtype=float32", "--sampling-backend=pytorch", "--grammar-backend=none",
    "--skip-server-warmup", "--mem-fraction-static=0.3",
]  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        help="folder with config and tokenizer; 'random': a small one with the heads of an 8B model and weights for "
        "which the prompt matters, unlike dummy ones; default: SmolLM2, without a GPU a tiny one",
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of the random model's tokenizer; default: SmolLM2's")


def folder_of(options: argparse.Namespace) -> str:
    """Where the model is that ``options`` ask for; the random and the tiny one are written to ``options.out``."""
    if options.model == "random":
        model = TinyLlama(layers=4, heads=32, kv_heads=8, head_dim=128, hidden=1024, max_tokens=16384)
        return str(model.write(options.out / "random-llama", tokenizer=options.tokenizer or smollm2()))
    if options.model:
        return str(options.model)
    if torch.cuda.is_available():
        return str(smollm2())
    return str(TinyLlama().write(options.out / "tiny-llama", tokenizer=smollm2()))
