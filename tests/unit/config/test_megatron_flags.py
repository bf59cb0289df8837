"""The flags are Megatron-LM's: same names, meaning and defaults, or refused with a reason.

``tests/fixtures/flags.json`` is what Megatron-LM's own parser (core_v0.16.1) says of its flags: spellings to
destination, default and, where there are, choices, nargs, action and a type other than str. ``newer_flags.json`` has
those that core_v0.17.0, core_v0.18.2, core_v0.19.0 and the main branch of August 2026 have and it has not
(``megatron/record_newer_flags.py``), and
``older_flags.txt`` those that releases from v2.0 to core_v0.15 had and it has not (the names in ``add_argument``).
"""

from __future__ import annotations

import itertools
import json
import re
from dataclasses import fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from megatron.core import tokenizers
from megatron.core.optimizer.optimizer_config import AdamOptimizerConfig, SGDOptimizerConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dwm.config.flags import Flag, declared_flags
from megatron_dwm.config.no_effect import OTHER_FIELDS_WITHOUT_EFFECT, NoEffectConfig
from megatron_dwm.config.run import FLAG_GROUPS, PARTS
from megatron_dwm.config.tokenizer import TokenizerConfig
from megatron_dwm.config.unsupported_flags import UNSUPPORTED, reason_unsupported
from tests.paths import ROOT
from tests.programs import run_program

FIXTURE: dict[str, dict[str, Any]] = {
    names: entry
    for file in ("flags.json", "newer_flags.json")
    for names, entry in json.loads((ROOT / "tests/fixtures" / file).read_text()).items()
}
MEGATRON = {name: entry for names, entry in FIXTURE.items() for name in names.split()}
OURS: dict[str, Flag] = {
    name: item for config_class in FLAG_GROUPS.values() for item in declared_flags(config_class) for name in item.names
}
SHARED = sorted(OURS.keys() & MEGATRON.keys())

OTHER_DEFAULTS = {
    "--rerun-mode": "a step is not run again unless it is asked for, which costs a reduction in every step",
    "--transformer-impl": "Transformer Engine only where it is installed",
    "--tokenizer-type": "Megatron-LM's pretraining script makes None the same",
    "--use-cpu-initialization": "None and False say the same",
    "--no-save-optim": "None and False say the same",
    "--no-save-rng": "None and False say the same",
    "--no-load-optim": "None and False say the same",
    "--no-load-rng": "None and False say the same",
    **dict.fromkeys(
        ("--yarn-original-max-position-embeddings", "--yarn-beta-fast", "--yarn-beta-slow"),
        "None stands for megatron-core's own defaults, which these are",
    ),
}
OLDER = set((ROOT / "tests/fixtures/older_flags.txt").read_text().split())
NOT_IN_ITS_PARSER = {
    *OLDER,
    *{"--model-spec"},  # was never released
    *{"--export-kd-cfg", "--export-kd-teacher-load", "--export-te-mcore-model"},  # added by its model optimizer
    *{"--deepspeed", "--zero-stage", "--no-pipeline-parallel", "--train-tokens"},  # Megatron-DeepSpeed's
    *{"--lr-decay-tokens", "--lr-warmup-tokens"},  # the same
    *{"--use-z-loss", "--goldfish-loss", "--ademamix-alpha"},  # forks'
}
OF_FORKS = {"--use-mpi", "--use-contiguous-buffers-in-local-ddp"}
"""Accepted, because they change nothing."""
MORE_CHOICES = {
    "--transformer-impl": {"torch"},  # our own
    "--position-embedding-type": {"yarn"},  # of newer Megatron-LMs
}


def test_flags_of_our_own_do_not_sound_like_megatrons():
    known = {
        "--metrics-jsonl",
        "--no-checkpoint-checksums",
        "--nproc",
        "--plan",
        "--plan-json",
        "--plan-world-size",
        "--eval-tasks",
        "--eval-tasks-interval",
        "--eval-tasks-limit",
        "--eval-tasks-num-fewshot",
        "--eval-tasks-text",
    }
    others = OURS.keys() - MEGATRON.keys() - OLDER - OF_FORKS
    assert all(name.startswith("--dwm-") or name in known for name in others)


def test_a_shared_flag_is_megatrons():
    for name in SHARED:
        ours, theirs = OURS[name], MEGATRON[name]
        assert ours.field == theirs["dest"], name
        assert (ours.value_type is None) == (theirs.get("action") in ("StoreTrue", "StoreFalse")), name
        if ours.value_type is not None:
            assert ours.value_type.__name__ == theirs.get("type", "str"), name
        if name in OTHER_DEFAULTS:
            assert ours.default != theirs["default"], f"no difference any more: drop {name} from OTHER_DEFAULTS"
        else:
            assert ours.default == theirs["default"], name
        assert ours.nargs == theirs.get("nargs"), name
        choices, known = set(ours.choices or ()), set(theirs.get("choices", ()))
        assert choices - known == MORE_CHOICES.get(name, set()), name
        for lacking in known - choices:
            reason = reason_unsupported(f"{name}={lacking}")
            assert reason is not None and "; use " in reason, f"{name} {lacking}"


def test_a_shared_flag_has_all_its_spellings():
    for spellings in (names.split() for names in FIXTURE):
        known = [name in OURS for name in spellings]
        assert all(known) or not any(known), spellings


