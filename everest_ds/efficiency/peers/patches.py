"""The framework of TimeSformer, Motionformer and X-ViT: patch selection, embedding, body and class logits.

The selection of patches is a separate module, because the K-centered sampler (kcenter.py) selects a subset
and leaves the body unchanged. A patch is identified by its index among the N patches of a clip; its place and
time are looked up by this index, regardless of the slot in which the body processes it.

Shape legend: B clips, F frames, H x W pixels, N patches (tubelets) of a clip, L places of a frame, T slots of
the body, S = L patches in each, P values of a patch, D width, c class tokens (1, or one per slot).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from everest_ds.config.tokens import ClipGeometry
from everest_ds.efficiency.peers.layers import VideoClassifier, init_peer_weights, table, with_token
from everest_ds.models.tubelets import TubeletEmbedding, gather_tokens, to_tubelets
from everest_ds.models.vit import LAYER_NORM_EPS


class AllPatches(nn.Module):
    """The trivial sampler, which selects all patches of a clip, each in its own slot."""

    def __init__(self, geometry: ClipGeometry) -> None:
        super().__init__()
        self.num_slots = geometry.num_slots
        self.num_patches = geometry.num_tokens

    def forward(self, patches_BNP: Tensor, key_B: Tensor) -> Tensor:
        """Return the indices of all N patches, int64 (B, T, S)."""
        index = torch.arange(self.num_patches, device=patches_BNP.device)
        return index.view(self.num_slots, -1).expand(len(patches_BNP), -1, -1)


class PatchEmbedding(nn.Module):
    """A linear patch embedding with learned embeddings of place and time, and class tokens.

    Args:
        geometry: geometry of the clip, which defines the numbers of times (slots) and places (per slot).
        width: D.
        class_per_slot: use one class token per slot, with the slot's time embedding; otherwise one class
            token per clip, without a time embedding.
    """

    def __init__(self, geometry: ClipGeometry, width: int, class_per_slot: bool = False) -> None:
        super().__init__()
        self.num_places = geometry.tokens_per_slot
        self.class_per_slot = class_per_slot
        self.embed = TubeletEmbedding(geometry, width)
        self.class_token = table(width)
        self.places = table(1 + self.num_places, width)  # the first is the class token's
        self.times = table(geometry.num_slots, width)

    def forward(self, patches_BNP: Tensor, index_BTS: Tensor) -> tuple[Tensor, Tensor]:
        """Embed selected uint8 patches (B, N, P); return class tokens (B, c, D) and patches (B, T, S, D)."""
        chosen = gather_tokens(patches_BNP, index_BTS.flatten(1))
        x_BTSD = self.embed()(chosen).unflatten(1, index_BTS.shape[1:])
        time_BTSD = self.times[index_BTS // self.num_places]
        x_BTSD = x_BTSD + self.places[1 + index_BTS % self.num_places] + time_BTSD
        class_D = self.class_token + self.places[0]
        if self.class_per_slot:  # averages the times, as sampled patches of a slot come from several frames
            return class_D + time_BTSD.mean(dim=2), x_BTSD
        return class_D.expand(len(index_BTS), 1, -1), x_BTSD


class SequenceBody(nn.Module):
    """A body that runs the class token and all patches as one sequence, with a head on the class token.

    Args:
        blocks: the stack of blocks, called with the sequence (B, 1 + T·S, D) and the keys (B,).
        width: D.
        head: maps the class token to logits: (B, D) -> (B, classes).
    """

    def __init__(self, blocks: nn.Module, width: int, head: nn.Module) -> None:
        super().__init__()
        self.blocks = blocks
        self.norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.head = head

    def forward(self, class_B1D: Tensor, x_BTSD: Tensor, key_B: Tensor) -> Tensor:
        """Compute the class logits (B, classes)."""
        x_BnD = with_token(class_B1D, x_BTSD.flatten(1, 2))
        return self.head(self.norm(self.blocks(x_BnD, key_B))[:, 0])


class PatchClassifier(VideoClassifier):
    """A video classifier made of a patch selection, a patch embedding, and a body.

    Args:
        geometry: geometry of the clip.
        sampler: selects the patches: (patches, keys) -> indices (B, T, S).
        embedding: embeds them: (patches, indices) -> class tokens, patch tokens.
        body: classifies: (class tokens, patch tokens, keys) -> logits.
    """

    def __init__(
        self, geometry: ClipGeometry, sampler: nn.Module, embedding: PatchEmbedding, body: nn.Module
    ) -> None:
        super().__init__((geometry.num_frames, geometry.image_size, geometry.image_size, 3))
        self.geometry = geometry
        self.sampler = sampler
        self.embedding = embedding
        self.body = body
        self.apply(init_peer_weights)

    def forward(self, clip_BFHWC: Tensor, key_B: Tensor) -> Tensor:
        """Compute the logits (B, classes) of uint8 clips (B, F, H, W, 3); the keys (B,) drive randomness."""
        patches_BNP = to_tubelets(clip_BFHWC, self.geometry)
        class_BcD, x_BTSD = self.embedding(patches_BNP, self.sampler(patches_BNP, key_B))
        return self.body(class_BcD, x_BTSD, key_B)
