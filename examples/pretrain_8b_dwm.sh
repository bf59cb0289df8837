#!/usr/bin/env bash
#SBATCH --job-name=pretrain-8b-dwm
#SBATCH --nodes=32
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --requeue
#
# Pretrain a LLaMA-style model of 8 billion parameters with a data weighting model, one task per GPU:
#
#   export DATA_PATH=data/train_text_document        # training data: prefix, or "weight prefix weight prefix ..."
#   export TARGET_DATA_PATH=data/lambada_text_document  # the data whose loss the weighter is trained to lower
#   export TOKENIZER_MODEL=tokenizer                 # folder or name of a Hugging Face tokenizer
#   sbatch --gpus-per-node=8 examples/pretrain_8b_dwm.sh
#
# Submit from the repository's root, or set REPO_DIR. Options of sbatch override the directives above, for example
# --nodes=2 --cpus-per-task=12 --time=24:00:00; leave out --gpus-per-node on a cluster without GPUs. The sizes below are
# defaults: each variable can be set in the environment. slurm_pretrain.sh has the other variables and starts the run.
set -euo pipefail

REPO_DIR=${REPO_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}
if [[ ! -f $REPO_DIR/examples/slurm_pretrain.sh ]]; then
    echo "error: REPO_DIR=$REPO_DIR is not the repository; submit from its root or set REPO_DIR" >&2
    exit 2
fi

# Layout: the model is split over two GPUs, because an outer update needs memory in addition to training
GPUS=${GPUS:-256}
TP=${TP:-2}
PP=${PP:-1}

# Model: 32 x (41.9 M attention + 176.2 M feed-forward) + 2 x 128k x 4096 = 8.0 B parameters
NUM_LAYERS=${NUM_LAYERS:-32}
HIDDEN_SIZE=${HIDDEN_SIZE:-4096}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-14336}
NUM_HEADS=${NUM_HEADS:-32}
NUM_QUERY_GROUPS=${NUM_QUERY_GROUPS:-8}
SEQ_LENGTH=${SEQ_LENGTH:-4096}

# Training: 60,000 steps of 1024 x 4096 tokens, 252 billion tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-1}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-1024}
TRAIN_ITERS=${TRAIN_ITERS:-60000}
LR=${LR:-3e-4}
MIN_LR=${MIN_LR:-3e-5}

SAVE=${SAVE:-runs/pretrain_8b_dwm}

# shellcheck source=examples/slurm_pretrain.sh
source "$REPO_DIR/examples/slurm_pretrain.sh"
