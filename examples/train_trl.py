"""TRL's SFTTrainer on a vision-language model. Run: torchrun --nproc-per-node 2 examples/train_trl.py"""

import tempfile

import tiny
import torch
import torch.distributed as dist
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import triton_sp

arguments = SFTConfig(
    tempfile.mkdtemp(),
    use_cpu=not torch.cuda.is_available(),
    bf16=torch.cuda.is_available(),
    per_device_train_batch_size=4,
    learning_rate=3e-3,
    num_train_epochs=2,
    max_length=None,  # ids must not be cut where pictures are
    gradient_checkpointing=False,
    logging_steps=4,
    save_strategy="no",
    report_to=[],
    ddp_find_unused_parameters=True,  # LLaVA does not use its tower's last layer
)  # starts torch.distributed
group = dist.new_subgroups(2)[0]
rows = Dataset.from_list([tiny.conversation(number % 4) for number in range(64)])
model = triton_sp.wrap(tiny.model(), group)
trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tiny.processor())
triton_sp.share_batches(trainer, group)  # after the trainer is made: it puts a head of its own on the model
trainer.train()
dist.destroy_process_group()
