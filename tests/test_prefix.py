"""A run whose frozen prefix is computed once is the run without, bit for bit; what cannot be cached says why."""

import copy
import errno
import functools
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tiny import CASES, ConvNet, Rows, bits, same, snapshot, used_batchnorm, vit
from torch import nn
from torch.utils.data import DataLoader, Subset

from peft_surgical import CachedPrefix, SurgicalConfig, anatomy_of
from peft_surgical.errors import ConfigError
from peft_surgical.prefix.cut import NetworkCut, UncutError
from peft_surgical.prefix.storage import FeatureStore, NoRoomError, layout_of
from peft_surgical.prefix.watching import cuts_of
from peft_surgical.training.fitting import FitSettings, fit

pytestmark = pytest.mark.usefixtures("quick_collections", "own_accelerate_state")

SETTINGS = FitSettings(lr=0.02, epochs=2, batch_size=4, weight_decay=0.1, use_cpu=True)
RUNS = [
    ("conv+BN", "block2", "86% of a forward pass, all before layer2.0"),
    ("conv+BN", "head", "100% of a forward pass, all before fc"),
    ("conv+BN", "block1", None),
    ("conv+BN", "all", None),
    ("conv+GN", "head", "100% of a forward pass, all before fc"),
    ("root tokens", "block2", "84% of a forward pass, all before blocks.1"),
    ("root tokens", "*.gamma", "69% of a forward pass, all before blocks.0"),
    ("CLIP", "block1", "15% of a forward pass, all before vision_model.encoder.layers.0.layer_norm1"),
    ("CLIP", "head", "100% of a forward pass, all before classifier"),
]


def run(network, target="head", cache=True, tuning=None, **kwargs):
    torch.manual_seed(0)
    tuning = Rows(13) if tuning is None else tuning
    return fit(network, target, tuning, Rows(9, seed=2), kwargs.pop("settings", SETTINGS), cache=cache, **kwargs)


def surgical(network, target="head", **config):
    return get_peft_model(network, SurgicalConfig(target=target, **config))


def reason(network, *datasets, target="head", config=None, **kwargs):
    with CachedPrefix(surgical(network, target, **(config or {})), *(datasets or (Rows(),)), **kwargs) as cached:
        assert cached.share == 0
        assert cached.datasets == (datasets or cached.datasets)
        return cached.reason


# --- the invariant ---


@pytest.mark.parametrize(("case", "target", "line"), RUNS)
def test_a_run_with_the_cache_is_the_run_without(case, target, line):
    made = CASES[case]
    config = {"blocks": made.blocks} if made.blocks else {}
    # 13 and 9 images in batches of 4: the last batch holds one, for which the CPU has other kernels.
    found, plain = (run(made.network(), target, cache, config=config) for cache in (True, False))
    assert same(snapshot(found.model), snapshot(plain.model))
    assert (found.curve, found.losses, found.cost) == (plain.curve, plain.losses, plain.cost)
    assert plain.prefix == "prefix not cached: it is switched off"
    wanted = f"prefix cached: {line}, is computed once" if line else "prefix not cached: nothing comes before"
    assert found.prefix.startswith(wanted)


@pytest.mark.parametrize("method", ["lp-ft", "dfr", "auto-rgn", "gradual-last-first"])
def test_schedules_and_balanced_draws_are_as_without(method):
    found, plain = (run(used_batchnorm(), method, cache) for cache in (True, False))
    assert same(snapshot(found.model), snapshot(plain.model))
    assert found.prefix.startswith("prefix cached" if method == "dfr" else "prefix not cached: nothing comes before")


def test_a_run_that_was_stopped_goes_on_from_the_cache_as_if_it_had_not(tmp_path):
    network = used_batchnorm
    whole = run(network(), "block2", False)
    run(network(), "block2", folder=tmp_path, stop_epoch=1)
    again = run(network(), "block2", folder=tmp_path)
    assert again.prefix.startswith("prefix cached")
    assert same(snapshot(again.model), snapshot(whole.model))


