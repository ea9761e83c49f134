# SPDX-License-Identifier: Apache-2.0
"""The host that somebody means: where its loop is, which scheduler it walks over, and what its networks are."""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from paradiff.pipelines.host.host import Host
from paradiff.pipelines.host.loop_host import Function, LoopHost, function_kind, method_kind
from paradiff.pipelines.host.modular_host import ModularHost
from paradiff.pipelines.kinds import MODULAR, PIPELINES
from paradiff.pipelines.loop import syntax
from paradiff.pipelines.loop.reader import MethodSource
from paradiff.pipelines.network.origin import function_of

ASKED = ("set_timesteps", "step")
"""Methods that make an object a scheduler."""


def host_of(
    given: Any, *, entry: str | None = None, scheduler: Any = None, networks: Iterable[nn.Module] | None = None
) -> Host:
    """The host of a chain.

    Args:
        given: A pipeline, an object, or a function.
        entry: The name of the method that walks; None to look for it.
        scheduler: The scheduler whose times it walks over; None to look for it.
        networks: The networks that the loop calls; None to look for them.

    Raises:
        ValueError: If there is no chain, or if there are several of which none was named.
    """
    if networks is not None:
        networks = list(networks)
        wrong = next((part for part in networks if not isinstance(part, nn.Module)), None)
        if wrong is not None:
            raise ValueError(f"networks has a {type(wrong).__name__}; give the torch modules that the loop calls")
    if scheduler is not None and not _is_scheduler(scheduler):
        raise ValueError(
            f"scheduler is a {type(scheduler).__name__}, which has no {' and no '.join(_lacking(scheduler))}; give the "
            "scheduler whose times the loop walks over"
        )
    if isinstance(given, PIPELINES):
        return _pipeline(given, entry, scheduler, networks)
    if isinstance(given, types.FunctionType | types.MethodType) or (callable(given) and not _has_loop(given)):
        if isinstance(given, types.MethodType) and entry is None:
            return host_of(given.__self__, entry=given.__name__, scheduler=scheduler, networks=networks)
        if isinstance(given, types.FunctionType):
            return _function(given, entry, scheduler, networks)
    return _object(given, entry, scheduler, networks)


def _pipeline(given: Any, entry: str | None, scheduler: Any, networks: Any) -> Host:
    kind = type(given).__name__
    for name, value in (("entry", entry), ("scheduler", scheduler), ("networks", networks)):
        if value is not None:
            raise ValueError(
                f"{name} was given beside a {kind}, whose call, scheduler and networks are its own; leave {name} out"
            )
    if getattr(given, "scheduler", None) is None:
        raise ValueError(
            f"the {kind} has no scheduler, so it has no chain to be solved in parallel; give it one, "
            "pipe.scheduler = ..., or call it as it is"
        )
    modular = MODULAR is not None and isinstance(given, MODULAR)
    return (ModularHost if modular else Host)(given, type(given))


def _function(given: Any, entry: str | None, scheduler: Any, networks: Any) -> Host:
    name = given.__name__
    if entry is not None:
        raise ValueError(f"entry is {entry!r} beside the function {name}, which is its own entry; leave entry out")

    def look(arguments: Mapping[str, Any]) -> tuple[Any, dict[str, nn.Module]]:
        reached = [*_reached(given), *arguments.items()]
        found = {id(part): part for _, part in reached if _is_scheduler(part)} if scheduler is None else {0: scheduler}
        if len(found) != 1:
            raise ValueError(
                f"the function {name} refers to {_count(len(found), 'scheduler')}; give the one whose times its loop walks "
                "over as scheduler=..."
            )
        named = _named(networks) if networks is not None else {key: part for key, part in reached if _is_network(part)}
        if not named:
            raise ValueError(
                f"the function {name} refers to no network, a torch module; give those that its loop calls as networks=[...]"
            )
        return next(iter(found.values())), named

    host = LoopHost(Function(given), function_kind(given), "__call__", look)
    if not inspect.signature(given).parameters:
        look({})
    return host


def _object(given: Any, entry: str | None, scheduler: Any, networks: Any) -> Host:
    kind = type(given).__name__
    if entry is None:
        owner, walking = _walking(given)
    elif callable(getattr(type(given), entry, None)):
        owner, walking = given, entry
    else:
        raise ValueError(f"the {kind} has no method {entry!r}; give the name of the one that walks over scheduler.timesteps")

    def look(arguments: Mapping[str, Any]) -> tuple[Any, dict[str, nn.Module]]:
        found = _scheduler_of(owner, walking) if scheduler is None else scheduler
        named = _networks_of(owner) if networks is None else _named(networks)
        if not named:
            raise ValueError(
                f"the {type(owner).__name__} has no network among its attributes; give those that {walking} calls as "
                "networks=[...]"
            )
        return found, named

    look({})
    return LoopHost(owner, method_kind(owner, walking), walking, look)


