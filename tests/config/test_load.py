"""Tests of config loading: recipes, YAML files, run folders and overrides give a config or an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from everest_ds.config import Experiment, dump_experiment, find_config, flatten, load_experiment, recipe_names
from everest_ds.errors import ConfigError


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("task: pretrain\nmodel: {backbone: vit_tiny, image_size: 64}\n")
    return path


def refusal(source: Path, *overrides: str) -> str:
    """Return the message of the error that loading raises, which must be a single line."""
    with pytest.raises(ConfigError) as caught:
        load_experiment(source, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_validates(name: str) -> None:
    assert load_experiment(name).token_counts.num_visible > 0


def test_base_is_found_beside_the_file_and_merged_section_by_section(config_file: Path) -> None:
    child = config_file.parent / "sub.yaml"
    child.write_text("base: mine.yaml\nmodel: {num_frames: 8}\nbatch: {micro_batch_size: 2}\n")
    config = load_experiment(child)
    assert (config.model.backbone, config.model.image_size, config.model.num_frames) == ("vit_tiny", 64, 8)
    assert config.batch.micro_batch_size == 2


def test_base_may_be_a_recipe_and_bases_chain(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "shipped.yaml").write_text("task: pretrain\nschedule: {epochs: 50, warmup_epochs: 5}\n")
    (recipes / "derived.yaml").write_text("base: shipped\nschedule: {epochs: 70}\n")
    monkeypatch.setattr("everest_ds.config.recipes.RECIPES", recipes)
    config_file.write_text("base: derived\nprecision: fp32\n")
    config = load_experiment(config_file)
    assert (config.schedule.epochs, config.schedule.warmup_epochs, config.precision) == (70, 5, "fp32")
    assert recipe_names() == ["derived", "shipped"]
    assert load_experiment("derived").schedule.epochs == 70


def test_bases_in_a_circle_are_named(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}.yaml\n")
    assert "`base` inherits from itself; given: a.yaml -> b.yaml -> c.yaml -> a.yaml" in refusal(
        tmp_path / "a.yaml"
    )


def test_a_run_folder_is_loaded_by_its_config(tmp_path: Path, config_file: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_file.read_text())
    assert find_config(tmp_path).path == tmp_path / "config.yaml"
    assert load_experiment(tmp_path) == load_experiment(config_file, [f"run.dir={tmp_path}"])


def test_overrides_are_yaml_values_of_nested_keys(config_file: Path) -> None:
    config = load_experiment(
        config_file,
        [
            "model.image_size=96",
            "schedule.base_lr=1e-3",
            "optimizer.betas=[0.9, 0.999]",
            "data.horizontal_flip=true",
            "data.train=lists/a=b.txt",
            "batch.global_batch_size=null",
            "precision=fp16",
        ],
    )
    assert config.model.image_size == 96 and config.model.backbone == "vit_tiny"
    assert config.schedule.base_lr == 1e-3
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.data.horizontal_flip is True and config.data.train == Path("lists/a=b.txt")
    assert config.batch.global_batch_size is None and config.precision == "fp16"


@pytest.mark.parametrize(
    "text",
    ["runs/exp #1", "2026-11-27", "007", "1e3", "yes", "[a]", "a: b", "- a", "&a", "*a", "n a\nme", " a"],
)
@pytest.mark.parametrize("key", ["run.dir", "data.train", "data.root", "model.init_from"])
def test_a_path_is_taken_as_it_was_typed(config_file: Path, key: str, text: str) -> None:
    config = load_experiment(config_file, [f"{key}={text}"])
    section, name = key.split(".")
    assert str(getattr(getattr(config, section), name)) == str(Path(text))


def test_a_path_may_be_quoted_or_taken_back(config_file: Path) -> None:
    overrides = ['run.dir="a # b"', "data.val=x.txt", "data.val=null"]
    config = load_experiment(config_file, overrides)
    assert config.run.dir == Path("a # b") and config.data.val is None


@pytest.mark.parametrize("text", ["batch: {}\nrun:\n  seed: 1\nbatch: {}\n", "run: {seed: 1, seed: 2}\n"])
def test_a_key_that_is_given_twice_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    message = refusal(tmp_path / "a.yaml")
    assert "is given twice, the second time in line" in message and "a.yaml" in message


def test_aliases_that_unfold_without_end_are_refused_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [1, 2]\n" + "".join(
        f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 7)}]\n" for n in range(1, 30)
    )
    (tmp_path / "bomb.yaml").write_text(bomb)
    assert "unfold to more than" in refusal(tmp_path / "bomb.yaml")


def test_the_last_override_of_a_key_wins(config_file: Path) -> None:
    assert load_experiment(config_file, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("model.backbon=vit_base", "`model.backbon`", "did you mean model.backbone?"),
        ("tokns.keep_ratio=0.3", "`tokns.keep_ratio`", "did you mean tokens.keep_ratio?"),
        ("batch.global_batch=8", "`batch.global_batch`", "did you mean batch.global_batch_size"),
        ("recompute.xyzzy=1", "`recompute.xyzzy`", "one of recompute.mode, recompute.every, recompute.off"),
        ("warmup=5", "`warmup`", "did you mean schedule.warmup_epochs or schedule.warmup_lr"),
        ("num_epochs=5", "`num_epochs`", "did you mean schedule.epochs"),
        ("model.dir=runs/a", "`model.dir`", "did you mean run.dir?"),
        ("seed=5", "`seed`", "did you mean run.seed?"),
        ("xyzzy=1", "`xyzzy`", "one of task, model, tokens, data"),
    ],
)
def test_an_unknown_key_is_named_as_it_was_typed_with_the_nearest_keys(
    config_file: Path, override: str, key: str, suggestion: str
) -> None:
    message = refusal(config_file, "run.seed=2", override, "precision=fp32")
    assert message.startswith(f"{override}: unknown config key {key};")
    assert suggestion in message and str(config_file) not in message


@pytest.mark.parametrize(
    ("line", "key", "suggestion"),
    [
        ("tokns: {keep_ratio: 0.3}", "`tokns`", "did you mean tokens?"),
        ("schedule: {lr: 1.0e-3}", "`schedule.lr`", "did you mean schedule.base_lr"),
    ],
)
def test_an_unknown_key_of_a_file_is_named_with_its_file(
    config_file: Path, line: str, key: str, suggestion: str
) -> None:
    config_file.write_text(f"{config_file.read_text()}{line}\n")
    message = refusal(config_file, "run.seed=2", "tokens.keep_ratio=0.4", "schedule.base_lr=0.1")
    assert message.startswith(f"{config_file}: unknown config key {key};") and suggestion in message


@pytest.mark.parametrize("text", ["model.image_size", "=3", ""])
def test_an_override_without_key_or_equals_sign(config_file: Path, text: str) -> None:
    message = refusal(config_file, text)
    assert repr(text) in message and "key.path=value" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.backbone=vit_giant", ("model.backbone", "'vit_giant'", "'vit_tiny', 'vit_small'")),
        ("tokens.keep_ratio=1.5", ("tokens.keep_ratio", "1.5", "less than or equal to 1")),
        ("tokens.mask_ratio=1", ("tokens.mask_ratio", "1", "less than 1")),
        ("batch.micro_batch_size=0", ("batch.micro_batch_size", "0", "greater than or equal to 1")),
        ("batch.micro_batch_size=many", ("batch.micro_batch_size", "'many'", "a valid integer")),
        ("parallelism.zero_stage=4", ("parallelism.zero_stage", "4", "0, 1, 2 or 3")),
        ("optimizer.betas=[0.9]", ("optimizer.betas.1", "missing")),
        ("model=3", ("model", "3", "ModelConfig")),
    ],
)
def test_a_wrong_value_names_key_value_and_what_is_allowed(
    config_file: Path, override: str, expected: tuple[str, ...]
) -> None:
    message = refusal(config_file, "run.seed=2", override)
    assert message.startswith(f"{override}: ")
    assert all(part in message for part in expected)


def test_further_errors_are_counted(config_file: Path) -> None:
    assert "(and 2 more)" in refusal(config_file, "model.a=1", "model.b=1", "model.c=1")


# Contradictions between sections: overrides of the pre-training file -> parts of the expected error message.
DISAGREEMENTS = [
    (["model.num_frames=15"], ("num_frames=15", "tubelet_size=2")),
    (["model.image_size=65"], ("image_size=65", "patch_size=16")),
    (
        ["task=finetune", "model.num_classes=2", "tokens.selection=dual"],
        ("tokens.selection=dual", "finetune", "allowed: rero, random, rlt, uniform, tube, none"),
    ),
    (["tokens.selection=dual", "model.num_frames=12"], ("selection=dual", "multiple of 4", "gives 6")),
    (
        ["tokens.score=sketch", "tokens.distance=l1"],
        ("score=sketch", "distance=l1", "use distance=l2, cosine"),
    ),
    (["tokens.frame_oversampling=1.1"], ("frame_oversampling=1.1", "adds no slot", "at least 1.12")),
    (["task=finetune"], ("model.num_classes", "number of classes")),
    (["model.num_frames=2"], ("tokens.selection=rero", "the clip has only one")),
    (["tokens.keep_ratio=0.09"], ("keep_ratio=0.09", "keep_ratio must exceed 1 - mask_ratio")),
    (["tokens.keep_ratio=0.001"], ("keep_ratio=0.001", "0 kept", "raise keep_ratio")),
    (["tokens.mask_ratio=0.999"], ("mask_ratio=0.999", "0 visible", "lower mask_ratio")),
    (["tokens.mask_ratio=0.5"], ("mask_ratio=0.5", "keep_ratio must exceed 1 - mask_ratio")),
    (
        ["schedule.epochs=40"],
        (
            "schedule.warmup_epochs (40) must be smaller than schedule.epochs (40)",
            "fix: lower schedule.warmup_",
        ),
    ),
    (
        ["recompute.offload_to_cpu=true"],
        ("recompute.offload_to_cpu", "mode none recomputes no module", "set recompute.mode"),
    ),
    (
        ["recompute.offload_to_cpu=true", "recompute.mode=gelu"],
        ("recompute.offload_to_cpu", "mode gelu recomputes no module"),
    ),
    (
        ["model.compile=true", "parallelism.zero_stage=3"],
        ("model.compile=true", "zero_stage=3", "use zero_stage 0"),
    ),
]


@pytest.mark.parametrize(("overrides", "expected"), DISAGREEMENTS)
def test_sections_that_disagree_name_keys_and_remedy(
    config_file: Path, overrides: list[str], expected: tuple[str, ...]
) -> None:
    message = refusal(config_file, *overrides)
    assert all(part in message for part in (str(config_file), *expected))


def test_settings_of_a_recipe_that_disagree_name_the_recipe_as_it_was_typed() -> None:
    with pytest.raises(ConfigError, match="^demo_pretrain: config: schedule.warmup_epochs .7."):
        load_experiment("demo_pretrain", ["schedule.epochs=7", "schedule.warmup_epochs=7"])


def test_a_missing_task_says_what_to_add(config_file: Path) -> None:
    config_file.write_text("precision: bf16\n")
    assert "`task` is missing; fix: add `task:`" in refusal(config_file)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("a: [1", "not readable as YAML"), ("- 1\n- 2\n", "list; allowed: a mapping of sections")],
)
def test_a_file_that_is_no_config(config_file: Path, content: str, expected: str) -> None:
    config_file.write_text(content)
    message = refusal(config_file)
    assert str(config_file) in message and expected in message


def test_a_source_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert "nowhere.yaml" in refusal(tmp_path / "nowhere.yaml")


def test_a_base_that_does_not_exist_is_named_with_its_file(config_file: Path) -> None:
    config_file.write_text("base: gone.yaml\ntask: pretrain\n")
    message = refusal(config_file)
    assert "'gone.yaml'" in message and str(config_file) in message


def test_a_loaded_config_is_frozen_in_every_section(config_file: Path) -> None:
    config = load_experiment(config_file)
    with pytest.raises(ValidationError, match="frozen"):
        config.precision = "fp32"  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.model.image_size = 96  # type: ignore[misc]


def test_dump_is_complete_and_loads_to_the_same_config(tmp_path: Path, config_file: Path) -> None:
    config = load_experiment(config_file, ["optimizer.betas=[0.8, 0.95]", "data.train=a.txt", "run.dir=/r"])
    text = dump_experiment(config)
    path = tmp_path / "again.yaml"
    path.write_text(text)
    assert load_experiment(path) == config
    assert dict(flatten(yaml.safe_load(text))) == dict(flatten(config.model_dump(mode="json")))


keys = st.sampled_from(["a", "b", "long_name"])
trees = st.recursive(
    st.integers(), lambda inner: st.dictionaries(keys, inner, min_size=1, max_size=3), max_leaves=8
)


@given(st.dictionaries(keys, trees, max_size=3))
def test_flatten_names_every_leaf_by_its_path(tree: dict[str, object]) -> None:
    rebuilt: dict[str, object] = {}
    for path, leaf in flatten(tree):
        *sections, name = path.split(".")
        node = rebuilt
        for section in sections:
            node = node.setdefault(section, {})  # type: ignore[assignment]
        node[name] = leaf
    assert rebuilt == tree


def test_every_key_of_the_defaults_can_be_overridden_by_its_dotted_path(config_file: Path) -> None:
    config = load_experiment(config_file)
    tree = config.model_dump(mode="json")
    texts = {key: yaml.safe_dump(value, default_flow_style=True) for key, value in flatten(tree)}
    overrides = [f"{key}={text.strip().removesuffix('...').strip()}" for key, text in texts.items()]
    assert load_experiment(config_file, overrides) == config
    assert isinstance(config, Experiment)


def test_bf16_at_stage_0_is_refused_with_what_works() -> None:
    with pytest.raises(ConfigError, match="zero_stage 1, 2 or 3"):
        load_experiment("demo_pretrain", ["precision=bf16", "parallelism.zero_stage=0"])
