"""The tuner on real architectures, bit for bit against a plain copy whose parameters are overwritten."""

import copy

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from peft_surgical import SurgicalConfig, anatomy_of

pytestmark = pytest.mark.slow

TIMM = {
    "resnet26": {},
    "resnetv2_50": {},
    "convnext_atto": {},
    "efficientnet_b0": {},
    "mobilenetv3_small_050": {},
    "regnety_002": {},
    "densenet121": {},
    "nf_resnet26": {},
    "edgenext_xx_small": {},
    "vit_tiny_patch16_224": {"img_size": 64},
    "vit_base_patch16_clip_224": {"img_size": 64, "depth": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "beit_base_patch16_224": {"img_size": 64, "depth": 2},
    "swin_tiny_patch4_window7_224": {"img_size": 112},
    "swinv2_tiny_window8_256": {"img_size": 64, "window_size": 2},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "coatnet_0_rw_224": {"img_size": 64},
    "xcit_nano_12_p16_224": {"img_size": 64},
    "cait_xxs24_224": {"img_size": 64},
    "levit_128s": {"size": 224},
    # One small network of further families; with the others, sixty and more.
    "bat_resnext26ts": {"size": 256},
    "botnet26t_256": {"size": 256},
    "convit_tiny": {"size": 224},
    "convmixer_768_32": {"size": 64},
    "cspresnet50": {},
    "crossvit_tiny_240": {"size": 240},
    "darknet17": {},
    "davit_tiny": {},
    "dla34": {},
    "dm_nfnet_f0": {},
    "dpn48b": {},
    "efficientformerv2_s0": {"size": 224},
    "efficientvit_b0": {},
    "fastvit_t8": {},
    "fbnetc_100": {},
    "focalnet_tiny_srf": {},
    "gcvit_xxtiny": {"size": 224},
    "gernet_s": {},
    "ghostnet_050": {},
    "gmlp_ti16_224": {"size": 224},
    "hardcorenas_a": {},
    "hgnetv2_b0": {},
    "hrnet_w18_small": {},
    "inception_next_atto": {},
    "inception_v3": {"size": 128},
    "lcnet_035": {},
    "maxvit_rmlp_pico_rw_256": {"size": 256},
    "mixer_s32_224": {"size": 224},
    "mnasnet_050": {},
    "mobileone_s0": {},
    "mobilevit_xxs": {},
    "mobilevitv2_050": {},
    "nest_tiny": {"size": 224},
    "poolformer_s12": {},
    "pvt_v2_b0": {},
    "repghostnet_050": {},
    "repvgg_a0": {},
    "repvit_m0_9": {},
    "res2net50_14w_8s": {},
    "resmlp_12_224": {"size": 224},
    "rexnet_100": {},
    "selecsls42": {},
    "semnasnet_050": {},
    "skresnet18": {},
    "tf_mixnet_s": {},
    "tiny_vit_5m_224": {"size": 224},
    "tinynet_e": {},
    "tresnet_m": {},
    "twins_svt_small": {"size": 224},
    "vgg11_bn": {},
    "visformer_tiny": {"size": 224},
    "vovnet39a": {},
    "xception41": {"size": 128},
}
TORCHVISION = {"resnet18": 64, "convnext_tiny": 64, "efficientnet_b0": 64, "swin_t": 64, "shufflenet_v2_x0_5": 64}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
VISION = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 5}
CLIP = {
    "text_config": {**SMALL, "vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 1, "bos_token_id": 0},
    "vision_config": {**SMALL, "image_size": 32, "patch_size": 8},
    "projection_dim": 16,
    "num_labels": 5,
}
PIXELS = {"pixel_values": torch.randn(2, 3, 32, 32)}
TOKENS = {"input_ids": torch.tensor([[2, 3, 4, 1], [2, 5, 4, 1]])}
TRANSFORMERS = {
    "ViT": ("ViTForImageClassification", "ViTConfig", VISION, PIXELS),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", VISION, PIXELS),
    "DINOv2": ("Dinov2ForImageClassification", "Dinov2Config", VISION, PIXELS),
    "BEiT": ("BeitForImageClassification", "BeitConfig", {**VISION, "use_relative_position_bias": True}, PIXELS),
    "Swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        PIXELS,
    ),
    "ConvNeXt": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
        PIXELS,
    ),
    "ResNet": (
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        PIXELS,
    ),
    "CLIP": ("CLIPModel", "CLIPConfig", CLIP, {**PIXELS, **TOKENS}),
    "CLIP classifier": ("CLIPForImageClassification", "CLIPConfig", CLIP, PIXELS),
    "BERT": ("BertForSequenceClassification", "BertConfig", {**SMALL, "vocab_size": 50}, TOKENS),
    "Llama": ("LlamaForCausalLM", "LlamaConfig", {**SMALL, "vocab_size": 50}, TOKENS),
    "T5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 50},
        {**TOKENS, "decoder_input_ids": torch.tensor([[0, 3], [0, 4]])},
    ),
}


