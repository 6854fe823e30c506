"""The pool: one model per adapter is the reference; threads meet at barriers and events, never at a time."""

import copy
import random
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import CASES, bits, disturb, images, outputs, same, snapshot, train, vit

from peft_surgical import SurgicalConfig
from peft_surgical.adapters.pool import AdapterPool, Turns, adapter_bytes
from peft_surgical.config import SurgicalConfig as Config
from peft_surgical.errors import AdapterError, AdapterFileError, BaseMismatchError, ConfigError

INPUTS = images()
ONE = 4 * (3 * 4 * 9 + 2 * 4 + 4 * 4 * 9 + 4 + 2 * 4)  # bytes of block1: conv1, bn1, layer1.0 with bias, layer1.1
WAIT = 60  # seconds until a thread that never comes is a failure


@pytest.fixture(scope="module")
def base():
    return CASES["conv+BN"].network()


@pytest.fixture(scope="module")
def sites(base, tmp_path_factory):
    """Twelve adapters of block1: id -> output of a model that has this one alone."""
    root, found = tmp_path_factory.mktemp("sites"), {}
    for seed in range(12):
        model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1")).eval()
        disturb(model, 0.2, seed)
        model.save_pretrained(root / f"site{seed}")
        found[str(root / f"site{seed}")] = outputs(model, INPUTS)
    assert len({tuple(output.flatten().tolist()) for output in found.values()}) == 12
    return found


def saved(base, folder, target="block1", seed=3, **kwargs):
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=target, **kwargs)).eval()
    disturb(model, 0.2, seed)
    model.save_pretrained(folder)
    return str(folder)


def held_bytes(network):
    """What the tensors of all adapters take, counted on the model."""
    marks = (".surgical_delta.", ".surgical_stats.", ".modules_to_save.")
    tensors = [*network.named_parameters(), *network.named_buffers()]
    return sum(t.numel() * t.element_size() for name, t in tensors if any(mark in f".{name}" for mark in marks))


def until(condition):
    """Spin until a condition holds, which other threads bring about."""
    for _ in range(10**9):
        if condition():
            return


# --- one thread ---


def test_every_adapter_gives_what_a_model_of_its_own_gives_in_exactly_its_bytes(base, sites):
    network = copy.deepcopy(base)
    pool = AdapterPool(network, budget_bytes=12 * ONE)
    for _ in range(2):
        for site, expected in sites.items():
            with pool.use(site) as model:
                assert torch.equal(bits(outputs(model, INPUTS)), bits(expected))
    state = pool.state()
    assert dict(state.resident) == dict.fromkeys(sites, ONE)
    assert (state.bytes, state.requests, state.loads, state.evictions) == (12 * ONE, 24, 12, 0)
    assert held_bytes(network) == 12 * ONE
    plain = {key: value for key, value in snapshot(network).items() if "surgery" not in key}
    assert same(plain, snapshot(base))


def test_the_least_recently_used_goes_first(base, sites):
    a, b, c, d = list(sites)[:4]
    network = copy.deepcopy(base)
    pool = AdapterPool(network, budget_bytes=3 * ONE + 10)
    for site, resident in (
        (a, [a]),
        (b, [a, b]),
        (c, [a, b, c]),
        (a, [b, c, a]),
        (d, [c, a, d]),
        (c, [a, d, c]),
        (b, [d, c, b]),
        (b, [d, c, b]),
    ):
        with pool.use(site) as model:
            assert torch.equal(outputs(model, INPUTS), sites[site])
        assert list(pool.state().resident) == resident
        assert held_bytes(network) == len(resident) * ONE
    assert (pool.state().requests, pool.state().loads, pool.state().evictions) == (8, 5, 2)


