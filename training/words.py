# SPDX-License-Identifier: Apache-2.0
"""The tokenizer and the text encoders of the text-conditioned pipelines.

The tokenizer is CLIP's byte pair encoding with merges just sufficient for each word of the captions to be one token; any other
text is spelt letter by letter. A prompt is `<|startoftext|> words <|endoftext|>`, filled up with `<|endoftext|>` to 16 tokens.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from scenes import COLOURS, RELATIONS, SHAPES, SIZES
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTokenizer

MAX_LENGTH = 16
START, END = "<|startoftext|>", "<|endoftext|>"


def vocabulary() -> list[str]:
    """The words of the captions, each once."""
    return list(dict.fromkeys(" ".join(("a", *SIZES, *COLOURS, *SHAPES, *RELATIONS)).split()))


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with a vocabulary of its own."""
    draft = Tokenizer(BPE(end_of_word_suffix="</w>"))
    draft.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(end_of_word_suffix="</w>", show_progress=False)
    draft.train_from_iterator(vocabulary(), trainer)
    merges: Any = [tuple(pair) for pair in json.loads(draft.to_str())["model"]["merges"]]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(
        [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    )
    tokenizer = CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_LENGTH
    )
    for word in vocabulary():
        assert tokenizer.tokenize(word) == [word + "</w>"], f"the tokenizer splits the word '{word}'"
    return tokenizer


def token_ids(tokenizer: CLIPTokenizer, captions: Sequence[str]) -> Tensor:
    """The tokens of each caption, `[n, 16]`, as the pipelines make them."""
    return tokenizer(
        list(captions), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def make_portable(pipeline: Path) -> None:
    """Let transformers 4 read the text encoders and tokenizers of a saved pipeline too.

    It looks for the weights of a text encoder under `text_model.`, which transformers 5 leaves out but understands, and for the
    vocabulary of a tokenizer in vocab.json and merges.txt.
    """
    for file in pipeline.glob("text_encoder*/model.safetensors"):
        weights = load_file(file)
        bare = {name for name in weights if not name.startswith(("text_model.", "text_projection."))}
        renamed = {f"text_model.{name}" if name in bare else name: weight for name, weight in weights.items()}
        save_file(renamed, file, metadata={"format": "pt"})
    for file in pipeline.glob("tokenizer*/tokenizer.json"):
        model = json.loads(file.read_text())["model"]
        file.with_name("vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False) + "\n")
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        file.with_name("merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def encoder_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """A text encoder of three layers of width 64."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        projection_dim=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
    )


def drop(ids: Tensor, empty: Tensor, share: float = 0.1) -> Tensor:
    """The tokens with a `share` of the captions replaced by the empty prompt, so that guidance has an unconditional network."""
    return torch.where(torch.rand(len(ids), 1) < share, empty, ids)
