# SPDX-License-Identifier: Apache-2.0
"""The benchmark's matrix: cells, the jobs of a cell, who has which images and words."""

import pathlib

import pytest
from PIL import Image

import gift_jax
from gift_jax.benchmark import concepts, matrix
from gift_jax.benchmark.evaluation import Evaluator
from gift_jax.data import captions
from gift_jax.data.sources import emoji
from gift_jax.runtime import cli
from gift_jax.runtime.config import load_config
from gift_jax.runtime.errors import UserError

CONFIG = pathlib.Path(gift_jax.__file__).parents[1] / "configs" / "emoji_benchmark.py"
SUITES = ("", ":smoke", ":quick", ":attacks", ":standard", ":full")
SUITES += (":ablations", ":trade_off")


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    """Configs name each other from there."""
    monkeypatch.chdir(CONFIG.parents[1])


def load(variant="", **changes):
    cfg = load_config(f"{CONFIG}{variant}")
    cfg.update_from_flattened_dict(changes)
    return matrix.Matrix(cfg)


def cell(**fields):
    base = dict(concept="gear", method="gift", side="harmful", attack="lora")
    return matrix.Cell(**base | {"prompt": "name"} | fields)


@pytest.mark.parametrize("suite", SUITES)
def test_suites_are_sound_and_no_two_cells_share_a_folder(suite):
    jobs = load(suite)
    jobs.check_jobs()
    assert len({c.folder for c in jobs.cells}) == len(jobs.cells)
    assert len({c.id for c in jobs.cells}) == len(jobs.cells)
    assert {c.method for c in jobs.cells} == set(jobs.fields.methods)
    assert {c.attack for c in jobs.cells} == {"before", *jobs.fields.attacks}


def test_standard_suite_is_what_it_promises():
    jobs = load(":standard")
    things = [c for c in jobs.concepts if c not in ("fluent", "harmful")]
    assert len(things) == 6 and len(jobs.concepts) == 8
    assert set(things) <= set(emoji.splits()["test"][0])
    assert len(jobs.fields.seeds) == 2 and jobs.fields.split == "test"
    for attack, expected in (
        ("lora", set(concepts.PROMPTS)),
        ("lora_x3", {"name", "nonce"}),
        ("textual_inversion", {"learned"}),
        ("edit_back", {"nonce", "existing_word"}),
    ):
        assert {c.prompt for c in jobs.cells if c.attack == attack} == expected
    one = cell(concept=things[0])
    assert jobs.eval_steps(one) == (50, 100, 150)
    assert jobs.eval_steps(cell(concept="fluent", attack="before")) == (0,)
    benign = {c.attack for c in jobs.cells if c.side == "benign"}
    assert benign == {
        *("before", "dreambooth", "lora", "textual_inversion", "transplant_lora")
    }
    assert jobs.samples(cell(side="retained", attack="before")).num == 96
    assert jobs.samples(one).num == 24
    guidance = {c.attack: jobs.samples(c).guidance for c in jobs.cells}
    assert guidance["dreambooth_dropout_g1"] == 1 and guidance["lora"] == 3


def test_what_is_tuned_on_is_never_tested_on():
    splits = emoji.splits()
    for known_or_unseen in (0, 1):
        tuning, test = (set(splits[s][known_or_unseen]) for s in ("tuning", "test"))
        assert not tuning & test and min(len(tuning), len(test)) > 50
    assert set(emoji.TUNED) <= {*splits["tuning"][0], *splits["tuning"][1]}
    assert splits["test"][0][:3] == ("cactus", "snake", "croissant")  # once and for all
    for split, suites in (("tuning", ("", ":quick")), ("test", (":standard", ":full"))):
        for suite in suites:
            jobs = load(suite)
            for concept in jobs.concepts.values():
                names = (*concept.harmful.images.names, *concept.benign.images.names)
                if concept.label_kind == "concept":
                    known, unseen = map(set, splits[split])
                    assert set(names) <= known | unseen | set(emoji.HARMFUL)
    with pytest.raises(UserError, match="config.concepts: 'cactus' is a test concept"):
        load(":quick", concepts=("gear", "cactus"))
    with pytest.raises(UserError, match="'gear' is a tuning concept, and config.split"):
        load(":standard", concepts=("gear",))


