"""Cards: every number from a measurement, every missing field an error, and the examples as they are rendered now."""

import json
import re
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import yaml
from hub_server import metadata_errors
from huggingface_hub import ModelCard
from scripts import script

from peft_surgical import SurgicalConfig
from peft_surgical.errors import ConfigError
from peft_surgical.evaluation import Report, measure
from peft_surgical.hub import cards
from peft_surgical.hub.card_text import card_rows, choices, limits_of, parents_of, protocol_of, why
from peft_surgical.hub.cards import About, card_of, draw_figure

RENDER = Path(__file__).parents[1] / "hub_cards" / "render.py"
WEIGHTS = {
    "file_bytes": 79_568,
    "sha256": "ab" * 32,
    "tensors": 3,
    "parameters": 250,
    "dtypes": ["float32"],
    "statistics": 0,
    "blocks": [{"name": "block1", "tensors": 3, "parameters": 250, "norm": 1.5}],
    "largest": [{"name": "conv1.weight", "norm": 1.2}, {"name": "bn1.weight", "norm": 0.9}],
}
ABOUT = About(
    "me/frost",
    "apache-2.0",
    ("uoft-cs/cifar10",),
    "timm/resnet18.a1_in1k",
    base_revision="c" * 40,
    base_parameters=1000,
)
CONFIG = SurgicalConfig(target="block1", tensor_names=["conv1.weight"])


def measured(name="accuracy", value=0.8, dataset="test", seeds=(0,), selection="epoch by validation accuracy", n=1000):
    values = [value + 0.001 * i for i in range(len(seeds))]
    return measure(name, values, dataset=dataset, n=n, seeds=seeds, selection=selection)


def report(*measurements, target="block1", **settings):
    return Report("timm/resnet18.a1_in1k", target, measurements or (measured(),), settings)


def metadata(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)[1])


