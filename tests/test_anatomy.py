"""The blocks of real networks, checked against names and tensors written down by hand."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

from peft_surgical.blocks import Anatomy, Block, anatomy_of
from peft_surgical.errors import AnatomyError, UnknownTargetError

# Small values for language models, whose configs put special tokens beyond a small vocabulary otherwise.
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 64}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
IMAGE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}


# ---------------------------------------------------------------------------------------------- networks in this file
class BasicBlock(nn.Module):
    def __init__(self, width: int, width_in: int, norm: Callable[[int], nn.Module], pre: bool) -> None:
        super().__init__()
        self.bn1 = norm(width_in if pre else width)
        self.conv1 = nn.Conv2d(width_in, width, 3, bias=False)
        self.bn2 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, bias=False)


def _stage(width: int, width_in: int, depth: int, norm: Callable[[int], nn.Module], pre: bool) -> nn.Sequential:
    return nn.Sequential(*(BasicBlock(width, width if i else width_in, norm, pre) for i in range(depth)))


class ResNet26(nn.Module):
    """The key layout of the GroupNorm network: conv1, layer1..3, bn, fc."""

    def __init__(self) -> None:
        super().__init__()

        def norm(width: int) -> nn.Module:
            return nn.GroupNorm(8, width)

        self.conv1 = nn.Conv2d(3, 16, 3, bias=False)
        self.layer1 = _stage(16, 16, 4, norm, pre=True)
        self.layer2 = _stage(32, 16, 4, norm, pre=True)
        self.layer3 = _stage(64, 32, 4, norm, pre=True)
        self.bn = norm(64)
        self.fc = nn.Linear(64, 10)


class ResNet32(nn.Module):
    """The key layout of the BatchNorm network: conv1, bn1, layer1..3, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 5, nn.BatchNorm2d, pre=False)
        self.layer2 = _stage(32, 16, 5, nn.BatchNorm2d, pre=False)
        self.layer3 = _stage(64, 32, 5, nn.BatchNorm2d, pre=False)
        self.linear = nn.Linear(64, 10)


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.enter = nn.Conv2d(3, 4, 3)
        self.middle = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.leave = nn.Linear(4, 2)


