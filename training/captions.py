# SPDX-License-Identifier: Apache-2.0
"""Train the text encoder from which the `shapes` and `shapes-flow` pipelines start: it predicts the picture from the caption.

Loss, with the picture x at half its size, `[3, 16, 16]`, the caption c, and h_k(c) the vector of the last but k-th layer at the
token that ends the caption, read by one linear map A_k per layer:

    L = E || x - A_0 h_0(c) ||^2 + E || x - A_1 h_1(c) ||^2

The best prediction is the mean picture of a caption. To give it, the encoder has to work out which colour and shape belong
where; a denoiser alone takes far longer to teach it that.

    python training/captions.py                # resumes from training/checkpoints/text_encoder.pt if it is there
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from fit import CHECKPOINTS, fit, options, replace_folder, write_record
from latents import held_out_pictures, to_tensor, training_pictures
from torch import Tensor, nn
from transformers import CLIPTextModel
from words import build_tokenizer, encoder_config, token_ids

FOLDER = CHECKPOINTS / "text_encoder"


def load_text_model() -> dict[str, Tensor]:
    """The weights of the trained text encoder, by their names within `CLIPTextModel`."""
    if not FOLDER.exists():
        raise FileNotFoundError(f"There is no text encoder in {FOLDER}; run `python training/captions.py` first.")
    return CLIPTextModel.from_pretrained(FOLDER).state_dict()


def halved(images: Any) -> Tensor:
    """`[n, 32, 32, 3]` in 0 ... 255 to `[n, 768]` in -1 ... 1."""
    return nn.functional.avg_pool2d(to_tensor(images), 2).flatten(1)


def main() -> None:
    arguments = options(__doc__, "text_encoder", steps=6000, minutes=3, batch=128, rate=3e-3)
    arguments.out = FOLDER
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    images, captions = training_pictures()
    tokenizer = build_tokenizer()
    ids = token_ids(tokenizer, captions)
    pictures, held_captions = held_out_pictures()
    held, held_ids = halved(pictures), token_ids(tokenizer, held_captions)

    def errors(parts: dict[str, nn.Module], x: Tensor, tokens: Tensor) -> Tensor:
        output = parts["text_encoder"](tokens, output_hidden_states=True)
        end = tokens.eq(cast(int, tokenizer.eos_token_id)).int().argmax(-1)
        rows = torch.arange(len(tokens))
        vectors = (output.pooler_output, output.hidden_states[-2][rows, end])
        heads = cast(nn.ModuleList, parts["heads"])
        return torch.stack([(head(vector) - x).square().mean(-1) for head, vector in zip(heads, vectors, strict=True)])

    def loss(parts: dict[str, nn.Module], batch: int, _: int) -> Tensor:
        chosen = torch.randint(len(images), (batch,))
        return errors(parts, halved(images[chosen.numpy()]), ids[chosen]).sum(0).mean()

    def export(parts: dict[str, nn.Module], record: dict[str, Any]) -> None:
        with torch.no_grad():
            known, new = (
                errors(parts, held[half], held_ids[half]).sum(0).mean().item() for half in (slice(512), slice(512, None))
            )
        losses = {"held_out_loss": known, "held_out_loss_new_captions": new}
        print(losses, flush=True)

        def write(folder: Path) -> None:
            cast(CLIPTextModel, parts["text_encoder"]).save_pretrained(folder)
            write_record(folder, "training/captions.py", record, **losses)

        replace_folder(FOLDER, write)

    text_encoder = CLIPTextModel(encoder_config(tokenizer))
    width = text_encoder.config.hidden_size
    fit(
        {"text_encoder": text_encoder, "heads": nn.ModuleList([nn.Linear(width, 768) for _ in range(2)])},
        loss,
        arguments,
        export,
    )


if __name__ == "__main__":
    main()
