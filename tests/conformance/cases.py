"""What takes the place of PEFT's own lists of methods and models in its test modules: surgical adapters.

Imported inside the subprocess that runs PEFT's tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from PIL import Image
from torch import nn

from peft_surgical import SurgicalConfig
from peft_surgical.tuner.layer import SurgicalLayer
from peft_surgical.tuner.model import SurgicalModel

LORA_ONLY = ("r", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora")
NOISE = 0.1
# What LoRA targets in the families of transformers when it is told nothing: the query and value projections.
ATTENTION = r"re:.*\.(q_proj|v_proj|query|value|query_key_value|c_attn|q|v)\..*"


class Case(SurgicalConfig):
    """A `SurgicalConfig` that can be told to start away from the identity, as PEFT's tests tell every method.

    A fresh surgical adapter is the identity bit for bit, so "merge equals forward" would hold whatever merging does.
    """

    def __init__(self, *args: Any, init_weights: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.perturb = not init_weights


class _OrLora(type):
    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        left = set(kwargs) - set(LORA_ONLY) - {"init_lora_weights", "init_weights"}
        known = left <= {*SurgicalConfig.__dataclass_fields__, "bias"} and kwargs.get("bias", "none") == "none"
        if known:
            if not any(kwargs.get(key) for key in ("target_modules", "target", "tensor_names")):
                kwargs["target"] = ATTENTION
            return super().__call__(*args, **kwargs)
        return LoraConfig(*args, **kwargs)


class LoraStandIn(Case, metaclass=_OrLora):
    """`Case` under LoRA's signature, for the tests that name LoraConfig but ask nothing that only LoRA has.

    Called for what only LoRA has (DoRA, trainable tokens, ...), it makes a LoraConfig: PEFT's modules do so in
    decorators, while they are imported.
    """

    def __init__(self, *args: Any, init_lora_weights: bool = True, **kwargs: Any) -> None:
        kwargs.setdefault("init_weights", init_lora_weights)
        if kwargs.get("target_modules") and kwargs.get("tensor_names") is None:
            kwargs.pop("target", None)  # some tests add target_modules for one of the models
        super().__init__(*args, **{key: kwargs[key] for key in kwargs if key not in (*LORA_ONLY, "bias")})


def perturb_on_request() -> None:
    """Make ``init_weights=False`` mean small seeded noise in the deltas, in this process only."""
    original: Callable[..., None] = SurgicalModel.inject_adapter

    def inject_adapter(self: SurgicalModel, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        original(self, model, adapter_name, *args, **kwargs)
        if not getattr(self.peft_config[adapter_name], "perturb", False):
            return
        for name, parameter in model.named_parameters():
            if f".surgical_delta.{adapter_name}." in f".{name}" and not parameter.is_meta:
                noise = torch.randn(parameter.shape, dtype=torch.float32) * NOISE
                with torch.no_grad():
                    parameter.add_(noise.to(parameter))

    SurgicalModel.inject_adapter = inject_adapter  # type: ignore[method-assign]


# --- networks that PEFT's list has none of ---


class Norms(nn.Module):
    """BatchNorm, GroupNorm and InstanceNorm with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, bias=False)
        self.batch = nn.BatchNorm1d(4)
        self.group = nn.GroupNorm(2, 4)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.lin0 = nn.Linear(32, 2)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        X = X.to(self.dtype).reshape(-1, 1, 10) / 90
        X = self.instance(self.group(self.batch(self.conv(X))))
        return self.lin0(X.flatten(1)).log_softmax(-1)


class Tied(nn.Module):
    """Two linear modules that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 10)
        self.lin1 = nn.Linear(10, 10)
        self.lin1.weight = self.lin0.weight
        self.lin2 = nn.Linear(10, 2)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        X = self.lin0(X.to(self.dtype)).relu()
        return self.lin2(self.lin1(X).relu()).log_softmax(-1)


class Raw(nn.Module):
    """A parameter on the root module and one beside a child, as vision transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 10))
        self.stem = nn.Module()
        self.stem.scale = nn.Parameter(torch.randn(10))
        self.stem.lin0 = nn.Linear(10, 10)
        self.lin1 = nn.Linear(10, 2)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        X = self.stem.lin0(X.to(self.dtype) + self.token) * self.stem.scale
        return self.lin1(X.relu()).log_softmax(-1)


class Recurrent(nn.Module):
    """An LSTM, whose forward reads a list of its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 8, batch_first=True)
        self.lin0 = nn.Linear(8, 2)
        self.dtype = torch.float

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        out, _ = self.lstm(X.to(self.dtype).reshape(-1, 5, 2) / 90)
        return self.lin0(out[:, -1]).log_softmax(-1)


NETWORKS = {"Norms": Norms, "Tied": Tied, "Raw": Raw, "Recurrent": Recurrent}


def with_networks(wrapper: Any) -> Any:
    """PEFT's maker of custom models, which now also makes `NETWORKS`."""
    original = wrapper.from_pretrained

    def from_pretrained(model_id: str, dtype: torch.dtype | None = None) -> nn.Module:
        if model_id not in NETWORKS:
            return original(model_id, dtype=dtype)
        torch.manual_seed(0)
        # In eval mode, as transformers returns a model: no statistics move before there is an adapter.
        return NETWORKS[model_id]().to(dtype or torch.float32).eval()

    wrapper.from_pretrained = staticmethod(from_pretrained)
    return wrapper


def away_from_identity(config_cls: type, kwargs: dict[str, Any]) -> dict[str, Any]:
    """PEFT's ``set_init_weights_false`` for the cases here."""
    return {**kwargs, "init_weights": False}


@contextmanager
def offline(model_id: str) -> Iterator[None]:
    """PEFT's ``hub_online_once``: here the models lie in a local cache, and nothing is fetched."""
    yield