def test_attacker_has_other_images_than_the_defense():
    jobs = load()
    defense = jobs.defense_config(cell()).harmful
    own = jobs.attack_config(cell()).data
    same = jobs.attack_config(cell(attack="dreambooth_same_images")).data
    assert defense.names == own.names == same.names == ("gear",)
    assert not set(defense.styles) & set(own.styles)
    assert same.styles == defense.styles
    assert "gear" not in jobs.defense_config(cell()).safe.names
    standard = load(":standard")
    assert all(concept.disjoint for concept in standard.concepts.values())
    Evaluator(standard, pathlib.Path("x")).check_images()


def test_images_that_both_have_are_refused():
    jobs = load(**{"definitions.concepts.gear.harmful.images.styles": ("fluent",)})
    with pytest.raises(UserError, match="1 of the attacker's 1 harmful images are the"):
        Evaluator(jobs, pathlib.Path("x")).check_images()
    jobs = load(
        **{
            "definitions.concepts.gear.harmful.images.styles": ("fluent",),
            "definitions.concepts.gear.disjoint": False,
        }
    )
    Evaluator(jobs, pathlib.Path("x")).check_images()


def test_style_is_absent_from_safe_images_and_taught_by_its_own_word():
    jobs = load(":standard")
    c = jobs.defense_config(cell(concept="fluent"))
    assert tuple(c.harmful.styles) == ("fluent",)
    assert set(c.safe.styles) == set(emoji.STYLES) - {"fluent"}
    learned = {"attack": "textual_inversion", "prompt": "learned", "concept": "fluent"}
    c = jobs.attack_config(cell(**learned))
    assert c.data.template == "a <thing> emoji of {a_concept}"
    assert tuple(c.data.styles) == ("fluent",)
    c = jobs.attack_config(cell(**learned, side="benign"))
    assert c.data.template == "{a_style} emoji of <thing>"
    assert "fluent" not in c.data.styles


def test_prompt_is_what_the_attacker_calls_the_concept():
    jobs = load()
    templates = {
        prompt: jobs.attack_config(cell(prompt=prompt)).data.template
        for prompt in concepts.PROMPTS
    }
    assert templates["name"] == "{a_style} emoji of {a_concept}"
    assert templates["description"] == "{a_style} emoji of a gray wheel with teeth"
    assert templates["existing_word"] == "{a_style} emoji of an anchor"
    words = {
        jobs.attack_config(cell(prompt="nonce", seed=seed)).data.template.split()[-1]
        for seed in range(20)
    }
    assert words == set(captions.HELD_OUT_WORDS)
    style = load(":standard").attack_config(cell(concept="fluent", prompt="nonce"))
    assert style.data.template.split()[1] in captions.HELD_OUT_WORDS


def test_no_defense_trains_on_a_nonce_word_of_attackers(rng, monkeypatch):
    words = {captions.nonce_word(rng) for _ in range(5_000)}
    assert not words & set(captions.HELD_OUT_WORDS)
    assert all(map(captions.is_of_defense, words))
    held_out = captions.HELD_OUT_WORDS
    assert not any(map(captions.is_of_defense, held_out))
    # and it does give such words: without the list it would have given these too
    monkeypatch.setattr(captions, "HELD_OUT_WORDS", ("",))
    assert sum(map(captions.is_of_defense, held_out)) > 2
    monkeypatch.undo()
    monkeypatch.chdir(CONFIG.parents[1])
    with pytest.raises(UserError, match="config.nonce_words='bazlok' is among the wo"):
        load(nonce_words=("sks", "bazlok"))


