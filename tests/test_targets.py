import contextlib
import copy
import doctest
import fnmatch
import pickle
import re
import time
from dataclasses import FrozenInstanceError
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import match_target_against_key

from peft_surgical.blocks import Anatomy, Block, Name, parse, parsing, paths_matched, resolve, sources
from peft_surgical.blocks.parsing import DATA_TARGETS, Count, FromData, Pattern, Range
from peft_surgical.errors import TargetError, UnknownTargetError, UnresolvedTargetError

fast = settings(derandomize=True, deadline=None, max_examples=150)


def unit(path):
    return (f"{path}.conv1.weight", f"{path}.bn1.weight", f"{path}.bn1.bias", f"{path}.bn1.running_mean")


STEM = ("conv1.weight", "bn1.weight", "bn1.bias")
FC = ("fc.weight", "fc.bias")
CONV = Anatomy(
    blocks=(
        Block("block1", STEM + unit("layer1.0"), 1200, ("conv1", "bn1", "layer1")),
        Block("block2", unit("layer2.0") + unit("layer2.1"), 34567, ("layer2",)),
        Block("block3", unit("layer3.0"), 300, ("layer3",)),
        Block("block4", unit("layer4.0"), 400, ("layer4",)),
        Block("head", FC, 50, ("fc",)),
    ),
    parts=(Block("stem", STEM, 400), Block("stage1", unit("layer1.0"), 800)),
)
EMBEDDING = ("cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias")
VIT = Anatomy(
    blocks=(
        Block("embedding", EMBEDDING, 80, ("patch_embed",)),
        *(Block(f"block{n + 1}", (f"blocks.{n}.norm1.weight", f"blocks.{n}.attn.qkv.weight"), 12) for n in range(11)),
        Block("block12", ("blocks.11.norm1.weight", "blocks.11.attn.qkv.weight", "norm.weight"), 13),
        Block("head", ("head.weight", "head.bias"), 9),
    )
)
TOWERS = Anatomy(
    blocks=(
        Block("vision.embedding", ("vision_model.patch.weight",), 5),
        Block("vision.block1", ("vision_model.layers.0.weight",), 5),
        Block("vision.block2", ("vision_model.layers.1.weight",), 5),
        Block("vision.head", ("vision_model.head.weight",), 5),
        Block("text.embedding", ("text_model.token.weight",), 5),
        Block("text.block1", ("text_model.layers.0.weight",), 5),
        Block("text.block2", ("text_model.layers.1.weight",), 5),
    )
)
TIED = Anatomy(
    blocks=(
        Block("embedding", ("model.embed_tokens.weight",), 64),
        Block("block1", ("model.layers.0.weight",), 8),
        Block("head", (), 0),
    ),
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
)
SPEC = Anatomy(
    blocks=(
        Block("early", ("a.weight", "my-mod.weight"), 2),
        Block("fc", ("b.weight",), 1),
        Block("late.x_1", ("fc.weight", "race.weight", "a b.weight"), 3),
    )
)
ANATOMIES = {"conv": CONV, "vit": VIT, "towers": TOWERS, "tied": TIED, "spec": SPEC}


def tensors(anatomy):
    return tuple(name for block in anatomy for name in block.tensors)


def blocks(anatomy, *names):
    return tuple(name for block in anatomy if block.name in names for name in block.tensors)


def holding(anatomy, *parts):
    return tuple(name for name in tensors(anatomy) if any(part in name for part in parts))


# The grammar.


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("block1", "block1"),
        ("  block1+head ", "block1 + head"),
        ("block1 +head+ embedding", "block1 + head + embedding"),
        (["block1", "head"], "block1 + head"),
        (("block1",), "block1"),
        (["all", "-head"], "all - head"),
        (["all -head", "- *.bn*", "block1+fc"], "all - head - *.bn* + block1 + fc"),
        ("all - head", "all - head"),
        ("all- head", "all - head"),
        ("all -head", "all - head"),
        ("all + -head", "all - head"),
        ("all+-head", "all - head"),
        ("all-head", "all-head"),
        ("my-mod.a-b", "my-mod.a-b"),
        ("block2-4", "block2-4"),
        ("block02-04+first03", "block2-4 + first3"),
        ("vision.block2-4 - vision.block3", "vision.block2-4 - vision.block3"),
        ("all -block2-4", "all - block2-4"),
        ("re:a+b-c", "re:a+b-c"),
        ("re:a+ + head", "re:a+ + head"),
        ("head+re:a+ -re:b-+ + stem", "head + re:a+ - re:b-+ + stem"),
        (["re:a+", "re:b{1,2}"], "re:a+ + re:b{1,2}"),
        ("*.bn[1-2].*-head", "*.bn[1-2].*-head"),
        ("\tall\n- head", "all - head"),
        ("auto-rgn", "auto-rgn"),
    ],
)
def test_canonical_form(text, canonical):
    spec = parse(text)
    assert str(spec) == canonical
    assert parse(canonical) == spec
    assert repr(spec) == f"TargetSpec({canonical!r})"


