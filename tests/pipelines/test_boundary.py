# SPDX-License-Identifier: Apache-2.0
"""A network called with a window gives each state what it would give it alone, whatever its inputs and outputs are made of."""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from paradiff.errors import NeedsLanes, Unsupported
from paradiff.pipelines.network.batching import Batching
from paradiff.pipelines.network.boundary import install
from paradiff.pipelines.network.tree import each
from paradiff.pipelines.tensor.windowed import Windowed

W = 5


@dataclass
class Sampled(BaseOutput):
    sample: Any
    extra: Any = None


class Network(nn.Module):
    """A network made of a function; it notes the number of rows of its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function, self.calls = function, []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else next(iter(kwargs.values()))
        self.calls.append(1 if isinstance(first, Tensor) and first.dim() == 0 else len(first))
        return self.function(*args, **kwargs)


def run_of(batching: Batching | None = None) -> Any:
    return types.SimpleNamespace(batching=batching or Batching(check="every"))


def windowed(run: Any, *shape: int, width: int = W, seed: int = 0) -> Windowed:
    values = torch.randn(width, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Windowed.wrap(values, run)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    """Float64 numbers that no order of the tests changes, and that no window has."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    each(lambda leaf, _: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return found


def check(function: Callable[..., Any], *args: Any, batching: Batching | None = None, **kwargs: Any) -> Network:
    """The call with a window equals the calls of its states alone, state by state; the network is returned."""
    network, batching = Network(function), batching or Batching(check="off")
    run = run_of(batching)
    args, kwargs = each(lambda leaf, _: Windowed.wrap(leaf.window, run) if isinstance(leaf, Windowed) else leaf, (args, kwargs))
    with install([network]):
        found = network(*args, **kwargs)
    width = next(leaf.width for leaf in tensors((args, kwargs)) if isinstance(leaf, Windowed))
    for w in range(width):
        alone = each(lambda leaf, _, w=w: leaf.window[w] if isinstance(leaf, Windowed) else leaf, (args, kwargs))
        wanted = function(*alone[0], **alone[1])
        assert isinstance(found, type(wanted))
        for a, b in zip(tensors(found), tensors(wanted), strict=True):
            assert isinstance(a, Windowed)
            assert a.shape == b.shape
            # Float64, in batches of another size.
            torch.testing.assert_close(a.window[w], b, rtol=1e-12, atol=1e-12, equal_nan=True)
    return network