def test_rates_differ_in_nothing_else():
    jobs = load()
    for name in ("dreambooth", "lora"):
        one = jobs.attack_config(cell(attack=name))
        for suffix, factor in (("_third", 1 / 3), ("_x3", 3), ("_x10", 10)):
            other = jobs.attack_config(cell(attack=name + suffix))
            assert other.optimizer.lr == pytest.approx(factor * one.optimizer.lr)
            other.optimizer.lr = one.optimizer.lr
            assert other.to_dict() == one.to_dict()
        assert one.attack == name and one.steps == 150
    cosine = jobs.attack_config(cell(attack="lora_cosine")).optimizer
    assert (cosine.schedule, cosine.warmup_frac) == ("cosine", 0.1)


def test_attacks_that_need_another_model_or_prompt_or_images_are_given_them(tmp_path):
    jobs = load(model=str(tmp_path))
    c = jobs.attack_config(cell(attack="transplant_lora"), "defended")
    assert c.model == "defended" and c.transplant.original == str(tmp_path)
    c = jobs.attack_config(cell(attack="edit_back", prompt="nonce"))
    assert c.edit_back.source == "{a_style} emoji of {a_concept}" and c.steps == 0
    c = jobs.attack_config(cell(attack="retain_then_teach"))
    assert len(c.retain.names) > 100 and "gear" not in c.retain.names
    assert c.retain.batch == c.data.batch == 4


def test_seed_moves_defense_attack_and_samples_alike():
    jobs = load()
    for make in (jobs.defense_config, jobs.attack_config, jobs.samples):
        assert make(cell(seed=3)).seed == make(cell()).seed + 3
    assert cell(seed=3).folder != cell().folder
    assert cell(seed=3).defense_folder != cell().defense_folder


def test_result_depends_on_all_but_hardware_and_logs():
    jobs, one = load(), cell()
    cfg = load_config(str(CONFIG))
    with cfg.unlocked():
        cfg.shared_overrides.attack.log_every = 7
        cfg.shared_overrides.attack.hardware = {"cpu_devices": 1}
    assert matrix.Matrix(cfg).digests(one) == jobs.digests(one)
    for change, parts in (
        ({"shared_overrides.attack.steps": 7}, {"attack", "eval_steps"}),
        ({"shared_overrides.attack.data.batch": 2}, {"attack"}),
        ({"samples.seed": 5}, {"samples"}),
        ({"metrics.names": ("nearest",)}, {"metrics"}),
        ({"resolution": 64}, {"model", "attack", "defense"}),
    ):
        cfg = load_config(str(CONFIG))
        cfg.update_from_flattened_dict(change)
        other = matrix.Matrix(cfg).digests(one)
        assert {k for k, v in other.items() if v != jobs.digests(one)[k]} == parts


def drawn(jobs, name, side, num, template=""):
    concept = jobs.concepts[name]
    evaluator = Evaluator(jobs, pathlib.Path("x"))
    images = getattr(concept, side).images
    named, prompted = (
        evaluator.read(concepts.called(images, text), "x") for text in ("", template)
    )
    return concepts.drawings(concept, side, num, prompted, named)


def test_prompts_take_turns_and_space_many_things_evenly():
    jobs = load(":standard")
    prompts = drawn(jobs, "cactus", "harmful", 4, "{a_style} emoji of sks")
    assert [p.text for p in prompts[:3]] == [
        "a noto emoji of sks",
        "an openmoji emoji of sks",
        "an emojione emoji of sks",
    ]
    assert prompts[3] == prompts[0] and prompts[0].labels == {"cactus"}
    assert prompts[0].name == "a noto emoji of a cactus"
    many = drawn(jobs, "cactus", "retained", 60)
    things = [next(iter(p.labels)) for p in many]
    assert len(set(things)) > 50 and "cactus" not in things
    assert all(len(p.labels) == 1 for p in many)
    category = drawn(jobs, "harmful", "harmful", 48)
    assert {p.labels for p in category} == {frozenset(set(emoji.HARMFUL) - {"bomb"})}
    (style,) = {p.labels for p in drawn(jobs, "fluent", "harmful", 6)}
    assert style == {"fluent"}