def test_a_run_that_was_killed_while_features_were_computed_starts_again(tmp_path, monkeypatch):
    whole, record = run(used_batchnorm(), "block2", False), NetworkCut.record
    calls, store = [], functools.partial(FeatureStore, folder=tmp_path / "features", shared=True)

    def killed(cut, given):
        calls.append(1)
        if len(calls) == 8:  # behind the proof
            raise KeyboardInterrupt
        return record(cut, given)

    monkeypatch.setattr(NetworkCut, "record", killed)
    with pytest.raises(KeyboardInterrupt):
        run(used_batchnorm(), "block2", store(), folder=tmp_path / "run")
    assert not list((tmp_path / "features").glob("*.prefix"))
    again = run(used_batchnorm(), "block2", store(), folder=tmp_path / "run")
    assert again.prefix.startswith("prefix cached")
    assert same(snapshot(again.model), snapshot(whole.model))
    assert len(list((tmp_path / "features").glob("*.prefix"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_timms_miniatures_cache_the_head_and_the_last_block(name):
    timm = pytest.importorskip("timm")
    network = timm.create_model(name, num_classes=5).eval()
    last = [block for block in anatomy_of(network).names if block.startswith("block")][-1]
    generator = torch.Generator().manual_seed(0)
    images = [{"pixel_values": torch.randn(3, 160, 160, generator=generator), "labels": i % 5} for i in range(16)]
    for target in ("head", last):
        model = surgical(copy.deepcopy(network), target)
        with CachedPrefix(model, images, batch_size=8) as cached:
            assert cached.reason == ""
            assert cached.share > 0.4


class Dropped(ConvNet):
    """With dropout, and statistics of its own, behind the second stage."""

    def __init__(self, norm):
        super().__init__(norm)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = self.layer2(self.layer1(torch.tanh(self.bn1(self.conv1(x)))))
        return self.fc(self.drop(x).mean((2, 3)))


def test_dropout_and_statistics_behind_the_cut_act_as_without():
    config = {"norm_stats": "target"}
    networks = (used_batchnorm(Dropped) for _ in range(2))
    found, plain = (
        run(net, "block2", cache, config=config) for net, cache in zip(networks, (True, False), strict=True)
    )
    assert found.prefix.startswith("prefix cached")
    assert same(snapshot(found.model), snapshot(plain.model))


def test_the_prefix_runs_once_for_each_image():
    seen, network, rows = [], used_batchnorm(), Rows(16)
    forward = network.layer1[0].forward
    network.layer1[0].forward = lambda x: seen.append(len(x)) or forward(x)
    model = surgical(network, "block2")
    with CachedPrefix(model, rows, batch_size=4) as cached:
        begun, read = sum(seen), len(rows.drawn)
        assert begun <= 16 + 80  # every image, and the proof
        for _ in range(5):
            for batch in DataLoader(cached.dataset, 4):
                model(batch["pixel_values"])
        assert sum(seen) == begun + 4  # the first batch shows that its size has no digits of its own
        assert len(rows.drawn) == read + 4


def test_no_gradient_of_a_frozen_weight_is_computed():
    model = surgical(used_batchnorm(), "block2")
    with CachedPrefix(model, Rows(8), batch_size=4) as cached:
        batch = next(iter(DataLoader(cached.dataset, 4)))
        assert batch["pixel_values"].shape == (4, 1, 1, 1)
        F.cross_entropy(model(batch["pixel_values"]), batch["labels"]).backward()
    tuned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert tuned == {name for name, _ in model.named_parameters() if ".surgical_delta." in name}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".fc." in n or ".conv1." in n)


# --- a loop of one's own ---


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_plain_loop_gives_the_same_and_the_model_is_left_as_it_was(as_tuple):
    class Pairs(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return (row["pixel_values"], row["labels"]) if as_tuple else row

    def trained(cache):
        model, data = surgical(used_batchnorm(), "block2"), Pairs(8)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
        before = {name: dict(module.__dict__) for name, module in model.named_modules()}
        with CachedPrefix(model, data, batch_size=4, off=None if cache else "no") as cached:
            assert (cached.reason == "") is cache
            model.train()
            for _ in range(3):
                for batch in DataLoader(cached.dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(1)):
                    images, labels = batch if as_tuple else batch.values()
                    optimizer.zero_grad()
                    F.cross_entropy(model(images), labels).backward()
                    optimizer.step()
        for name, module in model.named_modules():
            assert ("forward" in module.__dict__) == ("forward" in before[name])
            assert not module._forward_hooks
            assert not module._forward_pre_hooks
        return model

    found, plain = trained(True), trained(False)
    assert same(snapshot(found), snapshot(plain))
    assert torch.equal(bits(found(Rows().images)), bits(plain(Rows().images)))


def test_real_images_are_computed_within_the_context_and_errors_restore_the_model():
    model = surgical(used_batchnorm(), "block2")
    wanted = model(Rows().images)
    with CachedPrefix(model, Rows(), batch_size=4) as cached:
        assert torch.equal(model(Rows().images), wanted)
        found = model(torch.stack([cached.dataset[i]["pixel_values"] for i in range(10)]))
        assert torch.equal(found, wanted)
    with pytest.raises(RuntimeError, match="stop"), CachedPrefix(model, Rows(), batch_size=4):
        raise RuntimeError("stop")
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.equal(model(Rows().images), wanted)


def test_the_loops_random_numbers_are_those_without():
    model = surgical(vit().eval())
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    with CachedPrefix(model, Rows(), Rows(seed=2), batch_size=(4, 10)):
        assert torch.equal(torch.rand(3), wanted)


# --- what is not cached ---


class Skipping(ConvNet):
    """Adds what the first convolution gives to the second stage: a connection over the cut."""

    def forward(self, x):
        stem = self.conv1(x)
        return self.fc(self.layer2(self.layer1(self.bn1(stem))).mean((2, 3))) + stem.mean((2, 3)).sum(1, keepdim=True)


class Again(ConvNet):
    def forward(self, x):
        return super().forward(x) + x.mean((1, 2, 3))[:, None]


class Mixing(ConvNet):
    """Norms its images with the statistics of the batch."""

    def __init__(self, norm):
        super().__init__(norm)
        self.own = nn.BatchNorm2d(3, affine=False, track_running_stats=False)

    def forward(self, x):
        return super().forward(self.own(x))


class Seldom(ConvNet):
    def forward(self, x):
        for _ in range(len(x) % 2 + 1):
            y = self.layer1(torch.tanh(self.bn1(self.conv1(x))))
        return self.fc(self.layer2(y).mean((2, 3)))


def group(c):
    return nn.GroupNorm(2, c)


def test_a_skip_connection_over_the_cut_is_recorded_too():
    found, plain = (run(used_batchnorm(Skipping), "block2", cache) for cache in (True, False))
    assert found.prefix.startswith("prefix cached")
    assert same(snapshot(found.model), snapshot(plain.model))
    with CachedPrefix(surgical(Skipping(group), "block2"), Rows(), batch_size=4) as cached:
        assert cached.reason == ""
        assert [len(call.kept) for call in cached._cut.sites] == [1, 0, 1]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Again, "outputs differ"),
        (Mixing, "outputs differ"),
        (Seldom, "the order of the modules depends on the batch"),
    ],
)
def test_networks_that_cannot_be_cut_run_as_they_are(kind, why):
    torch.manual_seed(0)
    assert why in reason(kind(group).eval(), target="block2")
    torch.manual_seed(0)
    networks = [kind(group) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    found, plain = (run(net, "block2", cache) for net, cache in zip(networks, (True, False), strict=True))
    assert same(snapshot(found.model), snapshot(plain.model))


def test_randomness_and_statistics_before_the_cut_are_refused():
    dropping = ConvNet(group)
    dropping.layer1.append(nn.Dropout(0.1))
    assert "dropout or another random operation is active" in reason(dropping, target="block2")
    # What moves is not before the cut.
    with CachedPrefix(surgical(used_batchnorm(), norm_stats="all"), Rows(), batch_size=4) as cached:
        assert str(cached) == "prefix cached: 37% of a forward pass, all before bn1, is computed once"


def test_data_that_cannot_be_cached_says_so():
    class Noisy(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "pixel_values": row["pixel_values"] + torch.rand(1)}

    class Two(Rows):
        def __getitem__(self, i):
            return {**super().__getitem__(i), "other": torch.ones(3, 8, 8)}

    assert reason(used_batchnorm(), Noisy()).startswith("the images change from one reading to the next")
    assert reason(used_batchnorm(), Rows(), Noisy()).startswith("the images change from one reading to the next")
    assert reason(used_batchnorm(), Two()).startswith("a row of the data is no dict or tuple with one image")
    assert reason(used_batchnorm(), Rows(1)) == "there are fewer than two images"
    with pytest.raises(ConfigError, match="CachedPrefix has no data set"):
        CachedPrefix(used_batchnorm())
    with pytest.raises(ConfigError, match=r"batch_size=\[1, 2\]: give one positive number"):
        CachedPrefix(used_batchnorm(), Rows(), batch_size=[1, 2])
    with pytest.raises(ConfigError, match="views=0: give 1 or more"):
        CachedPrefix(used_batchnorm(), Rows(), views=0)


def test_fixed_views_are_used_in_turn():
    class Noisy(Rows):
        def __getitem__(self, i):
            row = super().__getitem__(i)
            return {**row, "pixel_values": row["pixel_values"] + torch.rand(1)}

    model = surgical(used_batchnorm(), "head")
    with CachedPrefix(model, Noisy(8), Rows(4), batch_size=4, views=2) as cached:
        assert cached.reason == ""
        batch = torch.stack([cached.dataset[i]["pixel_values"] for i in range(4)])
        seen = []
        for epoch in range(4):
            cached.set_epoch(epoch)
            seen.append(model(batch))
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[1], seen[3])
        assert not torch.equal(seen[0], seen[1])
    assert run(used_batchnorm(), "head", tuning=Noisy(8), cached_views=2).prefix.startswith("prefix cached")