def test_a_mixed_batch_of_more_ids_than_rows_of_each(base, sites):
    a, b, c, d = list(sites)[:4]
    pool = AdapterPool(copy.deepcopy(base), budget_bytes=3 * ONE)
    with pool.use(d):
        pass
    rows = [a, None, b, a, c, None]
    with pool.mixed(rows) as model, torch.no_grad():
        found = model(INPUTS)
    for row, site in enumerate(rows):
        expected = outputs(base, INPUTS) if site is None else sites[site]
        assert torch.allclose(found[row], expected[row], atol=1e-6)
    assert list(pool.state().resident) == [a, b, c]  # and d had to go
    with pool.use(b) as model:
        assert torch.equal(outputs(model, INPUTS), sites[b])
    with pytest.raises(
        AdapterError, match=r"site0 \([\d,]+ bytes\), .* do not fit into the pool's budget of [\d,]+ bytes"
    ):
        pool.mixed([a, b, c, d]).__enter__()
    with pytest.raises(AdapterError, match="of the base alone"):
        pool.mixed([None, None]).__enter__()


def test_one_adapter_larger_than_the_budget_says_so(base, sites, tmp_path):
    large = saved(base, tmp_path / "large", "all")
    pool = AdapterPool(copy.deepcopy(base), budget_bytes=ONE)
    site = next(iter(sites))
    with pool.use(site):
        pass
    with pytest.raises(
        AdapterError, match=rf"large \(2,\d+ bytes\) does not fit into the pool's budget of {ONE:,} bytes"
    ):
        pool.use(large).__enter__()
    assert list(pool.state().resident) == [site]
    with pytest.raises(AdapterError, match="budget_bytes=0: give the memory"):
        AdapterPool(copy.deepcopy(base), budget_bytes=0)


@pytest.mark.parametrize(
    ("dtype", "kwargs"),
    [
        (torch.float32, {"target": "block1", "norm_stats": "all"}),
        (torch.bfloat16, {"target": "all"}),
        (torch.float64, {"target": "head"}),
        (torch.float32, {"target": "block2", "modules_to_save": ["fc"]}),
    ],
    ids=["statistics", "bfloat16", "float64", "whole"],
)
def test_bytes_are_those_in_memory(base, tmp_path, dtype, kwargs):
    network = copy.deepcopy(base).to(dtype)
    folder = saved(network, tmp_path / "a", **kwargs)
    expected = outputs(PeftModel.from_pretrained(copy.deepcopy(network), folder), INPUTS.to(dtype))
    known = adapter_bytes(network, Config.from_pretrained(folder))
    pool = AdapterPool(network, budget_bytes=known)
    with pool.use(folder) as model:
        assert torch.equal(outputs(model, INPUTS.to(dtype)), expected)
    assert held_bytes(network) == known == pool.state().bytes


def test_statistics_and_heads_switch_with_their_adapters(base, tmp_path):
    found = {}
    for seed, kwargs in enumerate(({"norm_stats": "all"}, {"modules_to_save": ["fc"]}, {})):
        model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1", **kwargs))
        torch.manual_seed(seed)
        train(model, torch.randn(6, 3, 8, 8))
        model.save_pretrained(tmp_path / str(seed))
        found[str(tmp_path / str(seed))] = outputs(model, INPUTS)
    network = copy.deepcopy(base)
    pool = AdapterPool(network, budget_bytes=10**6)
    for folder in [*found, *reversed(found), *found]:
        with pool.use(folder) as model:
            assert torch.equal(outputs(model, INPUTS), found[folder])
            # Nothing of it is to be trained, and no statistics move.
            assert not any(p.requires_grad for p in model.parameters())


def test_clearing_gives_the_base_back(base, sites):
    network = copy.deepcopy(base)
    pool = AdapterPool(network, budget_bytes=5 * ONE)
    for site in list(sites)[:3]:
        with pool.use(site):
            pass
    with pool.use(next(iter(sites))):  # active, and not the last that was loaded
        pass
    assert pool.clear() is network
    assert same(snapshot(network), snapshot(base))
    assert [type(module) for module in network.modules()] == [type(module) for module in base.modules()]
    assert pool.state().resident == {}
    site = list(sites)[1]
    with pool.use(site) as model:  # and it goes on
        assert torch.equal(outputs(model, INPUTS), sites[site])


