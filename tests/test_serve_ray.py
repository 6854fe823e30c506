"""The server of many sites: what it answers, what it refuses, and (slow) replicas of it on a real local Ray."""

import asyncio
import concurrent.futures
import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

import pytest
import torch
from scripts import script

pytest.importorskip("fastapi")
pytest.importorskip("python_multipart")
PIL = pytest.importorskip("PIL.Image")

from fastapi.testclient import TestClient  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor  # noqa: E402

from peft_surgical import SurgicalConfig  # noqa: E402
from peft_surgical.errors import ConfigError  # noqa: E402
from peft_surgical.evaluation import Report  # noqa: E402
from peft_surgical.hub import open_adapted  # noqa: E402

NAMES = ("daisy", "rose", "tulip")
ROOT = Path(__file__).parents[1]


def save_site(base, folder, seed):
    """An adapter with random deltas on block1 of the base in a folder."""
    network = ViTForImageClassification.from_pretrained(base)
    model = get_peft_model(network, SurgicalConfig(target="block1"))
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
    ViTForImageClassification(ViTConfig(**size, image_size=16, patch_size=8, **labels)).save_pretrained(folder / "base")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "base")
    for seed, name in enumerate(("north", "south")):
        save_site(folder / "base", folder / "sites" / name, seed)
    (folder / "sites" / "notes").mkdir()  # no site
    return folder


@pytest.fixture(scope="module")
def recipe():
    return script("recipes", "serve_ray.py")


@pytest.fixture
def client(recipe, place):
    limits = recipe.Limits(megabytes=0.05, images=3, megapixels=0.01, seconds=20)
    with TestClient(recipe.api_of(recipe.SiteServer(place / "sites", None, 10**7, limits))) as opened:
        yield opened


