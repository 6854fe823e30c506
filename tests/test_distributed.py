"""Several processes on the CPU (gloo): DDP without unused parameters, and FSDP2, against one process."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny import vit
from torch import nn

from peft_surgical import SurgicalConfig

pytestmark = pytest.mark.slow

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 5


def network():
    torch.manual_seed(0)
    return vit()


def steps(model, images, labels, count=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    losses = []
    for _ in range(count):
        loss = nn.functional.cross_entropy(model(pixel_values=images).logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def work(rank, kind, port, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    model = get_peft_model(network(), SurgicalConfig(target="embedding + block1 + head"))
    wrapped = model
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=False)
    else:
        from torch.distributed.fsdp import fully_shard

        for block in model.get_base_model().vit.layers:
            fully_shard(block)
        fully_shard(model)
    losses = torch.tensor(steps(wrapped, IMAGES[rank::2], LABELS[rank::2]))
    dist.all_reduce(losses)
    # Every rank gathers; each writes its own folder, so that they can be compared.
    model.save_pretrained(f"{folder}/rank{rank}")
    if rank == 0:
        torch.save(losses / 2, f"{folder}/losses.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_equal_one(kind, tmp_path):
    alone = get_peft_model(network(), SurgicalConfig(target="embedding + block1 + head"))
    losses = steps(alone, IMAGES, LABELS)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (kind, port, str(tmp_path)), nprocs=2)
    assert torch.allclose(torch.load(tmp_path / "losses.pt"), torch.tensor(losses), atol=1e-5)
    base = network()
    loaded = [PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / f"rank{rank}") for rank in (0, 1)]
    found = [get_peft_model_state_dict(model) for model in loaded]
    wanted = get_peft_model_state_dict(alone)
    assert found[0].keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[0][key], found[1][key])
        assert torch.allclose(found[0][key], value, atol=1e-5)
        assert value.any()