@pytest.mark.parametrize(
    ("text", "term"),
    [
        ("block1", Name("block1")),
        ("block01", Name("block01")),
        ("first", Name("first")),
        ("first3", Count("", "first", 3)),
        ("text.tower.last2", Count("text.tower.", "last", 2)),
        ("block2-4", Range("", 2, 4)),
        ("vision.block2-12", Range("vision.", 2, 12)),
        ("my-block2", Name("my-block2")),
        ("*.norm?", Pattern("*.norm?")),
        ("re:race", Pattern("re:race")),
        ("cross-val", FromData("cross-val")),
    ],
)
def test_terms(text, term):
    assert parse(text).terms == (term,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "target is empty"),
        (" \n", "target is empty"),
        ([], "empty list"),
        (["block1", ""], "target is empty"),
        (7, "string or a list of strings.*not 7"),
        (["block1", 3], "string or a list of strings"),
        ({"block1"}, "string or a list of strings"),
        (None, "not None"),
        (b"block1", "string or a list of strings"),
        ("block0", "'block0' is no block: they count from 1.*re:block0"),
        ("block0-2", "'block0-2' is not a range"),
        ("block4-2", "'block4-2' is not a range"),
        ("vision.block4-2", "'vision.block4-2' is not a range"),
        ("first0", "'first0' names no block; write e.g. 'first3'"),
        ("last00", "'last00' names no block"),
        ("block1 +", r"'block1 \+' ends in '\+' with no term behind it"),
        ("block1 -", "ends in '-'"),
        ("block1-", "ends in '-'"),
        ("+", r"'\+' at position 0 of '\+' has no term before it"),
        ("-", "ends in '-'"),
        ("+ block1", r"'\+' at position 0 .* has no term before it"),
        (["all", "+ head"], r"'\+' at position 0 .* has no term before it"),
        ("all ++ head", r"'\+' at position 5 .* has no term before it"),
        ("all -- head", "'-' at position 5 .* has no term before it"),
        ("all - + head", r"'\+' at position 6 .* has no term before it"),
        ("-head", r"'- head' starts by taking away: say from what, e.g. 'all - head'"),
        (["-head", "all"], "starts by taking away"),
        ("block1 head", r"needs a '\+' or a '-' between 'block1' and 'head'"),
        ("re:a head", "between 're:a' and 'head'"),
        ("block1, head", "unexpected ',' at position 6"),
        ("block2 - 4", r"ambiguous: write 'block2-4' for a range of blocks, or 're:\(\.\*\\\.\)\?4'"),
        (["vision.block2", "- 4"], "write 'vision.block2-4'"),
        ("re:", "'re:' has no regex behind it"),
        ("head + re:layers.[0-3", "'re:layers.\\[0-3' holds a bad regex: .* at position 7"),
        ("re:a{99999999999999}", "bad regex"),
        ("re:[[a]", "bad regex: Possible nested set"),
        ("re:" + "(" * 5000 + ")" * 5000, "has 10003 characters, where a term has at most 1000"),
        ("auto-foo", "unknown criterion in 'auto-foo'; .*auto, auto-rgn, auto-snr, .*greedy"),
        ("auto-rgn + head", r"'auto-rgn' stands alone.*got 'auto-rgn \+ head'"),
        ("all - race", "'race' stands alone"),
        (["auto", "-head"], "'auto' stands alone"),
    ],
)
def test_text_that_does_not_parse(text, message):
    with pytest.raises(TargetError, match=message) as caught:
        parse(text)
    assert type(caught.value) is TargetError
    assert isinstance(caught.value, ValueError)