def photo(seed=0, size=(20, 18), kind="PNG"):
    pixels = torch.randint(0, 255, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    held = io.BytesIO()
    PIL.fromarray(pixels.to(torch.uint8).numpy()).save(held, kind)
    return held.getvalue()


def sent(*images):
    return [("images", (f"{i}.png", image)) for i, image in enumerate(images)]


def test_each_site_answers_as_its_adapter_does(client, place):
    images = [photo(seed) for seed in range(3)]
    assert client.get("/sites").json() == {"sites": ["north", "south"]}
    for site in ("north", "south", "north"):
        answer = client.post(f"/sites/{site}/predict", files=sent(*images)).json()
        adapted = open_adapted(place / "sites" / site)
        expected = adapted.logits(*(PIL.open(io.BytesIO(image)) for image in images)).softmax(1)
        assert len(answer["predictions"]) == 3
        for found, row in zip(answer["predictions"], expected.tolist(), strict=True):
            assert {one["label"]: one["score"] for one in found} == pytest.approx(dict(zip(NAMES, row, strict=True)))
            assert found[0]["score"] == max(row)
    health = client.get("/health").json()
    assert (health["resident"], health["loads"], health["requests"]) == (["north", "south"], 2, 3)
    assert str(place) not in json.dumps(health)


def test_a_site_that_is_added_or_saved_anew_is_there_at_once(client, place):
    save_site(place / "base", place / "sites" / "east", 5)
    try:
        first = client.post("/sites/east/predict", files=sent(photo())).json()["predictions"]
        save_site(place / "base", place / "sites" / "east", 6)
        assert client.post("/sites/east/predict", files=sent(photo())).json()["predictions"] != first
    finally:
        shutil.rmtree(place / "sites" / "east")
    assert client.post("/sites/east/predict", files=sent(photo())).status_code == 404


@pytest.mark.parametrize(
    ("site", "images", "code", "message"),
    [
        ("nowhere", (b"",), 404, "no such site"),
        ("notes", (b"",), 404, "no such site"),
        ("..%2Fbase", (b"",), 404, None),
        ("%2Fetc", (b"",), 404, None),
        ("north%00", (b"",), 404, None),
        ("north", (), 400, "send images as files"),
        ("north", (b"no image",), 422, "image 0 is none of JPEG, PNG"),
        ("north", (photo()[:100],), 422, "image 0 cannot be decoded"),
        ("north", (photo(), photo(size=(200, 60))), 422, "image 1 has 200 x 60 pixels: at most 0.01 megapixels"),
        ("north", (photo(kind="GIF"),), 422, "image 0 is none of"),
        ("north", (photo(),) * 4, 400, "Too many files"),
        ("north", (bytes(60_000),), 413, "larger than 50,000 bytes"),
    ],
)
def test_what_is_refused_in_json(client, site, images, code, message):
    answer = client.post(f"/sites/{site}/predict", files=sent(*images))
    assert answer.status_code == code, answer.text
    assert (message or "") in answer.json()["error"]


def test_a_field_of_text_and_a_body_without_a_length_are_refused(client):
    answer = client.post("/sites/north/predict", files=sent(photo()), data={"adapter": "../../elsewhere"})
    assert answer.status_code == 400
    assert "Too many fields" in answer.json()["error"]
    boundary = uuid.uuid4().hex
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="x"\r\n\r\n'.encode()

    def endless():
        yield part
        for _ in range(100):
            yield bytes(1000)

    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    answer = client.post("/sites/north/predict", content=endless(), headers=kind)
    assert answer.status_code == 413


def test_a_request_ends_in_time(recipe, place, monkeypatch):
    server = recipe.SiteServer(place / "sites", None, 10**7, recipe.Limits(seconds=0.2))
    monkeypatch.setattr(server, "predict", lambda *_: time.sleep(1))
    with TestClient(recipe.api_of(server)) as client:
        answer = client.post("/sites/north/predict", files=sent(photo()))
    assert answer.status_code == 504
    assert answer.json() == {"error": "no answer within 0.2 seconds: send fewer images"}


def test_a_broken_report_is_not_the_clients_fault(client, place):
    report = place / "sites" / "north" / "report.json"
    report.write_text('{"damaged')
    try:
        answer = client.post("/sites/north/predict", files=sent(photo()))
    finally:
        report.unlink()
    assert answer.status_code == 503
    assert str(place) not in answer.text


def test_a_broken_adapter_names_no_folder_and_a_folder_without_sites_is_refused(client, recipe, place):
    shutil.copytree(place / "sites" / "south", place / "sites" / "broken")
    weights = place / "sites" / "broken" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    try:
        answer = client.post("/sites/broken/predict", files=sent(photo()))
    finally:
        shutil.rmtree(place / "sites" / "broken")
    assert answer.status_code == 503
    assert answer.json() == {"error": "the adapter of this site cannot be loaded: its operator finds why in the log"}
    assert client.post("/sites/north/predict", files=sent(photo())).status_code == 200
    with pytest.raises(ConfigError, match=r"holds no folder with an adapter_config\.json"):
        recipe.SiteServer(place / "base", None, 10**7, recipe.Limits())


def test_classes_have_the_names_that_the_site_was_tuned_with(recipe, place, tmp_path):
    """A head of the site's own: its classes are in its report; a head that was kept has the checkpoint's."""
    shutil.copytree(place / "sites", tmp_path / "sites")
    settings = {"open": {"label_names": ["a", "b", "c"], "head": "new"}}
    Report(str(place / "base"), "block1", (), settings).save(tmp_path / "sites" / "south" / "report.json")
    server = recipe.SiteServer(tmp_path / "sites", None, 10**7, recipe.Limits())
    assert tuple(server._names_of("north", 3)) == NAMES
    assert tuple(server._names_of("south", 3)) == ("a", "b", "c")


def test_the_benchmark_asks_measures_and_writes_its_tables(recipe, place, monkeypatch):
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("psutil")
    pytest.importorskip("timm")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    serving = script("benchmarks", "serving.py")
    api = recipe.api_of(recipe.SiteServer(place / "sites", None, 10**7, recipe.Limits()))
    server, port = uvicorn.Server(uvicorn.Config(api, port=serving.free_port(), log_level="error")), 0
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.05)
        port = server.config.port
        with pytest.raises(ValueError, match="no such site"):
            serving.ask(port, "POST", "/sites/nowhere/predict", photo())
        ways = {"one": dict.fromkeys(("north", "south"), port), "two": {"south": port}}
        seconds, total = serving.measure(ways, photo(), [1, 2], requests=3, rounds=2)
    finally:
        server.should_exit = True
        thread.join()
    assert {key: len(times) for key, times in seconds.items()} == dict.fromkeys(
        [("one", 1), ("one", 2), ("two", 1), ("two", 2)], 6
    )
    assert total["one", 1] >= sum(seconds["one", 1])  # one client asks for one after the other
    table = serving.times_table({("one", 1): [i / 1000 for i in range(1, 101)]}, {("one", 1): 2.0})
    assert table.rows == [("one", "1", "50 ms", "40 to 61", "100 ms", "50.0", "100")]
    memory = serving.memory_table({serving.RAY: 2_000_000}, {serving.RAY: 1}, 3_000_000, "text")
    assert memory.rows == [(serving.RAY, "1", "2 MB", "3 MB")]
    assert serving.pss(os.getpid()) > 10_000_000


