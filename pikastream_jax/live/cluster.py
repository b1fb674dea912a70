"""`serve.py --listen --ray`: as many replicas as are asked for, by Ray Serve, behind one gateway.

Considered: Ray Serve's own proxy as the only entrance (it would need an ASGI server beside aiohttp, would send every request of a session to whichever replica is
free, and would have WebRTC's media pass through it), a dispatcher of our own with heartbeats (what Ray is there for), and this: Ray Serve for what becomes of
replicas and for where a session goes, each replica's own server for what happens in a session.
"""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from pikastream_jax.live.model import LiveModel
from pikastream_jax.serving.errors import ServeError

APP, DEPLOYMENT = "pikastream", "Replica"
DRAIN = 600.0  # seconds that sessions have to end before a replica that is taken away stops; those that have not are moved
USED = 0.75  # share of slots that are taken before there is another replica


def parse_replicas(text: str) -> tuple[int, int]:
    """`N`, or `MIN:MAX`.

    Raises:
      ServeError: it is neither.
    """
    low, _, high = text.partition(":")
    try:
        found = int(low), int(high or low)
    except ValueError:
        found = 0, 0
    if not 1 <= found[0] <= found[1]:
        raise ServeError(f"--ray {text}: write how many replicas, such as 3, or at least and at most, such as 1:8")
    return found


class Cluster:
    """Replicas on the cluster that RAY_ADDRESS names, or on a new one on this machine; `handle` reaches them, `close` ends them.

    Args:
      replicas: least and most.
      build: makes a replica's model.
      slots: sessions of a replica.
      loopback: whether the gateway listens for this machine alone; on a cluster of this machine alone, so do the replicas' servers.
      label, numbers, recordings: see `Hub`.

    Raises:
      ServeError: they do not come up.
    """

    def __init__(
        self, replicas: tuple[int, int], build: Callable[[], LiveModel], slots: int, *, loopback: bool, label: bool = True, numbers: bool = False, recordings: Path | None = None
    ):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray is imported: nothing is told to anybody
        import ray
        from ray import serve

        from pikastream_jax.live.replica import Replica, ReplicaOptions

        self.secret = secrets.token_urlsafe(24)
        self._own = "RAY_ADDRESS" not in os.environ
        options = ReplicaOptions(build, slots, self.secret, "127.0.0.1" if loopback and self._own else None, label, numbers, recordings)
        try:
            ray.init(log_to_driver=False, logging_level="WARNING", **({"address": "local", "include_dashboard": False} if self._own else {}))
        except ConnectionError as error:
            raise ServeError(f"--ray: no cluster answers at {os.environ.get('RAY_ADDRESS')}: {str(error).splitlines()[0]}") from error
        low, high = replicas
        gpus = int(ray.cluster_resources().get("GPU", 0))
        if 0 < gpus < low:
            ray.shutdown()
            raise ServeError(f"--ray {low}: each replica owns a GPU and the cluster has {gpus}: ask for {gpus} at most")
        number = (
            {"num_replicas": low}
            if low == high
            else {"autoscaling_config": {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": USED * slots, "upscale_delay_s": 5, "downscale_delay_s": 120}}
        )
        serve.start(proxy_location="Disabled")
        deployment = serve.deployment(Replica).options(
            name=DEPLOYMENT,
            max_ongoing_requests=slots,
            graceful_shutdown_timeout_s=DRAIN,
            health_check_period_s=2,
            # Without GPUs replicas share whatever there is: Ray's counting of CPUs says nothing about how long a step takes.
            ray_actor_options={"num_gpus": 1} if gpus else {"num_cpus": 0},
            **number,
        )
        try:
            self.handle = serve.run(deployment.bind(options), name=APP, route_prefix=None).options(stream=True)
        except RuntimeError as error:
            application = serve.status().applications.get(APP)
            messages = [one.message for one in application.deployments.values()] if application else []
            self.close()
            lines = [line for line in "\n".join([*messages, str(error)]).splitlines() if "Error: " in line and "Traceback" not in line] or [str(error).splitlines()[-1]]
            raise ServeError(f"--ray: no replica comes up: {lines[-1].strip()}") from error
        except BaseException:  # Ctrl-C too
            self.close()
            raise

    def running(self) -> int:
        """Replicas that serve at the moment."""
        from ray import serve

        application = serve.status().applications.get(APP)
        return 0 if application is None else application.deployments[DEPLOYMENT].replica_states.get("RUNNING", 0)

    def close(self) -> None:
        """Ends the replicas, and the cluster where it was made here."""
        import ray
        from ray import serve

        if self._own:
            serve.shutdown()
        else:  # others may have their own on it
            serve.delete(APP)
        ray.shutdown()