def test_a_models_own_adapters_stay_and_do_not_count(base, sites):
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="head")).eval()
    disturb(model)
    own = outputs(model, INPUTS)
    pool = AdapterPool(model, budget_bytes=2 * ONE)
    for site in list(sites)[:4]:
        with pool.use(site) as used:
            assert used is model
            assert torch.equal(outputs(model, INPUTS), sites[site])
    assert len(model.peft_config) == 3
    assert pool.clear() is model
    assert list(model.peft_config) == ["default"]
    assert model.active_adapters == ["default"]
    assert torch.equal(outputs(model, INPUTS), own)
    model.merge_adapter()
    with pytest.raises(AdapterError, match="merged into this model"):
        AdapterPool(model, budget_bytes=ONE)


# --- loads that fail ---


def broken(base, sites, tmp_path, kind):
    """An adapter that cannot be loaded, and what is raised."""
    if kind == "missing":
        return str(tmp_path / "nothing"), ConfigError, "nothing"
    if kind == "large":
        return saved(base, tmp_path / "x", "all"), AdapterError, "does not fit|do not fit"
    if kind == "base":
        other = copy.deepcopy(base)
        other.bn1.weight.data += 1
        return saved(other, tmp_path / "x"), BaseMismatchError, "another base"
    folder = saved(base, tmp_path / "x", modules_to_save=["fc"] if kind == "whole" else None)
    file = tmp_path / "x" / "adapter_model.safetensors"
    if kind == "method":
        lora = get_peft_model(vit(), LoraConfig(target_modules=["q_proj"]))
        lora.save_pretrained(tmp_path / "lora")
        return str(tmp_path / "lora"), AdapterFileError, "LORA"
    if kind == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
        return folder, AdapterFileError, "truncated or damaged"
    tensors = load_file(file)
    if kind == "shape":
        key = next(key for key in tensors if "conv1" in key)
        tensors[key] = torch.zeros(2, 3)
    save_file(tensors, file)
    config = tmp_path / "x" / "adapter_config.json"
    config.write_text(config.read_text().replace('"weights_sha256": "', '"was": "'))
    return folder, AdapterFileError, "shape"


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "with another"])
@pytest.mark.parametrize("kind", ["missing", "large", "base", "method", "truncated", "shape"])
@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
def test_a_load_that_fails_leaves_pool_and_model_as_they_were(base, sites, tmp_path, kind, mixed):
    bad, error, match = broken(base, sites, tmp_path, kind)
    first, second, third = list(sites)[:3]
    network = copy.deepcopy(base)
    pool = AdapterPool(network, budget_bytes=2 * ONE + 100)
    for site in (first, second):
        with pool.use(site) as model:
            pass
    before, kept, state = outputs(model, INPUTS), snapshot(network), pool.state()
    flags, names = [p.requires_grad for p in network.parameters()], list(model.peft_config)
    with pytest.raises(error, match=match):
        (pool.mixed([third, bad]) if mixed else pool.use(bad)).__enter__()
    assert pool.state() == state
    assert same(snapshot(network), kept)
    assert [p.requires_grad for p in network.parameters()] == flags
    assert list(model.peft_config) == names
    assert model.active_adapters == [names[-1]]
    assert torch.equal(outputs(model, INPUTS), before)
    with pool.use(third) as model:
        assert torch.equal(outputs(model, INPUTS), sites[third])


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "with another"])
def test_a_first_load_that_fails_leaves_a_plain_base(base, sites, tmp_path, mixed):
    bad, _, _ = broken(base, sites, tmp_path, "base")
    network = copy.deepcopy(base)
    pool = AdapterPool(network, budget_bytes=10 * ONE)
    site, other = list(sites)[:2]
    with pytest.raises(BaseMismatchError, match="another base"):
        (pool.mixed([site, other, bad]) if mixed else pool.use(bad)).__enter__()
    assert same(snapshot(network), snapshot(base))
    assert [type(module) for module in network.modules()] == [type(module) for module in base.modules()]
    assert not hasattr(network, "peft_config")
    with pool.use(site) as model:
        assert torch.equal(outputs(model, INPUTS), sites[site])


def test_an_error_inside_the_block_ends_the_turn(base, sites):
    pool = AdapterPool(copy.deepcopy(base), budget_bytes=10 * ONE)
    a, b = list(sites)[:2]
    with pytest.raises(RuntimeError, match="mine"), pool.use(a):
        raise RuntimeError("mine")
    with pool.use(b) as model:
        assert torch.equal(outputs(model, INPUTS), sites[b])
    with pool.use(a), pytest.raises(AdapterError, match="This thread uses the pool's model already"):
        pool.use(b).__enter__()


