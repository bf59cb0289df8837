"""Flags of the data weighting model and its outer update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megatron_dwm.config.flags import MAX_LAYERS, flag, require_at_least, require_at_most
from megatron_dwm.errors import UserError

Rule = Literal[
    "random",
    "loss",
    "linupper",
    "similarity",
    "source-weights",
    "source-alignment",
    "top-alignment",
    "shuffled",
    "half",
    "oracle",
]
TARGETED_RULES = ("shuffled", "similarity", "source-alignment", "top-alignment")
"""Rules whose weights depend on the target set."""
MAX_WEIGHTER_SIZE = 2**20
"""Largest width of a layer. A weighter is built after the warm-up, too late to notice that memory does not suffice."""
MAX_BUCKETS = 2**31
"""Hashes have 32 bits, and a linear weighter has one parameter for each bucket."""
MAX_CALIBRATION_POINTS = 1000
"""More are certainly a mistake: a curve needs a dozen."""
TARGET_PART = 8
"""By default, an outer update reads one target sample for this many samples of the batch."""
TARGET_MOMENTUM = 0.78
"""The running mean then has as little noise as a mean over ``TARGET_PART`` gradients: (1 + 0.78) / (1 - 0.78) = 8."""
_OF_SOURCES = ("oracle", "source-weights")
"""Rules that need ``--dwm-rule-sources``."""


@dataclass(frozen=True)
class WeightingConfig:
    """Data weighting model (DWM)."""

    dwm_mode: Literal["off", "frozen", "bilevel", "rule"] = flag(
        "bilevel",
        "off: plain training without weights; frozen: weights from the trained weighter of --dwm-load; bilevel: train "
        "a weighter during the run; rule: weights from --dwm-rule, for comparison.",
    )
    dwm_rule: Rule | None = flag(
        None,
        "Rule for --dwm-mode rule. random: normally distributed scores; loss: a sample's loss before the step, "
        "standardized; linupper: low losses count for less, high ones are capped; similarity: cosine similarity of the "
        "language model's mean hidden states of the sample and of the target set, standardized; source-weights: a "
        "fixed weight for each source; source-alignment: alignments averaged by source, without a weighter; "
        "top-alignment: only the samples of each batch with the highest alignments count; shuffled: a weighter is "
        "trained, and its scores are permuted among the samples of the batch; half: a random half of the training "
        "samples counts; oracle: only samples of --dwm-rule-sources count.",
    )
    dwm_rule_strength: float = flag(1.0, "Standard deviation of the scores of the rules random, loss and similarity.")
    dwm_rule_sources: list[str] | None = flag(
        None,
        "Names of sources of the training data: with the rule oracle, those whose samples count; with the rule "
        "source-weights, those that --dwm-rule-weights applies to.",
    )
    dwm_rule_weights: list[float] | None = flag(
        None,
        "Weights of --dwm-rule-sources with the rule source-weights, relative to each other and to a weight of 1 for "
        "sources that are not named.",
    )
    dwm_rule_seed: int = flag(1, "Seed that determines which half of the samples counts with the rule half.")
    dwm_rule_fraction: float = flag(0.5, "Fraction of each batch that counts with the rule top-alignment.")
    dwm_load: str | None = flag(
        None,
        "Trained weighter for --dwm-mode frozen: an exported weighter, any Hugging Face classifier with one output, or "
        "the folder weighter of a run: the weighter of each of its stages is used at the same fraction of training.",
    )
    dwm_target_data_path: list[str] | None = flag(
        None,
        "Dataset prefix or blend of the target set, the data whose loss the weighter is trained to lower.",
        nargs="*",
        old_names=("--dwm-valid-data-path",),
    )
    dwm_target_batch_size: int | None = flag(
        None,
        "Target samples in one outer update. Default: an eighth of the global batch, rounded up so that all replicas "
        "and microbatches get the same number of samples; as many as the batch for a rule, which learns no weighter.",
    )
    dwm_target_momentum: float | None = flag(
        None,
        "Momentum of the running mean of the target gradient over outer updates, which compensates for few target "
        "samples. 0 uses each update's gradient alone. Default: 0.78, or 0 if --dwm-target-batch-size is given.",
    )
    dwm_init_from: str = flag(
        "random",
        "Initial weighter: random; lm (a copy of the language model's embedding and first layers at the end of the "
        "warm-up; use a lower --dwm-lr); or a Hugging Face folder, which may have another tokenizer.",
    )
    dwm_arch: Literal["llama", "gpt2", "modernbert", "ngram"] = flag(
        "ngram",
        "Architecture of a randomly initialized weighter. ngram reads the n-grams of tokens in a sample; modernbert is "
        "a transformer that pools the mean over the tokens; llama and gpt2 read the last token.",
    )
    dwm_num_layers: int = flag(1, "Layers of a weighter initialized at random or from the language model.")
    dwm_hidden_size: int = flag(128, "Hidden size of a randomly initialized transformer weighter.")
    dwm_num_attention_heads: int = flag(4, "Attention heads of a randomly initialized transformer weighter.")
    dwm_ffn_hidden_size: int | None = flag(
        None, "Feed-forward hidden size of a randomly initialized transformer weighter."
    )
    dwm_ngram_lengths: list[int] = flag(
        [1, 2], "Lengths of the n-grams that an ngram weighter reads; longer n-grams count more."
    )
    dwm_ngram_buckets: int | None = flag(
        None,
        "Number of buckets that an ngram weighter hashes n-grams to. Default: 16 per token of the vocabulary, rounded "
        "up to a power of two, and at least 131072.",
    )
    dwm_ngram_hidden_size: int = flag(
        0,
        "Width of an ngram weighter's embedding and of the layer above it. With 0 each bucket has one parameter: the "
        "weighter is linear, is fitted in closed form (--dwm-ridge), and does not use --dwm-lr.",
    )
    dwm_calibration_points: int = flag(
        12,
        "Points of the curve that calibrates a linear weighter's scores by the alignments of samples that it had not "
        "yet learned from; 0 for no calibration.",
    )
    dwm_ridge: float = flag(
        8.0,
        "Ridge penalty of a linear weighter's regression. A higher penalty keeps the parameters of n-grams that occur "
        "in few samples closer to zero.",
    )
    dwm_temperature: float = flag(1.0, "Temperature of the softmax that turns scores into weights.")
    dwm_kl_weight: float = flag(
        0.5,
        "Strength of the KL divergence of the weights from uniform weights in the weighter's objective; prevents "
        "the weights from collapsing.",
    )
    dwm_clip_alignment: float = flag(
        2.0, "Clip standardized alignments at this many standard deviations; 0 for no clipping."
    )
    dwm_source_offsets: bool = flag(
        False,
        "Add to the scores an offset for each source of the training data, learned from the alignments. Use it where "
        "the sources are known and differ in how useful they are. An exported weighter does not have the offsets.",
    )
    dwm_lr: float = flag(1e-3, "Learning rate of the weighter (AdamW).")
    dwm_weight_decay: float = flag(0.01, "Weight decay of the weighter.")
    dwm_clip_grad: float = flag(1.0, "Clip the weighter's gradient to this norm; 0 for no clipping.")
    dwm_num_stages: int = flag(5, "Number of stages after the warm-up; the weighter is exported at the end of each.")
    dwm_warmup_iters: int | None = flag(
        None,
        "Iterations with uniform weights before the first stage. Default: as long as a stage with --dwm-init-from lm, "
        "and 0 otherwise.",
    )
    dwm_stage_update_iters: int | None = flag(
        None,
        "Iterations at the start of each stage in which the weighter is updated. Default: the whole stage.",
    )
    dwm_update_interval: int | None = flag(
        None,
        "Iterations between outer updates (updates of the weighter). Default: a run of fewer than 8000 iterations has "
        "80 updates, a longer one an update every 100 iterations.",
    )
    dwm_weighter_steps: int = flag(
        4,
        "Weighter steps in one outer update: the first on the update's batch, the others on the same number of samples "
        "drawn from the replay. A linear weighter takes this many conjugate-gradient steps on the whole replay.",
    )
    dwm_replay: int = flag(64, "Size of the replay: the newest aligned batches, on which the weighter is trained.")
    dwm_replay_half_life: float | None = flag(
        None, "Outer updates after which a sample of the replay counts half as much. Default: all count the same."
    )
    dwm_alignment: Literal["exact", "single-sample", "finite-difference"] = flag(
        "exact",
        "How alignments are computed. exact: one backward pass at the run's micro-batch size (with Transformer "
        "Engine's layers the same as single-sample); single-sample: a backward pass with one sample per microbatch; "
        "finite-difference: two forward passes, in fp32 only.",
    )
    dwm_preconditioner: Literal["adam", "none"] = flag(
        "adam", "Precondition the target gradient as Adam preconditions its step (adam), or not (none)."
    )
    dwm_min_effective_sample_size: float = flag(
        0.1, "Warn if the effective sample size of the weights falls below this fraction of the batch."
    )
    dwm_check: bool = flag(
        False,
        "Before the first iteration, compare the gradient that trains the weighter (the hypergradient) with finite "
        "differences, and end the run if they disagree. Does not change the run otherwise. In fp32 only.",
    )
    dwm_score_batch_size: int | None = flag(
        None,
        "Samples (or windows of samples) that the weighter scores at a time. Default: 32; with an ngram weighter as "
        "many as have a million tokens, if these are more.",
    )
    dwm_score_cache: int = flag(
        500000, "Samples whose scores are cached in frozen mode, so that they need not be scored again; 0 for none."
    )

    def __post_init__(self) -> None:
        require_at_least(
            self,
            1,
            "dwm_target_batch_size dwm_num_layers dwm_hidden_size dwm_num_attention_heads dwm_ffn_hidden_size "
            "dwm_num_stages dwm_stage_update_iters dwm_update_interval dwm_weighter_steps dwm_replay "
            "dwm_score_batch_size dwm_ngram_buckets",
        )
        require_at_least(
            self,
            0,
            "dwm_kl_weight dwm_clip_alignment dwm_lr dwm_weight_decay dwm_clip_grad dwm_warmup_iters dwm_rule_strength "
            "dwm_ngram_hidden_size dwm_rule_seed dwm_score_cache dwm_calibration_points",
        )
        require_at_most(self, MAX_LAYERS, "dwm_num_layers")
        require_at_most(self, MAX_WEIGHTER_SIZE, "dwm_hidden_size dwm_ffn_hidden_size dwm_ngram_hidden_size")
        require_at_most(self, MAX_BUCKETS, "dwm_ngram_buckets")
        require_at_most(self, MAX_CALIBRATION_POINTS, "dwm_calibration_points")
        if not 0 <= self.dwm_min_effective_sample_size <= 1:
            raise UserError(
                f"--dwm-min-effective-sample-size {self.dwm_min_effective_sample_size}: must be between 0 and 1"
            )
        if self.dwm_temperature <= 0:
            raise UserError(f"--dwm-temperature {self.dwm_temperature}: must be above 0")
        if self.dwm_target_momentum is not None and not 0 <= self.dwm_target_momentum < 1:
            raise UserError(f"--dwm-target-momentum {self.dwm_target_momentum}: must be at least 0 and below 1")
        self._check_source_offsets()
        self._check_ngrams()
        self._check_rule()
        if self.dwm_mode == "frozen" and self.dwm_load is None:
            raise UserError("--dwm-mode frozen needs --dwm-load; give the folder of an exported weighter")
        if self.dwm_mode != "frozen" and self.dwm_load is not None:
            raise UserError(
                f"--dwm-load {self.dwm_load} is for --dwm-mode frozen, not {self.dwm_mode}; to train a weighter "
                "further, give it as --dwm-init-from"
            )
        if self.dwm_check and not self.has_trainable_weighter:
            raise UserError(
                f"--dwm-check is for --dwm-mode bilevel, not {self.dwm_mode}, which trains no weighter; leave it out"
            )

    def _check_source_offsets(self) -> None:
        if self.dwm_source_offsets and self.dwm_mode != "bilevel":
            raise UserError(f"--dwm-source-offsets is for --dwm-mode bilevel, not {self.dwm_mode}; leave it out")
        if self.dwm_source_offsets and self.dwm_kl_weight == 0:
            raise UserError("--dwm-kl-weight 0: the sources' offsets would be infinite; give a number above 0")

    def _check_ngrams(self) -> None:
        for name, value in (("ridge", self.dwm_ridge), ("replay-half-life", self.dwm_replay_half_life)):
            if value is not None and value <= 0:
                raise UserError(f"--dwm-{name} {value}: must be above 0")
        if self.dwm_calibration_points == 1:
            raise UserError("--dwm-calibration-points 1: a curve needs 2 or more points; give 0 for no calibration")
        if not self.dwm_ngram_lengths or min(self.dwm_ngram_lengths) < 1:
            given = " ".join(map(str, self.dwm_ngram_lengths))
            raise UserError(f"--dwm-ngram-lengths {given}: give numbers of at least 1")
        is_linear = self.dwm_arch == "ngram" and self.dwm_ngram_hidden_size == 0 and self.dwm_init_from == "random"
        if self.dwm_kl_weight == 0 and is_linear and self.has_trainable_weighter:
            raise UserError(
                "--dwm-kl-weight 0: a linear ngram weighter's scores would be infinite; give a number above 0, or "
                "--dwm-ngram-hidden-size"
            )

    def _check_rule(self) -> None:
        rule, strength, sources = self.dwm_rule, self.dwm_rule_strength, self.dwm_rule_sources
        if self.dwm_mode == "rule" and rule is None:
            raise UserError(f"--dwm-mode rule needs --dwm-rule; give one of {', '.join(get_args(Rule))}")
        if self.dwm_mode != "rule" and rule is not None:
            raise UserError(f"--dwm-rule {rule} is for --dwm-mode rule, not {self.dwm_mode}; change one")
        if strength != 1.0 and rule not in ("random", "loss", "similarity"):
            raise UserError(
                f"--dwm-rule-strength {strength} is for --dwm-rule random, loss or similarity; leave it out"
            )
        if rule in _OF_SOURCES and not sources:
            raise UserError(f"--dwm-rule {rule} needs --dwm-rule-sources; name sources of the training data")
        if rule not in _OF_SOURCES and sources:
            given = " ".join(sources)
            raise UserError(f"--dwm-rule-sources {given} is for --dwm-rule oracle or source-weights; leave it out")
        if (rule == "source-weights") != (self.dwm_rule_weights is not None):
            raise UserError("--dwm-rule source-weights and --dwm-rule-weights go together; give both or neither")
        weights = self.dwm_rule_weights or []
        if weights and (len(weights) != len(sources or []) or min(weights) <= 0):
            given = " ".join(map(str, weights))
            raise UserError(f"--dwm-rule-weights {given}: give one number above 0 for each of --dwm-rule-sources")
        if self.dwm_rule_fraction != 0.5 and rule != "top-alignment":
            raise UserError(
                f"--dwm-rule-fraction {self.dwm_rule_fraction} is for --dwm-rule top-alignment; leave it out"
            )
        if self.dwm_rule_seed != 1 and rule != "half":
            raise UserError(f"--dwm-rule-seed {self.dwm_rule_seed} is for --dwm-rule half; leave it out")
        if not 0 < self.dwm_rule_fraction <= 1:
            raise UserError(f"--dwm-rule-fraction {self.dwm_rule_fraction}: must be above 0 and at most 1")
        if rule == "source-alignment" and self.dwm_kl_weight == 0:
            raise UserError("--dwm-kl-weight 0: the sources' scores would be infinite; give a number above 0")

    @property
    def has_weighter(self) -> bool:
        """Whether there is a model that scores samples."""
        return self.dwm_mode == "frozen" or self.has_trainable_weighter

    @property
    def has_trainable_weighter(self) -> bool:
        """Whether a weighter is trained by outer updates."""
        return self.dwm_mode == "bilevel" or self.dwm_rule == "shuffled"

    @property
    def needs_target(self) -> bool:
        """Whether the weights depend on the target set."""
        return self.has_trainable_weighter or self.dwm_rule in TARGETED_RULES

    @property
    def needs_alignments(self) -> bool:
        """Whether samples are aligned with the target set."""
        return self.needs_target and self.dwm_rule != "similarity"

    @property
    def target_momentum(self) -> float:
        """The momentum of the target gradient's running mean; 0 if there is none."""
        if not self.has_trainable_weighter:
            return 0.0
        if self.dwm_target_momentum is not None:
            return self.dwm_target_momentum
        return TARGET_MOMENTUM if self.dwm_target_batch_size is None else 0.0