def networks():
    for name, settings in TIMM.items():
        yield pytest.param("timm", name, settings, id=f"timm-{name}")
    for name, size in TORCHVISION.items():
        yield pytest.param("torchvision", name, {"size": size}, id=f"torchvision-{name}")
    for name in TRANSFORMERS:
        yield pytest.param("transformers", name, {}, id=f"transformers-{name}")


def build(library, name, settings):
    if library == "transformers":
        model, config, values, inputs = TRANSFORMERS[name]
        return getattr(transformers, model)(getattr(transformers, config)(**values)).eval(), inputs
    size = settings.get("size") or settings.get("img_size") or 64
    inputs = torch.randn(2, 3, size, size)
    if library == "timm":
        timm = pytest.importorskip("timm")
        rest = {key: value for key, value in settings.items() if key != "size"}
        return timm.create_model(name, num_classes=5, **rest).eval(), inputs
    torchvision = pytest.importorskip("torchvision")
    return torchvision.models.get_model(name, num_classes=5).eval(), inputs


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    members = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for member in members for tensor in flat(member)]


def call(model, inputs):
    return flat(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def equal(first, second):
    return len(first) == len(second) > 0 and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore")  # the libraries' own
@pytest.mark.parametrize(("library", "name", "settings"), networks())
def test_all_tensors_of_an_architecture(library, name, settings, tmp_path):
    network, inputs = build(library, name, settings)
    base = copy.deepcopy(network)
    with torch.no_grad():
        before = call(network, inputs)
    model = get_peft_model(network, SurgicalConfig(target="re:.*")).eval()
    with torch.no_grad():
        assert equal(call(model, inputs), before)

    # Kernels on the CPU depend on requires_grad, so the copy is frozen while outputs are compared.
    plain = copy.deepcopy(base).requires_grad_(False)
    tensors, deltas = dict(plain.named_parameters()), {}
    for key, parameter in model.named_parameters():
        if ".surgical_delta." in f".{key}":
            parameter.data = 0.02 * torch.randn_like(parameter)
            own = key.removeprefix("base_model.model.").replace("surgery.surgical_delta.default.", "")
            deltas[own] = parameter
            tensors[own].data += parameter.data
    assert deltas.keys() == tensors.keys()
    model.train()  # LeViT forgets what it computed from its biases
    model.eval()
    with torch.no_grad():
        tuned = call(plain, inputs)
        assert equal(call(model, inputs), tuned)

    plain.requires_grad_(True)
    for one in (model, plain):
        sum(out.pow(2).sum() for out in call(one, inputs) if out.requires_grad).backward()
    for own, delta in deltas.items():
        grad = tensors[own].grad
        if grad is None:  # a parameter that the network never uses, such as DINOv2's mask_token
            assert delta.grad is None
        else:
            assert torch.allclose(delta.grad, grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max())), own

    with torch.no_grad():
        model.merge_adapter()
        assert equal(call(model, inputs), tuned)
        model.unmerge_adapter()
        assert equal(call(model, inputs), tuned)
        with model.disable_adapter():
            assert equal(call(model, inputs), before)
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert equal(call(again, inputs), tuned)
        merged = model.merge_and_unload()
        assert equal(call(merged, inputs), tuned)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]


