"""The configuration of a server as a pydantic schema. Imports no torch and no Ray.

serve/resolve.py makes it from a checkpoint, a run or a YAML file (configs/serve/).
"""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rl.config import VllmConfig
from rl.config_base import Strict
from rl.config_env import EnvConfig, SandboxConfig


class ServeEngine(VllmConfig):
    """One replica's vLLM engine, and what its actor may use."""

    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    threads: PositiveInt | None = None
    """Default: one for a model as small as the quickstart's, for others a replica's part of this machine's cores."""
    max_batched_tokens: PositiveInt = 4096
    """That a step computes, and never less than a conversation has: with fewer, no answer under way waits for long
    while others' prompts are computed, and all of them take longer."""
    max_length: PositiveInt | None = None
    """Tokens of a whole conversation. Default: model.max_length of the run."""
    trust_remote_code: bool = False
    keep_sampled_turns: bool = False


class AutoscaleConfig(Strict):
    """Replicas by load: between `min` and `max`, so that each has about `target_in_flight` requests."""

    min: int = Field(default=1, ge=1)
    max: PositiveInt = 4
    target_in_flight: PositiveFloat = 32.0
    upscale_delay_s: float = Field(default=10.0, ge=0)
    """How long there must have been too few of them before one is added."""
    downscale_delay_s: float = Field(default=300.0, ge=0)


class HttpConfig(Strict):
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    cors_origins: tuple[str, ...] = ()
    """Origins of other sites whose pages may call. Default: none."""
    max_body_bytes: PositiveInt = 1 << 20
    body_timeout_s: PositiveFloat = 20.0
    """How long a client may take to send a request's body, and how long it may read nothing of its answer."""
    deadline_s: PositiveFloat = 600.0
    """Of one request, or one turn of a session."""


class LimitsConfig(Strict):
    """What one replica takes; above it a request is answered 429 with Retry-After."""

    in_flight: PositiveInt = 256
    """Requests that generate at a time, from all keys."""
    requests_per_minute: PositiveInt | None = None
    """Of one key."""
    in_flight_per_key: PositiveInt | None = None
    sockets: PositiveInt = 256
    """WebSockets open at a time, from all keys. One takes of `in_flight` only while a turn is under way."""
    sockets_per_key: PositiveInt = 64
    max_tokens: PositiveInt = 4096
    """The largest max_tokens of a turn that a client may ask for."""


class KeysConfig(Strict):
    """API keys: none means that everybody may ask, which only a loopback address allows."""

    file: str | None = None
    """Hashes made by `repertory keys create`. Default: keys.json in the server's folder."""
    variable: str = "REPERTORY_API_KEYS"
    """An environment variable with keys as they are, separated by commas."""
    digests: tuple[str, ...] = ()
    """Not for users: SHA-256 of the keys in the environment of the process that deploys, for its replicas."""
    required: bool = False
    """Not for users: that process has keys. A replica lets nobody in without one, also when its own environment and
    the file have none; and its environment, which may be that of an older cluster, gives none."""


class SessionsConfig(Strict):
    idle_s: PositiveFloat = 3600.0
    """A session that nobody has used for so long is ended, and its journal deleted after `keep_s` more."""
    keep_s: PositiveFloat = 7 * 86400.0
    disconnect_grace_s: float = Field(default=10.0, ge=0)
    """How long a turn goes on for a client that has lost its connection. Then the engine's place is freed."""
    max_turns: PositiveInt = 1000
    max_per_key: PositiveInt = 10_000
    resident: PositiveInt = 1000
    """Sessions that a replica holds ready between turns; others are made again from their journals."""


class FollowConfig(Strict):
    """Where new versions come from while serving."""

    source: Literal["none", "run"] = "none"
    """run: the run's weight store while it trains in this cluster, else its newest checkpoint."""
    poll_s: PositiveFloat = 2.0
    gate: float | None = Field(default=None, ge=0, le=1)
    """The least held-out success (eval.jsonl of the run, of its step) with which a version is promoted by itself."""


class VersionsConfig(Strict):
    keep: PositiveInt = 4
    """The newest versions that can be asked for, beside the stable one, the canary, and those stable before."""
    slice_s: PositiveFloat = 1.0
    """How long one version samples while requests of another wait."""


class ServeConfig(Strict):
    """One server: an agent's weights, what it may be asked, and by whom."""

    model: str
    """A checkpoint folder, a run's folder, or a model as of model.path in a run's configuration."""
    name: str = Field(default="", pattern=r"^[\w.\-=]*$")
    """What clients call it. Default: the run's name, or the folder's."""
    dir: str | None = None
    """Its folder: releases, sessions, feedback, keys. Default: serve/ in the run's folder, or runs/serve-<name>."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    replicas: PositiveInt = 1
    autoscale: AutoscaleConfig | None = None
    engine: ServeEngine = ServeEngine()
    http: HttpConfig = HttpConfig()
    limits: LimitsConfig = LimitsConfig()
    keys: KeysConfig = KeysConfig()
    sessions: SessionsConfig = SessionsConfig()
    versions: VersionsConfig = VersionsConfig()
    follow: FollowConfig = FollowConfig()
    envs: dict[str, EnvConfig] = Field(default_factory=dict)
    """Environments that sessions may name. The run's own is there under its name."""
    tools: tuple[Literal["calculator", "python"], ...] = ("calculator",)
    """Tool sets that free conversations may name."""
    sandbox: SandboxConfig = SandboxConfig()
    """Of the tool set python."""
    max_turn_tokens: PositiveInt | None = None
    """Of one turn, when the client does not say. Default: rollout.max_turn_tokens of the run."""
    temperature: float | None = Field(default=None, ge=0)
    """When the client does not say. Default: rollout.temperature of the run."""