# --- loaders ---


def test_a_loader_finds_the_folder_once(base, sites):
    asked, folders = [], list(sites)

    def loader(name):
        asked.append(name)
        return folders[int(name)]

    pool = AdapterPool(copy.deepcopy(base), budget_bytes=ONE, loader=loader)
    for name in ("0", "1", "0", "1"):
        with pool.use(name) as model:
            assert torch.equal(outputs(model, INPUTS), sites[folders[int(name)]])
    assert asked == ["0", "1"]
    assert pool.state().loads == 4
    pool.clear()
    with pool.use("1"):
        pass
    assert asked == ["0", "1", "1"]


def test_an_adapter_in_the_hubs_cache(base, sites, tmp_path, monkeypatch):
    repo, commit = tmp_path / "models--me--frost", "0123456789abcdef0123456789abcdef01234567"
    folder = repo / "snapshots" / commit
    model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target="block1")).eval()
    disturb(model)
    model.save_pretrained(folder)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    pool = AdapterPool(copy.deepcopy(base), budget_bytes=ONE)
    with pool.use("me/frost") as used:
        assert torch.equal(outputs(used, INPUTS), outputs(model, INPUTS))
    assert list(pool.state().resident) == ["me/frost"]


# --- threads ---


def test_threads_that_want_one_adapter_use_it_at_the_same_time(base, sites):
    pool = AdapterPool(copy.deepcopy(base), budget_bytes=ONE)
    site, inside = next(iter(sites)), threading.Barrier(4)

    def work():
        with pool.use(site) as model:
            inside.wait(WAIT)  # passes only if all four are in their blocks
            return outputs(model, INPUTS)

    with ThreadPoolExecutor(4) as threads:
        found = [future.result(WAIT) for future in [threads.submit(work) for _ in range(4)]]
    assert all(torch.equal(output, sites[site]) for output in found)
    assert (pool.state().loads, pool.state().requests) == (1, 4)


def test_another_adapter_waits_and_nobody_overtakes(base, sites):
    pool = AdapterPool(copy.deepcopy(base), budget_bytes=ONE)
    a, b = list(sites)[:2]
    order, leave = [], threading.Event()

    def work(name, site):
        with pool.use(site) as model:
            order.append(name)
            return outputs(model, INPUTS)

    def queued(n):
        until(lambda: len(pool._turns._queue) == n)

    with ThreadPoolExecutor(3) as threads:
        with pool.use(a) as model:
            second = threads.submit(work, "b", b)
            queued(1)
            # It wants what is active, but somebody was there before it.
            third = threads.submit(work, "a again", a)
            queued(2)
            assert order == []
            assert torch.equal(outputs(model, INPUTS), sites[a])
            leave.set()
        assert torch.equal(second.result(WAIT), sites[b])
        assert torch.equal(third.result(WAIT), sites[a])
    assert order == ["b", "a again"]
    assert (pool.state().loads, pool.state().evictions) == (3, 2)


def test_concurrent_requests_for_one_id_load_it_once(base, sites):
    site, asked, arrived = next(iter(sites)), [], threading.Barrier(6)
    go = threading.Event()

    def loader(name):
        asked.append(name)
        assert go.wait(WAIT)
        return name

    pool = AdapterPool(copy.deepcopy(base), budget_bytes=ONE, loader=loader)

    def work():
        arrived.wait(WAIT)
        with pool.use(site) as model:
            return outputs(model, INPUTS)

    with ThreadPoolExecutor(5) as threads:
        futures = [threads.submit(work) for _ in range(5)]
        arrived.wait(WAIT)
        until(lambda: asked)
        go.set()
        assert all(torch.equal(future.result(WAIT), sites[site]) for future in futures)
    assert asked == [site]
    assert pool.state().loads == 1


