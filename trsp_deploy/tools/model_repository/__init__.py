"""A model repository for Triton as files: its configs, what goes into it, its manifest, what is wrong with one."""
