"""MVD's pre-training step: a student predicts the features of two frozen teachers at masked tubelets.

Wang et al., "Masked Video Distillation: Rethinking Masked Feature Modeling for Self-supervised Video
Representation Learning", CVPR 2023; github.com/ruiwang2021/mvd (modeling_student.py,
engine_for_pretraining.py, scripts/mvd_vit_base_from_vit_base_teacher_epoch_400/). At the published sizes,
student and teachers use the same image size, so the input is a single clip.

Shape legend: B clips, F frames, H x W pixels, N tokens, V visible, M masked, P values of a tubelet,
D student width, E teacher width.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.selections import pretrain_counts
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.masked import MaskedDecoder, MaskedEncoder
from everest_ds.efficiency.peers.teachers import ImageTeacher, VideoTeacher
from everest_ds.models.linear import Linear
from everest_ds.models.positions import video_positions
from everest_ds.models.selection.masks import split_tubes
from everest_ds.models.tubelets import gather_tokens, to_tubelets
from everest_ds.models.vit import init_weights

IMAGE_DECODER_STREAM, VIDEO_DECODER_STREAM = 8, 9


class Student(nn.Module):
    """The student: an encoder of the visible tokens, with a decoder and a linear head for each teacher.

    Args:
        geometry: geometry of the clips.
        shape: width, depth and heads of the encoder.
        decoder_depth: number of blocks per decoder; the decoders are as wide as the encoder.
        teacher_width: E, the width of both teachers.
        drop_path: largest drop-path rate of the encoder and of the decoders.
        attention: `fused` or `unfused`.
    """

    def __init__(
        self,
        geometry: ClipGeometry,
        shape: TransformerShape,
        decoder_depth: int,
        teacher_width: int,
        drop_path: float,
        attention: str = "fused",
    ) -> None:
        super().__init__()
        width = shape.width
        positions_ND = video_positions(geometry, width)
        self.encoder = MaskedEncoder(geometry, shape, positions_ND, drop_path, attention)
        decoder = partial(
            MaskedDecoder,
            width,
            TransformerShape(width, decoder_depth, shape.heads),
            positions_ND,
            bias=True,
            drop_path=drop_path,
            attention=attention,
        )
        self.image_decoder = decoder(stream=IMAGE_DECODER_STREAM)
        self.video_decoder = decoder(stream=VIDEO_DECODER_STREAM)
        self.image_head = Linear(width, teacher_width)
        self.video_head = Linear(width, teacher_width)

    def forward(
        self, tubelets_BNP: Tensor, visible_BV: Tensor, masked_BM: Tensor, key_B: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Predict each teacher's features of the masked tubelets: uint8 (B, N, P) -> two of (B, M, E)."""
        x_BVD = self.encoder(tubelets_BNP, visible_BV, key_B)
        image_BME = self.image_head(self.image_decoder(x_BVD, visible_BV, masked_BM, key_B))
        video_BME = self.video_head(self.video_decoder(x_BVD, visible_BV, masked_BM, key_B))
        return image_BME, video_BME


class MVD(nn.Module):
    """The student and its teachers; the forward pass returns the loss.

    Args:
        geometry: geometry of the clips.
        student: the network that is trained.
        image_teacher: frozen teacher that sees single frames.
        video_teacher: frozen teacher that sees the whole clip.
        mask_ratio: share of the places of a slot that are masked, the same places in every slot (tubes).
    """

    def __init__(
        self,
        geometry: ClipGeometry,
        student: Student,
        image_teacher: ImageTeacher,
        video_teacher: VideoTeacher,
        mask_ratio: float,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.num_visible = pretrain_counts(geometry, "tube", 1.0, mask_ratio).num_visible
        self.student = student
        self.image_teacher = image_teacher.requires_grad_(False)
        self.video_teacher = video_teacher.requires_grad_(False)
        self.apply(init_weights)
        for decoder in (student.image_decoder, student.video_decoder):
            nn.init.trunc_normal_(decoder.mask_token, std=0.02)
        nn.init.normal_(image_teacher.class_token, std=0.02)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor) -> Tensor:
        """Compute the float32 loss of uint8 clips (B, F, H, W, 3); the keys (B,) drive all randomness."""
        visible_BV, masked_BM = split_tubes(self.geometry, self.num_visible, key_B)
        tubelets_BNP = to_tubelets(clip_BFHWC, self.geometry)
        # As in the released code, the student's activations are in memory while the teachers run.
        image_BME, video_BME = self.student(tubelets_BNP, visible_BV, masked_BM, key_B)
        with torch.no_grad():
            image_target = gather_tokens(self.image_teacher(clip_BFHWC, key_B), masked_BM)
            video_target = gather_tokens(self.video_teacher(clip_BFHWC, key_B), masked_BM)
        image_loss = F.smooth_l1_loss(image_BME.float(), image_target.float())
        return image_loss + F.smooth_l1_loss(video_BME.float(), video_target.float())

    def blank_inputs(self, num_clips: int) -> tuple[Tensor, Tensor]:
        """Return zeros for the arguments of the forward pass, for tracing, which needs no values."""
        g, like = self.geometry, self.image_teacher.class_token.new_zeros
        clip_BFHWC = like(num_clips, g.num_frames, g.image_size, g.image_size, 3, dtype=torch.uint8)
        return clip_BFHWC, like(num_clips, dtype=torch.int64)


def build_mvd(
    geometry: ClipGeometry = ClipGeometry(),
    student: TransformerShape = BACKBONES["vit_base"].encoder,
    teacher: TransformerShape = BACKBONES["vit_base"].encoder,
    decoder_depth: int = 2,
    mask_ratio: float = 0.9,
    drop_path: float = 0.1,
    attention: str = "fused",
) -> MVD:
    """Build MVD, by default at the sizes of its K400 script "ViT-B from ViT-B teachers".

    Args:
        geometry: geometry of the clips.
        student: shape of the student's encoder.
        teacher: shape of both teachers; `BACKBONES["vit_large"].encoder` for the recipe with larger teachers.
        decoder_depth: number of blocks in each of the two decoders.
        mask_ratio: share of the places of a slot that are masked.
        drop_path: largest drop-path rate of the student's encoder and decoders.
        attention: `fused`, or `unfused` as in the published memory measurements.
    """
    return MVD(
        geometry,
        Student(geometry, student, decoder_depth, teacher.width, drop_path, attention),
        ImageTeacher(geometry, teacher, attention),
        VideoTeacher(geometry, teacher, attention),
        mask_ratio,
    )