def step(model, inputs, parameters):
    """One step of SGD on the mean square of the outputs less one, in eval(): dropout draws nothing.

    Random weights with BatchNorm in eval() give outputs of up to 1e14: they are scaled, and gradients clipped.
    """
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    outputs = [out.float() for out in call(model, inputs)]
    sum((out / out.detach().abs().max().clamp_min(1e-6) - 1).pow(2).mean() for out in outputs).backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("library", "name", "settings"), networks())
def test_a_full_cycle_on_each_part_of_an_architecture(library, name, settings, tmp_path):
    """Wrap, one step, compare with the network tuned by hand, disable, save, reload, merge, unload."""
    network, inputs = build(library, name, settings)
    base = copy.deepcopy(network).requires_grad_(False)
    anatomy = anatomy_of(network)
    numbered = [block for block in anatomy.names if "block" in block]
    parts = {numbered[0], numbered[len(numbered) // 2], *({"head", "embedding"} & {*anatomy.names})}
    with torch.no_grad():
        before = call(base, inputs)
    moved = False  # random weights may pass nothing on, such as a head of zeros
    for part in sorted(parts):
        by_hand, tuned = copy.deepcopy(base), {*anatomy[part].tensors}
        model = get_peft_model(copy.deepcopy(base), SurgicalConfig(target=part)).eval()
        for own, parameter in by_hand.named_parameters():
            parameter.requires_grad_(own in tuned and parameter.is_floating_point())
        step(by_hand, inputs, [p for p in by_hand.parameters() if p.requires_grad])
        step(model, inputs, [p for p in model.parameters() if p.requires_grad])
        model.train()  # the statistics stay, and LeViT forgets what it computed from its biases
        model.eval()
        by_hand.train()
        by_hand.requires_grad_(False).eval()
        with torch.no_grad():
            found, wanted = call(model, inputs), call(by_hand, inputs)
            for one, other in zip(found, wanted, strict=True):
                assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max())), part
            moved |= not equal(found, before)
            with model.disable_adapter():
                assert equal(call(model, inputs), before), part
            model.save_pretrained(tmp_path / part)
            again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / part)
            assert equal(call(again, inputs), found), part
            assert equal(call(again.merge_and_unload(), inputs), found), part
            plain = model.unload()
            assert equal(call(plain, inputs), before), part
        assert [type(module) for module in plain.modules()] == [type(module) for module in base.modules()]
    assert moved


@pytest.mark.filterwarnings("ignore")
def test_mixed_batches_on_windows():
    network, inputs = build("timm", "swin_tiny_patch4_window7_224", {"img_size": 112})
    model = get_peft_model(network, SurgicalConfig(target="*.attn")).eval()
    for name, parameter in model.named_parameters():
        if ".surgical_delta." in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    with torch.no_grad():
        mixed, tuned = model(inputs, adapter_names=["default", "__base__"]), model(inputs)
        with model.disable_adapter():
            base = model(inputs)
    assert torch.allclose(mixed[0], tuned[0], atol=1e-5)
    assert torch.allclose(mixed[1], base[1], atol=1e-5)
    assert not torch.allclose(tuned[1], base[1], atol=1e-3)


def test_torchvision_multihead_attention_reads_the_tuned_projection():
    torchvision = pytest.importorskip("torchvision")
    network = torchvision.models.VisionTransformer(32, 8, 1, 2, 16, 32, num_classes=5).eval()
    model = get_peft_model(network, SurgicalConfig(target="re:.*out_proj.*"))
    out = model(torch.randn(2, 3, 32, 32))
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert isinstance(network.encoder.layers[0].self_attention, nn.MultiheadAttention)
