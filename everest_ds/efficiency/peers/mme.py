"""MME's pre-training step: prediction of appearance (HOG) and motion (trajectories) of masked tubelets.

Sun et al., "Masked Motion Encoding for Self-Supervised Video Representation Learning", CVPR 2023;
github.com/XinyuSun/MME (pretrain/, scripts/pretrain/k400-1600epo.sh). The model is VideoMAE's encoder with a
decoder of one narrow block and two heads. Histograms are computed in the forward pass. Trajectories are an
input, because MME tracks points through dense optical flow once, before training; no figure includes the cost
of tracking.

Shape legend: B clips, F frames, H x W pixels, T slots, N tokens, V visible, M masked, R x R points of a
frame (one per 8 x 8 pixels), S steps of a trajectory, C values of a target.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from everest_ds.config.backbones import BACKBONES, TransformerShape
from everest_ds.config.selections import pretrain_counts
from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.hog import CELL_SIZE, hog_targets, hog_width
from everest_ds.efficiency.peers.masked import MaskedDecoder, MaskedEncoder
from everest_ds.models.linear import Linear
from everest_ds.models.mlp import GELULinear
from everest_ds.models.selection.masks import split_tubes
from everest_ds.models.tubelets import gather_tokens, sincos_positions, to_tubelets
from everest_ds.models.vit import init_weights

NUM_STEPS = 4
MAX_STEP = 20  # pixels; the tracker clamps longer steps
HEAD_WIDTH = 512
DECODER_STREAM = 8


class MME(nn.Module):
    """MME's encoder, decoder and two heads; the forward pass returns the loss.

    Args:
        geometry: geometry of the clips; the patch size must be a multiple of the cell size of 8 pixels.
        encoder: width, depth and heads of the encoder.
        decoder: width, depth and heads of the decoder.
        mask_ratio: share of the places of a slot that are masked, the same places in every slot (tubes).
        attention: `fused`, or `unfused` as in the published memory measurements.
    """

    def __init__(
        self,
        geometry: ClipGeometry,
        encoder: TransformerShape,
        decoder: TransformerShape,
        mask_ratio: float,
        attention: str = "fused",
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.num_visible = pretrain_counts(geometry, "tube", 1.0, mask_ratio).num_visible
        positions_ND, positions_Nd = (
            sincos_positions(geometry.num_tokens, shape.width) for shape in (encoder, decoder)
        )
        self.encoder = MaskedEncoder(geometry, encoder, positions_ND, attention=attention)
        self.decoder = MaskedDecoder(
            encoder.width, decoder, positions_Nd, bias=False, stream=DECODER_STREAM, attention=attention
        )
        self.hog_head = _head(decoder.width, hog_width(geometry), nn.Sigmoid())
        self.trajectory_head = _head(decoder.width, trajectory_width(geometry), nn.Tanh())
        self.apply(init_weights)
        nn.init.trunc_normal_(self.decoder.mask_token, std=0.02)

    def forward(
        self, clip_BFHWC: Tensor, key_B: Tensor, trajectories_BTRRS2: Tensor, valid_BTRR: Tensor
    ) -> Tensor:
        """Compute the float32 loss of a batch.

        Args:
            clip_BFHWC: uint8 (B, F, H, W, 3).
            key_B: the clips' random keys (B,), which determine the masked tubes.
            trajectories_BTRRS2: (B, T, R, R, S, 2), the S steps (x, y) of each point of a slot's first frame,
                in pixels.
            valid_BTRR: bool (B, T, R, R), true for points that stay within the picture.
        """
        visible_BV, masked_BM = split_tubes(self.geometry, self.num_visible, key_B)
        hog_BMC = gather_tokens(hog_targets(clip_BFHWC, self.geometry), masked_BM)
        motion_BMC = gather_tokens(trajectory_targets(trajectories_BTRRS2, self.geometry), masked_BM)
        tracked_BM = tracked_tokens(valid_BTRR, self.geometry).gather(1, masked_BM)

        x_BVD = self.encoder(to_tubelets(clip_BFHWC, self.geometry), visible_BV, key_B)
        x_BMd = self.decoder(x_BVD, visible_BV, masked_BM, key_B)
        of_hog_BM = _squared_error(self.hog_head(x_BMd), hog_BMC)
        of_motion_BM = _squared_error(self.trajectory_head(x_BMd), motion_BMC) * tracked_BM
        return (of_hog_BM.mean() + of_motion_BM.mean()) / 2

    def blank_inputs(self, num_clips: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return zeros for the arguments of the forward pass, for tracing, which needs no values."""
        g, points = self.geometry, self.geometry.image_size // CELL_SIZE
        like = self.decoder.mask_token.new_zeros
        return (
            like(num_clips, g.num_frames, g.image_size, g.image_size, 3, dtype=torch.uint8),
            like(num_clips, dtype=torch.int64),
            like(num_clips, g.num_slots, points, points, NUM_STEPS, 2),
            like(num_clips, g.num_slots, points, points, dtype=torch.bool),
        )


def build_mme(
    geometry: ClipGeometry = ClipGeometry(),
    encoder: TransformerShape = BACKBONES["vit_base"].encoder,
    decoder: TransformerShape = TransformerShape(width=192, depth=1, heads=6),
    mask_ratio: float = 0.7,
    attention: str = "fused",
) -> MME:
    """Build MME, by default at the size and mask ratio of its K400 pre-training script."""
    return MME(geometry, encoder, decoder, mask_ratio, attention)


def trajectory_width(geometry: ClipGeometry) -> int:
    """Return C, the number of values in one token's target: 32 for patches of 16 pixels."""
    return 2 * NUM_STEPS * (geometry.patch_size // CELL_SIZE) ** 2


def trajectory_targets(trajectories_BTRRS2: Tensor, geometry: ClipGeometry) -> Tensor:
    """Standardise each step over the points of a patch: zero mean, unit unbiased standard deviation.

    Subtracting the mean removes the camera's motion and keeps the motion of the points against each other.

    Returns:
        float32 (B, N, C), in (coordinate, step, point row, point column) order.
    """
    along = geometry.patch_size // CELL_SIZE
    pattern = "b t (h i) (w j) s c -> b (t h w) c s (i j)"
    steps = rearrange(trajectories_BTRRS2.float() / MAX_STEP, pattern, i=along, j=along)
    deviation = steps - steps.mean(dim=-1, keepdim=True)
    return (deviation / (steps.var(dim=-1, keepdim=True).sqrt() + 1e-6)).flatten(2)


def tracked_tokens(valid_BTRR: Tensor, geometry: ClipGeometry) -> Tensor:
    """Return for each token whether any point of its patch is valid: bool (B, N)."""
    along = geometry.patch_size // CELL_SIZE
    return rearrange(valid_BTRR, "b t (h i) (w j) -> b (t h w) (i j)", i=along, j=along).any(dim=-1)


def _head(width: int, num_values: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(Linear(width, HEAD_WIDTH), GELULinear(HEAD_WIDTH, num_values), activation)


def _squared_error(prediction_BMC: Tensor, target_BMC: Tensor) -> Tensor:
    """Return the squared error summed over the values of each token, float32 (B, M)."""
    return (prediction_BMC.float() - target_BMC).square().sum(dim=-1)
