"""Many sites over HTTP from one base, beside one process for each site: latency and memory.

::

    python benchmarks/serving.py --markdown docs/results/serving.md     # needs the extras timm, serve; minutes

Three ways to serve the same sites, all of them running at the same time on 127.0.0.1, with the routes of
`recipes/serve_ray.py`: one process that holds the base once and all adapters; one process for each site, each with a
base and one adapter of its own; and Ray Serve with one replica. Clients ask for a site drawn at random, one request
after the other, in rounds: every way once per round, so that what else the machine does hits all alike. An answer must
be the same from each. Memory is the proportional set size (PSS), in which shared pages count once; Ray's own processes
are shown by themselves. The network has random weights and the adapters random deltas, which changes no cost.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import http.client
import io
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import timm
import torch
from many_adapters import save_adapters
from PIL import Image
from step import machine, median_interval

from peft_surgical.bases import load_base, save_checkpoint
from peft_surgical.evaluation import TextTable

ROOT = Path(__file__).resolve().parents[1]
ONE, EACH, RAY = "one process, all sites", "a process for each site", "Ray Serve, one replica, all sites"
TIMES = ("served by", "clients", "p50", "95% interval", "p99", "requests per second", "n")
MEMORY = ("served by", "processes", "memory", "and Ray's own")


def serve(root: str, port: int) -> None:
    """One server without Ray: what runs in each process of the first two ways."""
    import uvicorn

    sys.path.insert(0, str(ROOT / "recipes"))
    import serve_ray

    torch.set_num_threads(1)
    server = serve_ray.SiteServer(Path(root), None, 10**9, serve_ray.Limits())
    uvicorn.run(serve_ray.api_of(server), host="127.0.0.1", port=port, log_level="error")


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


@contextlib.contextmanager
def started(words: Sequence[str], root: Path, patience: float) -> Iterator[tuple[int, int]]:
    """A server in a process of its own: its port and process, once it answers; ended with the block."""
    port = free_port()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    words = [sys.executable, *words, str(root), "--port", str(port)]
    with subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + patience
            while True:
                with contextlib.suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                    found = int(ask(port, "GET", "/health")["process"])
                    break
                if process.poll() is not None or time.monotonic() > until:
                    raise SystemExit(f"no answer from {' '.join(words)}")
                time.sleep(0.5)
            yield port, found
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def ask(port: int, method: str, path: str, image: bytes | None = None) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="x.jpg"\r\n\r\n'
    body = None if image is None else head.encode() + image + f"\r\n--{boundary}--\r\n".encode()
    try:
        connection.request(method, path, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
        answer = connection.getresponse()
        found = json.loads(answer.read())
    finally:
        connection.close()
    if answer.status != 200:
        raise ValueError(found["error"])
    return found


def load(ports: dict[str, int], image: bytes, clients: int, requests: int, seed: int) -> tuple[list[float], float]:
    """Seconds of each request, and of all of them together; site -> the port that serves it."""
    draw = random.Random(seed)
    sites = [draw.choice(sorted(ports)) for _ in range(requests)]

    def one(site: str) -> float:
        begun = time.perf_counter()
        ask(ports[site], "POST", f"/sites/{site}/predict", image)
        return time.perf_counter() - begun

    begun = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, sites))
    return found, time.perf_counter() - begun


def measure(
    ways: dict[str, dict[str, int]], image: bytes, clients: Sequence[int], requests: int, rounds: int
) -> tuple[dict[tuple[str, int], list[float]], dict[tuple[str, int], float]]:
    """(way, number of clients) -> seconds of each request, and of all of them; ways in another order in each round."""
    seconds: dict[tuple[str, int], list[float]] = {}
    total: dict[tuple[str, int], float] = {}
    for number in range(rounds):
        for count in clients:
            for way in random.Random(number).sample(sorted(ways), len(ways)):
                times, whole = load(ways[way], image, count, requests, number)
                seconds.setdefault((way, count), []).extend(times)
                total[way, count] = total.get((way, count), 0.0) + whole
    return seconds, total


def times_table(seconds: dict[tuple[str, int], list[float]], total: dict[tuple[str, int], float]) -> TextTable:
    """Latencies, by number of clients and way."""
    rows = []
    for (way, count), times in sorted(seconds.items(), key=lambda item: (item[0][1], item[0][0])):
        middle, last = median_interval(times), sorted(times)[min(len(times) - 1, int(0.99 * len(times)))]
        ends = f"{1e3 * middle.low:.0f} to {1e3 * middle.high:.0f}"
        cells = (f"{1e3 * middle.value:.0f} ms", ends, f"{1e3 * last:.0f} ms", f"{len(times) / total[way, count]:.1f}")
        rows.append((way, str(count), *cells, str(len(times))))
    return TextTable(TIMES, rows)


def memory_table(sizes: dict[str, int], counts: dict[str, int], others: int, caption: str) -> TextTable:
    """Bytes of each way, and of Ray's own processes."""
    rows = [
        (way, str(counts[way]), f"{size / 1e6:.0f} MB", f"{others / 1e6:.0f} MB" if way == RAY else "")
        for way, size in sizes.items()
    ]
    return TextTable(MEMORY, rows, caption)


