"""Where a calibration's programs run on data: in this process, or in those of a Ray cluster."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch

from tokenopt.errors import TokenoptError, UsageError

T = TypeVar("T")
R = TypeVar("R")

_AHEAD = 2  # tasks for each worker that are read and sent before the first of them is answered
_RETRIES = 3  # of a task whose worker died
_SECONDS = 5.0  # until a cluster has to answer; Ray itself tries for minutes


class Workers(Protocol):
    """Processes that compute; what they answer does not depend on how many there are."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The function of every item, in order. Items are read as they are needed, a bounded number ahead.

        Raises:
            Exception: what the function raises.
            TokenoptError: if workers die of an item again and again.
        """
        ...


class InProcess:
    """This process alone."""

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        return map(function, items)


def named_workers(text: str | None) -> AbstractContextManager[Workers]:
    """Those that a text names: None for this process, "ray", or "ray:HOST:PORT" for a cluster that runs.

    Raises:
        UsageError: for another text, or without Ray.
    """
    if text is None:
        return nullcontext(InProcess())
    kind, _, address = text.partition(":")
    if kind != "ray" or (text != kind and not address):
        raise UsageError(f"there are no workers {text!r}", hint="--workers ray, or ray:HOST:PORT")
    if find_spec("ray") is None:
        raise UsageError("Ray is not installed", where=f"--workers {text}", hint="pip install 'tokenopt[distributed]'")
    return _connected(address or None)


@contextmanager
def _connected(address: str | None) -> Iterator[Ray]:
    """A cluster that runs, or a local one for the time being: what was started is shut down."""
    import ray

    if ray.is_initialized():
        yield Ray()
        return
    _reach(address or os.environ.get("RAY_ADDRESS"))
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreachable(address or "here", error) from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # which Ray takes for itself
    try:
        yield Ray()
    finally:
        ray.shutdown()


def _reach(address: str | None) -> None:
    """Raises: UsageError if nothing listens at an address."""
    if address in (None, "auto", "local"):  # Ray looks for these on this machine
        return
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> UsageError:
    hint = "HOST:PORT of a cluster that this machine is a node of, as `ray start` prints it; or --workers ray alone"
    return UsageError("there is no Ray cluster", where=address, why=str(error).partition("\n")[0], hint=hint)


class Ray:
    """Processes of the Ray cluster that is connected: one per CPU, with one thread.

    A function is sent to them once, for as long as it lives; so its items may be small although it holds a model. An
    item whose worker dies is computed again by another.
    """

    def __init__(self) -> None:
        import ray

        self._apply = ray.remote(num_cpus=1, max_retries=_RETRIES)(_apply)
        self._ahead = _AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
        self._sent: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        import ray

        if function not in self._sent:
            self._sent[function] = ray.put(function)
        pending: deque[Any] = deque()
        try:
            for item in items:
                pending.append(self._apply.remote(_Sent(self._sent[function]), item))
                if len(pending) >= self._ahead:
                    yield _answer(pending.popleft())
            while pending:
                yield _answer(pending.popleft())
        finally:
            for task in pending:  # after an error, or Ctrl-C
                ray.cancel(task)


@dataclass(frozen=True)
class _Sent:
    """A function in Ray's store, which Ray would read anew for every task if it were an argument itself."""

    reference: Any


@lru_cache(maxsize=2)  # a recipe, and the random one that it is compared with
def _received(sent: _Sent) -> Callable[[Any], Any]:
    import ray

    torch.set_num_threads(1)
    return ray.get(sent.reference)


def _apply(sent: _Sent, item: Any) -> Any:
    """In a worker."""
    return _received(sent)(item)


def _answer(task: Any) -> Any:
    import ray

    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        why = str(error).partition("\n")[0]
        hint = "a worker may have run out of memory: give Ray fewer CPUs, or leave out --workers"
        raise TokenoptError("workers died of what they were to compute", why=why, hint=hint) from error
