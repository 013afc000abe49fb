"""Run one sharded command many times: as processes on this machine, or as Ray tasks. The shards do the rest.

Workers write files and say what goes wrong on stderr; their stdout is dropped, since the caller prints the one result.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from excise.errors import ExciseError

# The worst of the workers' exit codes speaks for all: an error outranks failed items, an interrupt outranks both.
RANK = (0, 3, 4, 1, 2, 130)


def processes(command: Sequence[str], count: int) -> int:
    """Run `command --shard i/count` in `count` processes and wait; an interrupt is handed on and waited for."""
    gpus = _gpus()
    running = [
        subprocess.Popen(
            _line(command, i, count),
            env=_environment(i, count, gpus),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        for i in range(count)
    ]
    try:
        codes = [p.wait() for p in running]
    except KeyboardInterrupt:
        for p in running:
            p.send_signal(signal.SIGINT)
        for p in running:
            p.wait()
        raise
    return _worst(codes)


def ray_tasks(command: Sequence[str], count: int) -> int:
    """The same as Ray tasks, one GPU each where the cluster has some; nodes must share the file system."""
    try:
        import ray
    except ImportError:
        raise ExciseError("--ray needs Ray; install it with `pip install 'excise[ray]'`, or use --workers") from None
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=True)
    gpus = 1 if ray.cluster_resources().get("GPU") else 0

    # Half a CPU: tasks that claim every CPU starve Ray's own work and hang.
    @ray.remote(num_cpus=0.5, num_gpus=gpus, max_retries=2)
    def shard(i: int) -> int:
        return subprocess.run(_line(command, i, count), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL).returncode

    return _worst(ray.get([shard.remote(i) for i in range(count)]))


def _line(command: Sequence[str], shard: int, shards: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "excise.cli",
        *command,
        "--shard",
        f"{shard}/{shards}",
        *([] if shard == 0 else ["--quiet"]),
    ]


def _environment(shard: int, shards: int, gpus: Sequence[str]) -> dict[str, str]:
    threads = str(max(1, (os.cpu_count() or 1) // shards))
    own = {"CUDA_VISIBLE_DEVICES": gpus[shard % len(gpus)]} if gpus else {}
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads), **own}


def _gpus() -> list[str]:
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [g for g in given.split(",") if g.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _worst(codes: Sequence[int]) -> int:
    seen = {code if code in RANK else 1 for code in codes}
    return max(seen, key=RANK.index)
