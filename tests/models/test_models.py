"""Tests of both models with every selection: shapes, gradients, static graphs and independent clips."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from everest_ds.config import Experiment
from everest_ds.config.backbones import BACKBONES, Backbone, TransformerShape
from everest_ds.models import Classifier, PretrainModel, build_model
from everest_ds.models.pretrain import Reconstruction
from everest_ds.models.sampling import drop_scale
from everest_ds.models.selection.rero import select_tokens, token_importance
from everest_ds.models.tubelets import from_tubelets, to_tubelets
from everest_ds.models.vit import DROP_PATH_STREAM, Blocks
from everest_ds.profiling.launches import count_launches
from tests.models import TASKS_AND_SELECTIONS, built, experiment, loss_of, random_clips

KEYS = torch.tensor([101, 202, 303])
every_mode = pytest.mark.parametrize(("task", "selection"), TASKS_AND_SELECTIONS)


@every_mode
def test_every_parameter_learns(task: str, selection: str) -> None:
    config = experiment(task, selection, drop_path=0.1)
    model = built(config)
    loss_of(model(random_clips(config, 3), KEYS)).backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


class RefuseHostTensors(TorchDispatchMode):
    """Dispatch mode that fails on tensors made from Python numbers, since their copy stalls the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func is not torch.ops.aten.lift_fresh.default, "torch.tensor(...) in a forward pass"
        return func(*args, **(kwargs or {}))


