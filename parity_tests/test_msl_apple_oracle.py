"""The oracle without Apple's half: its command, and MLX's own kernels through the shim. The rest is run by hand."""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from parity_tests.msl import apple_oracle
from parity_tests.msl.apple_kernels import cases

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the executor runs on Linux")


def test_help_ends_well(capsys):
    with pytest.raises(SystemExit) as ended:
        apple_oracle.main(["-h"])
    assert ended.value.code == 0
    assert "--wheel" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.metallib", None, "No such file"),
        ("a.metallib", b"PK", "not a metallib"),
        ("a.metallib", b"MTLB" + bytes(40), "damaged metallib"),
        ("mlx_metal-0.0.1-py3.whl", b"", "whose headers are installed here"),
    ],
)
def test_a_bad_wheel_is_one_line(tmp_path: Path, capsys, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert apple_oracle.main(["--wheel", str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["block_softmax_float32", "affine_qmv_wide_float_gs_64_b_4_nv_4_kl_8_batch_0", "sdpa_vector_float_64_64"]
)
def test_mlx_kernels_through_the_shim_agree_with_mlx(name):
    """Checked builds of MLX's own Metal sources against MLX's CPU operations, in float32."""
    case = next(c for c in cases() if c.name == name)
    got = mx.array(apple_oracle.run(case, apple_oracle.shim_unit(case), "trace")[0])
    error = mx.abs(got.reshape(case.expected.shape) - case.expected).max() / mx.abs(case.expected).max()
    assert np.isfinite(error.item())
    assert error.item() < 1e-5
