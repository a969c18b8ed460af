"""Beside a training engine: loaders of which a group gets the same batches, and the mpu for DeepSpeed."""