def test_spec_is_frozen_and_hashable():
    spec = parse("all - head")
    assert {spec: 1}[parse("all -head")] == 1
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert parse("re:race") != parse("race")
    with pytest.raises(FrozenInstanceError, match="steps"):
        spec.steps = ()
    with pytest.raises(FrozenInstanceError, match="text"):
        spec.terms[0].text = "block1"


@pytest.mark.parametrize("module", [parsing, sources])
def test_examples_in_docstrings(module):
    results = doctest.testmod(module, raise_on_error=False)
    assert results.attempted
    assert results.failed == 0


# What a target means in a network.


@pytest.mark.parametrize(
    ("which", "text", "expected"),
    [
        ("conv", "block1", blocks(CONV, "block1")),
        ("conv", "first", blocks(CONV, "block1")),
        ("conv", "stem", STEM),
        ("conv", "stage1", unit("layer1.0")),
        ("conv", "block1 - stem", unit("layer1.0")),
        ("conv", "last", FC),
        ("conv", "head", FC),
        ("conv", "all", tensors(CONV)),
        ("conv", "head + block1", blocks(CONV, "block1", "head")),
        ("conv", "block2-4", blocks(CONV, "block2", "block3", "block4")),
        ("conv", "block3-3", blocks(CONV, "block3")),
        ("conv", "first3", blocks(CONV, "block1", "block2", "block3")),
        ("conv", "last3", blocks(CONV, "block2", "block3", "block4")),
        ("conv", "last4", blocks(CONV, "block1", "block2", "block3", "block4")),
        ("conv", "layer1", unit("layer1.0")),
        ("conv", "layer2.1.bn1", unit("layer2.1")[1:]),
        ("conv", "layer1.0.conv1.weight", ("layer1.0.conv1.weight",)),
        ("conv", "conv1", ("conv1.weight",)),  # the exact path, and not the ones that end in it
        ("conv", "0.conv1", holding(CONV, ".0.conv1")),
        ("conv", "running_mean", holding(CONV, "running_mean")),
        ("conv", "1", unit("layer2.1")),
        ("conv", "*.bn1", holding(CONV, ".bn1.")),
        ("conv", "*bn1*", holding(CONV, "bn1.")),
        ("conv", "layer[12]", holding(CONV, "layer1.", "layer2.")),
        ("conv", "layer?.0.conv1.weight", holding(CONV, ".0.conv1.weight")),
        ("conv", r"re:layer[2-3](\.0)?", holding(CONV, "layer2.", "layer3.")),
        ("conv", r"re:.*\.bias", holding(CONV, ".bias")),
        ("conv", r"re:layer\d+\.1 + head", unit("layer2.1") + FC),
        ("conv", "block1 - *bn1* + head", tuple(n for n in blocks(CONV, "block1", "head") if "bn" not in n)),
        ("conv", "block1 + head - *bn1* + bn1.bias", ("conv1.weight", "bn1.bias", "layer1.0.conv1.weight", *FC)),
        ("conv", "all - head + head", tensors(CONV)),
        ("vit", "stem", EMBEDDING),
        ("vit", "embedding", EMBEDDING),
        ("vit", "cls_token", ("cls_token",)),
        ("vit", "first3", blocks(VIT, "block1", "block2", "block3")),
        ("vit", "last3", blocks(VIT, "block10", "block11", "block12")),
        ("vit", "block9-12", blocks(VIT, "block9", "block10", "block11", "block12")),
        ("vit", "blocks.1", blocks(VIT, "block2")),  # a path and not the number of a block
        ("vit", "qkv", holding(VIT, "qkv")),
        ("towers", "vision.block1 + text.embedding", blocks(TOWERS, "vision.block1", "text.embedding")),
        ("towers", "vision.first2", blocks(TOWERS, "vision.block1", "vision.block2")),
        ("towers", "vision.block1-2", blocks(TOWERS, "vision.block1", "vision.block2")),
        ("towers", "text.last1", blocks(TOWERS, "text.block2")),
        ("towers", "vision.first", blocks(TOWERS, "vision.block1")),
        ("towers", "vision.last", blocks(TOWERS, "vision.head")),
        ("towers", "text.stem", blocks(TOWERS, "text.embedding")),
        ("towers", "vision_model.head", blocks(TOWERS, "vision.head")),
        ("towers", "layers.0", holding(TOWERS, "layers.0")),
        ("tied", "lm_head.weight", ("model.embed_tokens.weight",)),
        ("tied", "lm_head", ("model.embed_tokens.weight",)),
        ("tied", "lm_*", ("model.embed_tokens.weight",)),
        ("tied", "all - re:lm_head", ("model.layers.0.weight",)),
        ("tied", "all - lm_head.weight", ("model.layers.0.weight",)),
        ("spec", "early", blocks(SPEC, "early")),
        ("spec", "fc", ("b.weight",)),  # the block, although a module is called so too
        ("spec", "re:fc", ("fc.weight",)),
        ("spec", "late.x_1", blocks(SPEC, "late.x_1")),
        ("spec", "my-mod", ("my-mod.weight",)),
        ("spec", "early -my-mod", ("a.weight",)),
        ("spec", "re:race", ("race.weight",)),
        ("spec", r"re:a\sb", ("a b.weight",)),
    ],
)
def test_resolved_names(which, text, expected):
    assert resolve(parse(text), ANATOMIES[which]) == expected


