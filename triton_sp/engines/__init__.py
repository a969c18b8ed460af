"""For use with training engines: loaders that give a group the same batches, and the mpu for DeepSpeed."""
