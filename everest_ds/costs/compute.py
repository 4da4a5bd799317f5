"""Predicted compute of a model: multiply-accumulates (MACs) and parameters in closed form, without torch.

Convention (the literature's "GFLOPs", as counted by fvcore): one multiply-accumulate counts as 1; every
linear map, QKᵀ and AV are counted, for one clip and one view. Softmax, GELU, biases, residuals, means,
sorting, gathering and distances are not counted. LayerNorm is reported separately, in input elements,
because fvcore weighs it at 5 per element.

Symbols: N tokens, K kept, V visible, M = K - V predicted, P values per tubelet, D encoder width,
d decoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

from everest_ds.config.backbones import TransformerShape
from everest_ds.config.schema import Experiment
from everest_ds.config.selections import scored_slots
from everest_ds.costs import block

LITERATURE_MACS_PER_NORM_ELEMENT = 5
FLOPS_PER_MAC = 2  # a multiplication and an addition


@dataclass(frozen=True)
class ComputePrediction:
    """MACs of one clip's forward pass, by part, on the sparse path that this project's models take.

    Attributes:
        score_macs: features for ReRo's importance and for frame selection, without gradient.
        embed_macs: embedding of the tokens that the encoder sees.
        encoder_macs: encoder blocks.
        projection_macs: projection from encoder to decoder width; 0 in fine-tuning.
        decoder_macs: decoder blocks; 0 in fine-tuning.
        head_macs: pixels of the predicted tokens, or class logits.
        embed_all_macs: embedding of all N tokens once, as in the published systems; not on the sparse path.
        layer_norm_elements: input elements of all LayerNorms.
    """

    score_macs: int
    embed_macs: int
    encoder_macs: int
    projection_macs: int
    decoder_macs: int
    head_macs: int
    embed_all_macs: int
    layer_norm_elements: int

    @property
    def _after_embedding_macs(self) -> int:
        return self.encoder_macs + self.projection_macs + self.decoder_macs + self.head_macs

    @property
    def forward_macs(self) -> int:
        """MACs of one clip's forward pass, not counting LayerNorm."""
        return self.score_macs + self.embed_macs + self._after_embedding_macs

    @property
    def training_macs(self) -> int:
        """MACs of one clip's forward and backward pass, without recomputation.

        For each MAC of the forward pass, the backward pass costs one MAC for the gradient of each operand:
        the weights and inputs of a linear map, and both factors of QKᵀ and of AV. The factor is therefore 3
        in general, 2 for the embedding (its input is pixels, which need no gradient) and 1 for scoring
        (which has no backward pass).
        """
        return self.score_macs + 2 * self.embed_macs + 3 * self._after_embedding_macs

    @property
    def literature_macs_without_norms(self) -> int:
        """MACs of one clip's forward pass in the published systems, which embed all N tokens once."""
        return self.embed_all_macs + self._after_embedding_macs

    @property
    def literature_macs(self) -> int:
        """MACs that papers print as GFLOPs: all N tokens embedded, 5 per LayerNorm element (as in fvcore)."""
        norms = LITERATURE_MACS_PER_NORM_ELEMENT * self.layer_norm_elements
        return self.literature_macs_without_norms + norms


def predict_macs(config: Experiment) -> ComputePrediction:
    """Predict the compute of one clip under `config` from its token counts and widths alone."""
    counts, shape = config.token_counts, config.model.shape
    embed_one = config.model.geometry.tubelet_values * shape.encoder.width
    pretrain = config.task == "pretrain"
    return ComputePrediction(
        score_macs=_score_macs(config),
        embed_macs=counts.num_visible * embed_one,
        encoder_macs=blocks_macs(shape.encoder, counts.num_visible),
        projection_macs=counts.num_visible * shape.encoder.width * shape.decoder.width if pretrain else 0,
        decoder_macs=blocks_macs(shape.decoder, counts.num_kept) if pretrain else 0,
        head_macs=_head_macs(config),
        embed_all_macs=counts.num_tokens * embed_one,
        layer_norm_elements=_layer_norm_elements(config),
    )


def count_parameters(config: Experiment) -> int:
    """Return the number of trainable parameters of the experiment's model, without the fixed positions."""
    values, shape = config.model.geometry.tubelet_values, config.model.shape
    width, narrow = shape.encoder.width, shape.decoder.width
    encoder = _linear(values, width) + shape.encoder.depth * block.parameters(width)
    norm = 2 * width  # gain and bias, before the decoder's projection or the classifier's head
    if config.task == "finetune":
        return encoder + norm + _linear(width, config.model.num_classes or 0)
    projection = width * narrow  # no bias
    mask_token, decoder_norm = narrow, 2 * narrow
    blocks = shape.decoder.depth * block.parameters(narrow)
    return encoder + norm + projection + mask_token + blocks + decoder_norm + _linear(narrow, values)


def blocks_macs(shape: TransformerShape, num_tokens: int) -> int:
    """Return the forward MACs of a stack of blocks on n tokens: depth · (12·n·D² + 2·n²·D) at MLP ratio 4."""
    linears = num_tokens * block.token_macs(shape.width)
    attention = num_tokens**2 * block.pair_macs(shape.width)
    return shape.depth * (linears + attention)


def _score_macs(config: Experiment) -> int:
    """Return the MACs of token scoring: P MACs per feature for each scored tubelet.

    Frame selection (IIFS) scores all candidate slots; a selection rule that uses scores then scores the slots
    that were selected. The projection matrix of the sketch is built once per step, not once per clip, and is
    not counted.
    """
    tokens, geometry = config.tokens, config.model.geometry
    slots = scored_slots(geometry.num_slots, tokens.distance) if tokens.rule.scores else 0
    if tokens.frame_oversampling > 1:
        slots += scored_slots(config.candidate_geometry.num_slots, tokens.distance)
    each = tokens.score_kind.map_macs(config.model.shape.encoder.width, geometry.tubelet_values)
    return slots * geometry.tokens_per_slot * each


def _head_macs(config: Experiment) -> int:
    """Return the MACs of the classifier, or of the map from predicted tokens to pixels."""
    model = config.model
    if config.task == "finetune":  # the head sees one vector per clip: the mean of the tokens
        return model.shape.encoder.width * (model.num_classes or 0)
    return config.token_counts.num_predicted * model.shape.decoder.width * model.geometry.tubelet_values


def _layer_norm_elements(config: Experiment) -> int:
    """Return the number of input elements of all LayerNorms.

    Besides those of the blocks, pre-training has one norm on the visible and one on the predicted
    tokens, and fine-tuning has one on the mean of the tokens.
    """
    counts, encoder, decoder = config.token_counts, config.model.shape.encoder, config.model.shape.decoder
    in_blocks = sum(
        block.NUM_NORMS * shape.depth * num_tokens * shape.width
        for _, shape, num_tokens, _ in block.stacks(config)
    )
    if config.task == "finetune":
        return in_blocks + encoder.width
    return in_blocks + counts.num_visible * encoder.width + counts.num_predicted * decoder.width


def _linear(num_inputs: int, num_outputs: int) -> int:
    """Return the number of parameters of a linear map with bias."""
    return num_inputs * num_outputs + num_outputs
