"""Tests of conversion: every key is reported, round trips are exact, and errors name the offending key."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from everest_ds import load_model
from everest_ds.errors import CheckpointError
from everest_ds.interchange.convert import convert_weights
from tests.interchange import systems
from tests.interchange.systems import CLIP, State

Change = Callable[[State], Any]


def finetuned() -> State:
    return systems.finetuned_state(systems.classifier())


def pretrained() -> State:
    return systems.pretrained_state(systems.autoencoder())


def keys_of(path: Path) -> State:
    if path.is_dir():
        return load_file(path / "model.safetensors")
    if path.suffix == ".safetensors":
        return load_file(path)
    state: State = torch.load(path, weights_only=True)["model"]
    return state


def assert_equal(actual: State, expected: State) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("make", [finetuned, pretrained])
@pytest.mark.parametrize("through", ["a.safetensors", "a-folder", "a.pth"])
def test_there_and_back_is_the_same_in_every_bit(
    tmp_path: Path, make: Callable[[], State], through: str
) -> None:
    state = make()
    torch.save({"model": state}, tmp_path / "source.pth")
    to = {"a.safetensors": "everest", "a-folder": "transformers", "a.pth": "videomae"}[through]
    convert_weights(tmp_path / "source.pth", tmp_path / through, to, CLIP)
    convert_weights(
        tmp_path / through, tmp_path / "back.pth", "videomae", ["model.last_norm_eps=1e-6", *CLIP]
    )
    assert_equal(keys_of(tmp_path / "back.pth"), state)


def test_encoders_of_mvd_and_mme_go_back_under_their_names(tmp_path: Path) -> None:
    for system, state in {
        "mvd": systems.mvd_state(systems.autoencoder()),
        "mme": systems.mme_state(systems.autoencoder()),
    }.items():
        torch.save({"model": state}, tmp_path / f"{system}.pth")
        convert_weights(tmp_path / f"{system}.pth", tmp_path / f"{system}.safetensors", "everest", CLIP)
        convert_weights(tmp_path / f"{system}.safetensors", tmp_path / "back.pth", system)
        back = keys_of(tmp_path / "back.pth")
        assert len(back) == 56 and all(torch.equal(back[key], state[key]) for key in back)


@pytest.mark.parametrize("system", ["everest", "videomae", "transformers", "mme"])
@pytest.mark.parametrize("make", [finetuned, pretrained, lambda: systems.mme_state(systems.autoencoder())])
def test_every_key_on_both_sides_is_in_the_report(
    tmp_path: Path, make: Callable[[], State], system: str
) -> None:
    state, target = make(), tmp_path / ("out" if system == "transformers" else "out.safetensors")
    torch.save(state, tmp_path / "source.pth")
    if system in ("videomae", "mme"):
        target = target.with_suffix(".pth")
    done = convert_weights(tmp_path / "source.pth", target, system, CLIP)
    sources = [name for key in done.keys for name in key.source.split(" + ")]
    targets = [name for key in done.keys for name in key.target.split(" + ") if name]
    assert sorted(sources) == sorted(state)
    assert sorted(targets) == sorted(keys_of(target))
    assert all((key.status == "unused") == bool(key.why) == (not key.target) for key in done.keys)
    assert all((key.status == "used") == (key.source == key.target) for key in done.keys)


def test_the_decoders_of_other_targets_are_unused_and_it_says_why(tmp_path: Path) -> None:
    state = systems.mvd_state(systems.autoencoder())
    torch.save(state, tmp_path / "mvd.pth")
    done = convert_weights(tmp_path / "mvd.pth", tmp_path / "a.safetensors", "everest", CLIP)
    why = {key.source: key.why for key in done.keys if key.status == "unused"}
    assert done.source == "mvd encoder" and done.config.model.positions == "grid"
    assert len(why) == len(state) - 56 and why["decoder_vid.blocks.1.mlp.fc2.bias"].startswith(
        "part of a decoder whose"
    )
    assert why["pos_embed"] == "equals the fixed table of model.positions=grid"


def training_arguments(**extra: Any) -> argparse.Namespace:
    return argparse.Namespace(num_frames=8, input_size=64, sampling_rate=2, **extra)


def test_a_training_scripts_file_tells_its_clips_and_tokens(tmp_path: Path) -> None:
    """The clip and token settings come from the arguments in a file of the original `save_model`.

    Such a file holds NumPy numbers in the state of the optimiser, and the arguments as an argparse namespace.
    """
    optimizer = {"param_groups": [{"lr": np.float64(1e-3), "lr_scale": np.float32(0.5), "step": np.int64(3)}]}
    arguments = training_arguments(mcm=True, mcm_ratio=0.4, data_set="SSV2")
    content = {"model": finetuned(), "optimizer": optimizer, "epoch": 9, "scaler": {}, "args": arguments}
    torch.save(content, tmp_path / "a.pth")
    done = convert_weights(tmp_path / "a.pth", tmp_path / "a.safetensors", "everest")
    assert done.assumed == [] and done.left_out == ("optimizer", "epoch", "scaler", "args")
    config = load_model(tmp_path / "a.safetensors").config
    assert (config.model.num_frames, config.model.image_size, config.data.frame_stride) == (8, 64, 2)
    assert (config.tokens.selection, config.tokens.keep_ratio, config.data.sampling) == (
        "rero",
        0.6,
        "segments",
    )
    assert config.model.num_classes == systems.CLASSES


def test_pretraining_arguments_of_everest(tmp_path: Path) -> None:
    arguments = training_arguments(
        mask_type="motion-centric", mask_ratio=0.75, motion_centric_masking_ratio=0.7
    )
    torch.save({"model": pretrained(), "args": arguments}, tmp_path / "a.pth")
    tokens = load_model(tmp_path / "a.pth").config.tokens
    assert (tokens.selection, tokens.keep_ratio, tokens.mask_ratio) == ("rero", 0.3, 0.75)


def test_what_no_file_tells_is_assumed_and_said(tmp_path: Path) -> None:
    torch.save({"model": finetuned()}, tmp_path / "a.pth")
    done = convert_weights(tmp_path / "a.pth", tmp_path / "a.safetensors", "everest", ["model.image_size=64"])
    assert done.assumed == ["model.num_frames=16"]


@pytest.mark.parametrize(
    ("wrap", "entry"),
    [
        (lambda state: {"module": {k: v.half() for k, v in state.items()}, "ds_version": "0.7.3"}, None),
        (lambda state: {"model": {f"module.{k}": v.half().float() for k, v in state.items()}}, None),
        (lambda state: {f"backbone.{k}": v.half() for k, v in state.items()}, None),
        (lambda state: {"model": {}, "model_ema": {k: v.half() for k, v in state.items()}}, "model_ema"),
    ],
    ids=["deepspeed", "ddp", "bare", "ema"],
)
def test_wrappers_come_off(tmp_path: Path, wrap: Change, entry: str | None) -> None:
    state = finetuned()
    torch.save(wrap(state), tmp_path / "a.pth")
    convert_weights(tmp_path / "a.pth", tmp_path / "back.pth", "videomae", CLIP, entry)
    assert_equal(keys_of(tmp_path / "back.pth"), {key: value.half().float() for key, value in state.items()})


def test_a_deepspeed_folder_is_read(tmp_path: Path) -> None:
    torch.save({"module": finetuned()}, tmp_path / "mp_rank_00_model_states.pt")
    assert load_model(tmp_path, *CLIP).config.model.backbone == "vit_tiny"


def without(key: str) -> Change:
    return lambda state: {name: value for name, value in state.items() if name != key}


def with_(key: str, *shape: int) -> Change:
    return lambda state: {**state, key: torch.zeros(shape)}


def renamed(state: State) -> dict[str, Tensor]:
    return {f"trunk.{name}": value for name, value in state.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("blocks.2.attn.q_bias"), "at `blocks.2.attn.q_bias`; given: absent; allowed: shape (128,)"),
        (with_("blocks.3.mlp.fc1.weight", 9, 128), "at `blocks.3.mlp.fc1.weight`; given: shape (9, 128)"),
        (with_("head.bias", 7), "at `head.bias`; given: shape (7,), as `head.bias`; allowed: shape (6,)"),
        (
            with_("blocks.0.gamma_1", 128),
            "`blocks.0.gamma_1` is not a known part of a videomae finetune model",
        ),
        (with_("pos_embed", 1, 64, 128), "`pos_embed` is not the fixed position table"),
        (with_("cls_token", 1, 1, 128), "`cls_token` is not a known part of"),
        (with_("patch_embed.proj.weight", 128, 3, 16, 16), "`patch_embed.proj.weight` is not a tubelet"),
        (
            with_("blocks.4.norm1.weight", 128),
            "matches no known backbone; given: width 128, 5 blocks; allowed: vit_tiny",
        ),
        (renamed, "unknown layout; given: 58 keys, such as trunk.blocks.0.attn.proj.bias"),
        (lambda state: {"epoch": 3}, "or model_state_dict or state_dict; given: entries epoch"),
        (
            lambda state: {"model": state, "run": Path("a")},
            "it holds objects other than weights; given: pathlib",
        ),
        (lambda state: [1], "not a dictionary of weights; given: list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named_in_one_line(tmp_path: Path, change: Change, says: str) -> None:
    torch.save(change(finetuned()), tmp_path / "a.pth")
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path / "a.pth", *CLIP)
    assert says in str(refused.value) and "a.pth" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"), [("a.pth", b"no weights"), ("a.pth", b""), ("a.safetensors", b"no weights")]
)
def test_a_file_of_something_else_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name):
        load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_attention_heads": 8}, "`num_attention_heads` is not supported; given: 8; allowed: 4"),
        ({"hidden_act": "relu"}, "`hidden_act` is not supported"),
        ({"qv_bias": False}, "at `videomae.encoder.layer.0.attention.attention.q_bias`; given: absent"),
        ({"intermediate_size": 100}, "layer.0.intermediate.dense.weight"),
    ],
)
def test_a_transformers_model_of_another_architecture_is_refused(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    systems.classifier(**settings).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path)
    assert says in str(refused.value)


def test_other_normalisation_of_pixels_is_refused(tmp_path: Path) -> None:
    systems.classifier().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5, 0.5]}')
    says = r"preprocessor_config.json: this checkpoint normalises .*given: image_mean \[0.5.*fix: correct"
    with pytest.raises(CheckpointError, match=says):
        load_model(tmp_path)


def test_a_pretrained_model_without_its_last_norm_says_why(tmp_path: Path) -> None:
    model = systems.transformers.VideoMAEForPreTraining(systems.their_config())  # use_mean_pooling by default
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path)
    assert "no last LayerNorm `videomae.layernorm.weight`" in str(refused.value)
    assert "use_mean_pooling True in config.json" in str(refused.value)


def test_other_positions_do_not_go_where_they_are_not_known(tmp_path: Path) -> None:
    torch.save({"model": finetuned()}, tmp_path / "a.pth")
    for system, positions in (("mvd", "flat"), ("videomae", "grid"), ("transformers", "grid")):
        with pytest.raises(CheckpointError, match=f"{system} uses other fixed positions"):
            convert_weights(
                tmp_path / "a.pth", tmp_path / "b", system, [*CLIP, f"model.positions={positions}"]
            )
    assert not (tmp_path / "b").exists()


def test_class_names_travel(tmp_path: Path) -> None:
    names = {number: f"sport {number}" for number in range(systems.CLASSES)}
    systems.classifier(id2label=names).save_pretrained(tmp_path / "hub")
    convert_weights(tmp_path / "hub", tmp_path / "a.safetensors", "everest")
    convert_weights(tmp_path / "a.safetensors", tmp_path / "again", "transformers")
    assert load_model(tmp_path / "again").class_names == list(names.values())


@pytest.mark.parametrize("prefix", ["model.", "module._orig_mod.", "backbone.module."])
@pytest.mark.parametrize("make", [finetuned, pretrained])
def test_wrappers_come_off_whatever_the_file_is(
    tmp_path: Path, make: Callable[[], State], prefix: str
) -> None:
    state = make()
    wrapped = {prefix + name: tensor.contiguous() for name, tensor in state.items()}
    save_file(wrapped, tmp_path / "w.safetensors")
    torch.save(wrapped, tmp_path / "w.pth")
    for source in ("w.safetensors", "w.pth"):
        convert_weights(tmp_path / source, tmp_path / "out.pth", "videomae", CLIP)
        assert_equal(keys_of(tmp_path / "out.pth"), state)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_weights_that_are_no_numbers_are_named(tmp_path: Path, value: float, suffix: str) -> None:
    state = finetuned()
    state["blocks.2.mlp.fc1.weight"][3, 5] = value
    file = tmp_path / f"bad{suffix}"
    save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    kind = "1 NaN and 0 infinite" if value != value else "0 NaN and 1 infinite"
    with pytest.raises(CheckpointError, match=rf"`blocks\.2\.mlp\.fc1\.weight` holds .*{kind} values"):
        convert_weights(file, tmp_path / "out.safetensors", "everest", CLIP)
    assert not (tmp_path / "out.safetensors").exists()
    with pytest.raises(CheckpointError, match="not finite"):
        load_model(file, *CLIP)


@pytest.mark.parametrize(
    "index",
    [
        {},
        [],
        {"weight_map": {}},
        {"weight_map": ["a"]},
        {"weight_map": {"a": 3}},
        {"weight_map": {"a": "../model.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "deep/model.safetensors"}},
    ],
)
def test_an_index_names_files_of_its_own_folder(tmp_path: Path, index: object) -> None:
    folder = tmp_path / "folder"
    systems.classifier().save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not an index of weights|not a JSON object"):
        convert_weights(folder, tmp_path / "out.safetensors", "everest", CLIP)