def _walking(given: Any) -> tuple[Any, str]:
    """The object with the method that walks, and the method's name: `given` itself, or else one of its parts.

    Raises:
        ValueError: If there is none, or if there are several.
    """
    kind = type(given).__name__
    for owners in ([given], [part for _, part in _parts(given)], [p for _, part in _parts(given) for _, p in _parts(part)]):
        owners = list({id(owner): owner for owner in owners}.values())
        found = [(owner, name) for owner in owners for name in _entries(type(owner))]
        if len(found) > 1:
            names = ", ".join(f"{type(owner).__name__}.{name}" for owner, name in found)
            raise ValueError(
                f"the {kind} has {len(found)} methods that step a scheduler, {names}; give the object and the one that is "
                "meant as entry=..."
            )
        if found:
            return found[0]
    raise ValueError(
        f"parallelize was given a {kind}; it takes a diffusers pipeline object, an object with a method that walks over its "
        "scheduler's timesteps and steps it, or a function with such a loop. For a network of your own use "
        "paradiff.sample(model, table, noise, method)"
    )


def _entries(kind: type) -> list[str]:
    """The methods of a class that step a scheduler."""
    found: list[str] = []
    for name in dict.fromkeys(name for owner in kind.__mro__ if _may_walk(owner) for name in vars(owner)):
        function = function_of(inspect.getattr_static(kind, name))
        called = inspect.unwrap(function).__code__.co_names if isinstance(function, types.FunctionType) else ()
        if "step" not in called:
            continue
        source = MethodSource.of(kind, name)
        if "timesteps" in called if source is None else any(syntax.steps_in(source.tree)):
            found.append(name)
    return found


def _may_walk(owner: type) -> bool:
    return owner.__module__.partition(".")[0] not in ("builtins", "torch", "abc", "typing")


def _has_loop(given: Any) -> bool:
    return bool(_entries(type(given)))


def _scheduler_of(owner: Any, entry: str) -> Any:
    """The scheduler among an object's attributes.

    Raises:
        ValueError: If there is none, or if there are several of which the method names more than one.
    """
    kind = type(owner).__name__
    found = {name: part for name, part in vars(owner).items() if _is_scheduler(part)}
    source = MethodSource.of(type(owner), entry)
    if len(found) > 1 and source is not None:
        named = {node.attr for node in source.nodes if isinstance(node, ast.Attribute)}
        found = {name: part for name, part in found.items() if name in named}
    if len({id(part) for part in found.values()}) != 1:
        raise ValueError(
            f"{kind}.{entry} may step {_count(len(found), 'scheduler')}{': ' if found else ''}{', '.join(found)}; give the one "
            "whose times it walks over as scheduler=..."
        )
    return next(iter(found.values()))


def _networks_of(owner: Any) -> dict[str, nn.Module]:
    """The networks among an object's attributes, and in the containers among them."""
    children = owner._modules if isinstance(owner, nn.Module) else {}
    found: dict[str, nn.Module] = {}
    for name, part in [*vars(owner).items(), *children.items()]:
        if isinstance(part, nn.Module):
            found[name] = part
        elif type(part) in (dict, list, tuple) and part is not children:
            pairs = part.items() if isinstance(part, Mapping) else enumerate(part)
            found |= {f"{name}[{key!r}]": value for key, value in pairs if isinstance(value, nn.Module)}
    return found


def _parts(given: Any) -> Iterator[tuple[str, Any]]:
    """The objects among an object's attributes that may own a loop."""
    held = getattr(given, "__dict__", {})
    children = given._modules if isinstance(given, nn.Module) else {}
    for name, part in [*held.items(), *children.items()]:
        plain = isinstance(part, type | types.ModuleType | types.FunctionType)
        if hasattr(part, "__dict__") and not plain and not _is_scheduler(part):
            yield name, part


def _reached(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function refers to by a name: shared and global variables, defaults."""
    function = inspect.unwrap(function)
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:
            continue  # The cell is empty yet.
    for name in function.__code__.co_names:
        if name in function.__globals__:
            yield name, function.__globals__[name]
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.default is not parameter.empty:
            yield name, parameter.default


def _named(networks: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Networks by the names of their classes, numbered where there are several of one."""
    found: dict[str, nn.Module] = {}
    for network in {id(part): part for part in networks}.values():
        name = type(network).__name__
        found[name if name not in found else f"{name} {len(found) + 1}"] = network
    return found


def _lacking(part: Any) -> list[str]:
    return [name for name in ASKED if not callable(getattr(part, name, None))]


def _is_scheduler(part: Any) -> bool:
    return not isinstance(part, type) and not _lacking(part)


def _is_network(part: Any) -> bool:
    return isinstance(part, nn.Module)


def _count(number: int, noun: str) -> str:
    return f"no {noun}" if number == 0 else f"{number} {noun}s" if number > 1 else f"one {noun}"
