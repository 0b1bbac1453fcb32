"""A worker of `bench load`: everything real but the engine, which takes its time and computes nothing.

REDIS_URL=... python -m pilotfish.bench.load_worker NAME SWITCHES PLACES
"""

from __future__ import annotations

import asyncio
import os
import sys

from pilotfish.bench.children import say_ready
from pilotfish.cloud_worker.engines.spec import EngineSpec
from pilotfish.cloud_worker.worker_process import WorkerSpec, run


def main(name: str, switches: str, places: str) -> None:
    """Until SIGTERM."""
    spec = WorkerSpec(os.environ["REDIS_URL"], EngineSpec("fake", switches), name=name, max_jobs=int(places))
    asyncio.run(run(spec, ready=lambda *_: say_ready()))


if __name__ == "__main__":
    main(*sys.argv[1:])
