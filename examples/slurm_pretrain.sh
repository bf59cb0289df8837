# The common part of the SLURM scripts in this folder, which source it after setting the sizes.
#
# One task per GPU. Each variable below can be set in the environment. Every DWM_SOME_FLAG=value becomes --dwm-some-flag
# value. Arguments of the script, and words in EXTRA_ARGS, are passed to pretrain_dwm.py unchanged.
#
# Submitted again, a job continues from the latest checkpoint in SAVE. Before the time limit, or when another
# job preempts this one, SLURM's signal makes the run save a checkpoint and stop; the job then requeues itself and
# continues. The same happens after --exit-interval and --exit-duration-in-mins. Submit with --no-requeue to stop there.
#
# PLAN_ONLY=1 bash examples/pretrain_1b_dwm.sh prints the plan of the run on GPUS GPUs, without SLURM, and ends.
# shellcheck shell=bash disable=SC2206 # values are split into words on purpose
set -f # and never expanded as patterns

fail() {
    echo "error: $*" >&2
    exit 2
}

require() { # VARIABLE MEANING
    [[ -n ${!1:-} ]] || fail "$1 is not set; set it to $2"
}

# Cluster. In a container (pyxis and enroot) Python is the container's.
CONTAINER_IMAGE=${CONTAINER_IMAGE:-}   # an image of enroot, such as a .sqsh file
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-} # such as /data:/data; REPO_DIR and the job's folder are mounted too
SRUN_ARGS=${SRUN_ARGS:-}               # further options of srun, such as --mpi=none --cpu-bind=cores
if [[ -n $CONTAINER_IMAGE ]]; then PYTHON=${PYTHON:-python}; else PYTHON=${PYTHON:-$REPO_DIR/.venv/bin/python}; fi
PREFLIGHT=${PREFLIGHT:-1} # 0 skips the check of all flags before the tasks start
PLAN_ONLY=${PLAN_ONLY:-0}

# Defaults for all sizes.
PRECISION=${PRECISION:-bf16} # bf16, fp16 or fp32
LR_WARMUP_FRACTION=${LR_WARMUP_FRACTION:-0.01}
TOKENIZER_TYPE=${TOKENIZER_TYPE:-HuggingFaceTokenizer}
SPLIT=${SPLIT:-99,1,0} # of DATA_PATH; not used if VALID_DATA_PATH names a separate validation set
DWM_MODE=${DWM_MODE:-bilevel}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
EVAL_INTERVAL=${EVAL_INTERVAL:-1000}
EVAL_ITERS=${EVAL_ITERS:-10}
LOG_INTERVAL=${LOG_INTERVAL:-10}
LOG_DIR=${LOG_DIR:-$SAVE/logs} # one log per node; the job's own log shows how the job ended

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
[[ -n $CONTAINER_IMAGE || -x $(command -v "$PYTHON") ]] ||
    fail "PYTHON=$PYTHON cannot be run; run tools/setup_env.sh first or set PYTHON"
[[ $PLAN_ONLY == 1 || -n ${SLURM_JOB_ID:-} ]] ||
    fail "this is not a SLURM job; start it with sbatch, or set PLAN_ONLY=1"

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
    --log-throughput
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

# Flags that keep the program's default unless their variable is set.
for name in TOKENIZER_MODEL VOCAB_SIZE VOCAB_FILE MERGE_FILE DATA_CACHE_PATH DISTRIBUTED_BACKEND TRANSFORMER_IMPL \
    ${!DWM_@}; do
    if [[ -n ${!name:-} ]]; then
        flag=${name,,}
        ARGS+=("--${flag//_/-}" "${!name}")
    fi
done
ARGS+=(${EXTRA_ARGS:-} "$@")


# NCCL keeps its defaults, which suit most clusters; docs/cluster.md describes what to change otherwise.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # required for overlapping tensor-parallel communication

if [[ $PLAN_ONLY == 1 ]]; then
    exec "$PYTHON" "$REPO_DIR/pretrain_dwm.py" --plan --plan-world-size "$GPUS" "${ARGS[@]}"
fi

