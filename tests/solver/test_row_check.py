# SPDX-License-Identifier: Apache-2.0
"""A model whose rows depend on more than themselves is refused, or its sample is right; an honest one is never refused."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from faulty_networks import MAKERS, MEMORY, ROWS, SHAPE, Model, answer, column, drawn, dropout, product
from problems import TABLES, chain, gap, network
from row_adversary import SETTINGS, judged
from torch import Tensor, nn

from paradiff import (
    Evaluator,
    Keyed,
    Schedule,
    Table,
    collocation,
    jacobi,
    paradigms,
    parasolver,
    quasi_newton,
    sample,
    sequential,
    solve,
    srds,
)
from paradiff.samplers import ddim, ddpm
from paradiff.solver import Batch, Method, Solution, drive
from paradiff.solver.judge import Judge
from paradiff.solver.protocol import EditedOutputs
from paradiff.solver.rounding import difference
from paradiff.solver.row_check import RowCheck
from paradiff.solver.witnesses import Witnesses

TABLE = ddim(Schedule.linear(), 24)
NOISY = ddpm(Schedule.linear(), 40)
METHODS: dict[str, tuple[Table, Method]] = {
    "jacobi": (NOISY, jacobi(tolerance=1e-4)),
    "parasolver": (NOISY, parasolver(8, 1e-4)),
    "paradigms": (TABLE, paradigms(6, 1e-3)),
    "quasi-Newton": (TABLE, quasi_newton(tolerance=1e-4)),
    "srds": (TABLE, srds(tolerance=1e-3)),
    "collocation": (NOISY, collocation(tolerance=1e-2)),
    "sequential": (TABLE, sequential()),
}
KINDS = {
    "one sample, float32": (1, None),
    "two samples, float64": (2, torch.float64),
    "three samples, float16": (3, torch.float16),
    "two samples, bfloat16": (2, torch.bfloat16),
}


def solved(model: Model, method: str, kind: str) -> Solution:
    table, given = METHODS[method]
    samples, dtype = KINDS[kind]
    states = torch.float64 if dtype == torch.float64 else torch.float32
    return sample(Evaluator(model, dtype=dtype), table, Keyed(SHAPE, 0, samples), given, dtype=states)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", MEMORY)
def test_a_model_that_answers_a_row_in_two_ways_is_refused(fault: str, method: str, kind: str) -> None:
    if (fault, method) == ("the first answer of a shape", "sequential"):
        return  # a constant, to all that a chain of calls of one shape can tell
    with torch.random.fork_rng():
        torch.manual_seed(1)
        with pytest.raises(ValueError, match=r"answered node \d+ of sample \d in two ways: .* rounding explains .* model.eval"):
            solved(MEMORY[fault](), method, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fault", ROWS)
def test_a_model_whose_rows_know_of_each_other_is_refused(fault: str, method: str, kind: str) -> None:
    if method == "sequential" and (KINDS[kind][0] == 1 or "time" in fault):
        solved(ROWS[fault](), method, kind)  # rows are alone, or of one time: this is the model's own chain
        return
    with pytest.raises(ValueError, match=r"otherwise among \d+ rows than by itself: .* one row's time or conditioning for all"):
        solved(ROWS[fault](), method, kind)


@pytest.mark.parametrize("rows", [None, 3, 5])
@pytest.mark.parametrize("method", ["parasolver", "srds", "sequential"])
def test_one_samples_conditioning_for_all_is_refused(method: str, rows: int | None) -> None:
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return answer(x, t) * y[:1, None]

    evaluator = Evaluator(model, conditioning={"y": torch.tensor([[0.5], [1.0], [1.5]])}, max_rows=rows)
    with pytest.raises(ValueError, match=r"of sample [12] otherwise"):
        sample(evaluator, METHODS[method][0], Keyed(SHAPE, samples=3), METHODS[method][1])


def test_a_time_that_is_heeded_in_a_part_of_the_chain_only_is_found_there() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x + t[0] / 50)  # 1 to all digits at large times, -1 near the data

    with pytest.raises(ValueError, match=r"otherwise among \d+ rows"):
        sample(model, ddpm(Schedule.linear(), 100), Keyed((8,)), parasolver(16, 1e-4))


@pytest.mark.parametrize("heeded", [lambda t: t[0], lambda t: t.min(), lambda t: t.max(), lambda t: t[-1]])
@pytest.mark.parametrize("bound", [150, 380, 620, 900])
@pytest.mark.parametrize("rows", [None, 5])
def test_a_branch_on_one_rows_time_is_found_by_a_narrow_window(
    heeded: Callable[[Tensor], Tensor], bound: int, rows: int | None
) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t) if heeded(t) > bound else 0.5 * answer(x, t)

    with pytest.raises(ValueError, match="answered node"):
        sample(Evaluator(model, max_rows=rows), ddpm(Schedule.linear(), 200), Keyed(SHAPE), parasolver(8, 1e-4))


@pytest.mark.parametrize("fault", ROWS)
def test_rows_that_know_of_each_other_are_found_where_the_first_guess_is_the_same_for_all(fault: str) -> None:
    with pytest.raises(ValueError, match="otherwise among"):
        sample(ROWS[fault](), NOISY, Keyed(SHAPE), paradigms(tolerance=1e-4))


def by_rows(x: Tensor, t: Tensor) -> Tensor:
    return answer(x, t) / len(x)


def last_of_odd(x: Tensor, t: Tensor) -> Tensor:
    y = answer(x, t)
    return torch.cat([y[:-1], 0.3 * y[-1:]]) if len(x) % 2 else y


def padded(x: Tensor, t: Tensor) -> Tensor:
    return answer(x, t) * (len(x) / (-(-len(x) // 4) * 4))


@pytest.mark.parametrize("model", [by_rows, last_of_odd, padded])
@pytest.mark.parametrize("method", ["parasolver", "jacobi", "paradigms", "quasi-Newton"])
def test_a_model_that_heeds_the_number_of_rows_is_refused(model: Model, method: str) -> None:
    with pytest.raises(ValueError, match=r"otherwise in a call of \d+ rows than by itself: .* the number of rows"):
        solved(model, method, "two samples, float64")


SATURATED: dict[str, Callable[[Tensor, int], Tensor]] = {
    "a sum, in calls of even size": lambda answer, rows: answer + 0.05 * (rows % 2 == 0),
    "a factor, in calls of even size": lambda answer, rows: answer * (1 + 0.05 * (rows % 2 == 0)),
    "a factor": lambda answer, rows: answer * (1 + 0.02 * rows),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fault", SATURATED)
def test_a_network_that_small_changes_do_not_move_is_refused_where_it_heeds_the_number_of_rows(fault: str, seed: int) -> None:
    weights = 50 * torch.randn(8, 8, generator=torch.Generator().manual_seed(seed))

    def model(x: Tensor, t: Tensor) -> Tensor:
        return SATURATED[fault](torch.tanh(x @ weights), len(x))

    with pytest.raises(ValueError, match=r"the model answered node \d+ of sample \d"):
        sample(model, TABLE, Keyed((8,), 2 * seed, 2), quasi_newton(8))


def test_features_that_are_kept_for_a_time_are_found() -> None:
    kept: dict[tuple[int, float], Tensor] = {}

    def model(x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t) + kept.setdefault((len(x), float(t[0])), torch.tanh(x))

    with pytest.raises(ValueError, match="answered node"):
        sample(model, NOISY, Keyed(SHAPE), parasolver())


@pytest.mark.parametrize("made", [Tensor.to_sparse, lambda x: torch.nested.nested_tensor([*x], layout=torch.jagged)])
def test_outputs_without_an_entry_for_each_of_the_input_are_refused(made: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="a sparse or nested tensor"):
        sample(lambda x, t: made(x), NOISY, Keyed(SHAPE), parasolver())


@pytest.mark.parametrize("period", [2, 3, 5])
def test_a_memory_of_later_calls_is_found_in_every_round(period: int) -> None:
    calls = itertools.count()
    kept: dict[torch.Size, Tensor] = {}

    def model(x: Tensor, t: Tensor) -> Tensor:  # evaluates in some calls only
        if next(calls) % period == 0 or x.shape not in kept:
            kept[x.shape] = answer(x, t)
        return kept[x.shape]

    with pytest.raises(ValueError, match="in two ways"):
        sample(model, NOISY, Keyed(SHAPE), parasolver(8, 1e-4), check="every")


def test_a_model_that_takes_no_single_row_is_refused() -> None:
    norm = nn.BatchNorm1d(8)
    with pytest.raises(
        ValueError, match=r"the model fails for node 26 of sample 0 in a call of 1 rows: ValueError: Expected more"
    ):
        sample(lambda x, t: norm(x), NOISY, Keyed((8,)), parasolver())


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_is_first_met_at_a_time_and_kept_is_found_at_the_end(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("each row's time", "first", "output", "mixed")
    what, said = judged("memory", given, setting)
    assert what == "refused", said
    assert "in two ways" in said
    monkeypatch.setattr(RowCheck, "finish", lambda self: None)
    assert judged("memory", given, setting)[0] == "WRONG"


def test_a_branch_on_the_sum_of_all_rows_is_found() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t) * (1.1 if x.sum() > 0 else 1.0)

    for method in METHODS:
        if method != "sequential":
            with pytest.raises(ValueError, match="answered node"):
                solved(model, method, "one sample, float32")


@pytest.mark.parametrize("network", drawn(70, 11), ids=str)
def test_no_network_is_silently_wrong_in_two_runs(network: tuple[str, tuple[Any, ...]]) -> None:
    for setting in ("parasolver, window 5, three samples", "quasi-Newton, multistep", "srds"):
        what, said = judged(*network, setting, runs=2)
        assert what in ("right", "refused", "untouched"), f"{setting}: {said}"


LATE: list[tuple[str, tuple[Any, ...], str]] = [
    ("memory", ("the first time", "from call 5", "output", "instead"), "parasolver, window 8"),
    ("memory", ("each row's time", "from call 5", "output", "mixed"), "parasolver, calls of 4"),
    ("memory", ("the first time", "every 2", "output", "a factor"), "quasi-Newton"),
    ("order", ("their last entry", True, "the first two"), "jacobi"),
    ("order", ("their time", True, "of calls of an odd number"), "quasi-Newton, multistep"),
    ("time", ("last", "of calls of an odd number"), "jacobi"),
    ("time", ("sorted", "rows 2 and 3"), "collocation, two samples"),
    ("count", ("a power of two", "the first two"), "parasolver, the whole chain"),
    ("branch", ("size", 0.7), "collocation"),
    ("branch", ("mean time", 1.1), "collocation"),
]
"""What shows in rows of later rounds, at the run's end."""