def section(card, title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", str(card), re.DOTALL | re.MULTILINE)[1]


# Rows


def test_rows_of_a_tuned_folder_and_its_base():
    found = card_rows(
        report(
            measured("accuracy before", 0.5, "validation", selection="none"),
            measured("accuracy", 0.9, "validation"),
            measured("accuracy before", 0.4, selection="none"),
            measured("accuracy", 0.7),
        )
    )
    assert [(r.dataset, r.tuned, r.own, r.metric, r.measured.value) for r in found] == [
        ("validation", "block1", True, "accuracy", 0.9),
        ("validation", "none", False, "accuracy", 0.5),
        ("test", "block1", True, "accuracy", 0.7),
        ("test", "none", False, "accuracy", 0.4),
    ]
    assert [row.is_test for row in found] == [False, False, True, True]


def test_rows_of_other_reports_stand_beside_those_of_the_adapter():
    others = [
        report(measured(value=0.6, dataset="frost"), measured(dataset="fog"), target="head"),
        report(measured(value=0.7, dataset="frost"), target="all"),
        report(measured(value=0.5, dataset="frost"), target="none"),
        report(measured(value=0.1, dataset="frost"), target="block1"),  # the adapter's own row counts
    ]
    own = report(measured(value=0.8, dataset="frost"), measured(value=0.4, dataset="frost, before tuning"))
    found = [(row.tuned, row.own, row.measured.value) for row in card_rows(own, others)]
    assert found == [("block1", True, 0.8), ("none", False, 0.4), ("all", False, 0.7), ("head", False, 0.6)]


def test_rows_of_a_study_which_names_them_in_the_metric():
    found = card_rows(
        report(measured("worst_group_accuracy of all", 0.6), measured("worst_group_accuracy of block1", 0.7))
    )
    assert [(r.metric, r.tuned, r.own) for r in found] == [
        ("worst_group_accuracy", "block1", True),
        ("worst_group_accuracy", "all", False),
    ]


# Metadata


def test_metadata():
    found = metadata(str(card_of(CONFIG, report(), WEIGHTS, ABOUT)))
    results = found.pop("model-index")
    assert found == {
        "base_model": "timm/resnet18.a1_in1k",
        "base_model_relation": "adapter",
        "datasets": ["uoft-cs/cifar10"],
        "library_name": "peft",
        "license": "apache-2.0",
        "load_with": "import peft_surgical",
        "metrics": ["accuracy"],
        "pipeline_tag": "image-classification",
        "tags": ["peft", "surgical-fine-tuning", "base_model:adapter:timm/resnet18.a1_in1k"],
        "weights_sha256": "ab" * 32,
    }
    ((model, (result,)),) = [(entry["name"], entry["results"]) for entry in results]
    assert model == "frost"
    assert result["task"] == {"type": "image-classification"}
    assert result["dataset"] == {"name": "test", "type": "uoft-cs/cifar10", "split": "test"}
    (metric,) = result["metrics"]
    assert (metric["type"], metric["value"]) == ("accuracy", 0.8)
    assert "fraction" in metric["name"]
    low, high = metric["args"]["interval_95"]
    assert low < 0.8 < high
    assert {key: metric["args"][key] for key in ("n", "seeds", "selection")} == {
        "n": 1000,
        "seeds": [0],
        "selection": "epoch by validation accuracy",
    }


def test_only_test_measurements_of_the_adapter_become_results():
    own = report(
        measured("accuracy before", 0.5, selection="none"),
        measured(dataset="validation", value=0.95),
        measured(dataset="frost", value=0.7, selection="oracle"),
        measured(dataset="fog", value=0.61),
        measured(dataset="snow", value=0.62),
    )
    card = card_of(CONFIG, own, WEIGHTS, replace(ABOUT, comparison=(report(measured(dataset="fog"), target="all"),)))
    results = metadata(str(card))["model-index"][0]["results"]
    # Two entries: results without a config of their own would be merged into one data set.
    assert [(r["dataset"]["name"], r["metrics"][0]["value"]) for r in results] == [("fog", 0.61), ("snow", 0.62)]


def test_without_a_report_there_is_no_number_and_the_card_says_so():
    card = card_of(CONFIG, None, WEIGHTS, ABOUT)
    found = metadata(str(card))
    assert not {"model-index", "metrics"} & set(found)
    assert section(card, "Results").strip() == "Nothing was measured: no report came with this adapter."
    assert "Nothing was measured" in section(card, "Limits")
    assert "## Protocol" not in str(card)


def test_data_and_bases_that_are_not_on_the_hub_are_named_in_words():
    about = replace(ABOUT, datasets=(), base="a network of our own", loading="model = ...", opens=False)
    found = metadata(str(card_of(CONFIG, report(), WEIGHTS, about)))
    assert not {"datasets", "base_model", "base_model_relation"} & set(found)
    assert found["model-index"][0]["results"][0]["dataset"]["type"] == "imagefolder"


def test_the_metadata_survives_huggingface_hub_and_passes_the_hubs_rules():
    text = str(card_of(CONFIG, report(), WEIGHTS, ABOUT))
    again = ModelCard(text)
    assert str(again) == text
    assert again.data.eval_results[0].metric_value == 0.8
    assert metadata_errors(text) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"license": "my-own"}, "license"),
        ({"pipeline_tag": "surgery"}, "pipeline_tag"),
        ({"base_model": "a folder"}, "base_model"),
        ({"tags": "peft"}, "tags"),
        ({"model-index": [{"name": "x", "results": [{"dataset": {"name": "y"}}]}]}, "dataset"),
    ],
)
def test_the_stand_in_for_the_hubs_check_can_fail(change, said):
    plain = metadata(str(card_of(CONFIG, report(), WEIGHTS, ABOUT)))
    text = f"---\n{yaml.safe_dump({**plain, **change})}\n---\n"
    assert any(said in error for error in metadata_errors(text))


# Prose


