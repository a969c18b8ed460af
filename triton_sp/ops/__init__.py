"""The operators of the stages pack, attend, unpack and fuse: what each computes, and which implementation runs."""
