import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sgl_vtensor.cli import smollm2 as module
from sgl_vtensor.cli.smollm2 import smollm2
from sgl_vtensor.cli.tiny_model import TinyLlama

# What SmolLM2's original tokenizer says. The Indian and Arabic digits are where GPT-2's own pre-tokenizer differs.
ENCODED = {
    "Hello, world! In 1999 it cost 3.50": [
        19556,
        28,
        905,
        17,
        533,
        216,
        33,
        41,
        41,
        41,
        357,
        1708,
        216,
        35,
        30,
        37,
        32,
    ],
    "  def f(x):\n\treturn x ** 2": [216, 753, 275, 24, 104, 727, 198, 197, 5406, 1792, 1903, 216, 34],
    "naïve café, 日本語 😀": [3546, 46494, 37366, 28, 17097, 241, 115, 40993, 179, 120, 248, 40303, 218],
    "अंक १२ ٣٤": [4300, 223, 35691, 38565, 216, 9310, 117, 9310, 118, 216, 164, 113, 164, 114],
    "<|im_start|>user\nhi<|im_end|>": [1, 4093, 198, 6004, 2],
}


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2()


@pytest.mark.parametrize("text", ENCODED)
def test_tokenizer_is_the_original(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(text) == ENCODED[text]
    assert tokenizer.decode(ENCODED[text]) == text


def test_answers_sensibly(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(output) == "The capital of France is Paris.<|im_end|>"


def test_unpermute_undoes_the_permutation_of_llama_cpp() -> None:
    weight = np.arange(3 * 64 * 5, dtype=np.float32).reshape(3 * 64, 5)
    permuted = weight.reshape(3, 2, 32, 5).swapaxes(1, 2).reshape(weight.shape)
    assert not np.array_equal(permuted, weight)
    assert np.array_equal(module._unpermute(permuted, heads=3), weight)


def test_a_folder_that_is_there_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    monkeypatch.setattr(module, "convert", lambda source, folder: made.append(folder))
    assert smollm2(tmp_path) == smollm2(tmp_path) == tmp_path / module.NAME
    assert len(made) == 1


def test_an_interrupted_conversion_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(source: Path, folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "convert", interrupted)
        smollm2(tmp_path)
    assert not (tmp_path / module.NAME).exists()

    monkeypatch.setattr(module, "convert", lambda source, folder: (folder / "whole").touch())
    assert [path.name for path in smollm2(tmp_path).iterdir()] == ["whole"]


def greedy(folder: Path, prompt: list[int]) -> list[int]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=-1)
    return output[0, len(prompt) :].tolist()


def test_tiny_llama_minds_every_token_and_its_seed(folder: Path, tmp_path: Path) -> None:
    model = TinyLlama(layers=3, heads=8, kv_heads=4).write(tmp_path / "a", tokenizer=folder)
    again = TinyLlama(layers=3, heads=8, kv_heads=4).write(tmp_path / "b", tokenizer=folder)
    other = TinyLlama(layers=3, heads=8, kv_heads=4, seed=1).write(tmp_path / "c", tokenizer=folder)
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 3
    prompt = [1000 + 37 * number for number in range(50)]
    answer = greedy(model, prompt)
    assert len(set(answer)) > 16
    assert greedy(again, prompt) == answer
    assert greedy(other, prompt) != answer
    changed = [*prompt[:20], 7, *prompt[21:]]
    assert greedy(model, changed) != answer
