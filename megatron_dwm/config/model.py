"""Flags that shape the language model."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

from megatron_dwm.config.flags import (
    MAX_LAYERS,
    declared_flags,
    flag,
    flag_name,
    require_at_least,
    require_at_most,
    require_given,
)
from megatron_dwm.config.layer_patterns import parse_layers
from megatron_dwm.config.needed_flags import TOLERATED_IN_MEGATRON_SCRIPTS, missing_flag
from megatron_dwm.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """Network size and architecture."""

    num_layers: int = flag(None, "Number of transformer layers.")
    hidden_size: int = flag(None, "Transformer hidden size.")
    num_attention_heads: int = flag(None, "Number of attention heads.")
    ffn_hidden_size: int | None = flag(
        None,
        "Feed-forward hidden size. Default: 4 x hidden size; with SwiGLU 8/3 x hidden size, rounded down to a multiple "
        "of 64.",
    )
    kv_channels: int | None = flag(None, "Size of one attention head; hidden size / heads if not given.")
    group_query_attention: bool = flag(False, "Use group-query attention.")
    num_query_groups: int = flag(1, "Number of query groups in group-query attention.")
    seq_length: int = flag(None, "Maximum sequence length to process.")
    max_position_embeddings: int | None = flag(None, "Size of the position embedding table.")
    position_embedding_type: Literal["learned_absolute", "rope", "yarn", "none"] = flag(
        "learned_absolute", "Position embedding type; yarn is rope scaled by YaRN for longer sequences."
    )
    use_rotary_position_embeddings: bool = flag(
        False, "Use rotary position embeddings.", deprecated="use --position-embedding-type rope"
    )
    add_position_embedding: bool = flag(
        True,
        "Do not use learned position embeddings; only with --position-embedding-type rope or none.",
        "--no-position-embedding",
        deprecated="--position-embedding-type is enough",
    )
    rotary_base: int = flag(10000, "Base of the rotary position embeddings.")
    rotary_percent: float = flag(1.0, "Fraction of the head dimension that is rotated.")
    rotary_interleaved: bool = flag(False, "Use interleaved rotary embeddings.")
    use_rope_scaling: bool = flag(False, "Scale rotary frequencies as Llama 3 does.")
    rotary_seq_len_interpolation_factor: int | None = flag(
        None, "Divide positions by this factor before the rotation, for sequences longer than the model was trained on."
    )
    rope_scaling_factor: float = flag(8.0, "Factor of --use-rope-scaling.")
    rotary_scaling_factor: float = flag(1.0, "Factor of YaRN: by how much sequences are longer.")
    mscale: float = flag(1.0, "YaRN multiplies queries and keys by 0.1 x this x log(--rotary-scaling-factor) + 1.")
    mscale_all_dim: float = flag(0.0, "Like --mscale, but YaRN divides queries and keys by the result.")
    yarn_original_max_position_embeddings: int = flag(
        4096, "Length of the sequences that the model was trained with before YaRN."
    )
    yarn_beta_fast: float = flag(
        32.0, "Number of rotations in that length from which YaRN keeps a frequency unchanged."
    )
    yarn_beta_slow: float = flag(
        1.0, "Number of rotations in that length up to which YaRN divides a frequency by the factor."
    )
    yarn_correction_range_round_to_int: bool = flag(
        True, "Do not round the frequencies that correspond to --yarn-beta-fast and --yarn-beta-slow to whole indices."
    )
    no_rope_freq: str | None = flag(
        None,
        "Layers without rotary positions: N for every Nth layer, or a pattern with 1 for each, e.g. ([0]*3+[1])*2.",
    )
    window_size: str | None = flag(
        None, "Sliding window: the number of previous tokens that a token attends to, and 0 for later ones, e.g. 127,0."
    )
    window_attn_skip_freq: str | None = flag(
        None, "Layers without the window: N for every Nth layer, or a pattern of 1 (with) and 0 (without)."
    )
    softmax_type: Literal["vanilla", "off-by-one", "learnable"] = flag(
        "vanilla",
        "Softmax of the attention: the usual one; with 1 added to the denominator, so that a token may attend to "
        "nothing; or with a learned offset for each head.",
    )
    attention_output_gate: bool = flag(False, "Multiply the outputs of attention by a sigmoid gate of the inputs.")
    normalization: Literal["LayerNorm", "RMSNorm"] = flag("LayerNorm", "Which normalization to use.")
    layernorm_epsilon: float = flag(
        1e-5, "Epsilon of the normalization.", "--norm-epsilon", old_names=("--layernorm-epsilon",)
    )
    layernorm_zero_centered_gamma: bool = flag(
        False, "Center the normalization's gain on zero: it is 1 plus the weight.", "--apply-layernorm-1p"
    )
    qk_layernorm: bool = flag(False, "Normalize queries and keys.")
    dwm_qk_norm_all_heads: bool = flag(
        False, "With --qk-layernorm and RMSNorm, normalize over all heads together instead of each head, as OLMo2 does."
    )
    dwm_output_norm: bool = flag(
        False, "Normalize the outputs of attention and MLP instead of their inputs, as OLMo2 does."
    )
    qk_l2_norm: bool = flag(False, "Divide queries and keys by their root mean square, without learned parameters.")
    swiglu: bool = flag(False, "Use SwiGLU instead of GELU.")
    squared_relu: bool = flag(False, "Use squared ReLU instead of GELU.")
    quick_geglu: bool = flag(False, "Use a gated unit with the sigmoid approximation of GELU instead of GELU.")
    glu_linear_offset: float = flag(0.0, "Offset added to the linear half of a gated feed-forward layer.")
    activation_func_clamp_value: float | None = flag(
        None, "Clamp the inputs of the activation of a gated feed-forward layer to this value."
    )
    add_bias_linear: bool = flag(True, "Do not use biases in linear layers.", "--disable-bias-linear")
    add_qkv_bias: bool = flag(False, "Use a bias in the QKV projection, also with --disable-bias-linear.")
    untie_embeddings_and_output_weights: bool = flag(False, "Do not share the weights of embedding and output layer.")
    hidden_dropout: float = flag(0.1, "Dropout probability of hidden states.")
    attention_dropout: float = flag(0.1, "Dropout probability of attention weights.")
    init_method_std: float = flag(0.02, "Standard deviation of the initial weights.")
    init_method_xavier_uniform: bool = flag(False, "Initialize weights Xavier-uniform.")
    embedding_init_method_std: float | None = flag(
        None, "Standard deviation of the initial embeddings; with this flag they have no weight decay."
    )
    apply_query_key_layer_scaling: bool = flag(False, "Scale attention scores by 1 / layer number.")
    attention_softmax_in_fp32: bool = flag(False, "Run attention masking and softmax in fp32.")
    fp32_residual_connection: bool = flag(False, "Keep residual connections in fp32.")
    make_vocab_size_divisible_by: int = flag(128, "Pad the vocabulary to a multiple of this and the TP size.")
    padded_vocab_size: int | None = flag(
        None, "Size of the padded vocabulary, in place of --make-vocab-size-divisible-by."
    )
    transformer_impl: Literal["transformer_engine", "local", "torch"] | None = flag(
        None,
        "Which layers to use: Transformer Engine's, megatron-core's, or torch (SDPA attention, torch norms). "
        "Default: transformer_engine if it is installed and no other flag needs torch, else torch.",
    )
    attention_backend: Literal["flash", "fused", "unfused", "local", "auto"] = flag(
        "auto",
        "Kernels of attention: Transformer Engine's flash or fused, matrix products (unfused), the fastest (auto), or "
        "those of --transformer-impl local.",
    )
    use_flash_attn: bool = flag(
        False,
        "No effect: only for Megatron-LM's older models.",
        old_names=("--use-flash-attn-v1", "--use-flash-attn-v2", "--use-flash-attn-triton"),
        deprecated="leave it out",
    )
    deprecated_use_mcore_models: bool = flag(
        False,
        "No effect: the models are always megatron-core's.",
        "--use-mcore-models",
        deprecated="leave it out",
    )
    checkpoint_activations: bool = flag(
        False,
        "Recompute every layer, as in early versions of Megatron-LM.",
        deprecated="use --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    )
    activations_checkpoint_method: Literal["uniform", "block"] | None = flag(
        None,
        "Recompute layers that are chosen like this, as in early versions of Megatron-LM.",
        deprecated="use --recompute-granularity full with --recompute-method and --recompute-num-layers",
    )
    recompute_activations: bool = flag(False, "Recompute core attention in the backward pass.")
    recompute_granularity: Literal["full", "selective"] | None = flag(
        None, "Recompute whole layers (full) or the modules of --recompute-modules (selective)."
    )
    recompute_method: Literal["uniform", "block"] | None = flag(None, "How full recomputation chooses layers.")
    recompute_num_layers: int | None = flag(
        None,
        "Number of layers in one recomputed unit.",
        old_names=("--checkpoint-num-layers", "--activations-checkpoint-num-layers"),
    )
    recompute_modules: list[str] | None = flag(None, "Modules that selective recomputation covers.")
    distribute_saved_activations: bool = flag(
        False,
        "Spread recomputation checkpoints over the TP group.",
        old_names=("--distribute-checkpointed-activations",),
    )
    masked_softmax_fusion: bool = flag(
        True,
        "Do not fuse scale, mask and softmax.",
        "--no-masked-softmax-fusion",
        old_names=("--no-scaled-masked-softmax-fusion",),
    )
    bias_gelu_fusion: bool = flag(True, "Do not fuse bias and GELU.", "--no-bias-gelu-fusion")
    bias_swiglu_fusion: bool = flag(True, "Do not fuse bias and SwiGLU.", "--no-bias-swiglu-fusion")
    bias_dropout_fusion: bool = flag(True, "Do not fuse bias and dropout.", "--no-bias-dropout-fusion")
    apply_rope_fusion: bool = flag(True, "Do not fuse rotary embeddings.", "--no-rope-fusion")
    no_persist_layer_norm: bool = flag(False, "Do not use the persistent layer norm kernel.")
    gradient_accumulation_fusion: bool = flag(
        True, "Do not fuse gradient accumulation with weight gradients.", "--no-gradient-accumulation-fusion"
    )
    cross_entropy_loss_fusion: bool = flag(False, "Use the fused cross entropy.")
    cross_entropy_fusion_impl: Literal["native", "te"] = flag("native", "Implementation of the fused cross entropy.")
    calculate_per_token_loss: bool = flag(
        False, "Divide the summed loss by the global batch's tokens instead of averaging microbatches."
    )
    num_experts: int | None = flag(None, "Number of experts.", refused="only dense GPT models are; leave it out")
    multi_latent_attention: bool = flag(
        False, "Use multi-latent attention.", refused="only standard attention is; leave it out"
    )
    fp8: Literal["e4m3", "hybrid"] | None = flag(
        None, "FP8 format of matrix products; needs Transformer Engine.", "--fp8-format"
    )
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = flag("delayed", "How FP8 is scaled.")
    fp8_margin: int = flag(0, "Margin of the FP8 scale.")
    fp8_interval: int = flag(
        1, "Steps between changes of the FP8 scale; not used by newer versions of Transformer Engine."
    )
    fp8_amax_history_len: int = flag(1, "Number of steps in the history of largest values (amax) of delayed scaling.")
    fp8_amax_compute_algo: Literal["most_recent", "max"] = flag(
        "most_recent", "Which value of that history delayed scaling uses."
    )
    fp8_wgrad: bool = flag(
        True, "Compute weight gradients in higher precision than FP8.", "--no-fp8-wgrad", "--disable-fp8-wgrad"
    )
    first_last_layers_bf16: bool = flag(False, "Keep the first and last layers in bf16 under FP8.")
    num_layers_at_start_in_bf16: int = flag(1, "Number of first layers that --first-last-layers-bf16 keeps in bf16.")
    num_layers_at_end_in_bf16: int = flag(1, "Number of last layers that --first-last-layers-bf16 keeps in bf16.")

    def __post_init__(self) -> None:
        require_given(self, "num_layers hidden_size num_attention_heads seq_length", "every run needs it")
        require_at_least(
            self,
            1,
            "num_layers hidden_size num_attention_heads seq_length ffn_hidden_size kv_channels num_query_groups "
            "max_position_embeddings rotary_base rotary_seq_len_interpolation_factor rotary_scaling_factor "
            "yarn_original_max_position_embeddings make_vocab_size_divisible_by padded_vocab_size recompute_num_layers",
        )
        require_at_least(
            self, 0, "hidden_dropout attention_dropout init_method_std embedding_init_method_std layernorm_epsilon"
        )
        require_at_most(self, MAX_LAYERS, "num_layers")
        self._check_sizes()
        self._check_positions()
        self._check_companions()

    def _check_sizes(self) -> None:
        for name in ("hidden_dropout", "attention_dropout"):
            if getattr(self, name) >= 1:
                raise UserError(f"{flag_name(name)} {getattr(self, name)}: must be less than 1")
        if self.ffn < 1:
            raise UserError(
                f"--hidden-size {self.hidden_size} with --swiglu: the default feed-forward size, 8/3 of it "
                "in multiples of 64, is zero; give --ffn-hidden-size"
            )
        if self.kv_channels is None and self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"--hidden-size {self.hidden_size} is not divisible by --num-attention-heads "
                f"{self.num_attention_heads}; change one or give --kv-channels"
            )
        if self.group_query_attention and self.num_attention_heads % self.num_query_groups:
            raise UserError(
                f"--num-attention-heads {self.num_attention_heads} is not divisible by --num-query-groups "
                f"{self.num_query_groups}; change one"
            )
        kinds = {"--swiglu": self.swiglu, "--squared-relu": self.squared_relu, "--quick-geglu": self.quick_geglu}
        given = [name for name, is_given in kinds.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given)} exclude each other; give one")
        if self.qk_layernorm and self.qk_l2_norm:
            raise UserError("--qk-layernorm and --qk-l2-norm exclude each other; give one")
        if self.dwm_qk_norm_all_heads and self.normalization != "RMSNorm":
            raise UserError(
                f"--dwm-qk-norm-all-heads with --normalization {self.normalization}: only RMSNorm spans all heads; "
                "add --normalization RMSNorm"
            )
        if self.activation_func_clamp_value is not None and self.activation_func_clamp_value <= 0:
            raise UserError(f"--activation-func-clamp-value {self.activation_func_clamp_value}: must be above 0")

    def _check_positions(self) -> None:
        if self.positions == "yarn" and not 0 < self.yarn_beta_slow < self.yarn_beta_fast:
            raise UserError(
                f"--yarn-beta-slow {self.yarn_beta_slow} is not between 0 and --yarn-beta-fast {self.yarn_beta_fast}; "
                "change one"
            )
        rope = self.has_rotary_positions
        if not rope and self.max_position_embeddings is None:
            raise UserError("--max-position-embeddings is missing; give at least --seq-length")
        if self.max_position_embeddings is not None and self.seq_length > self.max_position_embeddings:
            raise UserError(
                f"--seq-length {self.seq_length} exceeds --max-position-embeddings "
                f"{self.max_position_embeddings}; raise the latter"
            )
        if not rope and not self.add_position_embedding:
            raise UserError(
                f"--no-position-embedding with --position-embedding-type {self.positions}; use the types rope or none"
            )
        if rope and self.head_size % 2:
            raise UserError(f"rotary embeddings need heads of an even size, not {self.head_size}; give --kv-channels")
        self._check_layers()
        if not 0 < self.rotary_percent <= 1:
            raise UserError(f"--rotary-percent {self.rotary_percent}: must be above 0 and at most 1")

    def _check_layers(self) -> None:
        """Check the flags that select layers, and the window."""
        frequency = self.layers_of("no_rope_freq")
        if isinstance(frequency, int) and self.num_layers % frequency:
            raise UserError(
                f"--no-rope-freq {frequency} does not divide --num-layers {self.num_layers}; change one or give a "
                "pattern"
            )
        self.layers_of("window_attn_skip_freq")
        if self.window_size is not None and self.window is None:
            raise UserError(
                f"--window-size {self.window_size}: give the number of previous tokens that a token attends to (-1 for "
                "all), and 0 for later tokens, which a GPT must not attend to, e.g. 127,0"
            )

    def _check_companions(self) -> None:
        """Refuse flags that would silently have no effect without another flag."""
        if self.recompute_activations and self.recompute_granularity == "full":
            logger.warning(
                "--recompute-activations overrules --recompute-granularity full: only attention is recomputed"
            )
        elif self.recompute_granularity == "full" and self.recompute_method is None:
            raise UserError("--recompute-granularity full needs --recompute-method; give uniform or block")
        for item in declared_flags(type(self)):
            needed = missing_flag(item.field, vars(self))
            if needed is not None and getattr(self, item.field) != item.default:
                message = f"{item.names[0]} has no effect without {needed}"
                if item.field not in TOLERATED_IN_MEGATRON_SCRIPTS:
                    raise UserError(f"{message}; add that")
                logger.warning(message)

    def layers_of(self, field: str) -> int | list[int] | None:
        """Return the layers that a field selects: an interval, or 0 or 1 for each; None if it is not given.

        Raises:
            UserError: the value is neither.
        """
        text = getattr(self, field)
        return None if text is None else parse_layers(flag_name(field), text, self.num_layers)

    @property
    def recomputation(self) -> Literal["full", "selective"] | None:
        """What is recomputed in the backward pass: full layers, or selected modules."""
        if self.early_recompute_method is not None:
            return "full"
        return "selective" if self.recompute_activations else self.recompute_granularity

    @property
    def early_recompute_method(self) -> str | None:
        """How the flags of early versions of Megatron-LM choose the layers to recompute; None if none is given."""
        return self.activations_checkpoint_method or ("uniform" if self.checkpoint_activations else None)

    @property
    def window(self) -> tuple[int, int] | None:
        """The numbers of tokens before and after a token that it attends to; None without a window."""
        words = (self.window_size or "").strip("() ").split(",")
        try:
            before, after = map(int, words)
        except ValueError:
            return None
        return (before if before >= 0 else self.seq_length, 0) if before >= -1 and after == 0 else None

    @property
    def needs_torch_layers(self) -> bool:
        """Whether only ``--transformer-impl torch`` has such layers."""
        return self.dwm_qk_norm_all_heads or self.dwm_output_norm

    @property
    def has_gated_ffn(self) -> bool:
        """Whether feed-forward layers have a gate, and so a third matrix."""
        return self.swiglu or self.quick_geglu

    @property
    def ffn(self) -> int:
        """The feed-forward hidden size; Megatron-LM's default if the flag is not given."""
        if self.ffn_hidden_size is not None:
            return self.ffn_hidden_size
        return int((4 * self.hidden_size * 2 / 3) / 64) * 64 if self.swiglu else 4 * self.hidden_size

    @property
    def head_size(self) -> int:
        """The size of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """The number of groups of query heads, each of which shares one key and value head."""
        return self.num_query_groups if self.group_query_attention else self.num_attention_heads

    @property
    def positions(self) -> str:
        """The type of position embedding."""
        return "rope" if self.use_rotary_position_embeddings else self.position_embedding_type

    @property
    def has_rotary_positions(self) -> bool:
        """Whether queries and keys are rotated by their positions."""
        return self.positions in ("rope", "yarn")
