"""The version of triton_sp, said here and nowhere else."""

__version__ = "0.1.0"
