"""Where models and texts come from: folders, files, packages and the Hugging Face hub."""
