r"""Copies PEFT's test modules with our cases in the place of its own lists.

Decorators read these lists while a module is imported, so they are replaced in the copy's text, each right after the
statement that binds it. Apart from that, only words of LoRA's are translated: `WORDS` and `PATCHES`.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = "peft_tests"
CASES = "conformance.cases"

# (module, bound name) -> the expression that takes its place; "*" is every module.
REPLACED = {
    ("test_custom_models", "TEST_CASES"): "cases.TEST_CASES",
    ("test_custom_models", "ALL_PEFT_CONFIG_CLASSES"): "[cases.LoraStandIn]",
    ("test_custom_models", "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES"): "cases.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES",
    ("test_custom_models", "MockTransformerWrapper"): "cases.with_networks(MockTransformerWrapper)",
    ("test_config", "ALL_CONFIG_CLASSES"): "[(cases.SurgicalConfig, {})]",
    ("test_tuners_utils", "LoraLayer"): "cases.SurgicalLayer",
    ("test_vision_models", "CONFIGS"): "cases.VISION_CONFIGS",
    ("*", "ALL_CONFIGS"): "cases.configs_for(__name__)",
    ("*", "TOKEN_CLS_CONFIGS"): 'cases.configs_for("TOKEN_CLS_CONFIGS")',
    ("*", "QA_CONFIGS"): 'cases.configs_for("QA_CONFIGS")',
    ("*", "LoraConfig"): "cases.LoraStandIn",
    ("*", "set_init_weights_false"): "cases.away_from_identity",
    ("*", "hub_online_once"): "cases.offline",
    ("*", "load_cat_image"): "cases.image",
}

# Where a test reaches into the LoRA layer that takes a module's place, it reaches into the module's deltas instead.
WORDS = [
    (r'\.lora_embedding_[AB]\.(\w+)"', r'.surgery.surgical_delta.\1.weight"'),
    (r"\.lora_(?:embedding_)?[AB]\b", ".surgery.surgical_delta"),
    (r'hasattr\((\w+), "lora_[AB]"\)', r'hasattr(\1, "surgery")'),
    (r'"lora_?" (not in|in) (n|k|key|name)\b', r'"surgical_" \1 \2'),
    (
        r"([\w.\[\]]*\b(?:lin|conv|emb)\d?)\.(active_adapters|enable_adapters|merge|merged_adapters)\b",
        r"cases.deltas_of(\1).\2",
    ),
    (r"\b(lin\d)\.base_layer\.weight\b", r'\1._parameters["weight"]'),
]

# (module, text, what takes its place): what a test says of LoRA, said of surgical adapters.
PATCHES = [
    # The generic variant: LoRA's asks for ranks and combinations by SVD.
    (
        "testing_common",
        "._test_weighted_combination_of_adapters_lora(m",
        "._test_weighted_combination_of_adapters_ia3(m",
    ),
    # LoRA has no delta of the bias, and the test names all trainable parameters.
    (
        "test_custom_models",
        "[name for name, param in model.named_parameters() if param.requires_grad]",
        "[n for n, p in model.named_parameters() if p.requires_grad and not re.search('surgical.*bias', n)]",
    ),
    (
        "test_custom_models",
        "for name in module.adapter_layer_names:",
        "module = cases.deltas_of(module)\n        for name in module.adapter_layer_names:",
    ),
    # One delta where LoRA has two factors.
    (
        "test_low_level_api",
        'del sd_before["model.decoder.layers.5.self_attn.q_proj.lora_B.weight"]',
        "",
    ),
    ("test_tuners_utils", '"LoraModel"', '"SurgicalModel"'),
    ("test_tuners_utils", '"LORA"', '"SURGICAL"'),
    *[("test_tuners_utils", f'"lora.{kind}"', '"SurgicalLayer"') for kind in ("Linear", "Embedding", "Conv2d")],
    ("test_tuners_utils", '["model.lin0"]', '["model.lin0.surgery"]'),
    (
        "test_tuners_utils",
        '["model.conv1", "model.emb0", "model.lin0", "model.lin1"]',
        '[f"model.{name}.surgery" for name in ("conv1", "emb0", "lin0", "lin1")]',
    ),
    ("test_tuners_utils", 'name == "emb0"', 'name == "emb0.surgery"'),
    (
        "test_tuners_utils",
        "name for name, module in model.named_modules() if isinstance(module, LoraLayer)",
        "name.removesuffix('.surgery') for name, module in model.named_modules() if isinstance(module, LoraLayer)",
    ),
    ("test_tuners_utils", "isinstance(proj, LoraLayer)", "isinstance(cases.deltas_of(proj), LoraLayer)"),
]


def copy_tests(source: Path, target: Path) -> Path:
    """Copy the test modules in ``source`` to a package in ``target``, rewritten.

    Returns:
        The package's folder.
    """
    package = target / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    for path in sorted(source.glob("*.py")):
        (package / path.name).write_text(rewritten(path.stem, path.read_text(encoding="utf-8")), encoding="utf-8")
    return package


def rewritten(module: str, text: str) -> str:
    """The text of one test module, translated, with the names in `REPLACED` bound anew.

    Raises:
        ValueError: A patch does not apply: PEFT's tests have changed.
    """
    for where, old, new in PATCHES:
        if where == module:
            if old not in text:
                raise ValueError(f"PEFT's {module} no longer contains {old!r}: adapt PATCHES.")
            text = text.replace(old, new)
    for pattern, replacement in WORDS:
        text = re.sub(pattern, replacement, text)
    lines, added = text.splitlines(), _bindings(module, ast.parse(text))
    for number in sorted(added, reverse=True):
        lines[number:number] = added[number]
    lines.insert(_first_import(text), f"import {CASES} as cases")
    return "\n".join(lines) + "\n"


def _first_import(text: str) -> int:
    """How many lines stand before the first import that may have others before it."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            return node.lineno - 1
    return 0


def _bindings(module: str, tree: ast.Module) -> dict[int, list[str]]:
    """Line number -> what to insert after it."""
    added: dict[int, list[str]] = {}
    for statement in tree.body:
        for name in _bound(statement):
            expression = REPLACED.get((module, name), REPLACED.get(("*", name)))
            if expression is not None:
                added.setdefault(statement.end_lineno or 0, []).append(f"{name} = {expression}")
    return added


def _bound(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.ImportFrom):
        return [alias.asname or alias.name for alias in statement.names]
    if isinstance(statement, (ast.ClassDef, ast.FunctionDef)):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    return []
