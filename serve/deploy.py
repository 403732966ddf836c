"""From a configuration to a running Ray Serve application: what `repertory serve` and a RayService both deploy.

import path of a RayService: serve.deploy:app, args {what: RUN, set: {http.port: 8000}}
"""

from typing import TYPE_CHECKING, Any

import yaml

from actors.placement import inherited
from actors.role import bound_threads
from rl.config_file import ConfigError
from serve.config import ServeConfig
from serve.keys import KeyRing, handed_on, refuse_public
from serve.resolve import resolve

if TYPE_CHECKING:
    from ray.serve import Application

APPLICATION = "repertory"
_SLACK = 64
"""Requests beyond those that generate: of health, models, pages, and what is refused."""
_COUNT_S = 2.0
"""How often the requests under way are counted that replicas are added for."""
_LONGEST_GRACE_S = 120.0
"""As RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S of k8s/."""


def app(args: dict[str, Any]) -> "Application":
    """The application of a RayService. args: `what`, as of `repertory serve`, and settings to change as `set`.

    Raises ConfigError, also when Serve listens on a public address and there is no key.
    """
    unknown = set(args) - {"what", "set"}
    if unknown or "what" not in args:
        raise ConfigError(f"serveConfigV2 args: give `what`, and settings to change as `set` (got {sorted(args)})")
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).strip().removesuffix('...').strip()}"
        for key, value in (args.get("set") or {}).items()
    ]
    config, source = resolve(str(args["what"]), overrides)
    keys = KeyRing.of(config.keys, source.dir)
    refuse_public(_listens_on(config), keys)
    return application(handed_on(config, keys))


def _listens_on(config: ServeConfig) -> str:
    """The host that Serve listens on; a RayService's is not in our configuration."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    found = client.http_config.host if client is not None else None
    return found or config.http.host


def grace_s(config: ServeConfig) -> float:
    """What is under way in a replica that is to end has so long to finish."""
    return min(config.http.deadline_s, _LONGEST_GRACE_S)


def application(config: ServeConfig) -> "Application":
    """The deployments, not yet deployed."""
    from ray import serve as ray_serve
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    from serve.agent import Agent

    e = config.engine
    scale: dict[str, Any] = {"num_replicas": config.replicas}
    if config.autoscale is not None:
        a = config.autoscale
        scale = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=a.min,
                max_replicas=a.max,
                target_ongoing_requests=a.target_in_flight,
                upscale_delay_s=a.upscale_delay_s,
                downscale_delay_s=a.downscale_delay_s,
                metrics_interval_s=_COUNT_S,
                look_back_period_s=3 * _COUNT_S,
            )
        }
    several = config.replicas > 1 or config.autoscale is not None
    # A session's turns come to the replica that holds it: the proxy's guard says which session a path is about.
    router: Any = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
    sticky: dict[str, Any] = {"request_router_config": RequestRouterConfig(request_router_class=router)}
    agent: Any = ray_serve.deployment(
        name="Agent",
        max_ongoing_requests=config.limits.in_flight + config.limits.sockets + _SLACK,  # Serve counts idle sockets
        max_queued_requests=config.limits.in_flight,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=grace_s(config),
        ray_actor_options={
            "num_cpus": e.cpus,
            "num_gpus": e.gpus * e.tensor_parallel,
            "runtime_env": {"env_vars": {**bound_threads(e.threads or 1), **inherited()}},
        },
        **scale,
        **(sticky if several else {}),
    )(Agent)
    settings = config.model_dump(mode="json")
    if config.follow.source == "none":
        return agent.bind(settings)
    from serve.follow import FollowerDeployment

    follower: Any = ray_serve.deployment(
        name="Follower",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0.1, "runtime_env": {"env_vars": {**bound_threads(1), **inherited()}}},
    )(FollowerDeployment)
    return agent.bind(settings, follower.bind(settings))