def test_a_flag_that_is_not_here_is_refused_with_reason_and_remedy():
    old_names = {name for kind in FLAG_GROUPS.values() for item in declared_flags(kind) for name in item.old_names}
    for name in sorted((MEGATRON.keys() | OLDER) - OURS.keys() - old_names):
        reason = reason_unsupported(name)
        assert reason is not None and "\n" not in reason, name
        assert "; " in reason or reason.startswith("use "), name


def test_refusals_concern_flags_of_megatrons_that_are_not_here():
    for patterns in UNSUPPORTED.values():
        for pattern in patterns.split():
            if "=" in pattern:
                name, value = pattern.split("=")
                lacking = set(MEGATRON[name]["choices"]) - set(OURS[name].choices or ())
                assert any(fnmatchcase(choice, value) for choice in lacking), f"{pattern} refuses nothing"
                continue
            matched = {name for name in (*MEGATRON, *NOT_IN_ITS_PARSER) if fnmatchcase(name, pattern)}
            assert matched - OURS.keys(), f"{pattern} refuses nothing"
    assert reason_unsupported("--no-such-flag") is None


READ_BY_PROPERTIES = {
    **dict.fromkeys(
        [f"lr_{phase}_{unit}" for phase in ("decay", "warmup", "wsd_decay") for unit in ("iters", "samples")],
        "OptimizerConfig.lr_bounds",
    ),
    "lr_warmup_fraction": "OptimizerConfig.lr_bounds",
    "start_weight_decay": "OptimizerConfig.weight_decay_range",
    "end_weight_decay": "OptimizerConfig.weight_decay_range",
    "check_for_nan_in_loss_and_grad": "TrainingConfig.should_check_for_nan",
    "activations_checkpoint_method": "ModelConfig.early_recompute_method",
    "eval_interval": "DataConfig.evaluations",
    "eval_micro_batch_size": "RunSizes.from_flags",
    "accumulate_allreduce_grads_in_fp32": "OptimizerConfig.has_fp32_grads",
    "decrease_batch_size_if_needed": "RunSizes.from_flags",
    "dwm_target_batch_size": "RunSizes.from_flags",
    "dwm_target_momentum": "WeightingConfig.target_momentum",
    "grad_reduce_in_bf16": "OptimizerConfig.has_fp32_grads",
    "no_weight_decay_cond_type": "OptimizerConfig.should_decay_qk_layernorm",
    "num_layers_per_virtual_pipeline_stage": "ParallelConfig.virtual_stages",
    "num_virtual_stages_per_pipeline_rank": "ParallelConfig.virtual_stages",
    "start_eval_at_iter": "DataConfig.evaluations",
    "use_checkpoint_args": "parse_run",
    "use_rotary_position_embeddings": "ModelConfig.positions",
}
NO_EFFECT_AND_SAY_SO = OTHER_FIELDS_WITHOUT_EFFECT | {"add_position_embedding", "ckpt_format"}


def test_no_flag_is_silently_ignored():
    """Every field is read outside the configuration, or passed on to megatron-core under its name, or refused."""
    kinds = TransformerConfig, AdamOptimizerConfig, SGDOptimizerConfig, TokenizerConfig
    core = {field.name for kind in kinds for field in fields(kind)}  # megatron-core's tokenizers get all flags too
    source = "\n".join(
        path.read_text() for path in (ROOT / "megatron_dwm").rglob("*.py") if path.parent.name != "config"
    )
    ignored = {
        item.field
        for item in itertools.chain.from_iterable(map(declared_flags, PARTS.values()))
        if item.refused is None
        and item.field not in core
        and not re.search(rf"\.{item.field}\b|[\"']{item.field}[\"']", source)
    }
    assert ignored - READ_BY_PROPERTIES.keys() - NO_EFFECT_AND_SAY_SO == set()
    assert OTHER_FIELDS_WITHOUT_EFFECT - core <= ignored
    assert OTHER_FIELDS_WITHOUT_EFFECT & core == {"legacy_tokenizer"}  # given to megatron-core, whose code is next
    assert "legacy_tokenizer" not in "".join(path.read_text() for path in Path(tokenizers.__path__[0]).rglob("*.py"))


def test_the_optimizers_flags_are_in_the_parts_that_it_is_built_from():
    """``build_optimizer`` is given these, and copies the flags that megatron-core has under the same name."""
    core = {field.name for kind in (AdamOptimizerConfig, SGDOptimizerConfig) for field in fields(kind)}
    holding = {name for name, part in PARTS.items() if core & {field.name for field in fields(part)}}
    assert holding == {"optimizer", "model", "parallel", "profiling"}


def test_the_page_of_flags_is_up_to_date():
    """If it is not: ``python tools/write_flags.py``."""
    checked = run_program("tools/write_flags.py", "--check")
    assert checked.returncode == 0, checked.stderr


def test_the_page_says_where_each_flag_comes_from():
    no_effect = {item.field for item in declared_flags(NoEffectConfig)} | OTHER_FIELDS_WITHOUT_EFFECT
    page = (ROOT / "docs/flags.md").read_text().partition("## Not supported")[0]
    found = {}
    for row in re.findall(r"^\| (`--.*) \|$", page, re.MULTILINE):
        flags, _, origin, _ = row.split(" | ", 3)
        found.update(dict.fromkeys(re.findall(r"`(--[^`]+)`", flags), origin))
    theirs = MEGATRON.keys()
    expected = {
        name: "no effect" if item.field in no_effect else "Megatron-LM" if name in theirs | OLDER else "Megatron-DWM"
        for name, item in OURS.items()
    }
    assert found == expected
