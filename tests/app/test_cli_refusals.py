# SPDX-License-Identifier: Apache-2.0
"""Every bad input to the command line gets one sentence on stderr, exit code 2, and leaves no files."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import Cli, save_pipeline, tiny_unet
from typer.main import get_command

from paradiff.app import flags
from paradiff.app.cli import app
from paradiff.app.ends import FAILED, LATE
from paradiff.app.ends import REFUSED as REFUSED_CODE
from paradiff.app.flags import DTYPES
from paradiff.app.options import PRESETS, SLOPES, known_parameters, parameters, parse_seeds, preset, read_value, words
from paradiff.app.signals import INTERRUPTED, TERMINATED
from paradiff.chain import slope
from paradiff.models.files import BUNDLED, INDEX
from paradiff.models.pixel import EXPONENTIAL, SCHEDULERS, load
from paradiff.version import __version__

# diffusers 0.42 hands tensors to numpy 2's asarray, which complains.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")

REFUSED: dict[str, str] = {
    # The chain and the method.
    "--window 0": "the window is 0; it must be a whole number, at least 1, or none for the whole chain",
    "--deadline 0": "the deadline, in seconds, is 0.0; it must be a number, positive, and finite",
    "--deadline -2": "the deadline, in seconds, is -2.0; it must be a number, positive, and finite",
    "--method auto --deadline 0": "the deadline, in seconds, is 0.0; it must be a number, positive, and finite",
    "--method auto --deadline nan": "the deadline, in seconds, is nan; it must be a number, positive, and finite",
    "--method auto --deadline 1 --objective memory": "the objective is 'memory' and the deadline 1 s, which ask for",
    "--method auto --objective speed": "the objective is 'speed'; it must be one of latency, evaluations, memory, anytime",
    "--objective memory": "--objective was given, but method 'parasolver' has no option 'objective'",
    "--method auto -m objective=memory --objective memory": "objective was given twice, as --objective and as -m objective",
    "--deadline nan": "the deadline, in seconds, is nan; it must be a number, positive, and finite",
    "--window many": "the window is 'many'; it must be one of a whole number, none",
    "--window 99999999999999999999": "the window is 99999999999999999999, a number of more than 18 digits",
    "--window -3": "the window is -3; it must be a whole number, at least 1",
    "--steps 10 --window 11": "the window is 11; the chain has 10 sub-intervals: give at most that",
    "--steps 10 -m warmup=11": "warmup is 11 steps; the chain has 10: give at most 10",
    "-m warmup=-1": "warmup is -1; it must be a whole number, at least 0",
    "-m stride=0": "the stride is 0; a sub-interval must have at least 1 step",
    "--steps 10 -m stride=11": "the stride is 11 steps; the chain has 10: give at most 10",
    "--steps 0": "0 steps were asked",
    "--steps -1": "-1 steps were asked",
    "--steps 2000": "2000 steps were asked",
    "--steps many": "Invalid value for '--steps': ",
    "--steps 10.5": "Invalid value for '--steps': ",
    "--tolerance -1": "the tolerance is -1.0; it must be a number, 0 or more, and finite",
    "--tolerance inf": "the tolerance is inf; it must be a number, 0 or more, and finite",
    "--tolerance nan": "the tolerance is nan; it must be a number, 0 or more, and finite",
    "--threads 0": "threads is 0; it must be at least 1",
    "--max-rows 0": "max_rows is 0; a network call needs at least 1 row",
    "--steps 10 --eta 0.5": "eta is 0.5, but sampler 'ddpm' has no eta; give it with sampler 'ddim'",
    "--sampler ddim --steps 10 --eta 1.5": "eta is 1.5; it must lie in [0, 1]",
    # Names, and the nearest one.
    "--sampler dpm": "did you mean 'ddpm'?",
    "--sampler euler_ancestal": "did you mean 'euler_ancestral'?",
    "--method parsolver": "did you mean 'parasolver'?",
    "--method paradigm": "did you mean 'paradigms'?",
    "-m slope=identiy": "did you mean 'identity'?",
    "-m slope=freeze-epsilom": "did you mean 'freeze-epsilon'?",
    "-m slope=shifted": "did you mean 'shifted:VARIANCE'?",
    "-m slope=shifted:VARIANCE": "shifted takes a positive data variance, such as shifted:0.5",
    "-m slope=shifted:0": "shifted takes a positive data variance, such as shifted:0.5",
    "-m slope=shifted:-1": "shifted takes a positive data variance, such as shifted:0.5",
    "--dtype float23": "did you mean 'float32'?",
    "--noise record": "did you mean 'recorded'?",
    "-m rule=errors": "rule is 'errors'; it must be one of error, change",
    # Options of other methods, and of none.
    "--method jacobi -m stride=2": "method 'jacobi' has no option 'stride'; it takes window, tolerance",
    "--method jacobi -m slope=zero": "method 'jacobi' has no option 'slope'",
    "--method paradigms -m rule=error": "method 'paradigms' has no option 'rule'; it takes window, tolerance",
    "--method sequential --window 5": "--window was given, but method 'sequential' has no option 'window'; it takes no options",
    "--begin copy": "No such option",
    "--windw 5": "No such option",
    "more than one": "unexpected extra argument",
    "-m blocks=4": "method 'parasolver' has no option 'blocks'; it takes window, tolerance, stride, warmup, slope, rule",
    "--method jacobi -m coarse=two-step": "method 'jacobi' has no option 'coarse'",
    "--method sequential -m rows=2": "method 'sequential' has no option 'rows'; it takes no options",
    "--method srds -m stride=2": "method 'srds' has no option 'stride'; it takes blocks, coarse, ordering, "
    "tolerance, rule, iterations, window, rows",
    "--method srds -m slope=zero": "method 'srds' has no option 'slope'",
    "-m rule=image": "rule is 'image'; it must be one of error, change",
    # Method options: names, values, and how they are written.
    "-m strid=3": "method 'parasolver' has no option 'strid'; it takes window, tolerance, stride, warmup, slope, rule; did you "
    "mean 'stride'?",
    "--method srds -m orderin=batched": "did you mean 'ordering'?",
    "--method collocation -m max-node=30": "did you mean 'max_nodes'?",
    "-m stride": "the method option is 'stride'; give it as NAME=VALUE, such as -m blocks=20",
    "-m =3": "the method option is '=3'; give it as NAME=VALUE",
    "-m=stride=3": "the method option is '=stride=3'; give it as NAME=VALUE",
    "-m stride=": "the method option stride is empty; give it a value, or leave it out",
    "-m stride=2 -m stride=3": "the method option stride was given twice, as 2 and 3; give it once",
    "--window 8 -m window=8": "window was given twice, as --window and as -m window; give it once",
    "--tolerance 1 -m warmup=1 -m tolerance=1": "tolerance was given twice, as --tolerance and as -m tolerance; give it once",
    "-m window=many": "window is 'many'; it must be one of a whole number, none",
    "--method quasi_newton -m secants=99999999999999999999": "secants is 99999999999999999999, a number of more than 18 digits",
    "-m stride=4,99999999999999999999": "stride is 99999999999999999999, a number of more than 18 digits; give a smaller one",
    "--method collocation -m warm_start=.": "warm_start is '.', which is no mesh store",
    "-m warmup=1.5": "warmup is '1.5'; give a whole number",
    "-m tolerance=small": "tolerance is 'small'; it must be one of a number, none",
    "-m stride=0,4": "a sub-interval must have at least 1 step",
    "-m stride=4,x": "stride is '4,x'; it must be one of a whole number, whole numbers such as 0,4,8",
    "--method collocation -m exact=ja": "exact is 'ja'; it must be one of true, false",
    "--method collocation -m target=od": "target is 'od'; it must be one of chain, ode, sde; did you mean 'ode'?",
    "--method collocation -m nodes=aut": "nodes is 'aut'; it must be one of a whole number, whole numbers such as 0,4,8, auto; "
    "did you mean 'auto'?",
    "-m slope=5": "slope is '5'; it must be one of zero, identity, freeze-epsilon, freeze-clean-data, shifted:VARIANCE",
    # Wavefronts.
    "--method srd": "did you mean 'srds'?",
    "--method srds -m blocks=0": "blocks is 0; give a whole number of at least 1 block",
    "--method srds --steps 10 -m blocks=11": "11 blocks were asked for; the chain has 10 steps: give at most 10",
    "--method srds -m blocks=many": "blocks is 'many'; it must be one of a whole number, whole numbers such as 0,4,8, none",
    "--method srds -m coarse=0": "coarse is 0 steps a block; it must be at least 1",
    "--method srds -m coarse=-2": "coarse is -2 steps a block; it must be at least 1",
    "--method srds -m coarse=1.5": "coarse is '1.5'; it must be one of one-step, two-step, a whole number, whole numbers such "
    "as 0,4,8, zero, identity, freeze-epsilon, freeze-clean-data, shifted:VARIANCE",
    "--method srds -m coarse=two-steps": "did you mean 'two-step'?",
    "--method srds -m coarse=shifted": "did you mean 'shifted:VARIANCE'?",
    "--method srds -m coarse=shifted:0": "shifted takes a positive data variance, such as shifted:0.5",
    "--method srds -m ordering=pipeline": "ordering is 'pipeline'; it must be one of pipelined, batched",
    "--method srds -m rule=images": "rule is 'images'; it must be one of error, change, sample, image",
    "--method srds --tolerance 0": "the tolerance is 0.0; it must be a number, positive, and finite",
    "--method srds -m iterations=-1": "iterations is -1; it must be a whole number, at least 0",
    "--method srds --steps 10 -m blocks=4 -m iterations=5": "5 iterations were asked for; 4 blocks are exact after 4",
    "--method srds -m rows=0": "rows is 0; it must be a whole number, at least 1",
    "--method srds --window 0": "window is 0; it must be a whole number, at least 1",
    "--method srds --steps 10 -m blocks=4 --window 5": "the window is 5; there are 4 blocks: give at most that",
    "--method srds -m ordering=batched -m rows=2": "rows was given with the batched ordering, which has none",
    "--method srds -m ordering=batched --window 2": "window was given with the batched ordering, which has none",
    "--method srds -m ordering=batched -m coarse=zero": "the coarse propagator is a slope, which has no sweep to batch",
    "--method srds -m coarse=identity --window 2": "window was given with a coarse propagator that is a slope",
    "--method srds --window 2 -m iterations=1": "window was given with iterations, which looks at the end of the chain",
    "--method srds --window 2 -m rule=image": "window was given with rule 'image', which looks at the end of the chain",
    # Blocks in turn and in flight, and the chains that go with them.
    "--method piadm": "did you mean 'piadm_sde'?",
    "--method piadm_sde": "method 'piadm_sde' needs blocks; give it as -m blocks=VALUE",
    "--method piadm_sde -m blocks=0": "0 blocks were asked for; give at least 1, or the nodes of their edges",
    "--method piadm_sde --steps 10 -m blocks=11": "a block cannot be shorter than a step: give at most 10",
    "--method piadm_sde -m blocks=2 -m sweeps=0": "sweeps is 0; it must be a whole number, at least 1",
    "--method piadm_sde -m blocks=2 -m sweeps=3 --tolerance 0.1": "a fixed number of sweeps heeds no tolerance: give one",
    "--method piadm_sde -m blocks=2 -m stagger=0": "the stagger is 0; it must be a whole number, at least 1 sweep",
    "--method piadm_sde -m blocks=2 -m corrector=2x2": "method 'piadm_sde' has no option 'corrector'; it takes blocks, sweeps, "
    "slope, predictor, tolerance, stagger, carry, window",
    "--method piadm_ode -m blocks=2 --sampler ddpm": "piadm_ode is for deterministic chains; table 'ddpm' is stochastic",
    "--method piadm_sde -m blocks=2 --sampler ddim": "piadm_sde is for stochastic chains; table 'ddim' is deterministic",
    "--method piadm_ode -m blocks=2 -m corrector=2,2": "corrector is '2,2'; it must be one of STEPSxSWEEPS such as 4x4, none",
    "--method piadm_ode -m blocks=2 -m corrector=0x2": "the corrector's number of steps is 0; it must be a whole number",
    "--method piadm_ode -m blocks=2 -m stagger=1 -m corrector=2x2": "it needs blocks in turn, without a stagger",
    "--method srds -m sweeps=2": "method 'srds' has no option 'sweeps'",
    "--sampler ddpm --grid uniform": "--grid was given, but sampler 'ddpm' has none; exponential_sde, exponential_ode do",
    "--sampler ddpm --form score": "--form was given, but sampler 'ddpm' has none; exponential_sde, exponential_ode do",
    "--sampler exponential_sde --grid paper": "grid is 'paper'; it must be one of log-snr, uniform",
    "--sampler exponential_sde --form scor": "did you mean 'score'?",
    "--sampler exponential_sde --eta 1": "eta is 1, but sampler 'exponential_sde' has no eta",
    "--sampler exponential_ode --steps 1": "1 steps were asked of exponential_ode; it needs at least 2",
    "--blocks 4": "No such option",
    # Seeds.
    "--seeds 3-1": "seeds are '3-1', of which '3-1' is no seed; give whole numbers and rising ranges, such as 0-15 or 0,3,7-9",
    "--seeds a": "seeds are 'a', of which 'a' is no seed",
    "--seeds 1,,2": "seeds are '1,,2', of which '' is no seed",
    "--seeds 1,1": "seeds are '1,1', which names seed 1 twice; name each once",
    "--seeds 0-4,3": "seeds are '0-4,3', which names seed 3 twice; name each once",
    "--seeds -1": "seeds are '-1', of which '-1' is no seed",
    "--seeds 1.5": "seeds are '1.5', of which '1.5' is no seed",
    "--seeds 0-99999999999": "seeds are '0-99999999999', which are 100000000000; give at most 100000 to one run",
    f"--seeds {'9' * 5000}": f"the seed {'9' * 40}... is too large; seeds are below 2^63",
    "--seeds 9223372036854775808": "the seed 9223372036854775808 is too large; seeds are below 2^63",
    # Devices.
    "--device cuda:99": "device 'cuda:99' is not available; use cpu or auto",
    **{f"--device {d}": f"device is '{d}'; use cpu, cuda, cuda:1, mps or auto" for d in ("gpu", "xpu", "meta", "cpu:7")},
    "--threads 100000": f"threads is 100000; this machine has {os.cpu_count()} cores: give at most {4 * (os.cpu_count() or 1)}",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_bad_option_is_refused_in_one_sentence(line: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    given = line.split() if line.startswith("-") else [*line.split(), "--steps", "10"]
    assert REFUSED[line] in cli("sample", tiny, "--out", tmp_path / "out", "--method", "parasolver", *given).sentence
    assert list(tmp_path.iterdir()) == []


def test_values_that_were_given_are_repeated_with_those_that_would_do(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    for line, known in {"--sampler edm": "dpmpp_2m", "--method picard": "paradigms", "--dtype int8": "bfloat16"}.items():
        option, value = line.split()
        found = cli("sample", tiny, "--out", tmp_path / "out", option, value).sentence
        assert repr(value) in found
        assert known in found


def test_no_arguments_show_the_help(cli: Cli) -> None:
    found = cli()
    assert found.code == 0
    assert found.err == ""
    for text in ("Usage", "sample", "generate", "explain", "methods", "--version"):
        assert text in found.out


def test_the_help_and_the_page_list_the_exit_codes(cli: Cli) -> None:
    page = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8").split("| exit code |")[1].split("##")[0]
    told = " ".join(cli("--help").out.split())
    for code in (0, FAILED, REFUSED_CODE, LATE, INTERRUPTED, TERMINATED):
        assert f"{code}, " in told.split("Exit codes: ")[1]
        assert str(code) in page


def test_the_version_is_the_packages(cli: Cli) -> None:
    found = cli("--version")
    assert (found.code, found.out, found.err) == (0, __version__ + "\n", "")


def test_help_names_every_option_in_its_panel(cli: Cli) -> None:
    found = cli("sample", "--help")
    assert found.code == 0
    command: Any = get_command(app)
    options = [p for p in command.commands["sample"].params if p.param_type_name == "option"]
    shown = [p for p in options if not p.hidden]
    assert len(shown) <= 24
    told = {"--negative-prompt", "--size", "--objective", "--eta"}  # elsewhere: as what --argument and -m take, at --sampler
    assert {p.opts[0] for p in options} - {p.opts[0] for p in shown} == {"--grid", "--form", "--timeout", *told}
    for parameter in shown:
        assert parameter.opts[0] in found.out
    for panel in ("Model and chain", "Method", "Output", "Device", "Pipelines"):
        assert f"─ {panel} ─" in found.out


def test_none_may_be_written_as_python_does() -> None:
    assert read_value("window", "None", int | None) is None
    assert read_value("window", "none", int | None) is None


def test_the_window_may_be_none(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    found = cli("sample", tiny, "--steps", 6, "--window", "none", "--out", tmp_path / "out")
    assert (found.code, found.err) == (0, "")
    assert json.loads((tmp_path / "out" / "run.json").read_text())["arguments"]["window"] is None


def test_many_seeds_are_read_at_once() -> None:
    assert parse_seeds("50000-99999,0-49999") == [*range(50000, 100000), *range(50000)]


# -- before and after the run starts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", [["--window", 0], ["--steps", 0], ["--device", "meta"], ["--window", 99], ["--threads", 0]])
def test_where_a_run_goes_is_not_said_of_one_that_is_refused(
    option: list[object], cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paradiff-out").mkdir()
    (tmp_path / "paradiff-out" / "mine").touch()
    found = cli("sample", tiny, "--steps", 6, "--method", "parasolver", *option)
    assert (found.code, found.out) == (2, "")


@pytest.mark.parametrize("contents", [None, "not json", "{}"])
@pytest.mark.parametrize("model", ["digits", "shapes", "no-such-model"])
def test_a_file_that_is_no_mesh_store_is_refused_before_the_model_is_loaded(
    model: str, contents: str | None, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("paradiff.models.files.read_index", lambda *_: pytest.fail("the model was looked for"))
    path = tmp_path / "store"
    path.mkdir() if contents is None else path.write_text(contents)
    given = ("--method", "collocation", "-m", f"warm_start={path}")
    found = cli("sample", model, "--steps", 20, "--out", tmp_path / "out", *given)
    assert f"warm_start is {str(path)!r}, which is no mesh store" in found.sentence
    assert found.out == ""
    assert [entry.name for entry in tmp_path.iterdir()] == ["store"]


# -- what nobody foresaw -------------------------------------------------------------------------------------------------

FAULT = "this is a fault of paradiff: please report it with the command (PARADIFF_TRACEBACK=1 shows where)"
UNFORESEEN: dict[str, tuple[Exception, str]] = {
    "an error": (RuntimeError("it broke\nC++ stack"), f"RuntimeError: it broke; {FAULT}"),
    "without a text": (KeyError(), f"KeyError; {FAULT}"),
    "host memory": (MemoryError(), "memory ran out (MemoryError); give fewer seeds, a smaller window, or --max-rows"),
    "device memory": (
        RuntimeError("CUDA out of memory. Tried"),
        "memory ran out (RuntimeError: CUDA out of memory. Tried); give fewer seeds, a smaller window, or --max-rows",
    ),
}


@pytest.mark.parametrize("kind", UNFORESEEN)
@pytest.mark.parametrize("traced", [False, True])
def test_an_error_that_nobody_foresaw_is_one_sentence(
    kind: str, traced: bool, cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error, sentence = UNFORESEEN[kind]

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("paradiff.app.run_json.write_json", fail)
    if traced:
        monkeypatch.setenv("PARADIFF_TRACEBACK", "1")
    else:
        monkeypatch.delenv("PARADIFF_TRACEBACK", raising=False)
    found = cli("sample", tiny, "--steps", 6, "--out", tmp_path / "out")
    assert found.code == 1
    assert found.err.endswith(f"error: {sentence}\n")
    assert ("Traceback" in found.err) == traced
    assert traced or len(found.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# -- empty values ------------------------------------------------------------------------------------------------------

COMMAND: Any = get_command(app)
EMPTY = [(name, p) for name, one in COMMAND.commands.items() for p in one.params if not getattr(p, "is_flag", False)]


@pytest.mark.parametrize("text", ["", " "])
@pytest.mark.parametrize(("command", "parameter"), EMPTY, ids=[f"{name} {p.name}" for name, p in EMPTY])
def test_an_empty_value_is_refused_by_name(command: str, parameter: Any, text: str, cli: Cli, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "out") if command == "sample" and parameter.name != "out" else ()
    if parameter.param_type_name == "argument":
        found, name = cli(command, *out, text), parameter.name.upper()
    else:
        model = ("digits",) if command in ("explain", "generate") else ()
        found, name = cli(command, *model, *out, parameter.opts[0], text), parameter.opts[0]
    assert found.sentence == f"{name} is empty; give it a value, or leave it out"
    assert list(tmp_path.iterdir()) == []


def test_a_nul_character_is_refused_by_the_name_of_its_option(cli: Cli, tmp_path: Path) -> None:
    for name in ("--out", "--prompt", "--seeds", "--previews"):
        found = cli("sample", "digits", "--out", tmp_path / "out", name, "a\0b").sentence
        assert found == f"{name} holds a NUL character, which no name, number or prompt has; leave it out"
    assert list(tmp_path.iterdir()) == []


def test_an_empty_value_after_an_equals_sign_is_refused_too(cli: Cli) -> None:
    assert cli("sample", "--window=").sentence == "--window is empty; give it a value, or leave it out"
    found = cli("sample", "--argument", "guidance_scale=").sentence
    assert (
        found
        == "the argument guidance_scale is empty; give it a value (guidance_scale='\"\"' for an empty text), or leave it out"
    )


# -- what need not be loaded -------------------------------------------------------------------------------------------

LIGHT = {
    "the help": ([], 0),
    "a command's help": (["sample", "--help"], 0),
    "the version": (["--version"], 0),
    "an unknown option": (["sample", "--windw", "5"], 2),
    "an unknown command": (["smaple"], 2),
    "an unknown method": (["sample", "--method", "srd"], 2),
    "an empty value": (["sample", "--window", ""], 2),
    "no number": (["sample", "--steps", "many"], 2),
    "a seed": (["sample", "--seeds", "a"], 2),
    "a dtype": (["sample", "--dtype", "int8"], 2),
    "a noise": (["sample", "--noise", "white"], 2),
    "a deadline": (["sample", "--deadline", "-1"], 2),
    "a size": (["sample", "--size", "16"], 2),
    "a method option without a value": (["sample", "-m", "stride"], 2),
    "an option twice": (["sample", "-m", "stride=1", "-m", "stride=1"], 2),
    "an option that the method has not": (["sample", "--method", "srds", "-m", "blocs=20"], 2),
    "--tolerance of a method without": (["sample", "--method", "sequential", "--tolerance", "0.1"], 2),
    "an option of the wrong kind": (["sample", "--method", "srds", "-m", "blocks=many"], 2),
    "an option that is missing": (["sample", "--method", "piadm_sde"], 2),
    "explain's option": (["explain", "digits", "--method", "srds", "-m", "blocs=20"], 2),
    "explain's method": (["explain", "digits", "--method", "srd"], 2),
    "methods' method": (["methods", "srd"], 2),
}

RUN = """
import sys
from paradiff.app import main
try:
    main()