# --- a real Ray ---


def free_port():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return held.getsockname()[1]


def asked(url, image=None, timeout=30):
    boundary = uuid.uuid4().hex
    body = None
    if image is not None:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="images"; filename="x.png"\r\n\r\n'
        body = head.encode() + image + f"\r\n--{boundary}--\r\n".encode()
    request = urllib.request.Request(url, body, {"Content-Type": f"multipart/form-data; boundary={boundary}"})
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def asked_again(url, image=None, tries=60):
    """As a client that repeats what failed."""
    for left in reversed(range(tries)):
        try:
            return asked(url, image)
        except (OSError, urllib.error.URLError) as error:
            if not left or getattr(error, "code", 500) < 500:
                raise
            time.sleep(1)
    raise AssertionError


@contextlib.contextmanager
def serving(sites, *more):
    """The server as its user starts it, in a process group of its own; its address."""
    port = free_port()
    words = [sys.executable, str(ROOT / "recipes" / "serve_ray.py"), str(sites), "--port", str(port), *more]
    clean = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(words, env=clean, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:coroutine 'ingress")
def test_ray_builds_the_routes_in_each_replica(recipe, place):
    """The class that Ray Serve makes an object of in a replica, sent there and built, without a cluster."""
    pytest.importorskip("ray.serve", reason='needs ray: pip install "peft-surgical[serve]"')
    from ray import cloudpickle

    limits = recipe.Limits(images=1)
    sized = {"replicas": 3, "cpus": 0.5, "megabytes": 10}
    deployment = recipe.application(str(place / "sites"), None, limits, **sized)._bound_deployment
    assert (deployment.num_replicas, deployment.max_queued_requests) == (3, 64)
    assert deployment.ray_actor_options == {"num_cpus": 0.5}
    cloudpickle.register_pickle_by_value(recipe)  # as what is in __main__, when the recipe is run
    sent_there = cloudpickle.loads(cloudpickle.dumps(deployment.func_or_class))
    cloudpickle.unregister_pickle_by_value(recipe)
    replica = sent_there.__new__(sent_there)
    asyncio.run(replica.__init__())
    with TestClient(replica.app) as client:
        assert client.get("/sites").json() == {"sites": ["north", "south"]}
        assert client.post("/sites/north/predict", files=sent(photo(), photo())).status_code == 400
        answer = client.post("/sites/north/predict", files=sent(photo()))
        assert {one["label"] for one in answer.json()["predictions"][0]} == set(NAMES)


@pytest.mark.slow
def test_replicas_on_ray_and_one_that_is_killed(place):
    pytest.importorskip("ray.serve", reason='needs ray: pip install "peft-surgical[serve]"')
    with serving(place / "sites", "--replicas", "2", "--cpus", "0.5") as address:
        expected = {site: asked_again(f"{address}/sites/{site}/predict", photo(), 300) for site in ("north", "south")}
        assert expected["north"]["predictions"] != expected["south"]["predictions"]
        replicas = set()
        for _ in range(200):
            replicas.add(asked_again(f"{address}/health")["process"])
            if len(replicas) == 2:
                break
        assert len(replicas) == 2

        def one(number):
            site = ("north", "south")[number % 2]
            if number == 20:
                os.kill(min(replicas), signal.SIGKILL)
            return asked_again(f"{address}/sites/{site}/predict", photo()) == expected[site]

        with concurrent.futures.ThreadPoolExecutor(4) as clients:
            assert all(clients.map(one, range(80)))
        for _ in range(200):  # Ray starts another in its place
            now = {asked_again(f"{address}/health")["process"] for _ in range(10)}
            if len(now) == 2 and min(replicas) not in now:
                break
            time.sleep(0.5)
        assert len(now) == 2
        assert min(replicas) not in now
