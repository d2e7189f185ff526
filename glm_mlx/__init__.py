"""GLM-4.7-Flash from GGUF files on MLX."""

import sys

from glm_mlx.early import quiet_start

if sys.argv[:1] == ["-m"]:  # only while `python -m glm_mlx.…` looks for a command: Ctrl-C is to print no traceback
    quiet_start()

import os

from glm_mlx.environment import set_command_buffers
from kernels.cache_folder import compiled_folder

# Float32 means float32: MLX's CUDA back end multiplies float32 matrices in TF32 (10 bits) unless told not to, and the
# router's choices hang on more than that. Read by MLX at its first matmul.
os.environ.setdefault("MLX_ENABLE_TF32", "0")

# What MLX compiles for an NVIDIA GPU it keeps, unless told another folder, below the one for temporary files, and runs
# what it finds there, whoever put it there. So without a folder of the user's own nothing is kept. Read by MLX at its
# first compilation.
if "MLX_PTX_CACHE_DIR" not in os.environ:
    os.environ["MLX_PTX_CACHE_DIR"] = str(compiled_folder() or "")

# Read by MLX when it opens a Metal device.
COMMAND_BUFFERS = set_command_buffers(os.environ)