def test_block_name_wins_over_every_other_reading():
    blocks_ = tuple(Block(name, (f"{name}.weight",), 1) for name in ("first", "last2", "head", "block1", "stem", "x"))
    anatomy = Anatomy(blocks_, parts=(Block("x", ("head.weight",), 1), Block("stage1", ("x.weight",), 1)))
    for name in ("first", "last2", "stem", "x"):
        assert resolve(parse(name), anatomy) == (f"{name}.weight",)
    assert resolve(parse("last"), anatomy) == ("head.weight",)


def test_part_or_alias_without_its_tensor_is_an_error():
    anatomy = Anatomy(
        (Block("block1", ("a.weight",), 1),), parts=(Block("stem", ("gone",), 1),), aliases={"b.weight": "gone"}
    )
    with pytest.raises(UnknownTargetError, match="'stem' holds no tensors"):
        resolve(parse("stem"), anatomy)
    with pytest.raises(UnknownTargetError, match="'b' matches nothing"):
        resolve(parse("b"), anatomy)


def test_path_that_looks_like_a_count_is_still_a_path():
    anatomy = Anatomy((Block("body", ("enc.first2.weight", "enc.last.weight"), 2),))
    assert resolve(parse("enc.first2"), anatomy) == ("enc.first2.weight",)


@pytest.mark.parametrize(
    ("which", "text", "message"),
    [
        ("conv", "blok1", "'blok1' matches nothing in this model. Near misses: block1"),
        ("conv", "Block1", "Near misses: block1"),
        ("conv", "block5", r"'block5' matches nothing.*Blocks of this model.*block2 \(34,567\), .*head \(50\)"),
        ("conv", "layer1.0.conv9", "Near misses: .*layer1.0.conv1"),
        ("conv", "convv1", "Near misses: conv1"),
        ("conv", "fc.wieght", "Near misses: fc.weight"),
        ("conv", "stge1", "Near misses: stage1.*Parts of them: stem, stage1"),
        ("conv", "head + *.norm*", r"'\*.norm\*' matches nothing"),
        ("conv", "*fcc*", "Near misses: fc"),
        ("conv", r"re:layr4\.0", "Near misses: layer4.0"),
        ("conv", "re:layer", "'re:layer' matches nothing"),  # a regex covers the whole path
        ("conv", "layer", "'layer' matches nothing"),
        ("conv", "embedding", "'embedding' matches nothing in this model. Blocks"),
        ("conv", "all-head", r"'all-head' matches nothing.*put spaces around the minus \('all - head'\)"),
        ("conv", "block2-block4", "a range is written 'block2-4'"),
        ("conv", "block3-6", "'block3-6' asks for more than the 4 numbered blocks"),
        ("conv", "first5", "'first5' asks for more than the 4 numbered blocks"),
        ("conv", "block1 - head", "'head' takes nothing away in 'block1 - head'"),
        ("conv", "all - head - fc", "'fc' takes nothing away"),
        ("conv", "all - blok1", "'blok1' matches nothing"),
        ("conv", "block1 - first", "'block1 - first' takes away everything"),
        ("conv", "vision.first3", "'vision.first3' does not say which tower.*'first3'"),
        ("towers", "first2", "'first2' does not say which tower .*'vision.first2' or 'text.first2'"),
        ("towers", "block1-2", "'block1-2' does not say which tower .*'vision.block1-2' or 'text.block1-2'"),
        ("towers", "block1", "'block1' does not say which tower .*'vision.block1' or 'text.block1'"),
        ("towers", "first", "'first' does not say which tower .*'vision.block1' or 'text.block1'"),
        ("towers", "head", "'head' does not say which tower .*'vision.head'"),
        ("towers", "stem", "write 'vision.embedding' or 'text.embedding'"),
        ("towers", "text.last", "'text.last' matches nothing"),
        ("spec", "first2", "'first2' counts numbered blocks, of which this model has none"),
        ("tied", "head", "'head' holds no tensors in this model"),
    ],
)
def test_terms_that_mean_nothing_here(which, text, message):
    with pytest.raises(UnknownTargetError, match=message) as caught:
        resolve(parse(text), ANATOMIES[which])
    assert isinstance(caught.value, KeyError)
    assert "Blocks of this model, with their parameters: " in str(caught.value)


