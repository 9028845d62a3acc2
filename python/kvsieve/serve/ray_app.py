"""The app of a server as a deployment of Ray Serve: replicas with a model each, and a relay in front of them.

Ray starts the replicas and others in their place, counts how many there are to be, and sends what has one key to one of them, by
consistent hashing. What a conversation is lies in the store that they share: any replica goes on with it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException, ReplicaUnavailableError
from ray.serve.schema import LoggingConfig
from starlette.types import Message

from kvsieve.arguments import need_torch
from kvsieve.errors import ServiceError
from kvsieve.serve.building import Plan
from kvsieve.serve.relay import Call, FullError, LostError, Relay, answers
from kvsieve.serve.running import SIGNALS, address_of

__all__ = ["application", "run"]

NAME = "kvsieve"
"""Of the application, as Ray lists it."""

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"

AFTER_GRACE = 5.0
"""Seconds that a replica has beyond its answers' grace to write what it holds."""

HEALTH = 2.0
"""Seconds between two questions to a replica whether its model thread is there. That a process is gone is known at once."""


log = logging.getLogger("kvsieve.serve")


class Replica:
    """One process with the model: the service, and the app over it."""

    def __init__(self, plan: Plan, grace: float, threads: int | None) -> None:
        need_torch(threads)
        self._grace, self._name = grace, f"{socket.gethostname()}:{os.getpid()}"
        self._service, self._app = plan.open()
        self._service.start()

    async def answer(self, call: Call) -> AsyncGenerator[Message, None]:
        """What the app sends."""
        async with contextlib.aclosing(answers(self._app, call, self._name)) as messages:
            async for message in messages:
                yield message

    async def whole(self, call: Call) -> tuple[str, list[Message]]:
        """All of it, and which replica this is."""
        return self._name, [message async for message in self.answer(call)]

    def check_health(self) -> None:
        """Called by Ray, which puts another replica in the place of one that fails here."""
        if not self._service.alive:
            raise ServiceError("the model thread has ended")

    def __del__(self) -> None:
        """Called by Ray once, when the replica is to end: conversations are written."""
        if hasattr(self, "_service"):
            self._service.close(self._grace)


class _Deployed:
    """The replicas, as the relay asks them."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    async def ask(self, call: Call, key: str) -> AsyncGenerator[Message, None]:
        """What the app of the replica sends that has the key."""
        options = {"session_id": key} if key else {}
        try:
            async for message in self._handle.options(method_name="answer", stream=True, **options).remote(call):
                yield message
        except (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError) as error:
            raise LostError(type(error).__name__) from error
        except BackPressureError as error:
            raise FullError(str(error)) from error

    async def ask_all(self, call: Call) -> Mapping[str, list[Message]]:
        """What the app of each replica sends."""
        return dict(await self._handle.broadcast("whole", call).results_async())


def application(plan: Plan, *, replicas: tuple[int, int], grace: float, threads: int | None, access_log: bool = False) -> Any:
    """What Ray Serve runs.

    Args:
        replicas: fewest and most of them; Ray starts more while each has more requests than half of the answers that it says at a
            time.
        grace: seconds that answers have when a replica is to end.
        threads: of each replica's model; Ray reserves as many cores, or one.
    """
    least, most = replicas
    number: dict[str, Any] = {"num_replicas": least}
    if most > least:
        target = max(1, plan.most // 2)
        number = {"autoscaling_config": {"min_replicas": least, "max_replicas": most, "target_ongoing_requests": target}}
    needs = {"num_cpus": threads or 1, "num_gpus": 1 if plan.device.startswith("cuda") else 0}
    logs = LoggingConfig(log_level="INFO" if access_log else "WARNING", enable_access_log=access_log)
    deployed = serve.deployment(
        name="replica",
        ray_actor_options=needs,
        max_ongoing_requests=plan.most + plan.queue,
        max_queued_requests=plan.queue,
        max_constructor_retry_count=1,
        health_check_period_s=HEALTH,
        graceful_shutdown_timeout_s=grace + AFTER_GRACE,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),
        logging_config=logs,
        **number,
    )(Replica)

    def relay() -> Relay:
        return Relay(_Deployed(serve.get_deployment_handle("replica", app_name=NAME)), plan.keys, plan.body)

    front = serve.deployment(
        name="relay",
        num_replicas=min(2, most),  # without a model; where one dies the other takes what comes
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=2**20,  # the replicas say when there are too many
        graceful_shutdown_timeout_s=grace + AFTER_GRACE,
        logging_config=logs,
    )(serve.ingress(relay)())
    return front.bind(deployed.bind(plan, grace, threads))


def run(plan: Plan, address: str, replicas: tuple[int, int], at: tuple[str, int], *, ready: str, **options: Any) -> None:
    """Serve until a signal.

    Args:
        address: of the cluster, as `ray.init` takes it; ``local``: one of this machine, which ends with this call.
        at: host and port.
        ready: what is printed once it listens, before the address.
        options: see :func:`application`.

    Raises:
        ServiceError: if the replicas do not start; the log says why.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray tells its makers of clusters otherwise
    local = address == "local"
    # A machine has as many cores for Ray as are asked for: more replicas than cores is slow, and not for ever waiting.
    cores = max(os.cpu_count() or 1, replicas[1] * (options.get("threads") or 1))
    ray.init(address=address, logging_level="WARNING", **({"include_dashboard": False, "num_cpus": cores} if local else {}))
    try:
        host, port = at
        serve.start(http_options=HTTPOptions(host=host, port=port), logging_config=LoggingConfig(log_level="WARNING"))
        with _signals() as ended:
            try:
                serve.run(application(plan, replicas=replicas, **options), name=NAME, route_prefix="/")
            except RuntimeError as error:
                raise ServiceError(f"the replicas do not start: {error}") from error
            print(f"{ready}: {address_of(host, port)} (Ctrl-C ends)", flush=True)
            ended.wait()
    finally:
        try:
            _end(local)
        except (KeyboardInterrupt, RayError, RayServeException, TimeoutError) as error:
            log.warning("replicas were ended before they had answered: %s", type(error).__name__)
        finally:
            ray.shutdown()


def _end(local: bool) -> None:
    """Replicas answer what they have begun. A second signal ends that."""

    def second(*_: Any) -> None:
        raise KeyboardInterrupt

    with _signals(second):
        serve.delete(NAME)
        if local:
            serve.shutdown()


@contextlib.contextmanager
def _signals(handler: Callable[..., None] | None = None) -> Iterator[threading.Event]:
    """A signal is what ends this, and no failure: it calls ``handler``, or else sets the event."""
    ended = threading.Event()
    before = {number: signal.signal(number, handler or (lambda *_: ended.set())) for number in SIGNALS}
    try:
        yield ended
    finally:
        for number, found in before.items():
            signal.signal(number, found)
