"""Export pruned models: Hugging Face directories, mask files, the 2:4 packed form and sparse kernels."""
