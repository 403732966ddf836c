"""The agent as a Ray Serve deployment: a replica has its own engine and answers HTTP itself, one hop from the proxy."""

from typing import Any

from ray import serve as ray_serve

from serve.config import ServeConfig


@ray_serve.ingress()
class Agent:
    """One replica. Holds nothing that the server's folder does not hold too: it may die at any time."""

    async def __init__(self, config: dict[str, Any], follower: Any = None):
        """follower: the deployment that follows the run, which the application has to name somewhere."""
        from serve.service import Service  # imports vLLM, which takes seconds: here, and only in this process

        self.service = await Service.start(ServeConfig.model_validate(config))

    def __serve_build_asgi_app__(self) -> Any:
        from serve.app import build

        return build(self.service)

    async def check_health(self) -> None:
        """Raises when the engine has died: Serve then starts another replica in this one's place."""
        why = self.service.not_ready()
        if why is not None:
            raise RuntimeError(why)

    async def __del__(self) -> None:
        """What Serve calls, and awaits, once nothing is under way: sandboxes, graders and the engine end in order."""
        service = getattr(self, "service", None)  # none where it did not start
        if service is not None:
            await service.close()
