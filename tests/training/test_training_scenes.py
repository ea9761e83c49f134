# SPDX-License-Identifier: Apache-2.0
"""The pictures that the text-conditioned pipelines were trained on show what their captions say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture(scope="module")
def scenes() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "training/scenes.py"
    spec = importlib.util.spec_from_file_location("training_scenes", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_scene_is_drawn_as_its_caption_says(scenes: ModuleType) -> None:
    """The judge looks at colours, centres and filled areas only, and shares no code with the drawing."""
    rng = np.random.default_rng(0)
    for scene in (*scenes.single_scenes(), *scenes.pair_scenes()):
        assert scenes.judge(scenes.render(scene, rng), scene) == scenes.Verdict(True, True, True), scene.caption


def test_judge_tells_a_scene_from_those_that_differ_in_one_respect(scenes: ModuleType) -> None:
    """A red circle left of a blue square is not right with another colour, the relation turned round, or another shape."""
    thing = scenes.Thing
    said = scenes.Scene(thing("red", "circle"), "left of", thing("blue", "square"))
    rng = np.random.default_rng(0)
    others = {
        "colours": scenes.Scene(thing("green", "circle"), "left of", thing("blue", "square")),
        "relation": scenes.Scene(thing("red", "circle"), "right of", thing("blue", "square")),
        "shapes": scenes.Scene(thing("red", "triangle"), "left of", thing("blue", "square")),
    }
    for respect, shown in others.items():
        assert not getattr(scenes.judge(scenes.render(shown, rng), said), respect)


def test_small_things_are_smaller_than_large_ones(scenes: ModuleType) -> None:
    rng = np.random.default_rng(0)
    areas = {}
    for size in ("small", "large"):
        scene = scenes.Scene(scenes.Thing("white", "circle", size))
        areas[size] = [(scenes.render(scene, rng).min(-1) > 140).sum() for _ in range(20)]
    assert max(areas["small"]) < min(areas["large"])


def test_pictures_depend_on_the_seed_alone(scenes: ModuleType) -> None:
    (first, captions), (second, again), (other, _) = (scenes.pictures(8, seed) for seed in (3, 3, 4))
    assert np.array_equal(first, second)
    assert captions == again
    assert not np.array_equal(first, other)


def test_training_pictures_show_no_held_out_scene(scenes: ModuleType) -> None:
    """Of 2000 captions, four fifths of two things, a tenth would be held-out ones if nothing were left out."""
    hidden = {scene.caption for scene in scenes.held_out()}
    assert len(hidden) == 72
    assert not hidden & set(scenes.pictures(2000, seed=0)[1])
    assert set(scenes.pictures(50, seed=0, pairs=scenes.held_out())[1]) & hidden