# The rendezvous: determined at each start of the job, with another port than at the previous start.
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # piping to head could end scontrol, and so this script
MASTER_ADDR=${hosts%%$'\n'*}
MASTER_PORT=${MASTER_PORT:-$((10000 + (SLURM_JOB_ID + 7 * ${SLURM_RESTART_COUNT:-0}) % 20000))}
# srun does not inherit --cpus-per-task from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
SRUN=(srun --kill-on-bad-exit=1 $SRUN_ARGS)
if [[ -n $CONTAINER_IMAGE ]]; then
    [[ $(srun --help 2>&1) == *--container-image* ]] ||
        fail "CONTAINER_IMAGE=$CONTAINER_IMAGE: srun has no --container-image, which is pyxis's; install pyxis and enroot or unset it"
    mounts=$REPO_DIR:$REPO_DIR${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
    if [[ $PWD != "$REPO_DIR" ]]; then mounts+=,$PWD:$PWD; fi # where relative paths lead to
    SRUN+=(--container-image="$CONTAINER_IMAGE" --container-mounts="$mounts" --container-workdir="$PWD")
fi
mkdir -p "$LOG_DIR"

# Print the status of the run in SAVE and its iteration.
run_status() {
    local text
    text=$(cat "$SAVE/run_status.json" 2>/dev/null) || text=
    if [[ $text =~ \"status\":\ \"([a-z]+)\",\ \"iteration\":\ ([0-9]+) ]]; then
        echo "${BASH_REMATCH[1]} ${BASH_REMATCH[2]}"
    else
        echo none 0
    fi
}

# Before the tasks start, one process checks the flags and writes the plan of the run. A job that
# SLURM has started again was checked at its first start.
if [[ $PREFLIGHT == 1 && ${SLURM_RESTART_COUNT:-0} == 0 ]]; then
    PLAN=("$PYTHON" "$REPO_DIR/pretrain_dwm.py" --plan --plan-world-size "$SLURM_NTASKS" --plan-json "$SAVE/plan.json")
    if [[ -n $CONTAINER_IMAGE ]]; then PLAN=("${SRUN[@]}" --nodes=1 --ntasks=1 "${PLAN[@]}"); fi
    "${PLAN[@]}" "${ARGS[@]}"
fi

# Whether SLURM ends this job for another reason than its time limit: someone cancels it.
is_cancelled() {
    [[ $(scontrol show job "$SLURM_JOB_ID") =~ JobState=(COMPLETING|CANCELLED)\ Reason=([A-Za-z]+) ]] &&
        [[ ${BASH_REMATCH[2]} != TimeLimit ]]
}

# Requeue this job, unless it is cancelled; it is an error if it has made no iteration for the third time in a row.
requeue() { # ITERATION
    if is_cancelled; then
        echo "interrupted at iteration $1; SLURM ends the job"
        return
    fi
    local stops=$LOG_DIR/stops-without-progress
    if (($1 > iteration_before)); then rm -f "$stops"; else echo "$1" >>"$stops"; fi
    if [[ -f $stops ]] && (($(wc -l <"$stops") >= 3)); then
        rm -f "$stops"
        fail "no iteration was made since $1 in three starts; give the job more time, or its signal more notice"
    fi
    echo "interrupted at iteration $1; the job is requeued"
    scontrol requeue "$SLURM_JOB_ID" ||
        echo "this job cannot be requeued; submit it again to continue from iteration $1"
}

status_before=$(run_status)
read -r _ iteration_before <<<"$status_before"
# SLURM may signal this shell as well as the tasks, and the shell must outlive them. Without a command in the trap, the
# tasks would inherit that the signal is ignored.
trap : TERM USR1 USR2

# Each task gets its rank and the rendezvous in the variables that torch.distributed reads. A container's image, or hooks
# of enroot, may have their own values of the latter, which would win over this shell's.
"${SRUN[@]}" --output="$LOG_DIR/%x-%j-%N.log" --open-mode=append bash -c '
    export WORLD_SIZE=$SLURM_NTASKS RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID MASTER_ADDR=$1 MASTER_PORT=$2
    exec "${@:3}"' pretrain_dwm "$MASTER_ADDR" "$MASTER_PORT" \
    "$PYTHON" "$REPO_DIR/pretrain_dwm.py" "${ARGS[@]}" || code=$?

status_after=$(run_status)
read -r status iteration <<<"$status_after"
# A signal while the run started: the program ends with 75, or is ended by the signal if it cannot handle signals yet.
if [[ ${code:-0} =~ ^(138|140|143)$ && $status_after == "$status_before" ]]; then code=75; fi
case ${code:-0} in
    0) [[ $status != interrupted ]] || requeue "$iteration" ;;
    75) requeue "$iteration_before" ;;
    *) echo "the run failed; its ranks' messages are in $LOG_DIR" >&2 && exit "$code" ;;
esac
