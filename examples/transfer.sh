#!/usr/bin/env bash
# A small language model learns a weighter, which a larger model, with twice the width and depth, then uses:
#
#   bash examples/transfer.sh              three seeds; everything goes to runs/transfer
#   bash examples/transfer.sh DIR SEEDS    ... to DIR, with SEEDS seeds
#
# The larger model trains on a random half of the corpus, and on the half that DSIR selects as most similar to the
# target: each with uniform weights, with the last weighter (frozen), with the weighter of the stage that the small run
# was in at the same fraction of training (staged), and with a weighter of its own (bilevel). Finished steps are not
# repeated.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly RUN=${1:-runs/transfer} SEEDS=${2:-3}
readonly ITERATIONS=${ITERATIONS:-480} BATCH=${BATCH:-128} WIDTH=${WIDTH:-64}
readonly SMALL=$RUN/small
readonly TOKENIZER=(--tokenizer-type SentencePieceTokenizer --tokenizer-model "$RUN/tokenizer.model")

# One thread per process, because JOBS runs share the machine.
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
JOBS=${JOBS:-$(python -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')}

step() { echo "[$1/6] $2"; }
# tokenize NAME: makes a dataset from $RUN/texts/NAME.jsonl.
tokenize() {
    [[ -f $RUN/data/$1_text_document.idx ]] || python tools/preprocess_data.py --input "$RUN/texts/$1.jsonl" \
        --output-prefix "$RUN/data/$1" "${TOKENIZER[@]}" --append-eod
}

step 1 "environment and corpus: prose, code and shuffled characters from Python's standard library; prose is the target"
bash tools/setup_env.sh
source .venv/bin/activate
[[ -f $RUN/corpus/shuffled.train.jsonl ]] || python tools/build_corpus.py --output "$RUN/corpus" --shuffle characters
readonly POOL=("$RUN"/corpus/{prose,code,shuffled}.train.jsonl)

step 2 "two halves of the corpus: a random one, and the one most similar to the target by DSIR"
mkdir -p "$RUN/texts"
[[ -f $RUN/texts/random.jsonl ]] || python tools/select_data.py --input "${POOL[@]}" --output "$RUN/texts/random.jsonl" \
    --method random --fraction 0.5
[[ -f $RUN/texts/dsir.jsonl ]] || python tools/select_data.py --input "${POOL[@]}" --output "$RUN/texts/dsir.jsonl" \
    --method dsir --target "$RUN/corpus/prose.target.jsonl" --fraction 0.5
cp -u "${POOL[@]}" "$RUN"/corpus/prose.{target,test}.jsonl "$RUN/texts"

step 3 "tokenizer and datasets"
[[ -f $RUN/tokenizer.model ]] || python tools/train_tokenizer.py --input "${POOL[@]}" --output-prefix "$RUN/tokenizer" \
    --vocab-size 400
for name in {prose,code,shuffled}.train random dsir prose.target prose.test; do tokenize "$name"; done

# train FOLDER SEED LAYERS WIDTH FLAGS...: one run, unless it has finished.
train() {
    local folder=$1 seed=$2 layers=$3 width=$4
    shift 4
    if grep -q '"kind": "evaluation".*"test"' "$folder/metrics.jsonl" 2>/dev/null; then return; fi
    rm -rf "$folder"
    mkdir -p "$folder"
    python pretrain_dwm.py --num-layers "$layers" --hidden-size "$width" --num-attention-heads 4 \
        --seq-length 64 --max-position-embeddings 64 --position-embedding-type rope --normalization RMSNorm --swiglu \
        --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 \
        --micro-batch-size "$BATCH" --global-batch-size "$BATCH" --train-iters "$ITERATIONS" --seed "$seed" \
        --lr 3e-3 --lr-decay-style constant --lr-warmup-iters 20 --weight-decay 0.1 --adam-beta2 0.95 \
        "${TOKENIZER[@]}" --data-cache-path "$folder/cache" --metrics-jsonl "$folder/metrics.jsonl" --num-workers 0 \
        --valid-data-path "$RUN/data/prose.test_text_document" --test-data-path "$RUN/data/prose.test_text_document" \
        --eval-interval $((ITERATIONS / 8)) --eval-iters 16 --log-interval 10 "$@" >"$folder/log.txt" 2>&1 ||
        { tail -n 3 "$folder/log.txt" >&2; return 1; }
}

step 4 "the small model (2 layers of $WIDTH) learns the weighter, in five stages"
blend=()
for name in prose code shuffled; do blend+=("$(stat -c %s "$RUN/corpus/$name.train.jsonl")" "$RUN/data/$name.train_text_document"); done
train "$SMALL" 1000 2 "$WIDTH" --train-data-path "${blend[@]}" --save "$SMALL" \
    --dwm-target-data-path "$RUN/data/prose.target_text_document"
readonly LAST=$SMALL/weighter/iter_$(printf %07d "$ITERATIONS")

step 5 "the larger model (4 layers of $((2 * WIDTH))): two halves, four weightings, $SEEDS seeds, $JOBS at the same time"
for seed in $(seq "$SEEDS"); do
    for half in random dsir; do
        for arm in uniform frozen staged bilevel; do
            case $arm in
            uniform) weighting=(--dwm-mode off) ;;
            frozen) weighting=(--dwm-mode frozen --dwm-load "$LAST") ;;
            staged) weighting=(--dwm-mode frozen --dwm-load "$SMALL/weighter") ;;
            bilevel) weighting=(--dwm-target-data-path "$RUN/data/prose.target_text_document") ;;
            esac
            while (($(jobs -rp | wc -l) >= JOBS)); do wait -n; done
            train "$RUN/runs/$half-$arm-$seed" "$seed" 4 $((2 * WIDTH)) \
                --train-data-path "$RUN/data/${half}_text_document" "${weighting[@]}" &
        done
    done
done
while (($(jobs -rp | wc -l))); do wait -n; done

step 6 "table and plot"
python benchmarks/transfer.py --runs "$RUN/runs" --seeds "$SEEDS" --output "$RUN/transfer"