NORM_BLOCKS = {"block1": ["layernorm0", "lin0", "layernorm1"], "head": ["lin1"]}
MLP_BLOCKS = {"block1": ["lin0"], "head": ["lin1"]}
TEST_CASES = [
    (f"{model_id} {number} Surgical", model_id, Case, kwargs)
    for number, (model_id, kwargs) in enumerate(
        [
            ("MLP", {"target_modules": "lin0"}),
            ("MLP", {"target_modules": ["lin0"]}),
            ("MLP", {"target_modules": ["lin1"]}),
            ("MLP", {"target_modules": ["lin0", "lin1"]}),
            ("MLP", {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
            ("MLP", {"target_modules": ["lin0", "lin1"], "exclude_modules": ["lin1"]}),
            ("MLP", {"target": "block1", "blocks": MLP_BLOCKS}),
            ("MLP", {"target": "all - head", "blocks": MLP_BLOCKS}),
            ("MLP", {"target": "lin0.bias + head", "blocks": MLP_BLOCKS}),
            ("MLP", {"target": r"re:lin\d\.weight", "blocks": MLP_BLOCKS}),
            ("MLP", {"target": "all", "blocks": MLP_BLOCKS, "scale": 0.5}),
            ("EmbConv1D", {"target_modules": ["conv1d"]}),
            ("EmbConv1D", {"target_modules": ["emb"]}),
            ("EmbConv1D", {"target_modules": ["emb", "conv1d"]}),
            ("Conv1d", {"target_modules": ["conv1d"]}),
            ("Conv1dBigger", {"target_modules": ["conv1d"]}),
            ("Conv1dGroups", {"target_modules": ["conv1d"]}),
            ("Conv2d", {"target_modules": ["conv2d"]}),
            ("Conv2d", {"target_modules": ["conv2d", "lin0"]}),
            ("Conv2d1x1", {"target_modules": ["conv2d"]}),
            ("Conv2dGroups", {"target_modules": ["conv2d"]}),
            ("Conv2dGroups2", {"target_modules": ["conv2d"]}),
            ("Conv2d2", {"target_modules": ["conv2d", "lin1"]}),
            ("Conv3d", {"target_modules": ["conv3d"]}),
            ("Conv3d", {"target_modules": ["conv3d", "lin0"]}),
            ("MLP_LayerNorm", {"target_modules": ["layernorm0"]}),
            (
                "MLP_LayerNorm",
                {
                    "target": "*norm* + lin0.bias",
                    "blocks": {"block1": ["layernorm0", "lin0", "layernorm1"], "head": ["lin1"]},
                },
            ),
            ("MHA", {"target_modules": ["mha"]}),
            ("MHA", {"target_modules": ["mha", "lin0"]}),
            ("MHA", {"target_modules": ["mha.out_proj"]}),
            ("MlpUsingParameters", {"target_modules": ["lin0"]}),
            ("MlpUsingParameters", {"target_modules": ["lin0", "lin1"]}),
            ("Norms", {"target_modules": ["batch", "group", "instance"]}),
            ("Norms", {"target_modules": ["conv", "batch"], "norm_stats": "target"}),
            ("Norms", {"target_modules": ["conv"], "norm_stats": "all"}),
            ("Tied", {"target_modules": ["lin0"]}),
            ("Tied", {"target_modules": ["lin1", "lin2"]}),
            ("Raw", {"target": "token + stem", "blocks": {"block1": ["token", "stem"], "head": ["lin1"]}}),
            ("Recurrent", {"target_modules": ["lstm"]}),
        ],
        start=1,
    )
]

MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    (
        f"Surgical {label}",
        "surgical",
        Case,
        {"target_modules": first, "init_weights": False},
        {"target_modules": second, "init_weights": False},
    )
    for label, first, second in [
        ("same", ["lin0"], ["lin0"]),
        ("different", ["lin0"], ["lin1"]),
        ("overlapping", ["lin0", "lin1"], ["lin1"]),
    ]
]


TASKS = {
    "test_decoder_models": ("CAUSAL_LM", ["block1", "embedding", "last2"]),
    "test_encoder_decoder_models": ("SEQ_2_SEQ_LM", ["encoder.block1", "decoder.block1", "embedding"]),
    "test_feature_extraction_models": ("FEATURE_EXTRACTION", ["block1", "embedding"]),
    "test_seq_classifier": ("SEQ_CLS", ["block1", "embedding"]),
    "TOKEN_CLS_CONFIGS": ("TOKEN_CLS", ["block1", "embedding"]),
    "QA_CONFIGS": ("QUESTION_ANS", ["block1", "embedding"]),
}


def configs_for(name: str) -> list[tuple[type[SurgicalConfig], dict[str, Any]]]:
    """The (config class, arguments) of one of `TASKS`, in the form of PEFT's ALL_CONFIGS."""
    task, targets = TASKS[name.rpartition(".")[2]]
    return [(LoraStandIn, {"task_type": task, "target": target}) for target in targets]


VISION_CONFIGS = {
    "surgical": Case(target_modules=["convolution"], modules_to_save=["classifier", "normalization"]),
    "surgical block1": Case(target="block1", modules_to_save=["classifier", "normalization"]),
}


def deltas_of(module: nn.Module) -> nn.Module:
    """The `SurgicalLayer` of a tuned module, where PEFT's tests ask the module itself; any other module as it is."""
    surgery = getattr(module, "surgery", None)
    return surgery if isinstance(surgery, SurgicalLayer) else module


def image() -> Image.Image:
    """A picture, in the place of the one that PEFT's tests fetch."""
    pixels = torch.randint(0, 256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Image.fromarray(pixels.numpy())
