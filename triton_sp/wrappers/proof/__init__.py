"""Results compared with the unsharded model's: on the first call, and now and then at run time."""
