"""GLM-4.7-Flash from GGUF files on MLX."""

import os

# Float32 means float32: MLX's CUDA back end multiplies float32 matrices in TF32 (10 bits) unless told not to, and the
# router's choices hang on more than that. Read by MLX at its first matmul.
os.environ.setdefault("MLX_ENABLE_TF32", "0")