def test_a_missing_field_is_an_error_that_says_how_to_give_it():
    with pytest.raises(ConfigError, match=r"me/frost lacks license, .*license=.*; datasets, .*datasets=\[\].*; base, "):
        card_of(CONFIG, report(), WEIGHTS, About("me/frost"))
    with pytest.raises(ConfigError, match=r"me/frost lacks base, "):
        card_of(CONFIG, report(), WEIGHTS, About("me/frost", complete=False))
    with pytest.raises(ConfigError, match=r"lacks license_name, .*license_name="):
        card_of(CONFIG, report(), WEIGHTS, replace(ABOUT, license="other"))
    with pytest.raises(ConfigError, match="lacks loading, the lines of Python"):
        card_of(CONFIG, report(), WEIGHTS, replace(ABOUT, opens=False))


def test_a_name_that_the_template_uses_and_nothing_gives_is_an_error():
    with pytest.raises(jinja2.UndefinedError, match="'nothing' is undefined"):
        cards._environment().from_string("{{ nothing }}").render()


def test_what_was_tuned():
    config = SurgicalConfig(
        target=["block1", "head"],
        scale=0.5,
        delta_dtype="bfloat16",
        modules_to_save=["fc"],
        tensor_names=["conv1.weight"],
    )
    modules = [{"name": "conv1", "parameters": 200, "norm": 1.0}, {"name": "fc", "parameters": 50, "norm": 2.0}]
    weights = {name: value for name, value in WEIGHTS.items() if name != "blocks"}
    weights |= {"dtypes": ["bfloat16"], "modules": modules}
    text = str(card_of(config, report(moved={"block1": 0.042, "block2": 0.0, "block10": 0.01}), weights, ABOUT))
    for line in (
        "| target | `block1 + head` |",
        "| base | [timm/resnet18.a1_in1k](https://huggingface.co/timm/resnet18.a1_in1k), commit `cccccccccccc` |",
        "| size | 3 tensors, 250 parameters: 25.0 % of the base's 1,000 |",
        "| saved whole | `fc` |",
        "| moved | `block1` by 4.2 %, `block10` by 1.0 % (L2 norm of the change over that of the block) |",
        "| scale | 0.5 |",
        "| file | `adapter_model.safetensors`, 79.6 kB, bfloat16 |",
        f"| SHA-256 | `{'ab' * 32}` |",
        "- The deltas are scaled by 0.5: between the base (0) and what was trained (1).",
        "- The deltas are rounded to bfloat16.",
    ):
        assert line in text.splitlines()


@pytest.mark.parametrize("policy", ["frozen", "target", "all"])
def test_the_norm_policy_is_said(policy):
    config = SurgicalConfig(target="block1", norm_stats=policy)
    assert re.search(rf"^\| norm policy \| {policy}: ", str(card_of(config, None, WEIGHTS, ABOUT)), re.MULTILINE)