def pss(*processes: int) -> int:
    return sum(psutil.Process(process).memory_full_info().pss for process in processes)


def make_sites(args: argparse.Namespace, place: Path) -> list[str]:
    """A base, the adapters of all sites below ``all``, and below ``each`` a folder for each with one of them."""
    torch.manual_seed(args.seed)
    shape = {"input_size": (3, args.size, args.size)}
    save_checkpoint("timm", timm.create_model(args.model, num_classes=10, pretrained_cfg_overlay=shape), place / "base")
    network = load_base(place / "base").model
    network.name_or_path = str(place / "base")  # which PEFT writes into the adapters
    names = [Path(folder).name for folder in save_adapters(network, args.target, args.sites, place / "all")]
    for name in names:
        (place / "each" / name).mkdir(parents=True)
        os.symlink(place / "all" / name, place / "each" / name / name)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", nargs="?", help=argparse.SUPPRESS)  # of a server that this script starts
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--target", default="block1")
    parser.add_argument("--sites", type=int, default=4)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--requests", type=int, default=40, help="of each way and number of clients in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, default=224, help="pixels of the photograph")
    parser.add_argument("--no-ray", action="store_true", help="leave Ray Serve out")
    parser.add_argument("--patience", type=float, default=300, help="seconds until a server has to answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    if args.root is not None:
        serve(args.root, args.port)
        return
    pixels = np.random.default_rng(args.seed).integers(0, 256, (args.size, args.size, 3), dtype=np.uint8)
    held = io.BytesIO()
    Image.fromarray(pixels).save(held, "JPEG")
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        place = Path(scratch)
        sites = make_sites(args, place)
        own, script = str(Path(__file__).resolve()), str(ROOT / "recipes" / "serve_ray.py")
        ways: dict[str, dict[str, int]] = {}
        processes: dict[str, list[int]] = {}
        port, process = stack.enter_context(started([own], place / "all", args.patience))
        ways[ONE], processes[ONE] = dict.fromkeys(sites, port), [process]
        found = {name: stack.enter_context(started([own], place / "each" / name, args.patience)) for name in sites}
        ways[EACH] = {name: port for name, (port, _) in found.items()}
        processes[EACH] = [process for _, process in found.values()]
        others = 0
        if not args.no_ray:
            before = set(psutil.pids())
            port, process = stack.enter_context(started([script, "--cpus", "0.5"], place / "all", args.patience))
            ways[RAY], processes[RAY] = dict.fromkeys(sites, port), [process]
        answers = {}
        for way, ports in ways.items():  # which loads every adapter, too
            answers[way] = [ask(ports[site], "POST", f"/sites/{site}/predict", held.getvalue()) for site in sites]
        if any(answer != answers[ONE] for answer in answers.values()):
            raise SystemExit("the ways to serve do not give the same answers")
        seconds, total = measure(ways, held.getvalue(), args.clients, args.requests, args.rounds)
        sizes = {way: pss(*found) for way, found in processes.items()}
        if not args.no_ray:
            mine = {one for found in processes.values() for one in found} | {os.getpid()}
            others = sum(size_of(one) for one in set(psutil.pids()) - before - mine if is_of_ray(one))
    counts = {way: len(found) for way, found in processes.items()}
    ratio = sizes[EACH] / sizes[ONE]
    about = machine("cpu")
    caption = (
        f"{args.sites} sites, {args.target} of a {args.model} with random weights and deltas, float32, photographs of "
        f"{args.size} pixels, one at a time, {args.rounds} rounds; all ways gave the same answers. A process for each "
        f"site takes {ratio:.1f} times the memory of one process. {about['cpu']}, {about['cores']} cores that the "
        f"clients share, load average {os.getloadavg()[2]:.0f} over the last 15 minutes; torch {torch.__version__}. "
        "Medians with the distribution-free 95% interval; memory as PSS."
    )
    tables = [times_table(seconds, total), memory_table(sizes, counts, others, caption)]
    for table in tables:
        table.show()
    if args.markdown:
        args.markdown.write_text("\n".join(table.markdown() for table in tables), encoding="utf-8")


def is_of_ray(process: int) -> bool:
    with contextlib.suppress(psutil.Error):
        one = psutil.Process(process)
        return one.name().startswith("ray::") or any("/ray/" in word for word in one.cmdline())
    return False


def size_of(process: int) -> int:
    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(process).memory_full_info().pss)
    return 0


if __name__ == "__main__":
    main()
