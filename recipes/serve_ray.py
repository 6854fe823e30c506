"""Serve many sites from one base over HTTP, on Ray Serve: the base once in each replica, adapters on demand.

::

    pip install -e ".[serve,timm]"
    python recipes/serve_ray.py sites --replicas 2
    curl -F images=@photo.jpg http://127.0.0.1:8000/sites/north/predict

``sites`` is a folder with a folder for each site, such as `peft-surgical tune` and `pull` write; all of them have the
same base, which the first of them names unless ``--base`` does. A site that is added or saved anew is there at once.

    GET  /health                   the base, and what this replica holds
    GET  /sites                    their names
    POST /sites/NAME/predict       images as files of a form -> for each the likeliest classes, in the same order

A request can name a site and bring images, and nothing else: a name is looked up in the folder's listing and never used
as a path, images are decoded by Pillow after their size has been looked at, and no pickle is read. Errors are JSON.
The server trusts everybody who reaches it: put it behind a proxy that knows your users. See docs/serving.md.
"""

# No "from __future__ import annotations": Ray sends these functions to its replicas without the names that stand in
# annotations alone, and FastAPI reads them there.
import argparse
import asyncio
import io
import logging
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse
from PIL import Image
from starlette.exceptions import HTTPException as AnyHTTPException

from peft_surgical import AdapterPool
from peft_surgical.adapters.adapter import read_config
from peft_surgical.bases import load_base
from peft_surgical.data.images import decode
from peft_surgical.errors import ConfigError, DataError, SurgicalError, run_in_words
from peft_surgical.evaluation import Report, predict_logits
from peft_surgical.hub import open_adapted
from peft_surgical.hub.records import completed, recorded
from peft_surgical.keys import CONFIG, REPORT

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
"""What Pillow may take an image for."""
LIKELIEST = 5
"""Classes in an answer."""
log = logging.getLogger("serve_ray")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        megabytes: Its body.
        images: Their number.
        megapixels: Each of them, before it is resized.
        seconds: From its arrival at a replica to the answer.
    """

    megabytes: float = 32.0
    images: int = 32
    megapixels: float = 40.0
    seconds: float = 30.0


class SiteServer:
    """One base and the adapters in a folder.

    Args:
        root: Holds a folder for each site.
        base: The base, where the first site does not tell it or it is elsewhere here.
        budget_bytes: Memory for adapters, as for `AdapterPool`.
        limits: What a request may ask for.

    Raises:
        ConfigError: There is no site in the folder.
    """

    def __init__(self, root: Path, base: str | None, budget_bytes: int, limits: Limits) -> None:
        self.root, self.limits = Path(root).absolute(), limits
        sites = self.sites()
        if not sites:
            raise ConfigError(f"{self.root} holds no folder with an {CONFIG}: put the adapter of each site into one")
        first = open_adapted(self.root / sites[0], base=base)
        self.base, self.transform = first.record.id, first.transform
        self.known = load_base(first.record.id).label_names  # what the checkpoint itself says of its classes
        self.pool = AdapterPool(first.model.unload(), budget_bytes, loader=self._folder_of)
        self.workers = ThreadPoolExecutor(2, "predict")  # one computes while another decodes

    def sites(self) -> list[str]:
        """The names of the sites, as the folder lists them now."""
        names = [one.name for one in os.scandir(self.root) if one.is_dir() and not one.name.startswith(".")]
        return sorted(name for name in names if name.isprintable() and (self.root / name / CONFIG).is_file())

    def _folder_of(self, key: str) -> Path:
        return self.root / key.partition("\0")[0]

    def _names_of(self, site: str, classes: int) -> Sequence[str]:
        folder = self.root / site
        report = Report.load(folder / REPORT) if (folder / REPORT).is_file() else None
        record = completed(recorded(folder, read_config(folder)), self.base, report)
        names = self.known if record.head == "keep" and self.known else record.label_names
        return names if names and len(names) == classes else tuple(map(str, range(classes)))

    def inputs_of(self, images: Sequence[bytes]) -> torch.Tensor:
        """Encoded images as the network takes them, (images, channels, height, width).

        Raises:
            DataError: An image cannot be decoded, or has too many pixels; says nothing of this machine.
        """
        return torch.stack([self.transform(self._image(one, i)) for i, one in enumerate(images)])

    def predict(self, site: str, inputs: torch.Tensor) -> list[list[dict[str, Any]]]:
        """For each of `inputs_of` its likeliest classes, the likeliest first, with their probabilities.

        Raises:
            SurgicalError: The adapter or what belongs to it cannot be loaded.
        """
        # An adapter that was saved anew has another key, so that it is loaded; the older one is evicted in time.
        key = f"{site}\0{(self.root / site / CONFIG).stat().st_mtime_ns}"
        with self.pool.use(key) as model:
            scores = predict_logits(model, inputs).float().softmax(1)
        names = self._names_of(site, scores.shape[1])
        values, places = scores.topk(min(LIKELIEST, scores.shape[1]))
        return [
            [{"label": names[i], "score": score} for score, i in zip(*row, strict=True)]
            for row in zip(values.tolist(), places.tolist(), strict=True)
        ]

    def _image(self, encoded: bytes, number: int) -> Any:
        where = f"image {number}"
        try:
            width, height = Image.open(io.BytesIO(encoded), formats=FORMATS).size
        except Exception as error:  # each of Pillow's readers has its own
            raise DataError(f"{where} is none of {', '.join(FORMATS)}") from error
        if width * height > 1e6 * self.limits.megapixels:
            raise DataError(f"{where} has {width} x {height} pixels: at most {self.limits.megapixels:g} megapixels")
        return decode(encoded, where)


class BodyLimit:
    """ASGI middleware that ends a request whose body is too large, whatever its header says."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        total = 0

        async def counted() -> Any:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.limit:
                raise HTTPException(413, f"the request is larger than {self.limit:,} bytes")
            return message

        await self.app(scope, counted, send)


