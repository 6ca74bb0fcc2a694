"""A Triton server from outside: started and stopped without leftovers, asked under load, its times told."""
