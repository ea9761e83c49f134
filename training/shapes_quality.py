# SPDX-License-Identifier: Apache-2.0
"""How well the bundled `shapes` and `shapes-flow` pipelines draw what the prompt says, judged by `scenes.judge`.

For each kind of prompt the share of pictures whose colours, relation and shapes are right, and all three: 64 prompts of one
thing, 64 of two things whose scene was shown in training, 64 of two whose scene was held out. The same judge on pictures that
went through the autoencoder only shows what the judge itself misses.

    python training/shapes_quality.py shapes --sheet shapes.png
    python training/shapes_quality.py shapes-flow --guidance 4 --steps 50
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from fit import ROOT
from latents import to_tensor
from scenes import Scene, contact_sheet, held_out, judge, render, shown, single_scenes


def choose(scenes: tuple[Scene, ...], count: int, seed: int) -> list[Scene]:
    """`count` of the scenes, without repetition as far as they last."""
    order = np.random.default_rng(seed).permutation(len(scenes))
    return [scenes[order[i % len(scenes)]] for i in range(count)]


def verdicts(pictures: np.ndarray, scenes: list[Scene]) -> dict[str, float]:
    """The shares of pictures `[n, 32, 32, 3]` with the colours, the relation, the shapes, and everything right."""
    rows = np.array([(v.colours, v.relation, v.shapes) for v in map(judge, pictures, scenes)])
    shares = (*rows.mean(0), rows.all(1).mean())
    return {name: round(float(share), 3) for name, share in zip(("colours", "relation", "shapes", "all"), shares, strict=True)}


def sample(pipe: Any, scenes: list[Scene], arguments: argparse.Namespace, first_seed: int) -> np.ndarray:
    """One picture per scene, `[n, 32, 32, 3]` in 0 ... 255."""
    pictures = []
    for begin in range(0, len(scenes), 32):
        some = scenes[begin : begin + 32]
        output = pipe(
            [scene.caption for scene in some],
            num_inference_steps=arguments.steps,
            guidance_scale=arguments.guidance,
            generator=[torch.Generator().manual_seed(first_seed + begin + i) for i in range(len(some))],
            output_type="np",
            **({"max_sequence_length": arguments.zero_tokens} if hasattr(pipe, "text_encoder_3") else {}),
        )
        pictures.append((255 * output.images).round().astype(np.uint8))
    return np.concatenate(pictures)


@torch.no_grad()
def through_autoencoder(autoencoder: Any, scenes: list[Scene]) -> np.ndarray:
    """Drawn pictures of the scenes, encoded and decoded."""
    rng = np.random.default_rng(5)
    decoded = cast(Any, autoencoder(to_tensor(np.stack([render(scene, rng) for scene in scenes])))).sample
    return (127.5 * (decoded + 1)).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("shapes", "shapes-flow"))
    parser.add_argument("--folder", type=Path, help="the model's folder, if it is not the bundled one")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--prompts", type=int, default=64, help="prompts of each kind")
    parser.add_argument("--zero-tokens", type=int, default=16, help="`max_sequence_length` for shapes-flow")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sheet", type=Path, help="where to write the pictures, eight of each kind in a row")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    absent = {"text_encoder_3": None, "tokenizer_3": None} if arguments.model == "shapes-flow" else {}
    pipe = DiffusionPipeline.from_pretrained(
        arguments.folder or ROOT / "src/paradiff/models/bundled" / arguments.model, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    kinds = {"one thing": single_scenes(), "two things, shown": shown(), "two things, held out": held_out()}
    figures: dict[str, Any] = {"model": arguments.model, "steps": arguments.steps, "guidance": arguments.guidance}
    rows = []
    for seed, (kind, scenes) in enumerate(kinds.items()):
        chosen = choose(scenes, arguments.prompts, seed)
        pictures = sample(pipe, chosen, arguments, 1000 * seed)
        figures[kind] = verdicts(pictures, chosen)
        figures[f"{kind}, autoencoder only"] = verdicts(through_autoencoder(pipe.vae, chosen), chosen)
        print(f"{kind}: {figures[kind]}; autoencoder only: {figures[f'{kind}, autoencoder only']}", flush=True)
        rows += [pictures[i : i + 16] for i in range(0, min(32, len(pictures)), 16)]
        print("\n".join(f"  {i:2d} {scene.caption}" for i, scene in enumerate(chosen[:32])))
    if arguments.sheet:
        contact_sheet(rows).save(arguments.sheet)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