def guided(x: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> Tensor:
    """A network that cuts its batch in two, as processors for perturbed attention do."""
    a, b = (x * t.reshape(-1, 1, 1, 1)).chunk(2)
    text = encoder_hidden_states.mean(1)[:, :, None, None]
    return torch.cat([a + b, a - 2 * b]) + text


X = windowed(None, 4, 3, 2, 2)
T = windowed(None)
TEXT = drawn(4, 7, 3)


def test_each_state_has_its_own_rows_time_and_text() -> None:
    network = check(guided, X, T, TEXT)
    assert network.calls[0] == 4 * W
    check(guided, X, windowed(None, 4), TEXT)
    check(guided, X, windowed(None, 1), TEXT)
    check(guided, X, T, windowed(None, 4, 7, 3))
    check(guided, X, torch.tensor(0.7, dtype=torch.float64), TEXT)
    check(guided, X, torch.tensor([0.7], dtype=torch.float64), TEXT)


@pytest.mark.parametrize("parts", [2, 3])
def test_a_batch_cut_inside_is_cut_as_for_one_state(parts: int) -> None:
    def cut(x: Tensor) -> Tensor:
        pieces = x.chunk(parts)
        return torch.cat([piece * (n + 1) + pieces[0] for n, piece in enumerate(pieces)])

    check(cut, windowed(None, 2 * parts, 3))


def test_named_arguments_and_nested_dicts_follow_the_same_rule() -> None:
    def network(sample: Tensor, timestep: Tensor, added_cond_kwargs: dict[str, Any], return_dict: bool) -> Any:
        ids, images = added_cond_kwargs["time_ids"], added_cond_kwargs["image_embeds"][0]
        out = sample * timestep.reshape(-1, 1) + ids.sum(1, keepdim=True) * images.mean((1, 2))[:, None]
        return Sampled(sample=out) if return_dict else (out,)

    added = {"time_ids": drawn(4, 6), "image_embeds": [drawn(4, 2, 3, seed=1)]}
    x = windowed(None, 4, 3)
    for return_dict in (True, False):
        check(network, sample=x, timestep=T, added_cond_kwargs=added, return_dict=return_dict)


def test_the_main_input_is_known_by_name() -> None:
    def network(timestep: Tensor, hidden_states: Tensor) -> Tensor:
        return hidden_states * timestep.reshape(-1, 1)

    # By order the time would be, and its one row would stand for all.
    check(network, timestep=windowed(None, 1), hidden_states=windowed(None, 8, 3))
    check(network, timestep=torch.ones(1, dtype=torch.float64), hidden_states=windowed(None, 8, 3))


def test_lists_of_residuals_are_taken_apart_and_put_together() -> None:
    def controlnet(x: Tensor, t: Tensor) -> tuple[list[Tensor], Tensor]:
        return [x * t.reshape(-1, 1), x[:, :1]], x.mean(1, keepdim=True)

    def unet(x: Tensor, down: tuple[Tensor, ...], middle: Tensor) -> Tensor:
        return x + down[0] + down[1] * middle

    x = windowed(None, 2, 3)
    check(controlnet, x, T)
    check(unet, x, down=(windowed(None, 2, 3, seed=1), windowed(None, 2, 1, seed=2)), middle=windowed(None, 2, 1, seed=3))
    check(unet, x, down=[drawn(2, 3), drawn(2, 1, seed=1)], middle=torch.ones(2, 1).double())


def test_frames_stay_beside_their_videos() -> None:
    K, C, F = 2, 3, 4

    def video(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        rows, channels, frames = x.shape[:3]
        flat = x.permute(0, 2, 1, 3, 4).reshape(rows * frames, channels, *x.shape[3:])
        flat = flat * t.reshape(-1, 1).expand(rows, frames).reshape(-1, 1, 1, 1) + text.mean(1)[:, :, None, None]
        return flat.reshape(rows, frames, channels, *x.shape[3:]).permute(0, 2, 1, 3, 4)

    def sparse(x: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        return [video(x, t, text).permute(0, 2, 1, 3, 4).flatten(0, 1)]

    x = windowed(None, K, C, F, 2, 2)
    for network in (video, sparse):
        for times in (windowed(None, K), T):
            check(network, x, times, drawn(K * F, 5, C))
            check(network, x, times, windowed(None, K * F, 5, C))

    def image(x: Tensor, text: Tensor) -> Tensor:
        return x + text.mean(1)

    check(image, windowed(None, K * F, C), drawn(K * F, 5, C))


def test_lists_of_one_tensor_a_sample_grow_by_the_window() -> None:
    def per_sample(x: list[Tensor], t: Tensor, texts: list[Tensor]) -> tuple[list[Tensor], dict[str, Any]]:
        return [a * t[k] + texts[k].sum() for k, a in enumerate(x)], {}

    x = [windowed(None, 3, 2, seed=k) for k in range(2)]
    texts = [drawn(k + 1, 3, seed=k) for k in range(2)]
    assert check(per_sample, x, windowed(None, 2), texts).calls[0] == 2 * W
    check(per_sample, x, windowed(None, 2), texts, batching=Batching(max_rows=4, check="off"))


def test_positions_are_not_repeated_even_when_as_long_as_the_batch() -> None:
    def flux(hidden_states: Tensor, img_ids: Tensor, txt_ids: Tensor, image_rotary_emb: Any, freqs_cis: Tensor) -> Tensor:
        assert img_ids.shape == txt_ids.shape == freqs_cis.shape == image_rotary_emb[0].shape == (4, 3)
        return hidden_states + img_ids.sum(0) + image_rotary_emb[1].sum()

    ids = drawn(4, 3)
    x = windowed(None, 4, 5, 3)
    check(flux, hidden_states=x, img_ids=ids, txt_ids=ids, image_rotary_emb=(ids, ids), freqs_cis=ids)

    class Named(nn.Module):
        def forward(self, hidden_states: Tensor, img_ids: Tensor) -> Tensor:
            assert img_ids.shape == (4, 3)
            return hidden_states + img_ids.sum(0)

    network = Named()
    with install([network]):
        network(Windowed.wrap(x.window, run_of()), ids)  # By position: the name is in the signature.


def test_one_row_for_all_stays_one_row() -> None:
    def network(x: Tensor, mask: Tensor) -> Tensor:
        assert mask.shape == (1, 3)
        return x * mask

    check(network, windowed(None, 4, 3), drawn(1, 3))
    check(lambda x, y: x * y.expand(len(x), 3), windowed(None, 4, 3), windowed(None, 1, 3, seed=1))


def test_a_number_as_the_main_input_is_called_state_by_state() -> None:
    check(lambda t: torch.stack([t, t * t]), T)


@pytest.mark.parametrize(("bound", "rows"), [(1, [4] * 5), (4, [4] * 5), (9, [8, 8, 4]), (12, [12, 8]), (20, [20]), (99, [20])])
def test_chunks_are_of_whole_states_within_the_bound(bound: int, rows: list[int]) -> None:
    batching = Batching(max_rows=bound, check="off")
    network = check(guided, X, T, TEXT, batching=batching)
    assert network.calls == rows
    assert (batching.rows, batching.calls) == (20, len(rows))
    assert batching.seconds > 0


def test_out_of_memory_halves_the_bound_and_keeps_it() -> None:
    def limited(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        if len(x) > 8:
            raise torch.OutOfMemoryError(f"{len(x)} rows")
        return guided(x, t, text)

    batching = Batching(check="off")
    network = check(limited, X, T, TEXT, batching=batching)
    assert network.calls == [20, 12, 8, 8, 4]
    assert batching.bound.max_rows == 8
    assert batching.rows == 20

    def never(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("all")

    with pytest.raises(torch.OutOfMemoryError, match="all"):
        check(never, X)


@pytest.mark.parametrize(
    ("widest", "bound", "rows"), [(None, None, [20]), (8, None, [24]), (8, 12, [12, 8]), (2, None, [8, 8, 4]), (15, None, [20])]
)
def test_padded_calls_have_the_widths_of_the_widest_pass(widest: int | None, bound: int | None, rows: list[int]) -> None:
    batching = Batching(max_rows=bound, pad=True, check="off")
    batching.widest = widest
    network = check(guided, X, T, TEXT, batching=batching)
    assert network.calls == rows
    assert (batching.rows, batching.filled) == (sum(rows), sum(rows) - 20)


def test_where_the_widest_pass_is_not_known_the_widest_so_far_counts() -> None:
    batching = Batching(pad=True, check="off")
    for width, rows in ((6, 24), (5, 24), (3, 16), (1, 4)):
        network = check(guided, windowed(None, 4, 3, 2, 2, width=width), windowed(None, width=width), TEXT, batching=batching)
        assert network.calls == [rows]


def test_a_network_whose_rows_influence_each_other_is_refused() -> None:
    with pytest.raises(
        Unsupported, match=r"Network gave a state other values among 5 states than by itself .*influence each other"
    ):
        check(lambda x: x - x.mean(0, keepdim=True), X, batching=Batching())
    check(lambda x: x, X, batching=Batching())


def test_the_first_states_time_for_all_is_caught() -> None:
    """The fault that leaves the sample right: the window's first state is always served well."""
    with pytest.raises(Unsupported, match="relative difference"):
        check(lambda x, t: x * t.flatten()[0], X, T, batching=Batching())


def test_conditioning_in_another_order_is_caught() -> None:
    def shuffled(x: Tensor, text: Tensor) -> Tensor:
        return x + (text if len(text) == 4 else text.unflatten(0, (4, -1)).transpose(0, 1).flatten(0, 1))

    x, text = windowed(None, 4, 3), drawn(4, 3)
    with pytest.raises(Unsupported, match="conditioning is in another order"):
        check(shuffled, x, text, batching=Batching())


def test_a_fault_in_later_calls_is_caught_by_checking_every_call() -> None:

    def mixing(x: Tensor) -> Tensor:
        return x if len(x) == 4 or float(x.abs().max()) < 50 else x * 1.5

    for check, caught in (("first", False), ("every", True)):
        run = run_of(Batching(check=check))  # pyright: ignore[reportArgumentType]
        network = Network(mixing)
        with install([network]):
            network(Windowed.wrap(X.window, run))
            with pytest.raises(Unsupported, match="other values") if caught else nullcontext():
                network(Windowed.wrap(100 * X.window, run))


def test_the_first_call_of_each_shape_is_checked_once() -> None:
    run = run_of(Batching())
    network = Network(lambda x: x * 2)
    with install([network]):
        for x in (X, X, windowed(None, 4, 5), windowed(None, 4, 5), X):
            network(Windowed.wrap(x.window, run))
    assert network.calls == [4, 20, 4, 20, 20, 4, 20, 20]  # in the network's first call one state before it, too
    assert (run.batching.calls, run.batching.rows, run.batching.checks) == (8, 112, 3)


def test_a_window_of_one_state_is_no_check() -> None:
    run = run_of(Batching())
    network = Network(lambda x: x * 2)
    with install([network]):
        network(Windowed.wrap(X.window[:1], run))
        assert network.calls == [4]
        network(Windowed.wrap(X.window, run))
    assert network.calls == [4, 4, 20, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounding_of_batches_is_no_fault(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(64, 64), nn.SiLU()]
    deep = nn.Sequential(*layers).to(dtype).eval()
    run = run_of(Batching(check="every"))
    with torch.no_grad(), install([deep]):
        deep(Windowed.wrap(torch.randn(9, 2, 64, dtype=dtype), run))


def test_randomness_is_refused() -> None:
    dropout = nn.Dropout(0.5)
    with install([dropout]), pytest.raises(Unsupported, match=r"Dropout draws random numbers in its call.*eval\(\) mode"):
        dropout(Windowed.wrap(X.window, run_of(Batching())))
    dropout.eval()
    with install([dropout]):
        dropout(Windowed.wrap(X.window, run_of(Batching())))


def test_equal_nans_are_no_difference() -> None:
    check(lambda x: x / 0 * 0, X, batching=Batching())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.sum(), r"Network returned a tensor of shape \(\) for 20 rows"),
        (lambda x: x[:7], r"Network returned a tensor of shape \(7, 3, 2, 2\) for 20 rows; an output must have a row for each"),
        (lambda x: x @ torch.ones(5, 5), r"Network could not be called with the states of a window as further rows \(Runtime"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        check(function, X)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(Unsupported, match="Network was given 7 rows of a window beside an input of 4 rows"):
        check(lambda x, y: x, X, windowed(None, 7, 3))


def test_states_of_two_windows_do_not_meet() -> None:
    network, run = Network(lambda x, y: x + y), run_of()
    with install([network]):
        with pytest.raises(NeedsLanes, match="two windows, of 5 and 3 states"):
            network(windowed(run, 4, 3), windowed(run, 4, 3, width=3))
        with pytest.raises(NeedsLanes, match="mixes the states of two windows"):
            network(windowed(run, 4, 3), windowed(run_of(), 4, 3))


def test_unchanging_inputs_are_repeated_once() -> None:
    seen: list[int] = []

    def network(x: Tensor, text: Tensor) -> Tensor:
        seen.append(text.data_ptr())
        return x + text.mean(1)

    run, text = run_of(Batching(check="off")), drawn(4, 7, 3)
    module, x = Network(network), windowed(None, 4, 3)
    with install([module]):
        for _ in range(4):
            module(Windowed.wrap(x.window, run), text)
        assert seen[1] == seen[2] == seen[3]
        text.mul_(0)  # Changed in place: no longer the same input.
        found = module(Windowed.wrap(x.window, run), text)
        torch.testing.assert_close(found.window, x.window)
        other = module(Windowed.wrap(x.window[:2], run), text)
    torch.testing.assert_close(other.window, x.window[:2])
    assert len(run.batching._kept) == 1
    del text
    assert len(run.batching._kept) == 0


def test_calls_without_a_window_pass_through_untouched() -> None:
    returned = object()
    network = Network(lambda *args, **kwargs: (args, kwargs, returned))
    x, y = torch.ones(2), [object()]
    with install([network]):
        args, kwargs, found = network(x, y=y)
    assert args[0] is x
    assert kwargs["y"] is y
    assert found is returned


def test_the_last_run_to_leave_restores_the_module() -> None:
    network = Network(lambda x: x)
    first, second = install([network]), install([network, network])
    assert "forward" in network.__dict__
    first.remove()
    first.remove()
    assert "forward" in network.__dict__
    second.remove()
    assert "forward" not in network.__dict__

    own = functools.partial(network.forward)
    network.__dict__["forward"] = own
    with install([network]):
        assert network.__dict__["forward"] is not own
    assert network.__dict__["forward"] is own


def test_the_module_is_restored_after_an_error() -> None:
    network = Network(lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError), install([network]):
        network(torch.ones(1))
    assert "forward" not in network.__dict__


def test_a_forward_that_somebody_else_put_there_is_left_alone() -> None:
    network = Network(lambda x: x)
    boundary = install([network])
    theirs = functools.update_wrapper(functools.partial(network.forward), network.forward)
    network.__dict__["forward"] = theirs
    again = install([network])  # Their function has copied the boundary's attributes; it gets a boundary of its own.
    assert network.__dict__["forward"] is not theirs
    found = network(Windowed.wrap(X.window, run_of()))
    assert isinstance(found, Windowed)
    again.remove()
    assert network.__dict__["forward"] is theirs
    boundary.remove()
    assert network.__dict__["forward"] is theirs
    assert network(torch.ones(1)) == 1


def test_the_signature_stays_visible() -> None:
    layer = nn.Linear(2, 2)
    before = inspect.signature(layer.forward)
    with install([layer]):
        assert inspect.signature(layer.forward) == before
        assert layer.forward.__name__ == "forward"


def test_a_module_within_a_module_passes_its_calls() -> None:
    inner = nn.Linear(3, 3).double()
    outer = nn.Sequential(inner)
    run = run_of()
    with torch.no_grad(), install([outer, inner]):
        found = outer(windowed(run, 2, 3))
    assert run.batching.calls - run.batching.checks == 1
    torch.testing.assert_close(found.window, outer(windowed(run, 2, 3).window))


class Affine(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3 + 1


def test_compiled_modules_have_their_boundary_outside() -> None:
    seen = []

    def backend(graph: Any, example: Any) -> Any:
        seen.append([tuple(value.shape) for value in example if isinstance(value, Tensor)])
        return graph.forward

    for compiled_in_place in (False, True):
        torch._dynamo.reset()
        layer = Affine()
        if compiled_in_place:
            layer.compile(backend=backend)
            outer: Any = layer
        else:
            outer = torch.compile(layer, backend=backend)
        before = dict(outer.__dict__)
        run, x = run_of(Batching(check="off")), windowed(None, 2, 3)
        with torch.no_grad(), install([layer, outer]):
            found = outer(Windowed.wrap(x.window, run))
            assert run.batching.calls == 1
            torch.testing.assert_close(found.window, x.window * 3 + 1)
        assert outer.__dict__.keys() == before.keys()
        assert all(outer.__dict__[name] is before[name] for name in ("forward", "_compiled_call_impl") if name in before)
    assert len(seen) == 2
    assert all((2 * W, 3) in shapes for shapes in seen)


def test_a_route_of_the_running_greenlet_takes_the_call() -> None:
    greenlet = pytest.importorskip("greenlet")
    network, taken = Network(lambda x: x), []

    def lane() -> Any:
        greenlet.getcurrent().route = lambda module, forward, args, kwargs: taken.append((module, args)) or forward(*args)
        return network(torch.ones(3))

    with install([network]):
        assert len(greenlet.greenlet(lane).switch()) == 3
        network(torch.ones(2))
    assert [(module, len(args[0])) for module, args in taken] == [(network, 3)]


def test_two_threads_share_a_module() -> None:
    network = nn.Linear(3, 3).double().eval()
    errors: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for n in range(30):
                run = run_of()
                x = windowed(run, 2, 3, width=2 + (seed + n) % 3, seed=seed)
                with torch.no_grad(), install([network]):
                    found = network(x)
                    plain = network(x.window[0])
                torch.testing.assert_close(found.window[0], plain)
                assert run.batching.calls - run.batching.checks == 1
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert "forward" not in network.__dict__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows is 0; it must be a whole number, at least 1"),
        ({"pad": 8}, "pad is 8; give True or False"),
        ({"check": "no"}, "check is 'no'; it must be first, every or off"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Batching(**options)


# -- inputs that are laid out otherwise ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [2, 3])
def test_numbers_that_are_as_many_as_the_rows_are_found_to_be_none(rows: int) -> None:
    def function(x: Tensor, scales: Tensor) -> Tensor:
        if len(scales) != rows:
            raise ValueError(f"{len(scales)} scales for {rows} layers")
        return x * scales.sum() + x.square() * scales[0]

    check(function, windowed(None, rows, 4), drawn(rows))


def test_rows_on_the_second_axis_are_found() -> None:
    x = windowed(None, 2, 4)
    check(lambda x, layers, text: x + layers.mean(0) + layers[0] * text, x, drawn(5, 2, 4), drawn(2, 4, seed=1))
    # As many layers as rows: the rule takes the layers for rows, and the check finds that out.
    check(lambda x, layers: x + layers[0] - 2 * layers[1], x, drawn(2, 2, 4))


def test_a_layout_is_found_once_and_used_in_later_calls() -> None:
    batching, layers = Batching(check="first"), drawn(5, 2, 4)
    check(lambda x, layers: x + layers.mean(0), windowed(None, 2, 4), layers, batching=batching)
    network = Network(lambda x, layers: x + layers.mean(0))
    with install([network]):
        for seed in (0, 1):
            network.calls.clear()
            x = windowed(run_of(batching), 2, 4, seed=seed)
            torch.testing.assert_close(network(x, layers).window, x.window + layers.mean(0))
    assert network.calls == [2 * W]


def test_a_network_that_no_layout_fits_is_refused_in_the_words_of_the_rule() -> None:
    with pytest.raises(Unsupported, match="its rows influence each other"):
        check(lambda x, y: x - x.mean(0, keepdim=True) + y, windowed(None, 2, 4), drawn(2, 4), batching=Batching())
    with pytest.raises(Unsupported, match=r"could not be called .*\(ValueError: three rows"):
        check(lambda x, y: _only_three(x) + y, windowed(None, 3, 4), drawn(3, 4))


def _only_three(x: Tensor) -> Tensor:
    if len(x) != 3:
        raise ValueError("three rows")
    return x
