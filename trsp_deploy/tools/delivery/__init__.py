"""What goes out with a finished run: its files held against a manifest, signatures, a model card, the hub."""