class Tied(nn.Module):
    """A tied weight, a module in two places, and a non-persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.again = self.norm
        self.out = nn.Linear(4, 8, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


# ------------------------------------------------------------------------------------------------------- the big table
def _timm(name: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False, **options)


def _vision(name: str) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None)


def _hf(name: str, config: str, **options: object) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, name)(getattr(transformers, config)(**options))


def _clip(name: str) -> Callable[[], nn.Module]:
    text = {**TEXT, **IDS, "max_position_embeddings": 16}
    return _hf(name, "CLIPConfig", vision_config=IMAGE, text_config=text, projection_dim=16)


def _t5_untied() -> nn.Module:
    model = _hf("T5ForConditionalGeneration", "T5Config", **T5)()
    model.lm_head.weight = nn.Parameter(torch.empty(64, 32))
    return model


def _blocks(number: int, before: str = "", after: str = "head", prefix: str = "") -> list[str]:
    return [*before.split(), *(f"{prefix}block{i}" for i in range(1, number + 1)), *after.split()]


def _conv(number: int) -> list[str]:
    return _blocks(number)


def _tokens(number: int) -> list[str]:
    return _blocks(number, "embedding")


T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
BART = {"d_model": 16, "vocab_size": 64, **IDS, "decoder_start_token_id": 1, "forced_eos_token_id": 2} | {
    f"{tower}_{part}": 2 for tower in ("encoder", "decoder") for part in ("layers", "attention_heads", "ffn_dim")
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [1, 1, 2],
    "num_heads": [2, 2, 4],
    "window_size": 4,
}


class Case(NamedTuple):
    """A network, its block names in order, its source, tensors that blocks hold among others, and whole blocks."""

    build: Callable[[], nn.Module]
    names: list[str]
    source: str
    holds: dict[str, str]
    whole: dict[str, str] = {}


RESNET = {
    "block1": "conv1.weight bn1.weight bn1.running_var layer1.0.conv1.weight",
    "block4": "layer4.0.bn2.num_batches_tracked",
}
FC = {"head": "fc.weight fc.bias"}
VIT_STEM = {
    "embedding": "cls_token pos_embed patch_embed.proj.weight patch_embed.proj.bias",
    "head": "head.weight head.bias",
}
CLASSIFIER = {"head": "classifier.weight classifier.bias"}
CASES = {
    "timm-resnet26": Case(_timm("resnet26"), _conv(4), "timm", RESNET, FC),
    "timm-resnet50": Case(_timm("resnet50"), _conv(4), "timm", RESNET, FC),
    "timm-wide_resnet50_2": Case(_timm("wide_resnet50_2"), _conv(4), "timm", RESNET, FC),
    "timm-resnetv2_50": Case(
        _timm("resnetv2_50"),
        _conv(4),
        "timm",
        {"block1": "stem.conv.weight stages.0.blocks.0.conv1.weight", "block4": "norm.weight norm.running_mean"},
        {"head": "head.fc.weight head.fc.bias"},
    ),
    "timm-convnext_atto": Case(
        _timm("convnext_atto"),
        _conv(4),
        "timm",
        {
            "block1": "stem.0.weight stages.0.blocks.0.gamma",
            "block2": "stages.1.downsample.1.weight",
            "block4": "head.norm.weight",
        },
        {"head": "head.fc.weight head.fc.bias"},
    ),
    "timm-convnext_tiny": Case(
        _timm("convnext_tiny"), _conv(4), "timm", {"block4": "head.norm.bias stages.3.blocks.2.gamma"}
    ),
    "timm-efficientnet_b0": Case(
        _timm("efficientnet_b0"),
        _conv(7),
        "timm",
        {
            "block1": "conv_stem.weight bn1.running_mean blocks.0.0.conv_dw.weight",
            "block7": "conv_head.weight bn2.running_var",
        },
        CLASSIFIER,
    ),
    "timm-mobilenetv3_small_050": Case(
        _timm("mobilenetv3_small_050"),
        _conv(6),
        "timm",
        {
            "block1": "conv_stem.weight blocks.0.0.conv_dw.weight",
            "block6": "blocks.5.0.conv.weight conv_head.weight conv_head.bias",
        },
        CLASSIFIER,
    ),
    "timm-vgg11_bn": Case(  # its matcher cuts between a convolution and its own norm
        _timm("vgg11_bn"),
        _conv(5),
        "layout",
        {"block1": "features.0.weight features.1.running_mean", "block5": "features.26.weight pre_logits.fc1.weight"},
        {"head": "head.fc.weight head.fc.bias"},
    ),
    "timm-vit_tiny": Case(
        _timm("vit_tiny_patch16_224"), _tokens(12), "timm", {"block12": "blocks.11.norm1.weight norm.weight"}, VIT_STEM
    ),
    "timm-vit_tiny-without-head": Case(
        _timm("vit_tiny_patch16_224", num_classes=0), _blocks(12, "embedding", ""), "timm", {"block12": "norm.weight"}
    ),
    "timm-vit_clip": Case(
        _timm("vit_base_patch16_clip_224"),
        _tokens(12),
        "timm",
        {"block12": "norm.weight"},
        {
            "embedding": "cls_token pos_embed patch_embed.proj.weight norm_pre.weight norm_pre.bias",
            "head": "head.weight head.bias",
        },
    ),
    "timm-siglip-without-head": Case(  # attention pooling: in the tail of the matcher, but no classifier
        _timm("vit_base_patch16_siglip_224"),
        _blocks(12, "embedding", ""),
        "timm",
        {"block12": "blocks.11.norm1.weight norm.weight attn_pool.latent"},
    ),
    "timm-deit_tiny": Case(_timm("deit_tiny_patch16_224"), _tokens(12), "timm", {"block12": "norm.bias"}, VIT_STEM),
    "timm-deit_tiny_distilled": Case(
        _timm("deit_tiny_distilled_patch16_224"),
        _tokens(12),
        "timm",
        {"embedding": "dist_token", "block12": "norm.bias"},
        {"head": "head.weight head.bias head_dist.weight head_dist.bias"},
    ),
    "timm-swin_tiny": Case(
        _timm("swin_tiny_patch4_window7_224"),
        _tokens(4),
        "timm",
        {
            "block1": "layers.0.blocks.0.attn.relative_position_bias_table",
            "block2": "layers.1.downsample.reduction.weight",
            "block4": "norm.weight",
        },
        {"head": "head.fc.weight head.fc.bias"},
    ),
    "timm-levit": Case(
        _timm("levit_128s"),
        _tokens(3),
        "timm",
        {"embedding": "stem.conv1.linear.weight", "block3": "head.bn.running_mean"},
        {"head": "head.linear.weight head.linear.bias head_dist.linear.weight head_dist.linear.bias"},
    ),
    "timm-volo": Case(  # get_classifier() gives one of its two classifiers
        _timm("volo_d1_224"), _tokens(21), "timm", {"head": "aux_head.weight"}
    ),
    "timm-poolformer": Case(  # no matcher
        _timm("poolformer_s12"), _conv(4), "layout", {"block1": "stem.conv.weight", "block4": "head.norm.weight"}
    ),
    "hf-vit": Case(
        _hf("ViTForImageClassification", "ViTConfig", **IMAGE),
        _tokens(3),
        "transformers",
        {"embedding": "vit.embeddings.cls_token vit.embeddings.position_embeddings", "block3": "vit.layernorm.weight"},
        CLASSIFIER,
    ),
    "hf-vit-base-model": Case(
        _hf("ViTModel", "ViTConfig", **IMAGE),
        _blocks(3, "embedding", ""),
        "transformers",
        {"embedding": "embeddings.cls_token", "block3": "layernorm.weight pooler.dense.weight"},
    ),
    "hf-deit": Case(
        _hf("DeiTForImageClassification", "DeiTConfig", **IMAGE),
        _tokens(3),
        "transformers",
        {"embedding": "deit.embeddings.distillation_token", "block3": "deit.layernorm.bias"},
        CLASSIFIER,
    ),
    "hf-deit-teacher": Case(
        _hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", **IMAGE),
        _tokens(3),
        "transformers",
        {},
        {
            "head": "cls_classifier.weight cls_classifier.bias "
            "distillation_classifier.weight distillation_classifier.bias"
        },
    ),
    "hf-dinov2": Case(
        _hf("Dinov2ForImageClassification", "Dinov2Config", **IMAGE),
        _tokens(3),
        "transformers",
        {
            "embedding": "dinov2.embeddings.mask_token",
            "block1": "dinov2.encoder.layer.0.layer_scale1.lambda1",
            "block3": "dinov2.layernorm.weight",
        },
        CLASSIFIER,
    ),
    "hf-dinov3-base-model": Case(
        _hf("DINOv3ViTModel", "DINOv3ViTConfig", **IMAGE),
        _blocks(3, "embedding", ""),
        "transformers",
        {"embedding": "embeddings.cls_token", "block3": "norm.weight"},
    ),
    "hf-beit": Case(
        _hf("BeitForImageClassification", "BeitConfig", **IMAGE, use_relative_position_bias=True),
        _tokens(3),
        "transformers",
        {"embedding": "beit.embeddings.cls_token", "block3": "beit.pooler.layernorm.weight"},
        CLASSIFIER,
    ),
    "hf-swin": Case(
        _hf("SwinForImageClassification", "SwinConfig", **SWIN),
        _tokens(3),
        "transformers",
        {"block2": "swin.encoder.layers.0.downsample.reduction.weight", "block3": "swin.layernorm.weight"},
        CLASSIFIER,
    ),
    "hf-convnext": Case(
        _hf("ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 2, 1]),
        _conv(4),
        "transformers",
        {"block1": "convnext.embeddings.layernorm.weight", "block4": "convnext.layernorm.weight"},
        CLASSIFIER,
    ),
    "hf-resnet": Case(  # two stages of one width stay two stages
        _hf(
            "ResNetForImageClassification",
            "ResNetConfig",
            embedding_size=8,
            hidden_sizes=[8, 8, 16, 16],
            depths=[1] * 4,
        ),
        _conv(4),
        "transformers",
        {"block1": "resnet.embedder.embedder.normalization.running_mean"},
        {"head": "classifier.1.weight classifier.1.bias"},
    ),
    "hf-mobilenet_v2": Case(
        _hf("MobileNetV2ForImageClassification", "MobileNetV2Config"),
        _conv(6),
        "transformers",
        {
            "block1": "mobilenet_v2.conv_stem.first_conv.convolution.weight",
            "block6": "mobilenet_v2.conv_1x1.normalization.bias",
        },
        CLASSIFIER,
    ),
    "hf-clip-vision": Case(
        _hf("CLIPVisionModel", "CLIPVisionConfig", **IMAGE),
        _blocks(3, "embedding", ""),
        "transformers",
        {"embedding": "embeddings.class_embedding pre_layrnorm.weight", "block3": "post_layernorm.weight"},
    ),
    "hf-clip-vision-projection": Case(
        _hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", **IMAGE, projection_dim=16),
        _tokens(3),
        "transformers",
        {},
        {"head": "visual_projection.weight"},
    ),
    "hf-clip-classifier": Case(
        _clip("CLIPForImageClassification"),
        _tokens(3),
        "transformers",
        {"embedding": "vision_model.pre_layrnorm.bias", "block3": "vision_model.post_layernorm.weight"},
        CLASSIFIER,
    ),
    "hf-clip": Case(
        _clip("CLIPModel"),
        [
            *_blocks(3, "vision.embedding", "", "vision."),
            *_blocks(2, "text.embedding", "head", "text."),
        ],
        "transformers",
        {
            "vision.embedding": "vision_model.embeddings.class_embedding vision_model.pre_layrnorm.weight",
            "vision.block3": "vision_model.post_layernorm.weight",
            "text.embedding": "text_model.embeddings.token_embedding.weight",
            "text.block2": "text_model.final_layer_norm.weight",
        },
        {"head": "logit_scale visual_projection.weight text_projection.weight"},
    ),
    "hf-timm-wrapper": Case(
        _hf("TimmWrapperForImageClassification", "TimmWrapperConfig", architecture="resnet18", num_labels=3),
        _conv(4),
        "timm",
        {"block1": "timm_model.conv1.weight timm_model.bn1.running_mean timm_model.layer1.0.conv1.weight"},
        {"head": "timm_model.fc.weight timm_model.fc.bias"},
    ),
    "hf-bert": Case(
        _hf("BertForSequenceClassification", "BertConfig", **TEXT),
        _tokens(2),
        "transformers",
        {"embedding": "bert.embeddings.LayerNorm.weight", "block2": "bert.pooler.dense.weight"},
        CLASSIFIER,
    ),
    "hf-roberta": Case(  # its hidden map plays the part of BERT's pooler
        _hf("RobertaForSequenceClassification", "RobertaConfig", **TEXT, **IDS),
        _tokens(2),
        "transformers",
        {"block2": "classifier.dense.weight"},
        {"head": "classifier.out_proj.weight classifier.out_proj.bias"},
    ),
    "hf-llama": Case(
        _hf("LlamaForCausalLM", "LlamaConfig", **TEXT, **IDS, tie_word_embeddings=False),
        _tokens(2),
        "transformers",
        {"block2": "model.norm.weight"},
        {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"},
    ),
    "hf-llama-tied": Case(
        _hf("LlamaForCausalLM", "LlamaConfig", **TEXT, **IDS, tie_word_embeddings=True),
        _blocks(2, "embedding", ""),
        "transformers",
        {"block2": "model.norm.weight"},
        {"embedding": "model.embed_tokens.weight"},
    ),
    "hf-t5-tied": Case(
        _hf("T5ForConditionalGeneration", "T5Config", **T5),
        [*_blocks(2, "embedding", "", "encoder."), *_blocks(2, "", "", "decoder.")],
        "transformers",
        {"encoder.block2": "encoder.final_layer_norm.weight", "decoder.block2": "decoder.final_layer_norm.weight"},
        {"embedding": "shared.weight"},
    ),
    "hf-bart": Case(  # registers an embedding norm after the layers; its lm_head is shared, but has a bias of its own
        _hf("BartForConditionalGeneration", "BartConfig", **BART),
        [
            *_blocks(2, "embedding encoder.embedding", "", "encoder."),
            *_blocks(2, "decoder.embedding", "head", "decoder."),
        ],
        "transformers",
        {"decoder.embedding": "model.decoder.layernorm_embedding.weight model.decoder.embed_positions.weight"},
        {"embedding": "model.shared.weight", "head": "final_logits_bias"},
    ),
    "hf-t5-untied": Case(
        _t5_untied,
        [*_blocks(2, "embedding", "", "encoder."), *_blocks(2, "", "head", "decoder.")],
        "transformers",
        {},
        {"embedding": "shared.weight", "head": "lm_head.weight"},
    ),
    "torchvision-resnet50": Case(_vision("resnet50"), _conv(4), "torchvision", RESNET, FC),
    "torchvision-convnext_tiny": Case(
        _vision("convnext_tiny"),
        _conv(4),
        "torchvision",
        {
            "block1": "features.0.0.weight features.1.0.layer_scale",
            "block2": "features.2.1.weight",
            "block4": "classifier.0.weight",
        },
        {"head": "classifier.2.weight classifier.2.bias"},
    ),
    "torchvision-efficientnet_b0": Case(
        _vision("efficientnet_b0"),
        _conv(7),
        "torchvision",
        {"block1": "features.0.0.weight features.1.0.block.0.0.weight", "block7": "features.8.0.weight"},
        {"head": "classifier.1.weight classifier.1.bias"},
    ),
    "torchvision-mobilenet_v3_small": Case(
        _vision("mobilenet_v3_small"), _conv(5), "torchvision", {"block5": "classifier.0.weight features.12.0.weight"}
    ),
    "torchvision-vit_b_16": Case(
        _vision("vit_b_16"),
        _tokens(12),
        "torchvision",
        {"block12": "encoder.ln.weight"},
        {
            "embedding": "class_token conv_proj.weight conv_proj.bias encoder.pos_embedding",
            "head": "heads.head.weight heads.head.bias",
        },
    ),
    "torchvision-swin_t": Case(
        _vision("swin_t"),
        _tokens(4),
        "torchvision",
        {"embedding": "features.0.0.weight", "block2": "features.2.reduction.weight", "block4": "norm.weight"},
        {"head": "head.weight head.bias"},
    ),
    "torchvision-densenet121": Case(
        _vision("densenet121"),
        _conv(4),
        "torchvision",
        {"block1": "features.transition1.conv.weight", "block4": "features.norm5.weight"},
    ),
    "cifar-resnet26": Case(
        ResNet26,
        _conv(3),
        "layout",
        {"block1": "conv1.weight layer1.3.bn2.bias", "block3": "layer3.0.bn1.weight bn.weight bn.bias"},
        FC,
    ),
    "cifar-resnet32": Case(
        ResNet32,
        _conv(3),
        "layout",
        {
            "block1": "conv1.weight bn1.weight bn1.running_mean layer1.4.bn2.running_var",
            "block3": "layer3.4.conv2.weight",
        },
        {"head": "linear.weight linear.bias"},
    ),
}


def on_meta(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return build()


def tensors_of(model: nn.Module) -> list[str]:
    """Parameters and persistent buffers by PyTorch's own account, shared ones under their first name."""
    first = {id(tensor): name for name, tensor in reversed([*model.named_parameters(), *model.named_buffers()])}
    own = {
        name: tensor
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if first[id(tensor)] == name
    }
    return [name for name in model.state_dict(keep_vars=True) if name in own]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_blocks_of_real_networks(case: Case) -> None:
    model = on_meta(case.build)
    anatomy = anatomy_of(model)

    assert list(anatomy.names) == case.names
    assert anatomy.source == case.source
    for block, tensors in case.holds.items():
        assert set(tensors.split()) <= set(anatomy[block].tensors)
    for block, tensors in case.whole.items():
        assert set(tensors.split()) == set(anatomy[block].tensors)

    held = [tensor for block in anatomy for tensor in block.tensors]
    assert len(held) == len(set(held)), "a tensor in two blocks"
    assert set(held) == set(tensors_of(model)), "not total"
    assert sum(block.num_parameters for block in anatomy) == sum(p.numel() for p in model.parameters())
    order = {name: index for index, name in enumerate(model.state_dict())}
    assert all([*block.tensors] == sorted(block.tensors, key=order.__getitem__) for block in anatomy)


