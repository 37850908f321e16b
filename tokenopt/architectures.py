"""Builds the model that a state dict belongs to, and loads the state dict into it."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenopt.errors import CaptureError, TokenoptError, UsageError
from tokenopt.safe_pickle import reason

ARCH_HINT = "--arch timm:NAME, torchvision:NAME, hf:CONFIG_DIR or package.module:callable"
_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_LISTED = 12  # keys in a message


def build_model(arch: str, state_dict: Mapping[str, Tensor], *, allow_missing: bool = False) -> nn.Module:
    """The model that ``arch`` names, with the weights of a state dict. Nothing is downloaded.

    Args:
        arch: ``timm:NAME``, ``torchvision:NAME``, ``hf:CONFIG_DIR`` or ``package.module:callable``.
        state_dict: the weights.
        allow_missing: warn about missing and unexpected keys, do not refuse them.

    Raises:
        UsageError: if there is no such architecture.
        CaptureError: if the weights do not fit it.
    """
    kind, _, name = arch.partition(":")
    if not kind or not name:
        raise UsageError(f"cannot read --arch {arch!r}", hint=ARCH_HINT)
    state_dict = _strip_prefixes(state_dict)
    with offline():
        if kind == "hf":
            model, missing, unexpected, mismatched = _load_hf(Path(name), arch, state_dict)
        else:
            model = _call(_builder(kind, name, arch), arch)
            missing, unexpected, mismatched = _load_weights(model, state_dict)
    problems = [f"{len(mismatched)} of other shapes: {_listed(mismatched)}"] if mismatched else []
    named = (("missing", missing), ("unexpected", unexpected))
    tolerable = [f"{len(keys)} {text}: {_listed(keys)}" for text, keys in named if keys]
    if problems or (tolerable and not allow_missing):
        raise CaptureError(
            f"the weights do not fit {arch}",
            why="; ".join(problems + tolerable),
            hint="name the architecture that they were saved from: a package.module:callable of yours can build it "
            "with the right arguments" + ("" if problems else "; or --allow-missing, to use what fits"),
        )
    if tolerable:
        warnings.warn(f"weights for {arch}: {'; '.join(tolerable)}", stacklevel=2)
    return model


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Nothing inside is fetched from the hub of Hugging Face: no weights, no configurations, no kernels."""
    if importlib.util.find_spec("huggingface_hub") is None:
        yield
        return
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _listed(keys: list[str]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(keys[:_LISTED]) + more


def _strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return dict(state_dict)


# -- building --------------------------------------------------------------------------------------------------------


def _builder(kind: str, name: str, arch: str) -> Callable[[], Any]:
    if kind == "timm":
        timm = _library("timm", arch)
        if not timm.is_model(name):
            raise _no_model(arch, name, timm.list_models())
        return lambda: timm.create_model(name, pretrained=False)
    if kind == "torchvision":
        models = _library("torchvision", arch).models
        names = models.list_models()
        if name not in names:
            raise _no_model(arch, name, names)
        builder = models.get_model_builder(name)
        nothing = {n: None for n in ("weights", "weights_backbone") if n in inspect.signature(builder).parameters}
        return lambda: builder(**nothing)
    return _import_callable(kind, name, arch)


def _call(builder: Callable[[], Any], arch: str) -> nn.Module:
    try:
        model = builder()
    except TokenoptError:
        raise
    except Exception as error:  # the code of whoever wrote the architecture
        raise CaptureError(
            f"{arch} cannot be built", why=reason(error), hint="it is called without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(f"{arch} makes no nn.Module", why=f"it returned {type(model).__name__}", hint=ARCH_HINT)
    return model


def _library(name: str, arch: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a library that does not match the installed torch fails in many ways
        raise UsageError(
            f"--arch {arch} needs {name}",
            why=f"it cannot be imported ({reason(error)})",
            hint="pip install 'tokenopt[models]'",
        ) from error


def _no_model(arch: str, name: str, names: list[str]) -> UsageError:
    close = difflib.get_close_matches(name, names, n=5)
    return UsageError(
        f"there is no architecture {arch}",
        hint=f"did you mean {', '.join(close)}?" if close else ARCH_HINT,
    )


def _import_callable(module: str, name: str, arch: str) -> Callable[[], Any]:
    """What ``package.module:name`` is; modules of the current directory count, as in ``python -m``."""
    path = os.getcwd()
    added = path not in sys.path
    if added:
        sys.path.append(path)
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(f"there is no {arch}", why=reason(error), hint=ARCH_HINT) from error
    except Exception as error:  # the module's own code
        raise CaptureError(f"{module} cannot be imported", why=reason(error)) from error
    finally:
        if added:
            sys.path.remove(path)
    if not callable(value):
        raise UsageError(f"{arch} cannot be called", why=f"it is {type(value).__name__}", hint=ARCH_HINT)
    return value


# -- weights ---------------------------------------------------------------------------------------------------------


def _load_weights(model: nn.Module, state_dict: dict[str, Tensor]) -> tuple[list[str], list[str], list[str]]:
    """Loads what fits; returns the keys that are missing, unexpected, and of other shapes."""
    own = model.state_dict()
    mismatched = [
        f"{key} {list(value.shape)}, not {list(own[key].shape)}"
        for key, value in state_dict.items()
        if key in own and own[key].shape != value.shape
    ]
    loaded = {own[key].data_ptr() for key in state_dict if key in own}
    missing = [key for key, value in own.items() if key not in state_dict and value.data_ptr() not in loaded]  # tied
    unexpected = [key for key in state_dict if key not in own]
    if not mismatched:
        model.load_state_dict(state_dict, strict=False)
    return missing, unexpected, mismatched


def _load_hf(path: Path, arch: str, state_dict: dict[str, Tensor]) -> tuple[nn.Module, list[str], list[str], list[str]]:
    """A model of transformers or diffusers, built from its configuration alone.

    The weights of transformers go through its own loading, which knows tied weights and the names of older versions.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object")
    except (OSError, ValueError) as error:
        raise UsageError(
            f"there is no configuration for --arch {arch}",
            where=str(file),
            why=reason(error),
            hint="hf: takes a directory with the config.json of a model of transformers or diffusers",
        ) from error
    if "_class_name" in config:
        diffusers = _library("diffusers", arch)
        cls = getattr(diffusers, str(config["_class_name"]), None)
        if not (isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin)):
            raise UsageError(f"diffusers has no model {config['_class_name']!r}", where=str(file))
        model = _call(lambda: cls.from_config(config), arch)
        return model, *_load_weights(model, state_dict)
    transformers = _library("transformers", arch)
    with _quiet_transformers(transformers):
        try:
            settings = transformers.AutoConfig.from_pretrained(
                file.parent, local_files_only=True, trust_remote_code=False
            )
            model, info = _transformers_class(transformers, settings).from_pretrained(
                None,
                config=settings,
                state_dict=state_dict,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        except Exception as error:  # anything in a configuration that this version does not understand
            raise CaptureError(
                f"{arch} cannot be built",
                where=str(file),
                why=reason(error),
                hint="nothing is downloaded, and code beside a configuration is not run",
            ) from error
    mismatched = [
        f"{key} {list(given)}, not {list(wanted)}" for key, given, wanted in sorted(info["mismatched_keys"], key=str)
    ]
    return model, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), mismatched


def _transformers_class(transformers: Any, config: Any) -> Any:
    """The class that the configuration names, else the bare model of its kind."""
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls
    with torch.device("meta"):
        return type(transformers.AutoModel.from_config(config, trust_remote_code=False))


@contextlib.contextmanager
def _quiet_transformers(transformers: Any) -> Iterator[None]:
    """Without its progress bars and its report on keys, which is ours to give."""
    log = transformers.utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
