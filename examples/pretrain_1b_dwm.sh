#!/usr/bin/env bash
#SBATCH --job-name=pretrain-1b-dwm
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300
#SBATCH --requeue
#
# Pretrain a LLaMA-shaped model of 1.1 billion parameters with a data weighting model, one task a GPU:
#
#   export DATA_PATH=data/train_text_document        # what to train on: prefix, or "weight prefix weight prefix ..."
#   export TARGET_DATA_PATH=data/lambada_text_document   # whose loss the weighter learns to lower
#   export TOKENIZER_MODEL=tokenizer                 # folder (or name) of a Hugging Face tokenizer
#   sbatch --gpus-per-node=8 examples/pretrain_1b_dwm.sh
#
# Submit from the repository's root, or set REPO_DIR. Options of sbatch override the directives above, for example
# --nodes=4 --gpus-per-node=8 --cpus-per-task=12 --time=24:00:00; a cluster without GPUs wants no --gpus-per-node.
# The sizes below are defaults: each variable can be set in the environment. Every DWM_SOME_FLAG=value becomes
# --dwm-some-flag value. Words after the script's name, and those in EXTRA_ARGS, go to pretrain_dwm.py as they are.
#
# Submitting the same again continues from the latest checkpoint in SAVE. When the time limit draws near, or another job
# preempts this one, SLURM's signal makes the run save a checkpoint and stop; the job then puts itself back into the queue
# and goes on. So it does after --exit-interval and --exit-duration-in-mins. Submit with --no-requeue to stop there.
set -euo pipefail
set -f # values are split into words, never expanded as patterns

fail() {
    echo "error: $*" >&2
    exit 2
}

require() { # VARIABLE MEANING
    [[ -n ${!1:-} ]] || fail "$1 is not set; set it to $2"
}

# Cluster
REPO_DIR=${REPO_DIR:-${SLURM_SUBMIT_DIR:-$PWD}}
PYTHON=${PYTHON:-$REPO_DIR/.venv/bin/python}
TP=${TP:-2}
PP=${PP:-2}

# Model: 16 x (10.5 M attention + 50.3 M feed-forward) + 2 x 32k x 2048 = 1.1 B parameters
NUM_LAYERS=${NUM_LAYERS:-16}
HIDDEN_SIZE=${HIDDEN_SIZE:-2048}
FFN_HIDDEN_SIZE=${FFN_HIDDEN_SIZE:-8192}
NUM_HEADS=${NUM_HEADS:-32}
NUM_QUERY_GROUPS=${NUM_QUERY_GROUPS:-8}
SEQ_LENGTH=${SEQ_LENGTH:-2048}
PRECISION=${PRECISION:-bf16} # bf16, fp16 or fp32

# Training: 30,000 steps of 512 x 2048 tokens, 31 billion tokens
MICRO_BATCH_SIZE=${MICRO_BATCH_SIZE:-4}
GLOBAL_BATCH_SIZE=${GLOBAL_BATCH_SIZE:-512}
TRAIN_ITERS=${TRAIN_ITERS:-30000}
LR=${LR:-3e-4}
MIN_LR=${MIN_LR:-3e-5}
LR_WARMUP_FRACTION=${LR_WARMUP_FRACTION:-0.01}

# Data and weighting
TOKENIZER_TYPE=${TOKENIZER_TYPE:-HuggingFaceTokenizer}
SPLIT=${SPLIT:-99,1,0} # of DATA_PATH, unless VALID_DATA_PATH names a validation set of its own
DWM_MODE=${DWM_MODE:-bilevel}

# Checkpoints and logs
SAVE=${SAVE:-runs/pretrain_1b_dwm}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
EVAL_INTERVAL=${EVAL_INTERVAL:-1000}
EVAL_ITERS=${EVAL_ITERS:-10}
LOG_INTERVAL=${LOG_INTERVAL:-10}

require DATA_PATH "the prefix of the training data (.bin and .idx), or weights and prefixes"
[[ $DWM_MODE != bilevel ]] || require TARGET_DATA_PATH "the prefix of the target data, or use DWM_MODE=off"
[[ $DWM_MODE != frozen ]] || require DWM_LOAD "the folder of an exported weighter"
case $TOKENIZER_TYPE in
    NullTokenizer) require VOCAB_SIZE "the size of the vocabulary" ;;
    GPT2BPETokenizer) require VOCAB_FILE "the vocabulary's file" && require MERGE_FILE "the file of merges" ;;
    *) require TOKENIZER_MODEL "the tokenizer's file or folder" ;;
