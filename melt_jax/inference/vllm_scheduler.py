"""vLLM's scheduler for a MELT; only vLLM imports this module, by the name that `vllm_plugin` gives it."""

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # pyright: ignore[reportMissingImports]
from vllm.v1.core.sched.scheduler import Scheduler  # pyright: ignore[reportMissingImports]


class Chunks:
    """Applies the limit on a prompt's tokens in a step to a request that is alone, too: vLLM's scheduler does not."""

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As the scheduler's."""
        budget, running_and_waiting = self.max_num_scheduled_tokens, sum(self.get_request_counts())
        if running_and_waiting == 1:
            self.max_num_scheduled_tokens = min(budget, self.scheduler_config.long_prefill_token_threshold)
        try:
            return super().schedule(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        finally:
            self.max_num_scheduled_tokens = budget


class ChunkScheduler(Chunks, Scheduler):
    """Without asynchronous scheduling."""


class AsyncChunkScheduler(Chunks, AsyncScheduler):
    """With asynchronous scheduling."""


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler that an engine needs; vLLM decides on asynchronous scheduling after it has called the plugin."""
    kind: Any = AsyncChunkScheduler if vllm_config.scheduler_config.async_scheduling else ChunkScheduler
    return kind(vllm_config, *args, **kwargs)