@pytest.mark.parametrize("name", DATA_TARGETS)
def test_targets_that_need_data(name):
    spec = parse(name)
    assert spec.needs_data
    assert not parse(f"re:{name}").needs_data
    scored = name in {"auto-rgn", "auto-snr", "auto-fisher", "auto-sensitivity"}
    call = (
        "config = peft_surgical.resolve_target(config, model, dataloader)"
        if scored
        else f"peft_surgical.training.{'auto' if name == 'auto' else 'search'}."
    )
    message = f"{name} names no tensors until it has seen data: call {call}"
    with pytest.raises(UnresolvedTargetError, match=re.escape(message) + ".*target='block1'"):
        resolve(spec, SPEC)


# Laws, over generated targets.

COMPONENT = st.from_regex(r"[a-z_0-9]{1,5}(-[a-z0-9]{1,3})?", fullmatch=True)
PATH = st.lists(COMPONENT, min_size=1, max_size=3).map(".".join)
TOWER = st.sampled_from(["", "vision.", "a.b."])
NUMBER = st.integers(1, 40)
TERM = st.one_of(
    PATH,
    st.sampled_from(["all", "first", "last", "head", "embedding", "stem", "stage2"]),
    st.builds("{}block{}".format, TOWER, NUMBER),
    st.builds(lambda tower, low, more: f"{tower}block{low}-{low + more}", TOWER, NUMBER, st.integers(0, 9)),
    st.builds("{}{}{}".format, TOWER, st.sampled_from(["first", "last"]), NUMBER),
    st.builds("{}{}{}".format, PATH, st.sampled_from(["*", "?", ".*", "[0-3]", "[!a]"]), st.sampled_from(["", ".w"])),
    st.builds("re:{}{}".format, PATH, st.sampled_from(["", "+", r"\.[0-3]\..*", "-", "a+b-c", "{1,2}", ".+"])),
).filter(
    lambda text: text not in DATA_TARGETS and not re.match("auto-|block0+$|(.*[.])?(block0+-|(first|last)0+$)", text)
)
SIGN = st.sampled_from([" + ", " - ", " -", " +", " + -"])


def joined(first, rest):
    return first + "".join(sign + term for sign, term in rest)


TEXT = st.builds(joined, TERM, st.lists(st.tuples(SIGN, TERM), max_size=4))


def parsed(text):
    try:
        return parse(text)
    except TargetError:
        return None


@fast
@given(TEXT)
def test_round_trip(text):
    spec = parsed(text)
    assume(spec is not None)  # a range whose ends are the wrong way round, or "block2 - 4"
    assert parse(str(spec)) == spec
    assert parse([str(spec)]) == spec
    assert str(parse(str(spec))) == str(spec)


@fast
@given(TERM, st.lists(st.tuples(st.booleans(), TERM), max_size=4))
def test_list_is_read_as_its_members_in_a_row(first, rest):
    members = [first, *(f"-{term}" if minus else term for minus, term in rest)]
    spec = parsed(members)
    assert spec == parsed(joined(first, [(" - " if minus else " + ", term) for minus, term in rest]))
    assert spec == parsed(" + ".join(members))
    if spec is not None:
        assert len(spec.steps) == len(members)