@pytest.mark.parametrize("late", LATE, ids=str)
def test_what_begins_late_or_touches_a_few_rows_is_found_at_the_end(
    late: tuple[str, tuple[Any, ...], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    what, said = judged(*late)
    assert what == "refused", said
    monkeypatch.setattr(RowCheck, "finish", lambda self: None)
    assert judged(*late)[0] != "refused"


@pytest.mark.parametrize("network", drawn(12, 4), ids=str)
def test_every_row_of_every_round_shows_more(network: tuple[str, tuple[Any, ...]]) -> None:
    what, said = judged(*network, "parasolver, window 8", check="every")
    assert what in ("right", "refused"), said


@pytest.mark.parametrize("part", ["inner rows", "of large calls", "rows 2 and 3"])
@pytest.mark.parametrize("setting", ["srds, two samples", "parasolver, the whole chain", "quasi-Newton, multistep"])
def test_a_small_dependence_on_the_number_of_rows_is_found(part: str, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ("count", ("a little", part), setting)
    what, said = judged(*given)
    assert what == "refused", said
    assert "the number of rows" in said
    monkeypatch.setattr(Judge, "_is_multiple", lambda *_: False)
    assert judged(*given)[0] in ("WRONG", "right")


@pytest.mark.parametrize("rows", [3, 6])
def test_what_no_row_shows_is_seen_beside_the_plain_loop(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t) + 0.002 * torch.cos(5 * x) * (len(x) > rows)

    table, method = SETTINGS["quasi-Newton, multistep"][:2]
    with pytest.raises(ValueError, match="from the plain loop's in the root mean square"):
        sample(model, table, Keyed(SHAPE, 5), method, check="every")
    monkeypatch.setattr("paradiff.solver.loop.compare", lambda *_: None)
    assert sample(model, table, Keyed(SHAPE, 5), method, check="every").checked_rows > 0


def test_few_rows_of_a_long_run_are_kept_and_the_last_ones() -> None:
    x, chain = torch.zeros(40, 2), torch.arange(100, 0, -1)
    for rounds in range(1, 200):
        witnesses = Witnesses()
        for number in range(rounds):
            nodes = torch.arange(40)
            batch = Batch(x + number, chain[nodes], nodes, torch.zeros(40, dtype=torch.long), chain)
            witnesses.told(witnesses.taken(batch, 40), x + number)
        kept = [*witnesses.kept]
        assert len(kept) <= 1 + min(8 + 0.02 * 40 * rounds, 16)
        assert kept[-1].output[0] == rounds - 1
        assert len(kept) >= min(rounds, 3)


# -- honest ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("samples_of_any_size")
def test_no_check_is_asked_for() -> None:
    found = sample(dropout(0.2), NOISY, Keyed(SHAPE), jacobi(tolerance=0), check="off")
    assert found.message == (
        "exact: every node was reached by the chain's own steps; not checked: that the model's output for a row depends on "
        "that row alone"
    )
    assert found.checked_rows == 0
    clean = ddim(Schedule.linear(), 24, prediction="sample")
    assert sample(answer, clean, Keyed(SHAPE), parasolver(tolerance=0.02), check="off").message.endswith("0.02")
    assert sample(answer, NOISY, Keyed(SHAPE), jacobi(tolerance=0)).message.endswith("the chain's own steps")


def test_the_checks_rows_are_counted_apart() -> None:
    stopped = sample(answer, NOISY, Keyed(SHAPE), parasolver(), observer=lambda round: True)
    assert stopped.checked_rows == 3  # what is not the chain's sample is not looked at in the end
    evaluator = Evaluator(answer)
    found = sample(evaluator, NOISY, Keyed(SHAPE), parasolver())
    assert found.checked_rows == found.stats["checked_rows"]
    most = 3 + (8 + 0.02 * found.evaluations + 1) + 9  # the whole chain in the first round, rows of all rounds, what is made up
    assert 3 + 4 < found.checked_rows <= most
    assert (evaluator.rounds, evaluator.evaluations) == (found.rounds, found.evaluations)
    narrow = sample(answer, NOISY, Keyed(SHAPE), parasolver(5))
    assert narrow.checked_rows <= 3 + 4 + 4 + (8 + 0.02 * narrow.evaluations + 1) + 9
    assert sample(answer, NOISY, Keyed(SHAPE, samples=2), sequential()).checked_rows <= 3 + 3
    every = sample(answer, NOISY, Keyed(SHAPE), parasolver(5), check="every")
    assert every.checked_rows >= every.evaluations
    assert every == found or every.evaluations > 0  # the check moves nothing
    assert every == sample(answer, NOISY, Keyed(SHAPE), parasolver(5))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.norm = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.5))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x) + column(t, x) / 1000))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 16), nn.Linear(16, 2)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.first(x.flatten(2).mT) + column(t, x)[:, 0] / 1000
        return self.last(self.layer(self.layer(h))).mT.reshape(x.shape)