# -------------------------------------------------------------------------------------- one network, whichever library
FAMILIES = {
    "resnet50": (
        _timm("resnet50"),
        _vision("resnet50"),
        _hf("ResNetForImageClassification", "ResNetConfig", num_labels=1000),
    ),
    "convnext_tiny": (
        _timm("convnext_tiny"),
        _vision("convnext_tiny"),
        _hf("ConvNextForImageClassification", "ConvNextConfig", num_labels=1000),
    ),
    "swin_tiny": (
        _timm("swin_tiny_patch4_window7_224"),
        _vision("swin_t"),
        _hf("SwinForImageClassification", "SwinConfig", num_labels=1000),
    ),
    "vit_base": (
        _timm("vit_base_patch16_224"),
        _vision("vit_b_16"),
        _hf("ViTForImageClassification", "ViTConfig", num_labels=1000),
    ),
    "efficientnet_b0": (_timm("efficientnet_b0"), _vision("efficientnet_b0")),
    "densenet121": (_timm("densenet121"), _vision("densenet121")),
    "vgg11_bn": (_timm("vgg11_bn"), _vision("vgg11_bn")),
    "dinov2": (
        _timm("vit_small_patch14_dinov2", img_size=224),
        _hf("Dinov2Model", "Dinov2Config", hidden_size=384, num_attention_heads=6, image_size=224),
    ),
}


