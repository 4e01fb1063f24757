"""Farrier: fits each machine with its own LLM engine."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farrier.runtime.llm import LLM, AsyncLLM
    from farrier.runtime.sampling_params import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "AsyncLLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `farrier --help` and `import farrier` stay fast.
    if name in ("LLM", "AsyncLLM"):
        from farrier.runtime import llm

        return getattr(llm, name)
    if name == "SamplingParams":
        from farrier.runtime.sampling_params import SamplingParams

        return SamplingParams
    raise AttributeError(f"module 'farrier' has no attribute {name!r}")