@every_mode
def test_no_step_makes_the_host_wait_for_the_device(task: str, selection: str) -> None:
    """A step runs on fake tensors, on which a boolean mask, `.item()` or `if tensor` would raise."""
    config = experiment(task, selection, drop_path=0.1)
    model, clips = built(config), random_clips(config, 2)
    fake = FakeTensorMode()
    state: dict[str, Tensor]
    state = {name: fake.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
    inputs = (fake.from_tensor(clips), fake.from_tensor(KEYS[:2]))
    with fake, RefuseHostTensors():
        loss = loss_of(functional_call(model, state, inputs))
        loss.backward()
    assert loss.shape == () and loss.dtype == torch.float32
    assert all(state[name].grad is not None for name, _ in model.named_parameters())


STATIC = [
    *(experiment(task, selection) for task, selection in TASKS_AND_SELECTIONS),
    experiment("pretrain", "rero", score="sketch", distance="cosine", frame_oversampling=1.5),
    experiment("finetune", "rero", score="pixel", frame_oversampling=1.5),
]


@pytest.mark.parametrize("config", STATIC, ids=lambda c: f"{c.task}-{c.tokens.selection}-{c.tokens.score}")
def test_a_step_is_one_graph_compiled_once_whatever_the_clips(config: Experiment) -> None:
    model = built(config)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed, still in enumerate((False, False, True)):
            clips, keys = random_clips(config, 2, seed), KEYS[:2] + seed
            clips = clips[:, :1].expand_as(clips).contiguous() if still else clips
            whole = loss_of(compiled(clips, keys))
            torch.testing.assert_close(whole, loss_of(model(clips, keys)))
    torch._dynamo.reset()


@every_mode
@pytest.mark.parametrize("training", [False, True])
def test_a_clip_does_not_see_its_neighbours(task: str, selection: str, training: bool) -> None:
    config = experiment(task, selection, drop_path=0.3)
    model, clips = built(config).train(training), random_clips(config, 3)
    with torch.no_grad():
        together = model(clips, KEYS)
        alone = [model(clips[i : i + 1], KEYS[i : i + 1]) for i in range(3)]
    if isinstance(together, Reconstruction):
        for field in ("visible_BV", "predicted_BM"):
            assert torch.equal(getattr(together, field), torch.cat([getattr(one, field) for one in alone]))
        together, alone = together.prediction_BMP, [one.prediction_BMP for one in alone]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backbone", ["vit_small", "vit_base", "vit_large", "vit_huge"])
@pytest.mark.parametrize(
    ("selection", "keep_ratio", "visible", "predicted"),
    [("rero", 0.3, 156, 314), ("rero", 0.4, 156, 471), ("tube", 0.3, 160, 1408)],
)
def test_pretraining_shapes_at_full_size(
    backbone: str, selection: str, keep_ratio: float, visible: int, predicted: int
) -> None:
    config = experiment("pretrain", selection, keep_ratio, backbone=backbone, num_frames=16, image_size=224)
    with torch.device("meta"):
        output = build_model(config)(torch.empty(2, 16, 224, 224, 3, dtype=torch.uint8), KEYS[:2].to("meta"))
    assert output.visible_BV.shape == (2, visible)
    assert output.predicted_BM.shape == (2, predicted)
    assert output.prediction_BMP.shape == (2, predicted, 1536)


@pytest.mark.parametrize("backbone", ["vit_small", "vit_base", "vit_large", "vit_huge"])
@pytest.mark.parametrize(("selection", "kept"), [("rero", 940), ("none", 1568)])
def test_finetuning_shapes_at_full_size(backbone: str, selection: str, kept: int) -> None:
    config = experiment("finetune", selection, 0.6, backbone=backbone, num_frames=16, image_size=224)
    with torch.device("meta"):
        model = build_model(config)
        assert isinstance(model, Classifier)
        clip, keys = torch.empty(2, 16, 224, 224, 3, dtype=torch.uint8), KEYS[:2].to("meta")
        assert model.selector(clip, model.encoder.embed(), keys).visible_BV.shape == (2, kept)
        assert model(clip, keys).shape == (2, 7)


@pytest.mark.parametrize(
    "geometry",
    [
        {"num_frames": 4, "tubelet_size": 1, "image_size": 32},
        {"num_frames": 24, "tubelet_size": 4, "image_size": 48},
        {"num_frames": 6, "patch_size": 8, "image_size": 40},
    ],
)
@pytest.mark.parametrize("task", ["pretrain", "finetune"])
def test_any_number_of_frames_tubelet_and_resolution(task: str, geometry: dict[str, Any]) -> None:
    config = experiment(task, "rero", 0.5, **geometry)
    output = built(config)(random_clips(config, 1), KEYS[:1])
    assert torch.isfinite(loss_of(output))
    if isinstance(output, Reconstruction):
        assert output.prediction_BMP.shape[1:] == (
            config.token_counts.num_predicted,
            config.model.geometry.tubelet_values,
        )


CLIPS = st.fixed_dictionaries(
    {
        "num_frames": st.sampled_from([8, 12, 16, 32, 48, 64]),
        "tubelet_size": st.sampled_from([1, 2, 4]),
        "image_size": st.sampled_from([112, 224, 336, 448]),
        "patch_size": st.sampled_from([14, 16]),
    }
)


@settings(deadline=None, max_examples=30)
@given(CLIPS, st.sampled_from(TASKS_AND_SELECTIONS), st.sampled_from([0.05, 0.12, 0.3, 0.6, 1.0]))
def test_any_geometry_computes_on_its_counts_or_is_refused_with_a_reason(
    clip: dict[str, Any], mode: tuple[str, str], keep_ratio: float
) -> None:
    try:
        config = experiment(*mode, keep_ratio, **clip)
    except ValidationError as error:
        if mode == ("pretrain", "dual"):
            assert clip["num_frames"] // clip["tubelet_size"] % 4 and "multiple of 4 slots" in str(error)
        elif mode[1] == "rlt" and "tokens of 1 slot, but" in str(error):
            assert keep_ratio < clip["tubelet_size"] / clip["num_frames"]
        else:
            assert mode[0] == "pretrain" and mode[1] not in ("tube", "dual", "none") and keep_ratio < 0.1
            assert "keep_ratio must exceed 1 - mask_ratio" in str(error)
        return
    frames, size, counts = clip["num_frames"], clip["image_size"], config.token_counts
    with torch.device("meta"):
        pixels = torch.empty(2, frames, size, size, 3, dtype=torch.uint8)
        output = build_model(config)(pixels, torch.empty(2, dtype=torch.int64))
    if isinstance(output, Reconstruction):
        assert output.visible_BV.shape == (2, counts.num_visible)
        assert output.prediction_BMP.shape[:2] == (2, counts.num_predicted)
    else:
        assert output.shape == (2, 7)


def test_pretraining_touches_exactly_the_tokens_that_the_selector_keeps() -> None:
    config = experiment("pretrain", "rero", 0.4)
    model, clips = PretrainModel(config), random_clips(config, 3)
    output = model(clips, KEYS)
    tubelets = to_tubelets(clips, config.model.geometry)
    importance = token_importance(tubelets, 4, model.encoder.embed(), "l2")
    chosen = torch.cat([output.visible_BV, output.predicted_BM], dim=1).sort(dim=1).values
    assert torch.equal(chosen, select_tokens(importance, config.token_counts.num_kept))


def test_classifier_ignores_the_pixels_of_discarded_tokens() -> None:
    """The pixels of still places do not matter if one place moves and only its tokens are kept."""
    config = experiment("finetune", "rero", keep_ratio=1 / 16)  # one token per slot
    still = random_clips(config, 1)[:, :1].expand(-1, 8, -1, -1, -1).clone()
    still[:, :, 16:32, 32:48] = random_clips(config, 1, seed=2)[:, :, 16:32, 32:48]
    other = still.clone()
    other[:, :, :16, :16] = 255 - still[:, :, :16, :16]
    model = built(config).eval()
    with torch.no_grad():
        assert torch.equal(model(still, KEYS[:1]), model(other, KEYS[:1]))


def test_prediction_does_not_see_the_pixels_that_it_predicts() -> None:
    config = experiment("pretrain", "tube")
    model, clip = built(config), random_clips(config, 1)
    first = model(clip, KEYS[:1])
    tubelets = to_tubelets(clip, config.model.geometry).clone()
    tubelets[:, first.predicted_BM[0]] = 255 - tubelets[:, first.predicted_BM[0]]
    second = model(from_tubelets(tubelets, config.model.geometry), KEYS[:1])
    assert torch.equal(first.prediction_BMP, second.prediction_BMP)
    assert first.loss != second.loss


def test_loss_is_the_mean_squared_error_of_what_it_says_it_predicted() -> None:
    config = experiment("pretrain", "rero", 0.4)
    model, clips = built(config), random_clips(config, 2)
    output = model(clips, KEYS[:2])
    tubelets = to_tubelets(clips, config.model.geometry)
    errors = []
    for clip in range(2):
        for place, token in enumerate(output.predicted_BM[clip].tolist()):
            pixels = tubelets[clip, token].view(512, 3) / 255
            target = (pixels - pixels.mean(0)) / (pixels.std(0) + 1e-6)
            errors.append((output.prediction_BMP[clip, place] - target.flatten()) ** 2)
    torch.testing.assert_close(output.loss, torch.stack(errors).mean())


def test_a_loss_holds_the_memory_of_one_value() -> None:
    """A run holds the losses of all steps since its last report."""
    config = experiment("pretrain", "rero")
    output = built(config)(random_clips(config, 2), KEYS[:2])
    assert output.loss.untyped_storage().nbytes() == output.loss.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_still_takes_its_loss_in_float32(dtype: torch.dtype) -> None:
    config = experiment("pretrain", "rero")
    model, clips = built(config), random_clips(config, 2)
    exact = model(clips, KEYS[:2]).loss
    half = model.to(dtype)(clips, KEYS[:2]).loss
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0.05, atol=0)


