# SPDX-License-Identifier: Apache-2.0
"""A calibration's factor is the conformal quantile, holds for as many fresh samples as it says, and is stated by the runs that
it was made for and by no others."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import paradiff
from paradiff import Evaluator, Keyed, Recorded, calibrate
from paradiff.chain import Clip
from paradiff.planning import Calibration
from paradiff.planning.calibration import fewest, rank_of
from paradiff.planning.store import FOLDER
from paradiff.samplers import ddim, ddpm
from paradiff.solver import ErrorBound, Round, Status

SCHEDULE = paradiff.Schedule.linear()
TABLE = ddim(SCHEDULE, 12)
METHOD = paradiff.parasolver(window=4)
SEEDS = range(500, 519)


MIXTURE = paradiff.models.Mixture(
    torch.tensor([0.5, 0.5]), torch.tensor([[-0.8, 0.1, 0.3], [0.7, -0.2, 0.4]]), torch.tensor([0.02, 0.03])
)


class Network(nn.Module):
    """A network that is optimal for a mixture, with a weight."""

    shape = (3,)

    def __init__(self, table: paradiff.Table = TABLE) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.optimal = MIXTURE.denoiser(table)

    def forward(self, x: Tensor, t: Tensor, shift: Tensor | None = None) -> Tensor:
        return self.gain * self.optimal(x, t) + (0 if shift is None else shift)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv(FOLDER, str(tmp_path))
    return tmp_path


def file_of(folder: Path) -> Path:
    (path,) = folder.glob("calibration-*.json")
    return path


def run(model: Any, method: paradiff.Method = METHOD, table: paradiff.Table = TABLE, **more: Any) -> paradiff.Solution:
    return paradiff.sample(model, table, more.pop("noise", Keyed((3,), [1, 2])), method, **more)


# -- the quantile ------------------------------------------------------------------------------------------------------


def smallest_that_covers(ratios: list[float], coverage: Decimal) -> float:
    """The conformal quantile by its definition: that of the ratios with one more, infinite, in their number."""
    more = [*ratios, math.inf]
    return next(r for r in sorted(more) if Decimal(sum(one <= r for one in more)) >= coverage * len(more))


@pytest.mark.parametrize("coverage", ["0.5", "0.8", "0.9", "0.95", "0.99"])
@pytest.mark.parametrize("count", [19, 20, 38, 39, 99, 100, 199])
def test_the_factor_is_the_conformal_quantile(count: int, coverage: str) -> None:
    draw = random.Random(count)
    errors = [draw.lognormvariate(-7, 1.5) for _ in range(count)]
    estimates = [draw.lognormvariate(-6, 1) for _ in range(count)]
    wanted = smallest_that_covers([e / max(s, 2e-6) for e, s in zip(errors, estimates, strict=True)], Decimal(coverage))
    if math.isinf(wanted):
        with pytest.raises(ValueError, match=f"{count} seeds were given, and a bound that .* needs at least"):
            Calibration("", "", errors, estimates, float(coverage))
        return
    bound = Calibration("", "", errors, estimates, float(coverage)).bound
    assert (bound.factor, bound.seeds, bound.coverage) == (wanted, count, float(coverage))


def test_the_fewest_seeds() -> None:
    assert [fewest(c) for c in (0.5, 0.8, 0.9, 0.95, 0.975, 0.99, 0.999)] == [1, 4, 9, 19, 39, 99, 999]
    for coverage in (0.8, 0.9, 0.95, 0.99):
        assert rank_of(fewest(coverage), coverage) == fewest(coverage)
        assert rank_of(fewest(coverage) - 1, coverage) > fewest(coverage) - 1


def test_fresh_samples_are_covered_as_often_as_is_said() -> None:
    """Over calibrations the covered share has the mean k / (n + 1) and the law Beta(k, n + 1 - k)."""
    draw = random.Random(0)
    shares = []
    for _ in range(4000):
        bound = Calibration("", "", [draw.random() for _ in range(39)], [1.0] * 39).bound
        shares.append(bound.factor)  # of uniform ratios: the share that is below it
    mean = sum(shares) / len(shares)
    spread = math.sqrt(sum((s - mean) ** 2 for s in shares) / len(shares))
    assert mean == pytest.approx(38 / 40, abs=4 * 0.034 / math.sqrt(4000))
    assert spread == pytest.approx(math.sqrt(38 * 2 / (40**2 * 41)), rel=0.1)


def test_exact_runs_and_infinite_estimates_count() -> None:
    found = Calibration("", "", [1e-7] * 18 + [0.5], [0.0] * 18 + [math.inf])
    assert found.ratios == [0.0] + [pytest.approx(0.05)] * 18
    assert found.bound.of(0.0) == pytest.approx(1e-7)
    assert math.isinf(found.bound.of(math.inf))
    again = Calibration.of_json(json.loads(json.dumps(found.to_json(), allow_nan=False)))
    assert (again.ratios, again.bound) == (found.ratios, found.bound)


def test_a_calibration_says_what_it_found() -> None:
    found = Calibration("ddim of 12 steps", "srds()", [1e-3] * 38 + [8e-3], [4e-3] * 39, stopped=2)
    assert "95 of 100 samples err by at most 0.25 times their estimate, ratio 38 of 39; the largest is 2" in str(found)
    assert "left out    2 seeds whose runs were stopped" in str(found)
    assert len(repr(found).splitlines()) == 2


# -- what is measured --------------------------------------------------------------------------------------------------


def by_hand(model: Any, table: paradiff.Table, seeds: range, method: paradiff.Method) -> tuple[list[float], list[float]]:
    """Errors and estimates of single runs, each against the chain."""
    errors, estimates = [], []
    for seed in seeds:
        found = paradiff.solver.sample(model, table, Keyed((3,), [seed]), method)
        plain = paradiff.solver.sample(model, table, Keyed((3,), [seed]), paradiff.sequential())
        errors.append(float((found.sample - plain.sample).double().square().mean().sqrt()))
        estimates.append(found.estimated_error)
    return errors, estimates


@pytest.mark.parametrize("make", [ddim, ddpm])
@pytest.mark.parametrize(
    "method", [METHOD, paradiff.quasi_newton(4), paradiff.srds(3), paradiff.collocation(window=4)], ids=lambda m: m.name
)
def test_seeds_are_measured_as_single_runs_are(method: paradiff.Method, make: Callable[..., paradiff.Table]) -> None:
    table = make(SCHEDULE, 12)
    model = Network(table)
    found = calibrate(model, table, method, SEEDS, coverage=0.5)
    errors, estimates = by_hand(model, table, SEEDS, method)
    assert found.stopped == 0
    assert list(found.errors) == pytest.approx(errors, rel=1e-2, abs=1e-6)
    assert list(found.estimates) == pytest.approx(estimates, rel=1e-2, abs=1e-6)


def test_a_later_run_states_the_bound() -> None:
    model = Network()
    assert run(model).error_bound is None
    bound = calibrate(model, TABLE, METHOD, SEEDS).bound
    found = run(model)
    assert found.calibrated == bound
    assert found.error_bound == pytest.approx(bound.factor * found.estimated_error)
    assert found.stats["error_bound"] == found.error_bound
    assert found.message.startswith("converged: ")
    assert "by calibration on 19 seeds, 95 of 100 samples err by at most" in found.message
    for same in (Evaluator(model), Evaluator(model, dtype=torch.float32), Network()):
        assert run(same).calibrated == bound
    assert run(model, noise=Recorded((3,), torch.Generator().manual_seed(0))).calibrated == bound
    assert run(model, paradiff.parasolver(np.int64(4))).calibrated == bound  # pyright: ignore[reportArgumentType]


def another_model() -> Any:
    other = Network()
    other.gain.data += 1e-3
    return other


class Renamed(Network):
    """The same numbers under another name."""


@pytest.mark.parametrize(
    "call",
    [
        lambda model: run(Renamed()),
        lambda model: run(lambda x, t: model(x, t)),
        lambda model: run(model, table=dataclasses.replace(TABLE, clip=Clip(5.0))),
        lambda model: run(model, table=dataclasses.replace(TABLE, name="other")),
        lambda model: run(model, paradiff.parasolver(window=5)),
        lambda model: run(model, paradiff.parasolver(window=4, tolerance=2e-3)),
        lambda model: run(model, paradiff.quasi_newton(window=4)),
        lambda model: run(model, dtype=torch.float64),
        lambda model: run(model, start=torch.zeros(2, 3)),
        lambda model: run(model, noise=Own()),
        lambda model: run(model, paradiff.auto()),
        lambda model: run(model, observer=stop),
    ],
)
def test_no_other_run_has_a_bound(call: Callable[[Any], paradiff.Solution]) -> None:
    model = Network()
    calibrate(model, TABLE, METHOD, SEEDS)
    found = call(model)
    assert found.error_bound is None
    assert "calibration" not in found.message


class Own(Keyed):
    """A noise that somebody else draws."""

    def __init__(self) -> None:
        super().__init__((3,), [1, 2])


def stop(round: Round) -> bool:
    return True


def test_a_method_with_a_function_is_known_by_its_code() -> None:
    model = Network()

    def made(power: float) -> paradiff.Method:
        return paradiff.parasolver(4, slope=lambda table: table.a * power)

    calibrate(model, TABLE, made(1.0), SEEDS)
    assert run(model, made(1.0)).calibrated is not None
    assert run(model, made(0.5)).calibrated is None
    calibrate(model, TABLE, paradiff.parasolver(4, slope=TABLE.a), SEEDS)
    assert run(model, paradiff.parasolver(4, slope=TABLE.a.clone())).calibrated is not None
    assert run(model, paradiff.parasolver(4, slope=2 * TABLE.a)).calibrated is None


def test_other_weights_are_told_in_a_sentence() -> None:
    calibrate(Network(), TABLE, METHOD, SEEDS)
    found = run(another_model())
    assert found.error_bound is None
    assert "was left out, since its weights is" in found.message
    assert "paradiff calibrate replaces it" in found.message


class Holder:
    """An object that holds a network and a number, as a user writes one."""

    def __init__(self, held: Any, scale: float = 1.0) -> None:
        self._held, self.scale = held, scale

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        return self.scale * self._held(x, t)


class Listed(nn.Module):
    """A network that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = [Network()]

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.networks[0](x, t)