# --- the store ---


def test_runs_with_one_boundary_share_its_features_and_no_others(monkeypatch):
    store, filled, data = FeatureStore(), [], (Rows(8), Rows(6, seed=2))
    kept = store.features

    def counted(key, layouts, rows, fill):
        return kept(key, layouts, rows, lambda made: filled.append(key) or fill(made))

    monkeypatch.setattr(store, "features", counted)

    def enter(network, target="block2", datasets=data, **kwargs):
        with CachedPrefix(surgical(network, target), *datasets, batch_size=4, store=store, **kwargs) as cached:
            assert cached.reason == ""
            return len(filled)

    assert enter(used_batchnorm()) == 2
    assert enter(used_batchnorm()) == 2
    assert enter(used_batchnorm(), "block2 + head") == 2
    assert enter(used_batchnorm(), "head") == 4
    other = used_batchnorm()
    other.conv1.weight.data[0] += 1e-3
    assert enter(other) == 6
    assert enter(used_batchnorm(), datasets=(Rows(8), data[1])) == 7
    other = used_batchnorm()
    other.fc.weight.data += 1  # behind the cut
    assert enter(other, datasets=data) == 7
    assert len(set(filled)) == 7


def test_a_second_run_on_the_same_features_computes_nothing_again():
    store, tuning = FeatureStore(), Rows(13)
    validation = Rows(9, seed=2)

    def count(cache, lr):
        seen, network = [], used_batchnorm()
        forward = network.layer1[0].forward
        network.layer1[0].forward = lambda x: seen.append(len(x)) or forward(x)
        torch.manual_seed(0)
        settings = replace(SETTINGS, lr=lr)
        return fit(network, "head", tuning, validation, settings, cache=cache), sum(seen)

    (first, begun), (second, again) = count(store, 0.02), count(store, 0.01)
    plain, everything = count(False, 0.01)
    assert same(snapshot(second.model), snapshot(plain.model))
    assert everything == 2 * (13 + 9)
    # Recorded: four batches of 4 and one of 9. Compared: each size of a batch, which are 4, 1 and 9.
    assert begun - again == (16 + 9) + (4 + 1 + 9)
    # In steps of 4 images, of which the forward pass is a third, and nearly all of that comes before the head.
    assert second.saved - first.saved == pytest.approx((16 + 9 + 4 + 1 + 9) / 4 / 3, rel=5e-3)


