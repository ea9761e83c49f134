# SPDX-License-Identifier: Apache-2.0
"""Random calls of the command line, each with a verdict.

    PYTHONPATH=tests python tests/app/fuzz.py --calls 2000 --seed 0
    PYTHONPATH=tests python tests/app/fuzz.py --calls 600 --seed 0 --pipelines
    PYTHONPATH=tests python tests/app/fuzz.py --calls 500 --seed 0 --bench

The second is of pipelines with a loop of their own, whole and broken ones, in folders, the third of `bench` alone.

Options are drawn from the commands themselves, their values from what may be given and from what may not: numbers out of
range, of other scripts, too large, not finite; texts, names of other options, files, pipes and folders of every kind. A call
has to end in time, well, or with one sentence and nothing written.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import get_args

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tiny import CASES
from tiny.case import quiet

from paradiff.app import cli, flags
from paradiff.app.ends import LATE
from paradiff.app.options import PRESETS, SLOPES, parameters, preset, words

SECONDS = 30
"""That a call may take on a busy machine: far more than the longest that is allowed."""

LONGEST = 1000
"""Characters of a sentence."""

WHOLE = ["0", "1", "2", "3", "5", "7", "12", "+3", "007", "4", "6", "2"]
NO_WHOLE = [
    "-1",
    "-0",
    "nan",
    "inf",
    "1.5",
    "2e3",
    "1e400",
    "0x10",
    "1_000",
    " 5",
    "5 ",
    "--5",
    "٣",
    "five",
    "true",
    "None",
    "none",
]
NO_WHOLE += [
    "1000000000",
    "999999999999999999",
    "9223372036854775808",
    "9" * 30,
    "-" + "9" * 30,
    "9" * 5000,
    "[1]",
    "1,2",
    ",",
    "=",
    "\x00",
]
REAL = ["0", "1", "0.5", "1e-3", ".1", "3e-2", "2.", "0.02", "1e-2"]
NO_REAL = [
    "-1",
    "nan",
    "-nan",
    "inf",
    "-inf",
    "1e308",
    "1e309",
    "1e-320",
    "5e-324",
    "1,5",
    "abc",
    "1_0",
    "²",
    "٣",
    "--1",
    "none",
    "0x1p3",
]
TEXTS = ["", " ", "x", "\n", "a\nb", "é", "名", "\udc80", "[bold]", "a" * 3000, "../..", "%s", "{}", "--steps", "-m", "digits"]
LISTS = ["0,4,8", "0,1", "1,2,3", "0,0", "4,2", "0,-1", "0,999999999999", "0,", ",".join(["0"] * 2000), "0,nan", "0;4"]


WHOLE_PIPELINES = ["sd", "sd3_without_t5", "dit", "stable_audio", "animatediff", "ddim", "lcm"]
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FAULTS: list[tuple[str, str | Callable[[bytes], bytes] | None]] = [
    # file of a pipeline, and what it becomes: nothing, another text, or a change of its bytes
    (WEIGHTS, None),
    (WEIGHTS, ""),
    (WEIGHTS, lambda data: data[: len(data) // 2]),
    (WEIGHTS, lambda data: data[:8] + b"}" + data[9:]),
    ("model_index.json", None),
    ("model_index.json", "[1]"),
    ("model_index.json", "{"),
    ("model_index.json", '{"_class_name": "Nothing"}'),
    ("model_index.json", '{"_class_name": "StableDiffusionPipeline"}'),
    ("model_index.json", lambda data: data.replace(b"UNet2DConditionModel", b"AutoencoderKL")),
    ("model_index.json", lambda data: data.replace(b"DDIMScheduler", b"Nothing")),
    ("unet/config.json", None),
    ("unet/config.json", "null"),
    ("unet/config.json", lambda data: data.replace(b'"in_channels": 4', b'"in_channels": 5')),
    ("unet/config.json", lambda data: data.replace(b'"in_channels": 4', b'"in_channels": "four"')),
    ("scheduler/scheduler_config.json", None),
    ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler", "num_train_timesteps": -1}'),
    ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler", "beta_schedule": 3}'),
    ("scheduler/scheduler_config.json", '{"_class_name": "DDIMScheduler", "prediction_type": "nothing"}'),
    ("vae/config.json", '{"_class_name": "Nothing"}'),
    ("tokenizer/tokenizer_config.json", "{"),
]
ARGUMENTS = ["eta=1", "num_images_per_prompt=2", "guidance_rescale=0.7", "clip_skip=1", "class_labels=[3]", "output_type=np"]
ARGUMENTS += ["audio_end_in_s=0.05", "num_frames=2", "timesteps=[900,500,1]", "max_sequence_length=8"]
NO_ARGUMENTS = [
    "x",
    "=",
    "a=",
    "a=[",
    "a=NaN",
    "num_inference_steps=3",
    "generator=0",
    "latents=0",
    "latents=[[1]]",
    "timesteps=[]",
]
NO_ARGUMENTS += [
    "callback_on_step_end=1",
    "return_dict=false",
    "prompt_embeds=[1]",
    "class_labels=[5000]",
    "class_labels=x",
    "eta=x",
]
NO_ARGUMENTS += [
    "num_images_per_prompt=0",
    "num_images_per_prompt=-1",
    "num_images_per_prompt=x",
    "output_type=latent",
    "output_type=3",
]
NO_ARGUMENTS += ["height=7", "width=0", "num_frames=0", "timesteps=[1,900]", "timesteps=[1e9]", "sigmas=[1,0.5]", "strength=3"]
NO_ARGUMENTS += [
    "clip_skip=99",
    "cross_attention_kwargs={}",
    "cross_attention_kwargs=[1]",
    "guidance_scale=x",
    "prompt=3",
    "self=1",
]
NO_ARGUMENTS += [
    "guidance_rescale=inf",
    "eta=nan",
    "audio_end_in_s=-1",
    "max_sequence_length=0",
    "image=x",
    "ip_adapter_image=x",
]


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """Ends what takes too long.

    Raises:
        TimeoutError: Then.
    """

    def end(*_: object) -> None:
        raise TimeoutError("too long")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Place:
    """A folder with a model, and with files of every kind."""

    def __init__(self, folder: Path, pipelines: bool = False) -> None:
        self.folder = folder
        self.model, self.outs, self.files = folder / "model", folder / "outs", folder / "files"
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(4,),
            norm_num_groups=2,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
        )
        DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(self.model)
        self.pipelines = [self._pipeline(name) for name in WHOLE_PIPELINES] if pipelines else []
        self.broken = [self._broken(number) for number in range(len(FAULTS))] if pipelines else []
        self.renew()

    def _pipeline(self, name: str) -> Path:
        path = self.folder / "pipelines" / name
        with quiet():
            CASES[name].make().save_pretrained(path)
        return path

    def _broken(self, number: int) -> Path:
        """A copy of a pipeline, with a fault."""
        path, (file, text) = self.folder / "broken" / str(number), FAULTS[number]
        shutil.copytree(self.pipelines[0], path)
        if text is None:
            (path / file).unlink()
        elif callable(text):
            (path / file).write_bytes(text((path / file).read_bytes()))
        else:
            (path / file).write_text(text)
        return path

    def renew(self) -> None:
        """Puts everything where it was."""
        for folder in (self.outs, self.files):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        (self.outs / "here").mkdir()  # where calls are made
        (self.outs / "empty").mkdir()
        (self.outs / "full").mkdir()
        (self.outs / "full" / "mine").write_text("mine")
        (self.outs / "blocked").mkdir()
        (self.outs / "blocked" / "run.json").mkdir()
        (self.outs / "file").write_text("mine")
        (self.outs / "dangling").symlink_to(self.outs / "nowhere")
        (self.outs / "loop").symlink_to(self.outs / "loop")
        (self.outs / "link").symlink_to(self.outs / "empty")
        os.mkfifo(self.outs / "pipe")
        os.mkfifo(self.files / "pipe")
        (self.files / "folder").mkdir()
        (self.files / "nothing").write_text("")
        (self.files / "nested").write_text("[" * 100_000)
        (self.files / "other").write_text('{"format": "paradiff nodes 1", "tables": []}')
        (self.files / "binary").write_bytes(bytes(range(256)))
        (self.files / "loop").symlink_to(self.files / "loop")

    def listing(self) -> list[str]:
        """All that lies in the folders of outputs."""
        return sorted(str(path.relative_to(self.outs)) for path in self.outs.rglob("*"))

    def out(self, draw: random.Random) -> str:
        """An output folder."""
        known = [
            "new",
            "new",
            "new",
            "a/b/c",
            "empty",
            "full",
            "blocked",
            "file",
            "file/below",
            "dangling",
            "loop",
            "link",
            "pipe",
        ]
        known += ["loop/below", "n" * 300, "/".join(["d"] * 3000), "\udc80", "a\nb", "é 名", "."]
        others = ["/proc/nothing", "/dev/null", "/dev/full", "/dev/null/below", "", "\x00"]
        return draw.choice(others) if draw.random() < 0.1 else str(self.outs / draw.choice(known))

    def store(self, draw: random.Random) -> str:
        """A file of a mesh store."""
        known = ["new", "new", "pipe", "folder", "nothing", "nested", "other", "binary", "loop", "no/where", "n" * 300]
        return (
            draw.choice(["/dev/zero", "/dev/null", "/dev/full"])
            if draw.random() < 0.1
            else str(self.files / draw.choice(known))
        )


def value(draw: random.Random, good: Sequence[str], bad: Sequence[str], share: float) -> str:
    """A value, in that share of cases one that is none."""
    return draw.choice(bad if draw.random() < share else good)


def method_option(draw: random.Random, name: str, place: Place) -> str:
    """One NAME=VALUE of a method, or nearly."""
    if name not in PRESETS or draw.random() < 0.05:
        return draw.choice(["x", "=", "=3", "x=3", "window", "stride==2", "a b=3", "window=\n", "blocks=²", "é=1"])
    known = parameters(preset(name))
    if not known:
        return "window=3"
    option = draw.choice(list(known))
    if option == "warm_start":
        return f"{option}={place.store(draw)}"
    kinds = words(known[option].annotation)
    good: list[str] = [word for word in kinds if " " not in word and ":" not in word]
    good += WHOLE * ("a whole number" in kinds) + REAL * ("a number" in kinds)
    good += LISTS[:3] * any("whole numbers" in word for word in kinds) + ["4x4", "1x2"] * any(
        "SWEEPS" in word for word in kinds
    )
    bad = [*NO_WHOLE, *NO_REAL, *LISTS, *TEXTS, *SLOPES, "shifted:0", "shifted:nan", "shifted:1e400", "shifted:-1", "shifted:x"]
    bad += ["0x0", "99999999x1", "1x99999999", "999999999999999999x2", "4x", "x4", "4x4x4"]
    return f"{option}={value(draw, good or ['1'], bad, 0.4)}"


def bench_call(draw: random.Random, place: Place) -> list[str]:
    """The arguments of a call of `bench`: small cells, or such as there are none of."""
    pools: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "--problem": (["mixture-2", "mixture-2*"], ["", "*x", "[", "plane,gaussian", *TEXTS]),
        "--chain": (["ddim:25", "*pp_2m:25"], ["ddim", "ddim:0", "ddim:-1", ":", "ddim:1e9", "[", *TEXTS]),
        "--windows": (["3", "4,all", "all", "2,2"], ["0", "-1", "3,", ",", "3;4", "٣", "9" * 30, "All", "1.5", *TEXTS]),
        "--method": (["parasolver", "jaco*", "srds"], ["*x", "[", *TEXTS]),
        "--seeds": (["1"], ["9", "0", *NO_WHOLE]),
        "--curve": (
            ["1:1,2:1.1,4:1.44", "1:1"],
            ["1", "1:", ":1", "1:x", "0:1", "1:-1", "1:nan", "1:inf", "1:1,1:2", "a:b", *TEXTS],
        ),
        "--threads": (["1"], NO_WHOLE),
    }
    given = ["bench", "--out", place.out(draw) if draw.random() < 0.4 else str(place.outs / "new")]
    if draw.random() < 0.1:
        given[2] = str(place.outs / "bench")
    bad = draw.choice([None, *pools])
    for option, (good, no) in pools.items():
        if option in ("--curve", "--threads") and option != bad and draw.random() < 0.7:
            continue
        given += [option, draw.choice(no if option == bad else good)]
    return given


def call(draw: random.Random, place: Place) -> list[str]:
    """The arguments of a call."""
    own = bool(place.pipelines)
    name = draw.choice(
        ["sample"] * 5 + ["generate"] * 3 + ["explain"] * 2
        if own
        else [*["sample"] * 8, "generate", "explain", "methods", "bench"]
    )
    if draw.random() < 0.01:
        return draw.sample(["smaple", "--version", "--help", "-h", "", "sample", "\udc80", "-"], 2)
    if name == "methods":
        return [name, *draw.choices([*PRESETS, *TEXTS], k=draw.choice([0, 1, 1, 2]))]
    if name == "bench":
        return bench_call(draw, place)
    model = (
        str(place.model)
        if draw.random() < 0.93
        else draw.choice([*TEXTS, "digit", str(place.files / "pipe"), "/dev/null", "a/b/c"])
    )
    if own and draw.random() < 0.97:
        model = str(draw.choice(place.pipelines if draw.random() < 0.8 else place.broken))
    given, method = [name, model], "parasolver"
    known = inspect.signature(getattr(cli, name), eval_str=True).parameters
    options = {
        "--" + key.replace("_", "-"): set(words(get_args(p.annotation)[0])) for key, p in known.items() if key != "model"
    }
    pools: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "--steps": (["6", "8", "5"], NO_WHOLE),
        "--threads": (["1"], NO_WHOLE),
        "--seeds": (["0", "0-1", "3,1"], ["0-9999999999", "5-2", "1,1", "-1", "a", "0-", "9" * 30, ",", "0-1-2", *NO_WHOLE]),
        "--size": (["16x16"], ["0x0", "16", "x", "9999999999x9999999999", "1e3x2", "-1x4", "٣x٣", *TEXTS]),
        "--device": (["cpu", "auto"], ["cuda", "cuda:99", "cuda:99999999999999999999", "mps", "meta", "gpu", "cpu:9", *TEXTS]),
        "--dtype": (["float32", "bfloat16"], ["float64", "int8", *TEXTS]),
        "--sampler": (list(flags.SAMPLERS + flags.EXPONENTIAL), ["ddmp", "DDIMScheduler", "Nothing", *TEXTS]),
        "--grid": (["log-snr", "uniform"], TEXTS),
        "--form": (["clean", "score"], TEXTS),
        "--noise": (["recorded", "keyed"], TEXTS),
        "--argument": (["guidance_rescale=0.7"], ["x", "=", "a=", "a=[", "a=NaN", *TEXTS]),
    }
    if own:
        pools["--argument"] = (ARGUMENTS, [*NO_ARGUMENTS, *TEXTS])
        pools["--prompt"] = pools["--negative-prompt"] = (["a cat", ""], TEXTS)
        pools["--format"] = (["png", "npy", "safetensors"], TEXTS)
    if draw.random() < 0.7:
        method = draw.choice(list(PRESETS)) if draw.random() < 0.95 else draw.choice(TEXTS)
        given += ["--method", method]
    if name == "generate":
        given += ["--seeds", value(draw, *pools["--seeds"], 0.1)]
    if own and name != "explain" and draw.random() < 0.8:
        given += ["--argument", "class_labels=[3]"] if model.endswith("dit") else ["--prompt", "a cat"]
    if own and name != "explain" and draw.random() < 0.8 and not model.endswith(("dit", "ddim", "audio")):
        given += ["--size", "16x16"]
    if name in ("sample", "generate"):
        given += ["--out", place.out(draw) if draw.random() < 0.3 else str(place.outs / "new")]
    if draw.random() < 0.9:
        given += ["--steps", value(draw, *pools["--steps"], 0.05)]
    for _ in range(draw.choice([0, 0, 0, 0, 0, 1] if own else [0, 1, 1, 2, 3])):
        given += ["-m", method_option(draw, method, place)]
    if own and name != "explain":
        for _ in range(draw.choice([0, 0, 1, 1, 2])):
            given += ["--argument", value(draw, *pools["--argument"], 0.7)]
    for option in draw.sample(list(options), draw.choice([0, 0, 1, 2, 3])):
        if option in ("--method", "--method-option", "--out") or (name == "generate" and option == "--seeds"):
            continue
        kinds = options[option]
        if kinds == {"true", "false"}:
            given.append(option)
            continue
        whole, real = "a whole number" in kinds, "a number" in kinds
        good, bad = pools.get(option, (WHOLE, NO_WHOLE) if whole else (REAL, NO_REAL) if real else (WHOLE, TEXTS))
        given += [option, value(draw, good, bad, 0.3)]
    return given


def run(given: Sequence[str]) -> tuple[int, str, str]:
    """Runs the command in this process; its exit code and its streams."""
    out, err = io.StringIO(), io.StringIO()
    before, sys.argv = sys.argv, ["paradiff", *given]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), time_limit(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cli.main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue(), err.getvalue()
    finally:
        sys.argv = before
        torch.set_num_threads(1)
    raise AssertionError("the command did not exit")


def verdict(given: Sequence[str], place: Place) -> tuple[str, str]:
    """What a call came to: `well`, `refused`, or what is wrong with it; and what it said."""
    before, home = place.listing(), Path.cwd()
    os.chdir(place.outs / "here")
    try:
        code, _, err = run(given)
    except TimeoutError:
        return "hangs", ""
    except BaseException as error:
        return f"raises {type(error).__name__}", str(error)
    finally:
        os.chdir(home)
    lines = err.splitlines()
    after = place.listing()
    late = code == LATE and any("deadline" in word for word in given)
    begun = late and given[0] == "generate"  # whose scratch lasts as long as shards are missing
    if any(".paradiff" in name for name in after) and not begun:
        return "leaves scratch", err
    if code == 0 or late:
        found = next((path for path in place.outs.rglob("run.json") if path.is_file()), None)
        if given[0] == "sample" and "--help" not in given:
            if found is None:
                return "writes no run.json", err
            json.loads(found.read_text(), parse_constant=lambda name: {}[name])
        if given[0] == "bench":
            found = next((path for path in place.outs.rglob("bench.json") if path.is_file()), None)
            if found is None or not json.loads(found.read_text(), parse_constant=lambda name: {}[name])["rows"]:
                return "measures nothing", err
        return "well", err
    if after != before:
        return f"leaves {sorted(set(after) ^ set(before))}", err
    if code == 1 and "memory ran out" in err:
        return "memory", err
    if code != 2:
        return f"exit code {code}", err
    if len(lines) != 1 or not lines[0].startswith("error: ") or "Traceback" in err or len(err) > LONGEST:
        return f"{len(lines)} lines, {len(err)} characters", err
    return "refused", err


def fuzz(calls: int, seed: int, folder: Path, pipelines: bool = False, bench: bool = False) -> tuple[Counter[str], list[str]]:
    """Makes that many calls, of pixel models, of pipelines or of `bench`; how many came to what, and a line for each that is
    wrong."""
    draw, place = random.Random(seed), Place(folder, pipelines)
    counts, wrong = Counter[str](), []
    for _ in range(calls):
        given = bench_call(draw, place) if bench else call(draw, place)
        begin = time.monotonic()
        what, said = verdict(given, place)
        if what not in ("well", "refused"):
            wrong.append(f"{what} after {time.monotonic() - begin:.1f} s: {shlex.join(given)[:400]!r}: {said[-300:]!r}")
        counts[what if what in ("well", "refused", "memory") else "wrong"] += 1
        if place.listing() != [] or what != "refused":
            place.renew()
    return counts, wrong


def main(arguments: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]))
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipelines", action="store_true")
    parser.add_argument("--bench", action="store_true")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        counts, wrong = fuzz(given.calls, given.seed, Path(place), given.pipelines, given.bench)
    print(*wrong, sep="\n")
    print(f"{given.calls} calls in {time.monotonic() - begin:.0f} s:", ", ".join(f"{n} {what}" for what, n in counts.items()))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
