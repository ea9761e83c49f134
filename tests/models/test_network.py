# SPDX-License-Identifier: Apache-2.0
"""What is refused of a model's files: weights and values that are not those of its classes, by name; and of the hub."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from pipelines import save_pipeline
from safetensors.torch import load_file, save_file
from tiny import CASES
from tiny.case import quiet

from paradiff.models import files
from paradiff.models.network import check_values
from paradiff.models.pipeline import load_pipeline
from paradiff.models.pixel import load, table_of

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")


@pytest.fixture(scope="session")
def text_to_image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny StableDiffusionPipeline."""
    folder = tmp_path_factory.mktemp("text") / "sd"
    with quiet():
        CASES["sd"].make().save_pretrained(folder)
    return folder


def changed(source: Path, target: Path, part: str, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a model's folder, with one component's weights changed."""
    shutil.copytree(source, target)
    (file,) = (target / part).glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return target


def first(weights: dict[str, torch.Tensor]) -> str:
    """A weight that every change is made to."""
    return min(name for name, weight in weights.items() if weight.ndim > 1)


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "missing": (lambda weights, name: weights.pop(name), "{name} are missing"),
    "unexpected": (lambda weights, name: weights.update({"a.b": torch.zeros(2)}), "a.b are not its own"),
    "misshapen": (lambda weights, name: weights.update({name: torch.zeros(3, 3)}), "{name} have another shape"),
    "empty": (lambda weights, name: weights.update({name: torch.zeros(0)}), "{name} have another shape"),
    "whole": (lambda weights, name: weights.update({name: weights[name].long()}), "{name} are no real numbers"),
    "truth": (lambda weights, name: weights.update({name: weights[name] > 0}), "{name} are no real numbers"),
}


@pytest.mark.parametrize("kind", CHANGES)
@pytest.mark.parametrize("part", ["pixels", "unet", "vae", "text_encoder"])
def test_weights_that_are_not_the_networks_are_refused_by_name(
    kind: str, part: str, tiny: Path, text_to_image: Path, tmp_path: Path
) -> None:
    change, sentence = CHANGES[kind]
    named: list[str] = []

    def apply(weights: dict[str, torch.Tensor]) -> None:
        named.append(first(weights))
        change(weights, named[0])

    source, where = (tiny, "unet") if part == "pixels" else (text_to_image, part)
    folder = changed(source, tmp_path / "model", where, apply)
    wanted = f"the weights in {where}/ of '{folder}' do not fit its "
    for make in (load_pipeline, load) if part == "pixels" else (load_pipeline,):
        with pytest.raises(ValueError, match="do not fit") as refused:
            make(str(folder))
        text = str(refused.value)
        assert text.startswith(wanted)
        assert sentence.format(name=named[0]) in text
        assert text.endswith("; save the pipeline again")
        assert "\n" not in text


def test_several_weights_are_counted(tiny: Path, tmp_path: Path) -> None:
    folder = changed(tiny, tmp_path / "model", "unet", dict.clear)
    with pytest.raises(ValueError, match=r"conv_in\.bias, conv_in\.weight, conv_norm_out\.bias and \d+ more are missing"):
        load(str(folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken(dtype: torch.dtype, tiny: Path, tmp_path: Path) -> None:
    def cast(weights: dict[str, torch.Tensor]) -> None:
        weights.update({name: weight.to(dtype) for name, weight in weights.items()})

    assert load(str(changed(tiny, tmp_path / "model", "unet", cast))).unet.dtype == torch.float32


# -- values of configs -------------------------------------------------------------------------------------------------

VALUES: dict[str, tuple[str, str, Any, str]] = {
    "a text for a size": ("unet", "sample_size", "big", "a list or a whole number"),
    "a text for a number": ("unet", "in_channels", "1", "a whole number"),
    "a number for channels": ("unet", "block_out_channels", 4, "a list"),
    "a fraction for layers": ("unet", "layers_per_block", 1.5, "a whole number"),
    "a truth value for a number": ("unet", "norm_eps", True, "a number"),
    "a number for a truth value": ("unet", "add_attention", 1, "true or false"),
    "a list for a name": ("unet", "act_fn", ["silu"], "a text"),
    "a text for times": ("scheduler", "num_train_timesteps", "1000", "a whole number"),
    "a text for a beta": ("scheduler", "beta_start", "small", "a number"),
    "no number for a beta": ("scheduler", "beta_end", float("nan"), "a number"),
    "a text for a truth value": ("scheduler", "clip_sample", "false", "true or false"),
    "a number for a name": ("scheduler", "prediction_type", 3, "a text"),
    "an object for an offset": ("scheduler", "steps_offset", {}, "a whole number"),
}
FILES = {"unet": "config.json", "scheduler": "scheduler_config.json"}


def with_value(source: Path, target: Path, part: str, name: str, value: Any) -> Path:
    """A copy of a model's folder, with one value of a config changed."""
    shutil.copytree(source, target)
    file = target / part / FILES[part]
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
    return target


@pytest.mark.parametrize("kind", VALUES)
def test_a_value_of_a_wrong_kind_is_refused_by_name(kind: str, tiny: Path, tmp_path: Path) -> None:
    part, name, value, known = VALUES[kind]
    folder = with_value(tiny, tmp_path / "model", part, name, value)
    for make in (load, load_pipeline):
        with pytest.raises(ValueError, match=f"has {name} = ") as refused:
            make(str(folder))
        assert str(refused.value).startswith(f"{part}/{FILES[part]} of '{folder}' has {name} = ")
        assert f"takes {known}: correct it, or save the pipeline again" in str(refused.value)


REST: dict[str, tuple[str, str, Any]] = {
    "no size": ("unet", "sample_size", None),
    "a size of nothing": ("unet", "sample_size", 0),
    "three sizes": ("unet", "sample_size", [8, 8, 8]),
    "no channels": ("unet", "in_channels", None),
    "channels below 0": ("unet", "in_channels", -1),
    "texts for channels": ("unet", "block_out_channels", ["a"]),
    "a block that is none": ("unet", "down_block_types", ["Nothing"]),
    "nested channels": ("unet", "block_out_channels", [[[[4]]]]),
}


@pytest.mark.parametrize("kind", REST)
def test_a_value_that_makes_no_network_is_one_sentence(kind: str, tiny: Path, tmp_path: Path) -> None:
    folder = with_value(tiny, tmp_path / "model", *REST[kind])
    with pytest.raises(ValueError, match=str(folder)) as refused:
        load(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["null", "[1]", "3", '"a"'])
def test_a_config_that_is_no_object_is_one_sentence(text: str, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "unet" / "config.json").write_text(text)
    for make in (load, load_pipeline):
        with pytest.raises(
            ValueError, match=r"^unet/config\.json of .*/model' is .*; it must be an object of names and values"
        ):
            make(str(tmp_path / "model"))


@pytest.mark.parametrize("value", [0, 1, -5, 10**9])
def test_training_times_are_bounded(value: int) -> None:
    with pytest.raises(ValueError, match=r"num_train_timesteps of the scheduler's config is .*; it must be a whole number"):
        table_of({"num_train_timesteps": value}, "ddpm", 10)


def test_the_values_of_every_class_are_those_that_it_takes() -> None:
    # The defaults of all schedulers, and of the networks that pixel models have.
    for name in dir(diffusers):
        kind = getattr(diffusers, name) if name.endswith("Scheduler") else None
        if isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin) and hasattr(kind, "config_name"):
            with quiet(), suppress(TypeError, ImportError):  # arguments that have to be given, packages that are missing
                check_values(kind, dict(kind().config), name)
    check_values(diffusers.UNet2DModel, dict(diffusers.UNet2DModel(sample_size=8).config), "unet")


