"""Load weights from a file: find the state_dict of the network in a checkpoint, and remove the names of wrappers."""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm._options import in_one_line

# The attributes of a wrapper that hold the wrapped module: DataParallel, DistributedDataParallel and AveragedModel;
# torch.compile; FullyShardedDataParallel; activation checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_COUNTER = "n_averaged"  # of AveragedModel, beside the wrapped module
_AVERAGED = re.compile(r"(^|[._])(ema|swa|avg|averaged?|shadow|teacher)(?![a-z])", re.IGNORECASE)
_DEEPEST = 4


class CheckpointError(ValueError):
    """The file does not hold weights of the network; the message follows the file's name."""


@dataclass(frozen=True)
class _Candidate:
    """Tensors of a file that may be the network's.

    Attributes:
        name: Where they are, such as "state_dict.model": keys of the file, then the prefix of the tensors' names.
        state: The tensors, by the network's names.
        metadata: The versions of modules, as in a state_dict.
        matched: The number of tensors with a name and a shape of the network.
        others: The number of tensors without the prefix.
        wrappers: The names of wrappers that were removed from the tensors' names.
    """

    name: str
    state: dict[str, Any]
    metadata: dict[str, Any]
    matched: int
    others: int
    wrappers: tuple[str, ...]

    @property
    def averaged(self) -> bool:
        return _AVERAGED.search(self.name) is not None


def load_weights(model: nn.Module, path: Path, entry: str | None = None) -> str:
    """Load the file's weights into the network, without running code from the file.

    The file may hold the state_dict, or a checkpoint with it in an entry, such as `model` or `state_dict`. Names may
    contain those of wrappers (`module.`, `_orig_mod.`) and a prefix, such as `model.` of Lightning. If several entries
    fit equally well, averaged weights come last, and otherwise the first in the file is taken.

    Args:
        model: The network, which is changed.
        path: A file of `torch.save`, or of safetensors by its suffix.
        entry: The entry to take.

    Returns:
        A description of the changes, in one line; empty for a plain state_dict.

    Raises:
        CheckpointError: no entry fits the network.
        Exception: the file cannot be read.
    """
    held = _loaded(path)
    names = _by_unwrapped(model.state_dict())
    found = [each for keys, mapping in _mappings(held) for each in _candidates(model, names, keys, mapping)]
    if not found:
        raise CheckpointError(_why_nothing_fits(held, names, path))
    most = max(each.matched for each in found)
    fitting = sorted(
        (each for each in found if each.matched == most), key=lambda each: (len(each.state) > most, each.averaged)
    )
    chosen = fitting[0] if entry is None else _named(entry, found, fitting)
    state = OrderedDict(chosen.state)
    state._metadata = {  # type: ignore[attr-defined]
        path: chosen.metadata[_unwrapped(path)]
        for path, _ in model.named_modules(remove_duplicate=False)
        if _unwrapped(path) in chosen.metadata
    }
    try:
        model.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(_why_not_loaded(model, chosen, error)) from error
    return _what_was_done(chosen, [each.name for each in fitting if each is not chosen])


