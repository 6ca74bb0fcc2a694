"""A model repository for Triton from outside: its configs, what is wrong with it, a server around it, its load."""
