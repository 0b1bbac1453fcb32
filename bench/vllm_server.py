"""vLLM's own OpenAI server as a child process, and how long it takes to say its first token. No hook of ours."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

from pilotfish.bench import engines
from pilotfish.bench.children import end
from pilotfish.bench.stock_child import ENVIRONMENT
from pilotfish.cli.redis_server import free_port
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.protocol.errors import EngineError

START_SECONDS = 180.0
_MODEL = "target"


@contextmanager
def vllm_server(spec: EngineSpec) -> Iterator[str]:
    """Its address, once it answers. The model, numbers and threads of `spec`."""
    port = free_port()
    environment = {**os.environ, **ENVIRONMENT, **engines.environment(), "OMP_NUM_THREADS": str(spec.threads)}
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING")
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", spec.model, "--served-model-name",
         _MODEL, "--host", "127.0.0.1", "--port", str(port), "--dtype", spec.dtype, "--enforce-eager",
         "--max-model-len", str(spec.context), "--max-num-seqs", str(spec.max_sessions)],
        env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        _wait(process, f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}"
    finally:
        end(process)


@asynccontextmanager
async def first_tokens(address: str) -> AsyncIterator[Callable[[list[int]], Awaitable[float]]]:
    """A function: token ids of a prompt -> seconds until the server's first streamed token; one connection for all."""
    import httpx

    async with httpx.AsyncClient(base_url=address, timeout=60, trust_env=False) as client:

        async def ask(prompt: list[int]) -> float:
            body = {"model": _MODEL, "prompt": prompt, "max_tokens": 8, "temperature": 0, "stream": True}
            start, found = time.perf_counter(), None
            async with client.stream("POST", "/v1/completions", json=body) as response:
                async for line in response.aiter_lines():
                    if found is None and line.startswith("data: {") and "choices" in json.loads(line[6:]):
                        found = time.perf_counter() - start
            if found is None:
                raise EngineError(f"vLLM's server answered {response.status_code} and no token")
            return found

        yield ask


def _wait(process: subprocess.Popen[bytes], url: str) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        if process.poll() is not None:
            raise EngineError("vLLM's own server ended before it was ready: its errors are above")
        with suppress(urllib.error.URLError, OSError), opener.open(url, timeout=1):
            return
        time.sleep(0.2)
    raise EngineError(f"vLLM's own server was not ready after {START_SECONDS:.0f} s")