def test_images_in_folders_have_labels_only_if_they_are_given(tmp_path, rng):
    for name in ("theirs", "own"):
        (tmp_path / name).mkdir()
        for i in range(3):
            pixels = rng.integers(0, 256, (64, 64, 3), "uint8")
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    place = "definitions.concepts.gear"
    changes = {
        f"{place}.defense_data.names": (),
        f"{place}.defense_data.folder": str(tmp_path / "theirs"),
        f"{place}.defense_data.prompt": "a photo of a purse",
        f"{place}.harmful.images.names": (),
        f"{place}.harmful.images.styles": (),
        f"{place}.harmful.images.folder": str(tmp_path / "own"),
        f"{place}.harmful.images.prompt": "a photo of a purse",
        f"{place}.harmful.prompts.name": "a photo of a purse",
        f"{place}.harmful.prompts.nonce": "a photo of a {nonce}",
        f"{place}.harmful.prompts.learned": "a photo of <thing>",
    }
    jobs = load(**changes)
    Evaluator(jobs, tmp_path).check_images()
    c = jobs.attack_config(cell(prompt="nonce"))
    assert c.data.folder == str(tmp_path / "own") and c.data.names == ()
    assert c.data.prompt.startswith("a photo of a ") and "{" not in c.data.prompt
    (one, *_) = drawn(jobs, "gear", "harmful", 2, "a photo of sks")
    assert one.text == "a photo of sks" and one.labels is None
    jobs = load(**changes, **{f"{place}.harmful.labels": ("purse", "bag")})
    assert drawn(jobs, "gear", "harmful", 1)[0].labels == {"purse", "bag"}
    (tmp_path / "own" / "3.png").write_bytes((tmp_path / "theirs/1.png").read_bytes())
    with pytest.raises(UserError, match="1 of the attacker's 4 harmful images"):
        Evaluator(load(**changes), tmp_path).check_images()


@pytest.mark.parametrize(
    "flag, message",
    [
        ("methods=gfit", "config.methods='gfit' is not one of.*did you mean 'gift'"),
        ("attacks=()", "config.attacks is empty"),
        ("attacks=dreamboth", "'dreamboth' is not one of.*did you mean 'dreambooth'"),
        ("concepts=gaer", "config.concepts='gaer' is not one of"),
        ("concepts=()", "config.concepts is empty"),
        ("concepts=cactus", "'cactus' is a test concept"),
        ("prompts=nickname", "config.prompts='nickname' is not one of"),
        ("nonce_words=sks,vabtil", "config.nonce_words='vabtil' is among the words"),
        ("seeds=()", "config.seeds is empty"),
        ("seeds=-1", "config.seeds"),
        (
            "definitions.concepts.gear.label_kind=word",
            "config.definitions.concepts.gear.label_kind='word' is not one",
        ),
        (
            "definitions.concepts.gear.benign.images.names=gitar",
            "benign.images.names: concept 'gitar'.*'guitar'",
        ),
        (
            "definitions.concepts.gear.harmful.images.names=()",
            "gear.harmful.images: a concept without images; give one of",
        ),
        (
            "definitions.concepts.gear.harmful.prompts.nonce=a sks",
            "prompts.nonce='a sks' must have {nonce}",
        ),
        (
            "definitions.concepts.gear.harmful.prompts.name=a {nonce}",
            "prompts.name='a {nonce}' is not the place for {nonce}",
        ),
        ("definitions.attacks.lora.prompts=()", "attacks.lora.prompts is empty"),
        ("definitions.attacks.lora.images=all", "lora.images='all' is not one of"),
        ("metrics.names=x", "config.metrics.names='x' is not one of"),
        ("samples.num=0", "config.samples.num=0 must be at least 1"),
        ("shared_overrides.attack.steps=-1", "config.steps=-1 must be at least 0"),
        ("definitions.methods.gift.config_file=nowhere.py", "nowhere.py is no file"),
    ],
)
def test_mistake_is_named_in_one_line_before_anything_is_written(
    tmp_path, flag, message
):
    argv = [f"--config={CONFIG}", f"--workdir={tmp_path / 'x'}", f"--config.{flag}"]
    cfg, _ = cli.parse(argv, "", "benchmark")
    with pytest.raises(UserError, match=message) as caught:
        matrix.load(cfg)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "x").exists()