finally:
    found = [name for name in ("torch", "diffusers", "numpy", "matplotlib", "PIL") if name in sys.modules]
    print("loaded:", *found)
"""


@pytest.mark.parametrize("name", LIGHT)
def test_no_network_library_is_loaded_for(name: str) -> None:
    arguments, code = LIGHT[name]
    command = [sys.executable, "-c", RUN, *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == code, found.stderr
    assert found.stdout.splitlines()[-1] == "loaded:"
    assert len(found.stderr.splitlines()) == (1 if code else 0), found.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_options_read_off_the_source_are_those_of_the_preset(name: str) -> None:
    real, read = parameters(preset(name)), known_parameters(name)
    assert list(read) == list(real)
    for option, parameter in real.items():
        assert words(read[option].annotation) == words(parameter.annotation)
        assert read[option].kind is parameter.kind
        assert (read[option].default is inspect.Parameter.empty) == (parameter.default is inspect.Parameter.empty)


def test_names_that_help_repeats_are_those_of_the_library() -> None:
    assert tuple(SCHEDULERS) == flags.SAMPLERS
    assert tuple(EXPONENTIAL) == flags.EXPONENTIAL
    assert all(isinstance(getattr(torch, name), torch.dtype) for name in DTYPES)
    assert all(callable(getattr(slope, name)) for name in SLOPES.values())


# -- models ------------------------------------------------------------------------------------------------------------


def refused(cli: Cli, model: object, tmp_path: Path) -> str:
    out = tmp_path / "results" / "out"
    out.parent.mkdir()
    found = cli("sample", model, "--sampler", "ddim", "--steps", 6, "--out", out).sentence
    assert list(out.parent.iterdir()) == []
    return found


def test_a_folder_that_is_no_pipeline_is_refused(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    found = refused(cli, tmp_path / "model", tmp_path)
    assert f"the folder {str(tmp_path / 'model')!r} is no pipeline: it has no model_index.json" in found


@pytest.mark.parametrize("model", ["digit", "./nowhere", "/nowhere/at/all", "~/model", "a/b/c"])
def test_a_model_that_is_not_there_is_refused(model: str, cli: Cli, tmp_path: Path) -> None:
    bundled = ", ".join(sorted(file.parent.name for file in BUNDLED.glob(f"*/{INDEX}")))
    assert "digits" in bundled
    assert f"{model!r} is no model: give a bundled one ({bundled}), a folder" in refused(cli, model, tmp_path)


def test_a_pickle_is_refused_and_not_opened(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny, model)
    (model / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    mark = tmp_path / "opened"
    # Reading this pickle would make a file.
    (model / "unet" / "diffusion_pytorch_model.bin").write_bytes(f"cposix\nsystem\n(Vtouch {mark}\ntR.".encode())
    found = refused(cli, model, tmp_path)
    assert "holds no safetensors weights in unet/: its weights are diffusion_pytorch_model.bin, a pickle, which can" in found
    assert not mark.exists()


def test_a_folder_without_weights_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "holds no safetensors weights in unet/: it has no weights" in refused(cli, tmp_path / "model", tmp_path)


TEXT = {
    "_class_name": "StableDiffusionPipeline",
    "unet": ["diffusers", "UNet2DConditionModel"],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
}
LATENT = {
    "_class_name": "LDMPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "vqvae": ["diffusers", "VQModel"],
}
UNKNOWN = {"_class_name": "UnknownPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": [None, None]}
DIT = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
OTHERS: dict[str, tuple[dict, str]] = {  # Each with what is wrong with the folder for the command line, which takes them.
    "text": (TEXT, "has no text_encoder/, of which its model_index.json says that it holds a CLIPTextModel"),
    "latent": (LATENT, "has no vqvae/, of which its model_index.json says that it holds a VQModel"),
    "no scheduler": (UNKNOWN, "holds a UnknownPipeline, which diffusers"),
    "no unet": (DIT, "has no transformer/, of which its model_index.json says that it holds a DiTTransformer2DModel"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_pipeline_of_another_kind_is_no_pixel_model(kind: str, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    index, wrong = OTHERS[kind]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    assert wrong in refused(cli, tmp_path / "model", tmp_path)
    sentence = f"holds a {index['_class_name']}; this command samples unconditional pixel pipelines"
    with pytest.raises(ValueError, match=sentence):
        load(str(tmp_path / "model"))


def test_a_scheduler_without_betas_is_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    # Read as a DDPMScheduler's, its config would give that one's default betas.
    shutil.copytree(tiny, tmp_path / "model")
    config = {"_class_name": "ScoreSdeVeScheduler", "num_train_timesteps": 2000, "sigma_max": 1348.0}
    (tmp_path / "model" / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    index = {"_class_name": "ScoreSdeVePipeline", "unet": ["diffusers", "UNet2DModel"]}
    index["scheduler"] = ["diffusers", "ScoreSdeVeScheduler"]
    (tmp_path / "model" / "model_index.json").write_text(json.dumps(index))
    assert "has a ScoreSdeVeScheduler, whose config has no betas" in refused(cli, tmp_path / "model", tmp_path)


@pytest.mark.parametrize(
    ("file", "contents"),
    [
        ("model_index.json", "not json"),
        ("model_index.json", "[]"),
        ("model_index.json", '{"_class_name": "DDPMPipeline", "unet": "UNet2DModel", "scheduler": []}'),
        ("model_index.json", '{"_class_name": "DDPMPipeline", "unet": 3, "scheduler": []}'),
        ("scheduler/scheduler_config.json", "not json"),
        ("scheduler/scheduler_config.json", None),
        ("unet/config.json", "not json"),
        ("unet/config.json", None),
        ("unet/diffusion_pytorch_model.safetensors", "not safetensors"),
        ("unet/diffusion_pytorch_model.safetensors", ""),
    ],
)
def test_a_damaged_folder_is_refused(file: str, contents: str | None, cli: Cli, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    path = tmp_path / "model" / file
    path.unlink() if contents is None else path.write_text(contents)
    assert str(tmp_path / "model") in refused(cli, tmp_path / "model", tmp_path)


def test_weights_of_another_network_are_refused(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    tiny_unet(block_out_channels=(8,)).save_pretrained(tmp_path / "other")
    name = "diffusion_pytorch_model.safetensors"
    shutil.copy(tmp_path / "other" / name, tmp_path / "model" / "unet" / name)
    assert str(tmp_path / "model") in refused(cli, tmp_path / "model", tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_model_that_returns_no_numbers_is_named(bad: float, cli: Cli, tmp_path: Path) -> None:
    unet = tiny_unet()
    unet.conv_out.weight.data.fill_(bad)
    found = refused(cli, save_pipeline(tmp_path / "model", unet), tmp_path)
    assert "is not finite after node 0 (time 830), " in found
    assert "the model returned NaN or infinity, or overflowed its dtype; check its weights" in found


def test_a_network_that_also_predicts_a_variance_is_refused(cli: Cli, tmp_path: Path) -> None:
    found = refused(cli, save_pipeline(tmp_path / "model", tiny_unet(out_channels=2)), tmp_path)
    assert "the model returned shape (1, 2, 8, 8) for rows of shape (1, 1, 8, 8)" in found
    assert "a network that also predicts a variance needs those channels removed" in found


def test_a_sample_that_is_no_picture_is_refused(cli: Cli, tmp_path: Path) -> None:
    found = refused(cli, save_pipeline(tmp_path / "model", tiny_unet(channels=2)), tmp_path)
    assert "a sample has 2 channels; a picture has 1 (grey) or 3 (colour)" in found


def test_a_scheduler_without_a_table_is_refused_by_the_option(cli: Cli, tmp_path: Path) -> None:
    model = save_pipeline(tmp_path / "model", prediction_type="sample", variance_type="learned_range")
    out = tmp_path / "out"
    found = cli("sample", model, "--sampler", "ddpm", "--steps", 6, "--out", out).sentence
    assert "the scheduler's config has variance_type = 'learned_range', which has no table here" in found
    assert not out.exists()