# -- classes -----------------------------------------------------------------------------------------------------------

INDEXES: dict[str, tuple[dict[str, Any], str]] = {
    "another network": (
        {"unet": ["diffusers", "UNet2DConditionModel"]},
        "names a UNet2DConditionModel, but unet/config.json is that of a UNet2DModel; save the pipeline again",
    ),
    "an autoencoder": ({"unet": ["diffusers", "AutoencoderKL"]}, "names a AutoencoderKL, but unet/config.json is that of a"),
    "a network as the scheduler": (
        {"scheduler": ["diffusers", "UNet2DModel"]},
        "names 'UNet2DModel' as its scheduler, which is none of diffusers; save the pipeline again",
    ),
    "no class": ({"scheduler": ["diffusers", "Nothing"]}, "names 'Nothing' as its scheduler, which is none of diffusers"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_that_names_another_class_is_refused(kind: str, tiny: Path, tmp_path: Path) -> None:
    changes, sentence = INDEXES[kind]
    shutil.copytree(tiny, tmp_path / "model")
    index = tmp_path / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | changes))
    make = load_pipeline if "unet" in changes else load
    with pytest.raises(ValueError, match="save the pipeline again") as refused:
        make(str(tmp_path / "model"))
    assert f"model_index.json of '{tmp_path / 'model'}' {sentence}" in str(refused.value)