@pytest.mark.parametrize("builds", FAMILIES.values(), ids=FAMILIES.keys())
def test_a_block_is_the_same_weights_in_every_library(builds: tuple[Callable[[], nn.Module], ...]) -> None:
    sizes = []
    for build in builds:
        anatomy = anatomy_of(on_meta(build))
        mask_token = anatomy.tensors.count("embeddings.mask_token") * 384  # DINOv2's, which timm leaves out
        sizes.append([(b.name, b.num_parameters - mask_token * (b.name == "embedding")) for b in anatomy])
    assert all(other == sizes[0] for other in sizes[1:])


# ----------------------------------------------------------------------------------------------- parts, names, aliases
def test_stem_and_stage1_split_the_first_block_of_a_convolutional_network() -> None:
    anatomy = anatomy_of(ResNet32())
    assert set(anatomy["stem"].tensors) == {name for name in anatomy.tensors if name.startswith(("conv1", "bn1"))}
    assert all(name.startswith("layer1.") for name in anatomy["stage1"].tensors)
    assert set(anatomy["stem"].tensors + anatomy["stage1"].tensors) == set(anatomy["block1"].tensors)
    # conv1 16 * 3 * 3 * 3, bn1 weight and bias; running statistics are not parameters.
    assert anatomy["stem"].num_parameters == 16 * 27 + 2 * 16
    assert anatomy["stem"].modules == ("conv1", "bn1")
    assert sum(block.num_parameters for block in anatomy) == 464_154


