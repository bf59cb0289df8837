"""Flags of Megatron-LM and of its forks that this program does not have, and why. None of them is silently ignored.

Flags that scripts also give with a value without effect (``--expert-model-parallel-size 1``) are declared with
the others, as ``refused``; those without effect for any value are in ``no_effect.py``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

UNSUPPORTED: dict[str, str] = {
    "only dense models are trained, not mixtures of experts; leave it out": """
        --moe-* --overlap-moe-expert-parallel-comm --ep-overlap-early-attn-memory-release
        --overlap-dispatch-backward-with-experts-wgrad --high-priority-a2a-comm-stream
        --use-grouped-gemm-for-shared-expert --expert-tensor-parallel-num-weight-shards
        --save-tokens-per-expert-interval""",
    "the model predicts only the next token, and only these losses are weighted; leave it out": "--mtp-*",
    "there is no distillation from a teacher; leave it out": """
        --export-kd-* --export-te-mcore-model --logits-save-* --logits-load-*""",
    "width-dependent parametrization is not supported; set --lr and --init-method-std": "--use-mup --mup-*",
    "only GPT models are supported; leave it out": """
        --bert-* --ict-* --biencoder-* --retriever-* --retro-* --faiss-use-gpu
        --report-topk-accuracies --vision-* --swin-* --dino-* --mask-* --num-classes
        --classes-fraction --data-per-class-fraction --img-* --num-channels --patch-dim --head-lr-mult
        --iter-per-epoch --titles-data-path --query-in-block-prob --use-one-sent-docs --evidence-data-path
        --block-data-path --embedding-path --indexer-* --output-bert-embeddings --short-seq-prob --sample-rate
        --vocab-extra-ids --is-hybrid-model --hybrid-attention-ratio --hybrid-mlp-ratio --hybrid-override-pattern
        --mamba-* --disable-mamba-mem-eff-path --hybrid-layer-pattern --decoder-num-layers --decoder-seq-length
        --pipeline-model-parallel-split-rank --encoder-tensor-model-parallel-size
        --encoder-pipeline-model-parallel-size""",
    "all layers are trained and have the same structure; leave it out": """
        --freeze-all-layers --heterogeneous-layers-*""",
    "a layer has one residual connection around attention and one around the MLP; leave it out": """
        --enable-mhc-connections --mhc-*""",
    "layers are chosen by --transformer-impl; use that": "--spec --model-spec",
    "flags are read only from the command line; give them there": "--yaml-cfg",
    "experimental features of megatron-core are not used; leave it out": "--enable-experimental",
    "only standard attention is supported, not latent, linear or sparse attention; leave it out": """
        --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim
        --cache-mla-latents --experimental-attention-variant --dsa-* --linear-*
        --relative-attention-* --gdp-* --mrope-section
        --use-kitchen-attention --mla-down-proj-fusion --no-dsa-* --disable-dsa-*""",
    "it changes parameters between the steps, which an outer update does not take into account; use --qk-layernorm": """
        --qk-clip*""",
    "only newer versions of Transformer Engine report attention logits; leave it out": """
        --log-max-attention-logit""",
    "model code older than megatron-core's is not included; leave it out": "--use-legacy-models",
    "it was removed from Megatron-LM; use --micro-batch-size": "--batch-size",
    "it was removed from Megatron-LM; use --lr-warmup-fraction": "--warmup",
    "it was removed from Megatron-LM; use --tensor-model-parallel-size": "--model-parallel-size",
    "a run's length is in iterations or samples; use --train-samples, --lr-decay-samples and --lr-warmup-samples": """
        --train-tokens --lr-decay-tokens --lr-warmup-tokens""",
    "DeepSpeed is not used; use --use-distributed-optimizer": "--deepspeed* --zero-* --no-pipeline-parallel",
    "it adds a loss term or leaves tokens out, so that another loss would be weighted; leave it out": """
        --use-z-loss --goldfish-*""",
    "it was removed from Megatron-LM; leave it out": "--scaled-upper-triang-masked-softmax-fusion",
    "it was removed from Megatron-LM; use --accumulate-allreduce-grads-in-fp32": "--fp32-allreduce",
    "the weights of a blend are used as they are given; leave it out": "--renormalize-blend-weights",
    "it was removed from Megatron-LM; use --fp8-format hybrid": "--fp8-hybrid",
    "it was removed from Megatron-LM; use --fp8-format e4m3": "--fp8-e4m3",
    "it was removed from Megatron-LM; use --pipeline-model-parallel-layout": "--standalone-embedding-stage",
    "embeddings have the precision of the other parameters; leave it out": "--embedding-weights-in-fp32",
    "the bounds are rounded by default; leave it out": "--yarn-correction-range-round-to-int",
    "use --num-layers": "--encoder-num-layers",
    "use --seq-length": "--encoder-seq-length",
    "all samples have the same length and are split the same way; use --context-parallel-size": """
        --hybrid-context-parallel --max-seqlen-per-dp-cp-rank""",
    "communication is megatron-core's default; leave it out": """
        --use-ring-exchange-p2p --delay-wgrad-compute --ddp-pad-buckets-for-high-nccl-busbw
        --ddp-reduce-scatter-with-fp32-accumulation --high-priority-stream-groups --nccl-communicator-config-path
        --ddp-param-name-patterns-for-fp32-local-accumulation --tensor-parallel-num-weight-shards
        --use-nccl-ub --use-sharp --sharp-enabled-group --create-all-gather-group --symmetric-ar-type
        --suggested-communication-unit-size --distributed-timeout-seconds-after-init --lazy-mpu-init
        --fake-process-group""",
    "an outer update needs complete parameters after the step; use --overlap-param-gather": """
        --overlap-param-gather-with-optimizer-step""",
    "only --use-distributed-optimizer is supported for sharding; use that": """
        --gtp-* --use-megatron-fsdp --use-custom-fsdp --*-using-custom-fsdp --use-torch-fsdp2
        --torch-fsdp2-no-reshard-after-forward --outer-dp-sharding-strategy
        --fsdp-* --megatron-fsdp-*
        --no-gradient-reduce-div-fusion --enable-full-sharding-in-hsdp --init-model-with-meta-device
        --*-strict-fsdp-dtensor-load""",
    "memory is saved only by recomputation; use --recompute-granularity": """
        --fine-grained-activation-offloading --offload-modules --min-offloaded-tensor-size
        --fine-grained-offloading-* --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks
        --activation-offload-fraction --mlp-chunks-for-training""",
    "the passes of an outer update do not fit into a captured step; leave it out": """
        --enable-cuda-graph --external-cuda-graph --cuda-graph-* --te-rng-tracker --optimizer-cuda-graph""",
    "an outer update copies 16-bit parameters; leave it out": """
        --keep-fp8-transpose-cache --reuse-grad-buf-for-mxfp8-param-ag""",
    "only Transformer Engine's FP8 recipes are supported; use one of those": """
        --fp8-recipe=custom --fp8-quantizer-factory --kitchen-config-file --kitchen-recipe-number
        --te-precision-config-file --fp8-output-proj""",
    "there is no FP4 training; use --bf16 or --fp8-format": "--fp4-*",
    "an outer update reads Adam's second moments in fp32 on the parameters' device; leave it out": """
        --use-precision-aware-optimizer --optimizer-cpu-offload""",
    "outer updates support only megatron-core's Adam and SGD; use --optimizer adam or sgd": """
        --optimizer=* --muon-* --lion-* --ademamix-*""",
    "parameter groups are megatron-core's defaults; leave it out": """
        --no-use-layer-wise-param-layout --dump-param-to-param-group-map""",
    "image models and T5 are not supported; use rope": """
        --position-embedding-type=mrope --position-embedding-type=relative""",
    "it is for models other than GPTs, or for fine-tuning; use HuggingFaceTokenizer": """
        --tokenizer-type=Bert* --tokenizer-type=*Multimodal* --tokenizer-type=SFTTokenizer""",
    "samples come only from megatron-core's datasets; use single or cyclic": "--dataloader-type=external",
    "it is for fully sharded parameters, which are not supported; use torch_dist": """
        --ckpt-format=torch_dcp --ckpt-format=fsdp_dtensor""",
    "it needs an NVIDIA library and a machine's local memory or disk; use global": """
        --non-persistent-ckpt-type=local --non-persistent-ckpt-type=in_memory""",
    "its kernels have no backward pass; use transformer_engine": "--transformer-impl=inference_optimized",
    "kernels are chosen by --transformer-impl and the --no-*-fusion flags; leave it out": """
        --disable-bf16-reduced-precision-matmul --use-te-activation-func --batch-invariant-* --disable-jit-fuser
        --fused-residual-rmsnorm --use-transformer-engine-op-fuser --use-grouped-gemm-for-dense-mlp
        --flash-attention-version --output-logit-dtype""",
    "the run checks only for losses and gradients that are not finite; leave it out": """
        --check-for-spiky-loss --check-for-large-grads --result-rejected-tracker-filename --iterations-to-skip""",
    "ranks are synchronized only by collectives; leave it out": """
        --train-sync-interval""",
    "a failed run is started again from its last checkpoint; leave it out": """
        --inprocess-* --enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters --adlr-autoresume*
        --run-workload-inspector-server""",
    "SIGTERM stops a run under --exit-signal-handler; use that": """
        --exit-signal --exit-signal-handler-for-dataloader --exit-signal-handler-for-training""",
    "batches grow only by --rampup-batch-size; use that": "--phase-transition-iterations --step-batch-size-schedule",
    "faults are injected by benchmarks/chaos.py; leave it out": "--fault-injector-*",
    "the flight recorder is set by TORCH_FR_BUFFER_SIZE and TORCH_NCCL_DUMP_ON_TIMEOUT; use these variables": """
        --flight-recorder-* --no-flight-recorder-* --disable-flight-recorder-*""",
    "there is no such report; --timing-log-level 1 shows slow ranks; leave it out": """
        --save-wgrads-interval --save-dgrads-interval --save-params-interval --save-activations-interval
        --gpu-sniff-test-interval --nvtx-ranges --pytorch-profiler-collect-chakra""",
    "records go to the log, a JSON-lines file and TensorBoard; leave it out": """
        --*one-logger* --app-tag-run-* --config-logger-dir --otel-*""",
    "checkpoints are torch_dist, in folders that all ranks share; leave it out": """
        --ckpt-pg-tensors-cache-* --ckpt-drop-redundant-extra-state
        --load-main-params-from-ckpt --load-model-opt-format --non-persistent-local-*
        --ckpt-convert-update-legacy-dist-opt-format
        --dist-ckpt-save-pre-mcore-014
        --distrib-optim-fully-reshardable-mem-efficient --replication* --use-mp-args-from-checkpoint-args
        --*-use-tokenizer-model-from-checkpoint-args --override-ckpt-iteration
        --*-ckpt-load-validate-sharding-integrity --*-stream-ckpt-dequant""",
    "the writer of --async-save has the priority of the run; leave it out": "--async-ckpt-*-priority",
    "use --tokenizer-special-tokens": "--tiktoken-special-tokens",
    "use --make-vocab-size-divisible-by 1": "--no-pad-vocab-size --disable-pad-vocab-size",
    "use --reset-attention-mask": "--dataloader-inter-document-masking",
    "tokenizers are used as they were trained; leave it out": """
        --tokenizer-hf-no-* --*-tokenizer-sentencepiece-ignore-extra-whitespaces --null-tokenizer-eod-id
        --use-gigatoken""",
    "data are local .bin and .idx files of plain text; leave it out": """
        --per-dataset-sequences-path --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap
        --object-storage-cache-path --s3-cache-path --disable-msc --enable-msc""",
    "the loader would rearrange documents at random, and with them a sample's score; leave it out": """
        --fim-*""",
    "this program pretrains only; leave it out": """
        --sft* --chat-template
        --inference-* --no-inference-* --num-speculative-tokens --use-same-sampling-seed-across-dp-ranks
        --*-chunked-prefill --flash-decode --max-tokens-to-oom --mlp-chunks-for-prefill
        --use-legacy-static-engine --decode-only-cuda-graphs --nccl-all-reduce-for-prefill
        --perform-rl-step --rl-* --no-rl-* --grpo-* --langrl-* --no-langrl-*
        --refit-method""",
}
"""Flags by the reason and remedy: names, shell patterns, or ``--flag=value`` for values that the parser lacks."""


def reason_unsupported(name: str) -> str | None:
    """Return why the flag ``name``, or the value in ``name=value``, is not supported, and the remedy.

    None if it is not known.
    """
    for reason, patterns in UNSUPPORTED.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return reason
    return None