def test_the_table_is_in_percent_with_all_that_belongs_to_a_number():
    card = card_of(CONFIG, report(measured(seeds=(0, 1, 2), value=0.8)), WEIGHTS, ABOUT)
    row = next(line for line in section(card, "Results").splitlines() if line.startswith("| **block1**"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["accuracy", "test", "80.1"]
    # Student's t by hand: 0.801 ± 4.303 * 0.001 / sqrt(3).
    assert cells[4] == "79.9 to 80.3 (Student's t over the seeds)"
    assert cells[5:] == ["1000", "0, 1, 2", "epoch by validation accuracy"]


def test_text_from_reports_stays_in_its_cell():
    card = card_of(CONFIG, report(measured(dataset="a|b\nc")), WEIGHTS, ABOUT)
    row = next(line for line in section(card, "Results").splitlines() if line.startswith("| **block1**"))
    assert "| a\\|b c |" in row


SCORES = {
    "asked": "auto-rgn",
    "criterion": "rgn",
    "block_scores": {"block1": 0.5, "block10": 0.1, "block2": 0.25, "embedding": 0.3, "head": 0.7},
    "num_samples": 160,
    "num_batches": 5,
    "uses_labels": True,
    "split": "tuning",
}


HOSTILE = "<script>alert(1)</script>![x](https://tracker/x.png)`|\x1b[2J\n# owned"


def test_text_of_strangers_makes_no_html_link_image_or_heading():
    selection = {
        "asked": HOSTILE,
        "criterion": HOSTILE,
        "block_scores": {HOSTILE: 0.5},
        "num_samples": 3,
        "num_batches": 1,
        "split": HOSTILE,
        "validation": {HOSTILE: 0.5},
        "parents": [HOSTILE],
    }
    rows = [measured(dataset=HOSTILE, selection=HOSTILE), measured(name=HOSTILE.replace("accuracy", ""))]
    texts = [report(*rows, dataset=HOSTILE, moved={HOSTILE: 0.1}, target=HOSTILE).to_markdown()]
    for choice in (selection, {key: value for key, value in selection.items() if key != "parents"}):
        config = replace(CONFIG, selection=choice)
        texts.append(str(card_of(config, report(*rows, moved={HOSTILE: 0.1}, dataset=HOSTILE), WEIGHTS, ABOUT)))
    for text in texts:
        text = text.rpartition("\n---\n")[2]  # the metadata is YAML
        spans = re.sub(r"`[^`\n]*`", "", text)
        assert "<script" not in spans
        assert "](https://tracker" not in spans
        assert "\n# owned" not in text
        assert "\x1b" not in text


def test_why_by_scores_in_the_order_in_which_data_flows():
    config = SurgicalConfig(target="head", selection=SCORES)
    assert "`auto-rgn` was asked for" in why(config)
    assert "on 160 tuning images in 5 batches, with their labels" in why(config)
    (table,) = choices(config)
    assert [name for name, _ in table.rows] == ["embedding", "block1", "block2", "block10", "head"]
    assert "| block1 | 0.5 |" in section(card_of(config, None, WEIGHTS, ABOUT), "Why this part")


def test_why_by_a_search_that_scores_had_nominated_for():
    said = {"asked": "auto", "chosen": "block1", "validation": {"block1, lr 0.001": 0.9, "none": 0.5}, "scores": SCORES}
    config = SurgicalConfig(target="block1", selection=said)
    assert "`auto` was asked for, which trains candidates" in why(config)
    text = section(card_of(config, None, WEIGHTS, ABOUT), "Why this part")
    assert "| block1, lr 0.001 | 90.0 |" in text
    assert "| head | 0.7 |" in text


def test_an_oracles_choice_is_called_one():
    config = SurgicalConfig(target="block1", selection={**SCORES, "split": "test"})
    oracle = "was selected on test images: an oracle's choice"
    assert any(oracle in line for line in limits_of(config, None, []))
    assert not any(oracle in line for line in limits_of(CONFIG, report(), card_rows(report())))
    own = report(measured(selection="target: oracle"))
    assert any(oracle in line for line in limits_of(CONFIG, own, card_rows(own)))


def test_no_record_of_a_choice():
    assert why(CONFIG) == "The target was given by name; no choice from data is recorded."
    assert choices(CONFIG) == []


@pytest.mark.parametrize("nested", [True, False])
def test_parents_of_a_combined_adapter(nested):
    rows = [
        {"adapter": "lab/fog", "weight": 0.5, "scale": 1.0, "sha256": "12" * 32},
        {"adapter": "site-b", "weight": -1.0},
        "lab/snow",
    ]
    said = {"method": "ties", "density": 0.2, "parents": rows}
    config = SurgicalConfig(target="block1", selection={"combined": said} if nested else said)
    assert parents_of(config) == [
        f"[lab/fog](https://huggingface.co/lab/fog) (weight 0.5, scale 1, SHA-256 `{'12' * 6}...`)",
        "`site-b` (weight -1)",
        "[lab/snow](https://huggingface.co/lab/snow)",
    ]
    assert "combined from others by `ties` (density 0.2)" in why(config)
    text = str(card_of(config, None, WEIGHTS, ABOUT))
    assert "\nCombined from:\n\n- [lab/fog]" in text
    assert "Combined from" not in str(card_of(CONFIG, None, WEIGHTS, ABOUT))


def test_protocol_shows_what_a_report_says_and_no_more():
    found = dict(
        protocol_of(
            report(
                lr=1e-3, epochs=15, precision=None, images={"tuning": 100, "validation": 20}, base="0123", seeds=[0, 1]
            )
        )
    )
    assert found == {"learning rate": "0.001", "epochs": "15", "images": "tuning 100, validation 20"}


def test_limits_name_the_seed_and_what_was_not_measured():
    own = report(measured(seeds=(0, 1, 2)), adapter={"seed": 2})
    found = limits_of(CONFIG, own, card_rows(own))
    assert any("runs of 3 seeds; the adapter in this repository is of seed 2." in line for line in found)
    assert "What it makes the base forget was not measured." in found
    own = report(measured(), measured(dataset="source old, test"))
    assert not any("forget" in line for line in limits_of(CONFIG, own, card_rows(own)))


def test_the_citation():
    text = section(card_of(CONFIG, None, WEIGHTS, ABOUT), "Citation")
    for part in (
        "title     = {Surgical Fine-Tuning Improves Adaptation to Distribution Shifts}",
        "Yoonho Lee and Annie S. Chen and Fahim Tajwar and Ananya Kumar and Huaxiu Yao and Percy Liang and Chelsea",
        "year      = {2023}",
        "arXiv:2210.11466",
    ):
        assert part in text


def test_nothing_is_left_to_be_filled_in():
    text = str(card_of(CONFIG, report(), WEIGHTS, ABOUT))
    assert not re.search(r"\[More Information|TODO|\{\{|\{%|\bNone\b", text)


def test_the_figure_is_shown_where_there_is_one(tmp_path):
    pytest.importorskip("matplotlib")
    draw_figure(card_rows(report()), WEIGHTS, [("block1", 0.1), ("block2", 0.0)], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert "](figure.png)" in str(card_of(CONFIG, report(), WEIGHTS, replace(ABOUT, figure="figure.png")))
    assert "](" not in section(card_of(CONFIG, report(), WEIGHTS, ABOUT), "Results")


def test_the_template_is_in_the_package():
    assert (Path(cards.__file__).parent / "templates" / cards.TEMPLATE).is_file()


# The examples


@pytest.fixture(scope="module")
def render():
    return script("hub_cards", "render.py")


def test_every_example_is_as_it_is_rendered_now(render, capsys):
    assert render.main(["--check"]) == 0, capsys.readouterr().out
    there = {file.stem for file in RENDER.parent.glob("*.md")} - {"README"}
    assert there == set(render.RECIPES) == {file.stem for file in (RENDER.parent / "inputs").glob("*.json")}


def test_a_changed_number_is_noticed(render, monkeypatch, capsys):
    plain = render.inputs("digits")
    plain["reports"]["block1"]["measurements"][0]["value"] -= 0.001
    monkeypatch.setattr(render, "inputs", lambda name: plain if name == "digits" else json.loads(read_input(name)))
    assert render.main(["--check"]) == 1
    assert capsys.readouterr().out.strip() == "digits.md differs"


def read_input(name):
    return (RENDER.parent / "inputs" / f"{name}.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["cifar10c", "digits"])
def test_the_hub_would_take_the_examples(name):
    text = (RENDER.parent / f"{name}.md").read_text(encoding="utf-8")
    assert metadata_errors(text) == []
    assert str(ModelCard(text)) == text


def test_the_demos_block_was_chosen_on_test_images_so_its_number_is_no_result(render):
    text = (RENDER.parent / "digits.md").read_text(encoding="utf-8")
    assert "model-index" not in metadata(text)
    assert "an oracle's choice" in text