def _loaded(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return _of_safetensors(path)
    with warnings.catch_warnings():  # torch warns about files that it then refuses
        warnings.simplefilter("ignore")
        with _objects_replaced(path):
            try:
                return torch.load(path, map_location="cpu", weights_only=True)
            except (EOFError, LookupError) as error:  # torch's parser reads any file as the oldest format
                raise CheckpointError(
                    "must hold the state_dict of the network, but the file is empty, incomplete or not of torch.save. "
                    "Save it with torch.save(model.state_dict(), ...)."
                ) from error


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise CheckpointError(
            "must be read by the package safetensors, which is not installed. Run pip install safetensors."
        ) from error
    return load_file(path)


def _objects_replaced(path: Path) -> AbstractContextManager[object]:
    """Let torch read a file that holds more than tensors, such as the options of a training, without these objects."""
    try:
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # an older format, or no such file
        return nullcontext()
    return torch.serialization.safe_globals([(_replacement(name), name) for name in unknown])


def _replacement(name: str) -> type:
    """Return a class whose objects take the place of those of a class or function, and hold nothing."""

    def new(cls: type, *arguments: Any, **named: Any) -> Any:
        return object.__new__(cls)

    return type(name, (), {"__new__": new, "__init__": lambda *_, **__: None, "__setstate__": lambda *_: None})


def _is_replaced(held: Any) -> bool:
    return type(held).__module__ == __name__


def _unwrapped(name: str) -> str:
    """Return the name of a tensor or module without the names of wrappers."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _by_unwrapped(names: Iterable[str]) -> dict[str, str]:
    """Return each name by the name without wrappers; all by themselves if two would become the same."""
    names = list(names)
    found = {_unwrapped(name): name for name in names}
    return found if len(found) == len(names) else {name: name for name in names}


def _mappings(held: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """Yield every mapping with named tensors in the file, with the keys that lead to it."""
    if not isinstance(held, Mapping) or len(keys) > _DEEPEST:
        return
    if any(_named_tensors(held)):
        yield keys, held
    for key, value in held.items():
        yield from _mappings(value, (*keys, str(key)))


def _named_tensors(mapping: Mapping[Any, Any]) -> Iterator[str]:
    return (key for key, value in mapping.items() if isinstance(key, str) and isinstance(value, Tensor))


def _candidates(
    model: nn.Module, names: dict[str, str], keys: tuple[str, ...], mapping: Mapping[str, Any]
) -> Iterator[_Candidate]:
    """Yield the tensors of a mapping under each prefix with which some of them have names of the network.

    `names` are the network's, by the names without wrappers.
    """
    stored = [key for key in mapping if isinstance(key, str) and key != _COUNTER]
    own = {name: mapping[key] for name, key in _by_unwrapped(stored).items()}
    metadata = {f"{_unwrapped(key)}.": value for key, value in getattr(mapping, "_metadata", {}).items()}
    expected = model.state_dict()
    removed = {f"{part}." for key in stored for part in key.split(".")[:-1] if part in _WRAPPERS}
    for prefix in _prefixes(own, names):
        state = {key.removeprefix(prefix): value for key, value in own.items() if key.startswith(prefix)}
        matched = sum(_fits(value, expected[names[key]]) for key, value in state.items() if key in names)
        if matched:
            yield _Candidate(
                ".".join([*keys, prefix.rstrip(".")]).strip("."),
                {names.get(key, key): value for key, value in state.items()},
                {key[len(prefix) :].rstrip("."): value for key, value in metadata.items() if key.startswith(prefix)},
                matched,
                len(own) - len(state),
                tuple(sorted(removed)),
            )


def _prefixes(own: Mapping[str, Any], names: Mapping[str, str]) -> list[str]:
    """Return the prefixes with which some tensor has the name of one of three tensors of the network, in order."""
    wanted = list(names)
    some = {wanted[i] for i in (0, len(wanted) // 2, -1)} if wanted else set()
    found = (key.removesuffix(name) for key in own for name in some if key.endswith(name))
    return list(dict.fromkeys(prefix for prefix in found if not prefix or prefix.endswith(".")))


def _fits(value: Any, expected: Any) -> bool:
    if not isinstance(value, Tensor) or not isinstance(expected, Tensor):
        return True  # extra state of a module
    return is_lazy(expected) or value.shape == expected.shape


def _named(entry: str, found: list[_Candidate], fitting: list[_Candidate]) -> _Candidate:
    """Return the candidate with this name, or the first below it."""
    for each in (*fitting, *found):
        if f"{each.name}.".startswith(f"{entry}."):
            return each
    raise CheckpointError(
        f"must have weights of the network in the entry {entry!r}, and has none there. Leave --entry out, or choose "
        f"{' or '.join(each.name or 'the file itself' for each in fitting)}."
    )


def _what_was_done(chosen: _Candidate, others: list[str]) -> str:
    parts = [f"entry {chosen.name!r}"] * bool(chosen.name)
    if chosen.wrappers:
        parts.append(f"names without {' and '.join(map(repr, chosen.wrappers))}")
    if chosen.others:
        parts.append(f"not used: {chosen.others} other tensor{'s' * (chosen.others > 1)}")
    if others:
        parts.append(f"others that fit: {', '.join(f'--entry {name}' for name in others)}")
    return "; ".join(parts)


def _why_nothing_fits(held: Any, names: Mapping[str, str], path: Path) -> str:
    entries = [mapping for _, mapping in _mappings(held)]
    if entries:
        theirs, ours = next(_named_tensors(entries[0])), next(iter(names), "no tensor")
        return (
            "must hold the state_dict of the network, but none of its tensors has a name and the shape of the "
            f"network's: the file has {theirs!r}, for example, and the network {ours!r}. Name a callable that builds "
            "the network that was trained."
        )
    network = f"torch.load({path.name!r}, weights_only=False)"
    if isinstance(held, Mapping):
        held_as = f"the entries {', '.join(map(repr, held))} without tensors with names" if held else "an empty dict"
        objects = [f"{network}[{key!r}]" for key, value in held.items() if _is_replaced(value)]
    else:
        held_as = f"an object of {type(held).__name__}"
        objects = [network] * _is_replaced(held)
    why = f"must hold the state_dict of the network, got {held_as}. Save it with torch.save(model.state_dict(), ...)."
    if objects:
        why += (
            " For a file that holds the network itself, and that you trust: "
            f"torch.save({objects[0]}.state_dict(), 'weights.pth')."
        )
    return why


def _why_not_loaded(model: nn.Module, chosen: _Candidate, error: Exception) -> str:
    expected = model.state_dict()
    differences = {
        "it lacks": [name for name in expected if name not in chosen.state],
        "it also has": [name for name in chosen.state if name not in expected],
        "shapes differ:": [
            f"{name} {list(value.shape)} instead of {list(expected[name].shape)}"
            for name, value in chosen.state.items()
            if name in expected and not _fits(value, expected[name])
        ],
    }
    listed = [
        f"{what} {', '.join(found[:2])}" + f" and {len(found) - 2} more" * (len(found) > 2)
        for what, found in differences.items()
        if found
    ]
    where = f" its entry {chosen.name!r} does not fit:" * bool(chosen.name)
    return (
        f"must hold the state_dict of the network, but{where} {'; '.join(listed) or in_one_line(error)}. Name a "
        "callable that builds the network as it was trained, with as many classes."
    )