def api_of(server: SiteServer) -> FastAPI:
    """The routes of a server."""
    api, limits = FastAPI(title="Sites", docs_url=None, redoc_url=None), server.limits
    api.add_middleware(BodyLimit, limit=int(1e6 * limits.megabytes))

    @api.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        return JSONResponse({"error": str(error.detail)}, error.status_code, headers=error.headers)

    @api.get("/health")
    def health() -> dict[str, Any]:
        state = server.pool.state()
        resident = sorted({key.partition("\0")[0] for key in state.resident})
        counts = {"requests": state.requests, "loads": state.loads, "evictions": state.evictions}
        return {"base": Path(server.base).name, "process": os.getpid(), "resident": resident, **counts}

    @api.get("/sites")
    def sites() -> dict[str, list[str]]:
        return {"sites": server.sites()}

    async def answered(site: str, request: Request) -> dict[str, Any]:
        if site not in server.sites():
            raise HTTPException(404, "there is no such site: GET /sites lists them")
        async with request.form(max_files=limits.images, max_fields=0) as form:
            files = [one for _, one in form.multi_items() if not isinstance(one, str)]
            images = [await one.read() for one in files]
        if not images:
            raise HTTPException(400, "send images as files of a form (multipart/form-data)")
        loop = asyncio.get_running_loop()
        try:
            inputs = await loop.run_in_executor(server.workers, server.inputs_of, images)
        except DataError as error:
            raise HTTPException(422, str(error)) from error
        try:
            found = await loop.run_in_executor(server.workers, server.predict, site, inputs)
        except (SurgicalError, OSError) as error:  # whose messages name folders of this machine
            log.exception("site %s", site)
            raise HTTPException(
                503, "the adapter of this site cannot be loaded: its operator finds why in the log"
            ) from error
        return {"site": site, "predictions": found}

    @api.post("/sites/{site}/predict")
    async def predict(site: str, request: Request) -> dict[str, Any]:
        try:
            return await asyncio.wait_for(answered(site, request), limits.seconds)
        except asyncio.TimeoutError as error:
            raise HTTPException(504, f"no answer within {limits.seconds:g} seconds: send fewer images") from error

    return api


def application(root: str, base: str | None, limits: Limits, *, replicas: int, cpus: float, megabytes: int) -> Any:
    """The application for Ray Serve: replicas of a server, each with ``megabytes`` for adapters."""
    from ray import serve

    def build() -> FastAPI:
        torch.set_num_threads(max(1, int(cpus)))
        return api_of(SiteServer(Path(root), base, 10**6 * megabytes, limits))

    deployed = serve.deployment(
        num_replicas=replicas, max_ongoing_requests=8, max_queued_requests=64, ray_actor_options={"num_cpus": cpus}
    )
    return deployed(serve.ingress(build)()).bind()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("root", help="a folder with a folder for each site")
    add("--base", help="the base, where the sites do not tell it or it is elsewhere here")
    add("--replicas", type=int, default=1, help="processes with a copy of the base; default: %(default)s")
    add("--cpus", type=float, default=1, help="of each replica; default: %(default)s")
    add("--megabytes", type=int, default=512, help="memory for adapters in each replica; default: %(default)s")
    add("--host", default="127.0.0.1", help="where to listen; default: %(default)s, this machine alone")
    add("--port", type=int, default=8000, help="default: %(default)s")
    for name, limit in (("body", "megabytes"), ("images", "images"), ("pixels", "megapixels"), ("time", "seconds")):
        default = getattr(Limits, limit)
        add(f"--most-{name}", type=type(default), default=default, help=f"{limit} of a request; default: %(default)s")
    args = parser.parse_args(arguments)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    root, base = str(Path(args.root).absolute()), args.base
    if base is not None and Path(base).is_dir():
        base = str(Path(base).absolute())
    ray.init(include_dashboard=False)  # or the cluster that RAY_ADDRESS names
    serve.start(http_options={"host": args.host, "port": args.port})
    limits = Limits(args.most_body, args.most_images, args.most_pixels, args.most_time)
    sized = {"replicas": args.replicas, "cpus": args.cpus, "megabytes": args.megabytes}
    serve.run(application(root, base, limits, **sized), blocking=True)


if __name__ == "__main__":
    sys.exit(run_in_words(main))