esac
[[ $PRECISION =~ ^(bf16|fp16|fp32)$ ]] || fail "PRECISION=$PRECISION is not known; use bf16, fp16 or fp32"
[[ -f $REPO_DIR/pretrain_dwm.py ]] ||
    fail "REPO_DIR=$REPO_DIR has no pretrain_dwm.py; submit from the repository's root or set REPO_DIR"
[[ -x $(command -v "$PYTHON") ]] || fail "PYTHON=$PYTHON cannot be run; run tools/setup_env.sh first or set PYTHON"
[[ -n ${SLURM_JOB_ID:-} ]] || fail "this is not a SLURM job; start it with sbatch"

ARGS=(
    --tensor-model-parallel-size "$TP"
    --pipeline-model-parallel-size "$PP"
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather

    --num-layers "$NUM_LAYERS"
    --hidden-size "$HIDDEN_SIZE"
    --ffn-hidden-size "$FFN_HIDDEN_SIZE"
    --num-attention-heads "$NUM_HEADS"
    --group-query-attention
    --num-query-groups "$NUM_QUERY_GROUPS"
    --seq-length "$SEQ_LENGTH"
    --max-position-embeddings "$SEQ_LENGTH"
    --position-embedding-type rope
    --normalization RMSNorm
    --swiglu
    --disable-bias-linear
    --untie-embeddings-and-output-weights
    --attention-dropout 0
    --hidden-dropout 0

    --micro-batch-size "$MICRO_BATCH_SIZE"
    --global-batch-size "$GLOBAL_BATCH_SIZE"
    --train-iters "$TRAIN_ITERS"
    --lr "$LR"
    --min-lr "$MIN_LR"
    --lr-decay-style cosine
    --lr-warmup-fraction "$LR_WARMUP_FRACTION"
    --weight-decay 0.1
    --adam-beta2 0.95
    --clip-grad 1.0

    --tokenizer-type "$TOKENIZER_TYPE"
    --save "$SAVE"
    --load "$SAVE"
    --save-interval "$SAVE_INTERVAL"
    --eval-interval "$EVAL_INTERVAL"
    --eval-iters "$EVAL_ITERS"
    --log-interval "$LOG_INTERVAL"
    --metrics-jsonl "$SAVE/metrics.jsonl"
    --tensorboard-dir "$SAVE/tensorboard"
    --exit-signal-handler
)

if ((TP > 1)); then ARGS+=(--sequence-parallel); fi
if [[ $PRECISION != fp32 ]]; then ARGS+=("--$PRECISION"); fi
if [[ -n ${VALID_DATA_PATH:-} ]]; then
    ARGS+=(--train-data-path $DATA_PATH --valid-data-path $VALID_DATA_PATH)
else
    ARGS+=(--data-path $DATA_PATH --split "$SPLIT")
fi
if [[ $DWM_MODE == bilevel ]]; then ARGS+=(--dwm-target-data-path $TARGET_DATA_PATH); fi

# Flags that are left to the program unless their variable is set.
for name in TOKENIZER_MODEL VOCAB_SIZE VOCAB_FILE MERGE_FILE DATA_CACHE_PATH DISTRIBUTED_BACKEND TRANSFORMER_IMPL \
    ${!DWM_@}; do
    if [[ -n ${!name:-} ]]; then
        flag=${name,,}
        ARGS+=("--${flag//_/-}" "${!name}")
    fi
done
ARGS+=(${EXTRA_ARGS:-} "$@")

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=${MASTER_PORT:-$((10000 + SLURM_JOB_ID % 20000))}
export MASTER_ADDR MASTER_PORT
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # tensor parallelism's overlap counts on the order
# srun does not take --cpus-per-task over from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi

# Print the status of the run in SAVE and its iteration.
run_status() {
    "$PYTHON" -c 'import json, sys; run = json.load(open(sys.argv[1])); print(run["status"], run["iteration"])' \
        "$SAVE/run_status.json" 2>/dev/null || echo none 0
}

read -r _ iteration_before <<<"$(run_status)"
# SLURM may signal this shell as well as the tasks; it has to outlive them. Without a command in the trap, tasks would
# inherit that the signal is ignored.
trap : TERM USR1 USR2

# Each task gets its place among the others in the variables that torch.distributed reads.
srun --kill-on-bad-exit=1 bash -c '
    export WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec "$@"' pretrain_dwm "$PYTHON" "$REPO_DIR/pretrain_dwm.py" "${ARGS[@]}"

read -r status iteration <<<"$(run_status)"
if [[ $status == interrupted ]]; then
    if ((iteration <= iteration_before)); then
        fail "no iteration was made since iteration $iteration_before; give the job more time, or its signal more notice"
    fi
    echo "interrupted at iteration $iteration; the job goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "this job cannot be requeued; submit the same again to continue from iteration $iteration"
fi