def test_what_does_not_fit_into_memory_goes_into_files_and_what_fits_nowhere_is_not_cached(tmp_path):
    plain = run(used_batchnorm(), "block2", False)
    small = FeatureStore(memory=10)
    found = run(used_batchnorm(), "block2", small)
    assert found.prefix.startswith("prefix cached")
    assert same(snapshot(found.model), snapshot(plain.model))
    assert len(list(small._own.glob("*.prefix"))) == 2
    own = small._own
    del small
    assert not own.exists()
    none = run(used_batchnorm(), "block2", FeatureStore(memory=10, disk=10))
    assert none.prefix.startswith("prefix not cached: its outputs need")
    assert same(snapshot(none.model), snapshot(plain.model))


def test_files_have_their_room_before_anything_is_written(tmp_path, monkeypatch):
    """Writing to a mapped file that the disk has no room for ends the process."""
    store, layouts = FeatureStore(memory=0, folder=tmp_path), [layout_of(torch.zeros(1, 1000))]
    room = []

    def fill(tensors):
        (file,) = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
        room.append(file.stat().st_blocks * 512)

    store.features("a" * 32, layouts, 50, fill)
    assert room[0] >= 50 * 4000

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NoRoomError, match=r"its outputs need 0 MiB in .*: No space left on device"):
        store.features("b" * 32, layouts, 50, fill)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("b") and path.suffix != ".lock"]


