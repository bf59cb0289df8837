#!/usr/bin/env bash
# From an empty clone to a language model, a trained data weighting model, and a plot of the gain, on a laptop:
#
#   bash examples/quickstart.sh            everything goes to runs/quickstart
#   bash examples/quickstart.sh DIR        ... or to DIR
#
# Finished steps are not repeated; interrupted training continues from its last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly RUN=${1:-runs/quickstart}
readonly ITERATIONS=${ITERATIONS:-320}
readonly SAVE=$RUN/checkpoints UNIFORM=$RUN/uniform
readonly NAME=iter_$(printf %07d "$ITERATIONS")
readonly TOKENIZER=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/tokenizer.model")

# One thread per process, because four processes share the machine.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

step() { echo "[$1/7] $2"; }
done_already() { echo "      already done: $1"; }

step 1 "environment: .venv with pinned dependencies"
bash tools/setup_env.sh
source .venv/bin/activate

step 2 "corpus: documentation, code, comments and shuffled words from Python's standard library"
if [[ -f $RUN/corpus/shuffled.train.jsonl ]]; then done_already "$RUN/corpus"; else
    python tools/build_corpus.py --output "$RUN/corpus"
fi

step 3 "tokenizer: SentencePiece, 1024 pieces"
if [[ -f $RUN/tokenizer.model ]]; then done_already "$RUN/tokenizer.model"; else
    python tools/train_tokenizer.py --input "$RUN"/corpus/*.train.jsonl --output-prefix "$RUN/tokenizer" --vocab-size 1024
fi

step 4 "indexed datasets"
if [[ -f $RUN/data/prose.test_text_document.idx ]]; then done_already "$RUN/data"; else
    python tools/preprocess_data.py --output-prefix "$RUN/data/" --output-per-file "${TOKENIZER[@]}" --append-eod \
        --input "$RUN"/corpus/{prose,code,comments,shuffled}.train.jsonl "$RUN"/corpus/prose.{target,test}.jsonl
fi

# The model is split over four processes, on CPUs or on four GPUs; with fewer GPUs there is a single process.
PROCESSES=4 LAYOUT=(--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2)
if python -c 'import sys, torch; sys.exit(not 0 < torch.cuda.device_count() < 4)'; then
    PROCESSES=1 LAYOUT=(--tensor-model-parallel-size 1 --pipeline-model-parallel-size 1)
fi
# The target set is prose. Seven tenths of the training data, code and shuffled words, are of little use for it. Evaluation
# is on other prose.
data=()
for part in 0.2:prose 0.3:code 0.1:comments 0.4:shuffled; do
    data+=("${part%%:*}" "$RUN/data/${part##*:}.train_text_document")
done
# train FOLDER FLAGS...: runs or continues one run.
train() {
    local save=$1
    shift
    if [[ -d $save/$NAME && $(<"$save/latest_checkpointed_iteration.txt") == "$ITERATIONS" ]]; then
        done_already "$save"
        return
    fi
    torchrun --nproc-per-node "$PROCESSES" --standalone pretrain_dwm.py "${LAYOUT[@]}" \
        --num-layers 4 --hidden-size 128 --num-attention-heads 4 --seq-length 64 --max-position-embeddings 64 \
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear \
        --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.05 \
        --micro-batch-size 16 --global-batch-size 64 --train-iters "$ITERATIONS" \
        --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-fraction 0.0625 --weight-decay 0.1 --adam-beta2 0.95 \
        "${TOKENIZER[@]}" --train-data-path "${data[@]}" --valid-data-path "$RUN/data/prose.test_text_document" \
        --save "$save" --load "$save" --save-interval 80 --eval-interval 40 --eval-iters 4 --log-interval 10 \
        --tensorboard-dir "$save/tensorboard" --num-workers 0 "$@"
}
step 5 "pretraining with learned weights: $ITERATIONS iterations on $PROCESSES process(es) ${LAYOUT[*]}"
train "$SAVE" --dwm-target-data-path "$RUN/data/prose.target_text_document"

step 6 "the same with uniform weights, for comparison"
train "$UNIFORM" --dwm-mode off

step 7 "plot"
python tools/plot_run.py --run "$SAVE" --baseline "$UNIFORM" --output "$RUN/run.png"

cat <<END

Finished. The results are in:
  checkpoint          $SAVE/$NAME
  exported weighter   $SAVE/weighter/$NAME
  metrics             $SAVE/metrics.jsonl, $SAVE/tensorboard
  plot                $RUN/run.png
END
