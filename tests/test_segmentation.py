"""Segmentation networks: their blocks by hand, and one block tuned on a miniature set with a loss of one's own."""

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from transformers import (
    ConvNextConfig,
    DPTConfig,
    DPTForSemanticSegmentation,
    SegformerConfig,
    SegformerForImageClassification,
    SegformerForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from peft_surgical import SurgicalConfig, anatomy_of, score_blocks
from peft_surgical.errors import AnatomyError

WIDTHS = [8, 8, 16, 16]


def segformer(kind=SegformerForSemanticSegmentation):
    torch.manual_seed(0)
    sizes = {"hidden_sizes": WIDTHS, "depths": [1, 1, 1, 1], "num_attention_heads": [1, 1, 2, 2]}
    return kind(SegformerConfig(num_labels=3, decoder_hidden_size=16, sr_ratios=[4, 2, 1, 1], **sizes))


def upernet():
    torch.manual_seed(0)
    stages = [f"stage{number}" for number in range(1, 5)]
    encoder = ConvNextConfig(hidden_sizes=WIDTHS, depths=[1, 1, 1, 1], out_features=stages)
    sizes = {"hidden_size": 16, "auxiliary_in_channels": 16, "auxiliary_channels": 8}
    return UperNetForSemanticSegmentation(UperNetConfig(backbone_config=encoder, num_labels=3, **sizes))


def dpt():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"image_size": 32, "patch_size": 8, "neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
    return DPTForSemanticSegmentation(DPTConfig(backbone_out_indices=[0, 1, 2, 3], num_labels=3, **sizes))


def torchvisions(name):
    torch.manual_seed(0)
    networks = pytest.importorskip("torchvision.models.segmentation")
    return getattr(networks, name)(weights=None, weights_backbone=None, num_classes=3)


@pytest.mark.parametrize(
    ("make", "first", "blocks", "head"),
    [
        (segformer, "embedding", 4, {"decode_head.classifier.weight", "decode_head.classifier.bias"}),
        (upernet, "block1", 4, {"decode_head.classifier.weight", "decode_head.classifier.bias"}),
        (dpt, "embedding", 4, {"head.head.4.weight", "head.head.4.bias"}),
        (lambda: torchvisions("fcn_resnet50"), "block1", 4, {"classifier.4.weight", "classifier.4.bias"}),
        (lambda: torchvisions("deeplabv3_resnet50"), "block1", 4, {"classifier.4.weight", "classifier.4.bias"}),
    ],
    ids=["segformer", "upernet", "dpt", "fcn", "deeplab"],
)
def test_blocks(make, first, blocks, head):
    network = make()
    anatomy = anatomy_of(network)
    numbered = tuple(f"block{number}" for number in range(1, blocks + 1))
    assert anatomy.names == (*(("embedding",) if first == "embedding" else ()), *numbered, "decoder", "head")
    assert set(anatomy["head"].tensors) == head
    persistent = set(network.state_dict())
    held = [name for block in anatomy for name in block.tensors]
    assert sorted(held) == sorted(persistent)
    decoder = {name.split(".")[0] for name in anatomy["decoder"].tensors}
    assert not decoder & {"backbone", getattr(network, "base_model_prefix", None) or "backbone"}


def test_the_encoder_has_the_blocks_of_the_classifier():
    segmenter, classifier = anatomy_of(segformer()), anatomy_of(segformer(SegformerForImageClassification))
    for block in ("embedding", "block1", "block2", "block3"):
        assert segmenter[block].tensors == classifier[block].tensors


def test_what_is_not_known_says_why():
    network = torchvisions("lraspp_mobilenet_v3_large")
    with pytest.raises(AnatomyError, match=r"segmentation: no segmentation network with an encoder and a decoder"):
        anatomy_of(network)


def test_one_block_tuned_on_a_miniature_set(tmp_path):
    """Squares on a background: the loss is that of pixels, the network's own logits a quarter of the size."""
    base = segformer()
    images, masks = torch.randn(4, 3, 32, 32) * 0.1, torch.zeros(4, 32, 32, dtype=torch.long)
    images[:, :, 8:24, 8:24] += 1
    masks[:, 8:24, 8:24] = 1

    def loss_fn(outputs, labels):
        return F.cross_entropy(F.interpolate(outputs.logits, size=labels.shape[-2:]), labels)

    scores = score_blocks(base, [(images, masks)], "rgn", loss_fn=loss_fn)
    assert list(scores.block_scores) == ["embedding", "block1", "block2", "block3", "block4", "decoder", "head"]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, SurgicalConfig(target="decoder"))
    tuned = set(anatomy_of(segformer())["decoder"].tensors)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.train()
    losses = []
    for _ in range(15):
        loss = loss_fn(model(pixel_values=images), masks)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]
    model.eval()
    with torch.no_grad():
        logits = model(pixel_values=images).logits
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(segformer(), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(pixel_values=images).logits, logits)
    merged = model.merge_and_unload().state_dict()
    moved = {name for name, value in before.items() if not torch.equal(merged[name], value)}
    assert moved
    assert moved <= tuned