def test_group_norm_network_has_the_documented_size() -> None:
    assert sum(block.num_parameters for block in anatomy_of(ResNet26())) == 366_938


def test_stem_of_a_transformer_is_its_embedding() -> None:
    anatomy = anatomy_of(on_meta(_timm("deit_tiny_patch16_224")))
    assert anatomy["stem"] is anatomy["embedding"]
    assert anatomy["embedding"].modules == ("patch_embed",)
    assert anatomy["embedding"].tensors[:2] == ("cls_token", "pos_embed")


def test_first_and_last() -> None:
    anatomy = anatomy_of(ResNet26())
    assert anatomy["first"] is anatomy["block1"]
    assert anatomy["last"] is anatomy["head"]
    assert "last" in anatomy
    assert anatomy["block2"] in anatomy
    assert "block4" not in anatomy
    assert len(anatomy) == 4


def test_shared_tensors_have_one_name_and_are_counted_once() -> None:
    model = Tied()
    anatomy = anatomy_of(model, blocks={"embedding": "embed", "block1": ["norm"]})
    assert anatomy.tensors == tuple(tensors_of(model))
    assert anatomy.aliases == {
        "out.weight": "embed.weight",
        **{f"again.{name}": f"norm.{name}" for name in model.norm.state_dict()},
    }
    assert anatomy.block_of("out.weight").name == "embedding"
    assert anatomy.block_of("again.running_mean").name == "block1"
    assert anatomy["embedding"].num_parameters == 32
    assert "scratch" not in anatomy.tensors