class Products(nn.Module):
    """A chaotic network, by which rounding grows to the size of the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(24))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = x.flatten(1) + column(t, x)[:, 0, 0] / 1000
        for layer in self.layers:
            h = torch.tanh(12 * layer(h))
        return h.view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("made", [Convolutions, Attention, Products])
def test_rounding_is_borne(made: Callable[[], nn.Module], rows: int | None, dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = made().eval().to(dtype)
    table = ddpm(Schedule.linear(), 10)
    for check in ("first", "every"):
        evaluator = Evaluator(model, dtype=dtype, max_rows=rows)
        assert sample(evaluator, table, Keyed((2, 4, 4), 0, 2), parasolver(7, 0.1), check=check).checked_rows > 0


def test_half_precision_inside_a_float32_network_is_borne() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6))).to(torch.bfloat16)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return layers(x.bfloat16()).to(x.dtype)

    sample(model, NOISY, Keyed((8,), 0, 2), parasolver())
    sample(Evaluator(model, dtype=torch.bfloat16), NOISY, Keyed((8,), 0, 2), parasolver(), check="every")
    with pytest.raises(ValueError, match=r"from the plain loop's.* its numbers are rounded to a coarser dtype than"):
        sample(model, NOISY, Keyed((8,), 8, 2), parasolver(tolerance=2e-3), check="every")


@pytest.mark.parametrize("bound", [1, 4, 8])
@pytest.mark.parametrize("coarse", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("made", [Convolutions, Attention])
def test_weights_that_are_rounded_in_calls_of_some_numbers_of_rows_are_borne(
    made: Callable[[], nn.Module], coarse: torch.dtype, bound: int
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fine = made().eval()
    rounded = copy.deepcopy(fine).to(coarse).float()
    sample(lambda x, t: (rounded if len(x) <= bound else fine)(x, t), NOISY, Keyed((2, 4, 4), 0, 2), parasolver(7, 0.1))


def rough(x: Tensor, t: Tensor) -> Tensor:
    """Another factor at every time, without any order."""
    return answer(x, t) * (1 + 0.5 * torch.sin(1e4 * column(t.double(), x.double()) ** 2).to(x.dtype))


def switched(x: Tensor, t: Tensor) -> Tensor:
    return torch.where(column(t, x) >= 400, answer(x, t), -0.5 * answer(x, t))


def of_even_times(x: Tensor, t: Tensor) -> Tensor:
    return answer(x, t) * (1 + 0.3 * (column(t.round(), x) % 2))


@pytest.mark.parametrize("model", [rough, switched, of_even_times, lambda x, t: 0 * x, lambda x, t: x])
@pytest.mark.parametrize("setting", SETTINGS)
def test_no_way_to_heed_time_is_taken_for_a_memory(model: Model, setting: str) -> None:
    table, method, samples, rows = SETTINGS[setting]
    assert sample(Evaluator(model, max_rows=rows), table, Keyed(SHAPE, 5, samples), method).checked_rows >= 5


def test_a_model_may_know_the_chains_times_alone() -> None:
    of_time = {int(t): 0.1 * k for k, t in enumerate(NOISY.t[:-1])}

    def model(x: Tensor, t: Tensor) -> Tensor:
        return answer(x, t) + torch.tensor([of_time[int(k)] for k in t]).view(-1, 1, 1)

    knowing, free = (sample(each, NOISY, Keyed(SHAPE), parasolver()) for each in (model, answer))
    assert knowing.checked_rows > 3 + 4  # the last calls are made once more, without what is made up
    assert free.checked_rows > 0


def test_a_model_that_draws_what_it_does_not_use_is_borne() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        torch.manual_seed(3)
        return answer(x + torch.randn(8)[0], t)

    with torch.random.fork_rng():
        assert sample(model, NOISY, Keyed(SHAPE), parasolver(), check="every").rounds > 0


def test_outputs_that_are_not_finite_in_a_sweep_are_no_fault_of_the_rows() -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.where((x.abs() > 0.5) & (column(t, x) < 300), torch.inf, answer(x, t))

    found = sample(model, TABLE, Keyed(SHAPE), jacobi(8, 0), check="every", observer=lambda round: round.number == 6)
    assert found.checked_rows > 0


# -- a function of a batch ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["parasolver", "quasi-Newton", "collocation", "srds"])
def test_a_function_of_a_batch_may_return_the_same_memory(method: str) -> None:
    table, given = METHODS[method]
    buffer = torch.zeros(512, *SHAPE)

    def kept(batch: Batch) -> Tensor:
        buffer[: len(batch.x)] = answer(batch.x, batch.t)
        return buffer[: len(batch.x)]

    found = drive(solve(table, Keyed(SHAPE), given), kept)
    wanted = drive(solve(table, Keyed(SHAPE), given), lambda batch: answer(batch.x, batch.t))
    assert found == wanted


def test_a_function_of_a_batch_is_checked_like_a_model() -> None:
    with pytest.raises(ValueError, match="otherwise among 40 rows"):
        drive(solve(NOISY, Keyed(SHAPE), parasolver()), lambda batch: answer(batch.x, batch.t[:1].expand_as(batch.t)))
    found = drive(
        solve(NOISY, Keyed(SHAPE), parasolver()), lambda batch: EditedOutputs(answer(batch.x + 1, batch.t), batch.x + 1)
    )
    assert found.checked_rows > 3 + 4


def test_an_unknown_check_is_refused() -> None:
    unknown: Any = "always"
    with pytest.raises(ValueError, match="check is 'always'; it must be one of first, every, off"):
        sample(network, TABLE, Keyed(SHAPE), parasolver(), check=unknown)


@pytest.mark.parametrize("leaf", ["x", "t"])
def test_gradients_flow_through_states_times_and_parameters(leaf: str) -> None:
    weight = nn.Parameter(torch.ones(()))

    def model(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.clone().requires_grad_()
            energy = (
                (y * column(t, y) * weight / 500).tanh().sum()
                if leaf == "x"
                else (y * t.view(-1, 1, 1) * weight / 500).sin().sum()
            )
            return x + 1e-3 * torch.autograd.grad(energy, y)[0]

    with torch.inference_mode():
        inside = sample(model, TABLES["ddim"], Keyed((2, 3)), parasolver(tolerance=0))
    found = sample(model, TABLES["ddim"], Keyed((2, 3)), parasolver(tolerance=0))
    assert torch.equal(inside.sample, found.sample)
    assert gap(found.sample[0], chain(lambda x, t: model(x.float(), t).double(), TABLES["ddim"], Keyed((2, 3)))[-1]) < 1e-4


def test_differences_are_relative_and_see_what_is_not_finite() -> None:
    one = torch.tensor([1.0, torch.inf, torch.nan])
    assert difference(one, one) == 0
    assert difference(one, torch.tensor([1.1, torch.inf, torch.nan])) == pytest.approx(0.1 / 1.1)
    assert difference(one, torch.tensor([1.0, 2.0, torch.nan])) == torch.inf
    assert difference(torch.zeros(2), torch.zeros(2)) == 0


def test_without_the_check_the_sample_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RowCheck, "_compare", lambda *_: None)
    monkeypatch.setattr(RowCheck, "finish", lambda *_: None)
    found, wanted = (
        solved(ROWS["the first time for all"](), method, "one sample, float32").sample for method in ("srds", "sequential")
    )
    assert gap(found, wanted) > 1e-2


REASONS = {
    "order": "influence",
    "branch": "influence",
    "mix": "influence",
    "time": "influence",
    "share": "influence",
    "count": "number of rows",
    "memory": "remembers earlier calls",
}


@pytest.mark.parametrize("kind", REASONS)
def test_the_reason_is_the_models_own(kind: str) -> None:
    """A memory that acts in every call from the first on, or from some on, is no influence of rows; and the other way round."""
    every = [given for given in product()[kind] if kind != "memory" or not given[1].startswith("every")]
    told = []
    for number, given in enumerate(random.Random(3).sample(every, min(len(every), 24))):
        method = [*METHODS][number % len(METHODS)]
        try:
            sample(MAKERS[kind](*given), METHODS[method][0], Keyed(SHAPE, number, 3), METHODS[method][1])
        except ValueError as refusal:
            told.append(str(refusal))
    assert told
    assert all(REASONS[kind] in text or (kind == "mix" and "number of rows" in text) for text in told)


@pytest.mark.parametrize("start", range(3))
@pytest.mark.parametrize("period", range(2, 8))
@pytest.mark.parametrize("renewed", [True, False])
def test_a_memory_of_every_few_calls_is_no_influence_of_rows(renewed: bool, period: int, start: int) -> None:
    """What is kept is renewed at every few calls, or is the last call's and is used at every few calls."""
    told = []
    for method in METHODS:
        kept: dict[int, Tensor] = {}
        calls = itertools.count(start)

        def model(x: Tensor, t: Tensor, kept: dict[int, Tensor] = kept, calls: itertools.count[int] = calls) -> Tensor:
            y, before, now = answer(x, t), kept.get(len(x)), next(calls) % period == 0
            if not renewed or now or before is None:
                kept[len(x)] = y
            return y if before is None or now == renewed else 0.7 * y + 0.3 * before.flip(-1)

        try:
            sample(model, METHODS[method][0], Keyed(SHAPE, start, 2), METHODS[method][1])
        except ValueError as refusal:
            told.append(str(refusal))
    assert len(told) >= 4
    assert all("it remembers earlier calls" in text.lower() for text in told)
