"""Writing pruned models: Hugging Face directories, masks, the 2:4 packed form and sparse kernels."""