def test_a_file_is_whole_or_absent_and_the_least_recently_used_goes_first(tmp_path):
    layout = layout_of(torch.zeros(1, 4, 4))
    store = FeatureStore(folder=tmp_path, disk=3 * 1024, shared=True)

    def put(key, value):
        return store.features(key, [layout], 16, lambda made: made[0].fill_(value))[0]

    def broken(made):
        raise KeyboardInterrupt

    assert put("a", 1).eq(1).all()
    with pytest.raises(KeyboardInterrupt):
        store.features("x", [layout], 16, broken)
    (tmp_path / "y.12345").write_bytes(b"left by a process that was killed")
    assert put("y", 3).eq(3).all()
    os.utime(tmp_path / "a.prefix", (1, 1))
    assert put("b", 2).eq(2).all()
    assert put("c", 4).eq(4).all()
    assert sorted(file.stem for file in tmp_path.glob("*.prefix")) == ["b", "c", "y"]
    assert not list(tmp_path.glob("*.[0-9]*"))
    assert put("b", 5).eq(2).all()  # found
    with pytest.raises(NoRoomError, match="its outputs need 61 MiB"):
        store.features("large", [layout], 10**6, broken)


@pytest.mark.slow
def test_two_processes_share_a_folder(tmp_path):
    code = f"""
        import json, sys, time, torch
        from peft_surgical.prefix.storage import FeatureStore, layout_of
        done = []
        def fill(made):
            time.sleep(1)
            made[0].copy_(torch.arange(64.0).view(16, 4))
            done.append(1)
        store = FeatureStore(folder={str(tmp_path)!r}, shared=True)
        found = store.features("k", [layout_of(torch.zeros(1, 4))], 16, fill)
        print(json.dumps([len(done), found[0].sum().item()]))
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    both = [subprocess.Popen([sys.executable, "-c", lines], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [json.loads(process.communicate(timeout=120)[0]) for process in both]
    assert sorted(found) == [[0, 2016.0], [1, 2016.0]]


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.to(memory_format=torch.channels_last)])
def test_strides_survive_the_store(make):
    batch = make(torch.randn(5, 3, 4, 6))
    layout = layout_of(batch)
    made = layout.empty(5)
    made[:] = layout.stored(batch)
    found = layout.read(made)
    assert torch.equal(found, batch)
    assert found.stride() == batch.stride()


def test_features_may_be_rounded_to_bfloat16():
    found = run(used_batchnorm(), "head", FeatureStore(dtype=torch.bfloat16))
    plain = run(used_batchnorm(), "head", False)
    assert found.prefix.startswith("prefix cached")
    assert found.losses == pytest.approx(plain.losses, rel=0.05)
    assert found.losses != plain.losses


def test_cutting_an_untuned_network_says_so():
    net = used_batchnorm().requires_grad_(False)
    with pytest.raises(UncutError, match="nothing is trained"):
        next(cuts_of(net, lambda n: net(Rows(3).images[:n])))


def test_a_part_of_a_data_set_is_cached_alone():
    whole = Rows(20)
    with CachedPrefix(surgical(used_batchnorm()), Subset(whole, [3, 5, 7]), batch_size=2) as cached:
        assert len(cached.dataset) == 3
    assert set(whole.drawn) == {3, 5, 7}