@pytest.mark.parametrize(
    "text",
    [
        " " * 200_000,
        "block1" + " " * 200_000,
        "\t" * 200_000 + "block1",
        "+ " * 100_000,
        "block1 + " * 50_000,
        ["head"] * 100_000,
        "a" * 200_000,
        "*" * 200_000,
        "re:" + "a" * 200_000,
        "block" + "1" * 5_000,
        "a." * 400 + "block1-",
    ],
)
def test_reading_takes_time_in_proportion_to_the_length(text):
    begun = time.process_time()
    with contextlib.suppress(TargetError):
        parse(text)
    assert time.process_time() - begun < 1


@pytest.mark.parametrize(
    "regex",
    [
        "(a+)+b",
        "(a*)*b",
        "((a|aa)|b)*c",
        "(.*a){12}b",
        ".*.*.*.*.*.*b",
        "(?=(a+)+b).*",
        "(?:a?){30}a{30}",
        "(a{1,9}){9}b",
    ],
)
def test_a_regex_that_could_take_for_ever_is_refused(regex):
    for use in (lambda: parse(f"re:{regex}"), lambda: paths_matched(regex, ["a" * 60])):
        with pytest.raises(TargetError, match=r"could take for ever: .* several terms joined by"):
            use()


@pytest.mark.parametrize(
    "regex", [r".*layers\.([0-9]|1[01])\.(q|k|v)_proj\..*", r"(.*\.)?(fc|head)", r"(?!head).*\.\d+\..*"]
)
def test_usual_regexes_are_not(regex):
    assert parse(f"re:{regex}").terms == (Pattern(f"re:{regex}"),)


def test_globs_take_no_longer_for_more_stars():
    begun = time.process_time()
    assert parse("*a" * 200 + "*b").terms[0].regex.fullmatch("a" * 400) is None
    assert time.process_time() - begun < 1


def test_messages_stay_short():
    with pytest.raises(TargetError) as found:
        parse("block1 block2" + " " * 10_000 + "x" * 10_000)
    assert len(str(found.value)) < 300


@settings(fast, max_examples=600)
@given(
    st.one_of(
        st.text(max_size=30),
        st.lists(st.sampled_from([*"+-., *?[](){}|\\^$0129ablz\n", "re:", "block", "all", "first", "auto-"])).map(
            "".join
        ),
        st.lists(st.text(max_size=8), max_size=3),
    )
)
def test_parse_raises_nothing_but_target_error(text):
    spec = parsed(text)
    if spec is not None:
        assert parse(str(spec)) == spec


# Every name that means something in an anatomy: its blocks and parts, and all paths with their ends.
def meanings(anatomy):
    paths = {".".join(n.split(".")[:k]) for n in tensors(anatomy) for k in range(1, n.count(".") + 2)}
    words = (
        [b.name for b in anatomy if b.tensors] + [p.name for p in anatomy.parts] + sorted(paths) + ["all", "re:.*", "*"]
    )
    words += ["re:.*weight", "*.bn*", "*bias", "first2", "last1", "block1-2", "vision.first1"]
    return [word for word in words if " " not in word and resolved(anatomy, word) is not None]


def resolved(anatomy, text):
    spec = parsed(text)
    try:
        return None if spec is None or spec.needs_data else resolve(spec, anatomy)
    except UnknownTargetError:
        return None


MEANINGS = {which: meanings(anatomy) for which, anatomy in ANATOMIES.items()}
WORDS = st.sampled_from(sorted(ANATOMIES)).flatmap(
    lambda which: st.tuples(
        st.just(ANATOMIES[which]), st.lists(st.sampled_from(MEANINGS[which]), min_size=3, max_size=3)
    )
)


def subset(anatomy, text):
    return set(resolved(anatomy, text) or ())


@fast
@given(WORDS, st.lists(SIGN, min_size=2, max_size=2))
def test_resolved_names_are_ordered_and_each_once(drawn, signs):
    anatomy, (a, *rest) = drawn
    names = resolved(anatomy, joined(a, zip(signs, rest, strict=True)))
    assume(names is not None)
    everything = tensors(anatomy)
    assert names
    assert [everything.index(name) for name in names] == sorted({everything.index(name) for name in names})


