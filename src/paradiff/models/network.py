# SPDX-License-Identifier: Apache-2.0
"""One network from its folder in a pipeline's: its config's values, and each of its weights, are those that its class has.

The loaders of diffusers and transformers only log what a file lacks, and such weights are whatever memory held. Their report
of a load is read here instead, and anything but a full match is refused by name.
"""

from __future__ import annotations

import inspect
import json
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import diffusers
import torch
from safetensors import safe_open
from torch import nn

from paradiff.chain.home import made_at_home
from paradiff.errors import shown
from paradiff.models.files import loading, weight_files

FLOATING = ("F", "BF")
"""How safetensors' names of the dtypes of real numbers begin."""

LISTED = 3
"""Weights that a sentence names."""

AGAIN = "save the pipeline again"


@made_at_home
def load_network(model: str, kind: Any, folder: Path, part: str, dtype: torch.dtype) -> nn.Module:
    """Loads one network of a pipeline.

    Args:
        model: As the user gave it.
        kind: Its class, of diffusers or transformers.
        folder: The pipeline's folder.
        part: The component, a folder in it.
        dtype: The dtype of its weights.

    Raises:
        ValueError: If its config is another class's or has a value of a wrong kind, or weights are missing, not its own, of
            other shapes, or no real numbers.
    """
    files = weight_files(folder, part)
    config = _config(model, folder / part)
    _check_class(model, kind, config, part)
    check_values(kind, config, f"{part}/config.json of {model!r}")
    with loading(model):
        network, found = kind.from_pretrained(
            folder / part, torch_dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    wrong = {
        "are missing": sorted(found.get("missing_keys", ())),
        "are not its own": sorted(found.get("unexpected_keys", ())),
        "have another shape": sorted(str(entry[0]) for entry in found.get("mismatched_keys", ())),
        "are no real numbers": [] if "quantization_config" in config else sorted(_whole(files, network)),
    }
    clauses = [f"{_listed(names)} {how}" for how, names in wrong.items() if names]
    if clauses:
        raise ValueError(
            f"the weights in {part}/ of {model!r} do not fit its {kind.__name__}: {', and '.join(clauses)}; {AGAIN}"
        )
    return network


def _config(model: str, folder: Path) -> Mapping[str, Any]:
    """A network's config.json; empty where it cannot be read, which the loaders report.

    Raises:
        ValueError: If it is no object.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(config, dict):
        raise ValueError(
            f"{folder.name}/config.json of {model!r} is {shown(config)}; it must be an object of names and values: {AGAIN}"
        )
    return config


def _whole(files: Sequence[Path], network: nn.Module) -> Iterator[str]:
    """The parameters that a file holds as whole numbers or truth values."""
    own = {name for name, _ in network.named_parameters()}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  (it is no mapping)
                if name in own and not stored.get_slice(name).get_dtype().startswith(FLOATING):
                    yield name


def _listed(names: Sequence[str]) -> str:
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def _check_class(model: str, kind: Any, config: Mapping[str, Any], part: str) -> None:
    """Refuses a config that is another network's."""
    name = config.get("_class_name")
    other = getattr(diffusers, name, None) if isinstance(name, str) else None
    if isinstance(other, type) and not (issubclass(other, kind) or issubclass(kind, other)):
        raise ValueError(
            f"model_index.json of {model!r} names a {kind.__name__}, but {part}/config.json is that of a {name}; {AGAIN}"
        )


def check_values(kind: Any, config: Mapping[str, Any], file: str) -> None:
    """Refuses values of a config that are of another kind than its class takes, such as a text for a number.

    Args:
        kind: The class, of diffusers; of others nothing is known.
        config: Names and values.
        file: Where they stand.

    Raises:
        ValueError: If there is one.
    """
    if not issubclass(kind, diffusers.ConfigMixin):
        return
    try:
        annotations = typing.get_type_hints(kind.__init__)
    except (NameError, TypeError):  # of a package that is not installed
        annotations = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name not in config:
            continue
        allowed = set(_kinds(annotations.get(name, Any)))
        if parameter.default is not parameter.empty:
            allowed.add(_kind(parameter.default))
        value, found = config[name], _kind(config[name])
        fits = found in allowed or (found == INT and FLOAT in allowed) or NONE in (found,) or ANY in allowed
        if not fits or (isinstance(value, float) and math.isnan(value)):
            known = " or ".join(sorted(allowed - {NONE}))
            raise ValueError(f"{file} has {name} = {shown(value)}; {kind.__name__} takes {known}: correct it, or {AGAIN}")


BOOL, INT, FLOAT, TEXT, LIST, DICT = "true or false", "a whole number", "a number", "a text", "a list", "an object"
NONE, ANY = "nothing", "anything"
KINDS = {bool: BOOL, int: INT, float: FLOAT, str: TEXT, list: LIST, tuple: LIST, dict: DICT, NoneType: NONE}


def _kind(value: Any) -> str:
    return KINDS.get(type(value), ANY)


def _kinds(annotation: Any) -> Iterator[str]:
    """The kinds of values that an annotation allows."""
    origin = get_origin(annotation)
    if origin in (Union, UnionType):
        for member in get_args(annotation):
            yield from _kinds(member)
    elif origin is Literal:
        yield from map(_kind, get_args(annotation))
    else:
        yield KINDS.get(origin or annotation, ANY)
