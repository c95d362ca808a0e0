"""SparseGrad: the weight gradients of MLP layers made sparse in a Tucker (HOSVD) basis.

Source: Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP Layers",
EMNLP 2024, arXiv 2410.07383.
"""
