# SPDX-License-Identifier: Apache-2.0
"""The command line with pipelines that have a loop of their own: their pictures, what is counted, and what is refused."""

from __future__ import annotations

import functools
import json
import re
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import jsonschema
import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DiffusionPipeline
from PIL import Image
from pipelines import Cli
from test_cli import SCHEMA, names, pixels, read
from tiny import CASES
from tiny.case import quiet

from paradiff.app.calls import counted_steps
from paradiff.app.media import read_output
from paradiff.app.plots import grid
from paradiff.methods.presets import parasolver, srds
from paradiff.models.files import BUNDLED
from paradiff.models.pipeline import load_pipeline, set_sampler
from paradiff.pipelines.explanation import explain
from paradiff.pipelines.host.host import Host
from paradiff.pipelines.pictures import pictures_of
from paradiff.pipelines.run import Run, parallelize

pytestmark = [
    # diffusers 0.42 hands tensors to numpy 2's asarray, which complains, and normalizes weights of sound in a deprecated way.
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:.*torch\.nn\.utils\.weight_norm:FutureWarning"),
]

CALL: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 10, "width": 16, "height": 16}
PLAIN = ("--prompt", "a cat", "--steps", 10, "--size", "16x16", "--device", "cpu")
TIGHT = ("--method", "parasolver", "--tolerance", 1e-5, "-m", "slope=freeze-epsilon")
"""A network of random weights answers to the state little, so that its frozen output converges fast."""