def test_a_fetch_that_fails_fails_for_all_who_wait_and_is_tried_again(base, sites):
    site, asked, go = next(iter(sites)), [], threading.Event()

    def loader(name):
        asked.append(name)
        assert go.wait(WAIT)
        if len(asked) == 1:
            raise OSError("the line is dead")
        return name

    pool = AdapterPool(copy.deepcopy(base), budget_bytes=ONE, loader=loader)

    def work():
        with pool.use(site):
            raise AssertionError("it has no adapter")

    with ThreadPoolExecutor(3) as threads:
        futures = [threads.submit(work) for _ in range(3)]
        until(lambda: asked)
        waiting = pool._folders[site]
        until(lambda: len(waiting._condition._waiters) == 2)  # the other two wait for the first one's fetch
        go.set()
        wait(futures, WAIT)
    assert [str(future.exception()) for future in futures] == ["the line is dead"] * 3
    assert asked == [site]
    with pool.use(site) as model:
        assert torch.equal(outputs(model, INPUTS), sites[site])
    assert asked == [site, site]


def test_who_fetches_keeps_nobody_from_computing(base, sites):
    a, b = list(sites)[:2]
    fetching, go = threading.Event(), threading.Event()

    def loader(name):
        if name == b:
            fetching.set()
            assert go.wait(WAIT)
        return name

    pool = AdapterPool(copy.deepcopy(base), budget_bytes=2 * ONE, loader=loader)

    def work():
        with pool.use(b) as model:
            return outputs(model, INPUTS)

    with ThreadPoolExecutor(1) as threads:
        future = threads.submit(work)
        assert fetching.wait(WAIT)
        for _ in range(3):
            with pool.use(a) as model:
                assert torch.equal(outputs(model, INPUTS), sites[a])
        assert not future.done()
        go.set()
        assert torch.equal(future.result(WAIT), sites[b])


def test_many_threads_many_adapters_little_room(base, sites):
    network = copy.deepcopy(base)
    pool = AdapterPool(network, budget_bytes=3 * ONE)
    names, start = list(sites)[:6], threading.Barrier(6)

    def work(seed):
        draw = random.Random(seed)
        start.wait(WAIT)
        for _ in range(25):
            if draw.random() < 0.25:
                other = draw.choice(names)  # three adapters at most, for which there is room
                rows = [*(draw.choice([names[0], other, None]) for _ in range(5)), names[seed]]
                with pool.mixed(rows) as model, torch.no_grad():
                    found = model(INPUTS)
                for row, site in enumerate(rows):
                    expected = plain if site is None else sites[site]
                    assert torch.allclose(found[row], expected[row], atol=1e-6)
            else:
                site = draw.choice(names)
                with pool.use(site) as model:
                    assert torch.equal(outputs(model, INPUTS), sites[site])
        return True

    plain = outputs(base, INPUTS)
    with ThreadPoolExecutor(6) as threads:
        assert all(future.result(WAIT) for future in [threads.submit(work, seed) for seed in range(6)])
    state = pool.state()
    assert state.bytes <= 3 * ONE
    assert held_bytes(network) == state.bytes
    assert state.evictions == state.loads - len(state.resident)


@pytest.mark.slow
def test_the_benchmark_runs_and_its_outputs_are_equal(tmp_path):
    pytest.importorskip("timm")
    script = Path(__file__).parents[1] / "benchmarks" / "many_adapters.py"
    command = [
        sys.executable,
        str(script),
        "--network",
        "test_resnet",
        "--adapters",
        "5",
        "--rounds",
        "6",
        "--side",
        "32",
    ]
    done = subprocess.run([*command, "--markdown", str(tmp_path / "table.md")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert "| switch in the pool |" in table
    assert "All 5 outputs equal" in table
    assert "exactly their sum" in table


def test_turns_by_themselves():
    turns, log = Turns(), []

    def fails():
        raise ValueError("not ready")

    with pytest.raises(ValueError, match="not ready"):
        turns.turn("a", fails).__enter__()
    with turns.turn("a", lambda: log.append("a")), ThreadPoolExecutor(1) as threads:

        def joins():
            with turns.turn("a", lambda: log.append("never, the turn is running")):
                return "joined"

        assert threads.submit(joins).result(WAIT) == "joined"
    with turns.turn("b", lambda: log.append("b")):
        pass
    assert log == ["a", "b"]