FACTOR, HELD = 1.0, Holder(Network())


def of_globals(x: Tensor, t: Tensor) -> Tensor:
    return FACTOR * HELD(x, t)


def written(model: Any, text: str) -> Any:
    """A function of its own code, as a cell of a notebook makes it; all of them have one name."""
    names: dict[str, Any] = {"__name__": "notebook", "model": model, "torch": torch}
    exec(f"def function(x, t, half=0.5): return {text}\n", names)
    return names["function"]


def class_written(text: str) -> Any:
    names: dict[str, Any] = {"__name__": "notebook", "Network": Network, "torch": torch}
    exec(f"class Mine(Network):\n  factor = 0.5\n  def forward(self, x, t):\n    return {text}\n", names)
    return names["Mine"]()


def halved(model: nn.Module) -> None:
    model.register_forward_hook(lambda module, given, found: 0.5 * cast(Tensor, found))


def patched(model: nn.Module) -> None:
    forward = model.forward
    model.forward = lambda x, t: forward(x, t) / 2


def set_of(name: str, value: Any) -> Callable[[Any], None]:
    return lambda model: setattr(model, name, value)


def less_gain(of: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        of(model).gain.data *= 0.5

    return change


@pytest.mark.parametrize(
    ("made", "change", "told"),
    [
        pytest.param(Network, halved, "code with its settings", id="a hook"),
        pytest.param(Network, patched, "code with its settings", id="another forward"),
        pytest.param(Network, set_of("scale", 0.5), "code with its settings", id="an attribute of a module"),
        pytest.param(Network, nn.Module.eval, "code with its settings", id="the mode"),
        pytest.param(lambda: Holder(Network()), set_of("scale", 0.5), "code with its settings", id="an attribute"),
        pytest.param(lambda: Holder(Network()), less_gain(lambda model: model._held), "weights", id="a private network"),
        pytest.param(Listed, less_gain(lambda model: model.networks[0]), "weights", id="a network in a list"),
    ],
)
def test_what_changed_within_reach_of_a_model_is_told(
    made: Callable[[], Any], change: Callable[[Any], None], told: str
) -> None:
    model = made()
    calibrate(model, TABLE, METHOD, SEEDS, shape=(3,))
    assert run(model).error_bound is not None
    assert run(made()).error_bound is not None
    change(model)
    found = run(model)
    assert found.error_bound is None
    assert f"was left out, since its {told} is" in found.message


@pytest.mark.parametrize("name", ["FACTOR", "HELD"])
def test_globals_that_a_function_names_are_within_reach(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrate(of_globals, TABLE, METHOD, SEEDS, shape=(3,))
    assert run(of_globals).error_bound is not None
    monkeypatch.setitem(globals(), name, 0.5 if name == "FACTOR" else Holder(Network(), 0.5))
    assert run(of_globals).error_bound is None


@pytest.mark.parametrize("make", [lambda text: written(Network(), text), class_written], ids=["function", "class"])
def test_code_that_was_written_anew_is_another_model(make: Callable[[str], Any]) -> None:
    call = "model(x, t)" if make is not class_written else "super().forward(x, t)"
    calibrate(make(f"1.5 * {call}"), TABLE, METHOD, SEEDS, shape=(3,))
    assert run(make(f"1.5 * {call}")).error_bound is not None
    for other in (f"0.5 * {call}", f"torch.sin({call})", f"torch.cos({call})"):
        assert run(make(other)).error_bound is None, other


def test_a_limit_by_a_function_is_known_by_its_code() -> None:
    def made(most: float) -> paradiff.Table:
        return ddim(SCHEDULE, 12, clip=lambda clean: clean.clamp(-most, most))

    model = Network()
    calibrate(model, made(1.0), METHOD, SEEDS)
    assert run(model, table=made(1.0)).error_bound is not None
    assert run(model, table=made(0.5)).error_bound is None


@pytest.mark.parametrize(
    ("fact", "sentence"),
    [
        ("model", "since its model is other, and here it is Network"),
        ("chain", "since its chain is other, and here it is ddim of 12 steps"),
        ("method", "since its method is other, and here it is parasolver(window=4)"),
        ("version of paradiff", "since its version of paradiff is other, and here it is"),
        ("version of torch", "since its version of torch is other, and here it is"),
    ],
)
def test_a_file_of_something_else_is_left_out_with_what_it_is_of(folder: Path, fact: str, sentence: str) -> None:
    model = Network()
    calibrate(model, TABLE, METHOD, SEEDS)
    stored = json.loads(file_of(folder).read_text())
    stored["facts"][fact] = "other"
    file_of(folder).write_text(json.dumps(stored))
    found = run(model)
    assert found.error_bound is None
    assert sentence in found.message


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.update(errors="none"),
        lambda content: content["errors"].pop(),
        lambda content: content["errors"].__setitem__(0, -1.0),
        lambda content: content["estimates"].__setitem__(0, "much"),
        lambda content: content.update(coverage=2),
        lambda content: content.update(coverage=0.99),
        lambda content: content.update(stopped=None),
        lambda content: content.clear(),
    ],
)
def test_a_damaged_file_is_left_out(folder: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    model = Network()
    calibrate(model, TABLE, METHOD, SEEDS)
    stored = json.loads(file_of(folder).read_text())
    damage(stored["content"])
    file_of(folder).write_text(json.dumps(stored))
    found = run(model)
    assert found.error_bound is None
    assert "the stored calibration" in found.message
    calibrate(model, TABLE, METHOD, SEEDS)
    assert run(model).error_bound is not None


def test_without_a_folder_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FOLDER, "")
    assert calibrate(Network(), TABLE, METHOD, SEEDS).notes == ()
    assert run(Network()).error_bound is None