@fast
@given(WORDS)
def test_all_minus_a_term_is_its_complement(drawn):
    anatomy, (a, *_) = drawn
    assert subset(anatomy, f"all - {a}") == set(tensors(anatomy)) - subset(anatomy, a)


@fast
@given(WORDS)
def test_set_laws(drawn):
    anatomy, (a, b, c) = drawn
    sets = [subset(anatomy, word) for word in (a, b, c)]
    assert subset(anatomy, f"{a} + {b} + {c}") == set().union(*sets)
    assert resolved(anatomy, f"{a} + {b}") == resolved(anatomy, f"{b} + {a}")
    assert resolved(anatomy, f"{a} + {a}") == resolved(anatomy, a)
    assert resolved(anatomy, [a, b, c]) == resolved(anatomy, f"{a} + {b} + {c}")
    # Left to right: what is added last is there, whatever was taken away before.
    difference = resolved(anatomy, f"{a} - {b} + {c}")
    if sets[0] & sets[1]:
        assert set(difference or ()) == (sets[0] - sets[1]) | sets[2]
    else:
        assert difference is None  # taking nothing away is refused


@fast
@given(st.sampled_from(sorted(ANATOMIES)), st.from_regex(r"[a-z*?.0-9]{0,6}[*?][a-z.0-9]{0,4}", fullmatch=True))
def test_globs_agree_with_fnmatch(which, glob):
    anatomy = ANATOMIES[which]
    other = {**{name: name for name in tensors(anatomy)}, **anatomy.aliases}
    expected = {
        tensor
        for name, tensor in other.items()
        for depth in range(name.count(".") + 1)
        if fnmatch.fnmatchcase(name.rsplit(".", depth)[0], glob)
    }
    assert subset(anatomy, glob) == expected


# PEFT's own way of matching.

MODULES = [
    "",
    "conv1",
    "layer1",
    "layer1.0",
    "layer1.0.conv1",
    "layer1.0.xconv1",
    "layer1.0.conv1.0",
    "encoder.layer.0",
    "encoder.layer.10",
    "fc",
]


def peft_says(target, exclude, path):
    config = SimpleNamespace(target_modules=target, exclude_modules=exclude, target_parameters=None)
    return bool(check_target_module_exists(config, path))


@fast
@given(st.lists(st.sampled_from([*MODULES[1:], "0", "10", "layer.0", "onv1", "0.conv1", "nowhere"]), min_size=1))
def test_names_match_as_in_peft(names):
    found = paths_matched(names, MODULES)
    assert list(found) == list(dict.fromkeys(names))
    for name, paths in found.items():
        assert list(paths) == [path for path in MODULES if peft_says([name], None, path)]
    union = {path for paths in found.values() for path in paths}
    assert union == {path for path in MODULES if peft_says(names, None, path)}
    # Excluding goes through another line of PEFT's: what is left of everything is the rest.
    assert set(MODULES) - union == {path for path in MODULES if peft_says(".*", names, path)}


@pytest.mark.parametrize(
    "regex", ["", ".*", "conv1", r".*\.conv1", r"layer1(\.0)?", r"encoder\.layer\.\d", "nowhere", "a|fc"]
)
def test_regex_matches_as_in_peft(regex):
    expected = tuple(path for path in MODULES if match_target_against_key(regex, path))
    assert paths_matched(regex, MODULES) == {regex: expected}
    assert list(expected) == [path for path in MODULES if peft_says(regex, None, path)]


def test_each_dead_pattern_shows():
    assert paths_matched(["0", "blok1"], iter(MODULES)) == {
        "0": ("layer1.0", "layer1.0.conv1.0", "encoder.layer.0"),
        "blok1": (),
    }
    assert paths_matched([], MODULES) == {}
    with pytest.raises(TargetError, match=r"'layer\[1' holds a bad regex: .* at position 5"):
        paths_matched("layer[1", MODULES)


def test_a_target_is_parsed_once_by_config_and_tuner(monkeypatch):
    read, steps = [], parsing._steps
    monkeypatch.setattr(parsing, "_steps", lambda text: (read.append(text), steps(text))[1])
    text = "block1 + head - *.nothing_else_parses_this*"
    for _ in range(2):
        assert parse(text) == parse([text])
    assert read == [text]