def test_tied_language_model_says_why_it_has_no_head() -> None:
    anatomy = anatomy_of(on_meta(CASES["hf-llama-tied"].build))
    assert anatomy.block_of("lm_head.weight").name == "embedding"
    with pytest.raises(
        UnknownTargetError, match=r"no classifier of its own.*lm_head.weight is model.embed_tokens.weight"
    ):
        anatomy["head"]
    with pytest.raises(KeyError):
        anatomy["last"]


def test_every_alias_of_a_tied_t5_leads_to_its_embedding() -> None:
    anatomy = anatomy_of(on_meta(CASES["hf-t5-tied"].build))
    names = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    assert {anatomy.block_of(name).name for name in names} == {"embedding"}


def test_plain_block_of_two_towers_names_both() -> None:
    anatomy = anatomy_of(on_meta(CASES["hf-clip"].build))
    with pytest.raises(UnknownTargetError, match=r"no block 'block1'; it has 'vision.block1' and 'text.block1'"):
        anatomy["block1"]


def test_unknown_names_come_with_near_misses() -> None:
    anatomy = anatomy_of(ResNet26())
    with pytest.raises(
        UnknownTargetError, match=r"did you mean 'block1'.*Blocks of this model.*: block1 \(.*block3 \(.*head \(650\)"
    ):
        anatomy["blok1"]
    with pytest.raises(UnknownTargetError, match="what comes before its first stage is 'stem'"):
        anatomy["embedding"]
    with pytest.raises(UnknownTargetError, match=r"did you mean 'layer1.0.conv1.weight'"):
        anatomy.block_of("layer1.0.conv1.wieght")


