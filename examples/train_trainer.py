"""The Hugging Face Trainer, with evaluation. Run: torchrun --nproc-per-node 2 examples/train_trainer.py"""

import tempfile

import tiny
import torch
import torch.distributed as dist
from transformers import Trainer, TrainingArguments

import triton_sp

arguments = TrainingArguments(
    tempfile.mkdtemp(),
    use_cpu=not torch.cuda.is_available(),
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=3e-3,
    num_train_epochs=2,
    logging_steps=4,
    eval_strategy="epoch",
    save_strategy="no",
    report_to=[],
    ddp_find_unused_parameters=True,  # LLaVA does not use its tower's last layer
)  # starts torch.distributed
group = dist.new_subgroups(2)[0]
model = triton_sp.wrap(tiny.model(), group)
trainer = Trainer(model, arguments, train_dataset=tiny.samples(64), eval_dataset=tiny.samples(8))
triton_sp.share_batches(trainer, group)
trainer.train()
dist.destroy_process_group()
