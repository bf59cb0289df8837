"""Flags of Megatron-LM and of its forks that this program does not have, and why. None of them is silently ignored.

Flags that scripts also give with a value without effect (``--expert-model-parallel-size 1``) are declared with
the others, as ``refused``; those without effect for any value are in ``no_effect.py``.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

UNSUPPORTED: dict[str, str] = {
    "only dense models are trained, whose every token passes every parameter; leave it out": """
        --moe-* --overlap-moe-expert-parallel-comm --ep-overlap-early-attn-memory-release
        --overlap-dispatch-backward-with-experts-wgrad --high-priority-a2a-comm-stream
        --use-grouped-gemm-for-shared-expert --expert-tensor-parallel-num-weight-shards
        --save-tokens-per-expert-interval""",
    "the model predicts the next token alone, whose losses are what is weighted; leave it out": "--mtp-*",
    "there is no distillation from a teacher; leave it out": """
        --export-kd-* --export-te-mcore-model --logits-save-* --logits-load-*""",
    "there is no parametrization by width; set --lr and --init-method-std": "--use-mup --mup-*",
    "only GPT models are trained; leave it out": """
        --bert-* --ict-* --biencoder-* --retriever-* --vision-* --swin-* --dino-* --mask-* --num-classes
        --classes-fraction --data-per-class-fraction --img-* --num-channels --patch-dim --head-lr-mult
        --iter-per-epoch --titles-data-path --query-in-block-prob --use-one-sent-docs --evidence-data-path
        --block-data-path --embedding-path --indexer-* --output-bert-embeddings --short-seq-prob --sample-rate
        --vocab-extra-ids --is-hybrid-model --hybrid-attention-ratio --hybrid-mlp-ratio --hybrid-override-pattern
        --mamba-* --disable-mamba-mem-eff-path --hybrid-layer-pattern --decoder-num-layers --decoder-seq-length""",
    "every layer is trained, and all are alike; leave it out": "--freeze-all-layers --heterogeneous-layers-*",
    "layers are chosen by --transformer-impl; use that": "--spec",
    "flags are read from the command line alone; give them there": "--yaml-cfg",
    "what megatron-core calls experimental is not used; leave it out": "--enable-experimental",
    "attention is the standard one, neither latent, linear nor sparse; leave it out": """
        --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim --v-head-dim
        --cache-mla-latents --experimental-attention-variant --dsa-* --linear-*
        --relative-attention-* --mrope-section --use-fused-weighted-squared-relu --use-te-activation-func
        --use-kitchen-attention --mla-down-proj-fusion --no-dsa-* --disable-dsa-*""",
    "it changes weights between the steps, which an outer update does not look ahead to; use --qk-layernorm": """
        --qk-clip*""",
    "Transformer Engine's attention alone tells its logits, and in newer versions; leave it out": """
        --log-max-attention-logit""",
    "model code older than megatron-core's is gone; leave it out": "--use-legacy-models",
    "Megatron-LM no longer has it; use --micro-batch-size": "--batch-size",
    "Megatron-LM no longer has it; use --lr-warmup-fraction": "--warmup",
    "Megatron-LM no longer has it; use --tensor-model-parallel-size": "--model-parallel-size",
    "Megatron-LM no longer has it; use --recompute-granularity full --recompute-method uniform": """
        --activations-checkpoint-method""",
    "DeepSpeed is not used; use --use-distributed-optimizer": "--deepspeed* --zero-* --no-pipeline-parallel",
    "it adds a term to the losses or leaves tokens out, so that what is weighted is another loss; leave it out": """
        --use-z-loss --goldfish-*""",
    "Megatron-LM's guide has it, its parser has not; use --fp8-format hybrid": "--fp8-hybrid",
    "the bounds are rounded by default; leave it out": "--yarn-correction-range-round-to-int",
    "use --num-layers": "--encoder-num-layers",
    "use --seq-length": "--encoder-seq-length",
    "samples are of one length, so all are divided alike; use --context-parallel-size": """
        --hybrid-context-parallel --max-seqlen-per-dp-cp-rank""",
    "communication is megatron-core's default; leave it out": """
        --use-ring-exchange-p2p --delay-wgrad-compute --ddp-pad-buckets-for-high-nccl-busbw
        --ddp-reduce-scatter-with-fp32-accumulation --high-priority-stream-groups --nccl-communicator-config-path
        --ddp-param-name-patterns-for-fp32-local-accumulation --tensor-parallel-num-weight-shards
        --use-nccl-ub --use-sharp --sharp-enabled-group --create-all-gather-group --symmetric-ar-type
        --suggested-communication-unit-size --distributed-timeout-seconds-after-init --lazy-mpu-init
        --fake-process-group""",
    "an outer update copies parameters that are whole after the step; use --overlap-param-gather": """
        --overlap-param-gather-with-optimizer-step""",
    "parameters are sharded by --use-distributed-optimizer alone; use that": """
        --use-megatron-fsdp --use-torch-fsdp2 --torch-fsdp2-no-reshard-after-forward --outer-dp-sharding-strategy
        --fsdp-* --megatron-fsdp-*
        --no-gradient-reduce-div-fusion --enable-full-sharding-in-hsdp --init-model-with-meta-device
        --*-strict-fsdp-dtensor-load""",
    "memory is saved by recomputation alone; use --recompute-granularity": """
        --fine-grained-activation-offloading --offload-modules --min-offloaded-tensor-size
        --fine-grained-offloading-* --delay-offload-until-cuda-graph --delta-offload-bytes-across-pp-ranks
        --activation-offload-fraction --mlp-chunks-for-training""",
    "the passes of an outer update do not fit into a captured step; leave it out": """
        --enable-cuda-graph --external-cuda-graph --cuda-graph-* --te-rng-tracker --optimizer-cuda-graph""",
    "parameters are kept in 16 bits, as the outer update copies them; leave it out": """
        --keep-fp8-transpose-cache --reuse-grad-buf-for-mxfp8-param-ag""",
    "the FP8 recipes are Transformer Engine's own; use one of those": """
        --fp8-recipe=custom --fp8-quantizer-factory --te-precision-config-file --fp8-output-proj""",
    "there is no FP4 training; use --bf16 or --fp8-format": "--fp4-*",
    "an outer update reads Adam's second moments, which are fp32 and where the parameters are; leave it out": """
        --use-precision-aware-optimizer --optimizer-cpu-offload""",
    "an outer update is made for megatron-core's Adam and SGD; use --optimizer adam or sgd": """
        --optimizer=*muon --muon-* --lion-* --ademamix-*""",
    "parameters are grouped as megatron-core does it by default; leave it out": """
        --no-use-layer-wise-param-layout --dump-param-to-param-group-map
        --apply-wd-to-qk-layernorm --no-weight-decay-cond-type""",
    "there are no models of images and no T5; use rope": """
        --position-embedding-type=mrope --position-embedding-type=relative""",
    "it is of other models than GPTs, or of their fine-tuning; use HuggingFaceTokenizer": """
        --tokenizer-type=Bert* --tokenizer-type=*Multimodal* --tokenizer-type=SFTTokenizer""",
    "samples come from megatron-core's datasets alone; use single or cyclic": "--dataloader-type=external",
    "it is of fully sharded parameters, which are not supported; use torch_dist": """
        --ckpt-format=torch_dcp --ckpt-format=fsdp_dtensor""",
    "it needs a library of NVIDIA's and one machine's memory or disk; use global": """
        --non-persistent-ckpt-type=local --non-persistent-ckpt-type=in_memory""",
    "its kernels have no backward pass; use transformer_engine": "--transformer-impl=inference_optimized",
    "kernels are chosen by --transformer-impl and the --no-*-fusion flags; leave it out": """
        --disable-bf16-reduced-precision-matmul --batch-invariant-mode --disable-jit-fuser --fused-residual-rmsnorm
        --use-transformer-engine-op-fuser --use-grouped-gemm-for-dense-mlp --flash-attention-version""",
    "only losses and gradients that are not finite are looked for; leave it out": """
        --check-for-spiky-loss --check-for-large-grads --result-rejected-tracker-filename --iterations-to-skip""",
    "ranks keep in step by their collectives alone; leave it out": """
        --train-sync-interval""",
    "a failed run is started again from its last checkpoint; leave it out": """
        --inprocess-* --enable-ft-package --calc-ft-timeouts --ft-num-warmup-iters --adlr-autoresume*
        --run-workload-inspector-server""",
    "SIGTERM stops a run under --exit-signal-handler; use that": """
        --exit-signal --exit-signal-handler-for-dataloader --exit-signal-handler-for-training""",
    "batches grow by --rampup-batch-size; use that": "--phase-transition-iterations --step-batch-size-schedule",
    "evaluations have the batches of training; use --eval-iters": "--eval-global-batch-size --eval-micro-batch-size",
    "evaluations begin with the run; use --eval-interval": "--start-eval-at-iter",
    "benchmarks/chaos.py disturbs runs; leave it out": "--fault-injector-*",
    "torch reads TORCH_FR_BUFFER_SIZE and TORCH_NCCL_DUMP_ON_TIMEOUT; set them": """
        --flight-recorder-* --no-flight-recorder-* --disable-flight-recorder-*""",
    "there is no such report; --timing-log-level 1 shows slow ranks; leave it out": """
        --save-wgrads-interval --save-dgrads-interval --save-params-interval --save-activations-interval
        --gpu-sniff-test-interval --nvtx-ranges --pytorch-profiler-collect-chakra""",
    "records go to the log, a JSON-lines file and TensorBoard; leave it out": """
        --*one-logger* --app-tag-run-* --config-logger-dir""",
    "checkpoints are torch_dist, in folders that all ranks share; leave it out": """
        --load-main-params-from-ckpt --non-persistent-local-* --ckpt-convert-update-legacy-dist-opt-format
        --dist-ckpt-save-pre-mcore-014
        --distrib-optim-fully-reshardable-mem-efficient --replication* --use-mp-args-from-checkpoint-args
        --*-use-tokenizer-model-from-checkpoint-args --async-ckpt-* --override-ckpt-iteration
        --*-ckpt-load-validate-sharding-integrity --*-stream-ckpt-dequant""",
    "use --tokenizer-special-tokens": "--tiktoken-special-tokens",
    "use --make-vocab-size-divisible-by 1": "--no-pad-vocab-size --disable-pad-vocab-size",
    "use --reset-attention-mask": "--dataloader-inter-document-masking",
    "tokenizers read text as they were made; leave it out": """
        --tokenizer-hf-no-* --*-tokenizer-sentencepiece-ignore-extra-whitespaces --null-tokenizer-eod-id""",
    "data are local .bin and .idx files of plain text; leave it out": """
        --per-dataset-sequences-path --dataloader-fast-cache-load --dataloader-defer-npy-index-mmap
        --object-storage-cache-path --disable-msc --enable-msc""",
    "documents would be cut and put together anew at each reading, and with them a sample's score; leave it out": """
        --fim-*""",
    "this program pretrains only; leave it out": """
        --sft* --chat-template
        --inference-* --no-inference-* --num-speculative-tokens --use-same-sampling-seed-across-dp-ranks
        --*-chunked-prefill --flash-decode --max-tokens-to-oom --mlp-chunks-for-prefill
        --use-legacy-static-engine --decode-only-cuda-graphs --nccl-all-reduce-for-prefill
        --perform-rl-step --rl-* --no-rl-* --grpo-* --langrl-* --no-langrl-*
        --refit-method""",
}
"""Reason and remedy to flags by name or shell pattern, or to values that the parser lacks, as ``--flag=value``."""


def reason_unsupported(name: str) -> str | None:
    """Return why the flag ``name``, or the value in ``name=value``, is not supported, and the remedy.

    None if it is not known.
    """
    for reason, patterns in UNSUPPORTED.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns.split()):
            return reason
    return None
