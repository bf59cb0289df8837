#!/usr/bin/env bash
#SBATCH --job-name=pretrain-370m-dwm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --requeue
#
# Pretrain a LLaMA-style model of 374 million parameters with a data weighting model, one task per GPU:
#
#   export DATA_PATH=data/train_text_document        # training data: prefix, or "weight prefix weight prefix ..."
#   export TARGET_DATA_PATH=data/lambada_text_document  # the data whose loss the weighter is trained to lower
#   export TOKENIZER_MODEL=tokenizer                 # folder or name of a Hugging Face tokenizer
#   sbatch --gpus-per-node=8 examples/pretrain_370m_dwm.sh
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

# Layout: the whole model on every GPU
GPUS=${GPUS:-8}
TP=${TP:-1}
PP=${PP:-1}

# Model: 24 x (4.2 M attention + 8.7 M feed-forward) + 2 x 32k x 1024 = 374 M parameters, the size and the number of
# tokens of the method's paper
NUM_LAYERS=${NUM_LAYERS:-24}
HIDDEN_SIZE=${HIDDEN_SIZE:-1024}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-2816}
NUM_HEADS=${NUM_HEADS:-16}
NUM_QUERY_GROUPS=${NUM_QUERY_GROUPS:-16}
SEQ_LENGTH=${SEQ_LENGTH:-2048}

# Training: 30,000 steps of 512 x 2048 tokens, 31 billion tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-8}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512}
TRAIN_ITERS=${TRAIN_ITERS:-30000}
LR=${LR:-5e-4}
MIN_LR=${MIN_LR:-5e-5}

SAVE=${SAVE:-runs/pretrain_370m_dwm}

# shellcheck source=examples/slurm_pretrain.sh
source "$REPO_DIR/examples/slurm_pretrain.sh"
