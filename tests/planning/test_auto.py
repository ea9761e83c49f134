# SPDX-License-Identifier: Apache-2.0
"""`auto` chooses by what is known, learns from its runs, says why, and never leaves the chain's own sample."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from pipelines import Cli
from torch import Tensor

import paradiff
from paradiff.methods.adaptive.method import AdaptiveMethod
from paradiff.planning import LatencyCurve
from paradiff.planning.auto import AutoMethod
from paradiff.planning.candidates import FAMILIES
from paradiff.planning.curves import keep
from paradiff.planning.picking import Known
from paradiff.planning.store import FOLDER
from paradiff.planning.traces import traces_of
from paradiff.solver.protocol import Chooses, Method
from paradiff.solver.ranks import Ranks

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # diffusers' schedulers call numpy
SCHEDULE = paradiff.Schedule.linear()
DDIM, DDPM = paradiff.samplers.ddim, paradiff.samplers.ddpm
DATA = paradiff.models.Mixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[-0.8, 0.1, 0.3], [0.7, -0.2, 0.4]]), torch.tensor([0.02, 0.03])
)
FLAT, STEEP = LatencyCurve({1: 1.0, 64: 1.2}, {1: 0.0}), LatencyCurve({1: 1.0, 2: 2.0}, {1: 0.0})
NOISE = paradiff.Keyed((3,))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder in which what runs measure is kept."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def auto_with(table: paradiff.Table, curve: LatencyCurve | None, samples: int = 1) -> AutoMethod:
    """The method, with a curve known."""
    evaluator = paradiff.Evaluator(DATA.denoiser(table))
    known = Known(curve, traces_of(evaluator, table, NOISE.shape), evaluator)
    return AutoMethod(known=known)


def test_it_is_a_method_that_chooses() -> None:
    assert isinstance(paradiff.auto(), Method)
    assert isinstance(paradiff.auto(), Chooses)
    assert not isinstance(paradiff.parasolver(), Chooses)
    assert repr(paradiff.auto(window=8)) == "auto(window=8)"
    assert paradiff.auto() == paradiff.auto() != paradiff.auto(window=8)


def test_choices_are_made_once_for_a_chain_and_leave_nothing_with_it() -> None:
    table, other = DDIM(SCHEDULE, 50), DDIM(SCHEDULE, 20)
    method = auto_with(table, FLAT)
    assert method.pick(table) is method.pick(table)
    assert method.pick(other) != method.pick(table)
    derived = len(vars(table)["_derived"])
    for _ in range(3):
        auto_with(table, FLAT).pick(table)
    assert len(vars(table)["_derived"]) == derived


def test_flat_calls_are_solved_in_parallel_and_calls_in_proportion_are_walked() -> None:
    table = DDIM(SCHEDULE, 50)
    found = auto_with(table, FLAT).pick(table)
    assert found.method != paradiff.sequential()
    assert "times faster than the plain chain by the library's models" in found.why
    found = auto_with(DDIM(SCHEDULE, 20), STEEP).pick(DDIM(SCHEDULE, 20))
    assert found.method == paradiff.sequential()
    assert "sequential(), since" in str(found)


def test_a_rough_curve_is_not_followed_far_beyond_its_widest_call() -> None:
    table = DDPM(SCHEDULE, 100)
    rough = LatencyCurve({1: 1.0, 2: 1.01})
    method = auto_with(table, rough).chosen(table)
    assert 1 < method.width(table) <= 8
    assert auto_with(table, FLAT).chosen(table).width(table) > 8


def test_a_short_chain_of_a_model_that_was_never_run_is_solved_over_all_its_nodes() -> None:
    names = [auto_with(table := DDIM(SCHEDULE, steps), FLAT).pick(table).call.split("(")[0] for steps in (25, 50)]
    assert names == ["quasi_newton", "collocation"]


def test_a_long_chain_is_solved_by_few_evaluations_though_nothing_is_known() -> None:
    table = DDPM(SCHEDULE, 1000)
    found = paradiff.auto().pick(table)
    assert found.method.name == "collocation"
    assert found.call.startswith("collocation(")
    assert "% as many states as the chain has steps" in found.why


def test_in_a_pipelines_loop_the_window_follows_the_clock_where_nothing_is_known() -> None:
    table = DDIM(SCHEDULE, 30)
    method = paradiff.auto().in_loop(table, 0.0)
    assert isinstance(method, AdaptiveMethod)
    assert method.warmup == 1
    one, four = (cast(Ranks, SimpleNamespace(size=size, heard=lambda: 0.0)) for size in (1, 4))
    assert paradiff.auto().on_ranks(one).in_loop(table, 0.0) == paradiff.sequential().in_loop(table, 0.0)
    assert paradiff.auto().on_ranks(four).in_loop(table, 0.0).width(table) > 1


def test_a_bound_on_rows_is_kept() -> None:
    table = DDIM(SCHEDULE, 50)
    found = paradiff.auto(window=4)
    assert found.width(table) <= 4


@pytest.mark.parametrize("make", [DDIM, DDPM])
@pytest.mark.parametrize("steps", [1, 2, 30, 100])
@pytest.mark.parametrize("samples", [1, 3])
def test_the_sample_is_the_chains(steps: int, samples: int, make: Callable[..., paradiff.Table]) -> None:
    table = make(SCHEDULE, steps)
    noise = paradiff.Keyed((3,), samples=samples)
    plain = paradiff.sample(DATA.denoiser(table), table, noise, paradiff.sequential())
    for method in (paradiff.auto(), auto_with(table, FLAT), auto_with(table, STEEP)):
        found = paradiff.sample(DATA.denoiser(table), table, noise, method)
        assert float((found.sample - plain.sample).square().mean().sqrt()) < 4e-3
        assert "; chosen: " in found.message
        watched = paradiff.sample(DATA.denoiser(table), table, noise, method, observer=lambda round: None)
        assert float((watched.sample - plain.sample).square().mean().sqrt()) < 4e-3


def test_the_first_run_walks_and_learns_and_the_next_is_chosen(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = DDIM(SCHEDULE, 60)
    exact = DATA.denoiser(table)
    call = 15e-3  # seconds, so many that a busy machine's own work is little beside them
    monkeypatch.setattr("paradiff.planning.latency._timed", lambda *given, **more: [call, call])

    def model(x: Tensor, t: Tensor) -> Tensor:
        time.sleep(call)
        return exact(x, t)

    runs = [paradiff.sample(model, table, NOISE, paradiff.auto()) for _ in range(3)]
    assert runs[0].rounds == 60
    assert "nothing is known of this model's calls yet" in runs[0].message
    assert runs[1].rounds < 40
    assert "by the library's models" in runs[1].message
    assert runs[2].rounds < 40
    assert {p.name.split("-")[0] for p in kept.iterdir()} == {"curve", "trace"}


def test_measuring_keeps_to_its_share(kept: Path) -> None:
    for steps in (20, 60, 250):
        table = DDIM(SCHEDULE, steps)
        rows = 0

        def model(x: Tensor, t: Tensor) -> Tensor:
            nonlocal rows
            rows += len(x)
            return torch.zeros_like(x)

        paradiff.sample(model, table, NOISE, paradiff.sequential())
        walked, rows = rows, 0
        known = paradiff.auto().for_model(paradiff.Evaluator(model), table, NOISE)
        assert rows <= 0.04 * steps
        assert (rows > 0) == (steps == 250)
        assert known is not None
        if steps < 250:
            rows = 0
            paradiff.sample(model, table, NOISE, paradiff.auto())
            assert rows <= walked + max(0.04 * steps, 0)
        for path in kept.iterdir():
            path.unlink()


def test_a_stored_curve_is_used(kept: Path) -> None:
    table = DDIM(SCHEDULE, 50)
    model = DATA.denoiser(table)
    evaluator = paradiff.Evaluator(model)
    assert keep(evaluator, NOISE, FLAT) == []
    found = paradiff.sample(evaluator, table, NOISE, paradiff.auto())
    assert found.rounds < 25
    short = DDIM(SCHEDULE, 20)
    evaluator = paradiff.Evaluator(DATA.denoiser(short))
    keep(evaluator, NOISE, STEEP)
    found = paradiff.sample(evaluator, short, NOISE, paradiff.auto())
    assert found.rounds == 20
    assert "sequential(), since" in found.message


def test_a_stored_curve_of_another_version_is_left_out_and_the_message_says_so(kept: Path) -> None:
    table = DDIM(SCHEDULE, 50)
    evaluator = paradiff.Evaluator(DATA.denoiser(table))
    keep(evaluator, NOISE, FLAT)
    (path,) = kept.glob("curve-*.json")
    path.write_text(path.read_text().replace(f'"version of torch": "{torch.__version__}"', '"version of torch": "1.0"'))
    found = paradiff.sample(evaluator, table, NOISE)
    assert found.rounds == 50
    assert f"the stored curve {str(path)!r} was left out, since its version of torch is 1.0, and here it is" in found.message


def test_the_message_names_a_call_that_asks_for_the_same(kept: Path) -> None:
    table = DDIM(SCHEDULE, 50)
    evaluator = paradiff.Evaluator(DATA.denoiser(table))
    keep(evaluator, NOISE, FLAT)
    for tolerance in (4e-3, 1e-2):
        found = paradiff.sample(evaluator, table, NOISE, paradiff.auto(tolerance=tolerance))
        call = found.message.split("chosen: ")[1].split("), ")[0] + ")"
        again = paradiff.sample(evaluator, table, NOISE, eval(f"paradiff.{call}"))
        assert float((again.sample - found.sample).square().mean().sqrt()) < 2 * tolerance
        assert again.rounds < 25


def test_a_message_says_where_its_rounds_are_of_another_tolerance() -> None:
    table = DDIM(SCHEDULE, 50)
    found = auto_with(table, FLAT)
    assert "(rounds by" not in found.reason(table)
    strict = AutoMethod(tolerance=1e-5, known=found.known)
    assert "(rounds by the library's models are those of tolerance 0.001; at 1e-05 there are more)" in strict.reason(table)


def test_a_chosen_window_that_does_not_pay_is_narrowed_and_the_rest_is_walked(
    kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, seconds = DDIM(SCHEDULE, 200), [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: seconds[0])
    exact = DATA.denoiser(table)

    def model(x: Tensor, t: Tensor) -> Tensor:
        seconds[0] += 1.0 if len(x) == 1 else 12.0  # the stored curve promises 1.1
        return exact(x, t)

    evaluator = paradiff.Evaluator(model)
    keep(evaluator, NOISE, LatencyCurve({1: 1.0, 8: 1.1}, {1: 0.0}))
    monkeypatch.setattr("paradiff.planning.choice.FAMILIES", {"parasolver": FAMILIES["parasolver"]})
    begin = seconds[0]
    found = paradiff.sample(evaluator, table, NOISE, paradiff.auto(window=8))
    assert found.rounds > 100  # of a window of 8 throughout there are 31, which take 1.9 times as long as the plain chain
    assert found.history[-1].passed == 1
    assert sum(record.passed for record in found.history) == 200
    assert seconds[0] - begin < 1.9 * 200


@pytest.mark.parametrize("steep", [False, True])
def test_a_run_on_a_busy_machine_does_not_decide_for_later_ones_and_one_of_dear_rows_does(
    steep: bool, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, seconds, times = DDPM(SCHEDULE, 400), [0.0], [1.0]
    monkeypatch.setattr("time.perf_counter", lambda: seconds[0])
    exact = DATA.denoiser(table)

    def model(x: Tensor, t: Tensor) -> Tensor:
        seconds[0] += (FLAT(len(x)) if len(x) == 1 or not steep else 4 * len(x)) * times[0]
        return exact(x, t)

    evaluator = paradiff.Evaluator(model)
    keep(evaluator, NOISE, FLAT)
    paradiff.sample(model, table, NOISE, paradiff.sequential())  # the whole check is made
    runs = []
    for times[0] in (1.0, 1.0) if steep else (40.0, 40.0, 1.0):
        begin = seconds[0]
        runs.append((paradiff.sample(evaluator, table, NOISE, paradiff.auto()), seconds[0] - begin))
    assert "chosen: collocation(" in runs[0][0].message
    assert runs[0][1] > 400  # seconds, of which the plain chain on the curve takes 400
    assert [run.rounds == 400 for run, _ in runs[1:]] == ([True] if steep else [False, False])


def test_a_bound_on_rows_that_memory_sets_bounds_the_choice(kept: Path) -> None:
    table = DDIM(SCHEDULE, 50)
    limited = LatencyCurve({1: 1.0, 2: 1.01, 3: 1.02}, {1: 0.0}, 3, None, "OutOfMemoryError: at 4 rows")
    narrow, wide = auto_with(table, limited).chosen(table), auto_with(table, FLAT).chosen(table)
    assert narrow.width(table) <= 4 < wide.width(table)


def test_a_plan_decides_and_one_of_another_chain_is_refused() -> None:
    table = DDIM(SCHEDULE, 50)
    plan = paradiff.plan(DATA.denoiser(table), table, NOISE, curve=FLAT, pilots=0)
    found = paradiff.sample(DATA.denoiser(table), table, NOISE, paradiff.auto(plan=plan))
    assert found.rounds < 25
    assert ", as planned: a call on" in found.message
    with pytest.raises(
        ValueError, match="the plan is of a deterministic chain of 50 steps, and this one is stochastic and has 60"
    ):
        paradiff.sample(DATA.denoiser(table), DDPM(SCHEDULE, 60), NOISE, paradiff.auto(plan=plan))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"window": 0}, "the window is 0"),
        ({"tolerance": 0}, "the tolerance is 0"),
        ({"plan": 3}, "the plan is 3; it must be a Plan"),
    ],
)
def test_other_arguments_are_refused(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        paradiff.auto(**given)  # pyright: ignore[reportArgumentType]


def test_a_pipelines_call_follows_its_clock(tiny: Path) -> None:
    from paradiff.models import load_pipeline

    pipe = load_pipeline("shapes")
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle", "num_inference_steps": 12, "output_type": "np"}
    plain = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    run = paradiff.parallelize(pipe, paradiff.auto())
    found = run(**call, generator=torch.Generator().manual_seed(0)).images
    assert abs(found - plain).max() < 0.05
    assert run.report.method == "auto"
    assert "; chosen: " in run.report.message


def test_the_command_line_takes_it(cli: Cli, tmp_path: Path) -> None:
    found = cli("sample", "digits", "--sampler", "ddim", "--steps", "6", "--method", "auto", "--out", str(tmp_path / "out"))
    assert found.code == 0
    assert "chosen: sequential" in " ".join(found.out.split())


def test_doctor_says_what_the_machine_can_do(cli: Cli, kept: Path) -> None:
    found = cli("doctor")
    assert found.code == 0
    for text in (
        "processor: ",
        "versions: paradiff",
        "devices: cpu",
        "model digits: runs",
        "model shapes: runs",
        "a call of digits on cpu",
    ):
        assert text in found.out
    assert f"measurements: 0 kept in {str(kept)!r}" in found.out
    found = cli("doctor", "--device", "cuda:7")
    assert found.code == 2
    assert "device 'cuda:7' is not available" in found.err


def test_doctor_names_what_is_missing_and_how_to_get_it(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from paradiff.app import doctor

    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: None if name == "soundfile" else real(name))
    monkeypatch.setattr(doctor, "_models", lambda: iter(()))
    found = cli("doctor")
    assert "missing: soundfile, for sound as WAV; pip install 'paradiff[sound]'" in found.out
    assert "measurements: not kept, since PARADIFF_CACHE is empty" in found.out