Saved = Callable[[str], Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """`saved("sd")`: the folder of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("pipelines")

    def path(name: str) -> Path:
        if not (folder / name).exists():
            with quiet():
                CASES[name].make().save_pretrained(folder / name)
        return folder / name

    return path


def plain(folder: Path, seed: int = 0, prepare: Callable[[Any], None] | None = None, **arguments: Any) -> Any:
    """The first picture, video or sound of the plain call of a saved pipeline."""
    with quiet():
        pipeline = DiffusionPipeline.from_pretrained(folder)
        if prepare is not None:
            prepare(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(**arguments, generator=torch.Generator().manual_seed(seed))[0]


@functools.cache
def unchanged(folder: Path) -> Image.Image:
    """The picture of the plain call with no further option."""
    return plain(folder, **CALL)[0]


def levels(picture: Image.Image) -> torch.Tensor:
    return torch.tensor(np.array(picture), dtype=torch.int64)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_each_seeds_picture_is_that_of_the_plain_call(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    result = cli("sample", saved("sd"), *PLAIN, *TIGHT, "--seeds", "3,5", "--compare", "--trace", "--out", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert names(tmp_path / "out") == {"samples.png", "seed-3.png", "seed-5.png", "run.json", "trace.png"}
    found = {seed: pixels(tmp_path / "out" / f"seed-{seed}.png") for seed in (3, 5)}
    for seed, picture in found.items():
        wanted = levels(plain(saved("sd"), seed, **CALL)[0])
        assert picture.shape == wanted.shape == (16, 16, 3)
        assert wanted.max() - wanted.min() > 100
        assert (picture - wanted).abs().max() <= 1  # A level may fall on the edge between two.
    assert (found[3] - found[5]).abs().max() > 50
    contents = read(tmp_path / "out")
    assert contents["pipeline"]["class"] == "StableDiffusionPipeline"
    assert contents["pipeline"]["scheduler"] == "DDIMScheduler"
    assert [call["executor"] for call in contents["pipeline"]["calls"]] == ["vector", "vector"]
    assert [call["steps"] for call in contents["pipeline"]["calls"]] == [10, 10]
    assert [call["warnings"] for call in contents["pipeline"]["calls"]] == [[], []]


def test_the_counts_of_a_pipelines_run_agree(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    assert cli("sample", saved("sd"), *PLAIN, *TIGHT, "--seeds", "0-1", "--compare", "--out", tmp_path / "out").code == 0
    contents = read(tmp_path / "out")
    samples, calls = contents["samples"], contents["pipeline"]["calls"]
    assert [s["seed"] for s in samples] == [c["seed"] for c in calls] == [0, 1]
    assert contents["rounds"] == sum(s["rounds"] for s in samples)
    assert contents["rounds"] - sum(c["checks"] for c in calls) < 20
    assert contents["evaluations"] == sum(s["evaluations"] for s in samples)
    assert contents["seconds"] == pytest.approx(sum(c["seconds"] for c in calls))
    assert (contents["sequential"]["rounds"], contents["sequential"]["evaluations"]) == (20, 20)
    assert contents["speedup"]["rounds"] == pytest.approx(20 / contents["rounds"])
    assert contents["speedup"]["seconds"] == pytest.approx(contents["sequential"]["seconds"] / contents["seconds"])
    for one, call in zip(samples, calls, strict=True):
        own = [h for h in contents["history"] if h["seed"] == one["seed"]]
        assert sum(h["passed"] for h in own) == 10
        assert own[-1]["round"] == one["rounds"] - call["checks"]
        assert call["network_calls"] == one["rounds"]  # One network, and no bound on its rows.
        assert call["network_rows"] == 2 * one["evaluations"]  # Two rows a state, with guidance.
        assert call["refused_calls"] == call["refused_rows"] == 0
        assert 0 < call["network_seconds"] < call["seconds"]
        assert call["status"].startswith("converged: ")
        assert call["status_code"] == contents["status_code"] == "converged"
    effective = contents["effective"]
    assert [effective[name] for name in ("tolerance", "window", "parts", "unit")] == [1e-5, 10, 10, "nodes"]
    assert effective["method_options"]["window"] == 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_took_effect_in_a_pipelines_calls_is_written(dtype: str, cli: Cli, saved: Saved, tmp_path: Path) -> None:
    options = (*PLAIN, "--dtype", dtype, "--method", "srds", "--tolerance", 1e-5)
    assert cli("sample", saved("sd"), *options, "--out", tmp_path / "out").code == 0
    contents = read(tmp_path / "out")
    effective, warnings = contents["effective"], contents["pipeline"]["calls"][0]["warnings"]
    warnings = [warning for warning in warnings if not warning.startswith("it took as many rounds as steps")]
    assert [effective[name] for name in ("window", "parts", "unit")] == [4, 4, "blocks"]
    assert [effective["method_options"][name] for name in ("window", "blocks")] == [4, 4]
    assert effective["tolerance"] == effective["method_options"]["tolerance"]
    if dtype == "float32":
        assert (effective["tolerance"], warnings) == (1e-5, [])
    else:
        assert effective["tolerance"] > 1e-3
        raised, rounded = warnings
        assert (
            raised == f"the tolerance was raised to {effective['tolerance']:g}, which the dtypes of networks and states resolve"
        )
        assert rounded.startswith("the plain call rounds its states to bfloat16 in each step, and the solver rounds otherwise")


def test_a_deadline_ends_each_call_and_says_so(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    options = (*PLAIN, *TIGHT, "--seeds", "0-1", "--deadline", 1e-9, "--out", tmp_path / "out")
    found = cli("sample", saved("sd"), *options)
    assert (found.code, found.err) == (3, "")
    assert "stopped: the observer asked for it after round 1; written to" in found.out
    assert found.out.endswith("the deadline of 1e-09 s ended it\n")
    contents = read(tmp_path / "out")
    assert [call["status_code"] for call in contents["pipeline"]["calls"]] == ["stopped"] * 2
    assert {"seed-0.png", "seed-1.png", "samples.png", "run.json"} <= names(tmp_path / "out")


def test_the_measured_error_is_that_of_the_pictures(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    assert (
        cli(
            "sample",
            saved("sd"),
            *PLAIN,
            "--method",
            "parasolver",
            "--tolerance",
            5,
            "--seeds",
            4,
            "--compare",
            "--out",
            tmp_path / "out",
        ).code
        == 0
    )
    pipeline = load_pipeline(str(saved("sd")))
    pipeline.set_progress_bar_config(disable=True)

    def call() -> Any:
        return pipeline(**CALL, output_type="np", generator=torch.Generator().manual_seed(4)).images

    with parallelize(pipeline, parasolver(tolerance=5)):
        found = call()
    gap = 2 * np.abs(found.astype(np.float64) - call())
    error = read(tmp_path / "out")["samples"][0]["error"]
    assert error["rms"] > 1e-3
    # The same calls, on one thread; -1 to 1 is written as float32, which rounds by 1e-7.
    assert error["rms"] == pytest.approx(float(np.sqrt((gap**2).mean())), abs=1e-6)
    assert error["max"] == pytest.approx(float(gap.max()), abs=1e-6)


def test_the_schema_keeps_pipelines_and_pixel_models_apart(cli: Cli, saved: Saved, tiny: Path, tmp_path: Path) -> None:
    pixel = ("--sampler", "ddim", "--steps", 6, "--device", "cpu")
    assert cli("sample", saved("sd"), *PLAIN, "--out", tmp_path / "pipeline").code == 0
    assert cli("sample", tiny, *pixel, "--out", tmp_path / "pixel").code == 0
    schema = jsonschema.Draft202012Validator(SCHEMA)
    pipeline, pixels = read(tmp_path / "pipeline"), read(tmp_path / "pixel")
    assert pixels["pipeline"] is None
    for contents, changes in (
        (pipeline, {"pipeline": None}),
        (pipeline, {"pipeline": {**pipeline["pipeline"], "more": 1}}),
        (pipeline, {"pipeline": {**pipeline["pipeline"], "calls": []}}),
        (pipeline, {"arguments": {**pipeline["arguments"], "form": "score"}}),
        (pipeline, {"status": "fine: "}),
        (pixels, {"arguments": {**pixels["arguments"], "prompt": "cat"}}),
        (pixels, {"arguments": {**pixels["arguments"], "sampler": None}}),
        (pixels, {"rounds": None}),
        (pixels, {"history": []}),
        (pixels, {"status": "sequential: the plain call"}),
    ):
        assert schema.is_valid(contents)
        assert not schema.is_valid({**contents, **changes}), changes


def test_without_compare_nothing_is_measured_against(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    result = cli("sample", saved("sd"), *PLAIN, "--method", "srds", "--trace", "--out", tmp_path / "out")
    contents = read(tmp_path / "out")
    assert (contents["sequential"], contents["speedup"], contents["samples"][0]["error"]) == (None, None, None)
    assert "estimated" in result.out
    assert "rows" in contents["history"][0]  # A wavefront, which has a trace of another kind.
    assert "trace.png" in names(tmp_path / "out")


OPTIONS: dict[str, tuple[tuple, dict[str, Any]]] = {
    "negative prompt": (("--negative-prompt", "a tree"), {"negative_prompt": "a tree"}),
    "guidance": (("--guidance", 2), {"guidance_scale": 2.0}),
    "size": (("--size", "32x16"), {"width": 32, "height": 16}),
    "steps": (("--steps", 7), {"num_inference_steps": 7}),
    "eta": (("--eta", 1), {"eta": 1.0}),
    "number": (("--argument", "guidance_rescale=0.7"), {"guidance_rescale": 0.7}),
    "two arguments": (
        ("--argument", "guidance_rescale=0.7", "--argument", 'negative_prompt="a tree"'),
        {"guidance_rescale": 0.7, "negative_prompt": "a tree"},
    ),
    "text": (("--argument", "negative_prompt=a=b"), {"negative_prompt": "a=b"}),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_reaches_the_call(name: str, cli: Cli, saved: Saved, tmp_path: Path) -> None:
    options, arguments = OPTIONS[name]
    given = [part for k in range(0, len(PLAIN), 2) if PLAIN[k] not in options for part in PLAIN[k : k + 2]]
    result = cli("sample", saved("sd"), *given, *TIGHT, *options, "--out", tmp_path / "out")
    assert result.code == 0, result.err
    called = read(tmp_path / "out")["pipeline"]["arguments"]
    assert called == {**CALL, **arguments, "output_type": "np"}
    found, wanted = pixels(tmp_path / "out" / "seed-0.png"), levels(plain(saved("sd"), **CALL | arguments)[0])
    assert (found - wanted).abs().max() <= 1  # A level may fall on the edge between two.
    other = levels(unchanged(saved("sd")))
    assert other.shape != wanted.shape or (other - wanted).abs().max() > 2


@pytest.mark.parametrize("name", ["euler", "EulerDiscreteScheduler", "dpmpp_2m", "euler_ancestral", "DDIMScheduler"])
def test_a_sampler_is_the_class_with_the_pipelines_own_config(name: str, cli: Cli, saved: Saved, tmp_path: Path) -> None:
    result = cli("sample", saved("sd"), *PLAIN, *TIGHT, "--sampler", name, "--out", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    classes = {"euler": "EulerDiscreteScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
    title = classes.get(name, "EulerAncestralDiscreteScheduler" if name == "euler_ancestral" else name)
    assert read(tmp_path / "out")["pipeline"]["scheduler"] == title

    def other(pipeline: Any) -> None:
        pipeline.scheduler = getattr(diffusers, title).from_config(pipeline.scheduler.config)

    wanted = levels(plain(saved("sd"), prepare=other, **CALL)[0])
    assert (pixels(tmp_path / "out" / "seed-0.png") - wanted).abs().max() <= 1  # A level may fall on the edge between two.


def test_what_is_left_out_is_the_pipelines_own(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    label = ("--argument", "class_labels=[3]", "--device", "cpu", "--method", "parasolver", "--window", 8)
    assert cli("sample", saved("dit"), *label, "--out", tmp_path / "out").code == 0
    contents = read(tmp_path / "out")
    assert contents["pipeline"]["arguments"] == {"class_labels": [3], "output_type": "np"}
    assert contents["pipeline"]["scheduler"] == "DDIMScheduler"
    assert contents["pipeline"]["calls"][0]["steps"] == 50
    asked = contents["arguments"]
    assert [asked[k] for k in ("sampler", "steps", "eta", "prompt", "guidance", "size")] == [None] * 6


def test_the_frames_of_a_video_are_a_video_and_a_contact_sheet(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    options = ("--prompt", "a cat", "--steps", 6, "--size", "16x16", "--argument", "num_frames=3", "--device", "cpu")
    assert cli("sample", saved("animatediff"), *options, *TIGHT, "--compare", "--out", tmp_path / "out").code == 0
    call = {"prompt": "a cat", "num_inference_steps": 6, "width": 16, "height": 16, "num_frames": 3}
    frames = torch.stack([levels(frame) for frame in plain(saved("animatediff"), **call)[0]])
    assert len(frames) == 3
    sheet = grid(2 * frames.permute(0, 3, 1, 2).float() / 255 - 1)
    assert (pixels(tmp_path / "out" / "seed-0.png") - levels(sheet)).abs().max() <= 1
    assert names(tmp_path / "out") == {"samples.png", "seed-0.png", "seed-0.mp4", "run.json"}
    read(tmp_path / "out")


def test_sound_is_written_as_a_wave_file(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    folder = saved("stable_audio")
    options = ("--prompt", "a cat", "--steps", 6, "--device", "cpu", "--seeds", 2)
    result = cli("sample", folder, *options, *TIGHT, "--compare", "--out", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert names(tmp_path / "out") == {"seed-2.wav", "run.json"}
    wanted = plain(folder, 2, prompt="a cat", num_inference_steps=6, output_type="np")[0]
    rate = load_pipeline(str(folder)).vae.sampling_rate
    with wave.open(str(tmp_path / "out" / "seed-2.wav")) as file:
        assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (len(wanted), 2, rate)
        found = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, len(wanted)).T
    # A step of 16 bits is 3e-5; the method's tolerance is 1e-5 before the decoder.
    assert found.shape == wanted.shape
    assert np.abs(found / 32767 - wanted.clip(-1, 1)).max() < 1e-3
    assert np.abs(found).max() > 300
    assert read(tmp_path / "out")["samples"][0]["error"]["rms"] < 1e-3


# -- a pipeline that runs sequentially ---------------------------------------------------------------------------------


@pytest.mark.parametrize("compare", [False, True])
def test_a_sequential_call_is_said_to_be_one(
    compare: bool, cli: Cli, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Host, "obstacles", lambda _: ["the moon is full"])
    options = (*PLAIN, "--method", "parasolver", "--seeds", "0-1", "--trace", *["--compare"] * compare)
    result = cli("sample", saved("sd"), *options, "--out", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert result.out.count("was called sequentially, the moon is full") == 1
    assert "no trace was drawn" in result.out
    assert "trace.png" not in names(tmp_path / "out")
    contents = read(tmp_path / "out")
    assert contents["status"].startswith("sequential: ")
    assert contents["history"] == []
    assert [call["executor"] for call in contents["pipeline"]["calls"]] == ["sequential"] * 2
    assert "the moon is full" in contents["pipeline"]["calls"][0]["warnings"][0]
    assert [s["estimated_error"] for s in contents["samples"]] == [0, 0]
    assert [contents["effective"][name] for name in ("tolerance", "window", "parts", "unit")] == [None] * 4
    if compare:
        assert (contents["rounds"], contents["speedup"]["rounds"]) == (20, 1)
        assert [s["error"] for s in contents["samples"]] == [{"rms": 0, "max": 0}] * 2
    else:
        assert (contents["rounds"], contents["evaluations"]) == (None, None)


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED: dict[str, str] = {
    "--steps 10": "the StableDiffusionPipeline needs a prompt; give one, such as --prompt",
    "--prompt cat --size 16": "the size is '16'; give width and height in pixels as WIDTHxHEIGHT, such as 768x512",
    "--prompt cat --size 100000x16": "the size is '100000x16'; width and height are at most 16384 pixels",
    "--prompt cat --size ٣x16": "the size is '٣x16'; give width and height in pixels as WIDTHxHEIGHT",
    "--prompt cat --steps 100001": "100001 steps were asked for; give at least 1 and at most 100000",
    "--prompt cat --guidance nan": "guidance is nan; it must be a finite number",
    "--prompt cat --guidance=-inf": "guidance is -inf; it must be a finite number",
    "--prompt cat --eta nan": "eta is nan; it must be a number, 0 or more, and finite",
    "--prompt cat --eta=-1": "eta is -1.0; it must be a number, 0 or more, and finite",
    "--prompt cat --size 0x16": "the size is '0x16'; give width and height",
    "--prompt cat --size 16x16x3": "the size is '16x16x3'; give width and height",
    "--prompt cat --size 15x16": "`height` and `width` have to be divisible by 8 but are 16 and 15",
    "--prompt cat --argument strength=1": "--argument gives strength, but the StableDiffusionPipeline takes no such argument; "
    "it takes prompt, height, width, num_inference_steps",
    "--prompt cat --argument strength": "the argument is 'strength'; give it as NAME=VALUE",
    "--prompt cat --argument =1": "the argument is '=1'; give it as NAME=VALUE",
    "--prompt cat --argument clip_skip=": "the argument clip_skip is empty; give it a value",
    "--prompt cat -m stride=": "the method option stride is empty; give it a value, or leave it out",
    "--prompt cat --argument generator=1": "--argument gives generator, which cannot be given: --seeds gives it",
    "--prompt cat --argument output_type=latent": "--argument gives output_type, which cannot be given: this command saves",
    "--prompt cat --argument callback_on_step_end=f": "--argument gives callback_on_step_end, which cannot be given: code",
    "--prompt cat --argument prompt=dog": "--argument gives prompt, which was given before; give it once",
    "--prompt cat --argument clip_skip=1 --argument clip_skip=2": "--argument gives clip_skip, which was given before",
    "--prompt cat --size 16x16 --argument num_images_per_prompt=two": "the StableDiffusionPipeline failed with these arguments",
    "--prompt cat --grid uniform": "--grid was given, but '",
    "--prompt cat --form score": "--form was given, but '",
    "--prompt cat --noise keyed": "which draws its noise itself; leave out --noise",
    "--prompt cat --sampler euler --eta 1": "eta was given, but the scheduler, a EulerDiscreteScheduler, has no eta",
    "--prompt cat --sampler exponential_ode": "sampler 'exponential_ode' is no scheduler of diffusers, which the Stable",
    "--prompt cat --sampler eulr": "did you mean 'euler'?",
    "--prompt cat --sampler EulerDiscretScheduler": "did you mean 'EulerDiscreteScheduler'?",
    "--prompt cat --sampler StableDiffusionPipeline": "sampler is 'StableDiffusionPipeline'; it must be one of ddpm, ddim",
    "--prompt cat --sampler LCMScheduler": "sampler 'LCMScheduler' does not fit the DDIMScheduler of the Stable",
    "--prompt cat --sampler FlowMatchEulerDiscreteScheduler": "does not fit the DDIMScheduler of the StableDiffusionPipeline; "
    "give one of DDIMScheduler, DDPMScheduler",
    "--prompt cat --steps 0": "0 steps were asked for; give at least 1",
    "--prompt cat --argument guidance_scale=[1,2]": "the StableDiffusionPipeline failed with these arguments: TypeError: ",
    "--prompt cat --guidance much": "Invalid value for '--guidance': ",
    "--prompt cat --max-rows 0": "max_rows is 0; a network call needs at least 1 row",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_bad_option_of_a_pipeline_is_refused_in_one_sentence(line: str, cli: Cli, saved: Saved, tmp_path: Path) -> None:
    assert REFUSED[line] in cli("sample", saved("sd"), *line.split(), "--out", tmp_path / "out").sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "option",
    ["--prompt cat", "--negative-prompt cat", "--guidance 2", "--size 8x8", "--argument eta=1", "--trust-remote-code"],
)
def test_a_pixel_model_refuses_what_is_for_pipelines(option: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    found = cli("sample", tiny, *option.split(), "--out", tmp_path / "out").sentence
    assert f"{option.split()[0]} was given, but {str(tiny)!r} is an unconditional pixel model, which takes none" in found
    assert list(tmp_path.iterdir()) == []


def test_a_flow_model_refuses_schedules_of_betas(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    options = ("--prompt", "cat", "--sampler", "ddim", "--out", tmp_path / "out")
    found = cli("sample", saved("sd3"), *options).sentence
    assert "sampler 'ddim' is for schedules of betas, but the StableDiffusion3Pipeline is a flow model" in found
    assert "give one of FlowMatchEulerDiscreteScheduler" in found


def test_an_argument_that_a_pipeline_cannot_do_without_is_asked_for(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    found = cli("sample", saved("dit"), "--steps", 5, "--out", tmp_path / "out").sentence
    assert found == "the DiTPipeline needs class_labels; give it as --argument class_labels=VALUE"
    found = cli("sample", saved("dit"), "--prompt", "cat", "--out", tmp_path / "out").sentence
    assert "--prompt gives prompt, but the DiTPipeline takes no such argument; it takes class_labels, guidance_scale" in found


# -- loading -----------------------------------------------------------------------------------------------------------


def damaged(saved: Saved, tmp_path: Path) -> Path:
    shutil.copytree(saved("sd"), tmp_path / "model")
    return tmp_path / "model"


def load_refused(cli: Cli, model: Path, tmp_path: Path) -> str:
    (tmp_path / "results").mkdir()
    found = cli("sample", model, *PLAIN, "--out", tmp_path / "results" / "out").sentence
    assert list((tmp_path / "results").iterdir()) == []
    return found


@pytest.mark.parametrize("part", ["text_encoder", "vae"])
def test_a_pickle_in_any_component_is_refused_and_not_opened(part: str, cli: Cli, saved: Saved, tmp_path: Path) -> None:
    model = damaged(saved, tmp_path)
    (weights,) = (model / part).glob("*.safetensors")
    mark = tmp_path / "opened"
    # Reading this pickle would make a file.
    weights.with_suffix(".bin").write_bytes(f"cposix\nsystem\n(Vtouch {mark}\ntR.".encode())
    weights.unlink()
    found = load_refused(cli, model, tmp_path)
    assert f"holds no safetensors weights in {part}/: its weights are {weights.with_suffix('.bin').name}, a pickle" in found
    assert not mark.exists()


def test_a_missing_component_is_named(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    model = damaged(saved, tmp_path)
    shutil.rmtree(model / "vae")
    found = load_refused(cli, model, tmp_path)
    assert "has no vae/, of which its model_index.json says that it holds a AutoencoderKL; save the pipeline again" in found


@pytest.mark.parametrize("file", ["unet/config.json", "tokenizer/tokenizer.json", "scheduler/scheduler_config.json"])
def test_a_damaged_component_is_refused(file: str, cli: Cli, saved: Saved, tmp_path: Path) -> None:
    model = damaged(saved, tmp_path)
    (model / file).write_text("not json")
    assert f"{str(model)!r} could not be loaded: " in load_refused(cli, model, tmp_path)


def edited(model: Path, **changes: Any) -> None:
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


CODE: dict[str, tuple[dict[str, Any], str, str]] = {
    "a pipeline": ({"_class_name": ["mine", "Mine"]}, "mine.py", "mine.py"),
    "a component": ({"unet": ["own_unet", "OwnUNet"]}, "unet/own_unet.py", "own_unet.py"),
    "a module that is not there": ({"unet": ["os.path", "OwnUNet"]}, "", "os.path.py"),
    "a file under the name of a library": ({}, "unet/diffusers.py", "unet/diffusers.py"),
}


@pytest.mark.parametrize("kind", CODE)
def test_code_that_comes_with_a_model_is_refused_and_not_run(kind: str, cli: Cli, saved: Saved, tmp_path: Path) -> None:
    model, mark = damaged(saved, tmp_path), tmp_path / "run"
    changes, file, named = CODE[kind]
    edited(model, **changes)
    if file:
        (model / file).write_text(f"open({str(mark)!r}, 'w')\n")
    found = load_refused(cli, model, tmp_path)
    assert f"{str(model)!r} brings code of its own ({named}), which loading it would run; give --trust-remote-code" in found
    assert not mark.exists()


def test_code_is_run_where_its_author_is_trusted(
    cli: Cli, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = damaged(saved, tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    edited(model, _class_name=["mine", "Mine"])
    (model / "mine.py").write_text("from diffusers import StableDiffusionPipeline\nclass Mine(StableDiffusionPipeline): pass\n")
    found = cli("sample", model, *PLAIN, "--trust-remote-code", "--out", tmp_path / "out")
    assert found.code == 0, found.err
    assert read(tmp_path / "out")["pipeline"]["class"] == "Mine"


def test_a_class_that_diffusers_has_not_is_refused(cli: Cli, saved: Saved, tmp_path: Path) -> None:
    model = damaged(saved, tmp_path)
    edited(model, _class_name="StableConfusionPipeline")
    assert "holds a StableConfusionPipeline, which diffusers 0." in load_refused(cli, model, tmp_path)


def test_a_component_that_is_null_stays_none(saved: Saved) -> None:
    pipeline: Any = load_pipeline(str(saved("sd3_without_t5")), dtype=torch.bfloat16)
    assert pipeline.text_encoder_3 is None
    assert pipeline.transformer.dtype == torch.bfloat16


def test_a_hub_id_is_not_fetched_before_the_options_are_right(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Offline:
        def model_info(self, source: str, **_: object) -> None:
            asked.append(source)
            raise OSError("there is no network\nat all")

    monkeypatch.setattr("paradiff.models.files.HfApi", Offline)
    for option in ("--seeds a", "--method nothing", "--dtype int8", "--window 0", "--device gpu", "--noise none"):
        assert "no network" not in cli("sample", "some/model", *option.split(), "--out", tmp_path / "out").sentence
    assert asked == []
    found = cli("sample", "some/model", "--prompt", "cat", "--out", tmp_path / "out").sentence
    sentence = "is no folder here, and the hub cannot be reached (there is no network); connect to it, or give a folder"
    assert found == f"'some/model' {sentence}"
    assert asked == ["some/model"]
    assert list(tmp_path.iterdir()) == []


# -- explain -----------------------------------------------------------------------------------------------------------


def test_explain_prints_what_the_library_finds(cli: Cli, saved: Saved, tiny: Path) -> None:
    result = cli("explain", saved("sd"), "--steps", 20, "--sampler", "ddpm", "--method", "parasolver", "--window", 8)
    assert (result.code, result.err) == (0, "")
    pipeline = load_pipeline(str(saved("sd")))
    set_sampler(pipeline, "ddpm")
    assert result.out == str(explain(pipeline, parasolver(window=8), num_inference_steps=20)) + "\n"
    assert "StableDiffusionPipeline with DDPMScheduler\nchain: 20 network calls, stochastic" in result.out
    assert "chain: 20 network calls, stochastic" in cli("explain", saved("sd"), "--steps", 20, "--eta", 1).out
    blocks = cli("explain", saved("sd"), "--steps", 20, "--method", "srds", "-m", "blocks=3").out
    assert blocks == str(explain(load_pipeline(str(saved("sd"))), srds(3), num_inference_steps=20)) + "\n"
    assert "DDPMPipeline with DDPMScheduler\nchain: 30 network calls" in cli("explain", tiny, "--steps", 30).out


def test_explain_times_the_networks_of_a_call(cli: Cli, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    call = "--prompt", "a b", "--guidance", 3, "--device", "cpu"
    found = cli("explain", saved("sd"), "--steps", 8, "--window", 4, "--time", *call).out
    assert re.search(r"^UNet2DConditionModel: a call on one state takes .* times that", found, re.MULTILINE)
    assert "each further state repeats" in found
    assert "UNet2DConditionModel" not in cli("explain", saved("sd"), "--steps", 8, "--window", 4).out
    monkeypatch.setattr(Run, "cached", lambda _: ["unet keeps a cache across steps"])
    refused = cli("explain", saved("sd"), "--steps", 8, "--time", *call)
    assert refused.code == 0
    assert "note: the networks were not timed, since there is no parallel run" in refused.out


def test_explain_says_what_is_refused_and_ends_well(cli: Cli, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "cached", lambda _: ["unet keeps a cache across steps"])
    result = cli("explain", saved("sd"), "--steps", 20)
    assert result.code == 0
    assert "executor: sequential" in result.out
    assert "refused: unet keeps a cache across steps" in result.out


@pytest.mark.parametrize(
    ("line", "sentence"),
    {
        "--steps 0": "0 steps were asked for; give at least 1",
        "--steps 2000": "num_inference_steps is 2000, which the DDIMScheduler cannot make",
        "--sampler eulr": "did you mean 'euler'?",
        "--sampler euler --eta 1": "eta was given, but the scheduler, a EulerDiscreteScheduler, has no eta",
        "--steps 10 --method parasolver --window 11": "the window is 11; the chain has 10 sub-intervals",
        "--method nothing": "method is 'nothing'; it must be one of",
        "--method srds -m block=3": "did you mean 'blocks'?",
        "--method sequential --window 2": "--window was given, but method 'sequential' has no option 'window'; it",
        "--prompt a": "--prompt is for a call, and none is made; give --time, too",
        "--time": "the StableDiffusionPipeline needs a prompt",
        "--time --prompt a --device nowhere": "device is 'nowhere'",
    }.items(),
)
def test_explain_refuses_bad_options(line: str, sentence: str, cli: Cli, saved: Saved) -> None:
    assert sentence in cli("explain", saved("sd"), *line.split()).sentence


def test_explain_needs_a_model(cli: Cli) -> None:
    assert "Missing argument" in cli("explain").sentence
    assert "'nothing' is no model" in cli("explain", "nothing").sentence


# -- parts -------------------------------------------------------------------------------------------------------------


def test_counting_steps_leaves_the_class_as_it_was() -> None:
    class Own(diffusers.DDIMScheduler):
        pass

    for kind in (diffusers.DDIMScheduler, Own):
        before = dict(vars(kind))
        scheduler = kind()
        scheduler.set_timesteps(5)
        with counted_steps(scheduler) as count:
            for t in scheduler.timesteps[:3]:
                scheduler.step(torch.ones(1, 1), t, torch.ones(1, 1))
        assert count == [3]
        assert dict(vars(kind)) == before


@pytest.mark.parametrize(
    ("result", "sentence"),
    [
        ((np.zeros((1, 4, 8, 8), np.float32),), "returned an array of shape"),
        ((["a text"],), "returned images, which is neither pictures nor sound"),
        ((torch.zeros(1, 16, 64),), "returned an array of shape"),
        ({"audios": np.zeros((2, 100), np.float32)}, "this command saves one piece a seed"),
        ({"audios": np.zeros((1, 100), np.float32)}, "does not say how many samples a second"),
    ],
)
def test_an_output_that_cannot_be_saved_is_refused(result: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_output(result, object())


@pytest.mark.parametrize(
    "result",
    [
        (np.full((1, 2, 3, 3), 0.75, np.float32),),
        ([np.full((2, 3, 3), 0.75, np.float32)],),
        ([[Image.new("RGB", (3, 2), (191, 191, 191))]],),
        {"images": torch.full((1, 2, 3, 3), 0.75), "nsfw_content_detected": [False]},
    ],
)
def test_pictures_of_every_form_are_read(result: Any) -> None:
    found = read_output(result, object())
    assert found.data.shape == (1, 3, 2, 3)
    assert found.data == pytest.approx(0.5, abs=1 / 255)  # An 8-bit level.


# -- runs that end early -----------------------------------------------------------------------------------------------

ENDS: dict[str, tuple[BaseException, int, str]] = {
    "interrupted": (KeyboardInterrupt(), 130, "interrupted"),
    "without memory": (
        MemoryError(),
        1,
        "error: memory ran out (MemoryError); give fewer seeds, a smaller window, or --max-rows",
    ),
}


@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("how", ENDS)
def test_seeds_that_were_finished_are_kept(
    how: str, compare: bool, cli: Cli, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, code, sentence = ENDS[how]
    spare = tmp_path / "temporary"
    spare.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(spare))
    calls = [0]

    def reading(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] > (3 if compare else 2):
            raise error
        return read_output(*given)

    monkeypatch.setattr("paradiff.app.calls.read_output", reading)
    given = (*PLAIN, "--seeds", "4,2" if compare else "4,2,7", *["--compare"] * compare)
    found = cli("sample", saved("sd"), *given, "--out", tmp_path / "out")
    assert found.code == code
    start = f"{sentence}; " if how != "interrupted" else "interrupted: "
    start += "seeds 4, 2 are finished; what they gave was written to '"
    assert found.err.startswith(start)
    (kept,) = spare.iterdir()
    assert found.err == f"{start}{kept}'\n"
    assert {path.name for path in kept.iterdir()} == {"samples.png", "seed-4.png", "seed-2.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["temporary"]


def test_nothing_is_kept_before_the_first_seed_is_finished(
    cli: Cli, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reading(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("paradiff.app.calls.read_output", reading)
    found = cli("sample", saved("sd"), *PLAIN, "--seeds", "4,2", "--out", tmp_path / "out")
    assert (found.code, found.err) == (130, "interrupted: nothing was written\n")
    assert list(tmp_path.iterdir()) == []


def test_previews_are_decoded_by_the_pipeline_or_said_to_be_states(cli: Cli, tmp_path: Path) -> None:
    folder = tmp_path / "previews"
    line = ("sample", "shapes", "--prompt", "a red circle", "--steps", 14, "--device", "cpu", "--previews")
    found = cli(*line, folder, "--out", tmp_path / "out")
    assert (found.code, found.err) == (0, "")
    assert "estimated errors are of the StableDiffusionPipeline's states" in found.out
    assert "seed-0-round 1: estimated error " in found.out
    names = sorted(path.name for path in folder.iterdir())
    assert names[0] == "seed-0-round-001.png"
    last, whole = (np.asarray(Image.open(path)).astype(int) for path in (folder / names[-1], tmp_path / "out" / "samples.png"))
    assert np.abs(last - whole).mean() < 2  # 8-bit levels
    refused = cli(*line, folder, "--out", tmp_path / "two")
    assert refused.code == 2
    assert "is not empty; give another one" in refused.err


def test_states_of_another_form_have_no_pictures() -> None:
    packed, pixels = CASES["flux"].make(), DDPMPipeline.from_pretrained(BUNDLED / "digits")
    assert pictures_of(packed, torch.zeros(1, 16, 4)) is None
    assert pictures_of(packed, torch.zeros(1, 3, 4, 4)) is None
    decoded = pictures_of(CASES["sd"].make(), torch.zeros(2, 4, 4, 4))
    assert decoded is not None
    assert decoded.shape[:2] == (2, 3)
    states = torch.randn(2, 1, 8, 8)
    shown = pictures_of(pixels, states)
    assert shown is not None
    assert torch.equal(shown, states.clamp(-1, 1))
