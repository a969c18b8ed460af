# ms-swift: TRITON_SP_SIZE=2 sh examples/train_swift.sh triton-sp launch
# With chunked_loss, training returns no logits: ms-swift would count correct tokens by logits of the whole batch.
export TRITON_SP_CONFIG='{"chunked_loss": true}'
exec "$@" -m swift.cli.sft \
    --model model --model_type llama --template dummy \
    --tuner_type full --torch_dtype float32 \
    --dataset chat.jsonl --split_dataset_ratio 0 \
    --dataset_shuffle false --train_dataloader_shuffle false \
    --use_logits_to_keep false \
    --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --max_steps 3 \
    --learning_rate 0.5 --lr_scheduler_type constant --warmup_ratio 0 \
    --optim sgd --weight_decay 0 --max_grad_norm 0 \
    --logging_steps 1 --report_to none --add_version false --output_dir out \
    --use_cpu true  # leave this out on GPUs