def test_table() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    assert str(anatomy_of(model, blocks={"block1": ["0", "1"], "head": "3"})).splitlines() == [
        "block   modules  tensors  parameters   share",
        "block1  0, 1           7         240   93.0%",
        "head    3              2          18    7.0%",
        "total                  9         258  100.0%",
        "source: spec",
    ]


def test_nothing_in_the_network_changes() -> None:
    model = ResNet32()
    before = {name: (id(t), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    anatomy_of(model)
    assert before == {name: (id(t), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}


def test_fast_enough_to_call_anywhere() -> None:
    model = on_meta(_timm("resnet50"))
    anatomy_of(model)
    start = time.perf_counter()
    anatomy_of(model)
    assert time.perf_counter() - start < 0.05


# ----------------------------------------------------------------------------------------------- networks nobody knows
def proposed_spec(message: str) -> dict[str, list[str]]:
    return eval(re.search(r"blocks=(\{.*\})", message, re.DOTALL)[1])


def test_unknown_network_shows_a_spec_that_works() -> None:
    model = Unknown()
    with pytest.raises(AnatomyError, match=r"(?s)Tried:.*timm.*transformers.*torchvision.*blocks=") as error:
        anatomy_of(model)
    spec = proposed_spec(str(error.value))
    assert spec == {"stem": ["scale"], "block1": ["enter"], "block2": ["middle"], "head": ["leave"]}
    assert anatomy_of(model, blocks=spec).names == ("stem", "block1", "block2", "head")


def test_masked_autoencoder_is_not_guessed() -> None:
    model = on_meta(_hf("ViTMAEForPreTraining", "ViTMAEConfig", **IMAGE, decoder_num_hidden_layers=1))
    with pytest.raises(AnatomyError, match=r"'decoder.decoder_layers' is a stack of modules outside the trunk 'vit'"):
        anatomy_of(model)


def test_last_linear_map_of_another_name_is_not_guessed() -> None:
    model = ResNet26()
    model.readout = model.fc
    del model.fc
    with pytest.raises(AnatomyError, match="cannot tell whether 'readout' is the classifier"):
        anatomy_of(model)


def test_raw_parameter_of_the_root_is_not_guessed() -> None:
    model = ResNet26()
    model.temperature = nn.Parameter(torch.ones(1))
    with pytest.raises(AnatomyError, match="cannot tell where the parameter 'temperature' belongs"):
        anatomy_of(model)


def test_matcher_that_fails_is_reported() -> None:
    model = on_meta(_timm("rdnet_tiny"))
    with pytest.raises(AnatomyError, match=r"group_matcher\(coarse=True\) raised AssertionError"):
        anatomy_of(model)


def test_network_without_tensors() -> None:
    with pytest.raises(AnatomyError, match="Identity has no parameters and no buffers"):
        anatomy_of(nn.Identity())


def test_removed_classifier_leaves_no_head() -> None:
    model = on_meta(_vision("resnet50"))
    model.fc = nn.Identity()
    assert anatomy_of(model).names == ("block1", "block2", "block3", "block4")


# ------------------------------------------------------------------------------------------------------- explicit spec
SPEC = {"stem": "conv1", "block1": "layer1", "block2": "layer2", "block3": ["layer3", "bn"], "head": "fc"}


def test_spec_wins_over_every_source() -> None:
    anatomy = anatomy_of(ResNet26(), blocks=SPEC)
    assert anatomy.source == "spec"
    assert list(anatomy.names) == list(SPEC)
    assert anatomy["stem"].tensors == ("conv1.weight",)
    assert "conv1.weight" not in anatomy["block1"].tensors


def test_spec_takes_tensors_and_keeps_the_order_of_the_model() -> None:
    spec = {"early": ["layer1.0.bn1.bias", "conv1"], "late": ["layer1.0.bn1.weight"]}
    rest = [n for n in tensors_of(ResNet26()) if n not in ("conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias")]
    anatomy = anatomy_of(ResNet26(), blocks={**spec, "rest": rest})
    assert anatomy["early"].tensors == ("conv1.weight", "layer1.0.bn1.bias")
    assert anatomy["rest"].tensors == tuple(rest)
    assert anatomy["early"].modules == ("conv1",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block3": "layer3"}, r"leaves out 2 of 77 tensors \(bn.weight, bn.bias\):\s+'bn': add it to 'block3', say"),
        (
            {"block2": ["layer2", "layer1.0"]},
            r"'layer1.0.bn1.weight' is in two blocks: in 'block1' by 'layer1' and in 'block2'",
        ),
        ({"block2": "layr2"}, r"names 'layr2', which is no module and no tensor.*did you mean 'layer2'"),
        ({"block2": ["layer2", ""]}, "names '', which is no module"),
        ({"block5": "layer3"}, r"'block5' comes where 'block4' is expected"),
    ],
)
def test_wrong_specs_say_what_to_change(change: dict[str, str | list[str]], message: str) -> None:
    spec = {**SPEC, **change}
    if "block5" in change:
        spec = {name: spec[name] for name in ("stem", "block1", "block2", "block3", "block5", "head")}
    with pytest.raises(AnatomyError, match=message):
        anatomy_of(ResNet26(), blocks=spec)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["block1", "stem"], "'stem' is what comes before every other block"),
        (["block1", "embedding"], "'embedding' is what comes before every other block"),
        (["head", "block1"], "'head' is the classifier: name it last"),
        (["block2", "block1"], "'block2' comes where 'block1' is expected"),
        (["all", "rest"], "'all' cannot name a block"),
        (["first2", "rest"], "'first2' cannot name a block"),
        (["last", "rest"], "'last' cannot name a block"),
        (["race", "rest"], "'race' cannot name a block"),
        (["auto-rgn", "rest"], "'auto-rgn' is no block name"),
        (["re:a", "rest"], "'re:a' is no block name"),
        (["1", "rest"], "'1' is no block name"),
        ([], "names no block"),
    ],
)
def test_block_names_do_not_collide_with_the_target_language(names: list[str], message: str) -> None:
    with pytest.raises(AnatomyError, match=message):
        anatomy_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), blocks={n: str(i) for i, n in enumerate(names)})


def test_block_of_shared_tensors_only_is_refused() -> None:
    with pytest.raises(
        AnatomyError, match=r"'head' holds no .* of its own \(out.weight is embed.weight\): leave it out"
    ):
        anatomy_of(Tied(), blocks={"embedding": "embed", "block1": "norm", "head": "out"})


def test_anatomy_built_by_hand_is_checked() -> None:
    with pytest.raises(AnatomyError, match="w in a and b"):
        Anatomy((Block("a", ("w",), 1), Block("b", ("w",), 1)))
    with pytest.raises(AnatomyError, match="given twice: a"):
        Anatomy((Block("a", ("w",), 1), Block("a", ("v",), 1)))