def test_a_pipe_is_no_file_of_weights(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (file,) = (tmp_path / "model" / "unet").glob("*.safetensors")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="holds no safetensors weights in unet/: it has no weights"):
        load(str(tmp_path / "model"))


# -- the hub -----------------------------------------------------------------------------------------------------------


class Hub:
    """A hub that answers by an error, or has a model."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.timeouts = error, []

    def model_info(self, _: str, *, timeout: float) -> None:
        self.timeouts.append(timeout)
        if self.error is not None:
            raise self.error


def test_a_hub_that_cannot_be_reached_is_one_sentence_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(ConnectionError("Name or service not known\nand more."))
    monkeypatch.setattr(files, "HfApi", lambda: hub)
    monkeypatch.setattr(files, "try_to_load_from_cache", lambda *_: None)
    for make in (load, load_pipeline, files.read_index):
        with pytest.raises(ValueError, match="the hub") as refused:
            make("someone/something")
        assert str(refused.value) == (
            "'someone/something' is no folder here, and the hub cannot be reached (Name or service not known); connect to it, "
            "or give a folder"
        )
    assert hub.timeouts == [files.PATIENCE] * 3


def test_a_copy_of_a_model_serves_where_the_hub_cannot_be_reached(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HfApi", lambda: Hub(ConnectionError()))
    monkeypatch.setattr(files, "try_to_load_from_cache", lambda *_: str(tiny / "model_index.json"))
    assert load("someone/something").shape == (1, 8, 8)


def test_a_model_that_the_hub_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = files.RepositoryNotFoundError.__new__(files.RepositoryNotFoundError)
    monkeypatch.setattr(files, "HfApi", lambda: Hub(missing))
    with pytest.raises(
        ValueError, match="'someone/something' is no folder here, and the hub has no such model, or none for you"
    ):
        load("someone/something")


def test_a_model_of_the_hub_is_downloaded(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "HfApi", lambda: Hub(None))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "download", lambda *_, **__: str(tiny))
    index = json.loads((tiny / "model_index.json").read_text())
    monkeypatch.setattr("paradiff.models.files._Index.load_config", lambda *_, **__: index)
    assert load("someone/something").name == "someone/something"


def test_a_pixel_model_is_the_same_as_its_pipeline(tmp_path: Path) -> None:
    folder = save_pipeline(tmp_path / "model")
    own, other = load(str(folder)).unet, load_pipeline(str(folder)).unet  # pyright: ignore[reportAttributeAccessIssue]
    assert own.state_dict().keys() == other.state_dict().keys()
    for name, weight in own.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name])