def stack_of(*branches: float, drop_path: float) -> Blocks:
    """Build one block per two values, whose attention and MLP branches add these values to their input."""
    stack = Blocks(TransformerShape(8, len(branches) // 2, 1), drop_path)
    for parameter in stack.parameters():
        nn.init.zeros_(parameter)
    blocks: Iterable[Any] = stack
    for block, of_attention, of_mlp in zip(blocks, branches[::2], branches[1::2], strict=True):
        nn.init.constant_(block.attention.proj.bias, of_attention)
        nn.init.constant_(block.mlp.fc2.bias, of_mlp)
    return stack


def test_drop_path_keeps_the_expectation_and_drops_whole_clips_by_key() -> None:
    stack, clips = stack_of(0.0, 0.0, 1.0, 0.0, drop_path=0.3), 4000
    keys = torch.arange(clips)
    change = stack(torch.zeros(clips, 3, 8), keys)
    survived = change.flatten(1).any(dim=1)
    torch.testing.assert_close(change[survived], torch.full((int(survived.sum()), 3, 8), 1 / 0.7))
    assert survived.float().mean().item() == pytest.approx(0.7, abs=4 * (0.21 / clips) ** 0.5)
    assert torch.equal(stack(torch.zeros(clips, 3, 8), keys.flip(0)).flip(0), change)


def test_branches_and_blocks_drop_independently_at_rates_that_grow_linearly() -> None:
    clips, values = 4000, [2.0**i for i in range(10)]
    rates = [0.0, 0.125, 0.25, 0.375, 0.5]
    total = torch.zeros(clips, 10)
    for i, value in enumerate(values):  # only one branch has an output
        alone = [0.0] * 10
        alone[i] = value
        total[:, i] = stack_of(*alone, drop_path=0.5)(torch.zeros(clips, 1, 8), torch.arange(clips))[:, 0, 0]
    dropped = (total == 0).double()
    assert not dropped[:, :2].any()
    for column, rate in zip(dropped.T, [rate for rate in rates for _ in range(2)], strict=True):
        assert column.mean().item() == pytest.approx(rate, abs=4 * (rate * (1 - rate) / clips) ** 0.5)
    agreement = torch.corrcoef(dropped[:, 2:].T) - torch.eye(8)
    assert agreement.abs().max() < 4 / clips**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_hash_for_all_branches_is_one_for_each_bit_for_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    depth, rate = 5, 0.4
    stack = Blocks(TransformerShape(16, depth, 2), rate).to(dtype)
    x, keys = torch.randn(6, 3, 16).to(dtype), torch.arange(6) * 7919
    gradients = []
    for run in (stack, partial(dropped_one_by_one, stack, rate)):
        inputs = x.clone().requires_grad_()
        output = run(inputs, keys)
        output.float().square().sum().backward()
        gradients.append([output, inputs.grad, *(parameter.grad for parameter in stack.parameters())])
        stack.zero_grad()
    assert all(map(torch.equal, *gradients))


def dropped_one_by_one(stack: Blocks, rate: float, x: Tensor, keys: Tensor) -> Tensor:
    """Apply the blocks with one random draw per branch that can be dropped."""
    blocks: Iterable[Any] = stack
    for i, block in enumerate(blocks):
        own_rate = rate * i / (len(stack) - 1)
        for j, (norm, branch) in enumerate(((block.norm1, block.attention), (block.norm2, block.mlp))):
            out = branch(norm(x))
            if own_rate > 0:
                out = (
                    out * drop_scale(keys, DROP_PATH_STREAM + 2 * i + j, 1, own_rate).to(x.dtype)[:, :, None]
                )
            x = x + out
    return x


def test_evaluation_drops_no_path() -> None:
    config = experiment("finetune", "none", drop_path=0.9)
    model, clips = built(config).eval(), random_clips(config, 1)
    assert torch.equal(model(clips, KEYS[:1]), model(clips, KEYS[1:2]))


@pytest.mark.parametrize(("task", "most"), [("pretrain", 450), ("finetune", 450)])
def test_a_forward_pass_of_vit_large_launches_few_operators(
    task: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward pass of 24 narrow blocks launches few operators; drop path per branch would add 1500."""
    encoder, decoder = TransformerShape(64, 24, 16), TransformerShape(32, 4, 8)
    monkeypatch.setitem(BACKBONES, "vit_large", Backbone(encoder, decoder))
    tiny: dict[str, Any] = {"backbone": "vit_large", "image_size": 32, "patch_size": 8}
    drop_path = 0.1 if task == "finetune" else 0.0
    config = experiment(task, "rero", 0.6, drop_path=drop_path, **tiny)
    model, clips = built(config), random_clips(config, 2)
    counted = count_launches(lambda: model(clips, KEYS[:2]))
    assert counted.total <= most and counted.waits == 0


def test_dropout_before_the_head_keeps_the_expectation_and_follows_the_key() -> None:
    config = experiment("finetune", "none", head_drop=0.25)
    model, one, clips = built(config), random_clips(config, 1), 64
    model.head = nn.Identity()  # output the features that the head would read
    keys = torch.arange(clips)
    exact = model.eval()(one, keys[:1])
    features = model.train()(one.expand(clips, -1, -1, -1, -1), keys)
    survived = features != 0
    torch.testing.assert_close(features, survived * exact / 0.75, rtol=1e-4, atol=1e-5)
    assert survived.float().mean().item() == pytest.approx(0.75, abs=4 * (0.1875 / features.numel()) ** 0.5)
    reverse = model(one.expand(clips, -1, -1, -1, -1), keys.flip(0))
    assert torch.equal(reverse.flip(0) != 0, survived)


def test_masking_follows_the_key_alone() -> None:
    config = experiment("pretrain", "tube")
    model, clips = built(config), random_clips(config, 1)
    assert isinstance(model, PretrainModel)
    first, again, other = (model(clips, torch.tensor([key])).visible_BV for key in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