def test_a_folder_that_cannot_be_written_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv(FOLDER, str(folder / "file"))
    found = calibrate(Network(), TABLE, METHOD, SEEDS)
    assert "the calibration was not kept in" in found.notes[0]
    assert found.notes[0] in str(found)


def test_conditioning_has_to_be_among_that_which_was_calibrated() -> None:
    model, shifts = Network(), torch.tensor([[0.0], [0.1], [0.2]])
    rows = shifts[[k % 3 for k in range(19)]]
    calibrate(Evaluator(model, conditioning={"shift": rows}), TABLE, METHOD, SEEDS, shape=(3,))
    assert run(Evaluator(model, conditioning={"shift": shifts[[2, 2]]})).calibrated is not None
    found = run(Evaluator(model, conditioning={"shift": shifts[[2, 2]] + 0.5}))
    assert found.calibrated is None
    assert "since it is of other conditioning than this run's" in found.message
    with pytest.raises(ValueError, match="the conditioning has 3 rows, and 19 seeds are to be run; give one row a seed"):
        calibrate(Evaluator(model, conditioning={"shift": shifts}), TABLE, METHOD, SEEDS, shape=(3,))


# -- runs that are stopped ---------------------------------------------------------------------------------------------


def test_samples_of_a_stopped_batch_that_were_not_stopped_themselves_are_measured() -> None:
    table = ddim(SCHEDULE, 40)
    model, method = Network(table), paradiff.collocation(window=4, max_nodes=16)
    each = [paradiff.solver.sample(model, table, Keyed((3,), [seed]), method) for seed in range(20)]
    stopped = [one.status is Status.STOPPED for one in each]
    assert 0 < sum(stopped) < 20
    found = calibrate(model, table, method, range(20), coverage=0.5)
    assert found.stopped == sum(stopped)
    wanted = [one.estimated_error for one, was in zip(each, stopped, strict=True) if not was]
    assert list(found.estimates) == pytest.approx(wanted, rel=1e-2, abs=1e-6)
    for was in (True, False):
        again = run(model, method, table, noise=Keyed((3,), [stopped.index(was)]))
        assert (again.error_bound is None) is was
    with pytest.raises(ValueError, match="of 20 seeds came to their end, the runs of others were stopped, and a bound that"):
        calibrate(model, table, method, range(20), coverage=0.95)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"seeds": range(18)}, "18 seeds were given, and a bound that 95 of 100 samples keep needs at least 19; give more"),
        ({"coverage": 0.99}, "19 seeds were given, and a bound that 99 of 100 samples keep needs at least 99"),
        ({"coverage": 1}, "the coverage is 1; it must be a number between 0 and 1"),
        ({"coverage": "much"}, "the coverage is 'much'"),
        ({"coverage": math.nan}, "the coverage is nan"),
        ({"seeds": 39}, "the seeds are 39; give whole numbers"),
        ({"seeds": "0-38"}, "the seeds are '0-38'"),
        ({"seeds": [1, *SEEDS, 1]}, "a seed was given twice"),
        ({"seeds": [*SEEDS, -1]}, "a seed is -1; it must be a whole number in 0"),
        ({"seeds": [*SEEDS, 0.5]}, "a seed is 0.5"),
        ({"seeds": [*SEEDS, []]}, r"a seed is \[\]"),
        ({"method": paradiff.auto()}, "whose choices depend on the clock; calibrate the one that it chooses"),
        ({"method": "srds"}, "the method is 'srds'; give one of paradiff's"),
        ({"method": paradiff.collocation(target="ode")}, "collocation was given another target than the chain"),
        ({"method": paradiff.collocation(warm_start="mesh.json")}, "collocation was given a warm_start, whose file changes"),
        ({"method": paradiff.piadm_sde(3)}, "stochastic chains"),
        ({"chain": 3}, "the chain is 3; it must be a Table"),
        ({"chain": {"prompt": ""}}, "the chain is .*; it must be a Table"),
        ({"model": 3}, "the model is 3"),
        ({"model": lambda x, t: x}, "the model does not tell the shape of its samples; give shape"),
        ({"shape": "x"}, "shape"),
        ({"model": lambda x, t: x - x.mean(0, keepdim=True), "shape": (3,)}, "row"),
    ],
)
def test_what_cannot_be_calibrated_is_refused_in_a_sentence(folder: Path, given: dict[str, Any], sentence: str) -> None:
    arguments: dict[str, Any] = {"model": Network(), "chain": TABLE, "method": METHOD, "seeds": SEEDS} | given
    with pytest.raises(ValueError, match=sentence):
        calibrate(**arguments)
    assert list(folder.iterdir()) == []


def test_a_bound_is_said_with_its_share() -> None:
    assert ErrorBound(0.25, 0.999, 999).said(4e-3) == (
        "by calibration on 999 seeds, 99.9 of 100 samples err by at most 0.25 times their estimate, 0.001 here"
    )
